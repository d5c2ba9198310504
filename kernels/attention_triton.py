"""Causal attention with PB-relax in Triton, forward and backward.

========================  ===========================  ====================================================
kernel                    grid                         computes
========================  ===========================  ====================================================
_forward_kernel           query blocks x (rows heads)  output, and the log-sum-exp of each query
_backward_queries_kernel  query blocks x (rows heads)  gradient of the queries
_backward_keys_kernel     key blocks x (rows heads)    gradients of the keys and values
========================  ===========================  ====================================================

One pass over the keys, block by block, as in FlashAttention-2 (arXiv:2307.08691): scores are never stored. Queries are
divided by about alpha sqrt(K) first, so that a score is 1/alpha of the true one; alpha is multiplied back after the
maximum has been subtracted (PB-relax, arXiv:2105.13290, section 2.4). With float32 accumulators that changes nothing.
With float16 accumulators, which are fast on many cards and the only ones on some, scores overflow 32 times later. The
divisor is the nearest power of two, so that queries are not rounded again; the remaining factor is part of alpha.

The forward pass saves the log-sum-exp in natural units, so that the backward pass is independent of alpha. No two
programs write to the same address: results are deterministic. Only blocks at the edge of the visible keys are masked.

The model uses ``bias_B1TS`` alone; see ``attention.py`` for the other arguments.
"""

# B rows, H heads, T queries, S keys, K size of a head; M queries and N keys of a block
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview.kernels.attention import ALPHA, check_inputs, fold_seed
from cogview.kernels.triton_utils import INTERPRETED, LOG2_E, MIN_SCORE, check_floats, dot

SMALLEST, LARGEST = 16, 128  # head sizes
# Arguments that are not specialized on (being 1, or a multiple of 16): another batch or length compiles no new kernel.
NOT_SPECIALIZED = ("bias_b", "bias_t", "num_rows", "num_heads", "num_queries", "num_keys", "seed")


@triton.jit
def _limits(limits_ptr, row, num_rows, num_keys, LIMITED: tl.constexpr):
    """Return the first visible key of a row, the length of its prefix, and the end of its keys."""
    if LIMITED:
        start = tl.load(limits_ptr + row).to(tl.int32)
        prefix = tl.load(limits_ptr + num_rows + row).to(tl.int32)
        length = tl.load(limits_ptr + 2 * num_rows + row).to(tl.int32)
    else:
        start, prefix, length = row * 0, row * 0, row * 0 + num_keys
    return start, prefix, length


@triton.jit
def _load(base, index_X, stride, count, size_stride, HEAD: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """Load rows ``index_X`` of a matrix of ``count`` rows: (X, SIZE), zero outside; ``WHOLE`` if none are outside."""
    column = tl.arange(0, SIZE)
    pointers = base + index_X[:, None] * stride + column[None, :] * size_stride
    if WHOLE and HEAD == SIZE:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(index_X[:, None] < count) & (column[None, :] < HEAD), other=0.0)
    return block


