"""Captions of scenes, written and parsed: a small Chinese grammar with measure words and variants.

一个红苹果 · 蓝色背景上的三只狐狸 · 左边是狐狸，右边是苹果 · 狗在猫的上面，背景是红色的
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Generic, TypeVar

from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.attributes import Board, Pattern, Style, Typeface
from cogview.emoji.scene import COLOURS, Colour, Scene, SceneKind
from cogview.emoji.things import EmojiObject

# Percentages of the captions with the rarer wording.
_UNNAMED_COLOUR = 10
_RARE_COLOUR_NAME = 20
_SYNONYM = 20
_RARE_MEASURE = 15
_DIGIT = 15
_BARE_NAME = 40

NUMERALS = {1: "一", 2: "两", 3: "三", 4: "四"}

PAIRS: Mapping[SceneKind, tuple[str, ...]] = {
    # {a} is the left or upper object, {b} the right or lower one. A pattern is repeated by its frequency: the most
    # probable caption begins with a position, which determines the object to be named next.
    "beside": (
        *6 * ("左边是{a}，右边是{b}",),
        *3 * ("左边有{a}，右边有{b}",),
        "右边是{b}，左边是{a}",
        "{a}在左边，{b}在右边",
        "{a}在{b}的左边",
        "{a}在{b}左边",
        "{b}在{a}的右边",
        "{b}在{a}右边",
        "{b}的左边是{a}",
        "{a}的右边是{b}",
    ),
    "above": (
        *6 * ("上面是{a}，下面是{b}",),
        *3 * ("上面有{a}，下面有{b}",),
        "下面是{b}，上面是{a}",
        "{a}在上面，{b}在下面",
        "{a}在{b}的上面",
        "{a}在{b}上面",
        "{a}在{b}上方",
        "{b}在{a}的下面",
        "{b}在{a}下面",
        "{b}在{a}下方",
        "{b}的上面是{a}",
        "{a}的下面是{b}",
    ),
}

NOUN_ON_COLOUR = (
    "{colour}背景上的{what}",
    "{colour}背景上的{what}",
    "{colour}背景上有{what}",
    "{colour}背景，{what}",
    "{what}，{colour}背景",
    "{what}，背景是{colour}的",
    "{what}，背景是{colour}",
)
CLAUSE_ON_COLOUR = (
    "{colour}背景上，{what}",
    "{colour}背景上，{what}",
    "{colour}背景，{what}",
    "{what}，{colour}背景",
    "{what}，背景是{colour}的",
    "{what}，背景是{colour}",
)


def write_caption(scene: Scene, random: KeyedRandom, complete: bool) -> str:
    """Return a caption of a scene, which always has objects, count and relation.

    Args:
        scene: The scene.
        random: Source of the wording.
        complete: Always name the background.
    """
    if scene.kind in PAIRS:
        bare = random.chance(_BARE_NAME)  # both with a measure word or both without, as people do
        upper_or_left, lower_or_right = (_count(thing, 1, bare, random) for thing in scene.things)
        what = random.pick(PAIRS[scene.kind]).format(a=upper_or_left, b=lower_or_right)
        patterns: tuple[str, ...] = CLAUSE_ON_COLOUR
    else:
        bare = scene.kind == "one" and random.chance(_BARE_NAME)
        what = _count(scene.things[0], scene.count, bare, random)
        patterns = NOUN_ON_COLOUR
    if not complete and random.chance(_UNNAMED_COLOUR):
        return what
    return random.pick(patterns).format(colour=name_colour(scene.colour, random), what=what)


def _count(thing: EmojiObject, count: int, bare: bool, random: KeyedRandom) -> str:
    """三只狐狸, 3只狐狸, or 狐狸 if ``bare``."""
    name = thing.name
    if thing.synonyms and random.chance(_SYNONYM):
        name = random.pick(thing.synonyms)
    if bare:
        return name
    measure = thing.measures[0]
    if len(thing.measures) > 1 and random.chance(_RARE_MEASURE):
        measure = random.pick(thing.measures[1:])
    number = str(count) if random.chance(_DIGIT) else NUMERALS[count]
    return f"{number}{measure}{name}"


def name_colour(colour: Colour, random: KeyedRandom) -> str:
    """Return a name of a colour, mostly the usual one."""
    if len(colour.names) > 1 and random.chance(_RARE_COLOUR_NAME):
        return random.pick(colour.names[1:])
    return colour.name


@dataclass(frozen=True, kw_only=True)
class ParsedSign:
    """The sign of a caption.

    Args:
        text: The characters.
        board: The colours; None if they are left open.
        typeface: The kind of font; None if it is left open.
    """

    text: str
    board: Board | None
    typeface: Typeface | None


@dataclass(frozen=True, kw_only=True)
class ParsedCaption:
    """Content of a caption.

    Args:
        colour: The background; None if it is not mentioned.
        kind: Kind of the scene.
        count: Number of objects, as of a scene.
        things: For each object, in the order of the scene, every emoji that its name may mean.
        pattern: The pattern of the background; None if it is plain or not mentioned.
        style: The style; None if it is left open.
        sign: The sign, if there is one.
        placed: Whether the places of the objects are given; otherwise ``beside`` stands for ``above`` too, and the
            objects are in any order.
    """

    colour: Colour | None
    kind: SceneKind
    count: int
    things: tuple[frozenset[str], ...]
    pattern: Pattern | None = None
    style: Style | None = None
    sign: ParsedSign | None = None
    placed: bool = True


class CaptionReader:
    """Parser of the captions of ``write_caption``, from the same tables.

    Full-width and half-width characters are equal, and spaces are ignored. Any measure word may go with any object;
    of the two objects of a pair, one may have a measure word and the other none. No other text can be parsed.

    Args:
        things: Objects that captions may name.
        colours: Backgrounds that captions may name.
    """

    def __init__(self, things: Sequence[EmojiObject], colours: Sequence[Colour] = COLOURS) -> None:
        emoji: dict[str, set[str]] = {}
        for thing in things:
            for name in thing.names:
                emoji.setdefault(plain_text(name), set()).add(thing.emoji)
        numbers = {number: count for count, numeral in NUMERALS.items() for number in (numeral, str(count))}
        measures = {plain_text(measure) for thing in things for measure in thing.measures}
        self._names = Words({name: frozenset(meant) for name, meant in emoji.items()})
        self._counts = Words({n + measure: count for n, count in numbers.items() for measure in measures})
        self._colours = Words({plain_text(name): colour for colour in colours for name in colour.names})
        self._blanks: Mapping[str, Callable[[str, int], Iterator[tuple[int, Any]]]] = {
            "colour": self._colours.at,
            "what": self._nouns_at,
            "a": self._single_nouns_at,
            "b": self._single_nouns_at,
        }
        # "one" is also the pattern of several of one object: the number in the text decides.
        patterns: list[tuple[SceneKind, str]] = [("one", whole) for whole in ("{what}", *NOUN_ON_COLOUR)]
        for kind, pairs in PAIRS.items():
            for whole in ("{what}", *CLAUSE_ON_COLOUR):
                patterns += [(kind, whole.replace("{what}", pair)) for pair in pairs]
        self._patterns = [(kind, parts_of(pattern)) for kind, pattern in dict.fromkeys(patterns)]

    def read(self, text: str) -> ParsedCaption | None:
        """Return the content of a caption, the first of several readings; None if the text is no caption."""
        return next(iter(self.parses(text)), None)

    def parses(self, text: str) -> tuple[ParsedCaption, ...]:
        """Return all readings of a text, none if it is no caption.

        A text has two readings if a name looks like a count: 两杯啤酒 is two of 🍺 and the name of 🍻. The reading as
        a name comes first.
        """
        text = plain_text(text)
        found: dict[ParsedCaption, None] = {}
        for kind, parts in self._patterns:
            if not all(literal in text for literal, _ in parts):
                continue  # nearly every pattern, and cheaper to detect here than by a search for names
            for blanks in self._fill(parts, text, 0):
                colour = blanks.get("colour")
                if kind in PAIRS:
                    things = (blanks["a"][1], blanks["b"][1])
                    found[ParsedCaption(colour=colour, kind=kind, count=1, things=things)] = None
                else:
                    count, meant = blanks["what"]
                    counted: SceneKind = "one" if count == 1 else "many"
                    found[ParsedCaption(colour=colour, kind=counted, count=count, things=(meant,))] = None
        return tuple(found)

    def _fill(self, parts: Sequence[tuple[str, str | None]], text: str, start: int) -> Iterator[dict[str, Any]]:
        """All contents of the blanks with which ``parts`` equal ``text`` from ``start`` to its end."""
        if not parts:
            if start == len(text):
                yield {}
            return
        literal, blank = parts[0]
        if not text.startswith(literal, start):
            return
        start += len(literal)
        if blank is None:
            yield from self._fill(parts[1:], text, start)
            return
        for end, meaning in self._blanks[blank](text, start):
            for others in self._fill(parts[1:], text, end):
                yield {blank: meaning, **others}

    def _nouns_at(self, text: str, start: int) -> Iterator[tuple[int, tuple[int, frozenset[str]]]]:
        """End, count and possible emoji of each 狐狸 or 三只狐狸 that begins at ``start``."""
        for name_start, count in ((start, 1), *self._counts.at(text, start)):
            for end, meant in self._names.at(text, name_start):
                yield end, (count, meant)

    def _single_nouns_at(self, text: str, start: int) -> Iterator[tuple[int, tuple[int, frozenset[str]]]]:
        """Nouns at ``start`` that a pair may have: 狐狸 or 一只狐狸."""
        return ((end, noun) for end, noun in self._nouns_at(text, start) if noun[0] == 1)


_Meaning = TypeVar("_Meaning")


class Words(Generic[_Meaning]):
    """Words and their meanings, found at an index of a text."""

    def __init__(self, meanings: Mapping[str, _Meaning]) -> None:
        self._meanings = meanings
        self._longest = max(map(len, meanings), default=0)

    def at(self, text: str, start: int) -> Iterator[tuple[int, _Meaning]]:
        """Yield (end, meaning) of every word that begins at ``start``, the longest first."""
        for end in range(min(len(text), start + self._longest), start, -1):
            if text[start:end] in self._meanings:
                yield end, self._meanings[text[start:end]]


def parts_of(pattern: str) -> list[tuple[str, str | None]]:
    """Return the literals of a pattern, each with the blank after it; None at the end of the pattern."""
    return [(literal, blank) for literal, blank, _, _ in Formatter().parse(plain_text(pattern))]


def plain_text(text: str) -> str:
    """Return a text in the normalization of text tokenizers (NFKC: ， becomes a plain comma), without spaces."""
    return "".join(unicodedata.normalize("NFKC", text).split())
