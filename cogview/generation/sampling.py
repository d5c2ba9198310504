"""From logits to one id per row: filters, and noise that is a function of its key.

A token is drawn as argmax(filtered logits + Gumbel noise), which is a draw from their softmax. The noise of a token
is a function of (seed, image, place, id) and of nothing else, so picture 3 of seed 7 is the same alone, in any batch,
after a retry, and on any schedule of decoding.
"""

# B batch (rows), V ids to choose from
from __future__ import annotations

import functools

import torch
from torch import Tensor

from cogview.modeling.config import Sampling

# SplitMix64 (Steele, Lea and Flood, 2014), as int64: products wrap around, right shifts are masked to be logical.
# ``data.sampling_order`` has its scrambling step for numpy's uint64.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_B = 0x94D049BB133111EB - (1 << 64)
MAX_SEED = 2**63 - 1
TIE_MARGIN = 24  # so many more than top-k are looked at, in case that they are equal to the last of them


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keeps the ``k`` largest logits of each row and ties with the last; the others become -inf, in a new tensor."""
    if k < 1:
        raise ValueError(f"top_k must be at least 1 here, got {k}")
    if k >= logits_BV.shape[-1]:
        return logits_BV.clone()
    least_B1 = logits_BV.topk(k, dim=-1).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keeps the fewest ids whose probabilities reach ``p``; the others become -inf, in a new tensor."""
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {p}")
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.softmax(dim=-1)
    mass_before_BV = probs_BV.cumsum(dim=-1) - probs_BV  # 0 for the likeliest, which therefore stays
    drop_BV = torch.zeros_like(order_BV, dtype=torch.bool).scatter(-1, order_BV, mass_before_BV >= p)
    return logits_BV.masked_fill(drop_BV, -torch.inf)


def filter_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Float32 logits over the temperature, then cut by top-k, then by top-p."""
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return logits_BV


def noise_keys(seeds: Tensor, images: Tensor, positions: Tensor) -> Tensor:
    """int64 keys of the noise at each place, from int64 tensors that broadcast."""
    return _mix(_mix(_mix(seeds) ^ images) ^ positions)


def keyed_gumbel(keys_B: Tensor, ids: range) -> Tensor:
    """Standard Gumbel noise (B, V) in float32 for every id of ``ids``; a row's depends on its own key alone.

    It is computed in float64 from 52 random bits, so devices agree up to the rounding of a logarithm. (With 53, the
    largest draw would round up to 1, and its noise be infinite.)
    """
    return _gumbel(keys_B.unsqueeze(1) ^ _mixed_ids(ids.start, ids.stop, keys_B.device))


def sample(logits_BV: Tensor, keys_B: Tensor, ids: range, sampling: Sampling) -> Tensor:
    """The index (B,) in ``ids`` of one id per row: argmax of the filtered logits (B, V) and the noise of their keys.

    On a CPU noise is made for the ids alone that top-k keeps, on other devices for all: a CPU minds the work, and the
    others the order to do less. The result is the same.
    """
    if logits_BV.device.type == "cpu" and 0 < sampling.top_k < logits_BV.shape[1] - TIE_MARGIN:
        chosen_B = _sample_top_k(logits_BV, keys_B, ids, sampling)
        if chosen_B is not None:
            return chosen_B
    return (filter_logits(logits_BV, sampling) + keyed_gumbel(keys_B, ids)).argmax(dim=-1)


def _sample_top_k(logits_BV: Tensor, keys_B: Tensor, ids: range, sampling: Sampling) -> Tensor | None:
    """``draw`` among the largest logits; None where too many are equal to know which those are."""
    top = (logits_BV.float() / sampling.temperature).topk(sampling.top_k + TIE_MARGIN, dim=-1)
    kept_BC = top.values
    least_B1 = kept_BC[:, sampling.top_k - 1 : sampling.top_k]
    if (kept_BC[:, -1:] == least_B1).any():
        return None
    kept_BC = kept_BC.masked_fill(kept_BC < least_B1, -torch.inf)
    if sampling.top_p < 1:
        if (kept_BC[:, 1:] == kept_BC[:, :-1]).logical_and(kept_BC[:, 1:].isfinite()).any():
            return None  # which of two equal ones comes first is for the order of their ids to say
        kept_BC = keep_top_p(kept_BC, sampling.top_p)
    noise_BC = _gumbel(keys_B.unsqueeze(1) ^ _mixed_ids(ids.start, ids.stop, keys_B.device)[top.indices])
    best_B1 = (kept_BC + noise_BC).argmax(dim=-1, keepdim=True)
    return top.indices.gather(1, best_B1).squeeze(1)


@functools.lru_cache(maxsize=16)
def _mixed_ids(start: int, stop: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # used outside of it as well
        return _mix(torch.arange(start, stop, device=device))


def _gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise of int64 keys, each mixed once more."""
    bits = _mix(bits)
    # MPS has no float64; there the noise is made on the CPU.
    target = bits.device
    if target.type == "mps":
        bits = bits.cpu()
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_().float().to(target)


def _shift_right(x: Tensor, count: int) -> Tensor:
    return (x >> count) & ((1 << (64 - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step and finalizer: a bijection of int64 in which every bit depends on every other."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_A
    x = (x ^ _shift_right(x, 27)) * _MIX_B
    return x ^ _shift_right(x, 31)
