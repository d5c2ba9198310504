"""Linear layers whose weights are stored in few bits: int8 with a scale per row, int4 with one per group of inputs.

Drawing one picture reads every weight once per token, so the time of a token is the time to read them: half the bytes
are nearly half the time. Weights are rounded, activations are not. The readable references are the specification. On
a CPU, PyTorch's kernels unpack the weights as they multiply; elsewhere, and for int8 where many rows share one reading,
the weights are unpacked first, as the reference does. The choice is made here; ``COGVIEW_KERNELS=reference`` forces the
references. ``linear`` is for weights that are not rounded, ``linear_packed`` for float32 weights in MKL's own order.
"""

# M rows of the input, K inputs, N outputs, G inputs that share a scale
from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 64  # inputs that share a scale and a zero in int4; 32 where 64 does not divide them
BLOCK = 256  # rows rounded at a time: what is made on the way stays in the processor's cache
DENSE_BLOCK = 1024  # rows unpacked at a time, for the same reason
# Rows that share one reading of the weights, from which on it pays to unpack them first
# (scripts/benchmarks/linear_rows.py, on two cores without bfloat16 of their own).
MANY_ROWS_INT8 = 40
MANY_ROWS_HALF = 4
# Rows of input that MKL packs weights for. It uses them for any number, with the same result; packed for few, it is
# slow with many, and packed for one, slow with two.
PACKED_FOR = 64
# Rows that it multiplies at one go: it copies them, and keeps the memory of the largest copy there was.
PACKED_AT_ONCE = 1024


