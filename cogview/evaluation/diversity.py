"""Diversity of the images of a prompt, and what a choice among them gains."""

# C prompts, N images of each, H, W image in pixels, P positions of codes, S sizes of a choice
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MIN_IMAGES = 2  # of a prompt, for a distance


def different_share(images_NHWC: NDArray[np.uint8]) -> float:
    """Return the number of different images divided by N.

    Args:
        images_NHWC: Images of a prompt, uint8.

    Returns:
        From 1/N, where all are equal, to 1.
    """
    return len({image.tobytes() for image in images_NHWC}) / len(images_NHWC)


def pairwise_distance(images_NHWC: NDArray[np.uint8]) -> float:
    """Return the distance of two images, the mean over all pairs.

    The distance is the root of the mean squared difference of RGB values in [0, 1].

    Args:
        images_NHWC: At least two images of a prompt, uint8.

    Returns:
        From 0, where all are equal, to 1, that of a black and a white image.

    Raises:
        ValueError: There are fewer than two.
    """
    if len(images_NHWC) < MIN_IMAGES:
        raise ValueError(f"a distance needs two images, got {len(images_NHWC)}")
    values_NX = images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32) / 255
    total = 0.0
    for number in range(len(values_NX) - 1):
        squared = np.square(values_NX[number + 1 :] - values_NX[number])
        total += float(np.sqrt(squared.mean(axis=1, dtype=np.float64)).sum())
    return total / math.comb(len(values_NX), 2)


def code_entropy(codes_NP: NDArray[np.integer]) -> float:
    """Return the entropy of the N codes at a position in nats, the mean over positions.

    It is the entropy of the observed frequencies, which depends on N: compare only values of equal N.

    Args:
        codes_NP: Codes of the images of a prompt.

    Returns:
        From 0, where all images have the same codes, to ln N, where all codes of each position differ.
    """
    count = len(codes_NP)
    entropies = []
    for column in np.asarray(codes_NP).T:
        _, frequencies = np.unique(column, return_counts=True)
        shares = frequencies / count
        entropies.append(-float((shares * np.log(shares)).sum()))
    return max(0.0, float(np.mean(entropies)))  # -0.0 otherwise


def choice_sizes(count: int) -> list[int]:
    """Return the powers of two up to ``count``: 1, 2, 4, 8 for 8."""
    return [1 << exponent for exponent in range(count.bit_length())]


def expected_choice(
    values_CN: NDArray[np.floating], scores_CN: NDArray[np.floating], sizes: Sequence[int]
) -> NDArray[np.float64]:
    """Return the expected value of the image with the highest score among K random ones of the N of a prompt.

    The mean over all subsets of K images, without repetition: the image with the i-th lowest score is chosen in
    C(i - 1, K - 1) of the C(N, K) subsets. It is an unbiased estimate of what a choice among K images gains. Images
    with equal scores share their chance.

    Args:
        values_CN: Value of each image.
        scores_CN: Score of each image, by which it is chosen.
        sizes: Numbers K of images to choose from, from 1 to N.

    Returns:
        (C, S).

    Raises:
        ValueError: The shapes differ, a size is outside 1 to N, or a number is NaN.
    """
    values, scores = np.asarray(values_CN, dtype=np.float64), np.asarray(scores_CN, dtype=np.float64)
    if values.ndim != 2 or values.shape != scores.shape or not 1 <= min(sizes) <= max(sizes) <= values.shape[1]:
        raise ValueError(
            f"a choice among {list(sizes)} needs values and scores of one shape (prompts, images) with as many "
            f"images, got {values.shape} and {scores.shape}"
        )
    if np.isnan(values).any() or np.isnan(scores).any():
        raise ValueError("a value or a score is NaN")
    count = values.shape[1]
    chances_SN = np.array(
        [[math.comb(rank, size - 1) / math.comb(count, size) for rank in range(count)] for size in sizes]
    )
    found = np.empty((len(values), len(sizes)))
    for number, (row, by) in enumerate(zip(values, scores, strict=True)):
        order = np.argsort(by, kind="stable")
        _, ties, sizes_of_ties = np.unique(by[order], return_inverse=True, return_counts=True)
        means = np.bincount(ties, row[order]) / sizes_of_ties
        found[number] = chances_SN @ means[ties]
    return found


def expected_best(values_CN: NDArray[np.floating], sizes: Sequence[int]) -> NDArray[np.float64]:
    """Return the expected maximum of K random ones of the N values of a prompt, as (C, S).

    Args:
        values_CN: Value of each image.
        sizes: Numbers K of values, from 1 to N.

    Raises:
        ValueError: A size is outside 1 to N, or a value is NaN.
    """
    return expected_choice(values_CN, values_CN, sizes)
