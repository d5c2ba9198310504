"""Layouts: a task's row of the table at one grid, which ``Layout.arrange`` fills with values.

The result, a ``TokenSequence``, says at each index which id stands there, at which position, of which kind, whether it
is blank and whether training learns it. Training, generation, scoring and memory planning all start from it.
"""

# T indices of a sequence, G codes on a side of an image
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogview.tokenizers.tasks import GRID, TASKS, Blank, Element, ImageElement, RestartPositions, TextElement
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary, grid_command

Values: TypeAlias = Sequence[int | None] | NDArray[Any]


def layouts(grid: int, *, caption_stop: bool = True, text_positions: int | None = None) -> dict[str, Layout]:
    """Return the layout of each task that has one and suits images of ``grid`` x ``grid`` codes.

    A task whose images have other sides than G needs a multiple of some number (``Task.grid_multiple``); it is left
    out for other grids.

    Args:
        grid: G. The command that announces it stands before every image of a sequence, even a smaller one: so does
            CogView v1.
        caption_stop: Whether captions end in a stop token. The weights of CogView v1 never learnt to.
        text_positions: Positions that a given text takes, whatever its length, so that every code of an image has one
            position. None: positions go on where the text ends, as in CogView v1.

    Returns:
        Layouts by the names of their tasks.

    Raises:
        ValueError: If the grid is outside [1, ``MAX_GRID``].
    """
    command = grid_command(grid)

    def at_grid(element: Element) -> Element:
        if isinstance(element, Blank) and not caption_stop:
            return replace(element, stop=None)
        return command if element == GRID else element

    return {
        name: Layout(name=name, elements=tuple(map(at_grid, task.layout)), grid=grid, text_positions=text_positions)
        for name, task in TASKS.items()
        if task.layout and grid % task.grid_multiple == 0
    }


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the sequence of one task is laid out at one grid."""

    name: str
    elements: tuple[Element, ...]
    grid: int
    text_positions: int | None = None  # positions that a given text takes; None: as many as it has pieces

    def arrange(self, vocabulary: Vocabulary, *, max_text: int | None = None, **values: Values) -> TokenSequence:
        """Fill the layout with values.

        Args:
            vocabulary: Gives the ids of commands, and the offsets of pieces and codes.
            max_text: Indices for a blank text. Without it, the text given is complete.
            **values: Piece ids of a text, or codes of an image (flat or two-dimensional), by the name of the element.
                Both count from 0. Values of a blank element may be missing, shorter than its space, hold None where
                one is unknown, or be a masked array: those indices are blank. The same holds of an image that is
                ``maskable``, whose unknown codes are ``[MASK]``; only these are learnt of a blank image that has the
                same field.

        Returns:
            The sequence.

        Raises:
            ValueError: If values are missing, too many, out of range or of no element. The message names the layout
                and the element.
        """
        contents = self._contents()
        for name in values.keys() - contents.keys():
            raise ValueError(f"layout {self.name!r} has no element {name!r}; it has {', '.join(contents)}")
        if max_text is not None and not any(
            isinstance(e, Blank) and isinstance(e.content, TextElement) for e in self.elements
        ):
            raise ValueError(f"layout {self.name!r} has no blank text for max_text={max_text} to bound")

        segments: list[_Segment] = []
        unknown = {}  # codes of each maskable image, by the field of a store
        position, end, stop = 0, 0, None
        spans: dict[str, slice] = {}
        for element in self.elements:
            if isinstance(element, RestartPositions):
                position = 0
            elif isinstance(element, str):
                segments.append(_Segment.of_command(vocabulary.command(element), position))
                position, end = position + 1, end + 1
            else:
                content = element.content if isinstance(element, Blank) else element
                given = values.get(content.name)
                segments.append(self._fill(element, given, max_text, vocabulary, position))
                if isinstance(content, ImageElement) and content.maskable:
                    unknown[content.field] = segments[-1].ids == vocabulary.command("[MASK]")
                elif isinstance(element, Blank) and content.loss and content.field in unknown:
                    segments[-1] = replace(segments[-1], loss=unknown[content.field])
                length = len(segments[-1].ids)
                spans[content.name] = slice(end, end + length)
                position, end = position + self._positions_of(element, length), end + length
                if isinstance(element, Blank) and element.stop:  # sampled and learnt as text is
                    stop = vocabulary.command(element.stop)
                    segments.append(_Segment.of_command(stop, position, TokenKind.TEXT, loss=content.loss))
                    position, end = position + 1, end + 1
        return _concatenate(segments, spans, stop)

    def length(self, text_length: int) -> int:
        """Return the length of a sequence whose text has ``text_length`` pieces."""
        return sum(replace(self, text_positions=None)._section_positions(text_length))

    def max_position(self, text_length: int) -> int:
        """Return the positions that the model must know for that: fewer than tokens, where positions restart."""
        return max(self._section_positions(text_length))

    def longest_text(self, max_positions: int) -> int:
        """Return the length of the longest text, in pieces, that keeps the sequence within ``max_positions``.

        Raises:
            ValueError: If not even an empty text fits.
        """
        empty, with_piece = self._section_positions(0), self._section_positions(1)
        if max(empty) > max_positions:
            raise ValueError(
                f"layout {self.name!r} needs {max(empty)} positions without any text, there are {max_positions}"
            )
        growing = [max_positions - a for a, b in zip(empty, with_piece, strict=True) if a < b]
        return min(growing) if growing else self.text_positions or 0

    def _contents(self) -> dict[str, TextElement | ImageElement]:
        """Return the texts and images by name."""
        found = [element.content if isinstance(element, Blank) else element for element in self.elements]
        return {one.name: one for one in found if isinstance(one, TextElement | ImageElement)}

    def _positions_of(self, element: Element, length: int) -> int:
        """Return the positions that a text or image of ``length`` tokens takes."""
        if not isinstance(element, TextElement) or self.text_positions is None:
            return length
        if length > self.text_positions:
            raise ValueError(
                f"layout {self.name!r}: {element.name!r} has {length} pieces, there is space for {self.text_positions}"
            )
        return self.text_positions

    def _section_positions(self, text_length: int) -> list[int]:
        """Return the positions before the first restart, between restarts, and after the last."""
        lengths = [0]
        for element in self.elements:
            content = element.content if isinstance(element, Blank) else element
            if isinstance(content, RestartPositions):
                lengths.append(0)
            elif isinstance(content, TextElement):
                lengths[-1] += self._positions_of(element, text_length)
            elif isinstance(content, ImageElement):
                lengths[-1] += content.side(self.grid) ** 2
            else:
                lengths[-1] += 1
            if isinstance(element, Blank) and element.stop:
                lengths[-1] += 1
        return lengths

    def _fill(
        self,
        element: TextElement | ImageElement | Blank,
        values: Values | None,
        max_text: int | None,
        vocabulary: Vocabulary,
        position: int,
    ) -> _Segment:
        """Return the tokens of one text or image, which begins at ``position``."""
        blank = isinstance(element, Blank)
        content = element.content if isinstance(element, Blank) else element
        where = f"layout {self.name!r}: {content.name!r}"
        is_image = isinstance(content, ImageElement)
        space = content.side(self.grid) ** 2 if isinstance(content, ImageElement) else max_text if blank else None
        unit = "codes" if is_image else "pieces"
        if values is None and (not blank or space is None):
            remedy = " or max_text" if blank else ""
            raise ValueError(f"{where} is missing: expected {'' if space is None else f'{space} '}{unit}{remedy}")

        known, unknown = _flatten([] if values is None else values, where)
        permitted = vocabulary.permitted(content.kind)
        maskable = isinstance(content, ImageElement) and content.maskable
        _check_values(known, unknown, len(permitted), space, unit, where, blank=blank, maskable=maskable)
        length = len(known) if space is None else space
        absent = vocabulary.command("[MASK]") if maskable else vocabulary.pad
        ids = np.full(length, absent, dtype=np.int64)
        blanks = np.ones(length, dtype=bool)
        ids[: len(known)] = np.where(unknown, absent, known + permitted.start)
        blanks[: len(known)] = unknown & blank
        return _Segment(ids=ids, blanks=blanks, kind=content.kind, loss=content.loss, position=position)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSequence:
    """A layout filled with values. Arrays are (T,), one entry per token."""

    ids: NDArray[np.int64]  # [PAD] where blank
    positions: NDArray[np.int64]
    kinds: NDArray[np.int8]  # TokenKind; ``Vocabulary.permitted`` has the ids that a token of a kind may take
    blanks: NDArray[np.bool_]  # to be generated
    loss: NDArray[np.bool_]  # learnt in training: the loss of predicting this token from those before it counts
    image_sizes: NDArray[np.int64]  # codes of the whole image that a token belongs to; 0 outside of images
    spans: Mapping[str, slice]  # indices of each text or image
    stop: int | None = None  # id that a blank text may take besides pieces, and that ends it

    def __len__(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> TokenSequence:
        """Return the first ``length`` tokens, for example those of an upscaling window up to its last line."""
        arrays = {f.name: getattr(self, f.name)[:length] for f in fields(self) if f.name not in ("spans", "stop")}
        spans = {name: slice(min(s.start, length), min(s.stop, length)) for name, s in self.spans.items()}
        return replace(self, spans=spans, **arrays)

    def until_last_blank(self) -> TokenSequence:
        """Return the sequence up to its last blank, or its first token if it has none: the model reads no further."""
        return self.truncate(int(np.flatnonzero(self.blanks)[-1]) + 1 if self.blanks.any() else 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Segment:
    """Consecutive tokens of one kind."""

    ids: NDArray[np.int64]
    blanks: NDArray[np.bool_]
    kind: TokenKind
    loss: bool | NDArray[np.bool_]
    position: int  # of the first

    @classmethod
    def of_command(
        cls, token: int, position: int, kind: TokenKind = TokenKind.COMMAND, *, loss: bool = False
    ) -> _Segment:
        """Return a segment of one known token."""
        return cls(ids=np.array([token]), blanks=np.array([False]), kind=kind, loss=loss, position=position)


def _concatenate(segments: Sequence[_Segment], spans: Mapping[str, slice], stop: int | None) -> TokenSequence:
    """Return the sequence of ``segments``."""
    return TokenSequence(
        ids=np.concatenate([one.ids for one in segments]),
        positions=np.concatenate([np.arange(one.position, one.position + len(one.ids)) for one in segments]),
        kinds=np.concatenate([np.full(len(one.ids), one.kind, dtype=np.int8) for one in segments]),
        blanks=np.concatenate([one.blanks for one in segments]),
        loss=np.concatenate([np.full(len(one.ids), one.loss) for one in segments]),
        image_sizes=np.concatenate(
            [np.full(len(one.ids), len(one.ids) if one.kind == TokenKind.IMAGE else 0) for one in segments]
        ),
        spans=spans,
        stop=stop,
    )


def _check_values(
    known: NDArray[np.int64],
    unknown: NDArray[np.bool_],
    num_permitted: int,
    space: int | None,
    unit: str,
    where: str,
    *,
    blank: bool,
    maskable: bool,
) -> None:
    """Raise ValueError unless values fit their element."""
    if not blank and ((unknown.any() and not maskable) or (space is not None and len(known) < space)):
        expected = len(known) if space is None else space
        raise ValueError(f"{where} must be known in full: got {(~unknown).sum()} {unit}, expected {expected}")
    if space is not None and len(known) > space:
        raise ValueError(f"{where} has {len(known)} {unit}, there is space for {space}")
    outside = ~unknown & ((known < 0) | (known >= num_permitted))
    if outside.any():
        index = int(outside.argmax())
        raise ValueError(f"{where} holds {known[index]} at {index}, expected {unit} from 0 to {num_permitted - 1}")


def _flatten(values: Values, where: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return values as a flat array, and which of them are unknown (None, or masked)."""
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