@triton.jit
def _store(base, x, index_X, stride, count, size_stride, HEAD: tl.constexpr, SIZE: tl.constexpr):
    """Store ``x`` (X, SIZE) into rows ``index_X`` of a matrix of ``count`` rows."""
    column = tl.arange(0, SIZE)
    inside = (index_X[:, None] < count) & (column[None, :] < HEAD)
    tl.store(base + index_X[:, None] * stride + column[None, :] * size_stride, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _scores(
    q, k, query_M, key_N, start, prefix, length, bias_base, bias_t, bias_s, query_offset, num_keys,
    ALPHA: tl.constexpr, HALF: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Return scores (M, N), 1/alpha of the true ones; -inf where a query may not attend."""
    scores = dot(q, tl.trans(k), HALF)
    if BIASED:  # the bias includes the causal mask
        inside = (query_M[:, None] < num_keys) & (key_N[None, :] < num_keys)
        pointers = (query_M - query_offset)[:, None].to(tl.int64) * bias_t + key_N[None, :] * bias_s
        bias = tl.load(bias_base + pointers, mask=inside, other=float("-inf")).to(tl.float32)
        scores = scores + bias * (1 / ALPHA)
    elif MASKED:
        query, key = query_M[:, None], key_N[None, :]
        seen = ((key <= query) | (key < prefix)) & (key >= start) & (key < length)
        scores = tl.where(seen | (key == query), scores, float("-inf"))
    return scores


@triton.jit
def _hash32(x):
    """Hash 32 bits by "lowbias32" (https://github.com/skeeto/hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropout_mask(seed, row_head, query_M, key_N, keep):
    """Return float32 (M, N): 1 / keep where dropout keeps a weight, else 0 (``dropout_mask`` in ``attention.py``)."""
    line_M = _hash32(_hash32(seed.to(tl.uint32) + query_M.to(tl.uint32)) ^ row_head.to(tl.uint32))
    noise = _hash32(line_M[:, None] ^ key_N.to(tl.uint32)[None, :])
    return tl.where((noise >> 8).to(tl.float32) < keep * 16777216.0, 1.0 / keep, 0.0)


@triton.jit
def _forward_blocks(
    max_M, sum_M, acc, q, k_base, v_base, bias_base, query_M, row_head, begin, end, start, prefix, length,
    k_s, k_k, v_s, v_k, bias_t, bias_s, query_offset, num_keys, seed, keep,
    ALPHA: tl.constexpr, HALF: tl.constexpr, DROPS: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    HEAD: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return running maximum, sum and weighted values after the keys from ``begin`` to ``end``."""
    for first in range(begin, end, BLOCK_N):
        key_N = first + tl.arange(0, BLOCK_N)
        k = _load(k_base, key_N, k_s, num_keys, k_k, HEAD, SIZE, not MASKED)
        scores = _scores(
            q, k, query_M, key_N, start, prefix, length, bias_base, bias_t, bias_s, query_offset, num_keys,
            ALPHA, HALF, MASKED, BIASED,
        )  # fmt: skip
        new_max_M = tl.maximum(max_M, tl.max(scores, 1))
        weights = tl.exp2((scores - new_max_M[:, None]) * (ALPHA * LOG2_E))
        rescale_M = tl.exp2((max_M - new_max_M) * (ALPHA * LOG2_E))
        sum_M = sum_M * rescale_M + tl.sum(weights, 1)
        if DROPS:
            weights *= _dropout_mask(seed, row_head, query_M, key_N, keep)
        v = _load(v_base, key_N, v_s, num_keys, v_k, HEAD, SIZE, not MASKED)
        acc = acc * rescale_M[:, None] + dot(weights.to(v.dtype), v, HALF)
        max_M = new_max_M
    return max_M, sum_M, acc


@triton.jit
def _key_blocks(first_query, start, prefix, length, num_keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the key range of a block of queries: begin, begin and end of the unmasked blocks, and end."""
    begin = tl.minimum(start, first_query) // BLOCK_N * BLOCK_N
    end = tl.minimum(tl.maximum(first_query + BLOCK_M, prefix), num_keys)
    whole_end = tl.minimum(length, tl.maximum(prefix, first_query + 1)) // BLOCK_N * BLOCK_N
    whole = tl.minimum(tl.cdiv(start, BLOCK_N) * BLOCK_N, tl.maximum(whole_end, begin))
    return begin, whole, tl.maximum(whole_end, whole), end


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, limits_ptr, bias_ptr,
    q_b, q_h, q_t, q_k, k_b, k_h, k_s, k_k, v_b, v_h, v_s, v_k, o_b, o_h, o_t, o_k, bias_b, bias_t, bias_s,
    num_rows, num_heads, num_queries, num_keys, seed, keep,
    ALPHA: tl.constexpr, DIVISOR: tl.constexpr, HALF: tl.constexpr,
    DROPS: tl.constexpr, LIMITED: tl.constexpr, BIASED: tl.constexpr,
    HEAD: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_head, first = tl.program_id(1), tl.program_id(0) * BLOCK_M
    row, head = (row_head // num_heads).to(tl.int64), (row_head % num_heads).to(tl.int64)
    start, prefix, length = _limits(limits_ptr, row_head // num_heads, num_rows, num_keys, LIMITED)
    query_offset = num_keys - num_queries
    index_M = first + tl.arange(0, BLOCK_M)
    query_M = index_M + query_offset  # positions among the keys
    k_base, v_base, bias_base = k_ptr + row * k_b + head * k_h, v_ptr + row * v_b + head * v_h, bias_ptr + row * bias_b
    q = _load(q_ptr + row * q_b + head * q_h, index_M, q_t, num_queries, q_k, HEAD, SIZE, False)
    q = (q * (1 / DIVISOR)).to(q_ptr.dtype.element_ty)

    max_M = tl.full([BLOCK_M], MIN_SCORE, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, SIZE], tl.float32)
    begin, whole, whole_end, end = _key_blocks(first + query_offset, start, prefix, length, num_keys, BLOCK_M, BLOCK_N)
    if BIASED:
        whole_end, end = 0, num_keys
    if LIMITED:
        max_M, sum_M, acc = _forward_blocks(
            max_M, sum_M, acc, q, k_base, v_base, bias_base, query_M, row_head, begin, whole, start, prefix, length,
            k_s, k_k, v_s, v_k, bias_t, bias_s, query_offset, num_keys, seed, keep,
            ALPHA, HALF, DROPS, True, BIASED, HEAD, SIZE, BLOCK_N,
        )  # fmt: skip
    if not BIASED:
        max_M, sum_M, acc = _forward_blocks(
            max_M, sum_M, acc, q, k_base, v_base, bias_base, query_M, row_head, whole, whole_end, start, prefix,
            length, k_s, k_k, v_s, v_k, bias_t, bias_s, query_offset, num_keys, seed, keep,
            ALPHA, HALF, DROPS, False, BIASED, HEAD, SIZE, BLOCK_N,
        )  # fmt: skip
    max_M, sum_M, acc = _forward_blocks(
        max_M, sum_M, acc, q, k_base, v_base, bias_base, query_M, row_head, whole_end, end, start, prefix, length,
        k_s, k_k, v_s, v_k, bias_t, bias_s, query_offset, num_keys, seed, keep,
        ALPHA, HALF, DROPS, True, BIASED, HEAD, SIZE, BLOCK_N,
    )  # fmt: skip
    sum_M = tl.where(index_M < num_queries, sum_M, 1.0)
    _store(out_ptr + row * o_b + head * o_h, acc / sum_M[:, None], index_M, o_t, num_queries, o_k, HEAD, SIZE)
    lse_M = max_M * ALPHA + tl.log(sum_M)
    tl.store(lse_ptr + row_head.to(tl.int64) * num_queries + index_M, lse_M, mask=index_M < num_queries)


@triton.jit
def _d_scores(
    q, k, v, d_out, lse_M, delta_M, query_M, key_N, row_head, start, prefix, length, bias_base, bias_t, bias_s,
    query_offset, num_keys, seed, keep,
    ALPHA: tl.constexpr, HALF: tl.constexpr, DROPS: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Return for a block (M, N) the weights after dropout, and the gradient of the true scores."""
    scores = _scores(
        q, k, query_M, key_N, start, prefix, length, bias_base, bias_t, bias_s, query_offset, num_keys,
        ALPHA, HALF, MASKED, BIASED,
    )  # fmt: skip
    weights = tl.exp2((scores * ALPHA - lse_M[:, None]) * LOG2_E)
    d_weights = dot(d_out, tl.trans(v), False)
    if DROPS:
        mask = _dropout_mask(seed, row_head, query_M, key_N, keep)
        return weights * mask, weights * (d_weights * mask - delta_M[:, None])
    return weights, weights * (d_weights - delta_M[:, None])


@triton.jit
def _query_gradient(
    d_q, q, d_out, lse_M, delta_M, k_base, v_base, bias_base, query_M, row_head, begin, end, start, prefix, length,
    k_s, k_k, v_s, v_k, bias_t, bias_s, query_offset, num_keys, seed, keep,
    ALPHA: tl.constexpr, HALF: tl.constexpr, DROPS: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    HEAD: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the keys from ``begin`` to ``end`` to ``d_q``."""
    for first in range(begin, end, BLOCK_N):
        key_N = first + tl.arange(0, BLOCK_N)
        k = _load(k_base, key_N, k_s, num_keys, k_k, HEAD, SIZE, not MASKED)
        v = _load(v_base, key_N, v_s, num_keys, v_k, HEAD, SIZE, not MASKED)
        _, d_scores = _d_scores(
            q, k, v, d_out, lse_M, delta_M, query_M, key_N, row_head, start, prefix, length, bias_base, bias_t, bias_s,
            query_offset, num_keys, seed, keep, ALPHA, HALF, DROPS, MASKED, BIASED,
        )  # fmt: skip
        d_q += dot(d_scores.to(k.dtype), k, False)
    return d_q


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, limits_ptr, bias_ptr, d_q_ptr,
    q_b, q_h, q_t, q_k, k_b, k_h, k_s, k_k, v_b, v_h, v_s, v_k, o_b, o_h, o_t, o_k, bias_b, bias_t, bias_s,
    g_b, g_h, g_t, g_k,
    num_rows, num_heads, num_queries, num_keys, seed, keep, scale,
    ALPHA: tl.constexpr, DIVISOR: tl.constexpr, HALF: tl.constexpr,
    DROPS: tl.constexpr, LIMITED: tl.constexpr, BIASED: tl.constexpr,
    HEAD: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_head, first = tl.program_id(1), tl.program_id(0) * BLOCK_M
    row, head = (row_head // num_heads).to(tl.int64), (row_head % num_heads).to(tl.int64)
    start, prefix, length = _limits(limits_ptr, row_head // num_heads, num_rows, num_keys, LIMITED)
    query_offset = num_keys - num_queries
    index_M = first + tl.arange(0, BLOCK_M)
    query_M = index_M + query_offset
    k_base, v_base, bias_base = k_ptr + row * k_b + head * k_h, v_ptr + row * v_b + head * v_h, bias_ptr + row * bias_b
    line_M = row_head.to(tl.int64) * num_queries + index_M
    lse_M = tl.load(lse_ptr + line_M, mask=index_M < num_queries, other=float("inf"))  # weight 0
    delta_M = tl.load(delta_ptr + line_M, mask=index_M < num_queries, other=0.0)
    d_out = _load(d_out_ptr + row * o_b + head * o_h, index_M, o_t, num_queries, o_k, HEAD, SIZE, False)
    q = _load(q_ptr + row * q_b + head * q_h, index_M, q_t, num_queries, q_k, HEAD, SIZE, False)
    q = (q * (1 / DIVISOR)).to(q_ptr.dtype.element_ty)

    d_q = tl.zeros([BLOCK_M, SIZE], tl.float32)
    begin, whole, whole_end, end = _key_blocks(first + query_offset, start, prefix, length, num_keys, BLOCK_M, BLOCK_N)
    if BIASED:
        whole_end, end = 0, num_keys
    if LIMITED:
        d_q = _query_gradient(
            d_q, q, d_out, lse_M, delta_M, k_base, v_base, bias_base, query_M, row_head, begin, whole, start, prefix,
            length, k_s, k_k, v_s, v_k, bias_t, bias_s, query_offset, num_keys, seed, keep,
            ALPHA, HALF, DROPS, True, BIASED, HEAD, SIZE, BLOCK_N,
        )  # fmt: skip
    if not BIASED:
        d_q = _query_gradient(
            d_q, q, d_out, lse_M, delta_M, k_base, v_base, bias_base, query_M, row_head, whole, whole_end, start,
            prefix, length, k_s, k_k, v_s, v_k, bias_t, bias_s, query_offset, num_keys, seed, keep,
            ALPHA, HALF, DROPS, False, BIASED, HEAD, SIZE, BLOCK_N,
        )  # fmt: skip
    d_q = _query_gradient(
        d_q, q, d_out, lse_M, delta_M, k_base, v_base, bias_base, query_M, row_head, whole_end, end, start, prefix,
        length, k_s, k_k, v_s, v_k, bias_t, bias_s, query_offset, num_keys, seed, keep,
        ALPHA, HALF, DROPS, True, BIASED, HEAD, SIZE, BLOCK_N,
    )  # fmt: skip
    _store(d_q_ptr + row * g_b + head * g_h, d_q * scale, index_M, g_t, num_queries, g_k, HEAD, SIZE)


@triton.jit
def _key_gradient(
    d_k, d_v, k, v, q_base, d_out_base, lse_base, delta_base, bias_base, key_N, row_head, begin, end,
    start, prefix, length, q_t, q_k, o_t, o_k, bias_t, bias_s, num_queries, num_keys, seed, keep,
    ALPHA: tl.constexpr, DIVISOR: tl.constexpr, HALF: tl.constexpr,
    DROPS: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    HEAD: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the contributions of the queries from ``begin`` to ``end`` to ``d_k`` and ``d_v``."""
    for first in range(begin, end, BLOCK_M):
        index_M = first + tl.arange(0, BLOCK_M)
        lse_M = tl.load(lse_base + index_M, mask=index_M < num_queries, other=float("inf"))
        delta_M = tl.load(delta_base + index_M, mask=index_M < num_queries, other=0.0)
        q = _load(q_base, index_M, q_t, num_queries, q_k, HEAD, SIZE, False)
        d_out = _load(d_out_base, index_M, o_t, num_queries, o_k, HEAD, SIZE, False)
        relaxed_q = (q * (1 / DIVISOR)).to(q.dtype)
        query_offset = num_keys - num_queries
        weights, d_scores = _d_scores(
            relaxed_q, k, v, d_out, lse_M, delta_M, index_M + query_offset, key_N, row_head, start, prefix, length,
            bias_base, bias_t, bias_s, query_offset, num_keys, seed, keep, ALPHA, HALF, DROPS, MASKED, BIASED,
        )  # fmt: skip
        d_v += dot(tl.trans(weights.to(d_out.dtype)), d_out, False)
        d_k += dot(tl.trans(d_scores.to(q.dtype)), q, False)
    return d_k, d_v


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, limits_ptr, bias_ptr, d_k_ptr, d_v_ptr,
    q_b, q_h, q_t, q_k, k_b, k_h, k_s, k_k, v_b, v_h, v_s, v_k, o_b, o_h, o_t, o_k, bias_b, bias_t, bias_s,
    g_b, g_h, g_s, g_k,
    num_rows, num_heads, num_queries, num_keys, seed, keep, scale,
    ALPHA: tl.constexpr, DIVISOR: tl.constexpr, HALF: tl.constexpr,
    DROPS: tl.constexpr, LIMITED: tl.constexpr, BIASED: tl.constexpr,
    HEAD: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_head, first = tl.program_id(1), tl.program_id(0) * BLOCK_N
    row, head = (row_head // num_heads).to(tl.int64), (row_head % num_heads).to(tl.int64)
    start, prefix, length = _limits(limits_ptr, row_head // num_heads, num_rows, num_keys, LIMITED)
    query_offset = num_keys - num_queries
    key_N = first + tl.arange(0, BLOCK_N)
    k = _load(k_ptr + row * k_b + head * k_h, key_N, k_s, num_keys, k_k, HEAD, SIZE, False)
    v = _load(v_ptr + row * v_b + head * v_h, key_N, v_s, num_keys, v_k, HEAD, SIZE, False)
    q_base, d_out_base, bias_base = (
        q_ptr + row * q_b + head * q_h,
        d_out_ptr + row * o_b + head * o_h,
        bias_ptr + row * bias_b,
    )
    lse_base = lse_ptr + row_head.to(tl.int64) * num_queries
    delta_base = delta_ptr + row_head.to(tl.int64) * num_queries

    d_k = tl.zeros([BLOCK_N, SIZE], tl.float32)
    d_v = tl.zeros([BLOCK_N, SIZE], tl.float32)
    # Queries before the first of these keys attend to them only in a prefix; those from ``whole`` on attend to all.
    begin = tl.where(first < prefix, 0, tl.maximum(first - query_offset, 0)) // BLOCK_M * BLOCK_M
    whole = tl.where(
        first + BLOCK_N <= prefix, begin, tl.cdiv(tl.maximum(first + BLOCK_N - 1 - query_offset, 0), BLOCK_M) * BLOCK_M
    )
    whole = tl.where((first >= start) & (first + BLOCK_N <= length), whole, num_queries)
    if BIASED:
        begin, whole = 0, num_queries
    d_k, d_v = _key_gradient(
        d_k, d_v, k, v, q_base, d_out_base, lse_base, delta_base, bias_base, key_N, row_head, begin,
        tl.minimum(whole, num_queries), start, prefix, length, q_t, q_k, o_t, o_k, bias_t, bias_s, num_queries,
        num_keys, seed, keep, ALPHA, DIVISOR, HALF, DROPS, True, BIASED, HEAD, SIZE, BLOCK_M,
    )  # fmt: skip
    if not BIASED:
        d_k, d_v = _key_gradient(
            d_k, d_v, k, v, q_base, d_out_base, lse_base, delta_base, bias_base, key_N, row_head, whole,
            num_queries, start, prefix, length, q_t, q_k, o_t, o_k, bias_t, bias_s, num_queries, num_keys,
            seed, keep, ALPHA, DIVISOR, HALF, DROPS, False, BIASED, HEAD, SIZE, BLOCK_M,
        )  # fmt: skip
    _store(d_k_ptr + row * g_b + head * g_h, d_k * scale, key_N, g_s, num_keys, g_k, HEAD, SIZE)
    _store(d_v_ptr + row * g_b + head * g_h, d_v, key_N, g_s, num_keys, g_k, HEAD, SIZE)


def attention_triton(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    bias_B1TS: Tensor | None = None,
    *,
    left_padding_B: Tensor | None = None,
    prefix_lengths_B: Tensor | None = None,
    lengths_B: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    accumulate_dtype: str = "float32",
    relaxed: bool = True,
) -> Tensor:
    """Compute ``attention`` with the Triton kernels; differentiable in queries, keys and values.

    Args:
        q_BHTK: Queries, float32, float16 or bfloat16, with a head size of 16 to 128.
        k_BHSK: Keys, like the queries.
        v_BHSK: Values, like the queries.
        bias_B1TS: Bias of the scores, a constant.
        left_padding_B: As in ``attention``.
        prefix_lengths_B: As in ``attention``.
        lengths_B: As in ``attention``.
        dropout: Fraction of dropped weights, in [0, 1).
        seed: Seed of the dropout mask.
        accumulate_dtype: ``"float32"``, or ``"float16"`` for float16 inputs.
        relaxed: Whether to apply PB-relax; False shows its effect.

    Returns:
        Attention output (B, H, T, K) in the dtype of the queries.

    Raises:
        ValueError: The inputs do not fit together or the kernels do not support them; nothing was launched.
    """
    check_floats("q_BHTK", q_BHTK)
    check_inputs(
        q_BHTK, k_BHSK, v_BHSK, bias_B1TS, left_padding_B, prefix_lengths_B, lengths_B, dropout, accumulate_dtype
    )
    size, num_keys = q_BHTK.shape[3], k_BHSK.shape[2]
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"q_BHTK must have heads of {SMALLEST} to {LARGEST}, got {size}")
    limits_3B = None
    if left_padding_B is not None or prefix_lengths_B is not None or lengths_B is not None:
        zeros_B = torch.zeros(len(q_BHTK), dtype=torch.int64, device=q_BHTK.device)
        limits = left_padding_B, prefix_lengths_B, zeros_B + num_keys if lengths_B is None else lengths_B
        limits_3B = torch.stack([zeros_B if limit is None else limit for limit in limits])
    half = accumulate_dtype == "float16"
    out_BHTK: Tensor
    out_BHTK, _ = _attend(q_BHTK, k_BHSK, v_BHSK, limits_3B, bias_B1TS, dropout, fold_seed(seed), half, relaxed)
    return out_BHTK


@torch.library.custom_op("cogview::attention", mutates_args=())
def _attend(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    limits_3B: Tensor | None,
    bias_B1TS: Tensor | None,
    dropout: float,
    seed: int,
    half: bool,
    relaxed: bool,
) -> tuple[Tensor, Tensor]:
    out_BHTK = torch.empty(q_BHTK.shape, dtype=q_BHTK.dtype, device=q_BHTK.device)
    lse_BHT = torch.empty(q_BHTK.shape[:3], dtype=torch.float32, device=q_BHTK.device)
    config = _launch_config(q_BHTK, k_BHSK, limits_3B, bias_B1TS, dropout, seed, half, relaxed)
    blocks = _blocks(q_BHTK, backward=False)
    _forward_kernel[(triton.cdiv(q_BHTK.shape[2], blocks["BLOCK_M"]), q_BHTK.shape[0] * q_BHTK.shape[1])](
        q_BHTK, k_BHSK, v_BHSK, out_BHTK, lse_BHT, limits_3B, q_BHTK if bias_B1TS is None else bias_B1TS,
        *q_BHTK.stride(), *k_BHSK.stride(), *v_BHSK.stride(), *out_BHTK.stride(), *_bias_strides(bias_B1TS),
        **config, **blocks,
    )  # fmt: skip
    return out_BHTK, lse_BHT


@_attend.register_fake
def _(q_BHTK, k_BHSK, v_BHSK, limits_3B, bias_B1TS, dropout, seed, half, relaxed):
    return torch.empty_like(q_BHTK, memory_format=torch.contiguous_format), q_BHTK.new_empty(
        q_BHTK.shape[:3], dtype=torch.float32
    )


@torch.library.custom_op("cogview::attention_backward", mutates_args=())
def _attend_backward(
    d_out_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    out_BHTK: Tensor,
    lse_BHT: Tensor,
    limits_3B: Tensor | None,
    bias_B1TS: Tensor | None,
    dropout: float,
    seed: int,
    half: bool,
    relaxed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q_BHTK, d_k_BHSK, d_v_BHSK = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BHTK, k_BHSK, v_BHSK)
    )
    delta_BHT = (d_out_BHTK.float() * out_BHTK.float()).sum(dim=-1)
    row_heads = q_BHTK.shape[0] * q_BHTK.shape[1]
    tensors = (
        q_BHTK,
        k_BHSK,
        v_BHSK,
        d_out_BHTK,
        lse_BHT,
        delta_BHT,
        limits_3B,
        q_BHTK if bias_B1TS is None else bias_B1TS,
    )
    strides = (
        *q_BHTK.stride(), *k_BHSK.stride(), *v_BHSK.stride(), *d_out_BHTK.stride(),
        *_bias_strides(bias_B1TS),
    )  # fmt: skip
    config = _launch_config(q_BHTK, k_BHSK, limits_3B, bias_B1TS, dropout, seed, half, relaxed)
    config |= {"scale": 1 / math.sqrt(q_BHTK.shape[3])} | _blocks(q_BHTK, backward=True)
    _backward_queries_kernel[(triton.cdiv(q_BHTK.shape[2], config["BLOCK_M"]), row_heads)](
        *tensors, d_q_BHTK, *strides, *d_q_BHTK.stride(), **config
    )
    _backward_keys_kernel[(triton.cdiv(k_BHSK.shape[2], config["BLOCK_N"]), row_heads)](
        *tensors, d_k_BHSK, d_v_BHSK, *strides, *d_k_BHSK.stride(), **config
    )
    return d_q_BHTK, d_k_BHSK, d_v_BHSK


@_attend_backward.register_fake
def _(d_out_BHTK, q_BHTK, k_BHSK, v_BHSK, *others):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BHTK, k_BHSK, v_BHSK))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.config = inputs[5:]


def _backward(ctx, d_out_BHTK, _):
    return *_attend_backward(d_out_BHTK, *ctx.saved_tensors, *ctx.config), *(None,) * 6


_attend.register_autograd(_backward, setup_context=_setup_context)


def _blocks(q_BHTK: Tensor, *, backward: bool) -> dict[str, int]:
    """Return block sizes that fit the registers, and the 64 kB of shared memory of the smallest cards (sm_75)."""
    size = max(16, triton.next_power_of_2(q_BHTK.shape[3]))
    if INTERPRETED:  # fewer programs
        return {"SIZE": size, "BLOCK_M": 128, "BLOCK_N": 64}
    if q_BHTK.dtype == torch.float32 or torch.cuda.get_device_capability(q_BHTK.device) < (8, 0):
        # Products without tensor cores: Triton keeps whole rows and columns of a block in registers.
        large = size > 64
        keys = 16 if large and backward else 32
        warps = 8 if large or backward else 4
        return {"SIZE": size, "BLOCK_M": 32, "BLOCK_N": keys, "num_warps": warps, "num_stages": 1}
    queries = 64 if size > 64 or backward else 128
    return {"SIZE": size, "BLOCK_M": queries, "BLOCK_N": 64 if size <= 64 else 32, "num_warps": 4, "num_stages": 2}


def _bias_strides(bias_B1TS: Tensor | None) -> tuple[int, ...]:
    """Return the strides of row, query and key; 0 for an axis of size 1."""
    if bias_B1TS is None:
        return 0, 0, 0
    return tuple(bias_B1TS.stride(axis) if bias_B1TS.shape[axis] > 1 else 0 for axis in (0, 2, 3))


def _launch_config(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    limits_3B: Tensor | None,
    bias_B1TS: Tensor | None,
    dropout: float,
    seed: int,
    half: bool,
    relaxed: bool,
) -> dict[str, Any]:
    """Return the scalar arguments of all three kernels."""
    num_rows, num_heads, num_queries, size = q_BHTK.shape
    divisor = 2.0 ** round(math.log2((ALPHA if relaxed else 1.0) * math.sqrt(size)))
    return {
        "num_rows": num_rows,
        "num_heads": num_heads,
        "num_queries": num_queries,
        "num_keys": k_BHSK.shape[2],
        "seed": seed,
        "keep": 1 - dropout,
        "HEAD": size,
        "ALPHA": divisor / math.sqrt(size),
        "DIVISOR": divisor,
        "HALF": half,
        "DROPS": dropout > 0,
        "LIMITED": limits_3B is not None,
        "BIASED": bias_B1TS is not None,
    }
