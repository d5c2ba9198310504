"""Native kernels of training on a CPU, with gradients: norms of Sandwich-LN, GELU, attention of packed rows, losses.

A training step on a CPU waits for memory as much as for its matrix products: a norm is ten of PyTorch's operations,
forward and backward, each of which reads and writes all activations. Here it is one for each direction, and autocast's
conversions are part of it. Activations are float32 or bfloat16, computed in float32. The references of
``layer_norm.py``, ``gelu.py``, ``attention.py`` and ``fused_linear_cross_entropy.py`` are the specification; PyTorch's
operations run where ``runs_native_training`` is false.
"""

# N positions, D width, H heads, K size of a head, M rows of logits, I candidate ids
from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview.kernels.native import FORMATS, load_library, num_threads, uses_native_kernels

NATIVE_DTYPES = (torch.float32, torch.bfloat16)  # of activations
LANES = 16  # floats of the widest registers: widths must be multiples
MAX_KEYS = 256  # of a row: PyTorch's fused attention is faster for longer ones
Blocks = tuple[tuple[int, int], ...]  # rows and positions of each block of packed rows


class SandwichCall(ctypes.Structure):
    """``Sandwich`` of ``c/training.c``."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("format", "rows", "width")),
        *((name, ctypes.c_void_p) for name in ("x", "branch", "weight", "bias", "next_weight", "next_bias")),
        *((name, ctypes.c_void_p) for name in ("total", "normed", "statistics", "d_total", "d_normed", "d_x")),
        *((name, ctypes.c_void_p) for name in ("d_branch", "sums")),
    )


class PackedAttentionCall(ctypes.Structure):
    """``PackedAttention`` of ``c/training.c``."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("format", "rows", "heads", "size", "longest")),
        *((name, ctypes.c_void_p) for name in ("starts", "lengths", "qkv", "mixed", "log_sums", "d_mixed", "d_qkv")),
    )


def runs_native_training(x: Tensor, width: int = LANES) -> bool:
    """Return whether the kernels run for ``x``: on a CPU, where gradients are recorded.

    Args:
        x: Activations.
        width: Width of an axis that is computed in whole registers, such as the last one or that of a head.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or x.dtype not in NATIVE_DTYPES:
        return False
    if width % LANES or torch.compiler.is_compiling():
        return False
    return uses_native_kernels(x.device, torch.float32, "training")


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the library with the types of its arguments."""
    library = load_library("training")
    pointer, whole, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    types = {
        "cogview_sandwich": (pointer, number, number),
        "cogview_packed_attention": (pointer, number, number),
        "cogview_gelu": (whole, pointer, pointer, pointer, whole, whole, pointer, pointer, number),
        "cogview_losses": (whole, pointer, whole, whole, whole, pointer, pointer, number, pointer, number),
    }
    for name, arguments in types.items():
        function = getattr(library, name)
        function.restype, function.argtypes = None, arguments
    return library


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


