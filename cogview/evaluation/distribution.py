"""Distances between sets of image features: Fréchet distance, KID, precision and recall, and the Inception Score.

Means and covariances are summed in float64 while images stream by. What compares pairs of images keeps a random
subset of bounded size. Both are the same however the images are split into batches. Intervals are those of a jackknife
that leaves out one block of images after another (``metrics.jackknife``).
"""

# N images, D dimensions of a feature, C classes, S subsets or splits, M images of a subset, J blocks of images
from __future__ import annotations

import math

import numpy as np

from cogview.data.keyed_random import KeyedRandom
from cogview.errors import InputError
from cogview.evaluation.metrics import BLOCKS

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
NEIGHBOURS = 3
SPLITS = 10
_ROWS = 1024  # of a matrix of distances that is held at a time
_ADDED_TOGETHER = 64  # features of a block
_ROUNDING = 1e-10  # of squared distances, relative to the squared lengths of the features


class FeatureMoments:
    """Mean and covariance of features in float64; memory does not grow with their number.

    Batches are joined by the update of Chan, Golub and LeVeque (1979), which does not cancel where means are large.

    Args:
        dimensions: Dimensions of a feature.

    Attributes:
        count: Number of features.
        mean: Their mean, float64 (D,).
        scatter: Sum of the outer products of their deviations from the mean, float64 (D, D).
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = np.zeros(dimensions)
        self.scatter = np.zeros((dimensions, dimensions))

    def add(self, features_ND: np.ndarray) -> None:
        """Add features.

        Args:
            features_ND: Features (N, D), at least one.
        """
        features = features_ND.astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        self._join(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureMoments) -> None:
        """Add the features of other moments, as of another process."""
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of at least two features, divided by their number - 1: (D, D)."""
        covariance: np.ndarray = self.scatter / (self.count - 1)
        return covariance

    @property
    def is_rank_deficient(self) -> bool:
        """Whether the covariance is singular by the number of features alone."""
        return self.count <= len(self.mean)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


class BlockMoments:
    """Moments of blocks of images, for a jackknife; memory does not grow with the number of images.

    Image i belongs to block i modulo J.

    Args:
        dimensions: Dimensions of a feature.
        blocks: The number J.

    Attributes:
        blocks: The number J.
        count: Number of features.
    """

    def __init__(self, dimensions: int, blocks: int = BLOCKS) -> None:
        self.blocks = blocks
        self.count = 0
        self._moments = [FeatureMoments(dimensions) for _ in range(blocks)]
        self._waiting: list[list[np.ndarray]] = [[] for _ in range(blocks)]  # few features at a time are slow to add

    def add(self, features_ND: np.ndarray) -> None:
        """Add features of images in the order of their set."""
        blocks = np.arange(self.count, self.count + len(features_ND)) % len(self._moments)
        for block, (moments, waiting) in enumerate(zip(self._moments, self._waiting, strict=True)):
            waiting.extend(features_ND[blocks == block])
            if len(waiting) >= _ADDED_TOGETHER:
                moments.add(np.stack(waiting))
                waiting.clear()
        self.count += len(features_ND)

    @property
    def smallest_fold(self) -> int:
        """Number of features without the largest block."""
        return self.count - math.ceil(self.count / self.blocks)

    def without(self, block: int | None = None) -> FeatureMoments:
        """Return the moments of all blocks but one.

        Args:
            block: The block, from 0; None for the moments of all images.
        """
        for moments, waiting in zip(self._moments, self._waiting, strict=True):
            if waiting:
                moments.add(np.stack(waiting))
                waiting.clear()
        joined = FeatureMoments(len(self._moments[0].mean))
        for number, moments in enumerate(self._moments):
            if number != block:
                joined.merge(moments)
        return joined


class FeatureSample:
    """Features of a random subset of bounded size: of the images with the smallest hashes of seed and position.

    Args:
        limit: Maximum number of features.
        seed: Random seed.
    """

    def __init__(self, limit: int, seed: int) -> None:
        self.limit = limit
        self.seed = seed
        self._kept: list[tuple[int, int, np.ndarray]] = []  # hash, position, feature

    def add(self, start: int, features_ND: np.ndarray) -> None:
        """Add features of images in order.

        Args:
            start: Position of the first image in its set.
            features_ND: Features (N, D).
        """
        for position, feature in enumerate(features_ND, start):
            key = KeyedRandom("features", self.seed, position).randbelow(1 << 64)
            self._kept.append((key, position, feature.astype(np.float32)))
        if len(self._kept) > 2 * self.limit:
            self._prune()

    @property
    def features(self) -> np.ndarray:
        """The features in the order of their images, float32 (at most ``limit``, D)."""
        self._prune()
        return np.stack([feature for _, _, feature in sorted(self._kept, key=lambda each: each[1])])

    def _prune(self) -> None:
        self._kept = sorted(self._kept, key=lambda each: each[:2])[: self.limit]


