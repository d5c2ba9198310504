"""Causal attention with PB-relax, for rows that are padded on the left.

``attention`` is what the model calls. The readable reference is the specification; PyTorch's fused attention is the
fast path and equal in meaning: it keeps its scores in float32, where the relaxation changes nothing. Where a CPU
trains on short rows the reference is the faster one (``scripts/benchmarks/attention_training.py``). The choice is made
here and nowhere else; ``COGVIEW_KERNELS=reference|torch`` forces it.

Two more forms are for decoding: ``attention_shared``, of rows that begin alike and keep one copy of that beginning, and
``attention_int8``, over keys and values that were rounded.
"""

# B batch, H heads, T new positions (queries), S positions in all (keys), K size of a head
# P beginnings, N rows that share one (at most), C positions of a beginning
from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ALPHA = 32.0
SHORT = 128  # keys; on a CPU the reference trains faster at 84 and slower from 256 on, so the border lies between
log = logging.getLogger(__name__)


def attention_bias(key_bias_BS: Tensor, queries_BT: Tensor) -> Tensor:
    """(B, 1, T, S) in the dtype of ``key_bias_BS``: what is added to the scores, -inf where a query may not look.

    ``key_bias_BS`` is added to the scores of a key whoever asks, -inf at padding; ``queries_BT`` (int64) says where
    each query stands among the keys. It sees none behind it, and itself even in padding, so that no row of the softmax
    is empty.
    """
    keys_S = torch.arange(key_bias_BS.shape[1], device=key_bias_BS.device)
    place_BT1 = queries_BT.unsqueeze(-1)
    bias_BTS = key_bias_BS.unsqueeze(1).masked_fill(keys_S > place_BT1, -torch.inf)
    padded_BTS = (keys_S == place_BT1) & bias_BTS.isneginf()
    return bias_BTS.masked_fill(padded_BTS, 0.0).unsqueeze(1)


def causal_bias(num_queries: int, num_keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, S): ``attention_bias`` of the last T of S positions, where nothing is padding."""
    queries_1T = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(0)
    return attention_bias(torch.zeros(1, num_keys, device=device, dtype=dtype), queries_1T)


def attention_reference(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias_B1TS: Tensor | None = None) -> Tensor:
    """softmax((QK^T / (alpha sqrt(K)) - max) * alpha) V, (B, H, T, K) (PB-relax, arXiv:2105.13290, section 2.4).

    Equal to softmax(QK^T / sqrt(K)) V, but no score exceeds |qk| / (alpha sqrt(K)): q is divided before the product,
    and the maximum goes before alpha comes back.
    """
    if bias_B1TS is None:
        bias_B1TS = causal_bias(q_BHTK.shape[2], k_BHSK.shape[2], q_BHTK.device, q_BHTK.dtype)
    weights_BHTS = _relaxed_softmax(_relaxed_scores(q_BHTK, k_BHSK), bias_B1TS)
    return weights_BHTS.to(v_BHSK.dtype) @ v_BHSK


def attention_torch(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias_B1TS: Tensor | None = None) -> Tensor:
    """The same by PyTorch's fused attention."""
    num_queries, num_keys = q_BHTK.shape[2], k_BHSK.shape[2]
    if bias_B1TS is None and 1 < num_queries < num_keys:
        bias_B1TS = causal_bias(num_queries, num_keys, q_BHTK.device, q_BHTK.dtype)
    causal = bias_B1TS is None and num_queries == num_keys
    if num_queries == 1 < num_keys and q_BHTK.dtype == torch.bfloat16 and q_BHTK.device.type == "cpu":
        # Of PyTorch's products on a CPU, that of a single row is four times as slow as that of two.
        twice_BH2K = torch.cat([q_BHTK, q_BHTK], dim=2)
        return F.scaled_dot_product_attention(twice_BH2K, k_BHSK, v_BHSK, attn_mask=bias_B1TS)[:, :, :1]
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias_B1TS, is_causal=causal)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "reference": attention_reference,
    "torch": attention_torch,
}


@functools.cache
def chosen_implementation(case: str = "usual") -> str:
    """The name of the implementation in use, decided at the first call of each case and logged.

    The cases are "usual" and "short training on a CPU".
    """
    name = os.environ.get("COGVIEW_KERNELS") or ("torch" if case == "usual" else "reference")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"COGVIEW_KERNELS={name!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}")
    log.info("attention: %s (%s)", name, case)
    return name


def attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias_B1TS: Tensor | None = None) -> Tensor:
    """Attention of the last T of S positions, (B, H, T, K); scores are scaled by 1 / sqrt(K).

    ``bias_B1TS``, of the dtype of the queries, is added to the scores (``attention_bias``); without it attention is
    causal. Equal to the reference up to the rounding of the dtype.
    """
    num_queries, num_keys = q_BHTK.shape[2], k_BHSK.shape[2]
    if num_queries > num_keys:
        raise ValueError(f"{num_queries} queries cannot be the last of {num_keys} keys")
    short = q_BHTK.requires_grad and num_keys <= SHORT and q_BHTK.device.type == "cpu"
    case = "short training on a CPU" if short else "usual"
    return IMPLEMENTATIONS[chosen_implementation(case)](q_BHTK, k_BHSK, v_BHSK, bias_B1TS)


def attention_shared(
    q_BHTK: Tensor,
    beginning_2PHCK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    bias_B1TS: Tensor | None,
    members_PN: Tensor,
    slots_B: Tensor,
) -> Tensor:
    """``attention`` over C keys and values of a beginning that several rows share, and S of a row's own: (B, H, T, K).

    ``members_PN`` (int64) are the rows that have each beginning, any row where there are fewer than N; row b stands at
    ``slots_B[b]`` of it, flattened. ``bias_B1TS`` is over C + S positions. Each beginning is read once for all its
    rows, and nothing is copied.
    """
    heads, num_queries = q_BHTK.shape[1:3]
    num_beginnings, num_members = members_PN.shape
    keys_PHCK, values_PHCK = beginning_2PHCK
    length = keys_PHCK.shape[2]

    def together(x_BHTX: Tensor) -> Tensor:
        """(B, H, T, X) as (P, H, N T, X)."""
        x_PNHTX = x_BHTX[members_PN]
        return x_PNHTX.transpose(1, 2).reshape(num_beginnings, heads, num_members * num_queries, x_BHTX.shape[-1])

    def apart(x_PHMX: Tensor) -> Tensor:
        """The way back."""
        x_PHNTX = x_PHMX.view(num_beginnings, heads, num_members, num_queries, x_PHMX.shape[-1])
        return x_PHNTX.transpose(1, 2).flatten(0, 1)[slots_B]

    scores = torch.cat([apart(_relaxed_scores(together(q_BHTK), keys_PHCK)), _relaxed_scores(q_BHTK, k_BHSK)], dim=-1)
    if bias_B1TS is None:
        bias_B1TS = causal_bias(num_queries, scores.shape[-1], q_BHTK.device, q_BHTK.dtype)
    weights_BHTS = _relaxed_softmax(scores, bias_B1TS).to(q_BHTK.dtype)
    of_beginning, own = weights_BHTS[..., :length], weights_BHTS[..., length:]
    return apart(together(of_beginning) @ values_PHCK) + own @ v_BHSK


def quantize_per_position(x_K: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (..., K) and a scale (..., 1) in the dtype of ``x_K``: one for each position of each head."""
    scale = (x_K.abs().amax(dim=-1, keepdim=True) / 127).clamp_(min=torch.finfo(x_K.dtype).tiny)
    return (x_K / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def attention_int8(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    k_scale_BHS1: Tensor,
    v_BHSK: Tensor,
    v_scale_BHS1: Tensor,
    bias_B1TS: Tensor | None = None,
) -> Tensor:
    """``attention`` over keys and values of ``quantize_per_position``; scales are applied to scores and weights."""
    if bias_B1TS is None:
        bias_B1TS = causal_bias(q_BHTK.shape[2], k_BHSK.shape[2], q_BHTK.device, q_BHTK.dtype)
    scores = _relaxed_scores(q_BHTK, k_BHSK.to(q_BHTK.dtype)) * k_scale_BHS1.transpose(-1, -2).float()
    weights = _relaxed_softmax(scores, bias_B1TS) * v_scale_BHS1.transpose(-1, -2).float()
    return weights.to(q_BHTK.dtype) @ v_BHSK.to(q_BHTK.dtype)


def _relaxed_scores(q: Tensor, k: Tensor) -> Tensor:
    """QK^T / (alpha sqrt(K)) in float32."""
    return ((q / (ALPHA * math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)).float()


def _relaxed_softmax(scores_BHTS: Tensor, bias_B1TS: Tensor) -> Tensor:
    """softmax(alpha * scores + bias), in float32; the maximum goes first."""
    scores_BHTS = scores_BHTS + bias_B1TS.float() / ALPHA
    return ((scores_BHTS - scores_BHTS.amax(dim=-1, keepdim=True)) * ALPHA).softmax(dim=-1)
