"""Pivots: the sample of an image, random in training and fixed in generation."""

import numpy as np
import pytest

from cogview.modeling.pivots import fixed_sample, pivot_bias, random_sample


def test_pivot_bias_counts_a_cut_image_as_whole():
    """A window of upscaling that ends before its last line has the pivots of the whole one."""
    sizes = np.array([0, 0, *[64] * 64, 0])
    whole, cut = pivot_bias(sizes, 8), pivot_bias(sizes[:30], 8)
    assert np.array_equal(whole[:30], cut)
    assert np.isfinite(whole).sum() == 3 + 8
    assert np.isfinite(pivot_bias(sizes, 0)).sum() == 3
    assert not pivot_bias(sizes, 64).any()  # all codes, with a bias of 0


@pytest.mark.parametrize(("size", "count"), [(64, 1), (64, 8), (1024, 128), (4096, 256), (7, 7), (16, 0), (17, 11)])
def test_fixed_sample_is_spread_over_the_image(size, count):
    sample = fixed_sample(size, count)
    assert len(set(sample.tolist())) == count
    runs = np.arange(count) * size / max(count, 1)
    assert (sample >= np.floor(runs)).all()
    assert (sample < runs + size / max(count, 1)).all()
    assert (np.diff(sample) > 0).all()


def test_fixed_sample_covers_the_columns_of_a_grid():
    """Every 16th code of a row of 64 would always have the same column."""
    columns = fixed_sample(64 * 64, 256) % 64
    counts = np.bincount(columns, minlength=64)
    assert counts.min() >= 2
    assert counts.max() <= 7


def test_random_sample_gives_each_position_the_same_probability():
    random, counts = np.random.default_rng(0), np.zeros(20)
    for _ in range(400):
        sample = random_sample(20, 5, random)
        assert len(set(sample.tolist())) == 5
        assert (np.diff(sample) > 0).all()
        counts[sample] += 1
    assert np.abs(counts - 100).max() < 40  # a probability of 1/4: the standard deviation is 9


def test_pivot_bias_makes_a_sample_weigh_as_the_whole_image():
    sizes = np.array([0, 0, *[64] * 64, 0, *[16] * 16, 0])
    bias = pivot_bias(sizes, 8, np.random.default_rng(1))
    weights = np.exp(bias)
    assert weights[2:66].sum() == pytest.approx(64)
    assert weights[67:83].sum() == pytest.approx(16)
    assert weights[[0, 1, 66, 83]].tolist() == [1, 1, 1, 1]
