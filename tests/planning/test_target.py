"""Models and devices of estimates: presets, sizes, and the source of each rate."""

from dataclasses import replace

import pytest
import torch

from cogview.device import DevicePlacement
from cogview.errors import InputError
from cogview.modeling.config import PRESETS
from cogview.planning import target as module
from cogview.planning.hardware import HardwareSpeed
from cogview.planning.target import (
    TargetDevice,
    find_speed,
    find_target,
    find_training_peak,
    load_target_model,
    preset_config,
    random_config,
    training_precision,
)

SPEED = HardwareSpeed(bandwidth=3e9, flops=4e9, starts_ahead=True)
SIZE = TargetDevice(type="cuda", memory=24 * 10**9, dtype="int8")
PRESENT = replace(SIZE, placement=DevicePlacement(torch.device("cuda"), torch.bfloat16, "as requested", "int8"))


@pytest.fixture
def measured(monkeypatch):
    """Replace the measurement of the hardware; return the dtypes that were measured."""
    dtypes = []
    monkeypatch.setattr(module, "measure_hardware", lambda device, dtype: dtypes.append(dtype) or SPEED)
    return dtypes


@pytest.mark.parametrize("name", PRESETS)
def test_preset_config_fits_texts_of_maximum_length(name):
    config = load_target_model(name).config
    assert config == preset_config(name)
    limit = config.transformer.max_positions
    sequences = [
        [
            config.layouts["generate"].arrange(config.vocabulary, text=[0] * count),
            config.layouts["upscale"].arrange(config.vocabulary, text=[0] * count, small=[0] * 256),
        ]
        for count in (config.max_text, config.max_text + 1)
    ]
    assert all(sequence.positions.max() < limit for sequence in sequences[0])
    assert any(sequence.positions.max() >= limit for sequence in sequences[1])


def test_load_target_model_names_known_models_when_unknown():
    with pytest.raises(InputError, match=r'model "4c" is unknown; known: cogview-emoji, .* the sizes 5m, '):
        load_target_model("4c")


@pytest.mark.parametrize("shape", ["4x", "2x64", "2x64x4x1", "-1x64x4", "２x64x4", ""])
def test_random_config_rejects_other_shapes(shape):
    with pytest.raises(InputError, match="must be LAYERSxWIDTHxHEADS such as 12x832x13, or one of 5m, "):
        random_config(shape)


@pytest.mark.parametrize(
    ("name", "memory"),
    [("cpu:16GB", 16 * 10**9), ("cuda:1.5GiB", 3 * 2**29), ("cpu:300MB", 3 * 10**8), ("cuda:512MiB", 2**29)],
)
def test_find_target_reads_size_with_unit(name, memory):
    found = find_target(name, "float32", load_target_model("5m"))
    assert (found.type, found.memory, found.placement) == (name.split(":")[0], memory, None)


@pytest.mark.parametrize(
    ("name", "preset", "quantization", "dtype"),
    [
        ("cuda:24GB", "5m", None, "bfloat16"),
        ("cpu:16GB", "5m", None, "float32"),
        ("cpu:16GB", "4b", None, "bfloat16"),
        ("cpu:16GB", "4b", "int4", "int4"),
    ],
)
def test_find_target_chooses_dtype_for_size(name, preset, quantization, dtype):
    assert find_target(name, "auto", replace(load_target_model(preset), quantization=quantization)).dtype == dtype


def test_find_speed_prefers_given_rates_to_measured_ones(measured):
    devices = []
    found = find_speed(PRESENT, None, 7e12, devices.append)
    assert (found.speed.bandwidth, found.bandwidth_source) == (3e9, "measured")
    assert (found.speed.flops, found.flops_source) == (7e12, "given")
    assert (devices, measured) == ([torch.device("cuda")], [torch.bfloat16])


def test_find_speed_measures_nothing_when_both_rates_are_given(measured):
    found = find_speed(PRESENT, 1e9, 2e12)
    assert (found.speed.bandwidth, found.speed.flops, measured) == (1e9, 2e12, [])
    assert found.speed.starts_ahead


def test_find_speed_assumes_rates_of_size(measured):
    found = find_speed(SIZE, None, None)
    assert (found.bandwidth_source, found.flops_source, measured) == ("assumed", "assumed", [])
    assert found.speed.flops == 2 * find_speed(replace(SIZE, dtype="float32"), None, None).speed.flops


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", (312e12, "data sheet of NVIDIA A100-SXM4-80GB")),
        ("Unknown GPU", "bfloat16", (4e9, "measured")),
    ],
)
def test_find_training_peak_uses_data_sheet_or_measurement(monkeypatch, measured, name, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_training_peak(PRESENT, precision, None) == expected
    assert measured == ([torch.bfloat16] if expected[1] == "measured" else [])


def test_find_training_peak_assumes_gpu_of_size():
    assert find_training_peak(replace(SIZE, memory=80 * 10**9), "float16", None) == (989e12, "assumed: H100")
    assert find_training_peak(SIZE, "float16", 5e12) == (5e12, "given")


@pytest.mark.parametrize(("type_", "precision"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_training_precision_of_size(type_, precision):
    assert training_precision(replace(SIZE, type=type_)) == precision