class ClassSums:
    """Sums of class probabilities for the Inception Score, in memory that does not grow with the number of images.

    Args:
        classes: Number of classes.
        splits: Number of parts of the set; image i belongs to part i modulo ``splits``.
    """

    def __init__(self, classes: int, splits: int = SPLITS) -> None:
        self.counts = np.zeros(splits, dtype=np.int64)
        self.sums = np.zeros((splits, classes))
        self.negative_entropies = np.zeros(splits)

    def add(self, start: int, probabilities_NC: np.ndarray) -> None:
        """Add probabilities of images in order.

        Args:
            start: Position of the first image in its set.
            probabilities_NC: Class probabilities (N, C).
        """
        probabilities = probabilities_NC.astype(np.float64)
        split = np.arange(start, start + len(probabilities)) % len(self.counts)
        np.add.at(self.counts, split, 1)
        np.add.at(self.sums, split, probabilities)
        np.add.at(self.negative_entropies, split, _times_log(probabilities).sum(axis=1))

    def scores(self) -> np.ndarray:
        """Return the Inception Score of each split that has images: (S,).

        It is exp of the mean KL divergence between the classes of an image and those of its split (Salimans et al.,
        2016, arXiv:1606.03498): from 1 to the number of classes.
        """
        filled = self.counts > 0
        counts = self.counts[filled]
        marginals = self.sums[filled] / counts[:, None]
        divergences = self.negative_entropies[filled] / counts - _times_log(marginals).sum(axis=1)
        scores: np.ndarray = np.exp(divergences)
        return scores


def _times_log(values: np.ndarray) -> np.ndarray:
    """Return x log x, with 0 for 0."""
    result: np.ndarray = values * np.log(np.where(values > 0, values, 1))
    return result


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Return the squared Fréchet distance between Gaussians of the moments (Heusel et al., 2017, arXiv:1706.08500).

    The trace of the root of the product of covariances is the sum of the singular values of the product of their
    roots, each by eigenvalues. Singular covariances need no correction, unlike in an iterative matrix root.

    Args:
        a: Moments of at least two features.
        b: Other moments of the same dimensions.
    """
    shift = a.mean - b.mean
    roots = _root(a.covariance) @ _root(b.covariance)
    common = np.linalg.svd(roots, compute_uv=False).sum()
    distance = float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * common)
    return max(0.0, distance)  # rounding leaves about -1e-12 of equal sets


def _root(covariance: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a covariance; negative eigenvalues are rounding."""
    values, vectors = np.linalg.eigh(covariance)
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def kernel_distances(
    a_ND: np.ndarray, b_ND: np.ndarray, *, size: int, seed: int = 0, subsets: int = KERNEL_SUBSETS
) -> np.ndarray:
    """Return the Kernel Inception Distance of random subsets (Bińkowski et al., 2018, arXiv:1801.01401).

    It is the unbiased estimate of the squared maximum mean discrepancy with the kernel (x · y / D + 1)³; it may be
    negative. Unlike the Fréchet distance, its mean does not depend on the number of images.

    Args:
        a_ND: Features (N, D).
        b_ND: Other features; their number may differ.
        size: Images of a subset, from 2 to the number of features; subsets are without replacement.
        seed: Random seed.
        subsets: Number of subsets; a single one where it holds all features of both.

    Returns:
        The distance of each subset, float64 (S,).
    """
    if not 2 <= size <= min(len(a_ND), len(b_ND)):
        raise InputError(f"subsets must have from 2 to {min(len(a_ND), len(b_ND))} images, got {size}")
    a, b = a_ND.astype(np.float64), b_ND.astype(np.float64)
    if size == len(a) == len(b):
        return np.array([_squared_discrepancy(a, b)])
    random = np.random.default_rng(seed)
    chosen = ((random.choice(len(each), size, replace=False) for each in (a, b)) for _ in range(subsets))
    return np.array([_squared_discrepancy(a[one], b[other]) for one, other in chosen])


