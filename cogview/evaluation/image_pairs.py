"""Measures of image pairs: PSNR, SSIM and MS-SSIM."""

# N pairs, H W pixels
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from PIL import Image

from cogview.errors import InputError
from cogview.evaluation.image_sets import ImageSet, match_keys
from cogview.evaluation.manifest import ResultItems, ResultValue, SetRecord, hash_set
from cogview.evaluation.metrics import RESAMPLES, WINDOW, multi_scale_ssim, smallest_multi_scale_side, ssim
from cogview.vqvae.codec import psnr

PairMeasure: TypeAlias = Callable[[np.ndarray, np.ndarray], float]  # two uint8 images (H, W, 3)


def as_pixels(image: Image.Image) -> np.ndarray:
    """Return an RGB image as uint8 (H, W, 3), in its size."""
    return np.array(image)


@dataclass(frozen=True, kw_only=True, eq=False)
class PairReport:
    """Measures of pairs.

    Attributes:
        candidate: Number and hash of the candidate's images.
        reference: Number and hash of the reference images.
        keys: Key of each pair that was measured.
        values: Values of the pairs by measure.
        problems: Why other pairs could not be measured.
    """

    candidate: SetRecord
    reference: SetRecord
    keys: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def results(self) -> dict[str, ResultValue]:
        """Return the mean of each measure with its 95% bootstrap interval over pairs; none of a single pair."""
        results = {}
        for name, values in self.values.items():
            low, high = mean_interval(np.array(values)) if len(values) > 1 else (None, None)
            results[name] = ResultValue(
                value=float(np.mean(values)),
                low=low,
                high=high,
                n=len(values),
                unit="dB" if name == "psnr" else "",
                higher_is_better=name != "lpips",
            )
        return results

    def items(self) -> ResultItems:
        """Return the values of single pairs."""
        return ResultItems(ids=self.keys, values={name: list(values) for name, values in self.values.items()})


def mean_interval(values_N: np.ndarray) -> tuple[float, float]:
    """Return the 95% percentile interval of a mean by the bootstrap, in memory of one resample."""
    random = np.random.default_rng(0)
    means = [values_N[random.integers(len(values_N), size=len(values_N))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def measure_pairs(
    candidate: ImageSet,
    reference: ImageSet,
    prepare: Callable[[Image.Image], np.ndarray],
    *,
    more: dict[str, PairMeasure] | None = None,
    workers: int = 0,
    notes: list[str],
    on_pair: Callable[[], object] = lambda: None,
) -> PairReport:
    """Measure each image against the reference of the same key.

    Args:
        candidate: Images to measure.
        reference: True images.
        prepare: Turns images into pixels: ``as_pixels``, or a resize.
        more: Further measures by name.
        workers: Processes that read images ahead, for each set.
        notes: Receives a line about a measure that is left out.
        on_pair: Called after each pair.

    Raises:
        InputError: The keys differ, two images of a pair have different sizes, or no pair can be read.
    """
    match_keys(candidate, reference)
    measures: dict[str, PairMeasure] = {
        "psnr": psnr, "ssim": ssim, "ms_ssim": multi_scale_ssim, **(more or {})
    }  # fmt: skip
    values: dict[str, list[float]] = {name: [] for name in measures}
    keys: list[str] = []
    hashes: tuple[list[str], list[str]] = ([], [])
    problems: list[str] = []
    sides = []
    for pair in zip(candidate.read(prepare, workers), reference.read(prepare, workers), strict=True):
        on_pair()
        a, b = (each.pixels for each in pair)
        if a is None or b is None:
            problems += [each.problem for each in pair if each.problem]
            continue
        _check_pair(pair[0].key, a, b)
        sides.append(min(a.shape[:2]))
        for name in [name for name in values if name != "ms_ssim" or sides[-1] >= smallest_multi_scale_side()]:
            values[name].append(measures[name](a, b))
        keys.append(pair[0].key)
        for found, each in zip(hashes, pair, strict=True):
            found.append(each.sha256)
    if not keys:
        raise InputError(f"no pair can be used; the first problem: {problems[0]}")
    if min(sides) < smallest_multi_scale_side():
        del values["ms_ssim"]
        notes.append(
            f"MS-SSIM is left out: it needs sides of {smallest_multi_scale_side()} pixels, the smallest is {min(sides)}"
        )
    return PairReport(
        candidate=hash_set(candidate.name, hashes[0]),
        reference=hash_set(reference.name, hashes[1]),
        keys=keys,
        values=values,
        problems=tuple(problems),
    )


def _check_pair(key: str, a: np.ndarray, b: np.ndarray) -> None:
    """Raise InputError unless two images have one size, in which SSIM has a window."""
    if a.shape != b.shape:
        sizes = " and ".join(f"{each.shape[1]} x {each.shape[0]}" for each in (a, b))
        raise InputError(f"the pictures of a pair have different sizes, {sizes}; resize both with --side: {key}")
    if min(a.shape[:2]) < WINDOW:
        raise InputError(
            f"SSIM needs sides of at least {WINDOW} pixels, got {a.shape[1]} x {a.shape[0]}; enlarge both with "
            f"--side: {key}"
        )
