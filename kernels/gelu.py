"""GELU, in its tanh form, of a product and its bias.

As a separate operation the bias belongs to the matrix product before it. A kernel that adds the bias as it reads the
product avoids storing the sum for the backward pass (``gelu_triton.py``). ``COGVIEW_KERNELS=reference|triton`` forces
either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.kernels.dispatch import select_backend


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """Compute gelu(x + bias).

    gelu(z) = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) (arXiv:1606.08415, section 2).

    Args:
        x: Product without its bias, (..., D).
        bias: (D,).

    Returns:
        Activations in the shape and dtype of ``x``.
    """
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def bias_gelu_is_fused(device: torch.device) -> bool:
    """Return whether ``bias_gelu`` is one kernel on ``device``; if not, the product should add the bias."""
    return select_backend("bias_gelu", device.type, available=("reference", "triton")) == "triton"


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Compute ``bias_gelu_reference`` with the selected implementation, equal up to rounding.

    Args:
        x: Input (..., D).
        bias: Bias (D,).

    Returns:
        GELU(x + bias), (..., D).
    """
    if bias_gelu_is_fused(x.device):
        from cogview.kernels.gelu_triton import bias_gelu_triton

        return bias_gelu_triton(x, bias)
    return bias_gelu_reference(x, bias)
