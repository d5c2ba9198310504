"""Helpers of the Triton kernels: checks before a launch, and products of blocks.

``TRITON_INTERPRET=1``, set before the first import of Triton, interprets kernels on a CPU with numpy: slow, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = tl.constexpr(1.4426950408889634)
MIN_SCORE = tl.constexpr(-1e30)  # below every score: initial maximum that, unlike -inf, can be subtracted


@triton.jit
def dot(a, b, HALF: tl.constexpr):
    """Return a b in float32, accumulated in float16 if ``HALF``; float32 inputs are not truncated to TF32.

    Args:
        a: Block (M, K).
        b: Block (K, N).
        HALF: Whether to accumulate in float16.
    """
    if HALF:
        return tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


INTERPRETED = isinstance(dot, InterpretedFunction)  # the decision of Triton


def check_floats(name: str, tensor: Tensor) -> None:
    """Check that kernels can read ``tensor``.

    Args:
        name: Name of the argument, for the message.
        tensor: Tensor to check.

    Raises:
        ValueError: The dtype or the device is not supported.
    """
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        raise ValueError(f"{name} is bfloat16, which Triton's interpreter silently computes wrongly: use float32")
    if not INTERPRETED and tensor.device.type == "cpu":
        raise ValueError(f"{name} is on the CPU; Triton needs a GPU, or TRITON_INTERPRET=1 to interpret its kernels")


def as_rows(x: Tensor) -> Tensor:
    """Return ``x`` (..., D) as a matrix (N, D) whose rows are contiguous, copied if necessary."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
