"""What the Triton kernels have in common: checks before a launch, and products of blocks.

``TRITON_INTERPRET=1``, set before the first import of Triton, runs kernels on a CPU in numpy: slow, and good for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e30)  # below every score: a maximum to begin with that can be subtracted


@triton.jit
def dot(a, b, HALF: tl.constexpr):
    """a b in float32, added up in float16 if ``HALF``; float32 is not cut to TF32."""
    if HALF:
        return tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


INTERPRETED = isinstance(dot, InterpretedFunction)  # as Triton has decided


def check_floats(name: str, tensor: Tensor) -> None:
    """ValueError if no kernel can read ``tensor``: its dtype, or its device."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        raise ValueError(f"{name} is bfloat16, which Triton's interpreter computes wrongly without a word: use float32")
    if not INTERPRETED and tensor.device.type == "cpu":
        raise ValueError(f"{name} is on the CPU; Triton needs a GPU, or TRITON_INTERPRET=1 to interpret its kernels")


def as_rows(x: Tensor) -> Tensor:
    """(N, D) of (..., D), where numbers of a row lie side by side."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
