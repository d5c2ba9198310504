"""Rates of a device, measured or assumed, and the memory that it needs besides tensors."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cogview.kernels.linear import linear

# Bytes besides tensors: Python, PyTorch and the libraries that it loads at work. On a CPU the peak of `cogview generate
# -n 1` (resident memory, PyTorch 2.13 for CPUs on Linux) minus its tensors. On a GPU the context, its kernels and the
# workspace of matrix products: a typical value, assumed and not measured.
OVERHEAD = {"cpu": 350_000_000, "cuda": 600_000_000, "mps": 600_000_000}

# Bandwidth (bytes/s) and FLOP/s of a device that is given by its size alone, by its type and the bytes of an
# activation: a gaming card with 900 GB/s and tensor cores of 60 TFLOP/s in 16 bits (half of that in float32), or a
# desktop with two channels of memory.
ASSUMED_SPEEDS = {
    ("cuda", 2): (900e9, 60e12),
    ("cuda", 4): (900e9, 30e12),
    ("cpu", 2): (50e9, 0.5e12),
    ("cpu", 4): (50e9, 0.5e12),
}


@dataclass(frozen=True, kw_only=True)
class HardwareSpeed:
    """Rates of a device."""

    bandwidth: float  # bytes/s
    flops: float  # dense FLOP/s in the dtype of the activations
    starts_ahead: bool  # whether kernels are launched while earlier ones run, as on a GPU


@torch.inference_mode()
def measure_hardware(device: torch.device, dtype: torch.dtype) -> HardwareSpeed:
    """Measure a device for about a second: a sum over 256 MB, and linear layers.

    Each rate is the best of several runs, since other programs can only slow them down.

    Args:
        device: The device.
        dtype: The dtype of the linear layers.

    Returns:
        Bandwidth in bytes/s and compute in FLOP/s.
    """
    numbers = torch.ones(64 * 2**20, device=device)
    bandwidth = numbers.nbytes / min(_seconds_of(lambda: numbers.sum()) for _ in range(8))
    flops, size, elapsed = 0.0, 512, 0.0
    while elapsed < 0.02 and size < 8192:  # larger products are faster, but take too long for a probe in the end
        size *= 2
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        elapsed = min(_seconds_of(functools.partial(linear, matrix, matrix, matrix[0])) for _ in range(3))
        flops = max(flops, 2 * size**3 / elapsed)
    return HardwareSpeed(bandwidth=bandwidth, flops=flops, starts_ahead=device.type != "cpu")


def _seconds_of(work: Callable[[], torch.Tensor]) -> float:
    """Return the seconds until the result is complete; reading one number waits for the device."""
    start = time.perf_counter()
    work().flatten()[0].item()
    return time.perf_counter() - start
