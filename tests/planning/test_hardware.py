"""Measured rates of the hardware, and peaks of GPUs by their names."""

import pytest
import torch

from cogview.planning.gpus import GPU_PEAK_FLOPS, assumed_gpu, peak_flops
from cogview.planning.hardware import measure_hardware


def test_measure_hardware_returns_positive_rates():
    speed = measure_hardware(torch.device("cpu"), torch.float32)
    assert speed.bandwidth > 0
    assert speed.flops > 0
    assert not speed.starts_ahead


@pytest.mark.parametrize(("memory", "name"), [(80e9, "H100"), (40e9, "A100"), (24e9, "RTX 3090"), (1, "RTX 3090")])
def test_assumed_gpu_follows_memory(memory, name):
    assert assumed_gpu(memory) == name
    assert name in GPU_PEAK_FLOPS


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),  # a slice of a GPU
        ("Tesla V100-SXM2-32GB", "float16", 125e12),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("Tesla T4", "float16", 65e12),
        ("NVIDIA A10", "bfloat16", 125e12),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA GeForce RTX 3090", "float16", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", "float16", 80e12),
        ("NVIDIA GeForce RTX 4090 D", "float16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "float16", None),
        ("NVIDIA GeForce GTX 1080", "float16", None),
        ("cpu", "float32", None),
    ],
)
def test_peak_flops_finds_gpu_by_name(name, precision, expected):
    assert peak_flops(name, precision) == expected
