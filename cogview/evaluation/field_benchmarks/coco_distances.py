"""The blurred FID-k of CogView (arXiv:2105.13290, table 1): k = 0, 1, 2, 4 and 8.

A picture of an image tokenizer lacks fine detail, for which FID punishes it; CogView and DALL-E therefore also compare
blurred pictures. FID-k is the Fréchet distance after a Gaussian blur of standard deviation k pixels. CogView blurs both
sets ("both"); a blur of the reference alone measures something else, and the manifest says which.
"""

from __future__ import annotations

from collections.abc import Callable

from cogview.errors import InputError
from cogview.evaluation.distribution import frechet_distance
from cogview.evaluation.features import FeatureNetwork
from cogview.evaluation.image_sets import ImageSet
from cogview.evaluation.image_statistics import ImageProtocol, MeasuredSet, SquareResize, measure_set
from cogview.evaluation.manifest import BlurRecord, ResultCurve, ResultValue

SIGMAS = (0, 1, 2, 4, 8)  # pixels
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
        on_image: Called after each picture of each pass.

    Raises:
        InputError: A picture cannot be read.
    """
    results: dict[str, ResultValue] = {}
    sets: dict[tuple[bool, int], MeasuredSet] = {}
    for sigma in SIGMAS:
        blur = BlurRecord(sigma=float(sigma), which=which) if sigma else None
        protocol = ImageProtocol(resize=resize, blur=blur, sample=2)  # of features that are not used here
        pair = []
        for images, is_reference in ((candidate, False), (reference, True)):
            key = (is_reference, sigma if is_reference or which == "both" else 0)
            if key not in sets:
                sets[key] = measure_set(images, network, protocol, is_reference=is_reference, on_image=on_image)
                if sets[key].problems:
                    raise InputError(
                        f"{images.path}: a picture of the benchmark cannot be used: {sets[key].problems[0]}"
                    )
            pair.append(sets[key])
        value = frechet_distance(pair[0].statistics.moments, pair[1].statistics.moments)
        count = min(each.record.count for each in pair)
        results[f"fid_{sigma}"] = ResultValue(value=value, n=count, unit="", higher_is_better=False)
    return results, (sets[False, 0], sets[True, 0])


def blur_curve(results: dict[str, ResultValue]) -> ResultCurve:
    """Return the distances over the blur."""
    return ResultCurve(
        x=[float(sigma) for sigma in SIGMAS],
        y=[results[f"fid_{sigma}"].value for sigma in SIGMAS],
        x_label="sigma of the blur (pixels)",
        y_label="Fréchet distance",
    )
