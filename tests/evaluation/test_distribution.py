"""Distances of feature sets: known answers, equality with torchmetrics, and streaming."""

import tracemalloc

import numpy as np
import pytest
import torch

from cogview.errors import InputError
from cogview.evaluation.distribution import (
    BlockMoments,
    ClassSums,
    FeatureMoments,
    FeatureSample,
    frechet_distance,
    kernel_distances,
    precision_recall,
    precision_recall_folds,
)
from cogview.evaluation.metrics import BLOCKS, jackknife


def moments_of(features, batch=None):
    moments = FeatureMoments(features.shape[1])
    for start in range(0, len(features), batch or len(features)):
        moments.add(features[start : start + (batch or len(features))])
    return moments


def exact_moments(mean, covariance):
    """Moments with a given mean and covariance, of 1,000 features."""
    moments = FeatureMoments(len(mean))
    moments.count, moments.mean, moments.scatter = 1000, np.array(mean, float), np.array(covariance, float) * 999
    return moments


def random_features(count, dimensions=6, seed=0, shift=0.0):
    random = np.random.default_rng(seed)
    return (random.normal(size=(count, dimensions)) @ random.normal(size=(dimensions, dimensions)) + shift).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("mean", "covariance", "expected"),
    [((1, 2, 0, 0), np.eye(4), 5.0), ((0, 0, 0, 0), 4 * np.eye(4), 4.0), ((0, 0, 0, 0), np.eye(4), 0.0)],
)
def test_frechet_distance_of_known_gaussians(mean, covariance, expected):
    found = frechet_distance(exact_moments((0, 0, 0, 0), np.eye(4)), exact_moments(mean, covariance))
    assert found == pytest.approx(expected, abs=1e-12)


def test_frechet_distance_of_shifted_corners():
    corners = np.array([(a, b) for a in (0, 2) for b in (0, 2)], dtype=np.float32)
    assert frechet_distance(moments_of(corners), moments_of(corners + 3)) == pytest.approx(18.0, abs=1e-12)


