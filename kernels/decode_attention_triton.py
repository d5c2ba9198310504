"""Attention against a long cache in Triton, split over the cache (Flash-Decoding, T. Dao et al. 2023).

=================  =======================================  ========================================================
kernel             grid                                     computes
=================  =======================================  ========================================================
_one_query_kernel  (rows heads) x splits                    a split of the keys of a row, for one query
_queries_kernel    (parts heads query blocks) x splits      a split of the keys of a row or of a shared prefix
_merge_kernel      rows heads queries                       the output from all splits
=================  =======================================  ========================================================

A step of decoding takes as long as reading the keys and values, and one program per row and head are too few to
saturate the memory. The positions are therefore split among several programs. Each writes its largest score, the sum of
its weights and the weighted values in float32; a second kernel merges them in a fixed order, so that results are
deterministic. The positions of a row and those of a shared prefix are one launch each. A program of a prefix computes
the queries of all its rows, so that the prefix is read once. The number of filled positions is read on the device, and
only these are split.

Scores are float32 logarithms to the base 2 from the start: the overflow that PB-relax prevents cannot occur.
"""

# B rows, H heads, T queries, S keys of a row, C keys of a prefix, K size of a head, X splits
# P parts: the rows, or the prefixes; M queries and N keys of a block
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview.kernels.decode_attention import SharedPrefix, check_inputs
from cogview.kernels.triton_utils import INTERPRETED, LOG2_E, MIN_SCORE, check_floats, dot

MAX_SPLITS = 32
MIN_KEYS = 64  # of a split, at least
PROGRAMS_PER_PROCESSOR = 32  # about four times as many as a processor runs concurrently
INTERPRETED_PROCESSORS = 1

# Arguments that depend on batch and length are not specialized on: other values compile no new kernel.
_VARYING = [
    "k_scale_p", "k_scale_h", "v_scale_p", "v_scale_h", "bias_b", "bias_t",
    "num_slots", "num_queries", "num_keys", "own_keys", "first_key", "shift", "num_blocks",
]  # fmt: skip
_UNALIGNED = ["k_scale_ptr", "v_scale_ptr", "bias_ptr", "lengths_ptr", "rows_ptr"]


@triton.jit
def _split_range(count):
    """Return the range of this program among ``count`` keys."""
    each = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), 16) * 16  # no cache line is read by two programs
    begin = tl.program_id(1) * each
    return begin, tl.minimum(begin + each, count)


