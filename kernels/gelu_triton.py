"""GELU of a product and its bias in Triton, forward and backward; ``gelu.py`` dispatches to it.

Both passes compute in float32 from ``x`` and ``bias``; their sum is not stored. Each program sums the gradient of the
bias over its rows, then these are summed over the programs: no two programs write to the same address, and results are
deterministic.
"""

# N rows, D width, R rows and C columns of a block, P programs for the same columns
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview.kernels.triton_utils import as_rows, check_floats

COLUMNS, ROWS, WARPS = 512, 8, 8  # of a block
ROW_BLOCKS = 16  # of a program of the backward pass, at most
TWICE_SQRT_2_PI = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _block(row_block, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows (R, 1), columns (1, C) and a mask; int64, since a long batch has more than 2**31 elements."""
    row = (row_block * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < num_rows) & (column < size)


@triton.jit
def _sum(x_ptr, bias_ptr, row, column, inside, stride, size):
    """Return x + bias (R, C) in float32."""
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    return x + tl.load(bias_ptr + column, mask=column < size, other=0.0).to(tl.float32)


@triton.jit
def _gate(z):
    """Return sigmoid(u) and its derivative, for gelu(z) = z sigmoid(u), u = 2 sqrt(2 / pi) (z + 0.044715 z^3).

    Both follow from exp(-|u|), which cannot overflow, without cancellation.
    """
    u = TWICE_SQRT_2_PI * z * (1.0 + CUBIC * z * z)
    small = tl.exp(-tl.abs(u))
    whole = 1.0 / (1.0 + small)
    return tl.where(u >= 0, 1.0, small) * whole, small * whole * whole


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr, bias_ptr, out_ptr, stride, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, column, inside = _block(tl.program_id(0), num_rows, size, ROWS, COLUMNS)
    z = _sum(x_ptr, bias_ptr, row, column, inside, stride, size)
    gate, _ = _gate(z)
    tl.store(out_ptr + row * size + column, (z * gate).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    d_out_ptr, x_ptr, bias_ptr, d_x_ptr, partial_ptr, d_out_stride, stride, num_rows, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sum_d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row_block in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row, column, inside = _block(row_block, num_rows, size, ROWS, COLUMNS)
        z = _sum(x_ptr, bias_ptr, row, column, inside, stride, size)
        d_out = tl.load(d_out_ptr + row * d_out_stride + column, mask=inside, other=0.0).to(tl.float32)
        gate, slope = _gate(z)
        d_u = TWICE_SQRT_2_PI * (1.0 + 3.0 * CUBIC * z * z)
        d_x = d_out * (gate + z * slope * d_u)
        tl.store(d_x_ptr + row * size + column, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
        sum_d_bias += d_x
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(partial_ptr + tl.program_id(0) * size.to(tl.int64) + column, tl.sum(sum_d_bias, 0), mask=column < size)


def bias_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    """Compute ``bias_gelu`` with the Triton kernels; differentiable.

    Args:
        x: Product without its bias, (..., D).
        bias: (D,), of any supported dtype.

    Returns:
        gelu(x + bias) in the shape and dtype of ``x``.

    Raises:
        ValueError: The kernels do not support the inputs; nothing was launched.
    """
    check_floats("x", x)
    check_floats("bias", bias)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., D) with D from 1 on, got {tuple(x.shape)}")
    if bias.shape != x.shape[-1:] or bias.device != x.device:
        raise ValueError(f"bias must be {tuple(x.shape[-1:])} on {x.device}, got {tuple(bias.shape)} on {bias.device}")
    out: Tensor = _bias_gelu(x, bias)
    return out


@torch.library.custom_op("cogview::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    x_ND, out = as_rows(x), x.new_empty(x.shape)
    num_rows, size = x_ND.shape
    _forward_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(size, COLUMNS))](
        x_ND, bias.contiguous(), out, x_ND.stride(0), num_rows, size, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return out


@_bias_gelu.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("cogview::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(d_out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x``, and of ``bias`` in float32."""
    d_out_ND, x_ND, d_x = as_rows(d_out), as_rows(x), x.new_empty(x.shape)
    num_rows, size = x_ND.shape
    programs = triton.cdiv(num_rows, ROWS * ROW_BLOCKS)
    partial_PD = x.new_empty(programs, size, dtype=torch.float32)
    _backward_kernel[(programs, triton.cdiv(size, COLUMNS))](
        d_out_ND, x_ND, bias.contiguous(), d_x, partial_PD, d_out_ND.stride(0), x_ND.stride(0), num_rows, size,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return d_x, partial_PD.sum(dim=0)


@_bias_gelu_backward.register_fake
def _(d_out, x, bias):
    return x.new_empty(x.shape), bias.new_empty(bias.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_out):
    x, bias = ctx.saved_tensors
    d_x, d_bias = _bias_gelu_backward(d_out, x, bias)
    return d_x, d_bias.to(bias.dtype)


_bias_gelu.register_autograd(_backward, setup_context=_setup_context)
