"""What a scene is called: a small Chinese grammar with measure words and variants.

一个红苹果 · 蓝色背景上的三只狐狸 · 左边是狐狸，右边是苹果 · 狗在猫的上面，背景是红色的
"""

from __future__ import annotations

from cogview.data.emoji.draws import Draws
from cogview.data.emoji.scene import Colour, Scene
from cogview.data.emoji.things import Thing

# Percentages of the captions that say it the rarer way.
_UNNAMED_COLOUR = 20
_RARE_COLOUR_NAME = 20
_SYNONYM = 20
_RARE_MEASURE = 15
_DIGIT = 15
_BARE_NAME = 40

_NUMERALS = {1: "一", 2: "两", 3: "三", 4: "四"}

# {a} is the left or upper thing, {b} the right or lower one. Every way of saying it stands here with its mirror image,
# so that the order in which the things are named tells nothing: a model has to read which is where.
_PAIRS = {
    "beside": (
        "左边是{a}，右边是{b}",
        "左边有{a}，右边有{b}",
        "{a}在左边，{b}在右边",
        "{a}在{b}的左边",
        "{a}在{b}左边",
        "{a}的右边是{b}",
        "右边是{b}，左边是{a}",
        "右边有{b}，左边有{a}",
        "{b}在右边，{a}在左边",
        "{b}在{a}的右边",
        "{b}在{a}右边",
        "{b}的左边是{a}",
    ),
    "above": (
        "上面是{a}，下面是{b}",
        "上面有{a}，下面有{b}",
        "{a}在上面，{b}在下面",
        "{a}在{b}的上面",
        "{a}在{b}上面",
        "{a}在{b}上方",
        "{a}的下面是{b}",
        "下面是{b}，上面是{a}",
        "下面有{b}，上面有{a}",
        "{b}在下面，{a}在上面",
        "{b}在{a}的下面",
        "{b}在{a}下面",
        "{b}在{a}下方",
        "{b}的上面是{a}",
    ),
}

_NOUN_ON_COLOUR = (
    "{colour}背景上的{what}",
    "{colour}背景上的{what}",
    "{colour}背景上有{what}",
    "{colour}背景，{what}",
    "{what}，{colour}背景",
    "{what}，背景是{colour}的",
    "{what}，背景是{colour}",
)
_CLAUSE_ON_COLOUR = (
    "{colour}背景上，{what}",
    "{colour}背景上，{what}",
    "{colour}背景，{what}",
    "{what}，{colour}背景",
    "{what}，背景是{colour}的",
    "{what}，背景是{colour}",
)


def write_caption(scene: Scene, draws: Draws, complete: bool) -> str:
    """A caption of ``scene``. Things, count and relation are always said; the colour too where ``complete``."""
    if scene.kind in _PAIRS:
        bare = draws.chance(_BARE_NAME)  # both with a measure word or both without, as people do
        upper_or_left, lower_or_right = (_count(thing, 1, bare, draws) for thing in scene.things)
        what = draws.pick(_PAIRS[scene.kind]).format(a=upper_or_left, b=lower_or_right)
        patterns: tuple[str, ...] = _CLAUSE_ON_COLOUR
    else:
        bare = scene.kind == "one" and draws.chance(_BARE_NAME)
        what = _count(scene.things[0], scene.count, bare, draws)
        patterns = _NOUN_ON_COLOUR
    if not complete and draws.chance(_UNNAMED_COLOUR):
        return what
    return draws.pick(patterns).format(colour=_name_colour(scene.colour, draws), what=what)


def _count(thing: Thing, count: int, bare: bool, draws: Draws) -> str:
    """三只狐狸, 3只狐狸, or 狐狸 where ``bare``."""
    name = thing.name
    if thing.synonyms and draws.chance(_SYNONYM):
        name = draws.pick(thing.synonyms)
    if bare:
        return name
    measure = thing.measures[0]
    if len(thing.measures) > 1 and draws.chance(_RARE_MEASURE):
        measure = draws.pick(thing.measures[1:])
    number = str(count) if draws.chance(_DIGIT) else _NUMERALS[count]
    return f"{number}{measure}{name}"


def _name_colour(colour: Colour, draws: Draws) -> str:
    if len(colour.names) > 1 and draws.chance(_RARE_COLOUR_NAME):
        return draws.pick(colour.names[1:])
    return colour.name
