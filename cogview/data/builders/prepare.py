"""Prepare captioned pictures for encoding, in worker processes: read, fit, normalize, tokenize."""

# H, W image in pixels
from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cogview.data.builders.encode import EncodeSettings
from cogview.data.sources.records import PictureRecord
from cogview.errors import InputError
from cogview.image_io.reading import fit, read_image
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.ranges import check_ranges

FitRule: TypeAlias = Literal["crop", "pad", "stretch"]
MIN_SIDE = 16  # pixels: nothing can be seen on a smaller picture
DIGEST_BYTES = 16

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


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPicture:
    """A record that has been read.

    Attributes:
        record: The record.
        stamp: Size and time of change of its file before it was read.
        digest: Hash of the decoded pixels, in hexadecimal; empty for a picture that cannot be used.
        captions: The normalized captions.
        pieces: Piece ids of each caption.
        images: Renditions by field, uint8 RGB (H, H, 3).
        left_out: Reasons why the picture, or single captions of it, cannot be used.
        notes: Choices that changed pixels or captions.
    """

    record: PictureRecord
    stamp: str = ""
    digest: str = ""
    captions: tuple[str, ...] = ()
    pieces: tuple[list[int], ...] = ()
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class PicturePreparer(Dataset[PreparedPicture]):
    """Prepares records; a ``DataLoader`` passes them in place of indices.

    Args:
        text_tokenizer: Tokenizer of the captions.
        settings: Settings of the store.
        side: Side of the images at scale 1, in pixels.

    Raises:
        InputError: The package that converts characters is missing.
    """

    def __init__(self, text_tokenizer: TextTokenizer, settings: PictureSettings, side: int) -> None:
        self.text_tokenizer = text_tokenizer
        self.settings = settings
        self.side = side
        self._convert: Callable[[str], str] | None = None
        self._converter()  # a missing package is reported at once

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_convert": None}  # a worker opens its own

    def __getitem__(self, record: PictureRecord) -> PreparedPicture:
        """Return a record with its pixels and pieces, or with the reason why it cannot be used."""
        if record.file is None:
            return PreparedPicture(record=record, left_out=(record.problem or "",))
        stamp = record.file.stamp()
        captions, pieces, left_out = self._tokenize(record.captions)
        if not captions:
            return PreparedPicture(record=record, stamp=stamp, left_out=left_out, notes=record.notes)
        notes = list(record.notes)
        try:
            image = read_image(Path(record.name), notes.append, content=record.file.read_part())
            if min(image.size) < MIN_SIDE:
                width, height = image.size
                raise InputError(f"the picture is {width} x {height} pixels, expected at least {MIN_SIDE} on a side")
        except InputError as error:
            return PreparedPicture(record=record, stamp=stamp, left_out=(str(error),), notes=record.notes)
        scales = self.settings.scales.items()
        return PreparedPicture(
            record=record,
            stamp=stamp,
            digest=pixel_digest(image),
            captions=captions,
            pieces=pieces,
            images={name: fit_picture(image, round(self.side * scale), self.settings.fit) for name, scale in scales},
            left_out=left_out,
            notes=tuple(notes),
        )

    def _tokenize(self, given: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[list[int], ...], tuple[str, ...]]:
        """Return the captions that can be used, their pieces, and the reasons why others cannot."""
        captions, pieces, left_out = [], [], []
        convert, width = self._converter(), self.settings.text_width
        for caption in dict.fromkeys(normalize_caption(convert(text)) for text in given):
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

    def _converter(self) -> Callable[[str], str]:
        if self._convert is None:
            self._convert = to_simplified() if self.settings.simplified else str
        return self._convert


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
    if rule == "crop":
        return fit(image, side)[0]
    size = (side, side)
    if rule == "pad":
        longer = max(image.size)
        size = (max(1, round(image.width * side / longer)), max(1, round(image.height * side / longer)))
    resized = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if rule == "stretch":
        return np.array(resized)
    square = Image.new("RGB", (side, side), "white")
    square.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.array(square)


def pixel_digest(image: Image.Image) -> str:
    """Return a hash of the size and the decoded pixels of a picture, in hexadecimal; equal for equal pictures."""
    digest = hashlib.blake2b(f"{image.width}x{image.height} ".encode(), digest_size=DIGEST_BYTES)
    digest.update(image.tobytes())
    return digest.hexdigest()


def is_held_out(digest: str, share: float) -> bool:
    """Return whether a picture belongs to the held-out share, by the hash of its pixels.

    Args:
        digest: The hash, as ``pixel_digest`` returns it.
        share: In [0, 1).
    """
    return int(digest[:16], 16) < share * 2.0**64
