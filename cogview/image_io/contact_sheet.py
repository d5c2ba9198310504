"""Contact sheets: many pictures in one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def contact_sheet(pictures: Sequence[np.ndarray], columns: int = 12, scale: int = 1, gap: int = 4) -> Image.Image:
    """Pictures (H, W, 3) uint8 of one size in rows of ``columns`` on white, each side ``scale`` times as long."""
    height, width = pictures[0].shape[0] * scale, pictures[0].shape[1] * scale
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for number, picture in enumerate(pictures):
        tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + number % columns * (width + gap), gap + number // columns * (height + gap)))
    return sheet
