"""Operations and time of training, and presets of training runs."""

from dataclasses import replace

import pytest

from cogview.errors import InputError
from cogview.planning.training import fits
from cogview.planning.training_time import (
    TRAINING_PRESETS,
    flops_per_token,
    multiplied_flops_per_token,
    preset_job,
    training_time,
)

FOUR_BILLION = preset_job("4b")


def test_flops_per_token_match_published_count():
    shape = FOUR_BILLION.transformer
    assert flops_per_token(shape, 1089) == pytest.approx(24.35e9, rel=1e-3)
    layers, head = 48 * 12 * 2560**2, 58240 * 2560
    attention = 48 * 12 * 2560 * 1089 / 2
    assert flops_per_token(shape, 1089) == pytest.approx(6 * (layers + head) + attention)
    assert multiplied_flops_per_token(shape, 1089) == pytest.approx(6 * (layers + 8192 * 2560) + attention)
    recomputed = multiplied_flops_per_token(shape, 1089, checkpointing="full")
    assert recomputed == pytest.approx(8 * layers + 6 * 8192 * 2560 + attention * 4 / 3)
    assert multiplied_flops_per_token(shape, 1089, checkpointing="selective") == multiplied_flops_per_token(shape, 1089)


def test_training_time_of_4b_run():
    job = replace(FOUR_BILLION, world_size=512, checkpointing="none")
    days = training_time(job, TRAINING_PRESETS["4b"].tokens, 989e12, 0.46) / 86400
    assert days == pytest.approx(1.17, abs=0.01)
    assert training_time(replace(job, world_size=256), 1e9, 989e12) == 2 * training_time(job, 1e9, 989e12)
    longer = training_time(replace(job, checkpointing="full"), 1e9, 989e12) / training_time(job, 1e9, 989e12)
    assert 1.3 < longer < 4 / 3
    with pytest.raises(InputError, match="mfu must be above 0 and at most 1, got 40"):
        training_time(job, 1e9, 989e12, 40)


def test_presets_fit_their_gpus():
    for name, settings in TRAINING_PRESETS.items():
        job = preset_job(name)
        assert fits(job, float(settings.card.removeprefix("cuda:").removesuffix("GB")) * 1e9), name
        if name != "4b":
            assert settings.tokens == pytest.approx(20 * job.parameters, rel=0.05)
    assert TRAINING_PRESETS["4b"].steps(1089) == 144_000
    rates = [settings.learning_rate for settings in TRAINING_PRESETS.values()]
    assert rates == sorted(rates, reverse=True)
    with pytest.raises(InputError, match="no training settings for '7b'; known: 20m"):
        preset_job("7b")
