"""Backgrounds of scenes: plain, or with a pattern that repeats with every eighth of the canvas."""

from __future__ import annotations

import numpy as np

from cogview.emoji.attributes import Pattern
from cogview.emoji.scene import Colour

_LIGHT = 215  # colours with a brighter mean are darkened for their pattern, others are lightened
_DARKER = 0.82
_LIGHTER = 0.42  # of the way to white
_DOT_RADIUS = 0.27  # of the period


def pattern_rgb(colour: Colour) -> tuple[int, int, int]:
    """Return the second colour of a pattern, a shade of the first.

    Args:
        colour: The first colour.
    """
    red, green, blue = (
        round(value * _DARKER if sum(colour.rgb) / 3 > _LIGHT else value + (255 - value) * _LIGHTER)
        for value in colour.rgb
    )
    return red, green, blue


def background(colour: Colour, pattern: Pattern | None, canvas: int) -> np.ndarray:
    """Return a background: uint8 RGB (H, H, 3).

    Args:
        colour: The colour.
        pattern: The pattern; None if plain.
        canvas: Side of the image in pixels, a multiple of 16.
    """
    image = np.empty((canvas, canvas, 3), dtype=np.uint8)
    image[:] = colour.rgb
    if pattern is None:
        return image
    period = canvas // 8
    if pattern.key == "stripes":
        cell = np.zeros((period, period))
        cell[:, period // 2 :] = 1
    else:
        fine = 4  # samples of a pixel in each direction, for a smooth edge
        offsets = (np.arange(period * fine) + 0.5) / (period * fine) - 0.5
        inside = (np.hypot(offsets[:, None], offsets[None]) < _DOT_RADIUS).astype(float)
        cell = inside.reshape(period, fine, period, fine).mean(axis=(1, 3))
    share = np.tile(cell, (8, 8))[:, :, None]
    mixed = np.array(colour.rgb) * (1 - share) + np.array(pattern_rgb(colour)) * share
    result: np.ndarray = (mixed + 0.5).astype(np.uint8)
    return result
