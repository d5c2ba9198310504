"""Attention of a few new positions against a long cache, without gradients: a step of decoding.

Keys and values may be int8 with a scale per position and head (``quantize_per_position``). Rows may share one stored
copy of their prefix (``SharedPrefix``). Each row may have another number of filled positions, ``lengths_B``, which is
read on the device, so that one captured CUDA graph serves every length. The reference is the specification; the kernels
are in ``decode_attention_triton.py``. The model uses all arguments but ``lengths_B``, which is a library offer.
"""

# B rows, H heads, T new positions (queries), S positions of a row (keys), K size of a head
# P prefixes, N rows that share one (at most), C positions of a prefix
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cogview.kernels.attention import attention_bias, causal_bias, relaxed_scores, relaxed_softmax
from cogview.kernels.checks import check_int64, check_matches
from cogview.kernels.dispatch import select_backend

MAX_HEAD_SIZE = 128


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """Keys and values of P prefixes, each stored once for all rows that share it.

    Attributes:
        keys_PHCK: Keys, in the dtype of the queries, or int8 with ``scales``.
        values_PHCK: Values, like the keys.
        rows_PN: Rows that have each prefix, int64; arbitrary rows where there are fewer than N.
        slots_B: Index of each row in ``rows_PN``, flattened, int64.
        scales: Scales (P, H, C, 1) of keys and values, in the dtype of the queries; None unless int8.
    """

    keys_PHCK: Tensor
    values_PHCK: Tensor
    rows_PN: Tensor
    slots_B: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def gather_by_prefix(self, x_BHTX: Tensor) -> Tensor:
        """Arrange (B, H, T, X) of the rows by prefix: (P, H, N T, X)."""
        x_PNHTX = x_BHTX[self.rows_PN]
        return x_PNHTX.transpose(1, 2).flatten(2, 3)

    def scatter_to_rows(self, x_PHMX: Tensor) -> Tensor:
        """Arrange (P, H, N T, X) of the prefixes by row: (B, H, T, X)."""
        x_PHNTX = x_PHMX.unflatten(2, (self.rows_PN.shape[1], -1))
        x_BHTX: Tensor = x_PHNTX.transpose(1, 2).flatten(0, 1)[self.slots_B]
        return x_BHTX


