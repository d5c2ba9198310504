"""PB-relax LayerNorm (CogView, arXiv:2105.13290, section 2.4), alone and between the branches of a Sandwich-LN layer.

The readable references are the specification. On a GPU a norm is nothing but reading and writing memory: a kernel that
adds a branch to the residual stream and normalises it for the next one goes over memory once
(``layer_norm_triton.py``). ``COGVIEW_KERNELS=reference|triton`` forces either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.kernels.dispatch import select_backend

RELAX = 8.0  # the released code divides by max|x| / 8
SMALLEST = 1e-20  # a token far below this is as good as zero, and its gradient stays finite
KNOWN = ("reference", "triton")


def pb_relax_layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis of ``x`` (..., D), after division by max|x| / 8 of each token.

    LayerNorm does not change when its input is scaled, up to ``epsilon``; scaled this way, squares of large
    activations stay inside half precision. The released code takes one maximum over the whole tensor, which lets one
    sample change another and a later token an earlier one. Here the maximum is the token's own; a token of
    zeros stays zero before weight and bias. Statistics are float32; the result has the dtype of ``x``.
    """
    if x.dtype == weight.dtype == torch.float32 and not torch.is_grad_enabled():  # the same, started in less time
        largest = x.abs().amax(-1, True).clamp_(min=SMALLEST)
        return torch.layer_norm(x / largest, (x.shape[-1],), weight, bias, epsilon / RELAX**2)
    x_fp32 = x.float()
    # As in the release the maximum is a constant to the gradient, which is exact: the output does not depend on it.
    largest = x_fp32.detach().abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST)
    # x / max|x| with epsilon / 64 is x * 8 / max|x| with epsilon, in one operation less.
    relaxed = F.layer_norm(x_fp32 / largest, x.shape[-1:], weight.float(), bias.float(), epsilon / RELAX**2)
    return relaxed.to(x.dtype)


def pb_relax_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """``pb_relax_layer_norm_reference`` of ``x`` (..., D), ``weight`` and ``bias`` (D,), up to rounding."""
    if select_backend("pb_relax_layer_norm", x.device.type, available=KNOWN) == "triton":
        from cogview.kernels.layer_norm_triton import pb_relax_layer_norm_triton

        return pb_relax_layer_norm_triton(x, weight, bias, epsilon)
    return pb_relax_layer_norm_reference(x, weight, bias, epsilon)


def sandwich_layer_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor | None = None,
    next_bias: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor | None]:
    """x + LN(branch; weight, bias), and LN of that sum by the next weight and bias, or None without these.

    ``x`` and ``branch`` are (..., D), weights and biases (D,); LN is ``pb_relax_layer_norm``. The sum has the dtype of
    ``x``, which may be a float32 residual stream, and the second norm that of ``branch``.
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
    """``sandwich_layer_norm_reference``, up to rounding; ValueError for a next weight or bias without the other."""
    if (next_weight is None) != (next_bias is None):
        missing = "next_weight" if next_weight is None else "next_bias"
        raise ValueError(f"{missing} is None; next_weight and next_bias come together, or neither")
    if select_backend("sandwich_layer_norm", x.device.type, available=KNOWN) == "triton":
        from cogview.kernels.layer_norm_triton import sandwich_layer_norm_triton

        return sandwich_layer_norm_triton(x, branch, weight, bias, next_weight, next_bias, epsilon)
    return sandwich_layer_norm_reference(x, branch, weight, bias, next_weight, next_bias, epsilon)
