"""Batches: token sequences of different lengths, padded to one."""

# B sequences of a batch, T indices of the longest
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.vocabulary import TokenKind


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceBatch:
    """Sequences padded to one length. Arrays are (B, T) unless noted; padding is neither blank nor learnt."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]  # 0 in padding
    kinds: NDArray[np.int8]  # COMMAND in padding
    blanks: NDArray[np.bool_]
    loss: NDArray[np.bool_]
    image_sizes: NDArray[np.int64]  # 0 in padding
    starts: NDArray[np.int64]  # (B,) index at which each sequence begins: the padding on its left
    ends: NDArray[np.int64]  # (B,) index behind the last of each sequence: padding follows


def pad_left(sequences: Sequence[TokenSequence], pad_id: int) -> SequenceBatch:
    """Return a batch whose sequences all end at the last index, for generation.

    Args:
        sequences: One or more.
        pad_id: Id that fills the indices before a sequence.

    Returns:
        A batch as long as the longest sequence.

    Raises:
        ValueError: If there is no sequence.
    """
    return _pad(sequences, pad_id, length=None, on_left=True)


def pad_right(sequences: Sequence[TokenSequence], pad_id: int, length: int | None = None) -> SequenceBatch:
    """Return a batch whose sequences all begin at the first index, for training.

    Args:
        sequences: One or more.
        pad_id: Id that fills the indices behind a sequence.
        length: T, by default the length of the longest sequence.

    Returns:
        A batch of that length.

    Raises:
        ValueError: If there is no sequence, or one is longer than ``length``.
    """
    return _pad(sequences, pad_id, length=length, on_left=False)


def _pad(sequences: Sequence[TokenSequence], pad_id: int, *, length: int | None, on_left: bool) -> SequenceBatch:
    """Return a batch padded on one side."""
    if not sequences:
        raise ValueError("a batch needs at least one row")
    longest = max(map(len, sequences))
    if length is not None and longest > length:
        raise ValueError(f"a sequence of {longest} tokens does not fit a batch of length {length}")
    shape = (len(sequences), longest if length is None else length)
    starts = np.array([shape[1] - len(sequence) if on_left else 0 for sequence in sequences])
    ends = starts + np.array([len(sequence) for sequence in sequences])
    batch = SequenceBatch(
        ids=np.full(shape, pad_id, dtype=np.int64),
        positions=np.zeros(shape, dtype=np.int64),
        kinds=np.full(shape, TokenKind.COMMAND, dtype=np.int8),
        blanks=np.zeros(shape, dtype=bool),
        loss=np.zeros(shape, dtype=bool),
        image_sizes=np.zeros(shape, dtype=np.int64),
        starts=starts,
        ends=ends,
    )
    for name in ("ids", "positions", "kinds", "blanks", "loss", "image_sizes"):
        for index, sequence in enumerate(sequences):
            getattr(batch, name)[index, starts[index] : ends[index]] = getattr(sequence, name)
    return batch
