"""Metrics of images by hand and by the papers, intervals of published tables, and reranking of planted scores."""

# H, W image in pixels, C captions, N images of each

import math

import numpy as np
import pytest
import torch

from cogview.evaluation.metrics import (
    accuracy,
    best_of,
    bootstrap,
    format_accuracy,
    jackknife,
    multi_scale_ssim,
    pixel_distances,
    reconstruction_quality,
    smallest_multi_scale_side,
    ssim,
    wilson_interval,
)
from cogview.vqvae.codec import psnr


def off_by(images: np.ndarray, error: int | np.ndarray) -> np.ndarray:
    """Every byte further from its nearer end of the range by ``error``, so that none is clipped."""
    return np.where(images > 127, images - error, images + error).astype(np.uint8)


def test_pixel_distances_equal_the_definition_exactly():
    """Sums of float32 squares are rounded from 2**24 on, which a picture of 16 x 16 pixels reaches."""
    rng = np.random.default_rng(0)
    images, pictures = (rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8) for count in (3, 300))
    expected = np.square(images[:, None].astype(np.int64) - pictures).sum(axis=(2, 3, 4))
    found = pixel_distances(images, pictures)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)
    assert pixel_distances(pictures[7:8], pictures)[0].argmin() == 7


def test_reconstruction_quality_has_quantiles_of_planted_errors():
    """Of 101 errors from 1 to 101 levels, one in a hundred is above 100: 99% of the images have at least its PSNR."""
    images = np.full((101, 8, 8, 3), 20, dtype=np.uint8)
    restored = images + np.arange(1, 102, dtype=np.uint8)[:, None, None, None]
    found = reconstruction_quality(list(images), list(restored))
    expected = [round(20 * math.log10(255 / error), 2) for error in (100, 96, 51)]
    assert [found.p01, found.p05, found.median] == expected


def test_ssim_of_known_images():
    rng = np.random.default_rng(0)
    image, other = rng.integers(0, 256, (2, 24, 30, 3), dtype=np.uint8)
    assert ssim(image, image) == pytest.approx(1, abs=1e-12)
    assert ssim(image, other) == pytest.approx(ssim(other, image), abs=1e-12)
    assert ssim(image, 255 - image) < 0  # the opposite structure
    assert abs(ssim(image, other)) < 0.2
    # Without structure only the luminance is left, (2ab + c) / (a² + b² + c) with c = (0.01 · 255)².
    dark, light = np.full((12, 12, 3), 40, dtype=np.uint8), np.full((12, 12, 3), 100, dtype=np.uint8)
    assert ssim(dark, light) == pytest.approx((2 * 40 * 100 + 2.55**2) / (40**2 + 100**2 + 2.55**2), abs=1e-9)


def test_ssim_equals_the_papers_formula_window_by_window():
    rng = np.random.default_rng(1)
    a = rng.integers(0, 256, (14, 13, 2), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    weights = np.array([[math.exp(-(x * x + y * y) / (2 * 1.5**2)) for x in range(-5, 6)] for y in range(-5, 6)])
    weights /= weights.sum()
    values = []
    for channel in range(2):
        for top in range(14 - 10):
            for left in range(13 - 10):
                x, y = (p[top : top + 11, left : left + 11, channel].astype(float) for p in (a, b))
                mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
                covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
                numerator = (2 * mean_x * mean_y + 2.55**2) * (2 * covariance + 7.65**2)
                values.append(numerator / (mean_x**2 + mean_y**2 + 2.55**2) / (variance_x + variance_y + 7.65**2))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-9)
    assert 0.2 < ssim(a, b) < 0.98


def test_psnr_of_a_constant_error_of_a_tenth_is_20_db():
    image = np.full((8, 8, 3), 100.0)
    assert psnr(image, image + 25.5) == pytest.approx(20.0, abs=1e-9)


def noisy_pair(size):
    random = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(random.normal(size=(*size, 3)), axis=0), axis=1)
    image = (127 + 100 * smooth / abs(smooth).max()).astype(np.uint8)
    return image, (image * 0.8 + random.integers(0, 40, image.shape)).astype(np.uint8)


def test_multi_scale_ssim_of_equal_and_of_other_images():
    image, other = noisy_pair((180, 177))
    assert multi_scale_ssim(image, image) == pytest.approx(1.0, abs=1e-12)
    assert multi_scale_ssim(image, 255 - image) == 0.0  # opposite structure: the mean is negative
    assert 0 < multi_scale_ssim(image, other) < 1
    assert smallest_multi_scale_side() == 176


def test_ssim_and_multi_scale_ssim_equal_those_of_torchmetrics():
    """Its means include windows that reach over the edge, which are cut here; the published SSIM has none."""
    measure = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    image, other = noisy_pair((192, 176))
    pair = [torch.from_numpy(each).movedim(2, 0)[None].double() for each in (image, other)]
    expected = measure(*pair, data_range=255.0, return_full_image=True)[1][..., 5:-5, 5:-5].mean()
    assert ssim(image, other) == pytest.approx(float(expected), rel=1e-6)
    product = 1.0
    for weight in (0.0448, 0.2856, 0.3001, 0.2363):
        product *= float(measure(*pair, data_range=255.0, return_contrast_sensitivity=True)[1]) ** weight
        pair = [torch.nn.functional.avg_pool2d(each, 2) for each in pair]
    last = measure(*pair, data_range=255.0, return_full_image=True)[1][..., 5:-5, 5:-5].mean()
    assert multi_scale_ssim(image, other) == pytest.approx(product * float(last) ** 0.1333, rel=1e-6)