def quantize_per_position(x_K: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize keys or values to int8, with a scale per position and head.

    Args:
        x_K: Keys or values (..., K), of any floating-point dtype.

    Returns:
        int8 (..., K), and scales (..., 1) in the dtype of ``x_K``: the largest absolute value / 127.
    """
    scale = (x_K.abs().amax(dim=-1, keepdim=True) / 127).clamp_(min=torch.finfo(x_K.dtype).tiny)
    return (x_K / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def decode_attention_reference(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    bias_B1TS: Tensor | None = None,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    lengths_B: Tensor | None = None,
    prefix: SharedPrefix | None = None,
) -> Tensor:
    """Compute ``decode_attention``: scales multiply scores and weights, and a prefix is read once for all its rows.

    Args:
        q_BHTK: As in ``decode_attention``, and so are the others.
        k_BHSK: Keys.
        v_BHSK: Values.
        bias_B1TS: Bias of the scores.
        scales: Scales of int8 keys and values.
        lengths_B: Filled positions of each row.
        prefix: Shared prefixes.

    Returns:
        The outputs (B, H, T, K).
    """
    length = 0 if prefix is None else prefix.keys_PHCK.shape[2]
    if lengths_B is not None:
        k_BHSK, v_BHSK, scales = _filled(k_BHSK, v_BHSK, scales, lengths_B)
        bias_B1TS = _bias_of_filled(q_BHTK, length + k_BHSK.shape[2], bias_B1TS, length + lengths_B)
    elif bias_B1TS is None:
        bias_B1TS = causal_bias(q_BHTK.shape[2], length + k_BHSK.shape[2], q_BHTK.device, q_BHTK.dtype)
    k_scale, v_scale = scales or (None, None)
    scores = _scores(q_BHTK, k_BHSK, k_scale)
    if prefix is None:
        weights = _weights(scores, bias_B1TS, lengths_B)
        return _weighted_values(weights, v_BHSK, v_scale, q_BHTK.dtype)
    k_scale_PHC1, v_scale_PHC1 = prefix.scales or (None, None)
    prefix_scores = prefix.scatter_to_rows(_scores(prefix.gather_by_prefix(q_BHTK), prefix.keys_PHCK, k_scale_PHC1))
    scores = torch.cat([prefix_scores, scores], dim=-1)
    del prefix_scores
    weights = _weights(scores, bias_B1TS, lengths_B)
    shared = prefix.gather_by_prefix(weights[..., :length])
    from_prefix_BHTK = prefix.scatter_to_rows(_weighted_values(shared, prefix.values_PHCK, v_scale_PHC1, q_BHTK.dtype))
    return from_prefix_BHTK + _weighted_values(weights[..., length:], v_BHSK, v_scale, q_BHTK.dtype)


def _scores(q: Tensor, k: Tensor, scale: Tensor | None) -> Tensor:
    """Return relaxed scores in float32, multiplied by the scales of int8 keys."""
    if scale is None:
        return relaxed_scores(q, k)
    return relaxed_scores(q, k.to(q.dtype)) * scale.transpose(-1, -2).float()


def _weights(scores: Tensor, bias_B1TS: Tensor, lengths_B: Tensor | None) -> Tensor:
    """Return attention weights in float32."""
    weights = relaxed_softmax(scores, bias_B1TS)
    # In a row without filled positions a query attends to no key.
    return weights if lengths_B is None else weights.masked_fill(bias_B1TS.isneginf(), 0.0)


def _weighted_values(weights: Tensor, v: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return weights times values, with the scales of int8 values."""
    if scale is not None:
        weights = weights * scale.transpose(-1, -2).float()
    return weights.to(dtype) @ v.to(dtype)


def _filled(
    k_BHSK: Tensor, v_BHSK: Tensor, scales: tuple[Tensor, Tensor] | None, lengths_B: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return copies that are zero after the filled positions, since 0 times nan is nan."""
    unfilled_BS = torch.arange(k_BHSK.shape[2], device=k_BHSK.device) >= lengths_B.unsqueeze(1)
    k, v, *filled_scales = (x.masked_fill(unfilled_BS[:, None, :, None], 0) for x in (k_BHSK, v_BHSK, *(scales or ())))
    return k, v, (filled_scales[0], filled_scales[1]) if filled_scales else None


def _bias_of_filled(q_BHTK: Tensor, num_keys: int, bias_B1TS: Tensor | None, lengths_B: Tensor) -> Tensor:
    """Return (B, 1, T, S): the given or the causal bias, and -inf from ``lengths_B`` on."""
    if bias_B1TS is None:
        queries_BT = lengths_B.unsqueeze(1) + torch.arange(-q_BHTK.shape[2], 0, device=lengths_B.device)
        return attention_bias(q_BHTK.new_zeros(1, num_keys), queries_BT)
    keys_S = torch.arange(num_keys, device=lengths_B.device)
    return bias_B1TS.masked_fill(keys_S >= lengths_B.view(-1, 1, 1, 1), -torch.inf)


def decode_attention(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    bias_B1TS: Tensor | None = None,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    lengths_B: Tensor | None = None,
    prefix: SharedPrefix | None = None,
) -> Tensor:
    """Compute the attention of T new positions over C positions of a prefix and S of the row itself.

    Scores are scaled by 1 / sqrt(K). Without a bias the queries are the last T of C + ``lengths_B`` positions, and
    attention is causal. With ``lengths_B`` the output of a query without visible keys is zero.

    Args:
        q_BHTK: Queries, with a head size of at most 128.
        k_BHSK: Keys of each row, in the dtype of the queries or int8; strided views are allowed.
        v_BHSK: Values, like the keys.
        bias_B1TS: Bias (B or 1, 1, T or 1, C + S) of the scores, in the dtype of the queries (``attention_bias``).
        scales: Scales (B, H, S, 1) of int8 keys and values, in the dtype of the queries.
        lengths_B: Number of filled positions of each row, int64 from 0 to S; the others are neither attended to nor
            read. None for S.
        prefix: Prefixes that rows share, before their own positions.

    Returns:
        Attention output (B, H, T, K) in the dtype of the queries.

    Raises:
        ValueError: The inputs do not fit together, or there are more queries than positions and no bias.
    """
    attend: Callable[..., Tensor]
    if select_backend("decode_attention", q_BHTK.device.type, available=("reference", "triton")) == "triton":
        from cogview.kernels.decode_attention_triton import decode_attention_triton as attend
    else:
        check_inputs(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, scales, lengths_B, prefix)
        attend = decode_attention_reference
    return attend(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, scales=scales, lengths_B=lengths_B, prefix=prefix)


def check_inputs(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    bias_B1TS: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    lengths_B: Tensor | None,
    prefix: SharedPrefix | None,
) -> None:
    """Raise ValueError for arguments that ``decode_attention`` does not support.

    Args:
        q_BHTK: As in ``decode_attention``, and so are the others.
        k_BHSK: Keys.
        v_BHSK: Values.
        bias_B1TS: Bias of the scores.
        scales: Scales of int8 keys and values.
        lengths_B: Filled positions of each row.
        prefix: Shared prefixes.
    """
    if q_BHTK.ndim != 4 or not 1 <= q_BHTK.shape[3] <= MAX_HEAD_SIZE:
        raise ValueError(f"q_BHTK must be (B, H, T, K), K at most {MAX_HEAD_SIZE}, got {tuple(q_BHTK.shape)}")
    rows, _, num_queries, _ = q_BHTK.shape
    _check_stored(("k_BHSK", "v_BHSK", "scales"), (k_BHSK, v_BHSK), scales, q_BHTK, rows)
    own_keys = num_keys = k_BHSK.shape[2]
    if prefix is not None:
        stored = (prefix.keys_PHCK, prefix.values_PHCK)
        names = ("prefix.keys_PHCK", "prefix.values_PHCK", "prefix.scales")
        num_prefixes = len(prefix.keys_PHCK)
        num_slots = prefix.rows_PN.shape[-1]
        shape = (num_prefixes, num_slots)
        _check_stored(names, stored, prefix.scales, q_BHTK, num_prefixes)
        check_int64("prefix.rows_PN", prefix.rows_PN, q_BHTK.device, shape, rows - 1)
        slots = num_prefixes * num_slots
        check_int64("prefix.slots_B", prefix.slots_B, q_BHTK.device, (rows,), slots - 1)
        num_keys += prefix.keys_PHCK.shape[2]
    if lengths_B is not None:
        check_int64("lengths_B", lengths_B, q_BHTK.device, (rows,), own_keys)
    if bias_B1TS is None:
        if num_queries > num_keys:
            raise ValueError(f"q_BHTK: {num_queries} queries cannot be the last of {num_keys} positions")
        return
    if bias_B1TS.dtype != q_BHTK.dtype or bias_B1TS.device != q_BHTK.device:
        raise ValueError(
            f"bias_B1TS must be {q_BHTK.dtype} on {q_BHTK.device} as q is, got {bias_B1TS.dtype} on {bias_B1TS.device}"
        )
    if tuple(bias_B1TS.shape) not in [(b, 1, t, num_keys) for b in (1, rows) for t in (1, num_queries)]:
        raise ValueError(
            f"bias_B1TS must be ({rows} or 1, 1, {num_queries} or 1, {num_keys}), got {tuple(bias_B1TS.shape)}"
        )


def _check_stored(
    names: tuple[str, str, str],
    stored: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    q_BHTK: Tensor,
    rows: int,
) -> None:
    """Check keys and values, and their scales if they are int8."""
    _, heads, _, size = q_BHTK.shape
    length = stored[0].shape[2] if stored[0].ndim == 4 else 0
    like = q_BHTK if scales is None else q_BHTK.new_empty(0, dtype=torch.int8)
    like_name = "q" if scales is None else "a tensor with scales"
    for name, tensor in zip(names, stored, strict=False):
        check_matches(name, tensor, like_name, like, (rows, heads, length, size))
    for scale in scales or ():
        check_matches(names[2], scale, "q", q_BHTK, (rows, heads, length, 1))
