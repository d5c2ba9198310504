"""GELU, in its tanh form, of a product and its bias.

As a separate operation the bias belongs to the matrix product before it. A kernel that adds the bias as it reads the
product avoids storing the sum for the backward pass (``gelu_triton.py``, and ``native_training.py`` on a CPU).
``COGVIEW_KERNELS=reference|triton|native`` forces one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.kernels.dispatch import select_backend
from cogview.kernels.native_training import bias_gelu_native, runs_native_training


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


def bias_gelu_is_fused(x: Tensor, width: int) -> bool:
    """Return whether ``bias_gelu`` of a product of ``x`` is one kernel; if not, the product should add the bias.

    Args:
        x: Input of the product.
        width: Width of the product.
    """
    return runs_native_training(x, width) or _is_triton(x)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Compute ``bias_gelu_reference`` with the selected implementation, equal up to rounding.

    Args:
        x: Input (..., D).
        bias: Bias (D,).

    Returns:
        GELU(x + bias), (..., D).
    """
    if bias.dtype == torch.float32 and runs_native_training(x, x.shape[-1]):
        return bias_gelu_native(x, bias)
    if _is_triton(x):
        from cogview.kernels.gelu_triton import bias_gelu_triton

        return bias_gelu_triton(x, bias)
    return bias_gelu_reference(x, bias)


def _is_triton(x: Tensor) -> bool:
    return select_backend("bias_gelu", x.device.type, available=("reference", "triton")) == "triton"
