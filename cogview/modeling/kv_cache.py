"""KV cache: keys and values of the processed positions, stored once and in place."""

# B rows, T new positions, S positions in all, L layers, H heads, K size of a head, P prefixes of C positions, N rows
# of a prefix (at most), A selected keys of a row
from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from cogview.kernels.attention import attention
from cogview.kernels.decode_attention import SharedPrefix, decode_attention, quantize_per_position
from cogview.kernels.window_attention import window_attention
from cogview.kernels.window_mask import SelectedKeys, WindowMask
from cogview.modeling.config import TransformerConfig

# What the queries of a layer attend to: the bias (B, 1, T, S) of all keys, or None for causal attention; selected keys
# of a cache; or the mask of window attention, for whole sequences without a cache.
AttentionMask: TypeAlias = Tensor | SelectedKeys | WindowMask | None


def attend(layer: int, qkv_3BHTK: Tensor, mask: AttentionMask, cache: KVCache | None) -> Tensor:
    """Compute the attention of T new positions of a layer.

    Args:
        layer: Index of the layer in the cache.
        qkv_3BHTK: Queries, keys and values of the new positions.
        mask: What the queries attend to.
        cache: Keys and values of the past, to which the new ones are added; None without a past.

    Returns:
        Attention output (B, H, T, K).
    """
    if isinstance(mask, WindowMask):
        assert cache is None
        pivots = mask.pivots
        return window_attention(
            *qkv_3BHTK, window=mask.window, pivots_BN=pivots.positions_BN, pivot_bias_BN=pivots.bias_BN
        )
    if cache is not None:
        return cache.attend(layer, qkv_3BHTK[0], qkv_3BHTK[1:], mask)
    assert not isinstance(mask, SelectedKeys)
    return attention(qkv_3BHTK[0], qkv_3BHTK[1], qkv_3BHTK[2], mask)


def choose_form(window: WindowMask, num_keys: int, dtype: torch.dtype, cache: KVCache | None) -> AttentionMask:
    """Return the form of a mask of window attention that reads the fewest keys, for PyTorch's layers.

    Args:
        window: The mask.
        num_keys: Number of keys S.
        dtype: Dtype of the bias without a cache.
        cache: Keys and values of the past, or None.
    """
    if cache is None:
        return window if window.key_bias_BS is None else window.to_bias(num_keys, dtype)
    return window.select_keys(num_keys, cache.dtype) or window.to_bias(num_keys, cache.dtype)


