"""Permutation tests: known probabilities, planted falls, and no alarm without a change."""

import math

import numpy as np
import pytest

from cogview.evaluation.permutation import RESAMPLES, fall_probability


def test_fall_probability_of_five_losses_is_that_of_five_coins():
    before, after = [1.0] * 100, [1.0] * 95 + [0.0] * 5
    assert fall_probability(before, after, paired=True) == pytest.approx(2**-5, abs=0.006)


def test_fall_probability_of_unpaired_items_is_hypergeometric():
    before, after = [1.0] * 20, [1.0] * 16 + [0.0] * 4
    exact = math.comb(20, 4) / math.comb(40, 4)  # all four zeros are dealt to the second side
    assert fall_probability(before, after, paired=False) == pytest.approx(exact, abs=0.006)


@pytest.mark.parametrize("paired", [False, True])
def test_fall_probability_is_high_for_equal_items_and_one_for_a_rise(paired):
    values = [1.0, 0.0, 1.0, 0.5]
    assert fall_probability(values, values, paired=paired) > 0.3
    assert fall_probability([0.0] * 50, [1.0] * 50, paired=paired) == 1
    assert fall_probability([1.0] * 50, [0.0] * 50, paired=paired) == 1 / (RESAMPLES + 1)


def test_fall_probability_notices_five_points_of_500_items_each_time():
    """99% against 94%, both sides drawn anew; unchanged draws raise an alarm in at most one of 20."""
    noticed = alarms = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        before, same, worse = (random.random(500) < share for share in (0.99, 0.99, 0.94))
        noticed += fall_probability(before, worse, paired=False) <= 0.005
        alarms += fall_probability(before, same, paired=False) <= 0.005
    assert noticed == 20
    assert alarms <= 1


def test_fall_probability_refuses_other_numbers_of_paired_items():
    with pytest.raises(ValueError, match="got 2 and 1"):
        fall_probability([1.0, 0.0], [1.0], paired=True)
