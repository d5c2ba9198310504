"""Prepare captioned pictures for encoding, in worker processes: read, fit, normalize, tokenize."""

# H, W image in pixels
from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cogview.data.builders.boxes import name_codes, own_pieces, parse_boxes, place_boxes
from cogview.data.builders.encode import EncodeSettings
from cogview.data.sources.records import PictureFile, PictureRecord
from cogview.errors import InputError
from cogview.image_io.reading import FitRule, fit, padded_size, read_image
from cogview.tokenizers.tasks import SOURCE_FIELD
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.ranges import check_ranges

MIN_SIDE = 16  # pixels: nothing can be seen on a smaller picture
DIGEST_BYTES = 16
NO_TEXT = "a caption holds a character 0: its file is no text"
CUT_NOTE = "a box lies outside the square that is kept of it"
NAMED_NOTE = "its boxes name objects of its captions"

_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class PictureSettings(EncodeSettings):
    """Settings of a store that is built from pictures with captions.

    Args:
        fit: How a picture becomes a square: the middle is cropped, white is added, or the sides are stretched.
        held_out: Share of the pictures that are held out, by a hash of their pixels.
        simplified: Convert traditional characters to simplified ones.

    Raises:
        ValueError: A number is out of range.
    """

    fit: FitRule = "crop"
    held_out: float = 0.05
    simplified: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"held_out": "[0, 1)"})

    @property
    def edit_fields(self) -> tuple[str, ...]:
        """Fields of the edit that leads to a picture: its source alone, since its captions are the instructions."""
        return (SOURCE_FIELD,) if self.source else ()


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPicture:
    """A record that has been read.

    Attributes:
        record: The record.
        stamp: Size and time of change of its file before it was read.
        digest: Hash of the decoded pixels, with those of the source, in hexadecimal; empty for a picture that cannot
            be used.
        captions: The normalized captions.
        pieces: Piece ids of each caption.
        named: For each caption, the piece that names the object at each code, uint16 (G * G,); empty without boxes.
        images: Renditions by field, uint8 RGB (H, H, 3).
        left_out: Reasons why the picture, or single captions or boxes of it, cannot be used.
        notes: Choices that changed pixels or captions.
    """

    record: PictureRecord
    stamp: str = ""
    digest: str = ""
    captions: tuple[str, ...] = ()
    pieces: tuple[list[int], ...] = ()
    named: tuple[np.ndarray, ...] = ()
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class PicturePreparer(Dataset[PreparedPicture]):
    """Prepares records; a ``DataLoader`` passes them in place of indices.

    Args:
        text_tokenizer: Tokenizer of the captions.
        settings: Settings of the store.
        side: Side of the images at scale 1, in pixels.
        grid: Codes on a side of the images at scale 1.

    Raises:
        InputError: The package that converts characters is missing.
    """

    def __init__(self, text_tokenizer: TextTokenizer, settings: PictureSettings, side: int, grid: int) -> None:
        self.text_tokenizer = text_tokenizer
        self.settings = settings
        self.side = side
        self.grid = grid
        self._convert: Callable[[str], str] | None = None
        self._converter()  # a missing package is reported at once

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_convert": None}  # a worker opens its own

    def __getitem__(self, record: PictureRecord) -> PreparedPicture:
        """Return a record with its pixels and pieces, or with the reason why it cannot be used."""
        if record.file is None:
            return PreparedPicture(record=record, left_out=(record.problem or "",))
        stamp = record.stamp()
        captions, pieces, left_out = self._tokenize(record.captions)
        if not captions:
            return PreparedPicture(record=record, stamp=stamp, left_out=left_out, notes=record.notes)
        notes = list(record.notes)
        try:
            image = _read(record.file, Path(record.name), "the picture", notes.append)
            source = None
            if record.source is not None:
                path = record.source.path
                source = _read(record.source, path, f"its source {path.name}", notes.append)
        except InputError as error:
            return PreparedPicture(record=record, stamp=stamp, left_out=(str(error),), notes=record.notes)
        rule = self.settings.fit
        images = {
            name: fit_picture(image, round(self.side * scale), rule) for name, scale in self.settings.scales.items()
        }
        if source is not None:
            images[SOURCE_FIELD] = fit_picture(source, self.side, rule)
        named: tuple[np.ndarray, ...] = ()
        if self.settings.named:
            named, reasons = self._name_codes(record.boxes, captions, image.size, notes.append)
            left_out = (*left_out, *reasons)
        return PreparedPicture(
            record=record,
            stamp=stamp,
            digest=pixel_digest(image, *(() if source is None else (source,))),
            captions=captions,
            pieces=pieces,
            named=named,
            images=images,
            left_out=left_out,
            notes=tuple(notes),
        )

    def _tokenize(self, given: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[list[int], ...], tuple[str, ...]]:
        """Return the captions that can be used, their pieces, and the reasons why others cannot."""
        captions, pieces, left_out = [], [], []
        convert, width = self._converter(), self.settings.text_width
        if any("\0" in text for text in given):
            left_out.append(NO_TEXT)
        texts = [text for text in given if "\0" not in text]
        for caption in dict.fromkeys(normalize_caption(convert(text)) for text in texts):
            try:
                ids = self.text_tokenizer.encode(caption)
            except ValueError:
                left_out.append("a caption holds half of a surrogate pair")
                continue
            if not ids:
                left_out.append("a caption without text")
            elif len(ids) > width:
                left_out.append(f"a caption has {len(ids)} pieces, at most {width} are used: {caption[:40]}…")
            else:
                captions.append(caption)
                pieces.append(ids)
        return tuple(captions), tuple(pieces), tuple(left_out)

    def _name_codes(
        self, cells: Sequence[str], captions: Sequence[str], size: tuple[int, int], on_note: Callable[[str], object]
    ) -> tuple[tuple[np.ndarray, ...], list[str]]:
        """Return the piece that names the object at each code for each caption, and why boxes are left out."""
        convert, rule = self._converter(), self.settings.fit
        boxes, left_out = [], []
        for cell in cells:
            try:
                boxes += parse_boxes(cell, lambda name: normalize_caption(convert(name)))
            except InputError as error:
                left_out.append(str(error))
        placed, reasons, is_cut = place_boxes(boxes, size, lambda box: fit_box(box, size, self.side, rule))
        left_out += reasons
        if is_cut:
            on_note(CUT_NOTE)
        names = list(dict.fromkeys(box.name for box in placed))
        pieces = [own_pieces(names, caption, self.text_tokenizer) for caption in captions]
        for name in names:
            if not any(name in caption for caption in captions):
                left_out.append(f"a box has a name that no caption has: {name}")
            elif not any(name in each for each in pieces):
                left_out.append(f"a box has a name without a piece of its own in a caption: {name}")
        if any(pieces):
            on_note(NAMED_NOTE)
        return tuple(name_codes(placed, each, self.grid) for each in pieces), left_out

    def _converter(self) -> Callable[[str], str]:
        if self._convert is None:
            self._convert = to_simplified() if self.settings.simplified else str
        return self._convert


