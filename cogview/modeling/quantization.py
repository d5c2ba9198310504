"""Quantized linear layers, and the weights of a transformer that they hold.

The four projections of every layer are 96% of the 4-billion-parameter model and are read whole for every token; only
they are quantized. Embeddings, norms and biases keep their dtype. ``cogview.kernels.linear`` has the arithmetic.
"""

# N outputs, K inputs, G groups of inputs that share a scale
from __future__ import annotations

import torch
from torch import Tensor, nn

from cogview.device import Quantization
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


class Int8Linear(nn.Module):
    """Linear layer x W^T + b with an int8 weight.

    Attributes:
        weight: (N, K) int8.
        scale: (N,) bfloat16, one per output.
        bias: (N,) of the model's dtype.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_outputs, num_inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(num_outputs, dtype=torch.bfloat16))
        self.register_buffer("bias", torch.zeros(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., N) in the dtype of ``x`` (..., K)."""
        return linear_int8(x, self.weight, self.scale, self.bias)


class Int4Linear(nn.Module):
    """Linear layer x W^T + b with an int4 weight.

    Attributes:
        weight: (N, K / 2) uint8, two values per byte.
        scales_and_zeros: (G, N, 2) bfloat16: scale and zero point of each group of inputs.
        bias: (N,) of the model's dtype.
        cpu_packed: Whether the bytes of ``weight`` are in the order of this processor's kernel
            (``pack_int4_for_cpu``).
    """

    weight: Tensor
    scales_and_zeros: Tensor
    bias: Tensor

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        groups = num_inputs // group_of(num_inputs)
        self.register_buffer("weight", torch.zeros(num_outputs, num_inputs // 2, dtype=torch.uint8))
        self.register_buffer("scales_and_zeros", torch.zeros(groups, num_outputs, 2, dtype=torch.bfloat16))
        self.register_buffer("bias", torch.zeros(num_outputs))
        self.cpu_packed = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., N) in the dtype of ``x`` (..., K)."""
        compute = linear_int4_packed if self.cpu_packed else linear_int4_reference
        return compute(x, self.weight, self.scales_and_zeros, self.bias)


_LAYERS: dict[Quantization, type[Int8Linear] | type[Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}


def swap_quantized_linears(transformer: nn.Module, quantization: Quantization) -> None:
    """Replace the projections of ``transformer`` by quantized layers without weights; call it on the meta device.

    Args:
        transformer: The transformer, on the meta device.
        quantization: int8 or int4.
    """
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(PROJECTIONS)):
            transformer.set_submodule(name, _LAYERS[quantization](module.in_features, module.out_features))


def is_quantized(name: str) -> bool:
    """Return whether the weight ``name`` of a transformer is among those that a quantization covers."""
    return name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS))


def quantize_weight(
    name: str, weight_NK: Tensor, quantization: Quantization, out: Tensor | None = None
) -> dict[str, Tensor]:
    """Quantize a weight.

    Args:
        name: Parameter name of the weight.
        weight_NK: Floating-point weight.
        quantization: Format of the result.
        out: Tensor that receives the quantized values.

    Returns:
        The quantized weight and its scales, by their names (``quantized_names``).
    """
    quantize = quantize_int8 if quantization == "int8" else quantize_int4
    return dict(zip(quantized_names(name, quantization), quantize(weight_NK, out), strict=True))


def quantized_names(name: str, quantization: Quantization) -> tuple[str, str]:
    """Return the names of the two tensors that represent the weight ``name``: quantized values and scales.

    Args:
        name: Name of the weight.
        quantization: int8 or int4.
    """
    prefix = name.removesuffix("weight")
    return name, f"{prefix}scale" if quantization == "int8" else f"{prefix}scales_and_zeros"


def dequantize_weight(weight: Tensor, scale: Tensor, quantization: Quantization) -> Tensor:
    """Return the float32 weight (N, K) of quantized values and their scales.

    Args:
        weight: Quantized values: int8 (N, K) or packed int4 (N, K / 2).
        scale: Scales (N,), or scales and zero points (G, N, 2).
        quantization: int8 or int4.
    """
    return dequantize_int8(weight, scale) if quantization == "int8" else dequantize_int4(weight, scale)
