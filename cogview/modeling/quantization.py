"""Linear layers in few bits, and which weights of a transformer they hold.

The four projections of every layer are 96% of the 4-billion-parameter model and are read whole for every token; they
alone are rounded. Embeddings, norms and biases stay as they are.
"""

# N outputs, K inputs, G inputs that share a scale
from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from cogview.kernels.linear import (
    dequantize_int4,
    dequantize_int8,
    group_of,
    linear_int4_packed,
    linear_int4_reference,
    linear_int8,
    quantize_int4,
    quantize_int8,
)
from cogview.modeling.config import PROJECTIONS

Quantization: TypeAlias = Literal["int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


def parse_quantization(name: str | None) -> Quantization | None:
    """int8 or int4 if ``name`` is one of them."""
    return next((known for known in QUANTIZATIONS if known == name), None)


class Int8Linear(nn.Module):
    """x W^T + b with W in int8: ``weight`` (N, K), ``scale`` (N,) bfloat16, ``bias`` (N,)."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_outputs, num_inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(num_outputs, dtype=torch.bfloat16))
        self.register_buffer("bias", torch.zeros(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) in the dtype of ``x`` (..., K)."""
        return linear_int8(x, self.weight, self.scale, self.bias)


class Int4Linear(nn.Module):
    """x W^T + b with W in int4: ``weight`` (N, K / 2) uint8, ``scale_zero`` (K / G, N, 2) bfloat16, ``bias`` (N,).

    ``ordered``: the bytes of ``weight`` lie as this processor's kernel wants them (``order_int4_for_cpu``).
    """

    weight: Tensor
    scale_zero: Tensor
    bias: Tensor

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        groups = num_inputs // group_of(num_inputs)
        self.register_buffer("weight", torch.zeros(num_outputs, num_inputs // 2, dtype=torch.uint8))
        self.register_buffer("scale_zero", torch.zeros(groups, num_outputs, 2, dtype=torch.bfloat16))
        self.register_buffer("bias", torch.zeros(num_outputs))
        self.cpu_packed = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) in the dtype of ``x`` (..., K)."""
        compute = linear_int4_packed if self.cpu_packed else linear_int4_reference
        return compute(x, self.weight, self.scale_zero, self.bias)


_LAYERS: dict[Quantization, type[Int8Linear] | type[Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}


def swap_quantized_linears(transformer: nn.Module, quantization: Quantization) -> None:
    """Put layers of ``few_bits`` in the place of the projections, without weights yet; call it on the meta device."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(PROJECTIONS)):
            transformer.set_submodule(name, _LAYERS[quantization](module.in_features, module.out_features))


def is_quantized(name: str) -> bool:
    """Whether the weight ``name`` of a transformer is one of those that are held in few bits."""
    return name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS))


def quantize_weight(
    name: str, weight_NK: Tensor, quantization: Quantization, rounded: Tensor | None = None
) -> dict[str, Tensor]:
    """The two tensors that stand for the weight ``name``, by their names; the first is ``rounded`` if it is given."""
    quantize = quantize_int8 if quantization == "int8" else quantize_int4
    return dict(zip(quantized_names(name, quantization), quantize(weight_NK, rounded), strict=True))


def quantized_names(name: str, quantization: Quantization) -> tuple[str, str]:
    """The names of the two tensors that stand for the weight ``name``."""
    prefix = name.removesuffix("weight")
    return name, f"{prefix}scale" if quantization == "int8" else f"{prefix}scale_zero"


def dequantize_weight(weight: Tensor, scale: Tensor, quantization: Quantization) -> Tensor:
    """The float32 weight (N, K) that two tensors stand for."""
    return dequantize_int8(weight, scale) if quantization == "int8" else dequantize_int4(weight, scale)
