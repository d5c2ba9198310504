"""The table of tasks: how text, image codes and commands stand in one sequence.

A task is a row: what is given, what is blank, which ids a blank may take, where positions restart, where loss counts.
Training, generation, scoring and the tests all derive from the row, which ``Layout.arrange`` fills with values.
The rows are those of the released CogView v1 (arXiv:2105.13290), for any code grid.
"""

# T places of a sequence, B rows of a batch, G codes on a side of an image

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogview.tokenizers.vocabulary import GRID_COMMANDS, TokenKind, Vocabulary

Values: TypeAlias = Sequence[int | None] | NDArray[Any]


@dataclass(frozen=True)
class Text:
    """Text pieces, as many as there are. ``loss``: whether training learns to write them."""

    name: str
    loss: bool = False

    kind = TokenKind.TEXT


@dataclass(frozen=True)
class Image:
    """An image of ``side`` x ``side`` codes in raster order. ``loss``: whether training learns to draw it."""

    name: str
    side: int
    loss: bool = False

    kind = TokenKind.IMAGE


@dataclass(frozen=True)
class Blank:
    """What is unknown, wholly or in places, when the row is generated; training knows it.

    ``stop`` is the command that ends a blank text: training learns it after the last piece, and a generated text
    is over where it is drawn.
    """

    content: Text | Image
    stop: str | None = None


@dataclass(frozen=True)
class RestartPositions:
    """Positions count from 0 again at the next place."""


RESTART_POSITIONS: Final = RestartPositions()

Element: TypeAlias = str | Text | Image | Blank | RestartPositions  # a str is a command


