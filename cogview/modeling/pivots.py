"""Pivots of window attention: all positions outside of images, and a sample of the positions of each image.

Training samples the positions of an image anew for each row of a step. Everything else (generation, scoring,
evaluation) takes one fixed sample for each size of an image, so that a position has the same pivots in any batch, with
and without a cache.
"""

# T positions of a sequence, S positions of a batch, N sampled positions of an image
from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cogview.kernels.window_mask import Pivots
from cogview.modeling.config import AttentionConfig
from cogview.tokenizers.batching import SequenceBatch

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def fixed_sample(size: int, count: int) -> NDArray[np.int64]:
    """Return the positions of an image that stand for it in generation.

    The image is cut into ``count`` runs, and each gives one position, at the fraction of the run that a multiple of the
    golden ratio takes: evenly spread along the sequence, and over the columns of the grid as well.

    Args:
        size: Codes of the image.
        count: Number of positions, at most ``size``.

    Returns:
        Positions (N,) int64, ascending, from 0 to ``size`` - 1.
    """
    return _one_of_each_run(size, np.arange(count) * GOLDEN_RATIO % 1)


def random_sample(size: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return a random sample of the positions of an image: one of each of ``count`` runs.

    All positions are equally likely if the runs have one length. The sample of generation is one of these.

    Args:
        size: Codes of the image.
        count: Number of positions, at most ``size``.
        random: Source of randomness.

    Returns:
        Positions (N,) int64, ascending, from 0 to ``size`` - 1.
    """
    return _one_of_each_run(size, random.random(count))


def _one_of_each_run(size: int, fractions_N: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Return a position of each of N runs of an image, at the given fraction of the run in [0, 1)."""
    count = len(fractions_N)
    borders = np.arange(count + 1) * size // max(count, 1)
    positions_N: NDArray[np.int64] = borders[:-1] + np.floor(fractions_N * np.diff(borders)).astype(np.int64)
    return positions_N


def pivot_bias(
    image_sizes_T: NDArray[np.int64], num_samples: int, random: np.random.Generator | None = None
) -> NDArray[np.float32]:
    """Return the bias of each position of a sequence as a pivot.

    Args:
        image_sizes_T: Codes of the whole image that a position belongs to, 0 outside of images. An image begins with
            its first code; its last ones may be missing.
        num_samples: Number of sampled positions of each image (``AttentionConfig.pivots``).
        random: Source of a random sample; None for the fixed one.

    Returns:
        Bias (T,) float32: 0 outside of images, log(s / n) at the n sampled of s positions of an image, else -inf.
    """
    bias_T = np.zeros(len(image_sizes_T), dtype=np.float32)
    starts = np.flatnonzero((image_sizes_T > 0) & (np.diff(image_sizes_T, prepend=0) != 0))
    for start in starts.tolist():
        size = int(image_sizes_T[start])
        count = min(num_samples, size)
        sample_N = fixed_sample(size, count) if random is None else random_sample(size, count, random)
        image_T = bias_T[start : start + size]
        image_T[:] = -np.inf
        if count:
            image_T[sample_N[sample_N < len(image_T)]] = math.log(size / count)
    return bias_T


def count_keys(attention: AttentionConfig, image_sizes_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of keys that the query at each position of a sequence attends to, (T,).

    Args:
        attention: The pattern of attention.
        image_sizes_T: Codes of the whole image that a position belongs to, 0 outside of images.
    """
    keys_T = np.arange(1, len(image_sizes_T) + 1)
    if attention.is_dense:
        return keys_T
    pivots_T = np.cumsum(np.isfinite(pivot_bias(image_sizes_T, attention.pivots)))
    keys_T[attention.window :] = attention.window + pivots_T[: -attention.window]
    return keys_T


def fixed_pivots(attention: AttentionConfig, batch: SequenceBatch, device: torch.device) -> Pivots | None:
    """Return the pivots of generation and scoring; None for dense attention.

    Args:
        attention: The pattern of attention.
        batch: Sequences, padded on either side.
        device: Device of the pivots.
    """
    if attention.is_dense:
        return None
    bias_BS = np.full(batch.ids.shape, -np.inf, dtype=np.float32)
    for row, (start, end) in enumerate(zip(batch.starts.tolist(), batch.ends.tolist(), strict=True)):
        bias_BS[row, start:end] = pivot_bias(batch.image_sizes[row, start:end], attention.pivots)
    return Pivots.from_bias(torch.from_numpy(bias_BS)).to(device)
