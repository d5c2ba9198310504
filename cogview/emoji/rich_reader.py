"""Parser of the captions of rich scenes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cogview.emoji.attributes import BOARDS, PATTERNS, STYLES, TYPEFACES, Board, Pattern, Style, Typeface
from cogview.emoji.captions import (
    CLAUSE_ON_COLOUR,
    NOUN_ON_COLOUR,
    CaptionReader,
    ParsedCaption,
    ParsedSign,
    Words,
    parts_of,
    plain_text,
)
from cogview.emoji.rich_captions import (
    ALL_NUMERALS,
    CLAUSES,
    ROW_TOGETHER,
    SIGN_NOUNS,
    STYLE_ADJECTIVES,
    STYLE_FRAMES,
    TOGETHER,
)
from cogview.emoji.scene import COLOURS, Colour, Scene, SceneKind
from cogview.emoji.things import EmojiObject
from cogview.emoji.traditional import simplifying_table
from cogview.emoji.world import EmojiWorld

_QUOTED = re.compile('[“「"]([^”」"]{1,2})[”」"]')
_MARK = "“”"  # stands for the quoted text

Pieces = list[tuple[str, str | None]]


class RichReader(CaptionReader):
    """Parser of the captions of ``RichWriter``, and of all that ``CaptionReader`` parses, in either script.

    Args:
        things: Objects that captions may name.
        colours: Backgrounds that captions may name.
        traditional: Traditional characters by simplified ones.
    """

    def __init__(
        self,
        things: Sequence[EmojiObject],
        colours: Sequence[Colour] = COLOURS,
        traditional: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(things, colours)
        self._simplify = simplifying_table(traditional or {}) if traditional else {}
        numbers = {number: count for count, word in ALL_NUMERALS.items() for number in (word, str(count))}
        measures = {plain_text(measure) for thing in things for measure in thing.measures}
        self._counts = Words({number + measure: n for number, n in numbers.items() for measure in measures})
        shades: dict[str, tuple[Colour, Pattern | None]] = {}
        for colour in colours:
            for name in colour.names:
                shades[plain_text(name)] = (colour, None)
                shades |= {plain_text(name + word): (colour, one) for one in PATTERNS for word in one.names}
        self.backgrounds = Words(shades)
        self._adjectives: Words[Style] = Words(
            {form.format(style=name): style for form in STYLE_ADJECTIVES for style in STYLES for name in style.names}
        )
        boards: dict[str, Board | None] = {}
        for word in SIGN_NOUNS:
            boards |= {word: None}
            boards |= {board.name + middle + word: board for board in BOARDS for middle in ("", "的")}
        full = boards | {f"一块{name}": board for name, board in boards.items()}
        typefaces: dict[str, Typeface | None] = {f"写着{_MARK}": None}
        typefaces |= {f"用{one.name}写着{_MARK}": one for one in TYPEFACES}
        blanks: Mapping[str, Callable[[str, int], Iterator[tuple[int, Any]]]] = {
            "colour": self.backgrounds.at,
            "what": self._styled_nouns_at,
            **dict.fromkeys("abc", self._single_nouns_at),
            "sign": Words(full).at,
            "bare": Words(boards).at,
            "writes": Words(typefaces).at,
        }
        self._blanks = blanks
        wordings: list[tuple[SceneKind, bool, str]] = [("one", True, "{what}")]
        wordings += [(kind, True, clause) for kind, clauses in CLAUSES.items() for clause in dict.fromkeys(clauses)]
        wordings += [("beside", False, clause) for clause in TOGETHER]
        wordings += [("row", False, clause) for clause in ROW_TOGETHER]
        self._rich_patterns: list[tuple[SceneKind, bool, Pieces]] = [
            (kind, placed, parts_of(frame.replace("{what}", wording)))
            for kind, placed, wording in wordings
            for frame in ("{what}", *dict.fromkeys(NOUN_ON_COLOUR if kind == "one" else CLAUSE_ON_COLOUR))
        ]
        self._frames = [
            (plain_text(before), plain_text(after), style)
            for frame in STYLE_FRAMES
            for style in STYLES
            for name in style.names
            for before, after in [frame.replace("{style}", name).split("{whole}")]
        ]

    def simplify(self, text: str) -> str:
        """Return a text in the normalization of text tokenizers, in simplified characters, without spaces.

        Args:
            text: The text.
        """
        return plain_text(text).translate(self._simplify)

    def parses(self, text: str) -> tuple[ParsedCaption, ...]:
        """Return all readings of a text, none if it is no caption.

        Args:
            text: The text.
        """
        text, quoted = take_quoted(plain_text(text))
        if _MARK in text and not quoted:
            return ()
        text = text.translate(self._simplify)
        found: dict[ParsedCaption, None] = {}
        for style, rest in self._without_frame(text):
            for parsed in self._parse_plain(rest, quoted):
                if style is None or parsed.style is None:
                    found[replace(parsed, style=style or parsed.style)] = None
        return tuple(found)

    def _without_frame(self, text: str) -> Iterator[tuple[Style | None, str]]:
        yield None, text
        for before, after, style in self._frames:
            if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
                yield style, text[len(before) : len(text) - len(after)]

    def _parse_plain(self, text: str, quoted: str) -> Iterator[ParsedCaption]:
        """Readings of a text without the frame of a style."""
        for kind, placed, parts in self._rich_patterns:
            if not all(literal in text for literal, _ in parts) or (kind in ("sign", "label")) != (_MARK in text):
                continue
            for blanks in self._fill(parts, text, 0):
                colour, pattern = blanks.get("colour", (None, None))
                if "what" in blanks:
                    count, meant, style = blanks["what"]
                    counted: SceneKind = "one" if count == 1 else "many"
                    yield ParsedCaption(
                        colour=colour, pattern=pattern, kind=counted, count=count, things=(meant,), style=style
                    )
                    continue
                things = tuple(blanks[letter][1] for letter in "abc" if letter in blanks)
                sign = None
                if "writes" in blanks:
                    board = blanks["sign"] if "sign" in blanks else blanks["bare"]
                    sign = ParsedSign(text=quoted, board=board, typeface=blanks["writes"])
                yield ParsedCaption(
                    colour=colour, pattern=pattern, kind=kind, count=1, things=things, sign=sign, placed=placed
                )

    def _styled_nouns_at(self, text: str, start: int) -> Iterator[tuple[int, tuple[int, frozenset[str], Style | None]]]:
        """End, count, possible emoji and style of 狐狸, 三只狐狸 or 三只扁平风格的狐狸 from ``start``."""
        for name_start, count in ((start, 1), *self._counts.at(text, start)):
            for end, meant in self._names.at(text, name_start):
                yield end, (count, meant, None)
            for after, style in self._adjectives.at(text, name_start):
                for end, meant in self._names.at(text, after):
                    yield end, (count, meant, style)


def take_quoted(text: str) -> tuple[str, str]:
    """Return a text with a mark in place of the quoted characters, and these; "" if there are none.

    Args:
        text: The text.
    """
    match = _QUOTED.search(text)
    if match is None:
        return text, ""
    return text[: match.start()] + _MARK + text[match.end() :], match.group(1)


def make_reader(world: EmojiWorld) -> CaptionReader:
    """Return the parser of the captions of a world.

    Args:
        world: The world.
    """
    if world.settings.is_rich:
        return RichReader(world.things, world.colours, world.traditional)
    return CaptionReader(world.things, world.colours)


def describes(parsed: ParsedCaption, scene: Scene) -> bool:
    """Return whether a caption describes a scene: each part is right or left open.

    Args:
        parsed: Content of the caption.
        scene: The scene.
    """
    if parsed.colour is not None and (parsed.colour.name, parsed.pattern) != (scene.colour.name, scene.pattern):
        return False
    if parsed.style is not None and parsed.style != scene.style:
        return False
    if (parsed.sign is None) != (scene.sign is None):
        return False
    if parsed.sign is not None and scene.sign is not None:
        same_board = parsed.sign.board in (None, scene.sign.board)
        same_typeface = parsed.sign.typeface in (None, scene.sign.typeface)
        if parsed.sign.text != scene.sign.text or not (same_board and same_typeface):
            return False
    emoji = [thing.emoji for thing in scene.things]
    if parsed.count != scene.count or len(parsed.things) != len(emoji):
        return False
    if parsed.placed:
        same_kind = parsed.kind == scene.kind
        return same_kind and all(one in meant for one, meant in zip(emoji, parsed.things, strict=True))
    same_kind = parsed.kind == scene.kind or (parsed.kind == "beside" and scene.kind == "above")
    return same_kind and match_names(emoji, parsed.things)


def match_names(emoji: Sequence[str], things: Sequence[frozenset[str]]) -> bool:
    """Return whether objects can be assigned to the meanings of names, in any order.

    Args:
        emoji: The objects.
        things: For each name, every emoji that it may mean.
    """
    if len(emoji) != len(things):
        return False
    if not emoji:
        return True
    others = emoji[1:]
    return any(
        emoji[0] in meant and match_names(others, [*things[:index], *things[index + 1 :]])
        for index, meant in enumerate(things)
    )