def layouts(grid: int, *, caption_stop: bool = True, text_positions: int | None = None) -> dict[str, Layout]:
    """The table for images of ``grid`` x ``grid`` codes.

    ``generate`` draws a text, ``caption`` describes an image, ``score`` says how probable a text is given an image,
    and two tasks draw ``image`` after ``small``, which has half its side: ``upscale`` one window of a larger image from
    the crop that it covers (``upscale_windows``), ``low_level`` a whole image from a small one.

    ``caption_stop``: whether captions end in ``[SEP]``. Those that we train do; the released weights never learnt to.
    ``text_space``: how many positions a given text takes, whatever its length, so that every code of an image has a
    position of its own. In the released rows (None) positions go on where the text ends.
    """
    if grid not in GRID_COMMANDS:
        raise ValueError(f"no layouts for a grid of {grid} codes; known: {', '.join(map(str, GRID_COMMANDS))}")
    size = GRID_COMMANDS[grid]  # announces every image of a row, even the small one: so it was released
    image, small = Image("image", grid), Image("small", grid // 2)
    drawn = replace(image, loss=True)
    text, written = Text("text"), Text("text", loss=True)
    caption = Blank(written, stop="[SEP]" if caption_stop else None)

    enlarged = (
        *("[ROI1]", text, size, "[BOI1]", small, "[EOI1]", RESTART_POSITIONS),
        *("[ROI2]", "[POS0]", size, "[BOI2]", Blank(drawn), "[EOI2]"),
    )
    rows: dict[str, tuple[Element, ...]] = {
        "generate": ("[ROI1]", written, size, "[BOI1]", Blank(drawn), "[EOI1]"),
        "caption": (size, "[BOI1]", image, "[EOI1]", "[ROI1]", caption),
        "score": (size, "[BOI1]", image, "[EOI1]", "[ROI1]", written),
        "upscale": enlarged,
        "low_level": enlarged,
    }
    return {name: Layout(name=name, row=row, text_positions=text_positions) for name, row in rows.items()}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One row of the table."""

    name: str
    row: tuple[Element, ...]
    text_positions: int | None = None  # positions that a given text takes; None: as many as it has pieces

    def arrange(self, vocabulary: Vocabulary, *, max_text: int | None = None, **values: Values) -> TokenSequence:
        """Fill the row with values, named after its elements: piece ids for a text, codes for an image.

        Both count from 0; the vocabulary's offsets are added here. Images are flat or two-dimensional. A blank element
        may be missing, shorter than its space, hold None where a value is unknown, or be a masked array: those places
        are blank. ``max_text`` is the space for a blank text; without it, the text given is all there is.

        Raises ValueError naming the layout and the element for whatever doesn't fit.
        """
        contents = self._contents()
        for name in values.keys() - contents.keys():
            raise ValueError(f"layout {self.name!r} has no element {name!r}; it has {', '.join(contents)}")
        if max_text is not None and not any(isinstance(e, Blank) and isinstance(e.content, Text) for e in self.row):
            raise ValueError(f"layout {self.name!r} has no blank text for max_text={max_text} to bound")

        parts: list[_Part] = []
        positions: list[NDArray[np.int64]] = []
        spans: dict[str, slice] = {}
        position, end, stop = 0, 0, None
        for element in self.row:
            if isinstance(element, RestartPositions):
                position = 0
            elif isinstance(element, str):
                parts.append(_Part.of_command(vocabulary.command(element), TokenKind.COMMAND, loss=False))
                positions.append(np.arange(position, position + 1))
                position, end = position + 1, end + 1
            else:
                blank = isinstance(element, Blank)
                content = element.content if isinstance(element, Blank) else element
                parts.append(self._fill(content, values.get(content.name), blank, max_text, vocabulary))
                length = len(parts[-1].ids)
                positions.append(np.arange(position, position + length))
                spans[content.name] = slice(end, end + length)
                position, end = position + self._element_positions(element, length), end + length
                if isinstance(element, Blank) and element.stop:
                    stop = vocabulary.command(element.stop)
                    parts.append(
                        _Part.of_command(stop, TokenKind.TEXT, loss=content.loss)
                    )  # drawn and learnt as text is
                    positions.append(np.arange(position, position + 1))
                    position, end = position + 1, end + 1

        return TokenSequence(
            ids=np.concatenate([part.ids for part in parts]),
            positions=np.concatenate(positions),
            kinds=np.concatenate([np.full(len(part.ids), part.kind, dtype=np.int8) for part in parts]),
            blanks=np.concatenate([part.blanks for part in parts]),
            loss=np.concatenate([np.full(len(part.ids), part.loss) for part in parts]),
            spans=spans,
            stop=stop,
        )

    def length(self, text_length: int) -> int:
        """How many places the row has with a text of ``text_length`` pieces."""
        return sum(replace(self, text_positions=None)._section_positions(text_length))

    def max_position(self, text_length: int) -> int:
        """How many positions the model must know for that: fewer than the places where the row restarts."""
        return max(self._section_positions(text_length))

    def longest_text(self, max_positions: int) -> int:
        """The longest text, in pieces, that keeps the row within ``max_positions``; ValueError if no text fits."""
        bare, with_piece = self._section_positions(0), self._section_positions(1)
        if max(bare) > max_positions:
            raise ValueError(
                f"layout {self.name!r} needs {max(bare)} positions without any text, there are {max_positions}"
            )
        grows = [max_positions - a for a, b in zip(bare, with_piece, strict=True) if a < b]
        return min(grows) if grows else self.text_positions or 0

    def _contents(self) -> dict[str, Text | Image]:
        contents = [e.content if isinstance(e, Blank) else e for e in self.row if isinstance(e, Text | Image | Blank)]
        return {content.name: content for content in contents}

    def _element_positions(self, element: Element, length: int) -> int:
        """How many positions a text or image of ``length`` places takes."""
        if not isinstance(element, Text) or self.text_positions is None:
            return length
        if length > self.text_positions:
            raise ValueError(
                f"layout {self.name!r}: {element.name!r} has {length} pieces, there is space for {self.text_positions}"
            )
        return self.text_positions

    def _section_positions(self, text_length: int) -> list[int]:
        """Positions before the first restart, between restarts, and after the last."""
        lengths = [0]
        for element in self.row:
            content = element.content if isinstance(element, Blank) else element
            if isinstance(content, RestartPositions):
                lengths.append(0)
            elif isinstance(content, Text):
                lengths[-1] += self._element_positions(element, text_length)
            elif isinstance(content, Image):
                lengths[-1] += content.side**2
            else:
                lengths[-1] += 1
            if isinstance(element, Blank) and element.stop:
                lengths[-1] += 1
        return lengths

    def _fill(
        self, content: Text | Image, values: Values | None, blank: bool, max_text: int | None, vocabulary: Vocabulary
    ) -> _Part:
        """The places of one text or image."""
        where = f"layout {self.name!r}: {content.name!r}"
        known, unknown = _numbers([] if values is None else values, where)
        space = content.side**2 if isinstance(content, Image) else max_text if blank else None
        unit = "codes" if isinstance(content, Image) else "pieces"

        if values is None and (not blank or space is None):
            remedy = " or max_text" if blank else ""
            raise ValueError(f"{where} is missing: expected {'' if space is None else f'{space} '}{unit}{remedy}")
        if not blank and (unknown.any() or (space is not None and len(known) < space)):
            expected = len(known) if space is None else space
            raise ValueError(f"{where} must be known in full: got {(~unknown).sum()} {unit}, expected {expected}")
        if space is not None and len(known) > space:
            raise ValueError(f"{where} has {len(known)} {unit}, there is space for {space}")
        permitted = vocabulary.permitted(content.kind)
        outside = ~unknown & ((known < 0) | (known >= len(permitted)))
        if outside.any():
            at = int(outside.argmax())
            raise ValueError(f"{where} holds {known[at]} at {at}, expected {unit} from 0 to {len(permitted) - 1}")

        length = len(known) if space is None else space
        ids = np.full(length, vocabulary.pad, dtype=np.int64)
        blanks = np.ones(length, dtype=bool)
        ids[: len(known)] = np.where(unknown, vocabulary.pad, known + permitted.start)
        blanks[: len(known)] = unknown
        return _Part(ids=ids, blanks=blanks, kind=content.kind, loss=content.loss)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSequence:
    """A row filled with values. Arrays are (T,), one entry per place."""

    ids: NDArray[np.int64]  # [PAD] where blank
    positions: NDArray[np.int64]
    kinds: NDArray[np.int8]  # Kind of each place; ``Vocabulary.permitted`` says which ids it may take
    blanks: NDArray[np.bool_]  # to be generated
    loss: NDArray[np.bool_]  # learnt in training: the loss of predicting this place from those before it
    spans: Mapping[str, slice]  # where each text or image lies
    stop: int | None = None  # an id that blank text may take besides pieces, and which ends it

    def __len__(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> TokenSequence:
        """The first ``length`` places, for example those of an upscaling window up to its last line."""
        arrays = {f.name: getattr(self, f.name)[:length] for f in fields(self) if f.name not in ("spans", "stop")}
        spans = {name: slice(min(s.start, length), min(s.stop, length)) for name, s in self.spans.items()}
        return replace(self, spans=spans, **arrays)

    def until_last_blank(self) -> TokenSequence:
        """The row up to its last blank, all that has to be read to fill it; its first place where it has none."""
        return self.truncate(int(np.flatnonzero(self.blanks)[-1]) + 1 if self.blanks.any() else 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceBatch:
    """Rows of different lengths, padded to one. Arrays are (B, T) unless said; padding is no blank and has no loss."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]  # 0 in padding
    kinds: NDArray[np.int8]  # COMMAND in padding
    blanks: NDArray[np.bool_]
    loss: NDArray[np.bool_]
    starts: NDArray[np.int64]  # (B,) where each row begins: the padding on its left
    ends: NDArray[np.int64]  # (B,) where each row ends: what follows is padding


def pad_left(rows: Sequence[TokenSequence], pad_id: int) -> SequenceBatch:
    """A batch whose rows all end at the last place, for generation."""
    return _pad(rows, pad_id, length=None, on_left=True)


def pad_right(rows: Sequence[TokenSequence], pad_id: int, length: int | None = None) -> SequenceBatch:
    """A batch whose rows all begin at the first place, for training; ``length`` fixes T, else the longest row does."""
    return _pad(rows, pad_id, length=length, on_left=False)


@dataclass(frozen=True, kw_only=True)
class Window:
    """One step of upscaling G x G codes to 2G x 2G: a G x G window of the larger image, at half-window steps.

    Codes already known in the window are given; the others of its first ``lines`` lines are drawn, in raster order.
    """

    row: int  # 0, 1, 2 from above
    column: int  # 0, 1, 2 from the left
    lines: int
    grid: int

    @property
    def source(self) -> tuple[slice, slice]:
        """The (G/2, G/2) crop of the G x G codes that conditions the window."""
        side = self.grid // 2
        top, left = self.row * side // 2, self.column * side // 2
        return slice(top, top + side), slice(left, left + side)

    @property
    def target(self) -> tuple[slice, slice]:
        """The (lines, G) part of the 2G x 2G codes that is complete after this window."""
        top, left = self.row * self.grid // 2, self.column * self.grid // 2
        return slice(top, top + self.lines), slice(left, left + self.grid)


def upscale_windows(grid: int) -> list[Window]:
    """The nine windows that upscale ``grid`` x ``grid`` codes, in the released order.

    Lines stop short of a window's end where a later window sees further down: at 18 and 30 of 32, and in proportion.
    """
    if grid not in GRID_COMMANDS:
        raise ValueError(f"no windows for a grid of {grid} codes; known: {', '.join(map(str, GRID_COMMANDS))}")
    first, middle, last = grid // 2 + -(-grid // 16), grid - grid // 16, grid
    order = (
        *((0, 0, first), (0, 1, middle), (0, 2, middle)),
        *((1, 1, middle), (1, 0, middle), (1, 2, middle)),
        *((2, 0, last), (2, 1, last), (2, 2, last)),
    )
    return [Window(row=row, column=column, lines=lines, grid=grid) for row, column, lines in order]


def upscale_steps(grid: int) -> list[list[Window]]:
    """``upscale_windows``, those together that may be drawn side by side.

    Neither of (0,2) and (1,1) sees what the other draws, nor of (1,0) and (1,2).
    """
    windows = upscale_windows(grid)
    return [*([window] for window in windows[:2]), windows[2:4], windows[4:6], *([window] for window in windows[6:])]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A run of places of one kind."""

    ids: NDArray[np.int64]
    blanks: NDArray[np.bool_]
    kind: TokenKind
    loss: bool

    @classmethod
    def of_command(cls, token: int, kind: TokenKind, *, loss: bool) -> _Part:
        return cls(ids=np.array([token]), blanks=np.array([False]), kind=kind, loss=loss)


def _numbers(values: Values, where: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Values as flat numbers, and which of them are unknown (None, or masked)."""
    try:
        flat = np.asarray(values).reshape(-1)
    except ValueError:  # lines of different lengths
        raise ValueError(f"{where} must be a flat list or a rectangle of numbers") from None
    if isinstance(values, np.ma.MaskedArray):
        unknown = np.ma.getmaskarray(values).reshape(-1)
    elif flat.dtype == object:
        unknown = np.array([value is None for value in flat], dtype=bool)
    else:
        unknown = np.zeros(len(flat), dtype=bool)
    if not np.issubdtype(flat.dtype, np.integer):
        for value in flat[~unknown]:
            if not isinstance(value, int | np.integer):
                raise ValueError(f"{where} must hold whole numbers, got {value}")
    numbers = np.zeros(len(flat), dtype=np.int64)
    numbers[~unknown] = flat[~unknown].astype(np.int64)
    return numbers, unknown


def _pad(rows: Sequence[TokenSequence], pad_id: int, *, length: int | None, on_left: bool) -> SequenceBatch:
    if not rows:
        raise ValueError("a batch needs at least one row")
    longest = max(map(len, rows))
    if length is not None and longest > length:
        raise ValueError(f"a row of {longest} places doesn't fit a batch of length {length}")
    shape = (len(rows), longest if length is None else length)
    starts = np.array([shape[1] - len(row) if on_left else 0 for row in rows])
    ends = starts + np.array([len(row) for row in rows])
    batch = SequenceBatch(
        ids=np.full(shape, pad_id, dtype=np.int64),
        positions=np.zeros(shape, dtype=np.int64),
        kinds=np.full(shape, TokenKind.COMMAND, dtype=np.int8),
        blanks=np.zeros(shape, dtype=bool),
        loss=np.zeros(shape, dtype=bool),
        starts=starts,
        ends=ends,
    )
    for name in ("ids", "positions", "kinds", "blanks", "loss"):
        for b, row in enumerate(rows):
            getattr(batch, name)[b, starts[b] : ends[b]] = getattr(row, name)
    return batch
