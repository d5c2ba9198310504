"""Window attention as the model describes it: pivots, the mask of some queries, and the keys that a step reads.

``WindowMask`` has three forms. ``to_bias`` is the specification: a bias of every query and key. ``select_keys`` names
the few keys that the queries of a step attend to, so that a step of decoding reads no others. Native kernels take the
mask as it is (``c/attention.h``). Whole sequences without padding use ``window_attention.py``.
"""

# B rows, T queries, S keys so far, N pivots of a row, A selected keys of a row
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pivots:
    """Positions that represent everything before the window of a query.

    Attributes:
        positions_BN: Indices of the pivots in each row, int64, ascending, then -1 where a row has fewer.
        bias_BN: Bias of the scores of the pivots, float32: log(s / n) for n positions sampled from s, else 0.
    """

    positions_BN: Tensor
    bias_BN: Tensor

    @classmethod
    def from_bias(cls, bias_BS: Tensor) -> Pivots:
        """Return the pivots that a bias of each position describes.

        Args:
            bias_BS: Bias of each position as a pivot, float32; -inf for positions that are none.
        """
        is_pivot_BS = ~bias_BS.isneginf()
        count = int(is_pivot_BS.sum(dim=1).max()) if bias_BS.numel() else 0
        # A stable sort keeps the order of the pivots, and moves them before all other positions.
        positions_BN = (~is_pivot_BS).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        missing_BN = ~is_pivot_BS.gather(1, positions_BN)
        bias_BN = bias_BS.gather(1, positions_BN).masked_fill(missing_BN, 0.0)
        return cls(positions_BN.masked_fill(missing_BN, -1), bias_BN)

    def rows(self, rows: Tensor | slice) -> Pivots:
        """Return the pivots of some rows."""
        return Pivots(self.positions_BN[rows], self.bias_BN[rows])

    def to(self, device: torch.device) -> Pivots:
        """Return the pivots on ``device``."""
        return Pivots(self.positions_BN.to(device), self.bias_BN.to(device))

    def to_bias(self, num_keys: int) -> Tensor:
        """Return the bias (B, S) of the first ``num_keys`` positions as pivots, -inf where they are none."""
        outside_BN = (self.positions_BN < 0) | (self.positions_BN >= num_keys)
        indices_BN = self.positions_BN.masked_fill(outside_BN, num_keys)  # an extra column, which is dropped
        bias_BS = self.bias_BN.new_full((len(indices_BN), num_keys + 1), -torch.inf)
        return bias_BS.scatter_(1, indices_BN, self.bias_BN)[:, :num_keys]


@dataclass(frozen=True, eq=False)
class SelectedKeys:
    """Keys that the queries of a step attend to, and the bias of their scores.

    Attributes:
        indices_BA: Indices of the keys in each row, int64; those that no query attends to may be repeated.
        bias_B1TA: Bias of each query and selected key, -inf where a query does not attend to it.
    """

    indices_BA: Tensor
    bias_B1TA: Tensor


@dataclass(frozen=True, eq=False)
class WindowMask:
    """Window attention of T queries at consecutive positions: to the ``window`` last keys, and to pivots before them.

    Attributes:
        window: Number of recent positions that a query attends to, its own included; at least 1.
        pivots: Pivots of the rows.
        queries_BT: Index of each query among the keys, int64, consecutive in a row; (1, T) if all rows are equal.
        key_bias_BS: Bias of each key for every query, -inf at padding; None for 0.
    """

    window: int
    pivots: Pivots
    queries_BT: Tensor
    key_bias_BS: Tensor | None = None

    @classmethod
    def of_sequences(cls, window: int, pivots: Pivots, length: int) -> WindowMask:
        """Return the mask of whole sequences of ``length`` positions, which may be padded on the right."""
        queries_1T = torch.arange(length, device=pivots.positions_BN.device).unsqueeze(0)
        return cls(window=window, pivots=pivots, queries_BT=queries_1T)

    def is_causal(self, num_keys: int) -> bool:
        """Return whether the mask is that of causal attention to the first ``num_keys`` keys."""
        return self.key_bias_BS is None and num_keys <= self.window

    def to_bias(self, num_keys: int, dtype: torch.dtype) -> Tensor:
        """Return the bias of all keys so far: the specification of window attention.

        A query always attends to its own key, even in padding: no row of the softmax is empty.

        Args:
            num_keys: Number of keys S.
            dtype: Dtype of the bias.

        Returns:
            Bias (B, 1, T, S), -inf where a query does not attend to a key.
        """
        keys_S = torch.arange(num_keys, device=self.queries_BT.device)
        lag_BTS = self.queries_BT.unsqueeze(-1) - keys_S
        return self._bias_of(lag_BTS, self.pivots.to_bias(num_keys), self.key_bias_BS).to(dtype).unsqueeze(1)

    def select_keys(self, num_keys: int, dtype: torch.dtype) -> SelectedKeys | None:
        """Return the keys that the queries attend to; None if these are not fewer than all keys.

        The number of selected keys depends on the shapes alone, so that a captured CUDA graph serves every step.

        Args:
            num_keys: Number of keys S.
            dtype: Dtype of the bias.
        """
        positions_BN = self.pivots.positions_BN
        num_queries = self.queries_BT.shape[1]
        if positions_BN.shape[1] + self.window + num_queries - 1 >= num_keys:
            return None
        first_B1 = self.queries_BT[:, :1] - self.window + 1
        recent_BR = first_B1 + torch.arange(self.window + num_queries - 1, device=first_B1.device)
        recent_BR = recent_BR.expand(len(positions_BN), -1)
        # Pivots from the first window on are among the recent keys already.
        seen_BA = torch.cat([(positions_BN >= 0) & (positions_BN < first_B1), recent_BR >= 0], dim=1)
        indices_BA = torch.cat([positions_BN, recent_BR], dim=1).clamp(min=0, max=num_keys - 1)
        lag_BTA = self.queries_BT.unsqueeze(-1) - indices_BA.unsqueeze(1)
        pivot_bias_BA = self.pivots.to_bias(num_keys).gather(1, indices_BA)
        key_bias_BA = None
        if self.key_bias_BS is not None:
            key_bias_BA = self.key_bias_BS.expand(len(indices_BA), -1).gather(1, indices_BA)
        bias_BTA = self._bias_of(lag_BTA, pivot_bias_BA, key_bias_BA)
        bias_BTA = bias_BTA.masked_fill(~seen_BA.unsqueeze(1), -torch.inf)
        return SelectedKeys(indices_BA, bias_BTA.to(dtype).unsqueeze(1))

    def _bias_of(self, lag_BTX: Tensor, pivot_bias_BX: Tensor, key_bias_BX: Tensor | None) -> Tensor:
        """Return the float32 bias (B, T, X) of keys that lie ``lag_BTX`` positions before the queries."""
        bias_BTX = torch.where(lag_BTX < self.window, 0.0, pivot_bias_BX.unsqueeze(1))
        if key_bias_BX is not None:
            bias_BTX = bias_BTX + key_bias_BX.float().unsqueeze(1)
        bias_BTX = bias_BTX.masked_fill(lag_BTX < 0, -torch.inf)
        return bias_BTX.masked_fill((lag_BTX == 0) & bias_BTX.isneginf(), 0.0)