class _SandwichNorm(torch.autograd.Function):
    """x + norm(branch), and the norm of that sum; or the norm of x alone."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, x: Tensor, branch: Tensor | None, *norms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, next_weight = x.contiguous(), norms[2]
        branch = None if branch is None else branch.contiguous()
        total = x if branch is None else torch.empty_like(x)
        normed = torch.empty_like(x, dtype=dtype) if next_weight is not None else x.new_empty(0)
        statistics = x.new_empty(x.numel() // x.shape[-1], 4)
        call = _sandwich_call(dtype, x, branch, total, statistics, norms)
        call.normed = _pointer(normed)
        _library().cogview_sandwich(ctypes.byref(call), 0, num_threads())
        ctx.save_for_backward(branch, total, statistics, *norms)
        ctx.dtype = dtype
        ctx.set_materialize_grads(False)
        first = x.new_empty(0) if branch is None else total
        absent = ((first, branch), (normed, next_weight))  # results that are not computed
        ctx.mark_non_differentiable(*(result for result, source in absent if source is None))
        return first, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        branch, total, statistics, *norms = ctx.saved_tensors
        width, threads = total.shape[-1], num_threads()
        if d_total is None and d_normed is None:
            return (None,) * 7
        d_total = None if d_total is None or branch is None else d_total.contiguous()
        d_normed = None if d_normed is None or norms[2] is None else d_normed.to(ctx.dtype).contiguous()
        d_x = d_total if d_normed is None else torch.empty_like(total)
        d_branch = None if branch is None else torch.empty_like(branch)
        sums = total.new_zeros(threads, 4, width)  # there may be fewer threads
        call = _sandwich_call(ctx.dtype, total, branch, total, statistics, norms)
        call.d_total, call.d_normed, call.d_x = _pointer(d_total), _pointer(d_normed), _pointer(d_x)
        call.d_branch, call.sums = _pointer(d_branch), _pointer(sums)
        _library().cogview_sandwich(ctypes.byref(call), 1, threads)
        d_weight, d_bias, d_next_weight, d_next_bias = sums.sum(dim=0) if threads > 1 else sums[0]
        first = (d_weight, d_bias) if branch is not None else (None, None)
        second = (d_next_weight, d_next_bias) if d_normed is not None else (None, None)
        return None, d_x, d_branch, *first, *second


def _sandwich_call(
    dtype: torch.dtype,
    x: Tensor,
    branch: Tensor | None,
    total: Tensor,
    statistics: Tensor,
    norms: Sequence[Tensor | None],
) -> SandwichCall:
    """Return the arguments that both directions share; ``norms`` has weight and bias of this norm, and of the next."""
    names = ("x", "branch", "total", "statistics", "weight", "bias", "next_weight", "next_bias")
    pointers = map(_pointer, (x, branch, total, statistics, *norms))
    return SandwichCall(
        format=FORMATS[dtype],
        rows=x.numel() // x.shape[-1],
        width=x.shape[-1],
        **dict(zip(names, pointers, strict=True)),
    )


def layer_norm_native(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``pb_relax_layer_norm_reference`` with gradients.

    Args:
        x: Tokens (..., D), float32.
        weight: (D,), float32.
        bias: (D,), float32.
        dtype: Dtype of the result: float32, or bfloat16 for products under autocast.
    """
    normed: Tensor = _SandwichNorm.apply(dtype, x, None, None, None, weight, bias)[1]  # type: ignore[no-untyped-call]
    return normed