class KVCache:
    """Keys and values of the positions processed so far.

    A forward pass calls ``attend`` in every layer with T new positions, then ``advance(T)`` makes them part of the
    past. Rows with a common prefix store it once, in ``prefix``: a cache of P rows that is filled first.

    Attributes:
        keys_values: (L, 2, B, H, S, K): keys and values, allocated once; without the prefix. The first ``length`` of S
            are filled.
        scales: (L, 2, B, H, S, 1), one scale per position and head; None unless keys and values are int8.
        dtype: Dtype of the queries.
        length: Number of processed positions, prefix included.
        max_length: Number of positions that fit, prefix included.
        write_positions_BT: Positions at which the next ``attend`` stores, int64; None to append.
        prefix: Cache of the prefixes; None if rows share none.
        prefix_rows_B: Row of ``prefix`` that each row continues, int64; None if rows share none.
        native_store: Addresses of keys, values and scales, once native kernels have described them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        int8: bool = False,
        prefixes: Tensor | None = None,
        prefix_length: int = 0,
    ) -> None:
        """Allocate the cache.

        Args:
            config: Shape of the transformer.
            batch_size: Number of rows.
            max_length: Number of positions, prefix included.
            device: Device of the cache.
            dtype: Dtype of the queries, and of keys and values unless ``int8``.
            int8: Quantize keys and values, with a scale per position and head.
            prefixes: Number of the prefix of each row, (B,) int64 from 0 to P - 1; None if rows share none.
            prefix_length: Number of positions C of every prefix.
        """
        shape = (config.num_layers, 2, batch_size, config.num_heads, max_length - prefix_length, config.head_size)
        # Written to at once: a CPU otherwise assigns the pages as they are filled, when they may be taken.
        self.keys_values = torch.empty(shape, device=device, dtype=torch.int8 if int8 else dtype).zero_()
        self.scales = torch.empty((*shape[:-1], 1), device=device, dtype=dtype).zero_() if int8 else None
        self._layers = list(self.keys_values)
        self.native_store: object = None
        self._is_plain = not int8 and prefixes is None
        self.dtype = dtype
        self.length = 0
        self.max_length = max_length
        self.write_positions_BT: Tensor | None = None
        self.prefix: KVCache | None = None
        self.prefix_rows_B = prefixes
        if prefixes is not None:
            self._prefix_rows_PN, self._prefix_slots_B = _grouped(prefixes.tolist(), device)
            self.prefix = KVCache(config, len(self._prefix_rows_PN), prefix_length, device, dtype, int8=int8)

    @property
    def num_bytes(self) -> int:
        """Size of keys, values and scales, in bytes."""
        scales_bytes = 0 if self.scales is None else self.scales.nbytes
        return self.keys_values.nbytes + scales_bytes + (0 if self.prefix is None else self.prefix.num_bytes)

    def attend(self, layer: int, q_BHTK: Tensor, kv_2BHTK: Tensor, mask: Tensor | SelectedKeys | None) -> Tensor:
        """Store keys and values of T new positions of a layer, and attend to the positions so far.

        There may be fewer rows than B while only these are processed, as in the prefill of prefixes.

        Args:
            layer: Index of the layer.
            q_BHTK: Queries of the new positions.
            kv_2BHTK: Their keys and values.
            mask: Bias (B, 1, T, S) that is added to the attention scores, None for causal attention, or the keys that
                are read, with their bias.

        Returns:
            Attention output (B, H, T, K).

        Raises:
            ValueError: The positions do not fit.
        """
        num_rows, _, num_new, _ = q_BHTK.shape
        end = self.length + num_new
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {end} are needed")
        # The common case, with the fewest operations.
        if self._is_plain and self.write_positions_BT is None and not isinstance(mask, SelectedKeys):
            layer_2BHSK = self._layers[layer]
            if num_rows < layer_2BHSK.shape[1]:
                layer_2BHSK = layer_2BHSK[:, :num_rows]
            layer_2BHSK.narrow(3, self.length, num_new).copy_(kv_2BHTK)
            keys, values = layer_2BHSK.narrow(3, 0, end).unbind(0)
            return attention(q_BHTK, keys, values, mask)
        prefix_length = 0
        if self.prefix is not None:
            prefix_length = self.prefix.max_length
            if end <= prefix_length:
                return self.prefix.attend(layer, q_BHTK, kv_2BHTK, mask)
        self._store(layer, kv_2BHTK, prefix_length)
        if isinstance(mask, SelectedKeys):
            return self._attend_to_selected(layer, q_BHTK, mask)
        keys, values = self.keys_values[layer, :, :num_rows, :, : end - prefix_length]
        if self._is_plain:
            return attention(q_BHTK, keys, values, mask)
        scales = None
        if self.scales is not None:
            key_scales, value_scales = self.scales[layer, :, :num_rows, :, : end - prefix_length]
            scales = (key_scales, value_scales)
        prefix = None
        if self.prefix is not None:
            prefix = self.prefix._shared_prefix(layer, self._prefix_rows_PN, self._prefix_slots_B)
        return decode_attention(q_BHTK, keys, values, mask, scales=scales, prefix=prefix)

    def _attend_to_selected(self, layer: int, q_BHTK: Tensor, selected: SelectedKeys) -> Tensor:
        """Return the attention to selected keys: they are copied, and no others are read."""
        keys, values = self._select("keys_values", layer, selected.indices_BA)
        if self.scales is None:
            return attention(q_BHTK, keys, values, selected.bias_B1TA)
        key_scales, value_scales = self._select("scales", layer, selected.indices_BA)
        scales = (key_scales, value_scales)
        return decode_attention(q_BHTK, keys, values, selected.bias_B1TA, scales=scales)

    def _select(self, name: str, layer: int, indices_BA: Tensor) -> Tensor:
        """Return (2, B, H, A, X): the selected keys and values of a layer, or their scales."""
        prefix_length = 0 if self.prefix is None else self.prefix.max_length
        rows_B1 = torch.arange(len(indices_BA), device=indices_BA.device).unsqueeze(1)
        positions_BA = (indices_BA - prefix_length).clamp(min=0)
        selected_2BAHX: Tensor = getattr(self, name)[layer].transpose(2, 3)[:, rows_B1, positions_BA]
        if self.prefix is not None and self.prefix_rows_B is not None:
            prefix_rows_B1 = self.prefix_rows_B[: len(indices_BA)].unsqueeze(1)
            in_prefix_BA = indices_BA < prefix_length
            positions_BA = indices_BA.clamp(max=prefix_length - 1)
            shared_2BAHX = getattr(self.prefix, name)[layer].transpose(2, 3)[:, prefix_rows_B1, positions_BA]
            selected_2BAHX = torch.where(in_prefix_BA[:, :, None, None], shared_2BAHX, selected_2BAHX)
        return selected_2BAHX.transpose(2, 3)

    def advance(self, count: int) -> None:
        """Make the last ``count`` positions given to every layer part of the past."""
        self.length += count
        if self.prefix is not None and self.length <= self.prefix.max_length:
            self.prefix.advance(count)

    def select(self, rows_B: Tensor, since: int = 0) -> None:
        """Replace row i by a copy of row ``rows_B[i]`` (int64), from position ``since`` on.

        Args:
            rows_B: Row to copy for each row, (B,) int64.
            since: First position to copy.
        """
        prefix_length = 0 if self.prefix is None else self.prefix.max_length
        filled = slice(max(since - prefix_length, 0), self.length - prefix_length)
        for tensor in (self.keys_values, self.scales):
            for layer_2BHSK in tensor if tensor is not None else ():
                layer_2BHSK[:, : len(rows_B), :, filled] = layer_2BHSK[:, rows_B, :, filled]

    def _store(self, layer: int, kv_2BHTK: Tensor, prefix_length: int) -> None:
        """Store new keys and values after the prefix: at ``length``, or at ``write_positions_BT``."""
        start, num_new = self.length - prefix_length, kv_2BHTK.shape[3]
        parts = quantize_per_position(kv_2BHTK) if self.scales is not None else (kv_2BHTK,)
        for tensor, part_2BHTK in zip((self.keys_values, self.scales), parts, strict=False):
            assert tensor is not None
            layer_2BHSK = tensor[layer, :, : part_2BHTK.shape[1]]
            if self.write_positions_BT is None:
                layer_2BHSK[:, :, :, start : start + num_new] = part_2BHTK
            else:
                rows_B1 = torch.arange(part_2BHTK.shape[1], device=tensor.device).unsqueeze(1)
                positions_BT = self.write_positions_BT - prefix_length
                layer_2BHSK.transpose(2, 3)[:, rows_B1, positions_BT] = part_2BHTK.transpose(2, 3)

    def _shared_prefix(self, layer: int, prefix_rows_PN: Tensor, prefix_slots_B: Tensor) -> SharedPrefix:
        """Return everything stored of ``layer``, for the rows that share it."""
        keys, values = self.keys_values[layer]
        scales = None if self.scales is None else (self.scales[layer, 0], self.scales[layer, 1])
        return SharedPrefix(keys, values, prefix_rows_PN, prefix_slots_B, scales)


def _grouped(prefixes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows of each prefix (P, N), filled up with row 0, and the slot (B,) of each row in it, flattened."""
    rows_of: list[list[int]] = [[] for _ in range(max(prefixes) + 1)]
    for row, prefix in enumerate(prefixes):
        rows_of[prefix].append(row)
    num_slots = max(map(len, rows_of))
    slots = [prefix * num_slots + rows_of[prefix].index(row) for row, prefix in enumerate(prefixes)]
    filled = [rows + [0] * (num_slots - len(rows)) for rows in rows_of]
    return torch.tensor(filled, device=device), torch.tensor(slots, device=device)