def _read(file: PictureFile, path: Path, subject: str, on_note: Callable[[str], object]) -> Image.Image:
    """Return a picture; InputError with ``subject`` if it is too small, or with ``path`` if it cannot be read."""
    image = read_image(path, on_note, content=file.read_part())
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise InputError(f"{subject} is {width} x {height} pixels, expected at least {MIN_SIDE} on a side")
    return image


def to_simplified() -> Callable[[str], str]:
    """Return a function that converts traditional characters of a text to simplified ones, by OpenCC.

    Raises:
        InputError: OpenCC is missing.
    """
    try:
        from opencc import OpenCC
    except ImportError:
        raise InputError('converting characters needs the package opencc: pip install "cogview[data]"') from None
    convert: Callable[[str], str] = OpenCC("t2s").convert
    return convert


def normalize_caption(text: str) -> str:
    """Return a caption in NFKC, without control characters, with single spaces.

    Examples:
        >>> normalize_caption(" ＡＢ　　c\\n")
        'AB c'
    """
    text = unicodedata.normalize("NFKC", text)
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)
    return _SPACES.sub(" ", text).strip()


def fit_picture(image: Image.Image, side: int, rule: FitRule) -> np.ndarray:
    """Return a picture as a square.

    Args:
        image: RGB image of any size.
        side: Side of the square in pixels.
        rule: ``crop`` keeps the middle, ``pad`` adds white on both sides, ``stretch`` changes the aspect ratio.

    Returns:
        uint8 RGB (side, side, 3).
    """
    return fit(image, side, rule)[0]


def fit_box(
    box: tuple[float, float, float, float], size: tuple[int, int], side: int, rule: FitRule
) -> tuple[float, float, float, float]:
    """Return where a box of a picture lies in the square of ``fit_picture``.

    Args:
        box: Left, top, right and bottom in pixels of the picture.
        size: Width and height of the picture.
        side: Side of the square in pixels.
        rule: The rule of the square.

    Returns:
        Left, top, right and bottom as fractions of the square; outside [0, 1] for what is cut away.
    """
    starts, lengths = [0.0, 0.0], [float(length) for length in size]
    if rule == "crop":
        lengths = [float(min(size))] * 2
        starts = [float((length - min(size)) // 2) for length in size]
    elif rule == "pad":
        inner = padded_size(size, side)
        pixel = [length / scaled for length, scaled in zip(size, inner, strict=True)]  # of the square
        lengths = [side * each for each in pixel]
        starts = [-((side - scaled) // 2) * each for scaled, each in zip(inner, pixel, strict=True)]
    left, top, right, bottom = ((edge - starts[i % 2]) / lengths[i % 2] for i, edge in enumerate(box))
    return left, top, right, bottom


def pixel_digest(*images: Image.Image) -> str:
    """Return a hash of the sizes and the decoded pixels of pictures, in hexadecimal; equal for equal pictures."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for image in images:
        digest.update(f"{image.width}x{image.height} ".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def is_held_out(digest: str, share: float) -> bool:
    """Return whether a picture belongs to the held-out share, by the hash of its pixels.

    Args:
        digest: The hash, as ``pixel_digest`` returns it.
        share: In [0, 1).
    """
    return int(digest[:16], 16) < share * 2.0**64