def test_frechet_distance_of_singular_covariances_is_exact():
    """Features on a line: an iterative matrix root fails or needs a correction of the diagonal."""
    line = np.arange(5, dtype=np.float32)[:, None] * np.ones((1, 8), np.float32)
    one, other = moments_of(line), moments_of(2 * line)
    assert one.is_rank_deficient
    # One dimension of length sqrt(8) t: means 2 and 4, deviations sqrt(2.5) and 2 sqrt(2.5) of t.
    assert frechet_distance(one, other) == pytest.approx(8 * (4 + 2.5), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_streamed_moments_equal_those_of_the_whole(batch):
    features = random_features(200, shift=1000.0)
    moments = moments_of(features, batch)
    np.testing.assert_allclose(moments.mean, features.astype(np.float64).mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(moments.covariance, np.cov(features.T.astype(np.float64)), rtol=1e-9, atol=1e-9)


def test_moments_of_two_processes_equal_those_of_one():
    features, other = random_features(101), random_features(90, seed=1)
    merged = moments_of(features[0::2], 8)
    merged.merge(moments_of(features[1::2], 8))
    merged.merge(FeatureMoments(6))  # a process without images
    assert merged.count == 101
    expected = frechet_distance(moments_of(features), moments_of(other))
    assert frechet_distance(merged, moments_of(other)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_block_moments_leave_out_each_tenth_image(batch):
    features = random_features(300)
    blocks = BlockMoments(6)
    for start in range(0, 300, batch):
        blocks.add(features[start : start + batch])
    assert (blocks.count, blocks.smallest_fold) == (300, 270)
    numbers = np.arange(300) % BLOCKS
    for block in (None, 0, 7):
        expected, found = moments_of(features[numbers != block]), blocks.without(block)
        assert found.count == expected.count
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-12)


def distances_and_intervals(repeats, count, dimensions=4):
    """Distances of random sets of one distribution each, with the half-widths of their intervals."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(repeats):
        sets = random.normal(size=(count, dimensions)), 1.2 * random.normal(size=(count, dimensions)) + 0.5
        blocks = [BlockMoments(dimensions) for _ in sets]
        for each, features in zip(blocks, sets, strict=True):
            each.add(features.astype(np.float32))
        value = frechet_distance(*(each.without() for each in blocks))
        folds = [frechet_distance(*(each.without(block) for each in blocks)) for block in range(BLOCKS)]
        found.append((value, jackknife(value, np.array(folds), lowest=0.0)["high"] - value))
    return np.array(found).T


def test_jackknife_of_frechet_distances_covers_their_mean():
    """Of 100 pairs of sets, about 95 intervals hold the mean of all distances."""
    values, halves = distances_and_intervals(100, 300)
    assert 90 <= (np.abs(values - values.mean()) <= halves).sum() <= 99
    assert halves.mean() / 2.262 == pytest.approx(values.std(), rel=0.2)


def test_memory_of_moments_and_class_sums_does_not_grow():
    peaks = []
    for batches in (50, 500):
        moments, sums = BlockMoments(32), ClassSums(10)
        tracemalloc.start()
        for number in range(batches):
            features = np.full((64, 32), number, np.float32)
            moments.add(features)
            sums.add(64 * number, np.full((64, 10), 0.1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("batch", [1, 9, 100])
def test_feature_sample_does_not_depend_on_batches(batch):
    features = np.arange(100, dtype=np.float32)[:, None]
    sample = FeatureSample(limit=12, seed=3)
    for start in range(0, 100, batch):
        sample.add(start, features[start : start + batch])
    whole = FeatureSample(limit=12, seed=3)
    whole.add(0, features)
    assert len(sample.features) == 12
    np.testing.assert_array_equal(sample.features, whole.features)
    assert len(set(whole.features.ravel())) == 12
    other = FeatureSample(limit=12, seed=4)
    other.add(0, features)
    assert (other.features != whole.features).any()


def scores_of(probabilities, splits=1):
    sums = ClassSums(probabilities.shape[1], splits)
    for start in range(0, len(probabilities), 3):
        sums.add(start, probabilities[start : start + 3])
    return sums.scores()


def test_inception_score_of_known_probabilities():
    assert scores_of(np.eye(5)[np.arange(20) % 5]) == pytest.approx([5.0], abs=1e-12)
    assert scores_of(np.full((20, 5), 0.2)) == pytest.approx([1.0], abs=1e-12)


def test_inception_score_of_splits_is_that_of_their_images():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), size=31)
    expected = [scores_of(probabilities[first::3])[0] for first in range(3)]
    assert scores_of(probabilities, splits=3) == pytest.approx(expected, rel=1e-12)
    assert len(scores_of(probabilities[:2], splits=3)) == 2  # one split is empty


def test_kernel_distances_of_known_features():
    """Ones against zeros in one dimension: kernels 8, 1 and 1."""
    ones, zeros = np.ones((4, 1), np.float32), np.zeros((4, 1), np.float32)
    assert kernel_distances(ones, zeros, size=4) == pytest.approx([8 + 1 - 2 * 1])
    assert kernel_distances(ones, zeros, size=3, subsets=5) == pytest.approx([7.0] * 5)


def test_kernel_distances_repeat_with_the_seed():
    a, b = random_features(40), random_features(50, seed=1)
    first, again, other = (kernel_distances(a, b, size=20, seed=seed, subsets=4) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    for size in (1, 41):
        with pytest.raises(InputError, match="subsets must have from 2 to 40 images"):
            kernel_distances(a, b, size=size)


def brute_precision(candidates, references, neighbours):
    distances = np.linalg.norm(references[:, None] - references[None], axis=-1)
    radii = np.sort(distances, axis=1)[:, neighbours]  # behind the feature itself
    return np.mean([(np.linalg.norm(references - each, axis=1) <= radii).any() for each in candidates])


def test_precision_recall_equals_its_definition():
    candidates, references = random_features(60, 3), random_features(80, 3, seed=1, shift=1.0)
    precision, recall = precision_recall(candidates, references, 3)
    assert precision == brute_precision(candidates, references, 3)
    assert recall == brute_precision(references, candidates, 3)
    assert 0 < precision < 1
    assert 0 < recall < 1


@pytest.mark.parametrize("rows", [7, 1024])
def test_precision_recall_folds_equal_precision_recall_without_a_block(monkeypatch, rows):
    monkeypatch.setattr("cogview.evaluation.distribution._ROWS", rows)
    candidates, references = random_features(60, 3), random_features(83, 3, seed=1, shift=1.0)
    whole, *folds = precision_recall_folds(candidates, references)
    assert tuple(whole) == precision_recall(candidates, references)
    for block, fold in enumerate(folds):
        kept = [each[np.arange(len(each)) % BLOCKS != block] for each in (candidates, references)]
        assert tuple(fold) == precision_recall(*kept)
    assert len({tuple(fold) for fold in folds}) > 1


def test_precision_recall_of_equal_and_of_distant_sets():
    features = random_features(50) + 1e4  # whose squares are large: rounding must not exclude a feature itself
    assert precision_recall(features, features) == (1.0, 1.0)
    assert precision_recall(features, features + 100) == (0.0, 0.0)
    with pytest.raises(InputError, match="more than 3 images in each set, got 3"):
        precision_recall(features[:3], features)


class RowMeans(torch.nn.Module):
    """Features for torchmetrics: means of the rows of each channel."""

    num_features = 12

    def forward(self, images):
        return images.double().mean(dim=3).flatten(1) / 255


@pytest.fixture
def image_sets():
    """Two sets of images (N, 3, 4, 4) and their features."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (60, 3, 4, 4), generator=generator, dtype=torch.uint8)
    b = torch.randint(40, 200, (60, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return a, b, RowMeans()(a).numpy(), RowMeans()(b).numpy()


def test_frechet_distance_equals_that_of_torchmetrics(image_sets):
    module = pytest.importorskip("torchmetrics.image.fid")
    a, b, features_a, features_b = image_sets
    metric = module.FrechetInceptionDistance(feature=RowMeans())
    metric.set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    found = frechet_distance(moments_of(features_a, 16), moments_of(features_b, 16))
    assert found == pytest.approx(float(metric.compute()), rel=1e-4)


def test_kernel_distance_equals_that_of_torchmetrics(image_sets):
    module = pytest.importorskip("torchmetrics.image.kid")
    a, b, features_a, features_b = image_sets
    metric = module.KernelInceptionDistance(feature=RowMeans(), subsets=2, subset_size=60)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert kernel_distances(features_a, features_b, size=60)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_inception_score_equals_that_of_torchmetrics(image_sets):
    module = pytest.importorskip("torchmetrics.image.inception")
    a, _, features, _ = image_sets
    metric = module.InceptionScore(feature=RowMeans(), splits=1)
    metric.update(a)
    probabilities = torch.from_numpy(features).softmax(dim=1).numpy()
    assert scores_of(probabilities)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-4)
