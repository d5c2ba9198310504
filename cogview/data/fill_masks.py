"""Unknown codes of an image that is to be filled: sampled for training, and by a share that stays known."""

# B masks, G codes on a side
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray


def _box(grid: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """Return a rectangle of any size and place."""
    mask = np.zeros((grid, grid), dtype=bool)
    height, width = random.integers(1, grid + 1, size=2)
    top, left = random.integers(grid - height + 1), random.integers(grid - width + 1)
    mask[top : top + height, left : left + width] = True
    return mask


def _random(grid: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """Return single codes, of a number that is uniform from 1 on."""
    mask = np.zeros(grid * grid, dtype=bool)
    mask[random.permutation(grid * grid)[: random.integers(1, grid * grid + 1)]] = True
    return mask.reshape(grid, grid)


def _side(grid: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """Return all codes on one side of a horizontal or vertical line."""
    lines = np.arange(grid) < random.integers(1, max(2, grid))
    return np.rot90(np.repeat(lines[:, None], grid, axis=1), int(random.integers(4)))


def _all(grid: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """Return every code."""
    return np.ones((grid, grid), dtype=bool)


FILL_MASKS: Final[dict[str, Callable[[int, np.random.Generator], NDArray[np.bool_]]]] = {
    "box": _box,
    "random": _random,
    "side": _side,
    "all": _all,
}


def check_fill_masks(shares: Mapping[str, float]) -> None:
    """Check shares of the kinds of masks.

    Args:
        shares: Shares by keys of ``FILL_MASKS``.

    Raises:
        ValueError: A kind is unknown, a share is not above 0, or there is none.
    """
    for kind, share in shares.items():
        if kind not in FILL_MASKS:
            raise ValueError(f"fill_masks: the kind {kind!r} is unknown; known: {', '.join(FILL_MASKS)}")
        if not 0 < share < math.inf:
            raise ValueError(f"fill_masks: the share of {kind!r} must be above 0 and finite, got {share}")
    if not shares:
        raise ValueError(f"fill_masks needs a kind at least; known: {', '.join(FILL_MASKS)}")


def sample_fill_masks(
    shares: Mapping[str, float], count: int, grid: int, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Sample masks of unknown codes.

    Args:
        shares: Shares by keys of ``FILL_MASKS``.
        count: B, the number of masks.
        grid: G, codes on a side of the image.
        random: Generator, which is advanced.

    Returns:
        Masks (B, G * G), bool; each has an unknown code.
    """
    weights = np.array(list(shares.values()))
    kinds = random.choice(list(shares), size=count, p=weights / weights.sum())
    return np.array([FILL_MASKS[kind](grid, random).reshape(-1) for kind in kinds]).reshape(count, grid * grid)
