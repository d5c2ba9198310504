"""Linear layers with quantized weights: int8 with a scale per output, int4 with one per group of inputs.

Generation reads every weight once per token, so that the time of a token is the time of reading them: half the bytes
take nearly half the time. Weights are quantized, activations are not. The references are the specification. On a CPU,
PyTorch's kernels dequantize as they multiply; elsewhere, and for int8 where many rows share one read of the weights,
weights are dequantized first, as by the reference. This module chooses; ``COGVIEW_KERNELS=reference`` forces the
references. ``linear`` is for weights that are not quantized, ``linear_prepacked`` for float32 weights in MKL's packed
order.
"""

# M rows of the input, K inputs, N outputs, G groups of inputs that share a scale
from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.kernels.dispatch import forced_backend

GROUP = 64  # inputs that share a scale and a zero in int4; 32 where 64 does not divide them
BLOCK = 256  # rows quantized at a time: intermediate tensors stay in the processor's cache
DENSE_BLOCK = 1024  # rows dequantized at a time, for the same reason
# Rows that share one read of the weights, from which on dequantizing first is faster
# (scripts/benchmarks/linear_rows.py, on two cores without native bfloat16).
MANY_ROWS_INT8 = 40
MANY_ROWS_HALF = 4
# Rows of input that MKL packs weights for. Any number gives the same result, but weights packed for few rows are slow
# with many, and those packed for one row are slow with two.
PACKED_FOR = 64
# Rows that MKL multiplies at a time: it copies them, and keeps the memory of the largest copy.
PACKED_AT_ONCE = 1024


