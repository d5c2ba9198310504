"""The blurred FID-k of CogView (arXiv:2105.13290, table 1): k = 0, 1, 2, 4 and 8.

A picture of an image tokenizer lacks fine detail, for which FID punishes it; CogView and DALL-E therefore also compare
blurred pictures. FID-k is the Fréchet distance after a Gaussian blur of standard deviation k pixels. CogView blurs both
sets ("both"); a blur of the reference alone measures something else, and the manifest says which.
"""

from __future__ import annotations

from collections.abc import Callable

from cogview.errors import InputError
from cogview.evaluation.features import FeatureNetwork
from cogview.evaluation.image_sets import ImageSet
from cogview.evaluation.image_statistics import (
    ImageProtocol,
    MeasuredSet,
    SquareResize,
    frechet_result,
    measure_blurs,
)
from cogview.evaluation.manifest import ResultCurve, ResultValue

SIGMAS = (0, 1, 2, 4, 8)  # pixels; the first is that of pictures as they are
SIDE = 256  # pixels of the pictures when they are blurred


def blurred_distances(
    candidate: ImageSet,
    reference: ImageSet,
    network: FeatureNetwork,
    resize: SquareResize,
    which: str,
    on_image: Callable[[], object] = lambda: None,
) -> tuple[dict[str, ResultValue], tuple[MeasuredSet, MeasuredSet]]:
    """Return the Fréchet distance of two sets at each blur, ``fid_0`` to ``fid_8``, and the sets without blur.

    Args:
        candidate: Generated pictures.
        reference: True pictures.
        network: The feature network.
        resize: Resizing before the blur.
        which: ``both``, or ``reference`` for a blur of the true pictures alone.
        on_image: Called after each picture, which is read once.

    Raises:
        InputError: A picture cannot be read.
    """
    # Features of single pictures are not used, and moments of blocks would take ten times the memory at each blur.
    protocol = ImageProtocol(resize=resize, sample=2, blocks=1)
    measured = []
    for images, sigmas in ((candidate, SIGMAS if which == "both" else SIGMAS[:1]), (reference, SIGMAS)):
        measured.append(measure_blurs(images, network, protocol, sigmas, on_image=on_image))
        if problems := measured[-1][0].problems:
            raise InputError(f"{images.path}: a picture of the benchmark cannot be used: {problems[0]}")
    candidates, references = measured
    if which != "both":
        candidates = candidates * len(SIGMAS)
    results = {
        f"fid_{sigma}": frechet_result(*pair)
        for sigma, pair in zip(SIGMAS, zip(candidates, references, strict=True), strict=True)
    }
    return results, (candidates[0], references[0])


def blur_curve(results: dict[str, ResultValue]) -> ResultCurve:
    """Return the distances over the blur."""
    return ResultCurve(
        x=[float(sigma) for sigma in SIGMAS],
        y=[results[f"fid_{sigma}"].value for sigma in SIGMAS],
        x_label="sigma of the blur (pixels)",
        y_label="Fréchet distance",
    )
