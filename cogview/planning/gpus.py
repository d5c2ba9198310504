"""Peak FLOP/s of known GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Dense peaks in FLOP/s by GPU and precision: tensor cores with float32 accumulation, and the other cores for float32,
# since PyTorch disables TF32 by default. From the vendors' data sheets and architecture papers. A key is a part of the
# name that PyTorch reports.
GPU_PEAK_FLOPS: Mapping[str, Mapping[str, float]] = {
    "V100-SXM2": {"float16": 125e12, "float32": 15.7e12},
    "V100-PCIE": {"float16": 112e12, "float32": 14e12},
    "T4": {"float16": 65e12, "float32": 8.1e12},
    "RTX 2080 Ti": {"float16": 53.8e12, "float32": 13.4e12},
    "RTX 3090": {"float16": 71e12, "bfloat16": 71e12, "float32": 35.6e12},
    "RTX 3090 Ti": {"float16": 80e12, "bfloat16": 80e12, "float32": 40e12},
    "RTX 4090": {"float16": 165.2e12, "bfloat16": 165.2e12, "float32": 82.6e12},
    "RTX A6000": {"float16": 154.8e12, "bfloat16": 154.8e12, "float32": 38.7e12},
    "A10": {"float16": 125e12, "bfloat16": 125e12, "float32": 31.2e12},
    "A30": {"float16": 165e12, "bfloat16": 165e12, "float32": 10.3e12},
    "A40": {"float16": 149.7e12, "bfloat16": 149.7e12, "float32": 37.4e12},
    "A100": {"float16": 312e12, "bfloat16": 312e12, "float32": 19.5e12},
    "A800": {"float16": 312e12, "bfloat16": 312e12, "float32": 19.5e12},
    "L4": {"float16": 121e12, "bfloat16": 121e12, "float32": 30.3e12},
    "L40S": {"float16": 362e12, "bfloat16": 362e12, "float32": 91.6e12},
    "H100": {"float16": 989e12, "bfloat16": 989e12, "float32": 67e12},
    "H100 PCIe": {"float16": 756e12, "bfloat16": 756e12, "float32": 51e12},
    "H100 NVL": {"float16": 835e12, "bfloat16": 835e12, "float32": 60e12},
    "H200": {"float16": 989e12, "bfloat16": 989e12, "float32": 67e12},
    "H200 NVL": {"float16": 835e12, "bfloat16": 835e12, "float32": 60e12},
    "MI300X": {"float16": 1307e12, "bfloat16": 1307e12, "float32": 163.4e12},
}
# Suffixes and parts of a name that denote another GPU, or a slice of one.
OTHER_GPU_NAMES = r"(?! (Ti|SUPER|D|Ada|Laptop)\b)(?!.*\bMIG\b)"

# The GPU that is assumed for training if only the size of its memory is given: minimum bytes, name.
ASSUMED_GPUS = ((60e9, "H100"), (30e9, "A100"), (0.0, "RTX 3090"))


def peak_flops(name: str, precision: str) -> float | None:
    """Return the dense peak of a GPU.

    Args:
        name: The name that PyTorch reports, such as ``NVIDIA H100 80GB HBM3``.
        precision: float32, bfloat16 or float16.

    Returns:
        FLOP/s, or None for an unknown GPU or one without that precision.
    """
    known = [key for key in GPU_PEAK_FLOPS if re.search(rf"\b{key}\b{OTHER_GPU_NAMES}", name, re.IGNORECASE)]
    return GPU_PEAK_FLOPS[max(known, key=len)].get(precision) if known else None


def assumed_gpu(memory: float) -> str:
    """Return the key of ``GPU_PEAK_FLOPS`` for a GPU of ``memory`` bytes."""
    return next(name for min_bytes, name in ASSUMED_GPUS if memory >= min_bytes)