def test_wilson_interval_equals_published_values():
    # Newcombe (1998), Statistics in Medicine 17: 857-872, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def test_best_of_planted_grades_and_scores():
    right_CN = np.array(
        [
            [False, True, False, True],  # the best by score is right from the second image on
            [False, False, True, False],  # there is a right one among four, and the score misses it
            [True, False, False, False],  # the score prefers a wrong one from the second image on
            [False, False, False, False],  # nothing to find
            [False, True, True, False],  # equal scores: the first of them, which is wrong
        ]
    )
    scores_CN = np.array(
        [
            [-9.0, -2.0, -8.0, -3.0],
            [-5.0, -6.0, -7.0, -4.0],
            [-3.0, -1.0, -2.0, -4.0],
            [-1.0, -2.0, -3.0, -4.0],
            [-2.0, -2.0, -2.0, -2.0],
        ]
    )
    one, two, four = best_of(right_CN, scores_CN, (1, 2, 4))
    assert [row["of"] for row in (one, two, four)] == [1, 2, 4]
    assert [row["average"] for row in (one, two, four)] == [1 / 5, 3 / 10, 6 / 20]
    assert [row["best_by_score"]["right"] for row in (one, two, four)] == [1, 1, 1]
    assert [row["best_possible"]["right"] for row in (one, two, four)] == [1, 3, 4]
    assert [row["best_by_score"]["of"] for row in (one, two, four)] == [5, 5, 5]
    assert one["gap_closed"] is None  # one image leaves nothing to choose
    assert two["gap_closed"] == pytest.approx((0.2 - 0.3) / (0.6 - 0.3))  # worse than chance
    assert four["gap_closed"] == pytest.approx((0.2 - 0.3) / (0.8 - 0.3))
    low, high = wilson_interval(4, 5)
    assert four["best_possible"] == {"right": 4, "of": 5, "accuracy": 0.8, "low": low, "high": high}


def test_best_of_gap_is_closed_by_a_perfect_score_and_not_by_a_random_one():
    right_CN = np.random.default_rng(0).random((400, 8)) < 0.4
    knowing = best_of(right_CN, right_CN.astype(float), (2, 8))
    assert [row["gap_closed"] for row in knowing] == [pytest.approx(1)] * 2
    assert all(row["best_by_score"] == row["best_possible"] for row in knowing)
    (blind,) = best_of(right_CN, np.random.default_rng(1).random((400, 8)), (8,))
    assert abs(blind["gap_closed"]) < 0.1
    (sure,) = best_of(np.ones((3, 4), dtype=bool), np.zeros((3, 4)), (4,))
    assert sure["gap_closed"] is None
    assert sure["best_by_score"]["accuracy"] == sure["average"] == 1


@pytest.mark.parametrize(("scores", "sizes"), [((3, 3), (1,)), ((3, 4), (8,)), ((3, 4), (0, 2))])
def test_best_of_refuses_shapes_that_differ_and_sizes_out_of_range(scores, sizes):
    with pytest.raises(ValueError, match=r"needs grades and scores of one shape .* got \(3, 4\) and"):
        best_of(np.ones((3, 4), dtype=bool), np.zeros(scores), sizes)


def test_accuracy_is_none_when_nothing_was_asked():
    assert accuracy(0, 0) == {"right": 0, "of": 0, "accuracy": None, "low": None, "high": None}
    assert format_accuracy(accuracy(0, 0)) == "–"
    low, high = wilson_interval(9, 10)
    assert accuracy(9, 10) == {"right": 9, "of": 10, "accuracy": 0.9, "low": low, "high": high}
    assert format_accuracy(accuracy(9, 10)) == "90.0% (59.6%–98.2%)"


def test_bootstrap_interval_covers_the_mean_as_the_normal_one_does():
    values = np.random.default_rng(5).normal(3, 2, size=400)
    found = bootstrap(lambda rows: values[rows].mean(axis=-1), 400)
    assert found["value"] == pytest.approx(values.mean())
    error = values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert bootstrap(lambda rows: values[rows].mean(axis=-1), 400) == found


def test_jackknife_of_a_mean_is_its_standard_error():
    """For a mean over blocks of one item, the folds have the deviations of the items, divided by 9."""
    items = np.arange(10.0)
    folds = (items.sum() - items) / 9
    found = jackknife(4.5, folds, lowest=0.0)
    half = 2.262157 * items.std(ddof=1) / np.sqrt(10)
    assert found == pytest.approx({"value": 4.5, "low": 4.5 - half, "high": 4.5 + half})
    assert jackknife(0.1, folds, lowest=0.0, highest=1.0) == {"value": 0.1, "low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match="a jackknife needs 10 folds, got 9"):
        jackknife(0.0, folds[1:], lowest=0.0)
