"""Masks of images: painted parts of files, and the codes that they cover."""

# H height, W width of an image in pixels, G codes on a side

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cogview.image_io.reading import FitRule, damaged_image, open_image, padded_size, to_rgb

_NUMBERS = re.compile(r"[\s\d.+-]*(,[\s\d.+-]*)+")
OPAQUE = 128  # from this level of 8 bits on a pixel is white, or opaque


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Read a mask from an image file of any mode.

    Args:
        path: The file.

    Returns:
        bool (H, W), turned upright by its EXIF data: see ``painted_pixels``.

    Raises:
        InputError: If the file is missing, no image, damaged, or has too many pixels.
    """
    with open_image(path) as image:
        try:
            image.load()
            return painted_pixels(ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's readers raise nearly anything on broken data
            raise damaged_image(path, error) from None


def is_box(text: str) -> bool:
    """Return whether the text of a mask is meant as a box ``x,y,w,h``, even as a wrong one, and not as a file."""
    return bool(_NUMBERS.fullmatch(text))


def painted_pixels(image: Image.Image) -> NDArray[np.bool_]:
    """Return where an image is painted: opaque if a part of it is transparent, else white.

    Args:
        image: Image of any mode.

    Returns:
        bool (H, W).
    """
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min(initial=255) < 255:
            return alpha >= OPAQUE
    return np.asarray(to_rgb(image).convert("L")) >= OPAQUE


def masked_codes(pixels: NDArray[np.bool_], grid: int, *, side: int, rule: FitRule = "crop") -> NDArray[np.bool_]:
    """Return the codes that a mask covers once its image is made a square (``reading.fit``).

    Args:
        pixels: The mask, bool (H, W), of the size of the image before it is fitted.
        grid: G, codes on a side.
        side: Pixels on a side of the square, a multiple of G.
        rule: How the image becomes a square.

    Returns:
        bool (G, G): True for a code that has a pixel in the mask. White that ``pad`` adds is outside of it.
    """
    height, width = pixels.shape
    scaled = padded_size((width, height), side) if rule == "pad" else (side, side)
    cropped = min(width, height) if rule == "crop" else None
    columns = _pixel_ranges(width, cropped, scaled[0], grid, side)
    rows = _pixel_ranges(height, cropped, scaled[1], grid, side)
    lines = np.stack([pixels[start:end].any(axis=0) for start, end in rows])
    return np.stack([lines[:, start:end].any(axis=1) for start, end in columns], axis=1)


def _pixel_ranges(size: int, cropped: int | None, scaled: int, grid: int, side: int) -> list[tuple[int, int]]:
    """Return the first pixel of each code along one side of an image, and the pixel behind its last.

    Args:
        size: Pixels of the image along that side.
        cropped: Pixels in its middle that are kept; None: all.
        scaled: Pixels of the square that these become.
        grid: Codes along the square.
        side: Pixels along the square.
    """
    kept = size if cropped is None else cropped
    first, offset = (size - kept) // 2, (side - scaled) // 2
    bounds = [min(max(code * side // grid - offset, 0), scaled) for code in range(grid + 1)]
    return [
        (first + low * kept // scaled, first - (-high * kept // scaled)) for low, high in itertools.pairwise(bounds)
    ]
