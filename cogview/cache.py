"""Keys and values of what has been read, stored once and in place."""

# B batch, T new positions, S positions in all, L layers, H heads, K size of a head
from __future__ import annotations

import torch
from torch import Tensor

from cogview.config import TransformerConfig


class KVCache:
    """Keys and values of the positions seen so far.

    ``keys`` and ``values`` are (L, B, H, S, K), allocated once; the first ``length`` of S are filled. The
    transformer extends every layer by T positions, then ``advance(T)`` makes them part of the past.
    """

    def __init__(
        self, config: TransformerConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_heads, max_length, config.head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions of ``layer``; return every filled position of that layer, new ones included."""
        end = self.length + k_BHTK.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} positions, {end} are needed")
        self.keys[layer, :, :, self.length : end] = k_BHTK
        self.values[layer, :, :, self.length : end] = v_BHTK
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """The last ``count`` positions given to every layer are now past."""
        self.length += count

    def select(self, rows: Tensor) -> None:
        """Row i becomes a copy of what row ``rows[i]`` (int64) was; there may be more or fewer rows than before."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
