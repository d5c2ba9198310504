"""Causal attention with PB-relax, for rows that may be padded on the left.

The model uses ``q``, ``k``, ``v`` and ``bias_B1TS``. The other arguments of ``attention`` (``left_padding_B``,
``prefix_lengths_B``, ``lengths_B``, ``dropout``, ``seed`` and ``accumulate_dtype``) are a library offer, for packed
training rows, attention dropout and cards without bfloat16; only tests and benchmarks use them.

The reference is the specification. PyTorch's fused attention is the fast path and equal in meaning: it keeps scores in
float32, where the relaxation changes nothing. On a CPU that trains on short rows the reference is faster
(``scripts/benchmarks/attention_training.py``). The kernels of ``attention_triton.py`` run if ``COGVIEW_KERNELS`` asks
for them (``dispatch.py``).

Purpose of PB-relax: softmax(QK^T / sqrt(K)) is the same in any fused kernel that accumulates in float32. Where products
accumulate in float16, scores may be 32 times larger before they overflow: 2,096,128 instead of 65,504. That concerns
the tensor cores of cards without bfloat16 at full speed, and scores that are stored in float16, as by the reference.

``decode_attention.py`` has the attention of decoding, with shared prefixes and int8 keys and values.
"""

# B batch, H heads, T new positions (queries), S positions in all (keys), K size of a head
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Size, Tensor
from torch.nn import functional as F

from cogview.kernels.checks import check_int64, check_matches
from cogview.kernels.dispatch import select_backend

ALPHA = 32.0
MAX_DECODE_QUERIES = 32  # a step of decoding has at most these: its kernel differs
SHORT_KEYS = 128  # keys; on a CPU the reference trains faster at 84 and slower from 256 on: the border lies between


def attention_bias(key_bias_BS: Tensor, queries_BT: Tensor) -> Tensor:
    """Return the bias of causal attention: -inf where a query may not attend.

    A query attends to no later key, and always to its own, even in padding: no row of the softmax is empty.

    Args:
        key_bias_BS: Bias of each key for every query, -inf at padding.
        queries_BT: Position of each query among the keys, int64.

    Returns:
        Bias (B, 1, T, S) in the dtype of ``key_bias_BS``.
    """
    keys_S = torch.arange(key_bias_BS.shape[1], device=key_bias_BS.device)
    query_BT1 = queries_BT.unsqueeze(-1)
    bias_BTS = key_bias_BS.unsqueeze(1).masked_fill(keys_S > query_BT1, -torch.inf)
    padded_BTS = (keys_S == query_BT1) & bias_BTS.isneginf()
    return bias_BTS.masked_fill(padded_BTS, 0.0).unsqueeze(1)


