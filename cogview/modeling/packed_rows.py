"""Rows of several lengths as one sequence of positions, for layers that treat each position alone but for attention."""

# B rows, T positions of the longest row, N packed positions, D width, E three widths
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogview.kernels.attention import attention
from cogview.kernels.native_training import attends_natively, packed_attention_native

PADDED_UP_TO = 1.15  # longest over shortest row of a block: another block is one more call of PyTorch's attention


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
    """Where each position of B rows is after packing.

    Rows of similar length form a block, which is padded to the longest of them. The blocks follow each other.

    Attributes:
        blocks: Rows and positions of each block.
        sources_N: Index of each packed position in the B * T positions before packing, ascending, int64.
        shape: (B, T).
    """

    blocks: tuple[tuple[int, int], ...]
    sources_N: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, lengths: Sequence[int], longest: int, device: torch.device, *, pad: bool) -> PackedRows:
        """Pack rows.

        Args:
            lengths: Positions of each row, from 1 to ``longest``, in ascending order.
            longest: T.
            device: Device of the rows.
            pad: Pad rows of similar length to one block; otherwise the rows of a block have one length.
        """
        ratio = PADDED_UP_TO if pad else 1.0
        blocks, first = [], 0
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or lengths[end] > ratio * lengths[first]:
                blocks.append((end - first, lengths[end - 1]))
                first = end
        sources, row = [], 0
        for rows, length in blocks:
            starts = torch.arange(row, row + rows, device=device) * longest
            sources.append((starts.unsqueeze(1) + torch.arange(length, device=device)).flatten())
            row += rows
        return cls(blocks=tuple(blocks), sources_N=torch.cat(sources), shape=(len(lengths), longest))

    def pack(self, values_BT: Tensor) -> Tensor:
        """Return the packed values (1, N)."""
        return values_BT.reshape(-1)[self.sources_N].unsqueeze(0)

    def locate(self, indices_M: Tensor) -> Tensor:
        """Return where positions are after packing.

        Args:
            indices_M: Indices in the B * T positions before packing, int64, none of them in padding.

        Returns:
            Indices (M,) in the N packed positions, int64.
        """
        return torch.searchsorted(self.sources_N, indices_M)

    def attend(self, qkv_1NE: Tensor, num_heads: int) -> Tensor:
        """Return what the queries of packed rows attend to.

        Args:
            qkv_1NE: Queries, keys and values (1, N, 3 D).
            num_heads: Number of heads.

        Returns:
            (1, N, D).
        """
        if attends_natively(qkv_1NE, num_heads, self.blocks[-1][1]):
            return packed_attention_native(qkv_1NE.flatten(0, 1), num_heads, self.blocks).unsqueeze(0)
        mixed = []
        for part, (rows, length) in zip(
            qkv_1NE.flatten(0, 1).split([rows * length for rows, length in self.blocks]), self.blocks, strict=True
        ):
            q, k, v = part.view(rows, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
            mixed.append(attention(q, k, v).transpose(1, 2).reshape(rows * length, -1))
        return torch.cat(mixed).unsqueeze(0)

    def unpack(self, values_1ND: Tensor) -> Tensor:
        """Return packed values as (B, T, D), with zeros at positions that were left out."""
        rows, length = self.shape
        flat = values_1ND.new_zeros(rows * length, values_1ND.shape[-1])
        return flat.index_copy(0, self.sources_N, values_1ND.flatten(0, 1)).view(rows, length, -1)