def quantize_int8(weight_NK: Tensor, quantized_NK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 (N, K) and bfloat16 (N,): ``weight`` is about the one times the other, off by half a step at most.

    The scale is rounded before the weights are, so that its own rounding does not add to theirs. ``quantized_NK`` is
    written to if it is given.
    """
    if quantized_NK is None:
        quantized_NK = torch.empty_like(weight_NK, dtype=torch.int8)
    scales = []
    for rows, result in zip(weight_NK.split(BLOCK), quantized_NK.split(BLOCK), strict=True):
        rows = rows.to(torch.float32, copy=True)  # ours to write to
        scale = (torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)) / 127).bfloat16()
        rows.div_(scale.float().masked_fill(scale == 0, 1.0).unsqueeze(1))
        result.copy_(rows.round_().clamp_(-127, 127))
        scales.append(scale)
    return quantized_NK, torch.cat(scales)


def dequantize_int8(quantized_NK: Tensor, scale_N: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights (N, K) that they stand for."""
    return quantized_NK.to(dtype) * scale_N.to(dtype).unsqueeze(1)


def group_of(num_inputs: int) -> int:
    """How many inputs share a scale in int4; ValueError where K is no multiple of 32."""
    for group in (GROUP, 32):
        if num_inputs % group == 0:
            return group
    raise ValueError(f"int4 needs layers whose inputs are a multiple of 32, got {num_inputs}")


def quantize_int4(weight_NK: Tensor, packed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """uint8 (N, K / 2), two weights to a byte, the first in its low half; and bfloat16 (K / G, N, 2), scale and zero.

    A weight is about (q - 8) * scale + zero of its group, q from 0 to 15: the range of each group is met exactly.
    ``packed`` is written to if it is given.
    """
    group = group_of(weight_NK.shape[1])
    if packed is None:
        packed = weight_NK.new_empty((len(weight_NK), weight_NK.shape[1] // 2), dtype=torch.uint8)
    scales, zeros = [], []
    for rows, result in zip(weight_NK.split(BLOCK), packed.split(BLOCK), strict=True):
        groups = rows.to(torch.float32, copy=True).unflatten(1, (-1, group))  # ours to write to
        low, high = groups.amin(dim=2), groups.amax(dim=2)  # aminmax takes four times as long
        scale = ((high - low) / 15).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        groups.sub_(zero.float().unsqueeze(2)).div_(scale.float().masked_fill(scale == 0, 1.0).unsqueeze(2))
        result.copy_(pack_int4(groups.round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)))
        scales.append(scale)
        zeros.append(zero)
    return packed, torch.stack([torch.cat(scales).T, torch.cat(zeros).T], dim=2).contiguous()


def pack_int4(steps_NK: Tensor) -> Tensor:
    """Two steps (uint8, 0 to 15) to a byte: (N, K / 2)."""
    pairs = steps_NK.contiguous().view(torch.int16)  # the first of two in the low byte
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """The steps (N, K) uint8 of (N, K / 2) bytes."""
    wide = packed.to(torch.int16)
    return ((wide | (wide << 4)) & 0x0F0F).view(torch.uint8)


def dequantize_int4(packed: Tensor, scales_and_zeros_GN2: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights (N, K) that they stand for."""
    num_groups, num_outputs, _ = scales_and_zeros_GN2.shape
    steps_NGg = unpack_int4(packed).view(num_outputs, num_groups, -1).to(dtype) - 8
    scale_NG, zero_NG = scales_and_zeros_GN2.to(dtype).permute(2, 1, 0)
    return (steps_NGg * scale_NG.unsqueeze(2) + zero_NG.unsqueeze(2)).flatten(1)


def linear_int8_reference(x: Tensor, quantized_NK: Tensor, scale_N: Tensor, bias_N: Tensor) -> Tensor:
    """x W^T + b for W in int8: (..., N) in the dtype of ``x`` (..., K)."""
    block, dtype = _compute_plan(x)
    parts = zip(quantized_NK.split(block), scale_N.split(block), strict=True)
    return _dequantized_matmul(x, (dequantize_int8(*part, dtype) for part in parts), bias_N)


def linear_int4_reference(x: Tensor, packed: Tensor, scales_and_zeros_GN2: Tensor, bias_N: Tensor) -> Tensor:
    """x W^T + b for W in int4: (..., N) in the dtype of ``x`` (..., K)."""
    block, dtype = _compute_plan(x)
    parts = zip(packed.split(block), scales_and_zeros_GN2.split(block, dim=1), strict=True)
    return _dequantized_matmul(x, (dequantize_int4(*part, dtype) for part in parts), bias_N)


def linear_int8(x: Tensor, quantized_NK: Tensor, scale_N: Tensor, bias_N: Tensor) -> Tensor:
    """Equal to ``linear_int8_reference`` up to the rounding of bfloat16."""
    rows_MK = x.reshape(-1, x.shape[-1])
    if not has_native_kernels(x.device) or len(rows_MK) >= MANY_ROWS_INT8:
        return linear_int8_reference(x, quantized_NK, scale_N, bias_N)
    # In bfloat16: for others the kernel has no fast form.
    product_MN = torch._weight_int8pack_mm(rows_MK.bfloat16().contiguous(), quantized_NK, scale_N)
    return (product_MN + bias_N).to(x.dtype).view(*x.shape[:-1], -1)


def pack_int4_for_cpu(packed: Tensor) -> Tensor:
    """The bytes of (N, K / 2) in the order that this processor's kernel wants; it is another on other processors."""
    # The kernel's order is one within 64 rows; so many at a time keep the int32 that it wants small.
    result = torch.empty_like(packed)
    for rows, part in zip(packed.split(BLOCK), result.split(BLOCK), strict=True):
        part.copy_(torch._convert_weight_to_int4pack_for_cpu(unpack_int4(rows).int(), 1).view_as(part))
    return result


def linear_int4_packed(x: Tensor, ordered: Tensor, scales_and_zeros_GN2: Tensor, bias_N: Tensor) -> Tensor:
    """``linear_int4_reference`` for weights in the order of ``order_int4_for_cpu``, up to the rounding of bfloat16."""
    rows_MK = x.reshape(-1, x.shape[-1])
    group = x.shape[-1] // len(scales_and_zeros_GN2)
    product_MN = torch._weight_int4pack_mm_for_cpu(rows_MK.bfloat16().contiguous(), ordered, group, scales_and_zeros_GN2)
    return (product_MN + bias_N).to(x.dtype).view(*x.shape[:-1], -1)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    """x W^T + b for weights as they are: (..., N) in the dtype of ``x`` (..., K).

    A CPU that has to emulate 16-bit products does many of them faster in float32, the conversion included.
    """
    slow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not cpu_multiplies_bfloat16()
    if slow and not x.requires_grad and x.numel() >= MANY_ROWS_HALF * x.shape[-1]:
        return _dequantized_matmul(x, (rows.float() for rows in weight_NK.split(DENSE_BLOCK)), bias_N)
    return F.linear(x, weight_NK, bias_N)


def can_prepack(weight_NK: Tensor) -> bool:
    """Whether MKL has an order of its own for these weights: on a CPU, in float32."""
    if weight_NK.device.type != "cpu" or weight_NK.dtype != torch.float32:
        return False
    return torch.backends.mkl.is_available() and os.environ.get("COGVIEW_KERNELS") != "reference"


def prepack(weight_NK: Tensor) -> Tensor:
    """The weights in the order in which MKL multiplies them, opaque to all but ``linear_packed``.

    For 4 to 64 rows of input the product takes a half to a third of the time (``scripts/benchmarks/linear_rows.py``).
    """
    return torch.ops.mkl._mkl_reorder_linear_weight(weight_NK.detach(), PACKED_FOR)


def linear_prepacked(x: Tensor, packed: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x W^T + b, (..., N) float32, for ``packed = pack(weight_NK)``; knows no gradients.

    A row of the result is the same bit for bit whatever other rows there are, which ``linear`` does not promise.
    """
    multiply = torch.ops.mkl._mkl_linear
    if x.numel() <= PACKED_AT_ONCE * x.shape[-1]:
        return multiply(x, packed, weight_NK, bias_N, x.numel() // x.shape[-1])
    rows_MK = x.reshape(-1, x.shape[-1])
    product_MN = x.new_empty(len(rows_MK), len(weight_NK))
    for part, product in zip(rows_MK.split(PACKED_AT_ONCE), product_MN.split(PACKED_AT_ONCE), strict=True):
        product.copy_(multiply(part, packed, weight_NK, bias_N, len(part)))
    return product_MN.view(*x.shape[:-1], -1)


def has_native_kernels(device: torch.device) -> bool:
    """Whether PyTorch's kernels for few bits are used on ``device``."""
    return device.type == "cpu" and os.environ.get("COGVIEW_KERNELS") != "reference"


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16; oneDNN's own answer counts emulation as support."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _compute_plan(x: Tensor) -> tuple[int, torch.dtype]:
    """How many rows of weights to unpack at a time, and the dtype to multiply in: float32 where a CPU is faster so."""
    if x.device.type != "cpu":
        return 1 << 20, x.dtype
    return DENSE_BLOCK, x.dtype if cpu_multiplies_bfloat16() else torch.float32


def _dequantized_matmul(x: Tensor, weights: Iterable[Tensor], bias_N: Tensor) -> Tensor:
    """x W^T + b for W that comes a block of rows at a time, in the dtype of the blocks."""
    products = [F.linear(x.to(block.dtype), block) for block in weights]
    product = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    return (product + bias_N).to(x.dtype)
