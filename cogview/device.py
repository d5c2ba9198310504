"""The one place that decides where the model runs and in which numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from cogview.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """A device, the dtype of weights and activations there, and why."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_placement(device: str = "auto", dtype: str = "auto") -> Placement:
    """Choose a device and dtype; ``auto`` takes the best there is.

    CUDA runs in bfloat16 where the card has it in hardware (compute capability 8.0; ``is_bf16_supported`` also
    says yes to cards that emulate it several times slower) and in float16 elsewhere, MPS in float16, a CPU in float32.
    """
    chosen = _choose_device(device)
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown; known: auto, {', '.join(DTYPES)}")
        return Placement(chosen, DTYPES[dtype], "as asked")
    if chosen.type == "cuda":
        if torch.cuda.get_device_capability(chosen)[0] >= 8:
            return Placement(chosen, torch.bfloat16, "the card has bfloat16")
        return Placement(chosen, torch.float16, "the card has no bfloat16")
    if chosen.type == "mps":
        return Placement(chosen, torch.float16, "Apple GPU")
    return Placement(chosen, torch.float32, "no GPU is used")


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.isdigit():  # the released scripts number their GPUs
        name = f"cuda:{name}"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?|mps", name):
        raise InputError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, but no CUDA device is to be seen; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} was asked for, but there are only {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps was asked for, but this machine has none; use --device cpu")
    return device


def training_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """What autocast computes in during training, or None for plain float32.

    ``auto`` is bfloat16 where the hardware has it, else float32. A CPU that has to emulate it computes it several times
    slower than float32.
    """
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    if precision != "auto":
        raise InputError(f"precision {precision!r} is unknown; known: auto, bfloat16, float32")
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        native = device.type == "cpu" and _cpu_has_bfloat16()
    return torch.bfloat16 if native else None


def flush_denormals() -> None:
    """Have this process treat numbers below 1e-38 as zero on a CPU. Call it before the first tensor is made.

    A model that has learnt something meets many, in softmaxes and their gradients, and a CPU takes far longer for each
    (``scripts/benchmarks/training_step.py denormals``). The threads that share the work take the setting over when they
    are started, which is why it comes first.
    """
    torch.set_flush_denormal(True)


def _cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16; oneDNN's own answer counts emulation as support."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
