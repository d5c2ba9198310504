"""Generate and grade images of captions, and describe how a report was made.

An application implements :class:`Grader` for its images; ``cogview.emoji.grader`` is an implementation.
"""

# H, W image in pixels
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from cogview import __version__
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest

TUNING_SEED = 1_000_003  # of the captions on which sampling settings are chosen

Reference = TypeVar("Reference")
Reference_contra = TypeVar("Reference_contra", contravariant=True)


class Grade(Protocol):
    """Verdict on one image."""

    @property
    def everything(self) -> bool:
        """Whether nothing that the caption asks for is wrong."""
        ...


GradeType = TypeVar("GradeType", bound=Grade)
Grade_co = TypeVar("Grade_co", bound=Grade, covariant=True)


class Grader(Protocol[Reference_contra, Grade_co]):
    """Judge of generated images; a reference describes the content that a caption asks for."""

    def grade(self, image: np.ndarray, reference: Reference_contra, /) -> Grade_co:
        """Return the grade of a uint8 RGB (H, W, 3) image.

        Args:
            image: The image.
            reference: What the image should show.
        """
        ...


def generate_images(
    model: CogView, captions: Sequence[str], seed: int, sampling: Sampling, batch_size: int, label: str
) -> list[np.ndarray]:
    """Generate one image of each caption.

    Args:
        model: The model.
        captions: Prompts.
        seed: Caption i has the seed ``seed`` + i, so that no two images share noise.
        sampling: Sampling settings.
        batch_size: Captions in a batch; the images do not depend on it.
        label: Label of the progress bar.

    Returns:
        Images, uint8 RGB (H, W, 3).
    """
    images = []
    with tqdm(total=len(captions), unit="image", desc=label, disable=None) as bar:
        for first in range(0, len(captions), batch_size):
            chunk = [
                GenerationRequest(prompt=caption, seed=seed + number, sampling=sampling)
                for number, caption in enumerate(captions[first : first + batch_size], start=first)
            ]
            images += [np.asarray(image) for image in model.run(chunk)]
            bar.update(len(chunk))
    return images


def grade_images(
    grader: Grader[Reference, GradeType], images: Sequence[np.ndarray], references: Sequence[Reference], label: str
) -> list[GradeType]:
    """Return the grade of each image.

    Args:
        grader: The grader.
        images: Images, uint8 RGB (H, W, 3).
        references: The reference of each image.
        label: Label of the progress bar.
    """
    pairs = zip(images, references, strict=True)
    return [grader.grade(*pair) for pair in tqdm(pairs, total=len(images), desc=label, disable=None)]


def choose_sampling(
    model: CogView,
    captions: Sequence[str],
    settings: Sequence[Sampling],
    summarize: Callable[[list[np.ndarray]], dict[str, Any]],
    *,
    batch_size: int,
) -> list[tuple[Sampling, dict[str, Any]]]:
    """Generate images with each of several settings and order the settings by the grades.

    The best setting is the one with the lowest temperature, then the smallest top-k, of those whose accuracy is in the
    95% interval of the highest accuracy. The captions cannot distinguish these, and less noise gives cleaner images.
    The other settings follow by accuracy.

    Args:
        model: The model.
        captions: Prompts that no report is measured on.
        settings: The sampling settings to try.
        summarize: Grade the images of all captions; the summary has the accuracy ``everything``.
        batch_size: Captions in a batch.

    Returns:
        Each of ``settings`` with its summary, best first.
    """
    results = []
    for sampling in settings:
        label = f"T {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}"
        results.append(
            (sampling, summarize(generate_images(model, captions, TUNING_SEED, sampling, batch_size, label)))
        )
    results.sort(key=lambda result: -result[1]["everything"]["accuracy"])
    threshold = results[0][1]["everything"]["low"]
    best = min(
        (result for result in results if result[1]["everything"]["accuracy"] >= threshold),
        key=lambda result: (result[0].temperature, result[0].top_k),
    )
    return [best, *(result for result in results if result is not best)]


def describe_protocol(
    model: CogView, captions: Sequence[str], seed: int, *, data: Mapping[str, object], **settings: object
) -> dict[str, Any]:
    """Return how a report was made, as plain data for its key ``protocol``.

    Args:
        model: The evaluated model.
        captions: All captions; equal captions have one SHA-256 on every machine.
        seed: Seed of captions and images.
        data: Description of the data that the captions come from.
        settings: Further settings of the measurement.
    """
    return {
        "captions": len(captions),
        "captions_sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
        "seed": seed,
        **data,
        "model": model.name,
        **settings,
        "cogview": __version__,
    }
