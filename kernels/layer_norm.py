"""PB-relax LayerNorm (CogView, arXiv:2105.13290, section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RELAX = 8.0  # the released code divides by max|x| / 8
SMALLEST = 1e-20  # a token far below this is as good as zero, and its gradient stays finite


def pb_relax_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
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
