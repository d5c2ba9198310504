"""The order of samples: every row once per epoch, equal for any number of processes, resumable by one integer."""

import numpy as np
import pytest

from cogview.data.sampling_order import sample_index


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1023, 1024, 65537])
def test_sample_index_has_every_row_once_in_each_epoch(size):
    for seed, epoch in [(0, 0), (0, 1), (7, 0), (2**63, 12345)]:
        rows = sample_index(seed, epoch * size + np.arange(size), size)
        assert rows.dtype == np.int64
        np.testing.assert_array_equal(np.sort(rows), np.arange(size))


def test_sample_index_differs_between_epochs_and_seeds():
    size = 1000
    orders = [sample_index(seed, epoch * size + np.arange(size), size) for seed in range(5) for epoch in range(5)]
    for first in range(len(orders)):
        for second in range(first):
            # Unrelated orders agree at 1 position on average, in 12 or more once in 10^9.
            assert (orders[first] == orders[second]).sum() < 12


def test_sample_index_is_uniform():
    """Compute chi-squared of (position in the epoch, row) and of neighbouring rows over 5000 epochs of 10 rows."""
    size, epochs = 10, 5000
    orders = sample_index(1, np.arange(size * epochs), size).reshape(epochs, size)
    counts = np.stack([(orders == row).sum(0) for row in range(size)])
    assert ((counts - epochs / size) ** 2 / (epochs / size)).sum() < 150  # 81 degrees of freedom: 81 ± 13
    neighbours = np.zeros((size, size))
    np.add.at(neighbours, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    assert (neighbours.diagonal() == 0).all()
    others, mean = neighbours[~np.eye(size, dtype=bool)], epochs / size
    assert ((others - mean) ** 2 / mean).sum() < 160  # 90 pairs


@pytest.mark.parametrize(("size", "orders"), [(2, 2), (3, 6), (4, 24)])
def test_sample_index_reaches_every_order_of_a_small_store(size, orders):
    rows = sample_index(0, np.arange(size * 1000), size).reshape(1000, size)
    seen, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(seen) == orders
    assert counts.max() < 2 * counts.min() + 20


def test_sample_index_equals_its_golden_values():
    """Golden values of the first version: a run that was started with it must resume in the same order."""
    assert sample_index(0, np.arange(12), 10).tolist() == [3, 6, 7, 1, 5, 4, 8, 0, 9, 2, 6, 9]
    far = np.array([0, 1, 999_999, 1_000_000, 10**15])
    assert sample_index(42, far, 1_000_000).tolist() == [
        501517,
        714596,
        288493,
        592302,
        38873,
    ]


def test_sample_index_of_an_array_equals_single_samples():
    many = sample_index(5, np.arange(60).reshape(3, 20), 7)
    assert many.shape == (3, 20)
    assert [int(sample_index(5, k, 7)) for k in range(60)] == many.ravel().tolist()


def test_sample_index_rejects_empty_stores_and_negative_samples():
    with pytest.raises(ValueError, match="at least 1 is needed"):
        sample_index(0, 0, 0)
    with pytest.raises(ValueError, match="numbered from 0, got -3"):
        sample_index(0, np.array([1, -3]), 10)
