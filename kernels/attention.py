"""Causal attention with PB-relax, for rows that are padded on the left.

``attention`` is what the model calls. The readable reference is the specification; PyTorch's fused attention is the
fast path and equal in meaning: it keeps its scores in float32, where the relaxation changes nothing. Only where a CPU
trains on short rows is the reference the faster one (``scripts/benchmarks/attention_training.py``). The choice is made
here and nowhere else; ``COGVIEW_KERNELS=reference|torch`` forces it.
"""

# B batch, H heads, T new positions (queries), S positions in all (keys), K size of a head
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


def attention_mask(num_queries: int, num_keys: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, 1, T, S) bool, True where a query may look: at itself, and back to its row's first position.

    The queries are the last T of the S positions. ``starts`` (B,) is the number of padded positions at the left of each
    row. A padded query sees itself alone, so that no row of the softmax is empty.
    """
    keys = torch.arange(num_keys, device=device)
    queries = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    causal = (keys <= queries).view(1, 1, num_queries, num_keys)
    if starts is None:
        return causal
    real = keys >= starts.to(device).view(-1, 1, 1, 1)
    return (causal & real) | (keys == queries)


def attention_reference(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, starts: Tensor | None = None, bias_BS: Tensor | None = None
) -> Tensor:
    """softmax((QK^T / (alpha sqrt(K)) - max) * alpha) V, (B, H, T, K) (PB-relax, arXiv:2105.13290, section 2.4).

    Equal to softmax(QK^T / sqrt(K)) V, but no score exceeds |qk| / (alpha sqrt(K)): q is divided before the product,
    and the maximum goes before alpha comes back.
    """
    num_queries, num_keys = q_BHTK.shape[2], k_BHSK.shape[2]
    scaled_q = q_BHTK / (ALPHA * math.sqrt(q_BHTK.shape[-1]))
    scores = (scaled_q @ k_BHSK.transpose(-1, -2)).float()
    if bias_BS is not None:
        scores = scores + bias_BS.float()[:, None, None, :] / ALPHA
    scores = scores.masked_fill(~attention_mask(num_queries, num_keys, starts, q_BHTK.device), -torch.inf)
    relaxed = (scores - scores.amax(dim=-1, keepdim=True)) * ALPHA
    return relaxed.softmax(dim=-1).to(v_BHSK.dtype) @ v_BHSK


def attention_torch(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, starts: Tensor | None = None, bias_BS: Tensor | None = None
) -> Tensor:
    """The same by PyTorch's fused attention."""
    num_queries, num_keys = q_BHTK.shape[2], k_BHSK.shape[2]
    if bias_BS is not None:
        visible = attention_mask(num_queries, num_keys, starts, q_BHTK.device)
        mask = bias_BS.to(q_BHTK.dtype)[:, None, None, :].masked_fill(~visible, -torch.inf)
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask)
    if starts is None and num_queries == num_keys:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True)
    if starts is None and num_queries == 1:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK)
    mask = attention_mask(num_queries, num_keys, starts, q_BHTK.device)
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "reference": attention_reference,
    "torch": attention_torch,
}


@functools.cache
def chosen_implementation(*, short_training_on_cpu: bool = False) -> str:
    """The name of the implementation in use, decided at the first call of either case and logged."""
    name = os.environ.get("COGVIEW_KERNELS") or ("reference" if short_training_on_cpu else "torch")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"COGVIEW_KERNELS={name!r} is unknown; known: {', '.join(IMPLEMENTATIONS)}")
    log.info("attention: %s%s", name, ", for training on short rows" if short_training_on_cpu else "")
    return name


def attention(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, starts: Tensor | None = None, bias_BS: Tensor | None = None
) -> Tensor:
    """Causal attention of the last T of S positions, (B, H, T, K); ``starts`` (B,) counts padding at the left.

    ``bias_BS`` (B, S) is added to the scores of each key: log w has a key count w times. Scores are scaled by
    1 / sqrt(K). Equal to the reference up to the rounding of the dtype.
    """
    if q_BHTK.shape[2] > k_BHSK.shape[2]:
        raise ValueError(f"{q_BHTK.shape[2]} queries cannot be the last of {k_BHSK.shape[2]} keys")
    short_training_on_cpu = q_BHTK.requires_grad and q_BHTK.device.type == "cpu" and k_BHSK.shape[2] <= SHORT
    name = chosen_implementation(short_training_on_cpu=short_training_on_cpu)
    return IMPLEMENTATIONS[name](q_BHTK, k_BHSK, v_BHSK, starts, bias_BS)
