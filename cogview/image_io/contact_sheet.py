"""Contact sheets: many images in one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def contact_sheet(images: Sequence[np.ndarray], columns: int = 12, scale: int = 1, gap: int = 4) -> Image.Image:
    """Return one image that shows others in rows on white.

    Args:
        images: uint8 RGB images (H, W, 3) of one size, at least one.
        columns: Maximum number of images in a row.
        scale: Factor by which the sides of each image are enlarged.
        gap: Pixels between images.
    """
    height, width = images[0].shape[0] * scale, images[0].shape[1] * scale
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for number, image in enumerate(images):
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + number % columns * (width + gap), gap + number // columns * (height + gap)))
    return sheet
