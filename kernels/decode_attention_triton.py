"""Attention against a long cache in Triton, split over the cache (Flash-Decoding, T. Dao et al. 2023).

A step of decoding takes as long as reading the keys and values does, and a program for each row and head is too few of
them. So the positions are divided among several programs, each of which leaves its largest score, the sum of its
weights and the values that they mix, in float32; a second kernel merges them in a fixed order, so that results are the
same every time. A row's own positions and a beginning that rows share are a launch each. A program of a beginning asks
for all its rows at once, so it is read once. How many positions are filled is read on the device, and just those are
divided.

Scores are float32 from the start, as logarithms to the base 2: what PB-relax prevents cannot happen to them.
"""

# B rows, H heads, T queries, S keys of a row's own, C of a beginning, K size of a head, X splits
# P parts: the rows, or the beginnings; M queries and N keys of a block
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview.kernels.decode_attention import SharedPrefix, check_inputs
from cogview.kernels.triton_utils import INTERPRETED, LEAST, LOG2_E, check_floats, dot

MOST_SPLITS = 32
LEAST_KEYS = 64  # of a split
PROGRAMS = 32  # for each processor, if there are keys enough: some four times as many as it runs at once
INTERPRETED_PROCESSORS = 1

# What follows from batch and length compiles nothing anew: whether it is 1 or divides by 16 is not looked at.
_VARYING = [
    "k_scale_p", "k_scale_h", "v_scale_p", "v_scale_h", "bias_b", "bias_t",
    "num_members", "num_queries", "num_keys", "own_keys", "first_key", "shift", "num_blocks",
]  # fmt: skip
_UNALIGNED = ["k_scale_ptr", "v_scale_ptr", "bias_ptr", "lengths_ptr", "members_ptr"]


@triton.jit
def _lse_weight(count):
    """From where to where this program reads, of ``count`` keys."""
    each = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), 16) * 16  # no line of memory is read by two
    begin = tl.program_id(1) * each
    return begin, tl.minimum(begin + each, count)