def quantize_int8(weight_NK: Tensor, quantized_NK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a weight to int8 with a scale per output.

    The scale is rounded before the weights, so that its rounding adds no error: a weight is off by half a step at most.

    Args:
        weight_NK: Weight of any floating-point dtype.
        quantized_NK: int8 tensor for the result; None to allocate one.

    Returns:
        int8 weights (N, K) and bfloat16 scales (N,).
    """
    if quantized_NK is None:
        quantized_NK = torch.empty_like(weight_NK, dtype=torch.int8)
    scales = []
    for rows, result in zip(weight_NK.split(BLOCK), quantized_NK.split(BLOCK), strict=True):
        rows = rows.to(torch.float32, copy=True)  # a copy to write to
        scale = (torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)) / 127).bfloat16()
        rows.div_(scale.float().masked_fill(scale == 0, 1.0).unsqueeze(1))
        result.copy_(rows.round_().clamp_(-127, 127))
        scales.append(scale)
    return quantized_NK, torch.cat(scales)


def dequantize_int8(quantized_NK: Tensor, scale_N: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights (N, K) of int8 values and their scales, in ``dtype``.

    Args:
        quantized_NK: int8 values (N, K).
        scale_N: Scales (N,).
        dtype: Dtype of the result.
    """
    return quantized_NK.to(dtype) * scale_N.to(dtype).unsqueeze(1)


def group_of(num_inputs: int) -> int:
    """Return the number of inputs that share a scale in int4.

    Raises:
        ValueError: ``num_inputs`` is no multiple of 32.
    """
    for group in (GROUP, 32):
        if num_inputs % group == 0:
            return group
    raise ValueError(f"int4 needs layers whose inputs are a multiple of 32, got {num_inputs}")


def quantize_int4(weight_NK: Tensor, packed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a weight to int4 with a scale and a zero point per group of inputs.

    A weight is about (q - 8) * scale + zero, with q from 0 to 15: the range of each group is represented exactly.

    Args:
        weight_NK: Weight of any floating-point dtype; K is a multiple of 32.
        packed: uint8 tensor (N, K / 2) for the result; None to allocate one.

    Returns:
        uint8 (N, K / 2), two values per byte, the first in the low half, and scales and zero points (G, N, 2) bfloat16.

    Raises:
        ValueError: K is no multiple of 32.
    """
    group = group_of(weight_NK.shape[1])
    if packed is None:
        packed = weight_NK.new_empty((len(weight_NK), weight_NK.shape[1] // 2), dtype=torch.uint8)
    scales, zeros = [], []
    for rows, result in zip(weight_NK.split(BLOCK), packed.split(BLOCK), strict=True):
        groups = rows.to(torch.float32, copy=True).unflatten(1, (-1, group))  # a copy to write to
        low, high = groups.amin(dim=2), groups.amax(dim=2)  # aminmax takes four times as long
        scale = ((high - low) / 15).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        groups.sub_(zero.float().unsqueeze(2)).div_(scale.float().masked_fill(scale == 0, 1.0).unsqueeze(2))
        result.copy_(pack_int4(groups.round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)))
        scales.append(scale)
        zeros.append(zero)
    return packed, torch.stack([torch.cat(scales).T, torch.cat(zeros).T], dim=2).contiguous()


def pack_int4(steps_NK: Tensor) -> Tensor:
    """Pack values (N, K) uint8 from 0 to 15 into bytes (N, K / 2), the first of two in the low half."""
    pairs = steps_NK.contiguous().view(torch.int16)  # the first of two in the low byte
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpack bytes (N, K / 2) into values (N, K) uint8 from 0 to 15."""
    wide = packed.to(torch.int16)
    return ((wide | (wide << 4)) & 0x0F0F).view(torch.uint8)


def dequantize_int4(packed: Tensor, scales_and_zeros_GN2: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights (N, K) of packed int4 values, scales and zero points, in ``dtype``.

    Args:
        packed: uint8 (N, K / 2), two values in a byte.
        scales_and_zeros_GN2: Scales and zero points (G, N, 2).
        dtype: Dtype of the result.
    """
    num_groups, num_outputs, _ = scales_and_zeros_GN2.shape
    steps_NGg = unpack_int4(packed).view(num_outputs, num_groups, -1).to(dtype) - 8
    scale_NG, zero_NG = scales_and_zeros_GN2.to(dtype).permute(2, 1, 0)
    weight_NK: Tensor = (steps_NGg * scale_NG.unsqueeze(2) + zero_NG.unsqueeze(2)).flatten(1)
    return weight_NK


def linear_int8_reference(x: Tensor, quantized_NK: Tensor, scale_N: Tensor, bias_N: Tensor) -> Tensor:
    """Compute x W^T + b with an int8 weight, dequantized block by block.

    Args:
        x: Inputs (..., K), of any floating-point dtype.
        quantized_NK: int8 weight.
        scale_N: bfloat16 scales.
        bias_N: Bias.

    Returns:
        Outputs (..., N) in the dtype of ``x``.
    """
    block, dtype = _compute_plan(x)
    parts = zip(quantized_NK.split(block), scale_N.split(block), strict=True)
    return _dequantized_matmul(x, (dequantize_int8(*part, dtype) for part in parts), bias_N)


def linear_int4_reference(x: Tensor, packed: Tensor, scales_and_zeros_GN2: Tensor, bias_N: Tensor) -> Tensor:
    """Compute x W^T + b with an int4 weight, dequantized block by block.

    Args:
        x: Inputs (..., K), of any floating-point dtype.
        packed: uint8 weight (N, K / 2).
        scales_and_zeros_GN2: bfloat16 scales and zero points.
        bias_N: Bias.

    Returns:
        Outputs (..., N) in the dtype of ``x``.
    """
    block, dtype = _compute_plan(x)
    parts = zip(packed.split(block), scales_and_zeros_GN2.split(block, dim=1), strict=True)
    return _dequantized_matmul(x, (dequantize_int4(*part, dtype) for part in parts), bias_N)


def linear_int8(x: Tensor, quantized_NK: Tensor, scale_N: Tensor, bias_N: Tensor) -> Tensor:
    """Compute ``linear_int8_reference`` with the fastest implementation, equal up to the rounding of bfloat16.

    Args:
        x: Input (..., K).
        quantized_NK: int8 weights (N, K).
        scale_N: Scales (N,).
        bias_N: Bias (N,).

    Returns:
        The product with bias (..., N), in the dtype of ``x``.
    """
    rows_MK = x.reshape(-1, x.shape[-1])
    if not has_quantized_kernels(x.device) or len(rows_MK) >= MANY_ROWS_INT8:
        return linear_int8_reference(x, quantized_NK, scale_N, bias_N)
    # In bfloat16: the kernel has no fast variant for other dtypes.
    product_MN = torch._weight_int8pack_mm(rows_MK.bfloat16().contiguous(), quantized_NK, scale_N)
    return (product_MN + bias_N).to(x.dtype).view(*x.shape[:-1], -1)


def pack_int4_for_cpu(packed: Tensor) -> Tensor:
    """Return bytes (N, K / 2) in the order of this processor's kernel, which differs between processors."""
    # The order is defined within 64 rows; blocks keep the int32 input of the conversion small.
    result = torch.empty_like(packed)
    for rows, part in zip(packed.split(BLOCK), result.split(BLOCK), strict=True):
        part.copy_(torch._convert_weight_to_int4pack_for_cpu(unpack_int4(rows).int(), 1).view_as(part))
    return result


def linear_int4_packed(x: Tensor, cpu_packed: Tensor, scales_and_zeros_GN2: Tensor, bias_N: Tensor) -> Tensor:
    """Compute ``linear_int4_reference`` for weights of ``pack_int4_for_cpu``, up to the rounding of bfloat16.

    Args:
        x: Input (..., K).
        cpu_packed: Weights of ``pack_int4_for_cpu``.
        scales_and_zeros_GN2: Scales and zero points (G, N, 2).
        bias_N: Bias (N,).

    Returns:
        The product with bias (..., N), in the dtype of ``x``.
    """
    rows_MK = x.reshape(-1, x.shape[-1])
    group = x.shape[-1] // len(scales_and_zeros_GN2)
    product_MN = torch._weight_int4pack_mm_for_cpu(
        rows_MK.bfloat16().contiguous(), cpu_packed, group, scales_and_zeros_GN2
    )
    return (product_MN + bias_N).to(x.dtype).view(*x.shape[:-1], -1)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Compute x W^T + b for a weight that is not quantized.

    A CPU that emulates 16-bit products computes many rows faster in float32, conversion included.

    Args:
        x: Inputs (..., K).
        weight_NK: Weight, in the dtype of ``x``, or in 16 bits for float32 ``x``.
        bias_N: Bias, in the dtype of ``x``, or None.

    Returns:
        Outputs (..., N) in the dtype of ``x``.
    """
    if x.dtype == torch.float32 and weight_NK.dtype in (torch.float16, torch.bfloat16):
        weight_NK = weight_NK.float()
    slow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not cpu_multiplies_bfloat16()
    if slow and not x.requires_grad and x.numel() >= MANY_ROWS_HALF * x.shape[-1]:
        return _dequantized_matmul(x, (rows.float() for rows in weight_NK.split(DENSE_BLOCK)), bias_N)
    return F.linear(x, weight_NK, bias_N)


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether MKL has a packed order for weights of ``dtype`` on ``device``: on a CPU, in float32."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    return torch.backends.mkl.is_available() and forced_backend(device.type) not in ("reference", "triton")


def prepack(weight_NK: Tensor) -> Tensor:
    """Return the weight in MKL's packed order, an opaque tensor for ``linear_prepacked``.

    With 4 to 64 rows of input the product takes a half to a third of the time (``scripts/benchmarks/linear_rows.py``).
    """
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight_NK.detach(), PACKED_FOR)
    return packed


@cache
def fewest_equal_rows() -> int:
    """Return the number of rows from which on MKL gives a row the same bits in any batch.

    On processors of Intel it is 1. On those of AMD, MKL multiplies up to three rows in another order of summation.
    """
    generator = torch.Generator().manual_seed(0)
    x_MK, weight_NK = torch.randn(16, 64, generator=generator), torch.randn(64, 64, generator=generator)
    packed, multiply = prepack(weight_NK), torch.ops.mkl._mkl_linear
    product_MN = multiply(x_MK, packed, weight_NK, None, 16)
    equal = [
        torch.equal(multiply(x_MK[:rows], packed, weight_NK, None, rows), product_MN[:rows]) for rows in range(1, 16)
    ]
    return next((rows for rows in (1, 2, 4, 8) if all(equal[rows - 1 :])), 16)


def linear_prepacked(x: Tensor, packed: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Compute x W^T + b with a prepacked weight, without gradients.

    A row of the result is the same bit for bit whatever the other rows are, which ``linear`` does not guarantee.

    Args:
        x: Inputs (..., K), float32.
        packed: ``prepack(weight_NK)``.
        weight_NK: The weight itself, float32.
        bias_N: Bias, float32; None for no bias.

    Returns:
        Outputs (..., N), float32.
    """
    multiply = torch.ops.mkl._mkl_linear
    missing = fewest_equal_rows() - x.numel() // x.shape[-1]
    if missing > 0:
        rows_MK = F.pad(x.reshape(-1, x.shape[-1]), (0, 0, 0, missing))
        padded_MN: Tensor = multiply(rows_MK, packed, weight_NK, bias_N, len(rows_MK))
        return padded_MN[:-missing].reshape(*x.shape[:-1], -1)
    if x.numel() <= PACKED_AT_ONCE * x.shape[-1]:
        product: Tensor = multiply(x, packed, weight_NK, bias_N, x.numel() // x.shape[-1])
        return product
    rows_MK = x.reshape(-1, x.shape[-1])
    product_MN = x.new_empty(len(rows_MK), len(weight_NK))
    for part, result in zip(rows_MK.split(PACKED_AT_ONCE), product_MN.split(PACKED_AT_ONCE), strict=True):
        result.copy_(multiply(part, packed, weight_NK, bias_N, len(part)))
    return product_MN.view(*x.shape[:-1], -1)


def has_quantized_kernels(device: torch.device) -> bool:
    """Return whether PyTorch's kernels for quantized weights are used on ``device``."""
    return device.type == "cpu" and forced_backend(device.type) != "reference"


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 natively; the answer of oneDNN counts emulation as support."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _compute_plan(x: Tensor) -> tuple[int, torch.dtype]:
    """Return the rows to dequantize at a time, and the dtype of the product: float32 if that is faster on a CPU."""
    if x.device.type != "cpu":
        return 1 << 20, x.dtype
    return DENSE_BLOCK, x.dtype if cpu_multiplies_bfloat16() else torch.float32


def _dequantized_matmul(x: Tensor, weights: Iterable[Tensor], bias_N: Tensor | None) -> Tensor:
    """Compute x W^T + b for a weight given in blocks of rows, in the dtype of the blocks."""
    products = [F.linear(x.to(block.dtype), block) for block in weights]
    product = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    return (product if bias_N is None else product + bias_N).to(x.dtype)
