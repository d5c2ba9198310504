"""Keys and values of what has been read, stored once and in place."""

# B batch, T new positions, S positions in all, L layers, H heads, K size of a head, P beginnings, C their positions
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.kernels.attention import attention
from cogview.kernels.decode_attention import SharedPrefix, decode_attention, quantize_per_position
from cogview.modeling.config import TransformerConfig


class KVCache:
    """Keys and values of the positions seen so far.

    ``stored`` is (L, 2, B, H, S, K), keys and values, allocated once; the first ``length`` of S are filled. The
    transformer lets every layer ``attend`` with T new positions, then ``advance(T)`` makes them part of the past. With
    ``int8`` they are rounded, each position of each head with a scale of its own, which are in ``scales``.

    ``beginnings`` (B,), where given, says which of P beginnings of ``beginning_length`` positions each row has. These
    are stored once and read first, as a batch of P rows.
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
        own_length = max_length - prefix_length
        shape = (config.num_layers, 2, batch_size, config.num_heads, own_length, config.head_size)
        # Written to at once: a CPU would else hand out memory as it is filled, to whoever asks in the meantime.
        self.keys_values = torch.empty(shape, device=device, dtype=torch.int8 if int8 else dtype).zero_()
        self.scales = torch.empty((*shape[:-1], 1), device=device, dtype=dtype).zero_() if int8 else None
        self._layers = list(self.keys_values)
        self._is_plain = not int8 and prefixes is None
        self.dtype = dtype
        self.length = 0
        self.max_length = max_length
        self.write_positions_BT: Tensor | None = (
            None  # where the new positions of each row go, if not behind the filled ones
        )
        self.prefix: KVCache | None = None
        if prefixes is not None:
            self._prefix_rows_PN, self._prefix_slots_B = _grouped(prefixes.tolist(), device)
            self.prefix = KVCache(config, len(self._prefix_rows_PN), prefix_length, device, dtype, int8=int8)

    @property
    def num_bytes(self) -> int:
        """Of all that is stored."""
        own = self.keys_values.nbytes + (0 if self.scales is None else self.scales.nbytes)
        return own + (0 if self.prefix is None else self.prefix.num_bytes)

    def attend(self, layer: int, q_BHTK: Tensor, kv_2BHTK: Tensor, bias_B1TS: Tensor | None) -> Tensor:
        """Store keys and values of T new positions of ``layer``; returns what their queries find, (B, H, T, K).

        There may be fewer rows than B, as long as nothing but these has been read.
        """
        rows, _, length, _ = q_BHTK.shape
        end = self.length + length
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {end} are needed")
        if self._is_plain and self.write_positions_BT is None:  # the usual case, started with the fewest operations
            layer_2BHSK = self._layers[layer]
            if rows < layer_2BHSK.shape[1]:
                layer_2BHSK = layer_2BHSK[:, :rows]
            layer_2BHSK.narrow(3, self.length, length).copy_(kv_2BHTK)
            keys, values = layer_2BHSK.narrow(3, 0, end).unbind(0)
            return attention(q_BHTK, keys, values, bias_B1TS)
        skipped = 0
        if self.prefix is not None:
            skipped = self.prefix.max_length
            if end <= skipped:
                return self.prefix.attend(layer, q_BHTK, kv_2BHTK, bias_B1TS)
        self._store(layer, kv_2BHTK, slice(self.length - skipped, end - skipped))
        keys, values = self.keys_values[layer, :, :rows, :, : end - skipped]
        if self._is_plain:
            return attention(q_BHTK, keys, values, bias_B1TS)
        scales = None
        if self.scales is not None:
            key_scales, value_scales = self.scales[layer, :, :rows, :, : end - skipped]
            scales = (key_scales, value_scales)
        beginning = (
            None
            if self.prefix is None
            else self.prefix._shared_prefix(layer, self._prefix_rows_PN, self._prefix_slots_B)
        )
        return decode_attention(q_BHTK, keys, values, bias_B1TS, scales=scales, prefix=beginning)

    def advance(self, count: int) -> None:
        """The last ``count`` positions given to every layer are now past."""
        self.length += count
        if self.prefix is not None and self.length <= self.prefix.max_length:
            self.prefix.advance(count)

    def select(self, rows: Tensor, since: int = 0) -> None:
        """Row i becomes a copy of what row ``rows[i]`` (int64) was, from position ``since`` on."""
        skipped = 0 if self.prefix is None else self.prefix.max_length
        filled = slice(max(since - skipped, 0), self.length - skipped)
        for tensor in (self.keys_values, self.scales):
            for layer_2BHSK in tensor if tensor is not None else ():
                layer_2BHSK[:, : len(rows), :, filled] = layer_2BHSK[:, rows, :, filled]

    def _store(self, layer: int, kv_2BHTK: Tensor, new: slice) -> None:
        parts = quantize_per_position(kv_2BHTK) if self.scales is not None else (kv_2BHTK,)
        for tensor, part_2BHTK in zip((self.keys_values, self.scales), parts, strict=False):
            assert tensor is not None
            layer_2BHSK = tensor[layer, :, : part_2BHTK.shape[1]]
            if self.write_positions_BT is None:
                layer_2BHSK[:, :, :, new] = part_2BHTK
            else:
                rows_B1 = torch.arange(part_2BHTK.shape[1], device=tensor.device).unsqueeze(1)
                layer_2BHSK.transpose(2, 3)[:, rows_B1, self.write_positions_BT] = part_2BHTK.transpose(2, 3)

    def _shared_prefix(self, layer: int, members_PN: Tensor, slots_B: Tensor) -> SharedPrefix:
        """All that is stored of ``layer``, for rows that have it in common."""
        keys, values = self.keys_values[layer]
        scales = None if self.scales is None else (self.scales[layer, 0], self.scales[layer, 1])
        return SharedPrefix(keys, values, members_PN, slots_B, scales)


def _grouped(beginnings: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(P, N) the rows that have each beginning, the first of all where there are fewer; (B,) where each row stands."""
    members: list[list[int]] = [[] for _ in range(max(beginnings) + 1)]
    for row, beginning in enumerate(beginnings):
        members[beginning].append(row)
    most = max(map(len, members))
    slots = [beginning * most + members[beginning].index(row) for row, beginning in enumerate(beginnings)]
    filled = [rows + [0] * (most - len(rows)) for rows in members]
    return torch.tensor(filled, device=device), torch.tensor(slots, device=device)