def sandwich_native(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, next_weight: Tensor | None, next_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute ``sandwich_layer_norm_reference`` with gradients.

    Args:
        x: Residual stream (..., D), float32.
        branch: Branch output (..., D), float32 or bfloat16.
        weight: Weight (D,) of the norm of the branch, float32, as the following.
        bias: Its bias.
        next_weight: Weight (D,) of the norm before the next branch; None for none.
        next_bias: Bias of that norm.

    Returns:
        The sum, float32, and its norm in the dtype of ``branch``, or None.
    """
    total, normed = _SandwichNorm.apply(  # type: ignore[no-untyped-call]
        branch.dtype, x, branch, weight, bias, next_weight, next_bias
    )
    return total, None if next_weight is None else normed


class _BiasGelu(torch.autograd.Function):
    """GELU of a product and its bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        result = torch.empty_like(x)
        _gelu(x, bias, None, result, None)
        ctx.save_for_backward(x, bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        d_x, sums = torch.empty_like(x), bias.new_zeros(num_threads(), len(bias))
        _gelu(x, bias, d_result.contiguous(), d_x, sums)
        return d_x, sums.sum(dim=0)


def _gelu(x: Tensor, bias: Tensor, d_result: Tensor | None, result: Tensor, sums: Tensor | None) -> None:
    width = x.shape[-1]
    _library().cogview_gelu(
        *(FORMATS[x.dtype], x.data_ptr(), bias.data_ptr(), _pointer(d_result), x.numel() // width, width),
        *(result.data_ptr(), _pointer(sums), num_threads()),
    )


def bias_gelu_native(x: Tensor, bias: Tensor) -> Tensor:
    """Compute ``bias_gelu_reference`` with gradients.

    Args:
        x: Product without its bias (..., D), float32 or bfloat16.
        bias: (D,), float32.
    """
    result: Tensor = _BiasGelu.apply(x, bias)  # type: ignore[no-untyped-call]
    return result


class _PackedAttention(torch.autograd.Function):
    """Causal attention of rows that follow each other."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, blocks: Blocks) -> Tensor:
        qkv = qkv.contiguous()
        width = qkv.shape[1] // 3
        mixed, log_sums = qkv.new_empty(len(qkv), width), qkv.new_empty(len(qkv), num_heads, dtype=torch.float32)
        lengths = torch.tensor([length for rows, length in blocks for _ in range(rows)])
        call = PackedAttentionCall(
            format=FORMATS[qkv.dtype],
            rows=len(lengths),
            heads=num_heads,
            size=width // num_heads,
            longest=int(lengths.max()),
        )
        tensors = (qkv, mixed, log_sums, lengths, lengths.cumsum(0) - lengths)
        _attend(call, tensors, None, None)
        ctx.save_for_backward(*tensors)
        ctx.call = call
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mixed: Tensor) -> tuple[Tensor, None, None]:
        tensors = ctx.saved_tensors
        d_qkv = torch.empty_like(tensors[0])
        _attend(ctx.call, tensors, d_mixed.contiguous(), d_qkv)
        return d_qkv, None, None


def _attend(call: PackedAttentionCall, tensors: Sequence[Tensor], d_mixed: Tensor | None, d_qkv: Tensor | None) -> None:
    call.qkv, call.mixed, call.log_sums, call.lengths, call.starts = map(_pointer, tensors)
    call.d_mixed, call.d_qkv = _pointer(d_mixed), _pointer(d_qkv)
    _library().cogview_packed_attention(ctypes.byref(call), int(d_mixed is not None), num_threads())


def attends_natively(qkv: Tensor, num_heads: int, longest: int) -> bool:
    """Return whether ``packed_attention_native`` runs for ``qkv``, and is the fastest form.

    Args:
        qkv: Queries, keys and values (..., 3 D).
        num_heads: H.
        longest: Positions of the longest row.
    """
    return longest <= MAX_KEYS and runs_native_training(qkv, qkv.shape[-1] // (3 * num_heads))


def packed_attention_native(qkv: Tensor, num_heads: int, blocks: Blocks) -> Tensor:
    """Compute causal attention of packed rows, with gradients.

    Args:
        qkv: Queries, keys and values (N, 3 D), float32 or bfloat16, of rows that follow each other.
        num_heads: H, of a size K that 16 divides.
        blocks: Rows and positions of each block, N positions in all.

    Returns:
        (N, D), in the dtype of ``qkv``.
    """
    assert qkv.shape[1] % (3 * num_heads * LANES) == 0
    mixed: Tensor = _PackedAttention.apply(qkv, num_heads, blocks)  # type: ignore[no-untyped-call]
    return mixed


def losses_in_place_native(logits_MI: Tensor, targets_M: Tensor, weights_M: Tensor, write: bool) -> Tensor:
    """Compute ``losses_in_place_torch`` of ``fused_linear_cross_entropy.py`` in one pass over each row.

    Args:
        logits_MI: Logits, float32 or bfloat16; with ``write`` overwritten by the gradient of weight * loss.
        targets_M: Indices of the correct ids among the I candidates, int64.
        weights_M: Weight of each loss, float32.
        write: Whether to compute the gradient.

    Returns:
        Cross-entropy (M,), float32.
    """
    rows, count = logits_MI.shape
    losses_M = weights_M.new_empty(rows)
    targets_M, weights_M = targets_M.contiguous(), weights_M.contiguous()
    assert logits_MI.stride(1) == 1
    _library().cogview_losses(
        *(FORMATS[logits_MI.dtype], logits_MI.data_ptr(), rows, count, logits_MI.stride(0)),
        *(targets_M.data_ptr(), weights_M.data_ptr(), int(write)),
        *(losses_M.data_ptr(), num_threads()),
    )
    return losses_M
