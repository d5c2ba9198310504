"""From logits to one id per row: filters, and noise that is a function of its key.

A token is drawn as argmax(filtered logits + Gumbel noise), which is a draw from their softmax. The noise of a token
is a function of (seed, image, place, id) and of nothing else, so picture 3 of seed 7 is the same alone, in any batch,
after a retry, and on any schedule of decoding.
"""

# B batch (rows), V ids to choose from
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, 2014), as int64: products wrap around, right shifts are masked to be logical.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_B = 0x94D049BB133111EB - (1 << 64)
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw. ``top_k`` 0 and ``top_p`` 1 keep every id.

    ``guidance`` S draws from u + S (c - u), c and u being the logits with and without the text (classifier-free
    guidance, arXiv:2207.12598): 1 is none, and more needs weights that were trained with captions left out.
    ``text_attention`` w has every place look at the given text w times as much (CogView2, arXiv:2204.14217): 1 is none,
    and any weights will do.
    """

    temperature: float = 1.0
    top_k: int = 200
    top_p: float = 1.0
    guidance: float = 1.0
    text_attention: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; for greedy decoding use top_k 1")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 keeps every id), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be a number from 0 on (1: none), got {self.guidance}")
        if not 0 < self.text_attention < math.inf:
            raise ValueError(f"text_attention must be a number above 0 (1: none), got {self.text_attention}")


GREEDY = Sampling(top_k=1)


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


def keyed_gumbel(seeds_B: Tensor, images_B: Tensor, places_B: Tensor, ids: range) -> Tensor:
    """Standard Gumbel noise (B, V) in float32 for every id of ``ids``.

    ``seeds_B``, ``images_B`` and ``places_B`` are int64, on one device; a row's noise depends on its own key alone.
    It is computed in float64 from 52 random bits, so devices agree up to the rounding of a logarithm. (With 53, the
    largest draw would round up to 1, and its noise be infinite.)
    """
    key_B = _mix(_mix(_mix(seeds_B) ^ images_B) ^ places_B)
    ids_V = torch.arange(ids.start, ids.stop, device=seeds_B.device)
    bits_BV = _mix(key_B.unsqueeze(1) ^ _mix(ids_V))
    # MPS has no float64; there the noise is made on the CPU.
    target = bits_BV.device
    if target.type == "mps":
        bits_BV = bits_BV.cpu()
    uniform_BV = (_shift_right(bits_BV, 12).double() + 0.5) * 2.0**-52
    return uniform_BV.log_().neg_().log_().neg_().float().to(target)


def draw(logits_BV: Tensor, noise_BV: Tensor, sampling: Sampling) -> Tensor:
    """The index (B,) of one id per row, drawn from the filtered logits (B, V) by their noise (B, V)."""
    return (filter_logits(logits_BV, sampling) + noise_BV).argmax(dim=-1)


def _shift_right(x: Tensor, count: int) -> Tensor:
    return (x >> count) & ((1 << (64 - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step and finalizer: a bijection of int64 in which every bit depends on every other."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_A
    x = (x ^ _shift_right(x, 27)) * _MIX_B
    return x ^ _shift_right(x, 31)
