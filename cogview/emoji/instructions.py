"""Instructions of edits, written and parsed.

把背景换成蓝色 · 把狐狸换成苹果 · 加一只猫在右边 · 去掉左边的苹果 · 变成三个 · 左右交换 · 换成扁平风格 · 把字换成“茶”
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.attributes import STYLES, Pattern, Style
from cogview.emoji.captions import Words, parts_of, plain_text
from cogview.emoji.edits import Edit, EditKind
from cogview.emoji.rich_captions import ALL_NUMERALS, name_background, noun
from cogview.emoji.rich_reader import Pieces, RichReader, take_quoted
from cogview.emoji.scene import COLOURS, Colour, SceneKind
from cogview.emoji.things import EmojiObject
from cogview.emoji.traditional import to_traditional

_BARE = 40  # percentage of the objects without a number
_GENERIC_COUNT = 60  # percentage of the counts that name no object

INSTRUCTIONS: Mapping[EditKind, Sequence[str]] = {
    # {a} is the object that was there, {b} the new one. The first wordings are the commonest.
    "background": ("把背景换成{colour}", "背景换成{colour}", "把背景改成{colour}", "换成{colour}背景"),
    "replace": ("把{a}换成{b}", "将{a}换成{b}", "把{a}变成{b}", "用{b}代替{a}"),
    "add": ("加{b}在{place}", "在{place}加{b}", "{place}加上{b}", "在{place}添上{b}"),
    "remove": ("去掉{place}的{a}", "去掉{a}", "把{a}去掉", "删掉{place}的{a}", "删掉{a}"),
    "count": ("变成{count}", "改成{count}", "换成{count}"),
    "swap": ("{axis}交换", "{axis}互换", "交换{axis}", "交换{a}和{b}", "{a}和{b}交换位置"),
    "style": ("换成{style}风格", "改成{style}风格", "变成{style}风格", "把风格换成{style}"),
    "text": ("把字换成{text}", "把字改成{text}", "把文字换成{text}", "字换成{text}"),
}
"""Wordings of the changes."""

PLACE_NAMES: Mapping[str, str] = {"left": "左边", "right": "右边", "top": "上面", "bottom": "下面", "inside": "里面"}
AXIS_NAMES: Mapping[SceneKind, str] = {"beside": "左右", "above": "上下"}


def write_instruction(edit: Edit, random: KeyedRandom, traditional: Mapping[str, str] | None = None) -> str:
    """Return the instruction of an edit.

    Args:
        edit: The edit.
        random: Source of the wording.
        traditional: Traditional characters by simplified ones, to write these; None for simplified ones.
    """
    change, source = edit.change, edit.source
    slots: dict[str, str] = {}
    if change.kind == "background" and change.colour is not None:
        slots["colour"] = name_background(change.colour, change.pattern, random)
    elif change.kind == "count" and change.count is not None:
        slots["count"] = _count(source.things[0], change.count, random)
    elif change.kind == "swap":
        slots |= {"axis": AXIS_NAMES[source.kind], **_bare_names(source.things, random)}
    elif change.kind == "style" and change.style is not None:
        slots["style"] = random.pick(change.style.names)
    elif change.kind == "text":
        slots["text"] = f"“{change.text}”"
    else:
        if change.old is not None:
            slots["a"] = noun(change.old, 1, True, random)
            slots["place"] = _place_of(edit)
        if change.new is not None:
            slots["b"] = noun(change.new, 1, change.kind != "add" and random.chance(_BARE), random)
        if change.place is not None:
            slots["place"] = PLACE_NAMES[change.place]
    text = random.pick(INSTRUCTIONS[change.kind]).format(**slots)
    return text if traditional is None else to_traditional(text, traditional)


def _bare_names(things: Sequence[EmojiObject], random: KeyedRandom) -> dict[str, str]:
    return {letter: noun(thing, 1, True, random) for letter, thing in zip("ab", things, strict=True)}


def _count(thing: EmojiObject, count: int, random: KeyedRandom) -> str:
    """三个, or 三只狐狸."""
    if random.chance(_GENERIC_COUNT):
        return f"{ALL_NUMERALS[count]}个"
    return noun(thing, count, False, random)


def _place_of(edit: Edit) -> str:
    """Where the object is that an edit removes or replaces."""
    source, old = edit.source, edit.change.old
    first = old == source.things[0]
    if source.kind == "beside":
        return PLACE_NAMES["left" if first else "right"]
    if source.kind == "above":
        return PLACE_NAMES["top" if first else "bottom"]
    return PLACE_NAMES["inside"]


@dataclass(frozen=True, kw_only=True)
class ParsedInstruction:
    """Content of an instruction; the parts are those of ``Change``, and None where the wording has none.

    Args:
        kind: Kind of the change.
        colour: The new background.
        pattern: Its pattern.
        old: Every emoji that the name of the old object may mean.
        new: The same of the new one.
        place: Where the old or new object is.
        count: The new number.
        style: The new style.
        text: The new characters.
        axis: Along which objects are swapped: ``beside`` or ``above``.
    """

    kind: EditKind
    colour: Colour | None = None
    pattern: Pattern | None = None
    old: frozenset[str] | None = None
    new: frozenset[str] | None = None
    place: str | None = None
    count: int | None = None
    style: Style | None = None
    text: str | None = None
    axis: SceneKind | None = None

    def asks_for(self, edit: Edit) -> bool:
        """Return whether the instruction asks for an edit.

        Args:
            edit: The edit.
        """
        change, source = edit.change, edit.source
        same = (change.kind, change.colour, change.pattern, change.count, change.style, change.text)
        if same != (self.kind, self.colour, self.pattern, self.count, self.style, self.text):
            return False
        if self.kind == "swap":
            if self.old is None or self.new is None:
                return self.axis == source.kind
            return source.things[0].emoji in self.old and source.things[1].emoji in self.new
        for thing, meant in ((change.old, self.old), (change.new, self.new)):
            if (thing is None) != (meant is None) or (thing and meant and thing.emoji not in meant):
                return False
        if self.place is None or self.kind not in ("add", "remove"):
            return True
        return PLACE_NAMES[self.place] == (PLACE_NAMES[change.place] if change.place else _place_of(edit))


class InstructionReader(RichReader):
    """Parser of the instructions of ``write_instruction``, in either script.

    Args:
        things: Objects that instructions may name.
        colours: Backgrounds that instructions may name.
        traditional: Traditional characters by simplified ones.
    """

    def __init__(
        self,
        things: Sequence[EmojiObject],
        colours: Sequence[Colour] = COLOURS,
        traditional: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(things, colours, traditional)
        marked, _ = take_quoted("“字”")
        blanks: Mapping[str, Callable[[str, int], Iterator[tuple[int, Any]]]] = {
            "colour": self.backgrounds.at,
            "a": self._single_nouns_at,
            "b": self._single_nouns_at,
            "place": Words({name: place for place, name in PLACE_NAMES.items()}).at,
            "axis": Words({name: kind for kind, name in AXIS_NAMES.items()}).at,
            "count": self._counts_at,
            "style": Words({name: style for style in STYLES for name in style.names}).at,
            "text": Words({marked: None}).at,
        }
        self._blanks = blanks
        self._wordings: list[tuple[EditKind, Pieces]] = [
            (kind, parts_of(wording)) for kind, wordings in INSTRUCTIONS.items() for wording in wordings
        ]

    def instructions(self, text: str) -> tuple[ParsedInstruction, ...]:
        """Return all readings of a text, none if it is no instruction.

        Args:
            text: The text.
        """
        text, quoted = take_quoted(plain_text(text))
        text = self.simplify(text)
        found: dict[ParsedInstruction, None] = {}
        for kind, parts in self._wordings:
            for blanks in self._fill(parts, text, 0):
                colour, pattern = blanks.get("colour", (None, None))
                old, new = (blanks[letter][1] if letter in blanks else None for letter in "ab")
                parsed = ParsedInstruction(
                    kind=kind,
                    colour=colour,
                    pattern=pattern,
                    old=old,
                    new=new,
                    place=blanks.get("place"),
                    count=blanks.get("count"),
                    style=blanks.get("style"),
                    text=quoted if "text" in blanks else None,
                    axis=blanks.get("axis"),
                )
                found[parsed] = None
        return tuple(found)

    def _counts_at(self, text: str, start: int) -> Iterator[tuple[int, int]]:
        """End and count of each 三个 or 三只狐狸 that begins at ``start``."""
        for end, count in self._counts.at(text, start):
            yield end, count
            for last, _ in self._names.at(text, end):
                yield last, count