def _squared_discrepancy(a_MD: np.ndarray, b_MD: np.ndarray) -> float:
    """Return the unbiased squared maximum mean discrepancy of two sets of M features."""
    size = len(a_MD)
    within = [((kernel := _kernel(each, each)).sum() - np.trace(kernel)) / (size * (size - 1)) for each in (a_MD, b_MD)]
    return float(sum(within) - 2 * _kernel(a_MD, b_MD).mean())


def _kernel(a_MD: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    kernel: np.ndarray = (a_MD @ b_MD.T / a_MD.shape[1] + 1) ** 3
    return kernel


def precision_recall(
    candidates_ND: np.ndarray, references_ND: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Return the improved precision and recall (Kynkäänniemi et al., 2019, arXiv:1904.06991).

    The manifold of a set is the union of balls around its features, each up to the k-th nearest other feature.
    Precision is the share of candidates in the manifold of the references, recall that of references in the manifold
    of the candidates. Both depend on the number of features.

    Args:
        candidates_ND: Features (N, D) of generated images.
        references_ND: Features of true images.
        neighbours: The k.

    Raises:
        InputError: A set has no k-th neighbour.
    """
    precision, recall = precision_recall_folds(candidates_ND, references_ND, neighbours, blocks=0)[0]
    return float(precision), float(recall)


def precision_recall_folds(
    candidates_ND: np.ndarray, references_ND: np.ndarray, neighbours: int = NEIGHBOURS, *, blocks: int = BLOCKS
) -> np.ndarray:
    """Return ``precision_recall`` of all features, then without each block of both sets, for a jackknife.

    All distances are computed once. Feature i belongs to block i modulo J.

    Args:
        candidates_ND: Features (N, D) of generated images.
        references_ND: Features of true images.
        neighbours: The k.
        blocks: The number J; 0 for all features alone.

    Returns:
        Precision and recall: float64 (1 + J, 2).

    Raises:
        InputError: A set has no k-th neighbour, with or without a block.
    """
    kept = [
        np.stack([np.arange(len(features)) % max(1, blocks) != block for block in range(-1, blocks)])
        for features in (candidates_ND, references_ND)
    ]
    count = int(min(each.sum(axis=1).min() for each in kept))
    if count <= neighbours:
        raise InputError(f"precision and recall need more than {neighbours} images in each set, got {count}")
    centre = references_ND.mean(axis=0, dtype=np.float64)
    candidates, references = candidates_ND - centre, references_ND - centre
    return np.stack(
        [
            _covered_shares(candidates, kept[0], references, kept[1], neighbours),
            _covered_shares(references, kept[1], candidates, kept[0], neighbours),
        ],
        axis=1,
    )


def _covered_shares(
    points_ND: np.ndarray, kept_JN: np.ndarray, centres_MD: np.ndarray, kept_JM: np.ndarray, neighbours: int
) -> np.ndarray:
    """Return the share of points in the manifold of the centres, of the features that each row keeps: (J,)."""
    radii_JM = _radii(centres_MD, kept_JM, neighbours)
    radii_JM += _ROUNDING * float(np.square(centres_MD).sum(axis=1).mean())
    covered_JN = np.empty(kept_JN.shape, dtype=bool)
    for start in range(0, len(points_ND), _ROWS):
        squared = _squared_distances(points_ND[start : start + _ROWS], centres_MD)
        for covered_N, radii_M, kept_M in zip(covered_JN, radii_JM, kept_JM, strict=True):
            covered_N[start : start + _ROWS] = (squared <= np.where(kept_M, radii_M, -1)).any(axis=1)
    return np.asarray((covered_JN & kept_JN).sum(axis=1) / kept_JN.sum(axis=1))


def _radii(features_MD: np.ndarray, kept_JM: np.ndarray, neighbours: int) -> np.ndarray:
    """Return the squared distance of each feature to its k-th nearest other one of those that are kept: (J, M)."""
    radii_JM = np.empty(kept_JM.shape)
    for start in range(0, len(features_MD), _ROWS):
        squared = _squared_distances(features_MD[start : start + _ROWS], features_MD)
        rows = np.arange(len(squared))
        squared[rows, start + rows] = np.inf
        for radii_M, kept_M in zip(radii_JM, kept_JM, strict=True):
            others = squared if kept_M.all() else squared[:, kept_M]
            radii_M[start : start + _ROWS] = np.partition(others, neighbours - 1, axis=1)[:, neighbours - 1]
    return radii_JM


def _squared_distances(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    squares = np.square(a_ND).sum(axis=1)[:, None] + np.square(b_ND).sum(axis=1)
    distances: np.ndarray = np.maximum(squares - 2 * (a_ND @ b_ND.T), 0)
    return distances
