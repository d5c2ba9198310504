"""Captions of rich scenes: styles, patterns, rows, places, signs, and parts that are left open.

三只扁平风格的狐狸，蓝色条纹背景 · 从左到右是狗、猫和鱼 · 书包里有一只猫 · 一块红色的牌子，上面写着“福”
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.attributes import STYLES, Pattern, Sign, Style
from cogview.emoji.captions import CLAUSE_ON_COLOUR, NOUN_ON_COLOUR, NUMERALS, PAIRS, name_colour
from cogview.emoji.scene import Colour, Scene, SceneKind
from cogview.emoji.settings import CaptionRates
from cogview.emoji.things import EmojiObject
from cogview.emoji.traditional import to_traditional

# Percentages of the captions with the rarer wording.
_SYNONYM = 20
_RARE_MEASURE = 15
_DIGIT = 15
_BARE_NAME = 40
_BARE_SIGN = 40
_FIRST_STYLE = 40  # of the captions that name other styles
_STYLE_AT_NOUN = 50
_TRADITIONAL_SEED = "traditional"

ALL_NUMERALS = {**NUMERALS, 5: "五", 6: "六"}

CLAUSES: Mapping[SceneKind, Sequence[str]] = {
    # {a}, {b} and {c} are the objects in the order of the scene.
    **PAIRS,
    "left": ("左边是{a}", "左边有{a}", "{a}在左边"),
    "right": ("右边是{a}", "右边有{a}", "{a}在右边"),
    "top": ("上面是{a}", "上面有{a}", "{a}在上面"),
    "bottom": ("下面是{a}", "下面有{a}", "{a}在下面"),
    "row": (
        "从左到右是{a}、{b}和{c}",
        "从左到右是{a}、{b}、{c}",
        "从左到右依次是{a}、{b}和{c}",
        "左边是{a}，中间是{b}，右边是{c}",
        "左边有{a}，中间有{b}，右边有{c}",
        "{a}在左边，{b}在中间，{c}在右边",
    ),
    "inside": ("{a}里有{b}", "{a}里面有{b}", "{a}里的{b}", "{a}里面的{b}", "{b}在{a}里", "{b}在{a}里面"),
    "on": ("{b}顶上有{a}", "{b}顶上的{a}", "{a}叠在{b}上", "{b}上放着{a}", "{a}在{b}顶上"),
    "sign": ("{sign}，上面{writes}", "{sign}上{writes}", "{writes}的{sign}", "一块{writes}的{bare}"),
    "label": (
        "{a}下面的{sign}上{writes}",
        "{a}，下面的{sign}上{writes}",
        "{writes}的{sign}在{a}下面",
        "上面是{a}，下面是{writes}的{sign}",
        "上面是{a}，下面是一块{writes}的{bare}",
    ),
}
"""Wordings of the kinds of scenes that are clauses."""

TOGETHER = ("{a}和{b}", "{a}与{b}")
"""Wordings of two objects whose places are left open."""

ROW_TOGETHER = ("{a}、{b}和{c}", "{a}、{b}和{c}排成一行")
"""Wordings of three objects in a row whose places are left open."""

STYLE_FRAMES = ("{whole}，{style}风格", "{style}风格，{whole}", "{style}风格：{whole}")
"""Wordings of a style with a whole caption."""

STYLE_ADJECTIVES = ("{style}风格的",)
"""Wordings of a style before the name of an object."""

SIGN_NOUNS = ("牌子", "招牌")


class RichWriter:
    """Writer of the captions of rich scenes.

    Args:
        rates: Percentages of the captions with some property.
        traditional: Traditional characters by simplified ones.
        names_styles: Whether the world has several styles, which captions may name.
    """

    def __init__(self, rates: CaptionRates, traditional: Mapping[str, str], *, names_styles: bool) -> None:
        self.rates, self.traditional, self.names_styles = rates, traditional, names_styles

    def write(self, scene: Scene, random: KeyedRandom, *, complete: bool) -> str:
        """Return a caption of a scene.

        Args:
            scene: The scene.
            random: Source of the wording.
            complete: Leave nothing open.
        """
        rates = self.rates
        style = scene.style if self._names_style(scene, random, complete) else None
        at_noun = scene.kind in ("one", "many") and random.chance(_STYLE_AT_NOUN)
        names_colour = complete or not random.chance(rates.open_colour)
        if scene.kind in ("one", "many"):
            bare = scene.kind == "one" and random.chance(_BARE_NAME)
            what = noun(scene.things[0], scene.count, bare, random, style if at_noun else None)
            patterns: Sequence[str] = NOUN_ON_COLOUR
        else:
            what = self._clause(scene, random, complete)
            patterns = CLAUSE_ON_COLOUR
        if names_colour:
            what = random.pick(patterns).format(colour=name_background(scene.colour, scene.pattern, random), what=what)
        if style is not None and not at_noun:
            what = random.pick(STYLE_FRAMES).format(whole=what, style=random.pick(style.names))
        if self.traditional and random.chance(rates.traditional):
            return to_traditional(what, self.traditional)
        return what

    def _names_style(self, scene: Scene, random: KeyedRandom, complete: bool) -> bool:
        if not self.names_styles or not scene.things:
            return False
        chosen = not random.chance(self.rates.open_style)
        usual = scene.style == STYLES[0] and not random.chance(_FIRST_STYLE)
        return complete or (chosen and not usual)

    def _clause(self, scene: Scene, random: KeyedRandom, complete: bool) -> str:
        """The objects and the sign with their places, which two or three objects may lack."""
        bare = random.chance(_BARE_NAME)
        nouns = [noun(thing, 1, bare, random) for thing in scene.things]
        slots = dict(zip("abc", nouns, strict=False))
        if not complete and scene.kind in ("beside", "above", "row") and random.chance(self.rates.open_place):
            order = list(nouns)
            for index in range(len(order) - 1, 0, -1):  # Fisher and Yates
                other = random.randbelow(index + 1)
                order[index], order[other] = order[other], order[index]
            wordings = ROW_TOGETHER if scene.kind == "row" else TOGETHER
            return random.pick(wordings).format(**dict(zip("abc", order, strict=False)))
        if scene.sign is not None:
            slots |= self._sign(scene.sign, random, complete)
        return random.pick(CLAUSES[scene.kind]).format(**slots)

    def _sign(self, sign: Sign, random: KeyedRandom, complete: bool) -> dict[str, str]:
        """Contents of the blanks of a sign."""
        word = random.pick(SIGN_NOUNS)
        colour = sign.board.name if complete or not random.chance(self.rates.open_colour) else ""
        bare = colour + random.pick(("的", "")) * bool(colour) + word
        with_typeface = complete or not random.chance(self.rates.open_typeface)
        by = f"用{sign.typeface.name}" if with_typeface else ""
        full = bare if random.chance(_BARE_SIGN) else f"一块{bare}"
        return {"sign": full, "bare": bare, "writes": f"{by}写着“{sign.text}”"}


def noun(thing: EmojiObject, count: int, bare: bool, random: KeyedRandom, style: Style | None = None) -> str:
    """Return 三只狐狸, 3只狐狸 or 三只扁平风格的狐狸; 狐狸 if ``bare``.

    Args:
        thing: The object.
        count: Number of objects.
        bare: Write no number and no measure word.
        random: Source of the wording.
        style: The style to name.
    """
    name = thing.name
    if thing.synonyms and random.chance(_SYNONYM):
        name = random.pick(thing.synonyms)
    if style is not None:
        name = random.pick(STYLE_ADJECTIVES).format(style=random.pick(style.names)) + name
    if bare:
        return name
    measure = thing.measures[0]
    if len(thing.measures) > 1 and random.chance(_RARE_MEASURE):
        measure = random.pick(thing.measures[1:])
    number = str(count) if random.chance(_DIGIT) else ALL_NUMERALS[count]
    return f"{number}{measure}{name}"


def name_background(colour: Colour, pattern: Pattern | None, random: KeyedRandom) -> str:
    """Return 蓝色, or 蓝色条纹 with a pattern.

    Args:
        colour: The colour.
        pattern: The pattern.
        random: Source of the wording.
    """
    return name_colour(colour, random) + (random.pick(pattern.names) if pattern else "")
