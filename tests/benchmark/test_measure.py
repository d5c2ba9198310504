"""Measurements and metrics of the benchmark. No test compares one time with another."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from cogview.benchmark.measure import (
    BenchmarkResult,
    BenchmarkTarget,
    Measurement,
    MeasurementError,
    RequestTiming,
    make_requests,
    measure_in_subprocess,
    roofline_seconds,
)
from cogview.device import choose_placement, peak_process_memory
from cogview.errors import InputError
from cogview.generation.decode import decode
from cogview.modeling.config import Sampling
from cogview.planning.hardware import HardwareSpeed
from cogview.planning.inference import estimate_inference
from cogview.planning.target import load_target_model

SPEED = HardwareSpeed(bandwidth=1e9, flops=1e10, starts_ahead=False)


def estimate_of(folder, rows=2):
    """Return the estimate of a batch of a checkpoint folder."""
    model = load_target_model(str(folder))
    return estimate_inference(model.config, model.image_config, task="generate", rows=rows)


def target_of(folder):
    """Return a checkpoint folder on the CPU as the target of a benchmark."""
    model = load_target_model(str(folder))
    placement = choose_placement("cpu")
    return BenchmarkTarget(config=model.config, image_config=model.image_config, placement=placement, folder=folder)


def test_first_image_is_extrapolated_at_constant_roofline_fraction(tiny_checkpoint):
    estimate, steps = estimate_of(tiny_checkpoint), 63
    roofline = [roofline_seconds(estimate, one, SPEED) for one in estimate.forward_passes[1:]]
    assert len(roofline) == steps

    def result(num_codes):
        """Return the result of a machine that takes twice the roofline time for each code but the first."""
        other_codes = 2 * sum(roofline[: num_codes - 1])
        request = RequestTiming(first_code=3.0, other_codes=other_codes, pixels=4.0)
        measured = Measurement(requests=(request,), peak=None)
        return BenchmarkResult(estimate=estimate, speed=SPEED, num_codes=num_codes, measured=measured)

    assert [result(count).roofline_fraction for count in (2, 30, 64)] == pytest.approx([0.5] * 3)
    assert result(64).first_image == pytest.approx([7 + 2 * sum(roofline)])
    assert result(64).tokens_per_second == pytest.approx(2 * steps / (2 * sum(roofline)))
    for count in (2, 30):
        assert result(count).first_image == pytest.approx(result(64).first_image)
        assert result(count).images_per_second == pytest.approx(result(64).images_per_second)


def test_roofline_seconds_is_longer_of_bytes_and_products(tiny_checkpoint):
    estimate = estimate_of(tiny_checkpoint, rows=3)
    step = estimate.forward_passes[10]
    weights = 2 * (12 * 32**2 + 17 * 32) + 8192 * 32
    cache = 3 * 2 * 2 * 32 * step.total_positions
    moved, operations = 4 * (weights + cache), estimate.flops(step)
    assert roofline_seconds(estimate, step, replace(SPEED, bandwidth=5.0, flops=1e30)) == pytest.approx(moved / 5)
    assert roofline_seconds(estimate, step, replace(SPEED, bandwidth=1e30, flops=5.0)) == pytest.approx(operations / 5)


def test_make_requests_gives_guided_requests_different_texts(tiny_model):
    """Equal texts would share their prefix, which makes generation faster than it is with real prompts."""
    config = replace(tiny_model.config, sampling=Sampling(guidance=3.0))
    requests = make_requests(config, rows=2, num_codes=5)
    results = decode(tiny_model.transformer, tiny_model.vocabulary, requests)
    assert [len(result.ids) for result in results] == [len(request.sequence) for request in requests]
    assert len({tuple(request.sequence.ids) for request in requests}) == 2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_measure_in_subprocess_reports_peak_without_memory_of_parent(tiny_checkpoint):
    """The peak that the kernel reports for a process (ru_maxrss) includes that of its parent."""
    ballast = np.ones(50_000_000)
    peak = peak_process_memory(torch.device("cpu"), free_before=0)
    measured = measure_in_subprocess(target_of(tiny_checkpoint), 1, num_codes=2, repeats=3, free_bytes=0)
    assert len(measured.requests) == 3
    assert measured.peak < peak - ballast.nbytes / 2


class Deadly:
    """An object whose unpickling ends the process."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_measure_in_subprocess_raises_when_process_dies_or_model_is_missing(tiny_checkpoint, tmp_path):
    with pytest.raises(MeasurementError, match="its process ended with status 9 "):
        measure_in_subprocess(Deadly(), 1, num_codes=2, repeats=1, free_bytes=0)
    target = replace(target_of(tiny_checkpoint), folder=tmp_path / "gone")
    with pytest.raises(InputError, match="gone is no checkpoint folder"):
        measure_in_subprocess(target, 1, num_codes=2, repeats=1, free_bytes=0)
