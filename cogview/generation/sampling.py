"""From logits to one id per row: filters, and Gumbel noise that is a function of its key.

``argmax(filtered logits + Gumbel noise)`` is a sample from the softmax of the filtered logits. The noise of an id is a
function of (seed, prompt, image, position, id) and of nothing else. Image 3 of seed 7 is therefore the same alone, in
any batch, after a retry, and with any order of decoding.
"""

# B rows, V candidate ids, C of them that top-k keeps
from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cogview.kernels.native import sample_native, uses_native_kernels
from cogview.modeling.config import Sampling

# SplitMix64 (Steele, Lea and Flood, doi:10.1145/2660193.2660195), in int64: products wrap around, right shifts are
# masked to be logical. ``cogview.data.sampling_order`` has its scrambling step for numpy's uint64.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_B = 0x94D049BB133111EB - (1 << 64)
MAX_SEED = 2**63 - 1
TIE_MARGIN = 24  # ids beyond top-k that are fetched too, since they may tie with the last of them


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the ``k`` largest logits of each row, and ties with the smallest of them.

    Args:
        logits_BV: Logits of any floating-point dtype; they are not changed.
        k: Number of logits to keep, at least 1.

    Returns:
        A new tensor (B, V) in which the others are -inf.

    Raises:
        ValueError: ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"top_k must be at least 1 here, got {k}")
    if k >= logits_BV.shape[-1]:
        return logits_BV.clone()
    smallest_B1 = logits_BV.topk(k, dim=-1).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the smallest set of ids whose probabilities sum to ``p`` (nucleus sampling, arXiv:1904.09751).

    Args:
        logits_BV: Logits of any floating-point dtype; they are not changed.
        p: Probability to keep, in (0, 1].

    Returns:
        A new tensor (B, V) in which the others are -inf.

    Raises:
        ValueError: ``p`` is outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {p}")
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.softmax(dim=-1)
    mass_before_BV = probs_BV.cumsum(dim=-1) - probs_BV  # 0 for the most probable id, which is therefore kept
    drop_BV = torch.zeros_like(order_BV, dtype=torch.bool).scatter(-1, order_BV, mass_before_BV >= p)
    return logits_BV.masked_fill(drop_BV, -torch.inf)


def keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the ids with at least ``p`` times the probability of the most probable one (min-p, arXiv:2407.01082).

    Args:
        logits_BV: Logits of any floating-point dtype; they are not changed.
        p: Fraction of the largest probability, in (0, 1).

    Returns:
        A new tensor (B, V) in which the others are -inf.
    """
    return logits_BV.masked_fill(logits_BV < logits_BV.amax(dim=-1, keepdim=True) + math.log(p), -torch.inf)


def filter_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return float32 logits divided by the temperature, filtered by top-k, then by top-p, then by min-p.

    Args:
        logits_BV: Logits (B, V).
        sampling: Temperature, top-k, top-p and min-p.
    """
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    return logits_BV


