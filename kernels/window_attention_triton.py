"""The sparse attention of ``window_attention.py`` in Triton, forward and backward.

========================  ============================  ====================================================
kernel                    grid                          computes
========================  ============================  ====================================================
_forward_kernel           query blocks x (rows heads)   output, and the log-sum-exp of each query
_backward_queries_kernel  query blocks x (rows heads)   gradient of the queries, and delta
_backward_pivots_kernel   pivot blocks x (rows heads)   gradients of keys and values as pivots
_backward_keys_kernel     key blocks x (rows heads)     gradients of keys and values in windows, added to these
========================  ============================  ====================================================

One pass over the keys of the window and one over the pivots, which are gathered by position, as in FlashAttention-2
(arXiv:2307.08691): scores are never stored. Queries are divided by alpha sqrt(K) first, and alpha is multiplied back
after the maximum has been subtracted (PB-relax, arXiv:2105.13290, section 2.4). The forward pass saves the log-sum-exp
in natural units, so that the backward pass is independent of alpha. A key has a gradient as part of windows and another
as a pivot: the second is computed first, and the first starts from it. No two programs write to the same address:
results are deterministic.

Scores are masked in the blocks at the edges of the window and not inside it. A neighbourhood in the plane masks all
blocks, and costs as much as its whole window.
"""

# B rows, H heads, T positions (queries and keys), K size of a head, N pivots; M queries and N keys of a block
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview.kernels.attention import ALPHA
from cogview.kernels.triton_utils import INTERPRETED, LOG2_E, MIN_SCORE, check_floats
from cogview.kernels.window_attention import check_inputs

SMALLEST, LARGEST = 16, 128  # head sizes
PRECISION = tl.constexpr("ieee")  # float32 is not truncated to TF32
MISSING_POSITION = tl.constexpr(2**30)  # position of a missing pivot: after every query
LENGTHS = ("length", "num_pivots", "num_blocks")  # vary between batches: no kernel is compiled for their values


@triton.jit
def _load(base, index_X, inside_X, stride, stride_k, HEAD: tl.constexpr, SIZE: tl.constexpr):
    """Load rows ``index_X`` of a matrix: (X, SIZE), zero where not ``inside_X`` and beyond ``HEAD``."""
    column = tl.arange(0, SIZE)
    mask = inside_X[:, None]
    if HEAD < SIZE:
        mask = mask & (column < HEAD)[None, :]
    return tl.load(base + index_X.to(tl.int64)[:, None] * stride + column[None, :] * stride_k, mask=mask, other=0.0)


