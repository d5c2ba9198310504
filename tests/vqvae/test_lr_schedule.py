"""The learning rate by step."""

import pytest

from cogview.vqvae.lr_schedule import warmup_cosine


def test_warmup_cosine_rises_evenly_and_falls_along_half_a_cosine():
    rates = [warmup_cosine(step, peak=1.0, final=0.2, warmup_steps=4, steps=12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.6)  # half of the way, half of the height
    assert rates[12] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_warmup_cosine_begins_at_the_peak_without_a_warm_up():
    assert warmup_cosine(0, peak=3e-4, final=0.0, warmup_steps=0, steps=10) == 3e-4
