"""State of a batch while it is decoded: ids, positions, attention bias and KV cache, with shared prefixes."""

# B rows of a batch, P distinct prefixes, T columns, C columns of a prefix, S columns so far, D width of the model
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogview.kernels.attention import attention_bias
from cogview.kernels.window_mask import WindowMask
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.native_layers import NativeLayers
from cogview.modeling.pivots import fixed_pivots
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import SequenceBatch
from cogview.tokenizers.vocabulary import TokenKind

# Prefixes are stored once if that saves at least this fraction of all keys and values. Attention to a shared prefix
# takes more operations than attention to a copy per row.
MIN_SHARED_FRACTION = 0.2


class DecodingState:
    """Rows of one length that are decoded from left to right.

    The columns before the first blank of any row are the prefix. Rows with equal prefixes compute them once, as one
    row: candidates of one prompt, or captions of one image.

    Attributes:
        ids_BT: Ids, int64; sampled ids are written here.
        positions_BT: Indices of the learned positions, int64.
        cache: Keys and values of the columns processed so far.
    """

    def __init__(
        self,
        transformer: Transformer,
        batch: SequenceBatch,
        bias_BT: NDArray[np.float32] | None,
        *,
        int8: bool = False,
    ) -> None:
        """Allocate the state; nothing is computed yet.

        Args:
            transformer: Model that computes the hidden states.
            batch: Rows, padded on the left.
            bias_BT: Bias that is added to the attention scores of each column; None for 0.
            int8: Store keys and values in int8.
        """
        weight = transformer.embedding.weight
        device, dtype = weight.device, transformer.dtype
        num_rows, num_columns = batch.ids.shape
        self.transformer = transformer
        self.ids_BT = torch.tensor(batch.ids, device=device)  # a copy, since it is written to
        self.positions_BT = torch.from_numpy(batch.positions).to(device)
        self._last_start = int(batch.starts.max(initial=0))
        self._is_native = isinstance(transformer.cpu_layers, NativeLayers)
        self._key_bias_BT: Tensor | None = None
        if self._last_start or bias_BT is not None:
            key_bias_BT = np.zeros(batch.ids.shape, dtype=np.float32) if bias_BT is None else bias_BT.copy()
            key_bias_BT[np.arange(num_columns) < batch.starts[:, None]] = -np.inf
            self._key_bias_BT = torch.from_numpy(key_bias_BT).to(device, dtype)

        self._pivots = fixed_pivots(transformer.config.attention, batch, device)
        prefix_keys = [0] * num_rows if bias_BT is None else [row.tobytes() for row in bias_BT]
        self._first_blank, prefixes = group_by_prefix(batch, prefix_keys)
        num_prefixes = 1 + max(prefixes)
        # One row of each prefix, and the prefix of each row; None if all prefixes differ.
        self._prefix_rows_P: Tensor | None = None
        self._prefixes_B: Tensor | None = None
        shared = False
        if self._first_blank and num_prefixes < num_rows:
            self._prefix_rows_P = torch.tensor(
                [prefixes.index(number) for number in range(num_prefixes)], device=device
            )
            self._prefixes_B = torch.tensor(prefixes, device=device)
            shared = worth_sharing_prefix(batch, self._first_blank, num_prefixes)
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
        """Process all columns before ``column`` that are not in the cache yet.

        Returns:
            Hidden states (B, D) of the last column before ``column``, which predict it.
        """
        new = slice(self.cache.length, column)
        rows: Tensor | slice = slice(None)
        if new.start == 0 and self._prefix_rows_P is not None:
            rows = self._prefix_rows_P
        hidden_BTD = self.transformer.hidden(
            self.ids_BT[rows, new],
            self.positions_BT[rows, new],
            cache=self.cache,
            **self._mask(rows, new),
        )
        if isinstance(rows, slice):
            if hidden_BTD.shape[1] == 1:
                return hidden_BTD[:, 0]
            return hidden_BTD[:, -1].clone()  # a view would keep the hidden states of all columns alive
        assert self._prefixes_B is not None
        if self.cache.prefix is None:
            self.cache.select(self._prefixes_B)
        return hidden_BTD[self._prefixes_B, -1]

    def forward_columns(self, columns_BT: Tensor, num_keys: int, start: int | None) -> Tensor:
        """Process T consecutive columns of each row; the cache forgets what it had from there on.

        Args:
            columns_BT: Indices of the columns, int64; rows may be at different columns.
            num_keys: Number of columns that attention reads, from the first.
            start: First column, if it is the same for all rows.

        Returns:
            Hidden states (B, T, D).
        """
        num_new = columns_BT.shape[1]
        if start is not None:
            mask = self._mask(slice(None), slice(start, num_keys))
        else:
            self.cache.write_positions_BT = columns_BT
            if self._pivots is not None:
                mask = self._window_mask(slice(None), num_keys, columns_BT)
            else:
                mask = {"bias_B1TS": attention_bias(self._key_bias(slice(None), num_keys), columns_BT)}
        self.cache.length = num_keys - num_new
        hidden_BTD = self.transformer.hidden(
            self.ids_BT.gather(1, columns_BT),
            self.positions_BT.gather(1, columns_BT),
            cache=self.cache,
            **mask,
        )
        self.cache.write_positions_BT = None
        return hidden_BTD

    def select(self, rows_B: Tensor) -> None:
        """Replace row i by a copy of row ``rows_B[i]`` (int64), which must have the same prefix."""
        self.ids_BT = self.ids_BT[rows_B]
        self.cache.select(rows_B, since=self._first_blank)

    def _key_bias(self, rows: Tensor | slice, end: int) -> Tensor:
        """Return the bias (B, S) of the first ``end`` columns as keys."""
        if self._key_bias_BT is None:
            return torch.zeros((len(self.ids_BT), end), device=self.ids_BT.device, dtype=self.cache.dtype)
        return self._key_bias_BT[rows, :end]

    def _mask(self, rows: Tensor | slice, new: slice) -> dict[str, Any]:
        """Return the arguments of ``Transformer.hidden`` that say what the columns ``new`` attend to."""
        if self._pivots is None:
            return {"bias_B1TS": self._bias(rows, new)}
        columns_1T = torch.arange(new.start, new.stop, device=self.ids_BT.device).unsqueeze(0)
        return self._window_mask(rows, new.stop, columns_1T)

    def _window_mask(self, rows: Tensor | slice, end: int, columns_BT: Tensor) -> dict[str, Any]:
        """Return the argument that describes the window attention of ``columns_BT`` to the first ``end`` columns."""
        assert self._pivots is not None
        mask = WindowMask(
            window=self.transformer.config.attention.window,
            pivots=self._pivots.rows(rows),
            queries_BT=columns_BT,
            key_bias_BS=None if self._key_bias_BT is None else self._key_bias_BT[rows, :end],
        )
        return {"window": mask}

    def _bias(self, rows: Tensor | slice, new: slice) -> Tensor | None:
        """Return the attention bias (B, 1, T, S) of the columns ``new``, or None if causal attention needs none."""
        num_new = new.stop - new.start
        if self._key_bias_BT is None:
            if num_new == 1 or new.start == 0 or self._is_native:
                return None
            key_bias_BS = self._key_bias(slice(None), new.stop)[:1]
        else:
            key_bias_BS = self._key_bias(rows, new.stop)
            if num_new == 1 and new.start >= self._last_start:
                return key_bias_BS[:, None, None, :]
        columns_BT = torch.arange(new.start, new.stop, device=key_bias_BS.device).expand(len(key_bias_BS), -1)
        return attention_bias(key_bias_BS, columns_BT)