@triton.jit
def _store(base, x, index_X, inside_X, stride, stride_k, HEAD: tl.constexpr, SIZE: tl.constexpr):
    """Store ``x`` (X, SIZE) into rows ``index_X`` of a matrix."""
    column = tl.arange(0, SIZE)
    mask = inside_X[:, None]
    if HEAD < SIZE:
        mask = mask & (column < HEAD)[None, :]
    offset = base + index_X.to(tl.int64)[:, None] * stride + column[None, :] * stride_k
    tl.store(offset, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _window_mask(query_M, key_N, window, image_start, grid, columns, LOCAL: tl.constexpr):
    """Return (M, N): whether a key is in the window of a query, and near its column if both are in the image."""
    behind = query_M[:, None] - key_N[None, :]
    seen = (behind >= 0) & (behind < window)
    if LOCAL:
        distance = tl.abs(((query_M - image_start) % grid)[:, None] - ((key_N - image_start) % grid)[None, :])
        seen = seen & ((distance <= columns) | (key_N < image_start)[None, :])
    return seen


@triton.jit
def _pivots(pivots_ptr, bias_ptr, row, index_N, num_pivots):
    """Load positions and biases of a block of pivots."""
    offset = row * num_pivots + index_N
    pivot_N = tl.load(pivots_ptr + offset, mask=index_N < num_pivots, other=-1).to(tl.int32)
    bias_N = tl.load(bias_ptr + offset, mask=index_N < num_pivots, other=0.0)
    return tl.where(pivot_N < 0, MISSING_POSITION, pivot_N), bias_N


@triton.jit
def _key_blocks(first_query, length, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOCAL: tl.constexpr):
    """Return the key range of a block of queries: begin, begin and end of the unmasked blocks, and end."""
    begin = tl.maximum(first_query - window + 1, 0) // BLOCK_N * BLOCK_N
    inside_to = first_query // BLOCK_N * BLOCK_N
    inside_from = tl.cdiv(tl.maximum(first_query + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
    if LOCAL:
        inside_from = inside_to
    return begin, tl.minimum(inside_from, inside_to), inside_to, tl.minimum(first_query + BLOCK_M, length)


@triton.jit
def _accumulate(scores, v, max_M, sum_M, acc, ALPHA: tl.constexpr):
    """Update maxima, sums of exponentials and weighted values by a block of scores and values."""
    new_max_M = tl.maximum(max_M, tl.max(scores, 1))
    weights = tl.exp2((scores - new_max_M[:, None]) * (ALPHA * LOG2_E))
    rescale_M = tl.exp2((max_M - new_max_M) * (ALPHA * LOG2_E))
    sum_M = sum_M * rescale_M + tl.sum(weights, 1)
    acc = acc * rescale_M[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_max_M, sum_M, acc


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, pivots_ptr, bias_ptr, image_starts_ptr, num_seen_ptr,
    q_b, q_h, q_t, q_k, k_b, k_h, k_t, k_k, v_b, v_h, v_t, v_k, o_b, o_h, o_t, o_k,
    num_heads, length, num_pivots, num_blocks, window, grid, columns, scale,
    ALPHA: tl.constexpr, LOCAL: tl.constexpr, HEAD: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_head = tl.program_id(1).to(tl.int64)
    row, head = row_head // num_heads, row_head % num_heads
    image_start = tl.load(image_starts_ptr + row).to(tl.int32)
    num_seen = tl.load(num_seen_ptr + row * num_blocks + tl.program_id(0))
    first_query = tl.program_id(0) * BLOCK_M
    query_M = first_query + tl.arange(0, BLOCK_M)
    exists_M = query_M < length
    k_base, v_base = k_ptr + row * k_b + head * k_h, v_ptr + row * v_b + head * v_h

    q = _load(q_ptr + row * q_b + head * q_h, query_M, exists_M, q_t, q_k, HEAD, SIZE)
    q = (q.to(tl.float32) * (scale / ALPHA)).to(q_ptr.dtype.element_ty)
    max_M = tl.full([BLOCK_M], MIN_SCORE, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, SIZE], tl.float32)
    begin, inside_from, inside_to, end = _key_blocks(first_query, length, window, BLOCK_M, BLOCK_N, LOCAL)
    for step in range(begin, inside_from + (end - inside_to), BLOCK_N):  # both edges of the window
        key_N = step + tl.where(step < inside_from, 0, inside_to - inside_from) + tl.arange(0, BLOCK_N)
        k = _load(k_base, key_N, key_N < length, k_t, k_k, HEAD, SIZE)
        v = _load(v_base, key_N, key_N < length, v_t, v_k, HEAD, SIZE)
        seen = _window_mask(query_M, key_N, window, image_start, grid, columns, LOCAL)
        scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
        max_M, sum_M, acc = _accumulate(scores, v, max_M, sum_M, acc, ALPHA)
    if not LOCAL:
        all_N = tl.full([BLOCK_N], True, tl.int1)
        for first in range(inside_from, inside_to, BLOCK_N):
            key_N = first + tl.arange(0, BLOCK_N)
            k = _load(k_base, key_N, all_N, k_t, k_k, HEAD, SIZE)
            v = _load(v_base, key_N, all_N, v_t, v_k, HEAD, SIZE)
            max_M, sum_M, acc = _accumulate(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), v, max_M, sum_M, acc, ALPHA
            )
    for first in range(0, num_seen, BLOCK_N):
        pivot_N, bias_N = _pivots(pivots_ptr, bias_ptr, row, first + tl.arange(0, BLOCK_N), num_pivots)
        k = _load(k_base, pivot_N, pivot_N < length, k_t, k_k, HEAD, SIZE)
        v = _load(v_base, pivot_N, pivot_N < length, v_t, v_k, HEAD, SIZE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) + (bias_N / ALPHA)[None, :]
        scores = tl.where(query_M[:, None] - pivot_N[None, :] >= window, scores, float("-inf"))
        max_M, sum_M, acc = _accumulate(scores, v, max_M, sum_M, acc, ALPHA)
    out_base = out_ptr + row * o_b + head * o_h
    _store(out_base, acc / sum_M[:, None], query_M, exists_M, o_t, o_k, HEAD, SIZE)
    tl.store(lse_ptr + row_head * length + query_M, max_M * ALPHA + tl.log(sum_M), mask=exists_M)


@triton.jit
def _d_scores(scores, v, d_out, lse_M, delta_M, ALPHA: tl.constexpr):
    """Return the softmax (M, N), from scores and their log-sum-exp, and the gradient of alpha times the scores."""
    weights = tl.exp2((scores * ALPHA - lse_M[:, None]) * LOG2_E)
    return weights, weights * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta_M[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def _backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, d_q_ptr,
    pivots_ptr, bias_ptr, image_starts_ptr, num_seen_ptr,
    q_b, q_h, q_t, q_k, k_b, k_h, k_t, k_k, v_b, v_h, v_t, v_k, g_b, g_h, g_t, g_k, o_b, o_h, o_t, o_k,
    num_heads, length, num_pivots, num_blocks, window, grid, columns, scale,
    ALPHA: tl.constexpr, LOCAL: tl.constexpr, HEAD: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of queries, and ``delta``: the sum of the output times its gradient, for the others."""
    row_head = tl.program_id(1).to(tl.int64)
    row, head = row_head // num_heads, row_head % num_heads
    image_start = tl.load(image_starts_ptr + row).to(tl.int32)
    num_seen = tl.load(num_seen_ptr + row * num_blocks + tl.program_id(0))
    first_query = tl.program_id(0) * BLOCK_M
    query_M = first_query + tl.arange(0, BLOCK_M)
    exists_M = query_M < length
    k_base, v_base = k_ptr + row * k_b + head * k_h, v_ptr + row * v_b + head * v_h

    d_out = _load(d_out_ptr + row * g_b + head * g_h, query_M, exists_M, g_t, g_k, HEAD, SIZE)
    out = _load(out_ptr + row * o_b + head * o_h, query_M, exists_M, o_t, o_k, HEAD, SIZE)
    delta_M = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + row_head * length + query_M, delta_M, mask=exists_M)
    lse_M = tl.load(lse_ptr + row_head * length + query_M, mask=exists_M, other=float("inf"))  # weight 0
    q = _load(q_ptr + row * q_b + head * q_h, query_M, exists_M, q_t, q_k, HEAD, SIZE)
    q = (q.to(tl.float32) * (scale / ALPHA)).to(q_ptr.dtype.element_ty)
    d_q = tl.zeros([BLOCK_M, SIZE], tl.float32)
    begin, inside_from, inside_to, end = _key_blocks(first_query, length, window, BLOCK_M, BLOCK_N, LOCAL)
    for step in range(begin, inside_from + (end - inside_to), BLOCK_N):
        key_N = step + tl.where(step < inside_from, 0, inside_to - inside_from) + tl.arange(0, BLOCK_N)
        k = _load(k_base, key_N, key_N < length, k_t, k_k, HEAD, SIZE)
        v = _load(v_base, key_N, key_N < length, v_t, v_k, HEAD, SIZE)
        seen = _window_mask(query_M, key_N, window, image_start, grid, columns, LOCAL)
        scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
        _, d_scores = _d_scores(scores, v, d_out, lse_M, delta_M, ALPHA)
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
    if not LOCAL:
        all_N = tl.full([BLOCK_N], True, tl.int1)
        for first in range(inside_from, inside_to, BLOCK_N):
            key_N = first + tl.arange(0, BLOCK_N)
            k = _load(k_base, key_N, all_N, k_t, k_k, HEAD, SIZE)
            v = _load(v_base, key_N, all_N, v_t, v_k, HEAD, SIZE)
            _, d_scores = _d_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), v, d_out, lse_M, delta_M, ALPHA)
            d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
    for first in range(0, num_seen, BLOCK_N):
        pivot_N, bias_N = _pivots(pivots_ptr, bias_ptr, row, first + tl.arange(0, BLOCK_N), num_pivots)
        k = _load(k_base, pivot_N, pivot_N < length, k_t, k_k, HEAD, SIZE)
        v = _load(v_base, pivot_N, pivot_N < length, v_t, v_k, HEAD, SIZE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) + (bias_N / ALPHA)[None, :]
        scores = tl.where(query_M[:, None] - pivot_N[None, :] >= window, scores, float("-inf"))
        _, d_scores = _d_scores(scores, v, d_out, lse_M, delta_M, ALPHA)
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
    d_q_base = d_q_ptr + row_head * length * HEAD
    _store(d_q_base, d_q * scale, query_M, exists_M, HEAD, 1, HEAD, SIZE)


@triton.jit
def _accumulate_key_gradients(
    q, k, v, d_out, bias_N, seen, lse_M, delta_M, d_k, d_v, scale, ALPHA: tl.constexpr, MASKED: tl.constexpr
):
    """Add the gradients of keys and values from a block of queries; ``d_k`` lacks the scale."""
    relaxed_q = (q.to(tl.float32) * (scale / ALPHA)).to(q.dtype)
    scores = tl.dot(relaxed_q, tl.trans(k), input_precision=PRECISION) + (bias_N / ALPHA)[None, :]
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    weights, d_scores = _d_scores(scores, v, d_out, lse_M, delta_M, ALPHA)
    d_v += tl.dot(tl.trans(weights.to(d_out.dtype)), d_out, input_precision=PRECISION)
    d_k += tl.dot(tl.trans(d_scores.to(q.dtype)), q, input_precision=PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=LENGTHS)
def _backward_pivots_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_k_pivots_ptr, d_v_pivots_ptr, pivots_ptr, bias_ptr,
    q_b, q_h, q_t, q_k, k_b, k_h, k_t, k_k, v_b, v_h, v_t, v_k, g_b, g_h, g_t, g_k,
    num_heads, length, num_pivots, window, scale,
    ALPHA: tl.constexpr, HEAD: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of keys and values as pivots, float32 (B, H, N, K); those of keys lack the scale."""
    row_head = tl.program_id(1).to(tl.int64)
    row, head = row_head // num_heads, row_head % num_heads
    index_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pivot_N, bias_N = _pivots(pivots_ptr, bias_ptr, row, index_N, num_pivots)
    k = _load(k_ptr + row * k_b + head * k_h, pivot_N, pivot_N < length, k_t, k_k, HEAD, SIZE)
    v = _load(v_ptr + row * v_b + head * v_h, pivot_N, pivot_N < length, v_t, v_k, HEAD, SIZE)
    q_base, d_out_base = q_ptr + row * q_b + head * q_h, d_out_ptr + row * g_b + head * g_h
    d_k = tl.zeros([BLOCK_N, SIZE], tl.float32)
    d_v = tl.zeros([BLOCK_N, SIZE], tl.float32)
    for first in range((tl.min(pivot_N, 0) + window) // BLOCK_M * BLOCK_M, length, BLOCK_M):
        query_M = first + tl.arange(0, BLOCK_M)
        exists_M = query_M < length
        q = _load(q_base, query_M, exists_M, q_t, q_k, HEAD, SIZE)
        d_out = _load(d_out_base, query_M, exists_M, g_t, g_k, HEAD, SIZE)
        lse_M = tl.load(lse_ptr + row_head * length + query_M, mask=exists_M, other=float("inf"))
        delta_M = tl.load(delta_ptr + row_head * length + query_M, mask=exists_M, other=0.0)
        seen = query_M[:, None] - pivot_N[None, :] >= window
        d_k, d_v = _accumulate_key_gradients(q, k, v, d_out, bias_N, seen, lse_M, delta_M, d_k, d_v, scale, ALPHA, True)
    exists_N = index_N < num_pivots
    offset = row_head * num_pivots * HEAD
    _store(d_k_pivots_ptr + offset, d_k, index_N, exists_N, HEAD, 1, HEAD, SIZE)
    _store(d_v_pivots_ptr + offset, d_v, index_N, exists_N, HEAD, 1, HEAD, SIZE)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_k_pivots_ptr, d_v_pivots_ptr, d_k_ptr, d_v_ptr,
    slots_ptr, image_starts_ptr,
    q_b, q_h, q_t, q_k, k_b, k_h, k_t, k_k, v_b, v_h, v_t, v_k, g_b, g_h, g_t, g_k,
    num_heads, length, num_pivots, window, grid, columns, scale,
    ALPHA: tl.constexpr, LOCAL: tl.constexpr, HEAD: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of keys and values in windows, added to those as pivots (``slots``, -1 for no pivot)."""
    row_head = tl.program_id(1).to(tl.int64)
    row, head = row_head // num_heads, row_head % num_heads
    image_start = tl.load(image_starts_ptr + row).to(tl.int32)
    first_key = tl.program_id(0) * BLOCK_N
    key_N = first_key + tl.arange(0, BLOCK_N)
    exists_N = key_N < length
    k = _load(k_ptr + row * k_b + head * k_h, key_N, exists_N, k_t, k_k, HEAD, SIZE)
    v = _load(v_ptr + row * v_b + head * v_h, key_N, exists_N, v_t, v_k, HEAD, SIZE)
    q_base, d_out_base = q_ptr + row * q_b + head * q_h, d_out_ptr + row * g_b + head * g_h
    slot_N = tl.load(slots_ptr + row * (length + 1) + key_N, mask=exists_N, other=-1)
    offset = row_head * num_pivots * HEAD
    d_k = _load(d_k_pivots_ptr + offset, slot_N, slot_N >= 0, HEAD, 1, HEAD, SIZE)
    d_v = _load(d_v_pivots_ptr + offset, slot_N, slot_N >= 0, HEAD, 1, HEAD, SIZE)

    no_bias_N = tl.zeros([BLOCK_N], tl.float32)
    end = tl.minimum(first_key + BLOCK_N - 1 + window, length)
    inside_from = tl.cdiv(first_key + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    last = tl.minimum(first_key + window, length) - BLOCK_M  # last block that needs no mask
    inside_to = inside_from + tl.maximum(last - inside_from + BLOCK_M, 0) // BLOCK_M * BLOCK_M
    if LOCAL:
        inside_to = inside_from
    for step in range(first_key // BLOCK_M * BLOCK_M, end - (inside_to - inside_from), BLOCK_M):
        query_M = step + tl.where(step < inside_from, 0, inside_to - inside_from) + tl.arange(0, BLOCK_M)
        exists_M = query_M < length
        q = _load(q_base, query_M, exists_M, q_t, q_k, HEAD, SIZE)
        d_out = _load(d_out_base, query_M, exists_M, g_t, g_k, HEAD, SIZE)
        lse_M = tl.load(lse_ptr + row_head * length + query_M, mask=exists_M, other=float("inf"))
        delta_M = tl.load(delta_ptr + row_head * length + query_M, mask=exists_M, other=0.0)
        seen = _window_mask(query_M, key_N, window, image_start, grid, columns, LOCAL)
        d_k, d_v = _accumulate_key_gradients(
            q, k, v, d_out, no_bias_N, seen, lse_M, delta_M, d_k, d_v, scale, ALPHA, True
        )
    if not LOCAL:
        all_M = tl.full([BLOCK_M], True, tl.int1)
        for first in range(inside_from, inside_to, BLOCK_M):
            query_M = first + tl.arange(0, BLOCK_M)
            q = _load(q_base, query_M, all_M, q_t, q_k, HEAD, SIZE)
            d_out = _load(d_out_base, query_M, all_M, g_t, g_k, HEAD, SIZE)
            lse_M = tl.load(lse_ptr + row_head * length + query_M)
            delta_M = tl.load(delta_ptr + row_head * length + query_M)
            d_k, d_v = _accumulate_key_gradients(
                q, k, v, d_out, no_bias_N, None, lse_M, delta_M, d_k, d_v, scale, ALPHA, False
            )
    base = row_head * length * HEAD
    _store(d_k_ptr + base, d_k * scale, key_N, exists_N, HEAD, 1, HEAD, SIZE)
    _store(d_v_ptr + base, d_v, key_N, exists_N, HEAD, 1, HEAD, SIZE)


def window_attention_triton(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    *,
    window: int,
    pivots_BN: Tensor,
    pivot_bias_BN: Tensor | None = None,
    grid: int | None = None,
    columns: int | None = None,
    image_starts_B: Tensor | None = None,
    relaxed: bool = True,
) -> Tensor:
    """Compute ``window_attention`` with the Triton kernels; differentiable in queries, keys and values.

    Args:
        q_BHTK: Queries, float32, float16 or bfloat16, with a head size of 16 to 128.
        k_BHTK: Keys, like the queries.
        v_BHTK: Values, like the queries.
        window: As in ``window_attention``.
        pivots_BN: As in ``window_attention``.
        pivot_bias_BN: As in ``window_attention``.
        grid: As in ``window_attention``.
        columns: As in ``window_attention``.
        image_starts_B: As in ``window_attention``.
        relaxed: Whether to apply PB-relax; False shows its effect.

    Returns:
        Attention output (B, H, T, K) in the dtype of the queries.

    Raises:
        ValueError: The inputs do not fit together or the kernels do not support them; nothing was launched.
    """
    check_floats("q_BHTK", q_BHTK)
    check_inputs(q_BHTK, k_BHTK, v_BHTK, window, pivots_BN, pivot_bias_BN, grid, columns, image_starts_B)
    if not SMALLEST <= q_BHTK.shape[3] <= LARGEST:
        raise ValueError(f"q_BHTK must have heads of {SMALLEST} to {LARGEST}, got {q_BHTK.shape[3]}")
    if pivot_bias_BN is None:
        pivot_bias_BN = torch.zeros(pivots_BN.shape, device=q_BHTK.device)
    if image_starts_B is None:
        image_starts_B = torch.zeros(len(pivots_BN), dtype=torch.int64, device=q_BHTK.device)
    tensors = (q_BHTK, k_BHTK, v_BHTK, pivots_BN.contiguous(), pivot_bias_BN.contiguous(), image_starts_B.contiguous())
    out_BHTK: Tensor
    out_BHTK, _ = _attend(*tensors, min(window, q_BHTK.shape[2]), grid or 0, columns or 0, relaxed)
    return out_BHTK


@torch.library.custom_op("cogview::window_attention", mutates_args=())
def _attend(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    pivots_BN: Tensor,
    pivot_bias_BN: Tensor,
    image_starts_B: Tensor,
    window: int,
    grid: int,
    columns: int,
    relaxed: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output, and the log-sum-exp (B, H, T) in float32; ``grid`` is 0 without an image."""
    out_BHTK = torch.empty(q_BHTK.shape, dtype=q_BHTK.dtype, device=q_BHTK.device)
    lse_BHT = torch.empty(q_BHTK.shape[:3], dtype=torch.float32, device=q_BHTK.device)
    sizes = _sizes(q_BHTK, relaxed)
    num_seen_BX = _num_seen(pivots_BN, q_BHTK.shape[2], window, sizes["BLOCK_M"])
    _forward_kernel[(num_seen_BX.shape[1], q_BHTK.shape[0] * q_BHTK.shape[1])](
        q_BHTK, k_BHTK, v_BHTK, out_BHTK, lse_BHT, pivots_BN, pivot_bias_BN, image_starts_B, num_seen_BX,
        *q_BHTK.stride(), *k_BHTK.stride(), *v_BHTK.stride(), *out_BHTK.stride(),
        *q_BHTK.shape[1:3], pivots_BN.shape[1], num_seen_BX.shape[1], window, grid, columns, _scale(q_BHTK),
        LOCAL=grid > 0, **sizes,
    )  # fmt: skip
    return out_BHTK, lse_BHT


@_attend.register_fake
def _(q_BHTK, *others):
    return q_BHTK.new_empty(q_BHTK.shape), q_BHTK.new_empty(q_BHTK.shape[:3], dtype=torch.float32)


@torch.library.custom_op("cogview::window_attention_backward", mutates_args=())
def _attend_backward(
    d_out_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    pivots_BN: Tensor,
    pivot_bias_BN: Tensor,
    image_starts_B: Tensor,
    out_BHTK: Tensor,
    lse_BHT: Tensor,
    window: int,
    grid: int,
    columns: int,
    relaxed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, length, size = q_BHTK.shape
    num_pivots, device = pivots_BN.shape[1], q_BHTK.device
    d_q_BHTK, d_k_BHTK, d_v_BHTK = (torch.empty(q_BHTK.shape, dtype=q_BHTK.dtype, device=device) for _ in range(3))
    d_k_BHNK, d_v_BHNK = torch.empty(2, rows, heads, num_pivots, size, device=device)
    delta_BHT = torch.empty_like(lse_BHT)
    sizes = _sizes(q_BHTK, relaxed)
    num_seen_BX = _num_seen(pivots_BN, length, window, sizes["BLOCK_M"])
    # Index of the pivot at each position, or -1; missing pivots are written to an extra position at the end.
    slots_BT = torch.full((rows, length + 1), -1, dtype=torch.int32, device=device)
    numbers_BN = torch.arange(num_pivots, dtype=torch.int32, device=device).expand(rows, -1)
    slots_BT.scatter_(1, torch.where(pivots_BN < 0, length, pivots_BN), numbers_BN)

    strides = (*q_BHTK.stride(), *k_BHTK.stride(), *v_BHTK.stride(), *d_out_BHTK.stride())
    scale = _scale(q_BHTK)
    _backward_queries_kernel[(num_seen_BX.shape[1], rows * heads)](
        q_BHTK, k_BHTK, v_BHTK, out_BHTK, d_out_BHTK, lse_BHT, delta_BHT, d_q_BHTK,
        pivots_BN, pivot_bias_BN, image_starts_B, num_seen_BX, *strides, *out_BHTK.stride(),
        heads, length, num_pivots, num_seen_BX.shape[1], window, grid, columns, scale, LOCAL=grid > 0, **sizes,
    )  # fmt: skip
    if num_pivots:
        _backward_pivots_kernel[(triton.cdiv(num_pivots, sizes["BLOCK_N"]), rows * heads)](
            q_BHTK, k_BHTK, v_BHTK, d_out_BHTK, lse_BHT, delta_BHT, d_k_BHNK, d_v_BHNK, pivots_BN, pivot_bias_BN,
            *strides, heads, length, num_pivots, window, scale, **sizes,
        )  # fmt: skip
    _backward_keys_kernel[(triton.cdiv(length, sizes["BLOCK_N"]), rows * heads)](
        q_BHTK, k_BHTK, v_BHTK, d_out_BHTK, lse_BHT, delta_BHT, d_k_BHNK, d_v_BHNK, d_k_BHTK, d_v_BHTK,
        slots_BT, image_starts_B, *strides,
        heads, length, num_pivots, window, grid, columns, scale, LOCAL=grid > 0, **sizes,
    )  # fmt: skip
    return d_q_BHTK, d_k_BHTK, d_v_BHTK


@_attend_backward.register_fake
def _(d_out, q_BHTK, *others):
    return tuple(q_BHTK.new_empty(q_BHTK.shape) for _ in range(3))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]


def _backward(ctx, d_out_BHTK, _):
    return *_attend_backward(d_out_BHTK, *ctx.saved_tensors, *ctx.settings), *(None,) * 7


_attend.register_autograd(_backward, setup_context=_setup_context)


def _num_seen(pivots_BN: Tensor, length: int, window: int, block: int) -> Tensor:
    """Return int32 (B, query blocks): the number of pivots that the last query of a block attends to."""
    last_X = torch.arange(block - 1, length + block - 1, block, device=pivots_BN.device) - window
    ascending_BN = torch.where(pivots_BN < 0, MISSING_POSITION.value, pivots_BN)
    return torch.searchsorted(ascending_BN, last_X.expand(len(pivots_BN), -1).contiguous(), right=True, out_int32=True)


def _sizes(q_BHTK: Tensor, relaxed: bool) -> dict[str, Any]:
    """Return compile-time constants; the blocks fit the 64 kB of shared memory of sm_75."""
    head = q_BHTK.shape[3]
    size = triton.next_power_of_2(head)
    block = 64
    if not INTERPRETED:  # interpreted, only the number of operations matters
        # Without tensor cores (float32, and everything on sm_75) registers are the limit.
        scalar = q_BHTK.dtype == torch.float32 or torch.cuda.get_device_capability(q_BHTK.device) < (8, 0)
        block = 32 if scalar or size > 64 else 64
    return {
        "ALPHA": ALPHA if relaxed else 1.0,
        "HEAD": head,
        "SIZE": size,
        "BLOCK_M": block,
        "BLOCK_N": block,
        "num_warps": 8 if q_BHTK.dtype == torch.float32 else 4,  # with 4, float32 spills
        "num_stages": 2,
    }


def _scale(q_BHTK: Tensor) -> float:
    """Return 1 / sqrt(K)."""
    return 1 / math.sqrt(q_BHTK.shape[3])
