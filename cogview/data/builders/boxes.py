"""Boxes of a table that say which object stands where, as the piece of the caption that names it at each code.

A cell holds a list of objects as JSON, ``[{"text": "狐狸", "box": [x, y, width, height]}]``. Boxes are in pixels of the
upright picture, after EXIF has turned it, from its upper left corner.
"""

# G codes on a side of the grid

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from cogview.data.store import NO_TOKEN
from cogview.errors import InputError
from cogview.plain_data import parse_json
from cogview.tokenizers.text import TextTokenizer

EXPECTED = 'expected [{"text": "狐狸", "box": [x, y, width, height]}, …] in pixels'
MAX_PIXEL = 1e9
TOLERANCE = 1.0  # pixels by which a box may reach beyond the picture: annotations are rounded

# Maps left, top, right and bottom from pixels of a picture to fractions of the square that is made of it.
Placement: TypeAlias = Callable[[tuple[float, float, float, float]], tuple[float, float, float, float]]


@dataclass(frozen=True, kw_only=True)
class NamedBox:
    """A part of a picture that shows a named object.

    Args:
        name: Name of the object in captions.
        box: Left, top, right and bottom, in pixels, or as fractions of the square after ``place_boxes``.
    """

    name: str
    box: tuple[float, float, float, float]

    @property
    def area(self) -> float:
        """Area of the box."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


def parse_boxes(cell: str, clean: Callable[[str], str]) -> list[NamedBox]:
    """Return the boxes of a cell of a table, in pixels.

    Args:
        cell: JSON; an empty cell and ``null`` have no boxes.
        clean: Normalizes names, as it does captions.

    Raises:
        InputError: The cell has another form.
    """
    if not cell.strip():
        return []
    try:
        found = parse_json(cell.encode())
    except ValueError as error:
        raise InputError(f"its boxes are left out, they are not JSON ({error}); {EXPECTED}") from None
    if found is None:
        return []
    if not isinstance(found, list):
        raise InputError(f"its boxes are left out, they are no list; {EXPECTED}")
    return [_parse_box(each, clean) for each in found]


def _parse_box(found: Any, clean: Callable[[str], str]) -> NamedBox:
    """Return a box of a list; InputError for another form."""
    name, box = (found.get("text"), found.get("box")) if isinstance(found, dict) else (None, None)
    if not isinstance(name, str) or not (name := clean(name)):
        raise InputError(f'its boxes are left out, one has no "text"; {EXPECTED}')
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(type(each) in (int, float) and abs(each) < MAX_PIXEL for each in box)
        or min(box[2:]) <= 0
    ):
        raise InputError(f'its boxes are left out, one has no "box" with positive width and height; {EXPECTED}')
    x, y, width, height = map(float, box)
    return NamedBox(name=name, box=(x, y, x + width, y + height))


def place_boxes(
    boxes: Sequence[NamedBox], size: tuple[int, int], place: Placement
) -> tuple[list[NamedBox], list[str], bool]:
    """Return boxes as fractions of the square that is made of a picture.

    Args:
        boxes: Boxes in pixels of the picture.
        size: Width and height of the picture.
        place: Where a box of the picture lies in the square.

    Returns:
        The boxes, clipped to the square; the reasons why others are left out; whether the square lacks a box.
    """
    placed, left_out, is_cut = [], [], False
    width, height = size
    for each in boxes:
        left, top, right, bottom = each.box
        if min(left, top) < -TOLERANCE or right > width + TOLERANCE or bottom > height + TOLERANCE:
            shown = ", ".join(f"{edge:g}" for edge in (left, top, right - left, bottom - top))
            left_out.append(f"a box reaches beyond the picture of {width} x {height} pixels: {each.name}, [{shown}]")
            continue
        left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in place(each.box))
        if left < right and top < bottom:
            placed.append(replace(each, box=(left, top, right, bottom)))
        else:
            is_cut = True
    return placed, left_out, is_cut


def own_pieces(names: Sequence[str], caption: str, text_tokenizer: TextTokenizer) -> dict[str, int]:
    """Return a piece of a caption for each name in it: the first that only this name has.

    A name of several pieces may share some with other words of the caption, and a piece may reach into another name;
    such pieces would not say which object is meant. Of names within each other, the longest counts.

    Args:
        names: Names of objects.
        caption: The caption, as it was normalized.
        text_tokenizer: Its tokenizer.

    Returns:
        The piece ids of those names that the caption has and that have such a piece.
    """
    longest_first = sorted(set(names) - {""}, key=lambda name: (-len(name), name))
    if not longest_first:
        return {}
    found = [match.span() for match in re.finditer("|".join(map(re.escape, longest_first)), caption)]
    owners: dict[int, set[str]] = defaultdict(set)  # of each piece, in the order of the caption
    ids, spans = text_tokenizer.encode_with_spans(caption)
    if spans and spans[-1][1] != len(caption):
        return {}  # the tokenizer has normalized the caption further
    for piece, (start, end) in zip(ids, spans, strict=True):
        owners[piece] |= {caption[first:last] for first, last in found if start < last and first < end} or {""}
    pieces: dict[str, int] = {}
    for piece, of in owners.items():
        if len(of) == 1:
            pieces.setdefault(next(iter(of)), piece)
    pieces.pop("", None)
    return pieces


def name_codes(boxes: Sequence[NamedBox], pieces: dict[str, int], grid: int) -> np.ndarray:
    """Return the piece that names the object at each code.

    A box has the codes whose centres lie in it, and at least one row and one column. Where boxes overlap, the smaller
    one is in front.

    Args:
        boxes: Boxes as fractions of the square.
        pieces: Piece id of each name; boxes of other names have no codes.
        grid: Codes on a side of the image.

    Returns:
        uint16 (G * G,); ``NO_TOKEN`` where no object is named.
    """
    named = np.full((grid, grid), NO_TOKEN, dtype=np.uint16)
    for each in sorted(boxes, key=lambda box: -box.area):
        if each.name in pieces:
            left, top, right, bottom = each.box
            named[_codes(top, bottom, grid), _codes(left, right, grid)] = pieces[each.name]
    return named.ravel()


def _codes(first: float, end: float, grid: int) -> slice:
    """Return the codes on a side whose centres lie between two edges, or else the one in their middle."""
    codes = slice(math.ceil(first * grid - 0.5), math.ceil(end * grid - 0.5))
    if codes.start < codes.stop:
        return codes
    middle = min(int((first + end) / 2 * grid), grid - 1)
    return slice(middle, middle + 1)
