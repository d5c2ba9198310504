"""Attention of one or a few new positions against a long cache, without gradients: a step of decoding.

Keys and values may be rounded to int8 with a scale for each position of each head (``quantize_per_position``), rows may
share one stored copy of how they begin (``Beginning``), and each row may have as many filled positions as its entry of
``lengths_B`` says, which is read on the device: one captured CUDA graph then serves every length. The reference is the
specification; the kernels are in ``decode_attention_triton.py``.
"""

# B batch, H heads, T new positions (queries), S positions of a row's own (keys), K size of a head
# P beginnings, N rows that share one (at most), C positions of a beginning
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cogview.kernels.attention import attention_bias, causal_bias, relaxed_scores, relaxed_softmax
from cogview.kernels.checks import check_int64, check_matches
from cogview.kernels.dispatch import select_backend

LARGEST = 128  # size of a head


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """Keys and values (P, H, C, K) of positions that stand before a row's own, stored once for all rows that have them.

    They are in the dtype of the queries, or int8 with ``scales`` (P, H, C, 1) of both. ``members_PN`` (int64) are the
    rows that have each beginning, any row where there are fewer than N; row b stands at ``slots_B[b]`` (int64) of it,
    flattened.
    """

    keys_PHCK: Tensor
    values_PHCK: Tensor
    rows_PN: Tensor
    slots_B: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def gather_by_prefix(self, x_BHTX: Tensor) -> Tensor:
        """What rows have, (B, H, T, X), by the beginning that they share: (P, H, N T, X)."""
        x_PNHTX = x_BHTX[self.rows_PN]
        return x_PNHTX.transpose(1, 2).flatten(2, 3)

    def scatter_to_rows(self, x_PHMX: Tensor) -> Tensor:
        """The way back."""
        x_PHNTX = x_PHMX.unflatten(2, (self.rows_PN.shape[1], -1))
        return x_PHNTX.transpose(1, 2).flatten(0, 1)[self.slots_B]


def quantize_per_position(x_K: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (..., K) and a scale (..., 1) in the dtype of ``x_K``: one for each position of each head."""
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
    """``attention_reference``; a beginning is read once for all its rows, scales go to scores and weights."""
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
        return _mixed(weights, v_BHSK, v_scale, q_BHTK.dtype)
    k_scale_PHC1, v_scale_PHC1 = prefix.scales or (None, None)
    of_beginning = prefix.scatter_to_rows(_scores(prefix.gather_by_prefix(q_BHTK), prefix.keys_PHCK, k_scale_PHC1))
    scores = torch.cat([of_beginning, scores], dim=-1)
    del of_beginning
    weights = _weights(scores, bias_B1TS, lengths_B)
    shared = prefix.gather_by_prefix(weights[..., :length])
    mixed_BHTK = prefix.scatter_to_rows(_mixed(shared, prefix.values_PHCK, v_scale_PHC1, q_BHTK.dtype))
    return mixed_BHTK + _mixed(weights[..., length:], v_BHSK, v_scale, q_BHTK.dtype)


def _scores(q: Tensor, k: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return relaxed_scores(q, k)
    return relaxed_scores(q, k.to(q.dtype)) * scale.transpose(-1, -2).float()


def _weights(scores: Tensor, bias_B1TS: Tensor, lengths_B: Tensor | None) -> Tensor:
    weights = relaxed_softmax(scores, bias_B1TS)
    # Where a row has nothing yet, a query may see no key at all.
    return weights if lengths_B is None else weights.masked_fill(bias_B1TS.isneginf(), 0.0)


def _mixed(weights: Tensor, v: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is not None:
        weights = weights * scale.transpose(-1, -2).float()
    return weights.to(dtype) @ v.to(dtype)


def _filled(
    k_BHSK: Tensor, v_BHSK: Tensor, scales: tuple[Tensor, Tensor] | None, lengths_B: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Copies that are zero behind the filled positions: a weight of zero times what is no number is no number."""
    behind_BS = torch.arange(k_BHSK.shape[2], device=k_BHSK.device) >= lengths_B.unsqueeze(1)
    k, v, *both = (x.masked_fill(behind_BS[:, None, :, None], 0) for x in (k_BHSK, v_BHSK, *(scales or ())))
    return k, v, (both[0], both[1]) if both else None


def _bias_of_filled(q_BHTK: Tensor, num_keys: int, bias_B1TS: Tensor | None, lengths_B: Tensor) -> Tensor:
    """(B, 1, T, S): the bias that is given, else the causal one, and -inf from ``lengths_B`` of S on."""
    if bias_B1TS is None:
        places_BT = lengths_B.unsqueeze(1) + torch.arange(-q_BHTK.shape[2], 0, device=lengths_B.device)
        return attention_bias(q_BHTK.new_zeros(1, num_keys), places_BT)
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
    """Attention of T new positions over C positions of a beginning, then S of a row's own: (B, H, T, K).

    Scores are scaled by 1 / sqrt(K). Keys and values may be strided views; with ``scales`` (B, H, S, 1) of both, in the
    dtype of the queries, they are int8. Only the first ``lengths_B`` (int64, 0 to S; by default S) of a row's own
    positions are filled; what stands behind is neither seen nor read. ``bias_B1TS``, of the dtype of the queries, is
    added to the scores of all C + S positions and says what may be seen (``attention_bias``); without it the queries
    are the last T of C + ``lengths_B`` and see none behind them. With ``lengths_B`` a query that sees nothing finds
    zeros. ValueError where there are more queries than positions and no bias.
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
    """ValueError for what ``decode_attention`` does not take."""
    if q_BHTK.ndim != 4 or not 1 <= q_BHTK.shape[3] <= LARGEST:
        raise ValueError(f"q_BHTK must be (B, H, T, K), K at most {LARGEST}, got {tuple(q_BHTK.shape)}")
    rows, _, num_queries, _ = q_BHTK.shape
    _check_stored(("k_BHSK", "v_BHSK", "scales"), (k_BHSK, v_BHSK), scales, q_BHTK, rows)
    own_keys = num_keys = k_BHSK.shape[2]
    if prefix is not None:
        stored = (prefix.keys_PHCK, prefix.values_PHCK)
        names = ("prefix.keys_PHCK", "prefix.values_PHCK", "prefix.scales")
        num_beginnings = len(prefix.keys_PHCK)
        num_members = prefix.rows_PN.shape[-1]
        shape = (num_beginnings, num_members)
        _check_stored(names, stored, prefix.scales, q_BHTK, num_beginnings)
        check_int64("prefix.rows_PN", prefix.rows_PN, q_BHTK.device, shape, rows - 1)
        slots = num_beginnings * num_members
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
    """Of keys and values, and of their scales where they are rounded."""
    _, heads, _, size = q_BHTK.shape
    length = stored[0].shape[2] if stored[0].ndim == 4 else 0
    like = q_BHTK if scales is None else q_BHTK.new_empty(0, dtype=torch.int8)
    like_name = "q" if scales is None else "what has scales"
    for name, tensor in zip(names, stored, strict=False):
        check_matches(name, tensor, like_name, like, (rows, heads, length, size))
    for scale in scales or ():
        check_matches(names[2], scale, "q", q_BHTK, (rows, heads, length, 1))
