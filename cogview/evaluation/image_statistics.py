"""Measure a set of images against a reference set by features of a network, under a stated protocol."""

# N images, H pixels of a side, S values of subsets or splits
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from cogview.errors import InputError
from cogview.evaluation.distribution import (
    KERNEL_SUBSET_SIZE,
    KERNEL_SUBSETS,
    NEIGHBOURS,
    SPLITS,
    BlockMoments,
    ClassSums,
    FeatureMoments,
    FeatureSample,
    frechet_distance,
    kernel_distances,
    precision_recall_folds,
)
from cogview.evaluation.features import FeatureNetwork, finite_features
from cogview.evaluation.image_sets import BATCH, ImageSet
from cogview.evaluation.manifest import BlurRecord, ResizeRecord, ResultValue, SetRecord, hash_set
from cogview.evaluation.metrics import BLOCKS, jackknife
from cogview.image_io.reading import FitRule, fit

Filter: TypeAlias = Literal["bicubic", "lanczos", "bilinear", "box"]
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
SAMPLE = 10_000  # images whose features are kept for KID, precision and recall
_BLUR_REACH = 4  # of the Gaussian kernel, in sigmas


@dataclass(frozen=True, kw_only=True)
class SquareResize:
    """Turns an image into a square as ``image_io.reading.fit`` does, by an antialiased filter alone.

    Args:
        side: Pixels of a side.
        filter: The filter.
        rule: ``crop`` keeps the middle of the longer side, ``pad`` adds white to the shorter one, ``stretch`` changes
            the aspect ratio.
    """

    side: int
    filter: Filter = "bicubic"
    rule: FitRule = "crop"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image as uint8 (side, side, 3)."""
        return fit(image, self.side, self.rule, resampling=FILTERS[self.filter], reducing_gap=None)[0]

    def record(self) -> ResizeRecord:
        """Return the record for a manifest."""
        return ResizeRecord(side=self.side, filter=self.filter, antialias=True, fit=self.rule)


@dataclass(frozen=True, kw_only=True)
class ImageProtocol:
    """What moves distances of image sets, besides the sets and the network.

    Args:
        resize: How images become squares.
        blur: Blur after resizing; None for none.
        seed: Random seed of subsets.
        sample: Maximum number of images of a set whose features are kept.
        splits: Splits of the Inception Score.
        blocks: Blocks of the jackknife, each with moments of its images; 1 for no interval of the Fréchet distance.
    """

    resize: SquareResize
    blur: BlurRecord | None = None
    seed: int = 0
    sample: int = SAMPLE
    splits: int = SPLITS
    blocks: int = BLOCKS

    def settings(self, network: FeatureNetwork, kernel_subset: int) -> dict[str, object]:
        """Return what the manifest holds besides its fields."""
        return {
            "network_resize": {"side": network.side, "filter": network.filter},
            "sample": self.sample,
            "kernel_subsets": KERNEL_SUBSETS,
            "kernel_subset_size": kernel_subset,
            "neighbours": NEIGHBOURS,
            "splits": self.splits,
        }


class ImageStatistics:
    """Features of a set, summed up; of a bounded number of images they are kept.

    Args:
        dimensions: Dimensions of a feature.
        classes: Number of classes; 0 for none.
        protocol: The protocol.
    """

    def __init__(self, dimensions: int, classes: int, protocol: ImageProtocol) -> None:
        self.blocks = BlockMoments(dimensions, protocol.blocks)
        self.sample = FeatureSample(protocol.sample, protocol.seed)
        self.classes = ClassSums(classes, protocol.splits) if classes else None
        self._moments: FeatureMoments | None = None

    def add(self, features_ND: np.ndarray, probabilities_NC: np.ndarray | None) -> None:
        """Add features and class probabilities of images in the order of their set."""
        start = self.blocks.count
        self.blocks.add(features_ND)
        self._moments = None
        self.sample.add(start, features_ND)
        if self.classes is not None and probabilities_NC is not None:
            self.classes.add(start, probabilities_NC)

    @property
    def moments(self) -> FeatureMoments:
        """Moments of all features."""
        if self._moments is None:
            self._moments = self.blocks.without()
        return self._moments


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredSet:
    """A set whose images have been measured.

    Attributes:
        statistics: Statistics of the images that could be read.
        record: Their number and hash.
        problems: Why others could not be read.
    """

    statistics: ImageStatistics
    record: SetRecord
    problems: tuple[str, ...]


def measure_set(
    images: ImageSet,
    network: FeatureNetwork,
    protocol: ImageProtocol,
    *,
    is_reference: bool,
    workers: int = 0,
    on_image: Callable[[], object] = lambda: None,
) -> MeasuredSet:
    """Read a set and sum up its features.

    Args:
        images: The set.
        network: The feature network.
        protocol: The protocol.
        is_reference: Whether a blur of the reference alone applies.
        workers: Processes that read images ahead; the statistics are the same with any number.
        on_image: Called after each image.

    Raises:
        InputError: Fewer than two images can be read, all are equal, or features are not finite.
    """
    blur = protocol.blur if protocol.blur and (is_reference or protocol.blur.which == "both") else None
    sigmas = (blur.sigma if blur else 0.0,)
    return measure_blurs(images, network, protocol, sigmas, workers=workers, on_image=on_image)[0]


def measure_blurs(
    images: ImageSet,
    network: FeatureNetwork,
    protocol: ImageProtocol,
    sigmas: Sequence[float],
    *,
    workers: int = 0,
    on_image: Callable[[], object] = lambda: None,
) -> list[MeasuredSet]:
    """Read each image of a set once, and sum up its features at several blurs.

    Args:
        images: The set.
        network: The feature network.
        protocol: The protocol, whose blur is not used.
        sigmas: Standard deviations of the blur in pixels; 0 for none.
        workers: Processes that read images ahead; the statistics are the same with any number.
        on_image: Called after each image.

    Returns:
        The set at each blur.

    Raises:
        InputError: Fewer than two images can be read, all are equal, or features are not finite.
    """
    found = [ImageStatistics(network.record.dimensions, network.classes, protocol) for _ in sigmas]
    hashes: list[str] = []
    problems: list[str] = []
    for batch in read_batches(images, protocol.resize, hashes, problems, workers=workers, on_image=on_image):
        for statistics, sigma in zip(found, sigmas, strict=True):
            statistics.add(*finite_features(network, gaussian_blur(batch, sigma)))
    if not hashes:
        raise InputError(f"none of the pictures of {images.path} can be used; the first: {problems[0]}")
    if len(hashes) < 2:
        raise InputError(f"{images.path} has a single picture; distances of sets need at least two, and mean thousands")
    if len(set(hashes)) == 1 or not all(np.trace(each.moments.scatter) > 0 for each in found):
        raise InputError(f"all pictures of {images.path} are the same, which leaves no distribution to compare")
    record = hash_set(images.name, hashes)
    return [MeasuredSet(statistics=each, record=record, problems=tuple(problems)) for each in found]


def read_batches(
    images: ImageSet,
    resize: SquareResize,
    hashes: list[str],
    problems: list[str],
    *,
    size: int = BATCH,
    workers: int = 0,
    on_image: Callable[[], object] = lambda: None,
) -> Iterator[np.ndarray]:
    """Yield resized images in batches.

    Args:
        images: The set.
        resize: How images become squares.
        hashes: Receives the hash of each image.
        problems: Receives the reason for each image that cannot be read.
        size: Maximum number of images in a batch.
        workers: Processes that read images ahead.
        on_image: Called after each image.

    Yields:
        uint8 (at most ``size``, H, H, 3).
    """
    batch: list[np.ndarray] = []
    for image in images.read(resize, workers):
        on_image()
        if image.pixels is None:
            problems.append(image.problem)
            continue
        hashes.append(image.sha256)
        batch.append(image.pixels)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Blur images by a Gaussian kernel that ends at 4 sigma; edges are mirrored, and values rounded.

    Args:
        pixels: uint8 (N, H, W, 3).
        sigma: Standard deviation in pixels; 0 leaves the images as they are.
    """
    if not sigma:
        return pixels
    reach = math.ceil(_BLUR_REACH * sigma)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).float()
    images = torch.from_numpy(pixels.astype(np.float32)).movedim(3, 1)
    for axis, shape in ((2, (1, 1, -1, 1)), (3, (1, 1, 1, -1))):
        indices = _mirrored(images.shape[axis], reach)
        padded = images.index_select(axis, indices).flatten(0, 1)[:, None]
        images = F.conv2d(padded, kernel.view(shape)).reshape(images.shape)
    return images.round().clamp(0, 255).byte().movedim(1, 3).contiguous().numpy()