def causal_bias(num_queries: int, num_keys: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the bias (1, 1, T, S) of the last T of S positions without padding.

    Args:
        num_queries: T.
        num_keys: S.
        device: Device of the bias.
        dtype: Dtype of the bias.
    """
    queries_1T = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(0)
    return attention_bias(torch.zeros(1, num_keys, device=device, dtype=dtype), queries_1T)


def attention_reference(
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
) -> Tensor:
    """Compute ``attention`` as softmax((QK^T / (alpha sqrt(K)) - max) * alpha) V.

    That equals softmax(QK^T / sqrt(K)) V, but no score exceeds |qk| / (alpha sqrt(K)): q is divided before the product,
    and the maximum is subtracted before alpha is multiplied back (PB-relax, arXiv:2105.13290, section 2.4). Products
    are in the dtype of the inputs, whatever ``accumulate_dtype`` is.

    Args:
        q_BHTK: As in ``attention``, and so are the others.
        k_BHSK: Keys.
        v_BHSK: Values.
        bias_B1TS: Bias of the scores.
        left_padding_B: First key of each row.
        prefix_lengths_B: Keys that all queries attend to.
        lengths_B: Keys of each row.
        dropout: Dropout rate.
        seed: Seed of the dropout.
        accumulate_dtype: Ignored.

    Returns:
        The outputs (B, H, T, K).
    """
    if bias_B1TS is None:
        bias_B1TS = _mask(q_BHTK, k_BHSK.shape[2], left_padding_B, prefix_lengths_B, lengths_B)
    weights_BHTS = relaxed_softmax(relaxed_scores(q_BHTK, k_BHSK), bias_B1TS)
    if dropout:
        weights_BHTS = weights_BHTS * dropout_mask(weights_BHTS.shape, dropout, seed, q_BHTK.device)
    return weights_BHTS.to(v_BHSK.dtype) @ v_BHSK


def attention_torch(
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
) -> Tensor:
    """Compute ``attention`` with PyTorch's fused attention, which always accumulates in float32.

    Its dropout is not a function of the position, so that the reference runs if there is dropout.

    Args:
        q_BHTK: As in ``attention``, and so are the others.
        k_BHSK: Keys.
        v_BHSK: Values.
        bias_B1TS: Bias of the scores.
        left_padding_B: First key of each row.
        prefix_lengths_B: Keys that all queries attend to.
        lengths_B: Keys of each row.
        dropout: Dropout rate.
        seed: Seed of the dropout.
        accumulate_dtype: Ignored.

    Returns:
        The outputs (B, H, T, K).
    """
    if bias_B1TS is None and not (left_padding_B is prefix_lengths_B is lengths_B is None):
        bias_B1TS = _mask(q_BHTK, k_BHSK.shape[2], left_padding_B, prefix_lengths_B, lengths_B)
    if dropout:
        return attention_reference(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, dropout=dropout, seed=seed)
    num_queries, num_keys = q_BHTK.shape[2], k_BHSK.shape[2]
    if bias_B1TS is None and 1 < num_queries < num_keys:
        bias_B1TS = causal_bias(num_queries, num_keys, q_BHTK.device, q_BHTK.dtype)
    causal = bias_B1TS is None and num_queries == num_keys
    if num_queries == 1 < num_keys and q_BHTK.dtype == torch.bfloat16 and q_BHTK.device.type == "cpu":
        # On a CPU, PyTorch's product of a single row takes four times as long as that of two rows.
        twice_BH2K = torch.cat([q_BHTK, q_BHTK], dim=2)
        return F.scaled_dot_product_attention(twice_BH2K, k_BHSK, v_BHSK, attn_mask=bias_B1TS)[:, :, :1]
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias_B1TS, is_causal=causal)


def attention(
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
) -> Tensor:
    """Compute the attention of the last T of S positions; scores are scaled by 1 / sqrt(K).

    A query attends to the keys up to its own, within the limits given, and always to itself. The result equals that of
    the reference up to the rounding of the dtype.

    Args:
        q_BHTK: Queries.
        k_BHSK: Keys, in the dtype of the queries.
        v_BHSK: Values, in the dtype of the queries.
        bias_B1TS: Bias of the scores, in the dtype of the queries, causal mask included (``attention_bias``); instead
            of the limits.
        left_padding_B: First visible key of each row, int64; 0 by default.
        prefix_lengths_B: Number of first keys that every query of a row attends to, int64; 0 by default.
        lengths_B: Number of keys of each row, int64; S by default.
        dropout: Fraction of dropped weights, in [0, 1).
        seed: Seed of the dropout mask, which is a function of seed and position alone.
        accumulate_dtype: ``"float16"`` allows kernels to accumulate products of float16 in it, which is faster on some
            cards.

    Returns:
        Attention output (B, H, T, K).

    Raises:
        ValueError: Shapes, dtypes, devices or values do not fit together.
    """
    num_keys = k_BHSK.shape[-2]
    if q_BHTK.shape[-2] > num_keys:
        raise ValueError(f"{q_BHTK.shape[-2]} queries cannot be the last of {num_keys} keys")
    device_type = q_BHTK.device.type
    if device_type == "cpu" and num_keys <= SHORT_KEYS and q_BHTK.requires_grad:
        name = select_backend("attention, short training", device_type, default="reference")
    else:
        name = select_backend("attention", device_type)
    if name == "torch" and left_padding_B is prefix_lengths_B is lengths_B is None and not dropout:  # the common case
        return attention_torch(q_BHTK, k_BHSK, v_BHSK, bias_B1TS)
    implementation: Callable[..., Tensor]
    if name == "triton":
        limited = not (left_padding_B is prefix_lengths_B is lengths_B is None)
        if q_BHTK.shape[-2] <= MAX_DECODE_QUERIES and not (limited or dropout or q_BHTK.requires_grad):
            from cogview.kernels.decode_attention_triton import decode_attention_triton

            return decode_attention_triton(q_BHTK, k_BHSK, v_BHSK, bias_B1TS)
        from cogview.kernels.attention_triton import attention_triton as implementation
    else:
        check_inputs(
            q_BHTK, k_BHSK, v_BHSK, bias_B1TS, left_padding_B, prefix_lengths_B, lengths_B, dropout, accumulate_dtype
        )
        implementation = attention_torch if name == "torch" else attention_reference
    limits = {"left_padding_B": left_padding_B, "prefix_lengths_B": prefix_lengths_B, "lengths_B": lengths_B}
    return implementation(
        q_BHTK, k_BHSK, v_BHSK, bias_B1TS, **limits, dropout=dropout, seed=seed, accumulate_dtype=accumulate_dtype
    )


def check_inputs(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    bias_B1TS: Tensor | None,
    left_padding_B: Tensor | None,
    prefix_lengths_B: Tensor | None,
    lengths_B: Tensor | None,
    dropout: float,
    accumulate_dtype: str,
) -> None:
    """Raise ValueError for arguments that ``attention`` does not support.

    Args:
        q_BHTK: As in ``attention``, and so are the others.
        k_BHSK: Keys.
        v_BHSK: Values.
        bias_B1TS: Bias of the scores.
        left_padding_B: First key of each row.
        prefix_lengths_B: Keys that all queries attend to.
        lengths_B: Keys of each row.
        dropout: Dropout rate.
        accumulate_dtype: float32 or float16.
    """
    if q_BHTK.ndim != 4:
        raise ValueError(f"q_BHTK must be (B, H, T, K), got {tuple(q_BHTK.shape)}")
    rows, heads, num_queries, size = q_BHTK.shape
    num_keys = k_BHSK.shape[2] if k_BHSK.ndim == 4 else num_queries
    check_matches("k_BHSK", k_BHSK, "q", q_BHTK, (rows, heads, num_keys, size))
    check_matches("v_BHSK", v_BHSK, "q", q_BHTK, (rows, heads, num_keys, size))
    if not 1 <= num_queries <= num_keys:
        raise ValueError(f"q_BHTK: {num_queries} queries cannot be the last of {num_keys} keys")
    limits = {
        "left_padding_B": (left_padding_B, num_keys - 1),
        "prefix_lengths_B": (prefix_lengths_B, num_keys),
        "lengths_B": (lengths_B, num_keys),
    }
    for name, (limit, largest) in limits.items():
        if limit is not None:
            check_int64(name, limit, q_BHTK.device, (rows,), largest)
            if bias_B1TS is not None:
                raise ValueError(
                    f"{name} and bias_B1TS were both given; the bias includes the limits, so give one of them"
                )
    if bias_B1TS is not None:
        allowed = [(b, 1, t, num_keys) for b in {1, rows} for t in {1, num_queries}]
        if tuple(bias_B1TS.shape) not in allowed or bias_B1TS.device != q_BHTK.device:
            raise ValueError(
                f"bias_B1TS must be ({rows} or 1, 1, {num_queries} or 1, {num_keys}) on {q_BHTK.device}, "
                f"got {tuple(bias_B1TS.shape)} on {bias_B1TS.device}"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
    if accumulate_dtype not in ("float32", "float16"):
        raise ValueError(f"accumulate_dtype must be float32 or float16, got {accumulate_dtype!r}")
    if accumulate_dtype == "float16" and q_BHTK.dtype != torch.float16:
        raise ValueError(f"accumulate_dtype=float16 is for float16, got q_BHTK in {q_BHTK.dtype}")


def _mask(
    q_BHTK: Tensor,
    num_keys: int,
    left_padding_B: Tensor | None,
    prefix_lengths_B: Tensor | None,
    lengths_B: Tensor | None,
) -> Tensor:
    """Return the bias (B or 1, 1, T, S) that is equivalent to the limits of ``attention``."""
    num_queries, device = q_BHTK.shape[2], q_BHTK.device
    if left_padding_B is prefix_lengths_B is lengths_B is None:
        return causal_bias(num_queries, num_keys, device, q_BHTK.dtype)
    keys_S = torch.arange(num_keys, device=device)
    queries_T1 = keys_S[num_keys - num_queries :].unsqueeze(1)
    seen_BTS = (keys_S <= queries_T1).unsqueeze(0)
    if prefix_lengths_B is not None:
        seen_BTS = seen_BTS | (keys_S < prefix_lengths_B[:, None, None])
    if left_padding_B is not None:
        seen_BTS = seen_BTS & (keys_S >= left_padding_B[:, None, None])
    if lengths_B is not None:
        seen_BTS = seen_BTS & (keys_S < lengths_B[:, None, None])
    seen_BTS = seen_BTS | (keys_S == queries_T1)
    return (
        torch.zeros(seen_BTS.shape, device=device, dtype=q_BHTK.dtype).masked_fill(~seen_BTS, -torch.inf).unsqueeze(1)
    )


def fold_seed(seed: int) -> int:
    """Fold ``seed`` into a signed 32-bit number."""
    return ((seed ^ seed >> 32) + 2**31) % 2**32 - 2**31


def dropout_mask(shape: Size, dropout: float, seed: int, device: torch.device) -> Tensor:
    """Return the factors of attention weights: 0 for a fraction ``dropout`` of them, 1 / (1 - dropout) for the others.

    The noise of a weight is a hash of seed, row, head, query and key, so that kernels recompute the same mask.

    Args:
        shape: (B, H, T, S).
        dropout: Fraction of dropped weights, in [0, 1).
        seed: Seed of the hash.
        device: Device of the mask.

    Returns:
        Mask (B, H, T, S), float32.
    """
    rows, heads, num_queries, num_keys = shape
    keys_S = torch.arange(num_keys, device=device)
    queries_T = keys_S[num_keys - num_queries :]
    row_heads_BH1 = torch.arange(rows * heads, device=device).view(rows, heads, 1)
    hashes_BHT = _hash32(_hash32((fold_seed(seed) + queries_T) % 2**32) ^ row_heads_BH1)
    noise_BHTS = _hash32(hashes_BHT.unsqueeze(-1) ^ keys_S) >> 8
    return (noise_BHTS < (1 - dropout) * 2**24).float() / (1 - dropout)


def _hash32(x: Tensor) -> Tensor:
    """Hash 32 bits, in int64, by "lowbias32" (https://github.com/skeeto/hash-prospector)."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def relaxed_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return QK^T / (alpha sqrt(K)) in float32.

    Args:
        q: Queries (..., T, K).
        k: Keys (..., S, K).
    """
    return ((q / (ALPHA * math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)).float()


def relaxed_softmax(scores_BHTS: Tensor, bias_B1TS: Tensor) -> Tensor:
    """Return softmax(alpha * scores + bias) in float32; the maximum is subtracted before alpha is multiplied.

    Args:
        scores_BHTS: Scores divided by alpha, (B, H, T, S) float32.
        bias_B1TS: Bias of the scores (B, 1, T, S).
    """
    scores_BHTS = scores_BHTS + bias_B1TS.float() / ALPHA
    return ((scores_BHTS - scores_BHTS.amax(dim=-1, keepdim=True)) * ALPHA).softmax(dim=-1)
