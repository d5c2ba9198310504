"""Pictures of files as an ``ImageDataset``: each is decoded and fitted whenever it is asked for."""

# H, W image in pixels
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cogview.data.builders.picture_index import IndexedPicture, file_state
from cogview.data.builders.prepare import fit_picture
from cogview.data.image_dataset import ImageExample
from cogview.errors import InputError
from cogview.image_io.reading import FitRule, read_image


@dataclass(frozen=True, kw_only=True)
class PictureImages:
    """Pictures without captions, fitted into squares.

    Args:
        pictures: The pictures.
        side: Side of the images at scale 1, in pixels.
        fit: How a picture becomes a square.
    """

    pictures: Sequence[IndexedPicture]
    side: int
    fit: FitRule = "crop"
    names: Sequence[str] = ()
    is_shuffled: bool = False

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Number of the pictures and their fit."""
        return {"pictures": len(self.pictures), "fit": self.fit}

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)

    def __getitem__(self, index: int) -> ImageExample:
        """Return a picture as an example without captions, whose identity is the hash of its pixels."""
        picture = self.pictures[index]
        render = partial(render_picture, picture, side=self.side, rule=self.fit)
        return ImageExample(identity=picture.digest, captions=(), render=render)


def render_picture(picture: IndexedPicture, scale: float = 1, *, side: int, rule: FitRule) -> np.ndarray:
    """Decode a picture and fit it into a square.

    Args:
        picture: The picture.
        scale: Scale of the square.
        side: Side of the square at scale 1, in pixels.
        rule: How it becomes a square.

    Returns:
        uint8 RGB (side * scale, side * scale, 3).

    Raises:
        InputError: The file has changed since the index was made, or cannot be read.
    """
    try:
        is_same = file_state(Path(picture.path)) == (picture.file_bytes, picture.file_time)
    except OSError:
        is_same = False
    if not is_same:
        raise InputError(f"{picture.path} has been changed or removed since the training was started")
    image = read_image(Path(picture.name), content=picture.file.read_part())
    return fit_picture(image, round(side * scale), rule)
