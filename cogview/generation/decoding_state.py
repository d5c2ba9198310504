"""The rows of a batch as they are read and written, with the keys and values of what was read."""

# B rows of a batch, P rows that begin differently, T columns, C columns of a beginning, D width of the model
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cogview.kernels.attention import attention_bias
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import SequenceBatch

# From this share of all keys and values on, beginnings that rows have in common are kept once for all of them. That
# takes more operations than looking at a copy for each row.
MIN_SHARED_FRACTION = 0.2


class DecodingState:
    """Rows that are read from left to right, all to the same column.

    What stands before the first blank of any row is its beginning. Rows whose beginnings are equal read them once, as
    one row: the candidates of one prompt, the captions of one image. ``bias_BT`` (float32) is added to the attention
    scores of each place. Unless they ``may_share``, each row has a copy of its beginning.
    """

    def __init__(
        self,
        transformer: Transformer,
        batch: SequenceBatch,
        bias_BT: np.ndarray | None,
        *,
        int8: bool = False,
        share_prefix: bool = True,
    ) -> None:
        weight = transformer.embedding.weight
        device, dtype = weight.device, weight.dtype
        num_rows, num_columns = batch.ids.shape
        self.transformer = transformer
        self.ids_BT = torch.tensor(batch.ids, device=device)  # a copy, to be written to
        self.positions_BT = torch.from_numpy(batch.positions).to(device)
        self._last_start = int(batch.starts.max(initial=0))
        self._key_bias_BT: Tensor | None = None
        if self._last_start or bias_BT is not None:
            key_bias_BT = np.zeros(batch.ids.shape, dtype=np.float32) if bias_BT is None else bias_BT.copy()
            key_bias_BT[np.arange(num_columns) < batch.starts[:, None]] = -np.inf
            self._key_bias_BT = torch.from_numpy(key_bias_BT).to(device, dtype)

        marks = [0] * num_rows if bias_BT is None else [row.tobytes() for row in bias_BT]
        self._first_blank, beginnings = group_by_prefix(batch, marks)
        num_firsts = 1 + max(beginnings)
        # Rows by which the beginnings are read, and the beginning of each row; None where every row has its own.
        self._prefix_rows_P: Tensor | None = None
        self._prefixes_B: Tensor | None = None
        shared = False
        if self._first_blank and num_firsts < num_rows:
            self._prefix_rows_P = torch.tensor(
                [beginnings.index(number) for number in range(num_firsts)], device=device
            )
            self._prefixes_B = torch.tensor(beginnings, device=device)
            shared = share_prefix and worth_sharing_prefix(batch, self._first_blank, num_firsts)
        self.cache = KVCache(
            transformer.config,
            num_rows,
            num_columns,
            device,
            dtype,
            int8=int8,
            prefixes=self._prefixes_B if shared else None,
            prefix_length=self._first_blank if shared else 0,
        )

    def forward_to(self, column: int) -> Tensor:
        """Hidden states (B, D) from which column ``column`` is told: all columns before it have been read."""
        new = slice(self.cache.length, column)
        rows: Tensor | slice = slice(None)
        if new.start == 0 and self._prefix_rows_P is not None:
            rows = self._prefix_rows_P
        hidden_BTD = self.transformer.hidden(
            self.ids_BT[rows, new],
            self.positions_BT[rows, new],
            bias_B1TS=self._bias(rows, new),
            cache=self.cache,
        )
        if isinstance(rows, slice):
            return hidden_BTD[:, -1].clone()  # a view would keep all of what was read
        assert self._prefixes_B is not None
        if self.cache.prefix is None:
            self.cache.select(self._prefixes_B)
        return hidden_BTD[self._prefixes_B, -1]

    def forward_columns(self, columns_BT: Tensor, keys: int, start: int | None) -> Tensor:
        """Hidden states (B, T, D) of T columns in a row, which look at the first ``keys`` columns.

        ``start`` is where they begin, if that is the same for all rows. What was read there or behind is forgotten.
        Beginnings must not be shared.
        """
        num_new = columns_BT.shape[1]
        if start is not None:
            bias_B1TS = self._bias(slice(None), slice(start, keys))
        else:
            self.cache.write_positions_BT = columns_BT
            bias_B1TS = attention_bias(self._key_bias(slice(None), keys), columns_BT)
        self.cache.length = keys - num_new
        hidden_BTD = self.transformer.hidden(
            self.ids_BT.gather(1, columns_BT),
            self.positions_BT.gather(1, columns_BT),
            bias_B1TS=bias_B1TS,
            cache=self.cache,
        )
        self.cache.write_positions_BT = None
        return hidden_BTD

    def _key_bias(self, rows: Tensor | slice, end: int) -> Tensor:
        """(B, S), what is added to the scores of the first S columns, whoever asks."""
        if self._key_bias_BT is None:
            return torch.zeros((len(self.ids_BT), end), device=self.ids_BT.device, dtype=self.cache.dtype)
        return self._key_bias_BT[rows, :end]

    def _bias(self, rows: Tensor | slice, new: slice) -> Tensor | None:
        """What is added to the attention scores of the new columns (``kernels/attention.py``)."""
        num_new = new.stop - new.start
        if self._key_bias_BT is None:
            if num_new == 1 or new.start == 0:
                return None
            key_bias_BS = self._key_bias(slice(None), new.stop)[:1]
        else:
            key_bias_BS = self._key_bias(rows, new.stop)
            if num_new == 1 and new.start >= self._last_start:
                return key_bias_BS[:, None, None, :]
        columns_BT = torch.arange(new.start, new.stop, device=key_bias_BS.device).expand(len(key_bias_BS), -1)
        return attention_bias(key_bias_BS, columns_BT)

    def select(self, rows: Tensor) -> None:
        """Row i becomes a copy of what row ``rows[i]``, which begins as it does, was."""
        self.ids_BT = self.ids_BT[rows]
        self.cache.select(rows, since=self._first_blank)


def group_by_prefix(batch: SequenceBatch, prefix_keys: Sequence[object]) -> tuple[int, list[int]]:
    """The column of the first blank of any row, and for each row the number, from 0, of what it has before that.

    Rows with different ``marks`` begin differently.
    """
    first = int(batch.blanks.any(axis=0).argmax())
    known: dict[object, int] = {}
    looks = zip(prefix_keys, batch.starts.tolist(), batch.ids[:, :first], batch.positions[:, :first], strict=True)
    return first, [
        known.setdefault((mark, start, ids.tobytes(), positions.tobytes()), len(known))
        for mark, start, ids, positions in looks
    ]


def worth_sharing_prefix(batch: SequenceBatch, length: int, num_prefixes: int) -> bool:
    """Whether to keep so many beginnings of ``length`` columns once each, and no copy of one for each row."""
    num_rows, num_columns = batch.ids.shape
    return 0 < length * (num_rows - num_prefixes) >= MIN_SHARED_FRACTION * num_rows * num_columns
