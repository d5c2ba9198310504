"""Metrics of images and of graded samples, with their intervals."""

# H, W image in pixels, C captions, N images of each, R resamples
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cogview.modeling.config import ReconstructionQuality
from cogview.vqvae.codec import psnr

RESAMPLES = 2000  # of the bootstrap
COMPARED_TOGETHER = 256  # pictures, whose pixels are numbers of eight bytes meanwhile
BLOCKS = 10  # of a jackknife
T_QUANTILE = 2.262157  # 97.5%, of one degree of freedom less than blocks
WINDOW = 11  # pixels on a side of a window of SSIM
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, from the largest image to the smallest


def pixel_distances(images: Sequence[np.ndarray], pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of squared differences of pixels between images and pictures, as whole numbers: int64 (N, M).

    Args:
        images: N images, uint8, all of one shape.
        pictures: M pictures of the same shape.
    """
    flat = np.stack([image.reshape(-1) for image in images]).astype(np.float64)  # whole up to 2**53
    squares = np.square(flat).sum(axis=1)[:, None]
    columns = []
    for start in range(0, len(pictures), COMPARED_TOGETHER):
        part = np.stack([picture.reshape(-1) for picture in pictures[start : start + COMPARED_TOGETHER]])
        part = part.astype(np.float64)
        columns.append(squares - 2 * (flat @ part.T) + np.square(part).sum(axis=1))  # |a - b|² = |a|² - 2ab + |b|²
    return np.concatenate(columns, axis=1).astype(np.int64)


def ssim(image: np.ndarray, other: np.ndarray) -> float:
    """Return the structural similarity of two images, the mean over their channels.

    As published by Wang et al. (IEEE TIP 13(4), 2004): Gaussian windows of 11 x 11 pixels with sigma 1.5, at all
    positions where the whole window is inside the image.

    Args:
        image: uint8 (H, W, channels), with sides of at least 11.
        other: uint8 of the same shape.

    Returns:
        At most 1, which is the value of equal images.
    """
    luminance, structure = _ssim_parts(image.astype(np.float64), other.astype(np.float64))
    return float((luminance * structure).mean())


def multi_scale_ssim(image: np.ndarray, other: np.ndarray) -> float:
    """Return the multi-scale structural similarity (Wang, Simoncelli and Bovik, Asilomar 2003).

    Contrast and structure are measured at five scales, each half of the one before by the mean of 2 x 2 pixels, and
    luminance at the last. Each is a mean over positions and channels; negative means count as 0.

    Args:
        image: uint8 (H, W, channels), with sides of at least ``smallest_multi_scale_side``.
        other: uint8 of the same shape.

    Returns:
        From 0 to 1, which is the value of equal images.
    """
    a, b = image.astype(np.float64), other.astype(np.float64)
    product = 1.0
    for number, weight in enumerate(SCALE_WEIGHTS):
        if number:
            a, b = _halved(a), _halved(b)
        luminance, structure = _ssim_parts(a, b)
        is_last = number == len(SCALE_WEIGHTS) - 1
        product *= max(0.0, float((luminance * structure if is_last else structure).mean())) ** weight
    return product


def smallest_multi_scale_side() -> int:
    """Return the smallest side, in pixels, of images with a window at each of the scales of ``multi_scale_ssim``."""
    return WINDOW << (len(SCALE_WEIGHTS) - 1)


def _halved(values: np.ndarray) -> np.ndarray:
    """Return means of 2 x 2 pixels; an odd last row or column is dropped."""
    height, width = (size // 2 * 2 for size in values.shape[:2])
    even = values[:height, :width]
    halved: np.ndarray = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
    return halved


def _ssim_parts(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of SSIM at each window, of values in [0, 255]: luminance, and contrast with structure."""
    steady_mean, steady_variance = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _blurred(a), _blurred(b)
    variances = _blurred(a * a) - mean_a**2 + _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + steady_mean) / (mean_a**2 + mean_b**2 + steady_mean)
    return luminance, (2 * covariance + steady_variance) / (variances + steady_variance)