def noise_stream(index: int, prompt_ids: Sequence[int], version: int) -> int:
    """Return the second part of the noise key: the index of an image, combined with a hash of its prompt.

    Args:
        index: Index of the image among those of its prompt and seed, from 0 on.
        prompt_ids: Piece ids of the prompt; without any, the result is ``index``.
        version: ``noise_version`` of ``Sampling``; version 1 ignores the prompt.

    Returns:
        An int64.
    """
    if version == 1 or not prompt_ids:
        return index
    prompt = hashlib.blake2b(np.asarray(prompt_ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return index ^ int.from_bytes(prompt, "little", signed=True)


def noise_keys(seeds: Tensor, images: Tensor, positions: Tensor) -> Tensor:
    """Return int64 noise keys of (seed, image, position), from int64 tensors that broadcast.

    Args:
        seeds: Seeds, from 0 to 2**63 - 1.
        images: Results of ``noise_stream``.
        positions: Positions of the codes or pieces.
    """
    return _mix(_mix(_mix(seeds) ^ images) ^ positions)


def keyed_gumbel(keys_B: Tensor, ids: range) -> Tensor:
    """Return standard Gumbel noise for every id of ``ids``; the noise of a row depends on its key alone.

    It is computed in float64 from 52 random bits, so that devices agree up to the rounding of a logarithm. (From 53
    bits, the largest uniform number would round up to 1 and its noise be infinite.)

    Args:
        keys_B: Keys of ``noise_keys``, int64.
        ids: Ids of the columns.

    Returns:
        Noise (B, V), float32.
    """
    return _gumbel(keys_B.unsqueeze(1) ^ _mixed_ids(ids.start, ids.stop, keys_B.device))


def sample(
    logits_BV: Tensor, keys_B: Tensor, ids: range, sampling: Sampling, scored_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one id per row: argmax of the filtered logits plus the noise of their keys.

    On a CPU, noise is computed only for the ids that pass the filters, or top-k, which saves work. On other devices it
    is computed for all ids, which saves kernel launches. The result is the same.

    Args:
        logits_BV: Logits of ``ids``, of any floating-point dtype.
        keys_B: Keys of ``noise_keys``, int64.
        ids: Candidate ids, V of them.
        sampling: Temperature, top-k, top-p and min-p.
        scored_BV: Logits of the log probabilities, such as those before guidance; None for ``logits_BV``.

    Returns:
        Index in ``ids`` of the sampled id of each row, (B,) int64, and its log probability (B,) in nats, before
        temperature and filters.
    """
    scored_BV = logits_BV if scored_BV is None else scored_BV
    native = logits_BV.dtype == torch.float32 and uses_native_kernels(logits_BV.device, torch.float32)
    if native and sampling.top_p == 1:
        return sample_native(
            logits_BV,
            keys_B,
            _mixed_ids(ids.start, ids.stop, keys_B.device),
            scored_BV,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
        )
    chosen_B = None
    if logits_BV.device.type == "cpu" and 0 < sampling.top_k < logits_BV.shape[1] - TIE_MARGIN:
        chosen_B = _sample_top_k(logits_BV, keys_B, ids, sampling)
    if chosen_B is None:
        chosen_B = (filter_logits(logits_BV, sampling) + keyed_gumbel(keys_B, ids)).argmax(dim=-1)
    return chosen_B, log_probability_of(scored_BV, chosen_B)


def log_probability_of(logits_BV: Tensor, chosen_B: Tensor) -> Tensor:
    """Return log softmax (B,) at the indices ``chosen_B``, in nats.

    Args:
        logits_BV: Logits (B, V).
        chosen_B: Indices of the chosen ids, (B,) int64.
    """
    return logits_BV.log_softmax(dim=-1).gather(1, chosen_B.unsqueeze(1)).squeeze(1)


def _sample_top_k(logits_BV: Tensor, keys_B: Tensor, ids: range, sampling: Sampling) -> Tensor | None:
    """Sample from the largest logits alone; return None if ties make it ambiguous which those are."""
    top = (logits_BV.float() / sampling.temperature).topk(sampling.top_k + TIE_MARGIN, dim=-1)
    kept_BC = top.values
    smallest_B1 = kept_BC[:, sampling.top_k - 1 : sampling.top_k]
    if (kept_BC[:, -1:] == smallest_B1).any():
        return None
    kept_BC = kept_BC.masked_fill(kept_BC < smallest_B1, -torch.inf)
    if sampling.top_p < 1:
        if (kept_BC[:, 1:] == kept_BC[:, :-1]).logical_and(kept_BC[:, 1:].isfinite()).any():
            return None  # top-p orders equal logits by id, which this order does not know
        kept_BC = keep_top_p(kept_BC, sampling.top_p)
    if sampling.min_p:
        kept_BC = keep_min_p(kept_BC, sampling.min_p)
    noise_BC = _gumbel(keys_B.unsqueeze(1) ^ _mixed_ids(ids.start, ids.stop, keys_B.device)[top.indices])
    best_B1 = (kept_BC + noise_BC).argmax(dim=-1, keepdim=True)
    return top.indices.gather(1, best_B1).squeeze(1)


@functools.lru_cache(maxsize=16)
def _mixed_ids(start: int, stop: int, device: torch.device) -> Tensor:
    """Return the mixed ids of a range, cached."""
    with torch.inference_mode(False):  # the cached tensor is used outside of inference mode too
        return _mix(torch.arange(start, stop, device=device))


def _gumbel(bits: Tensor) -> Tensor:
    """Return Gumbel noise of int64 keys, each mixed once more."""
    bits = _mix(bits)
    device = bits.device
    if device.type == "mps":  # has no float64
        bits = bits.cpu()
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_().float().to(device)


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Shift the bits of int64 numbers to the right and fill with zeros."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's step and finalizer: a bijection of int64 in which every bit depends on every other."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_A
    x = (x ^ _shift_right(x, 27)) * _MIX_B
    return x ^ _shift_right(x, 31)