@triton.jit
def _load(base, key_N, inside_N, stride, size_stride, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Load keys or values (N, PADDED); zero where not ``inside``."""
    column = tl.arange(0, PADDED)[None, :]
    inside = inside_N[:, None] if SIZE == PADDED else inside_N[:, None] & (column < SIZE)
    return tl.load(base + key_N[:, None] * stride + column * size_stride, mask=inside, other=0)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _one_query_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, lengths_ptr, rows_ptr, acc_ptr, stats_ptr,
    q_b, q_h, q_t, q_k, k_p, k_h, k_s, k_k, v_p, v_h, v_s, v_k,
    k_scale_p, k_scale_h, k_scale_s, v_scale_p, v_scale_h, v_scale_s, bias_b, bias_t, bias_s,
    num_heads, num_slots, num_queries, num_keys, own_keys, first_key, shift, num_blocks, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row with one query: each key of a block has a running softmax, and these are merged at the end."""
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // num_heads, row_head % num_heads
    count = num_keys
    if lengths_ptr is not None:
        count = tl.minimum(tl.load(lengths_ptr + row).to(tl.int32), num_keys)
    begin, end = _split_range(count)
    k_base, v_base = k_ptr + row * k_p + head * k_h, v_ptr + row * v_p + head * v_h

    column_K = tl.arange(0, PADDED)
    q_K = tl.load(q_ptr + row * q_b + head * q_h + column_K * q_k, mask=column_K < SIZE, other=0).to(tl.float32)
    q_K *= scale * LOG2_E
    max_N = tl.full([BLOCK_N], MIN_SCORE, tl.float32)
    sum_N = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, PADDED], tl.float32)
    for first in range(begin, end, BLOCK_N):
        key_N = first + tl.arange(0, BLOCK_N)
        inside_N = key_N < end
        k = _load(k_base, key_N, inside_N, k_s, k_k, SIZE, PADDED)
        v = _load(v_base, key_N, inside_N, v_s, v_k, SIZE, PADDED)
        scores_N = tl.sum(k.to(tl.float32) * q_K[None, :], 1)
        if k_scale_ptr is not None:
            k_scale_base = k_scale_ptr + row * k_scale_p + head * k_scale_h
            scores_N *= tl.load(k_scale_base + key_N * k_scale_s, mask=inside_N, other=0).to(tl.float32)
        if bias_ptr is not None:
            bias_N = tl.load(bias_ptr + row * bias_b + (first_key + key_N) * bias_s, mask=inside_N, other=0)
            scores_N += bias_N.to(tl.float32) * LOG2_E
        scores_N = tl.where(inside_N, scores_N, float("-inf"))
        new_max_N = tl.maximum(max_N, scores_N)
        weights_N = tl.exp2(scores_N - new_max_N)
        rescale_N = tl.exp2(max_N - new_max_N)
        sum_N = sum_N * rescale_N + weights_N
        if v_scale_ptr is not None:
            v_scale_base = v_scale_ptr + row * v_scale_p + head * v_scale_h
            weights_N *= tl.load(v_scale_base + key_N * v_scale_s, mask=inside_N, other=0).to(tl.float32)
        acc = acc * rescale_N[:, None] + weights_N[:, None] * v.to(tl.float32)
        max_N = new_max_N

    largest = tl.max(max_N, 0)
    rescale_N = tl.exp2(max_N - largest)
    line = row_head * tl.num_programs(1) + tl.program_id(1)
    acc_K = tl.sum(acc * rescale_N[:, None], 0)
    tl.store(acc_ptr + line * SIZE + column_K, acc_K, mask=column_K < SIZE)
    tl.store(stats_ptr + line * 2, largest)
    tl.store(stats_ptr + line * 2 + 1, tl.sum(sum_N * rescale_N, 0))


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, lengths_ptr, rows_ptr, acc_ptr, stats_ptr,
    q_b, q_h, q_t, q_k, k_p, k_h, k_s, k_k, v_p, v_h, v_s, v_k,
    k_scale_p, k_scale_h, k_scale_s, v_scale_p, v_scale_h, v_scale_s, bias_b, bias_t, bias_s,
    num_heads, num_slots, num_queries, num_keys, own_keys, first_key, shift, num_blocks, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of the queries of all rows of a part; with ``rows_ptr`` a part is a prefix, else a row.

    Blocks with the same keys run concurrently, so that the keys are read from memory once.
    """
    part_head, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    part, head = (part_head // num_heads).to(tl.int64), (part_head % num_heads).to(tl.int64)
    index_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_M = index_M < num_slots * num_queries
    slot_M, query_M = index_M // num_queries, index_M % num_queries
    count = num_keys
    if rows_ptr is not None:
        row_M = tl.load(rows_ptr + part * num_slots + slot_M, mask=inside_M, other=0)
    else:
        row_M = part + tl.zeros([BLOCK_M], tl.int64)
        if lengths_ptr is not None:
            count = tl.minimum(tl.load(lengths_ptr + part).to(tl.int32), num_keys)
    if bias_ptr is None:  # the last key that a query attends to
        length_M = tl.zeros([BLOCK_M], tl.int32) + own_keys
        if lengths_ptr is not None:
            length_M = tl.load(lengths_ptr + row_M, mask=inside_M, other=0).to(tl.int32)
        last_M = tl.where(inside_M, length_M + shift + query_M, -1)
        count = tl.minimum(tl.maximum(tl.max(last_M, 0) + 1, 0), count)
    begin, end = _split_range(count)
    k_base, v_base = k_ptr + part * k_p + head * k_h, v_ptr + part * v_p + head * v_h

    column_K = tl.arange(0, PADDED)
    inside_MK = inside_M[:, None] & (column_K < SIZE)[None, :]
    q_M = q_ptr + row_M * q_b + head * q_h + query_M * q_t
    q = tl.load(q_M[:, None] + column_K[None, :] * q_k, mask=inside_MK, other=0)
    max_M = tl.full([BLOCK_M], MIN_SCORE, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for first in range(begin, end, BLOCK_N):
        key_N = first + tl.arange(0, BLOCK_N)
        inside_N = key_N < end
        k = _load(k_base, key_N, inside_N, k_s, k_k, SIZE, PADDED)
        v = _load(v_base, key_N, inside_N, v_s, v_k, SIZE, PADDED)
        scores = dot(q, tl.trans(k.to(q.dtype)), False) * (scale * LOG2_E)
        if k_scale_ptr is not None:
            k_scale_base = k_scale_ptr + part * k_scale_p + head * k_scale_h
            scores *= tl.load(k_scale_base + key_N * k_scale_s, mask=inside_N, other=0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            bias_M = bias_ptr + row_M * bias_b + query_M.to(tl.int64) * bias_t
            bias_MN = bias_M[:, None] + (first_key + key_N)[None, :] * bias_s
            bias = tl.load(bias_MN, mask=inside_M[:, None] & inside_N[None, :], other=float("-inf"))
            scores += bias.to(tl.float32) * LOG2_E
        else:
            seen = inside_N[None, :] & (key_N[None, :] <= last_M[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max_M[:, None])
        rescale_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * rescale_M + tl.sum(weights, 1)
        if v_scale_ptr is not None:
            v_scale_base = v_scale_ptr + part * v_scale_p + head * v_scale_h
            weights *= tl.load(v_scale_base + key_N * v_scale_s, mask=inside_N, other=0).to(tl.float32)[None, :]
        acc = acc * rescale_M[:, None] + dot(weights.to(q.dtype), v.to(q.dtype), False)
        max_M = new_max_M

    slot_head_M = (part * num_slots + slot_M) * num_heads + head
    line_M = (slot_head_M * num_queries + query_M) * tl.num_programs(1) + tl.program_id(1)
    tl.store(acc_ptr + line_M[:, None] * SIZE + column_K[None, :], acc, mask=inside_MK)
    tl.store(stats_ptr + line_M * 2, max_M, mask=inside_M)
    tl.store(stats_ptr + line_M * 2 + 1, sum_M, mask=inside_M)


@triton.jit
def _load_splits(acc_ptr, stats_ptr, line, splits, SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """Load for one query the largest score of each split, its sum of weights and its weighted values."""
    split_X, column_K = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    inside_X = split_X < splits
    line_X = line * splits + split_X
    max_X = tl.load(stats_ptr + line_X * 2, mask=inside_X, other=MIN_SCORE)
    sum_X = tl.load(stats_ptr + line_X * 2 + 1, mask=inside_X, other=0.0)
    inside = inside_X[:, None] & (column_K < SIZE)[None, :]
    return max_X, sum_X, tl.load(acc_ptr + line_X[:, None] * SIZE + column_K[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["splits", "shared_splits"])
def _merge_kernel(
    out_ptr, acc_ptr, stats_ptr, splits, shared_acc_ptr, shared_stats_ptr, slots_ptr, shared_splits,
    o_b, o_h, o_t, num_heads, num_queries,
    SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    query, row_head = line % num_queries, line // num_queries
    row, head = row_head // num_heads, row_head % num_heads
    max_X, sum_X, acc_XK = _load_splits(acc_ptr, stats_ptr, line, splits, SIZE, PADDED, SPLITS)
    largest = tl.max(max_X, 0)
    if slots_ptr is not None:
        shared_line = (tl.load(slots_ptr + row) * num_heads + head) * num_queries + query
        shared_max_X, shared_sum_X, shared_XK = _load_splits(
            shared_acc_ptr, shared_stats_ptr, shared_line, shared_splits, SIZE, PADDED, SPLITS
        )
        largest = tl.maximum(largest, tl.max(shared_max_X, 0))
    weights_X = tl.exp2(max_X - largest)
    total = tl.sum(sum_X * weights_X, 0)
    acc_K = tl.sum(acc_XK * weights_X[:, None], 0)
    if slots_ptr is not None:
        shared_weights_X = tl.exp2(shared_max_X - largest)
        total += tl.sum(shared_sum_X * shared_weights_X, 0)
        acc_K += tl.sum(shared_XK * shared_weights_X[:, None], 0)
    column_K = tl.arange(0, PADDED)
    out_K = (acc_K / tl.where(total == 0, 1.0, total)).to(out_ptr.dtype.element_ty)  # no key may be visible
    tl.store(out_ptr + row * o_b + head * o_h + query * o_t + column_K, out_K, mask=column_K < SIZE)


def decode_attention_triton(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    bias_B1TS: Tensor | None = None,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    lengths_B: Tensor | None = None,
    prefix: SharedPrefix | None = None,
    num_processors: int | None = None,
) -> Tensor:
    """Compute ``decode_attention`` with the Triton kernels.

    Args:
        q_BHTK: Queries, float32, float16 or bfloat16.
        k_BHSK: Keys of each row.
        v_BHSK: Values of each row.
        bias_B1TS: As in ``decode_attention``.
        scales: As in ``decode_attention``.
        lengths_B: As in ``decode_attention``.
        prefix: As in ``decode_attention``.
        num_processors: Number of processors that the work is split for; None for those of the device.

    Returns:
        Attention output (B, H, T, K) in the dtype of the queries.

    Raises:
        ValueError: The inputs do not fit together or the kernels do not support them; nothing was launched.
    """
    check_floats("q_BHTK", q_BHTK)
    check_inputs(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, scales, lengths_B, prefix)
    num_processors = num_processors or _processors_of(q_BHTK.device)
    k_scale, v_scale = scales or (None, None)
    shared: tuple[Tensor | None, ...] = (None,) * 6
    if prefix is not None:
        parts = (prefix.keys_PHCK, prefix.values_PHCK, *(prefix.scales or (None, None)))
        shared = (*parts, prefix.rows_PN.contiguous(), prefix.slots_B.contiguous())
    lengths_B = None if lengths_B is None else lengths_B.contiguous()
    out_BHTK: Tensor = _attend(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, k_scale, v_scale, lengths_B, *shared, num_processors)
    return out_BHTK


@torch.library.custom_op("cogview::decode_attention", mutates_args=())
def _attend(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    bias_B1TS: Tensor | None,
    k_scale_BHS1: Tensor | None,
    v_scale_BHS1: Tensor | None,
    lengths_B: Tensor | None,
    keys_PHCK: Tensor | None,
    values_PHCK: Tensor | None,
    k_scale_PHC1: Tensor | None,
    v_scale_PHC1: Tensor | None,
    rows_PN: Tensor | None,
    slots_B: Tensor | None,
    num_processors: int,
) -> Tensor:
    rows, heads, num_queries, size = q_BHTK.shape
    own_keys, length = k_BHSK.shape[2], 0 if keys_PHCK is None else keys_PHCK.shape[2]
    if bias_B1TS is not None:
        bias_B1TS = bias_B1TS.expand(rows, 1, num_queries, length + own_keys)
    common = (bias_B1TS, lengths_B, own_keys, length, num_processors)
    acc, stats = _split_attention(q_BHTK, k_BHSK, v_BHSK, k_scale_BHS1, v_scale_BHS1, None, length, *common)
    shared_acc = shared_stats = None
    if keys_PHCK is not None and values_PHCK is not None:
        shared_acc, shared_stats = _split_attention(
            q_BHTK, keys_PHCK, values_PHCK, k_scale_PHC1, v_scale_PHC1, rows_PN, 0, *common
        )
    out_BHTK = _empty_like(q_BHTK)
    _merge_kernel[(rows * heads * num_queries,)](
        out_BHTK, acc, stats, acc.shape[1],
        shared_acc, shared_stats, slots_B, 0 if shared_acc is None else shared_acc.shape[1],
        *out_BHTK.stride()[:3], heads, num_queries,
        SIZE=size, PADDED=_padded(size), SPLITS=MAX_SPLITS, num_warps=2,
    )  # fmt: skip
    return out_BHTK


@_attend.register_fake
def _(q_BHTK, *others):
    return _empty_like(q_BHTK)


def _empty_like(q_BHTK: Tensor) -> Tensor:
    """Return an empty (B, H, T, K) in which the heads of a position are adjacent, as the output projection reads it."""
    rows, heads, num_queries, size = q_BHTK.shape
    return q_BHTK.new_empty((rows, num_queries, heads, size)).transpose(1, 2)


def _split_attention(
    q_BHTK: Tensor,
    keys: Tensor,
    values: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    rows_PN: Tensor | None,
    first_key: int,
    bias_B1TS: Tensor | None,
    lengths_B: Tensor | None,
    own_keys: int,
    length: int,
    num_processors: int,
) -> tuple[Tensor, Tensor]:
    """Return float32 (L, X, K) and (L, X, 2): weighted values of each split; its largest score and sum of weights.

    L counts the queries: part, slot, head and T.
    """
    parts, heads, num_keys, size = keys.shape
    num_queries = q_BHTK.shape[2]
    num_slots = 1 if rows_PN is None else rows_PN.shape[1]
    one = num_queries == 1 and rows_PN is None
    block_m, block_n = _blocks(q_BHTK, 1 if one else num_slots * num_queries)
    num_blocks = triton.cdiv(num_slots * num_queries, block_m)
    programs = parts * heads * num_blocks
    splits = splits_of(num_keys, programs, num_processors)
    acc = q_BHTK.new_empty((parts * num_slots * heads * num_queries, splits, size), dtype=torch.float32)
    stats = acc.new_empty((len(acc), splits, 2))
    kernel = _one_query_kernel if one else _queries_kernel
    kernel[(programs, splits)](
        q_BHTK, keys, values, k_scale, v_scale, bias_B1TS, lengths_B, rows_PN, acc, stats,
        *q_BHTK.stride(), *keys.stride(), *values.stride(), *_strides(k_scale, 0, 1, 2), *_strides(v_scale, 0, 1, 2),
        *_strides(bias_B1TS, 0, 2, 3),
        heads, num_slots, num_queries, num_keys, own_keys, first_key, length - first_key - num_queries, num_blocks,
        1 / math.sqrt(size),
        SIZE=size, PADDED=_padded(size), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, num_stages=1 if one else 2,
    )  # fmt: skip
    return acc, stats


def splits_of(num_keys: int, programs: int, num_processors: int) -> int:
    """Return the number of splits: enough programs for every processor, and no split too short.

    Args:
        num_keys: Number of keys to split.
        programs: Number of programs per split.
        num_processors: Number of processors of the device.
    """
    wanted: int = triton.cdiv(PROGRAMS_PER_PROCESSOR * num_processors, max(programs, 1))
    return max(1, min(wanted, int(triton.cdiv(num_keys, MIN_KEYS)), MAX_SPLITS))


def _blocks(q_BHTK: Tensor, num_queries: int) -> tuple[int, int]:
    """Return the queries and keys of a block: few variants, so that another number of rows compiles no new kernel."""
    size, full = _padded(q_BHTK.shape[3]), q_BHTK.dtype == torch.float32
    block_n = 32 if full or size > 64 or not _multiplies_blocks(q_BHTK.device) else 64
    if num_queries == 1:
        return 1, block_n
    return 16 if num_queries <= 16 or (full and size > 64) else 32, block_n


@functools.cache
def _multiplies_blocks(device: torch.device) -> bool:
    """Return whether Triton uses tensor cores on ``device``: from sm_80 on."""
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (8, 0)


def _padded(size: int) -> int:
    """Return the head size padded to a power of two, at least 16."""
    padded: int = max(16, triton.next_power_of_2(size))
    return padded


def _strides(tensor: Tensor | None, *axes: int) -> tuple[int, ...]:
    """Return the strides of ``axes``; 0 without a tensor."""
    return tuple(0 if tensor is None else tensor.stride(axis) for axis in axes)


@functools.cache
def _processors_of(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``."""
    if INTERPRETED:
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