@triton.jit
def _load(base, key_N, inside_N, stride, size_stride, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """(N, PADDED) of keys or values; zero where not ``inside``."""
    column = tl.arange(0, PADDED)[None, :]
    inside = inside_N[:, None] if SIZE == PADDED else inside_N[:, None] & (column < SIZE)
    return tl.load(base + key_N[:, None] * stride + column * size_stride, mask=inside, other=0)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _one_query_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, lengths_ptr, members_ptr, mixed_ptr, stats_ptr,
    q_b, q_h, q_t, q_k, k_p, k_h, k_s, k_k, v_p, v_h, v_s, v_k,
    k_scale_p, k_scale_h, k_scale_s, v_scale_p, v_scale_h, v_scale_s, bias_b, bias_t, bias_s,
    num_heads, num_members, num_queries, num_keys, own_keys, first_key, shift, num_blocks, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A part is a row and has one query: every place of a block has a softmax of its own, and they meet at the end."""
    row_head = tl.program_id(0).to(tl.int64)
    row, head = row_head // num_heads, row_head % num_heads
    count = num_keys
    if lengths_ptr is not None:
        count = tl.minimum(tl.load(lengths_ptr + row).to(tl.int32), num_keys)
    begin, end = _lse_weight(count)
    k_base, v_base = k_ptr + row * k_p + head * k_h, v_ptr + row * v_p + head * v_h

    column_K = tl.arange(0, PADDED)
    q_K = tl.load(q_ptr + row * q_b + head * q_h + column_K * q_k, mask=column_K < SIZE, other=0).to(tl.float32)
    q_K *= scale * LOG2_E
    most_N = tl.full([BLOCK_N], LEAST, tl.float32)
    sum_N = tl.zeros([BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_N, PADDED], tl.float32)
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
        larger_N = tl.maximum(most_N, scores_N)
        weights_N = tl.exp2(scores_N - larger_N)
        shrunk_N = tl.exp2(most_N - larger_N)
        sum_N = sum_N * shrunk_N + weights_N
        if v_scale_ptr is not None:
            v_scale_base = v_scale_ptr + row * v_scale_p + head * v_scale_h
            weights_N *= tl.load(v_scale_base + key_N * v_scale_s, mask=inside_N, other=0).to(tl.float32)
        mixed = mixed * shrunk_N[:, None] + weights_N[:, None] * v.to(tl.float32)
        most_N = larger_N

    most = tl.max(most_N, 0)
    shrunk_N = tl.exp2(most_N - most)
    line = row_head * tl.num_programs(1) + tl.program_id(1)
    mixed_K = tl.sum(mixed * shrunk_N[:, None], 0)
    tl.store(mixed_ptr + line * SIZE + column_K, mixed_K, mask=column_K < SIZE)
    tl.store(stats_ptr + line * 2, most)
    tl.store(stats_ptr + line * 2 + 1, tl.sum(sum_N * shrunk_N, 0))


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, bias_ptr, lengths_ptr, members_ptr, mixed_ptr, stats_ptr,
    q_b, q_h, q_t, q_k, k_p, k_h, k_s, k_k, v_p, v_h, v_s, v_k,
    k_scale_p, k_scale_h, k_scale_s, v_scale_p, v_scale_h, v_scale_s, bias_b, bias_t, bias_s,
    num_heads, num_members, num_queries, num_keys, own_keys, first_key, shift, num_blocks, scale,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of the queries of all rows that have a part; with ``members_ptr`` a part is a beginning, else a row.

    Blocks of the same keys run side by side, so that one of them reads them for all.
    """
    part_head, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    part, head = (part_head // num_heads).to(tl.int64), (part_head % num_heads).to(tl.int64)
    index_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_M = index_M < num_members * num_queries
    member_M, query_M = index_M // num_queries, index_M % num_queries
    count = num_keys
    if members_ptr is not None:
        row_M = tl.load(members_ptr + part * num_members + member_M, mask=inside_M, other=0)
    else:
        row_M = part + tl.zeros([BLOCK_M], tl.int64)
        if lengths_ptr is not None:
            count = tl.minimum(tl.load(lengths_ptr + part).to(tl.int32), num_keys)
    if bias_ptr is None:  # the last key that a query sees
        length_M = tl.zeros([BLOCK_M], tl.int32) + own_keys
        if lengths_ptr is not None:
            length_M = tl.load(lengths_ptr + row_M, mask=inside_M, other=0).to(tl.int32)
        last_M = tl.where(inside_M, length_M + shift + query_M, -1)
        count = tl.minimum(tl.maximum(tl.max(last_M, 0) + 1, 0), count)
    begin, end = _lse_weight(count)
    k_base, v_base = k_ptr + part * k_p + head * k_h, v_ptr + part * v_p + head * v_h

    column_K = tl.arange(0, PADDED)
    inside_MK = inside_M[:, None] & (column_K < SIZE)[None, :]
    q_M = q_ptr + row_M * q_b + head * q_h + query_M * q_t
    q = tl.load(q_M[:, None] + column_K[None, :] * q_k, mask=inside_MK, other=0)
    most_M = tl.full([BLOCK_M], LEAST, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, PADDED], tl.float32)
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
        larger_M = tl.maximum(most_M, tl.max(scores, 1))
        weights = tl.exp2(scores - larger_M[:, None])
        shrunk_M = tl.exp2(most_M - larger_M)
        sum_M = sum_M * shrunk_M + tl.sum(weights, 1)
        if v_scale_ptr is not None:
            v_scale_base = v_scale_ptr + part * v_scale_p + head * v_scale_h
            weights *= tl.load(v_scale_base + key_N * v_scale_s, mask=inside_N, other=0).to(tl.float32)[None, :]
        mixed = mixed * shrunk_M[:, None] + dot(weights.to(q.dtype), v.to(q.dtype), False)
        most_M = larger_M

    slot_head_M = (part * num_members + member_M) * num_heads + head
    line_M = (slot_head_M * num_queries + query_M) * tl.num_programs(1) + tl.program_id(1)
    tl.store(mixed_ptr + line_M[:, None] * SIZE + column_K[None, :], mixed, mask=inside_MK)
    tl.store(stats_ptr + line_M * 2, most_M, mask=inside_M)
    tl.store(stats_ptr + line_M * 2 + 1, sum_M, mask=inside_M)


@triton.jit
def _load_splits(mixed_ptr, stats_ptr, line, splits, SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """Of one query: the largest score of each split, the sum of its weights, and what they mix."""
    split_X, column_K = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    inside_X = split_X < splits
    line_X = line * splits + split_X
    most_X = tl.load(stats_ptr + line_X * 2, mask=inside_X, other=LEAST)
    sum_X = tl.load(stats_ptr + line_X * 2 + 1, mask=inside_X, other=0.0)
    inside = inside_X[:, None] & (column_K < SIZE)[None, :]
    return most_X, sum_X, tl.load(mixed_ptr + line_X[:, None] * SIZE + column_K[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["splits", "shared_splits"])
def _merge_kernel(
    out_ptr, mixed_ptr, stats_ptr, splits, shared_mixed_ptr, shared_stats_ptr, slots_ptr, shared_splits,
    o_b, o_h, o_t, num_heads, num_queries,
    SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    query, row_head = line % num_queries, line // num_queries
    row, head = row_head // num_heads, row_head % num_heads
    most_X, sum_X, mixed_XK = _load_splits(mixed_ptr, stats_ptr, line, splits, SIZE, PADDED, SPLITS)
    most = tl.max(most_X, 0)
    if slots_ptr is not None:
        shared_line = (tl.load(slots_ptr + row) * num_heads + head) * num_queries + query
        shared_most_X, shared_sum_X, shared_XK = _load_splits(
            shared_mixed_ptr, shared_stats_ptr, shared_line, shared_splits, SIZE, PADDED, SPLITS
        )
        most = tl.maximum(most, tl.max(shared_most_X, 0))
    weights_X = tl.exp2(most_X - most)
    total = tl.sum(sum_X * weights_X, 0)
    mixed_K = tl.sum(mixed_XK * weights_X[:, None], 0)
    if slots_ptr is not None:
        shared_weights_X = tl.exp2(shared_most_X - most)
        total += tl.sum(shared_sum_X * shared_weights_X, 0)
        mixed_K += tl.sum(shared_XK * shared_weights_X[:, None], 0)
    column_K = tl.arange(0, PADDED)
    out_K = (mixed_K / tl.where(total == 0, 1.0, total)).to(out_ptr.dtype.element_ty)  # it may have seen nothing
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
    """``decode_attention``, its work divided for ``num_processors``, by default those of the device."""
    check_floats("q_BHTK", q_BHTK)
    check_inputs(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, scales, lengths_B, prefix)
    num_processors = num_processors or _processors_of(q_BHTK.device)
    k_scale, v_scale = scales or (None, None)
    shared: tuple[Tensor | None, ...] = (None,) * 6
    if prefix is not None:
        parts = (prefix.keys_PHCK, prefix.values_PHCK, *(prefix.scales or (None, None)))
        shared = (*parts, prefix.rows_PN.contiguous(), prefix.slots_B.contiguous())
    lengths_B = None if lengths_B is None else lengths_B.contiguous()
    return _attend(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, k_scale, v_scale, lengths_B, *shared, num_processors)


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
    members_PN: Tensor | None,
    slots_B: Tensor | None,
    num_processors: int,
) -> Tensor:
    rows, heads, num_queries, size = q_BHTK.shape
    own_keys, length = k_BHSK.shape[2], 0 if keys_PHCK is None else keys_PHCK.shape[2]
    if bias_B1TS is not None:
        bias_B1TS = bias_B1TS.expand(rows, 1, num_queries, length + own_keys)
    common = (bias_B1TS, lengths_B, own_keys, length, num_processors)
    mixed, stats = _split_attention(q_BHTK, k_BHSK, v_BHSK, k_scale_BHS1, v_scale_BHS1, None, length, *common)
    shared_mixed = shared_stats = None
    if keys_PHCK is not None and values_PHCK is not None:
        shared_mixed, shared_stats = _split_attention(
            q_BHTK, keys_PHCK, values_PHCK, k_scale_PHC1, v_scale_PHC1, members_PN, 0, *common
        )
    out_BHTK = _empty_like(q_BHTK)
    _merge_kernel[(rows * heads * num_queries,)](
        out_BHTK, mixed, stats, mixed.shape[1],
        shared_mixed, shared_stats, slots_B, 0 if shared_mixed is None else shared_mixed.shape[1],
        *out_BHTK.stride()[:3], heads, num_queries,
        SIZE=size, PADDED=_padded(size), SPLITS=MOST_SPLITS, num_warps=2,
    )  # fmt: skip
    return out_BHTK


@_attend.register_fake
def _(q_BHTK, *others):
    return _empty_like(q_BHTK)


def _empty_like(q_BHTK: Tensor) -> Tensor:
    """(B, H, T, K), the heads of a position next to one another, as they are wanted next."""
    rows, heads, num_queries, size = q_BHTK.shape
    return q_BHTK.new_empty((rows, num_queries, heads, size)).transpose(1, 2)


def _split_attention(
    q_BHTK: Tensor,
    keys: Tensor,
    values: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    members_PN: Tensor | None,
    first_key: int,
    bias_B1TS: Tensor | None,
    lengths_B: Tensor | None,
    own_keys: int,
    length: int,
    num_processors: int,
) -> tuple[Tensor, Tensor]:
    """Float32 (L, X, K) and (L, X, 2): what each split mixes, and its largest score and sum of weights.

    L are the queries: part, member, head and T.
    """
    parts, heads, num_keys, size = keys.shape
    num_queries = q_BHTK.shape[2]
    num_members = 1 if members_PN is None else members_PN.shape[1]
    one = num_queries == 1 and members_PN is None
    block_m, block_n = _blocks(q_BHTK, 1 if one else num_members * num_queries)
    num_blocks = triton.cdiv(num_members * num_queries, block_m)
    programs = parts * heads * num_blocks
    splits = splits_of(num_keys, programs, num_processors)
    mixed = q_BHTK.new_empty((parts * num_members * heads * num_queries, splits, size), dtype=torch.float32)
    stats = mixed.new_empty((len(mixed), splits, 2))
    kernel = _one_query_kernel if one else _queries_kernel
    kernel[(programs, splits)](
        q_BHTK, keys, values, k_scale, v_scale, bias_B1TS, lengths_B, members_PN, mixed, stats,
        *q_BHTK.stride(), *keys.stride(), *values.stride(), *_strides(k_scale, 0, 1, 2), *_strides(v_scale, 0, 1, 2),
        *_strides(bias_B1TS, 0, 2, 3),
        heads, num_members, num_queries, num_keys, own_keys, first_key, length - first_key - num_queries, num_blocks,
        1 / math.sqrt(size),
        SIZE=size, PADDED=_padded(size), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, num_stages=1 if one else 2,
    )  # fmt: skip
    return mixed, stats


def splits_of(num_keys: int, programs: int, num_processors: int) -> int:
    """Among how many each of ``programs`` is divided: enough for every processor, and no split too short."""
    wanted = triton.cdiv(PROGRAMS * num_processors, max(programs, 1))
    return max(1, min(wanted, triton.cdiv(num_keys, LEAST_KEYS), MOST_SPLITS))


def _blocks(q_BHTK: Tensor, num_queries: int) -> tuple[int, int]:
    """Queries and keys of a block: as many as leave registers for the rest, and so few kinds that rows add none."""
    size, full = _padded(q_BHTK.shape[3]), q_BHTK.dtype == torch.float32
    block_n = 32 if full or size > 64 or not _multiplies_blocks(q_BHTK.device) else 64
    if num_queries == 1:
        return 1, block_n
    return 16 if num_queries <= 16 or (full and size > 64) else 32, block_n


@functools.cache
def _multiplies_blocks(device: torch.device) -> bool:
    """Whether Triton uses tensor cores there; from sm_80 on it does."""
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (8, 0)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _strides(tensor: Tensor | None, *axes: int) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.stride(axis) for axis in axes)


@functools.cache
def _processors_of(device: torch.device) -> int:
    if INTERPRETED:
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