def _blurred(values: np.ndarray) -> np.ndarray:
    """Means (H - 10, W - 10, channels) of (H, W, channels) in Gaussian windows."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-0.5 * (offsets / 1.5) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        values = np.lib.stride_tricks.sliding_window_view(values, len(weights), axis=axis) @ weights
    return values


def reconstruction_quality(images: Sequence[np.ndarray], restored: Sequence[np.ndarray]) -> ReconstructionQuality:
    """Return quantiles of the PSNR of reconstructions, for the config of a model.

    Args:
        images: Images that the model was not trained on but that are like those of its training, uint8 (H, W, 3).
        restored: Their reconstructions by the image tokenizer (``vqvae.codec.reconstruct``).
    """
    values = [psnr(*pair) for pair in zip(images, restored, strict=True)]
    p01, p05, median = (round(float(value), 2) for value in np.percentile(values, [1, 5, 50]))
    return ReconstructionQuality(p01=p01, p05=p05, median=median)


def wilson_interval(right: int, of: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion, after Wilson (1927).

    Unlike the normal approximation it is valid near 0 and 1.

    Args:
        right: Number of successes.
        of: Number of trials, at least 1.

    Returns:
        Lower and upper end, in [0, 1].
    """
    z = 1.959964
    share = right / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(right: int, of: int) -> dict[str, Any]:
    """Return ``right``, ``of``, their ratio ``accuracy`` and its 95% interval ``low`` to ``high``.

    The last three are None if ``of`` is 0.

    Args:
        right: Number of successes.
        of: Number of trials.
    """
    if of == 0:
        return {"right": 0, "of": 0, "accuracy": None, "low": None, "high": None}
    low, high = wilson_interval(right, of)
    return {"right": right, "of": of, "accuracy": right / of, "low": low, "high": high}


def format_accuracy(result: dict[str, Any]) -> str:
    """Return an ``accuracy`` in percent with its interval; a dash if ``of`` is 0."""
    if not result["of"]:
        return "–"
    return f"{result['accuracy']:.1%} ({result['low']:.1%}–{result['high']:.1%})"


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> dict[str, float]:
    """Return a statistic of ``count`` items and its 95% percentile interval by the bootstrap (Efron, 1979).

    Args:
        statistic: The statistic of a choice of items: indices (count,) give a scalar, (R, count) give (R,).
        count: Number of items.

    Returns:
        ``value`` of all items, ``low`` and ``high``; equal calls give equal intervals.
    """
    resamples = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.percentile(statistic(resamples), [2.5, 97.5])
    return {"value": float(statistic(np.arange(count))), "low": float(low), "high": float(high)}


def jackknife(value: float, folds_J: np.ndarray, *, lowest: float, highest: float = math.inf) -> dict[str, float]:
    """Return a statistic with its 95% interval by the jackknife of blocks of items (Tukey, 1958).

    The interval is ``value`` ± t times the root of (J - 1) / J times the sum of squared deviations of the folds from
    their mean. It is that of chance, not of a bias by the number of items.

    Args:
        value: The statistic of all items.
        folds_J: The statistic without each of J = ``BLOCKS`` blocks of equal size.
        lowest: Lowest value that the statistic can have.
        highest: Highest one.

    Returns:
        ``value``, ``low`` and ``high``.

    Raises:
        ValueError: There is another number of folds.
    """
    if len(folds_J) != BLOCKS:
        raise ValueError(f"a jackknife needs {BLOCKS} folds, got {len(folds_J)}")
    half = T_QUANTILE * math.sqrt((BLOCKS - 1) / BLOCKS * float(np.square(folds_J - folds_J.mean()).sum()))
    return {"value": value, "low": max(lowest, value - half), "high": min(highest, value + half)}


def best_of(right_CN: np.ndarray, scores_CN: np.ndarray, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Measure the gain of choosing, by a score, one of several images of a caption.

    Args:
        right_CN: Whether each of N images of C captions is right, bool.
        scores_CN: Their scores, float; of equal scores the first wins.
        sizes: Numbers of images to choose from: the first of the N.

    Returns:
        A row per size ``of``: ``average``, the fraction of right images; ``best_by_score``, the accuracy of the image
        with the highest score; ``best_possible``, the accuracy of the best image; ``gap_closed``, the fraction of the
        gap between average and best possible that the score closes. It is 0 for a random choice, and None without a
        gap.

    Raises:
        ValueError: The shapes differ, or a size is outside 1 to N.
    """
    if right_CN.shape != scores_CN.shape or not 1 <= min(sizes) <= max(sizes) <= right_CN.shape[1]:
        raise ValueError(
            f"best of {list(sizes)} needs grades and scores of one shape (captions, images) with as many images, "
            f"got {right_CN.shape} and {scores_CN.shape}"
        )
    rows = []
    for size in sizes:
        right, scores = right_CN[:, :size], scores_CN[:, :size]
        chosen = right[np.arange(len(right)), scores.argmax(axis=1)]  # argmax: the first of equals
        best = accuracy(int(chosen.sum()), len(right))
        possible = accuracy(int(right.any(axis=1).sum()), len(right))
        average = float(right.mean())
        gap = possible["accuracy"] - average
        rows.append(
            {
                "of": size,
                "average": average,
                "best_by_score": best,
                "best_possible": possible,
                "gap_closed": (best["accuracy"] - average) / gap if gap > 0 else None,
            }
        )
    return rows