def group_by_prefix(batch: SequenceBatch, prefix_keys: Sequence[object]) -> tuple[int, list[int]]:
    """Number the distinct prefixes of a batch.

    The prefix of a row is everything before the column of the first blank of any row: padding, ids and positions.

    Examples:
        Three rows of a batch, ``_`` being a blank and ``.`` padding::

            红 苹果 [BASE] _ _      prefix 0
            .  狐狸 [BASE] _ _      prefix 1
            红 苹果 [BASE] _ _      prefix 0

        The first blank is in column 3, so ``group_by_prefix(batch, [0, 0, 0])`` returns ``(3, [0, 1, 0])``: two
        prefixes of three columns are computed instead of three. With ``prefix_keys`` ``[0, 0, 9]`` the third row has a
        prefix of its kind alone, and the result is ``(3, [0, 1, 2])``.

    Args:
        batch: Rows, padded on the left.
        prefix_keys: One hashable value per row, such as its attention bias; rows with different keys never share.

    Returns:
        Column of the first blank, and for each row the number of its prefix, counted from 0 in order of appearance.
    """
    first_blank = int(batch.blanks.any(axis=0).argmax())
    numbers: dict[object, int] = {}
    rows = zip(
        prefix_keys, batch.starts.tolist(), batch.ids[:, :first_blank], batch.positions[:, :first_blank], strict=True
    )
    return first_blank, [
        numbers.setdefault((key, start, ids.tobytes(), positions.tobytes()), len(numbers))
        for key, start, ids, positions in rows
    ]


def worth_sharing_prefix(batch: SequenceBatch, length: int, num_prefixes: int) -> bool:
    """Return whether to store each prefix once instead of once per row.

    Args:
        batch: Rows of the batch.
        length: Columns of a prefix.
        num_prefixes: Number of distinct prefixes.
    """
    num_rows, num_columns = batch.ids.shape
    saved = length * (num_rows - num_prefixes)
    return saved > 0 and bool(saved >= MIN_SHARED_FRACTION * num_rows * num_columns)


def text_attention_bias(batch: SequenceBatch, weights: Sequence[float]) -> NDArray[np.float32] | None:
    """Return the attention bias by which rows attend more or less to their given text.

    A key with the bias log w counts as w copies of it (CogView2, arXiv:2204.14217).

    Args:
        batch: Rows of the batch.
        weights: Weight w of the text in the first rows, above 0; further rows have weight 1.

    Returns:
        Bias (B, T): log w at the given text, 0 elsewhere; None if every weight is 1.
    """
    if all(weight == 1 for weight in weights):
        return None
    bias_BT = np.zeros(batch.ids.shape, dtype=np.float32)
    for index, weight in enumerate(weights):
        bias_BT[index, (batch.kinds[index] == TokenKind.TEXT) & ~batch.blanks[index]] = math.log(weight)
    return bias_BT