def _mirrored(length: int, reach: int) -> torch.Tensor:
    """Return indices from -reach to length + reach, mirrored at the edges, which are repeated: (length + 2 reach,)."""
    indices = torch.arange(-reach, length + reach) % (2 * length)
    return torch.where(indices < length, indices, 2 * length - 1 - indices)


def kernel_subset_size(candidate: MeasuredSet, reference: MeasuredSet, sample: int) -> int:
    """Return the number of images of a subset for KID: 1,000, or half of the smaller set if that is fewer."""
    smaller = min(candidate.record.count, reference.record.count, sample)
    return max(2, min(KERNEL_SUBSET_SIZE, smaller // 2))


def rank_deficiency_note(candidate: MeasuredSet, reference: MeasuredSet) -> str | None:
    """Return what a user must know of a Fréchet distance of sets with too few pictures; None with enough.

    Args:
        candidate: The first set.
        reference: The other set.
    """
    a, b = candidate.statistics.moments, reference.statistics.moments
    if not a.is_rank_deficient and not b.is_rank_deficient:
        return None
    return (
        f"rank-deficient: the covariance of {len(a.mean)} dimensions needs more pictures than that, and the Fréchet "
        f"distance is too large with fewer; quote KID. Pictures of the smaller set: {min(a.count, b.count)}"
    )


def distribution_results(
    candidate: MeasuredSet, reference: MeasuredSet, protocol: ImageProtocol, notes: list[str]
) -> dict[str, ResultValue]:
    """Return all distances of two sets, and the Inception Score of the candidate.

    Args:
        candidate: Generated images.
        reference: True images.
        protocol: The protocol.
        notes: Receives a line about each value that says less than usual.
    """
    a, b = candidate.statistics, reference.statistics
    results = {"fid": frechet_result(candidate, reference)}
    if (note := rank_deficiency_note(candidate, reference)) is not None:
        notes.append(note)
    features, references = a.sample.features, b.sample.features
    size = kernel_subset_size(candidate, reference, protocol.sample)
    kernel = kernel_distances(features, references, size=size, seed=protocol.seed)
    results["kid"] = _with_spread(kernel, min(len(features), len(references)), higher_is_better=False)
    if (kept := min(len(features), len(references))) > NEIGHBOURS:
        results |= _precision_results(features, references, kept)
    else:
        notes.append(f"precision and recall are left out: they need more pictures in each set than {NEIGHBOURS}")
    if a.classes is None:
        notes.append("the Inception Score is left out: the network has no classes")
    else:
        scores = a.classes.scores()
        results["inception_score"] = _with_spread(scores, candidate.record.count, higher_is_better=True)
    return results


def frechet_result(candidate: MeasuredSet, reference: MeasuredSet) -> ResultValue:
    """Return the Fréchet distance of two sets, with an interval by a jackknife that leaves out a block of both sets.

    Args:
        candidate: Generated images.
        reference: True images.

    Returns:
        The distance; its interval is left out if a covariance is singular by the number of images.
    """
    a, b = candidate.statistics, reference.statistics
    interval = {"value": frechet_distance(a.moments, b.moments)}
    dimensions = len(a.moments.mean)
    if a.blocks.blocks == BLOCKS and all(each.blocks.smallest_fold > dimensions for each in (a, b)):
        pairs = ((a.blocks.without(block), b.blocks.without(block)) for block in range(BLOCKS))
        folds = np.array([frechet_distance(*pair) for pair in pairs])
        interval = jackknife(interval["value"], folds, lowest=0.0)
    count = min(candidate.record.count, reference.record.count)
    return ResultValue(**interval, n=count, unit="", higher_is_better=False)


def _precision_results(features_ND: np.ndarray, references_ND: np.ndarray, count: int) -> dict[str, ResultValue]:
    """Return precision and recall, with intervals by a jackknife if blocks leave enough images."""
    blocks = BLOCKS if count >= 2 * BLOCKS else 0
    found = precision_recall_folds(features_ND, references_ND, blocks=blocks)
    results = {}
    for name, (value, *folds) in zip(("precision", "recall"), found.T, strict=True):
        interval = {"value": float(value)}
        if folds:
            interval = jackknife(float(value), np.array(folds), lowest=0.0, highest=1.0)
        results[name] = ResultValue(**interval, n=count, unit="fraction", higher_is_better=True)
    return results


def _with_spread(values_S: np.ndarray, count: int, *, higher_is_better: bool) -> ResultValue:
    """Return the mean of values of subsets, with their percentiles 2.5 and 97.5; none of a single subset."""
    low, high = (float(each) for each in np.percentile(values_S, [2.5, 97.5])) if len(values_S) > 1 else (None, None)
    return ResultValue(value=float(values_S.mean()), low=low, high=high, n=count, higher_is_better=higher_is_better)
