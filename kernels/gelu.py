"""GELU in its tanh form, of a product and its bias.

Where it is one operation of its own, the bias belongs in the matrix product before it; a kernel that adds the bias as
it reads the product saves keeping the sum for the backward (``gelu_triton.py``). ``COGVIEW_KERNELS=reference|triton``
forces either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.kernels.dispatch import select_backend


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) of ``x`` (..., D) and ``bias`` (D,), in the dtype of ``x``.

    gelu(z) = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) (arXiv:1606.08415, section 2).
    """
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def bias_gelu_is_fused(device: torch.device) -> bool:
    """Whether ``bias_gelu`` is one kernel there; if not, the bias is better added by the product that makes ``x``."""
    return select_backend("bias_gelu", device.type, available=("reference", "triton")) == "triton"


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``bias_gelu_reference`` of ``x`` (..., D) and ``bias`` (D,), up to rounding."""
    if bias_gelu_is_fused(x.device):
        from cogview.kernels.gelu_triton import bias_gelu_triton

        return bias_gelu_triton(x, bias)
    return bias_gelu_reference(x, bias)
