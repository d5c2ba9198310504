"""PB-relax LayerNorm (CogView, arXiv:2105.13290, section 2.4), alone and between the branches of a Sandwich-LN layer.

The references are the specification. On a GPU a norm is limited by memory: the kernels of ``layer_norm_triton.py`` add
a branch to the residual stream and normalize the sum in one pass. Training on a CPU does the same, forward and backward
(``native_training.py``). ``COGVIEW_KERNELS=reference|triton|native`` forces one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.kernels.dispatch import select_backend
from cogview.kernels.native_training import NATIVE_DTYPES, layer_norm_native, runs_native_training, sandwich_native

# CogView v1 divides by max|x| / 8:
# https://github.com/THUDM/CogView/blob/169a0234990d4507ab5ec8e70b15831d8d5b3dd3/mpu/sparse_transformer.py#L40-L44
RELAX = 8.0
SMALLEST = 1e-20  # a token below this counts as zero, and its gradient stays finite
KNOWN = ("reference", "triton")
NATIVE_EPSILON = 1e-5  # that of ``c/training.c``


def pb_relax_layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Normalize each token after division by max|x| / 8.

    LayerNorm is invariant to the scale of its input, up to ``epsilon``. After the division, squares of large
    activations stay within half precision. CogView v1 takes one maximum over the whole tensor, so that one sample
    affects another and a later token an earlier one. Here each token has its maximum. Statistics are float32.

    Args:
        x: Tokens (..., D); a token of zeros stays zero before weight and bias.
        weight: (D,).
        bias: (D,).
        epsilon: Added to the variance.

    Returns:
        Normalized tokens in the shape and dtype of ``x``.
    """
    if x.dtype == weight.dtype == torch.float32 and not torch.is_grad_enabled():  # the same with fewer operations
        largest = x.abs().amax(-1, True).clamp_(min=SMALLEST)
        return torch.layer_norm(x / largest, (x.shape[-1],), weight, bias, epsilon / RELAX**2)
    x_fp32 = x.float()
    # As in CogView v1 the maximum is a constant for the gradient, which is exact: the output does not depend on it.
    largest = x_fp32.detach().abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST)
    # x / max|x| with epsilon / 64 equals x * 8 / max|x| with epsilon, with one operation less.
    relaxed = F.layer_norm(x_fp32 / largest, x.shape[-1:], weight.float(), bias.float(), epsilon / RELAX**2)
    return relaxed.to(x.dtype)


def pb_relax_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """Compute ``pb_relax_layer_norm_reference`` with the selected implementation, equal up to rounding.

    Args:
        x: Input (..., D).
        weight: Gain (D,).
        bias: Bias (D,).
        epsilon: Added to the variance.
        dtype: Dtype that the result will be converted to, which a kernel may do; None for that of ``x``.

    Returns:
        The normalized input (..., D), in the dtype of ``x`` or in ``dtype``.
    """
    if _is_native(x, x, weight, epsilon) and (dtype is None or dtype in NATIVE_DTYPES):
        return layer_norm_native(x, weight, bias, dtype or x.dtype)
    if select_backend("pb_relax_layer_norm", x.device.type, available=KNOWN) == "triton":
        from cogview.kernels.layer_norm_triton import pb_relax_layer_norm_triton

        return pb_relax_layer_norm_triton(x, weight, bias, epsilon)
    return pb_relax_layer_norm_reference(x, weight, bias, epsilon)


def _is_native(x: Tensor, branch: Tensor, weight: Tensor, epsilon: float) -> bool:
    """Return whether native kernels run: for gradients on a CPU, with a residual stream and weights in float32."""
    float32 = x.dtype == weight.dtype == torch.float32 and epsilon == NATIVE_EPSILON
    return float32 and branch.dtype in NATIVE_DTYPES and runs_native_training(x, x.shape[-1])


def sandwich_layer_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor | None = None,
    next_bias: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor | None]:
    """Add a normalized branch to the residual stream, and normalize the sum for the next branch.

    Args:
        x: Residual stream (..., D); it may be float32 beside a branch in half precision.
        branch: Branch output, in the shape of ``x``.
        weight: Weight (D,) of the norm of the branch.
        bias: Bias (D,) of the norm of the branch.
        next_weight: Weight (D,) of the norm before the next branch; None for none.
        next_bias: Bias (D,) of that norm.
        epsilon: Added to the variances.

    Returns:
        The sum x + LN(branch) in the dtype of ``x``, and its norm in the dtype of ``branch``, or None.
    """
    total = (x + pb_relax_layer_norm_reference(branch, weight, bias, epsilon)).to(x.dtype)
    if next_weight is None or next_bias is None:
        return total, None
    return total, pb_relax_layer_norm_reference(total, next_weight, next_bias, epsilon).to(branch.dtype)


def sandwich_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor | None = None,
    next_bias: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``sandwich_layer_norm_reference`` with the selected implementation, equal up to rounding.

    Args:
        x: Residual stream (..., D).
        branch: Output of a branch (..., D).
        weight: Gain (D,) of the branch's output norm.
        bias: Bias (D,) of the branch's output norm.
        next_weight: Gain (D,) of the next branch's input norm, or None.
        next_bias: Bias (D,) of the next branch's input norm, or None.
        epsilon: Added to the variance.

    Returns:
        The new residual stream (..., D), and its norm for the next branch, or None.

    Raises:
        ValueError: Only one of ``next_weight`` and ``next_bias`` is given.
    """
    if (next_weight is None) != (next_bias is None):
        missing = "next_weight" if next_weight is None else "next_bias"
        raise ValueError(f"{missing} is None; next_weight and next_bias come together, or neither")
    if _is_native(x, branch, weight, epsilon):
        return sandwich_native(x, branch, weight, bias, next_weight, next_bias)
    if select_backend("sandwich_layer_norm", x.device.type, available=KNOWN) == "triton":
        from cogview.kernels.layer_norm_triton import sandwich_layer_norm_triton

        return sandwich_layer_norm_triton(x, branch, weight, bias, next_weight, next_bias, epsilon)
    return sandwich_layer_norm_reference(x, branch, weight, bias, next_weight, next_bias, epsilon)
