"""Requests, progress and results of the decoding loop."""

# T tokens of a sequence
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogview.modeling.config import Sampling
from cogview.tokenizers.layouts import TokenSequence


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodingRequest:
    """A sequence whose blanks are to be sampled.

    Attributes:
        sequence: The sequence, with blanks.
        seed: Seed of the noise, an int64.
        sampling: How to sample.
        image: Second part of the noise key, an int64: ``noise_stream`` of the index of the image and its prompt.
        noise_positions: Third part of the noise key for each token, (T,) int64. By default the index of a code in its
            image, or of a token in its text.
        unconditional: Rows of guidance before the sequence itself, ending in the same blanks (``guidance.py``): the
            sequence without its text, or with a negative one; or that without its source and text, then without its
            text. Required if ``sampling.guidance``, or of the latter ``sampling.image_guidance``, is not 1.
    """

    sequence: TokenSequence
    seed: int
    sampling: Sampling
    image: int = 0
    noise_positions: NDArray[np.int64] | None = None
    unconditional: tuple[TokenSequence, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DecodingProgress:
    """Progress of ``decode``, passed to its callback.

    Attributes:
        done: Number of decoded columns.
        total: Number of columns that hold blanks.
        sequences: Function that returns the ids (T,) of every request so far, ``[PAD]`` where a blank is not decoded.
            It copies from the device, so call it only if the ids are needed.
    """

    done: int
    total: int
    sequences: Callable[[], list[NDArray[np.int64]]]


class DecodingStopped(Exception):
    """Raised by ``decode`` when the callback returns False."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodingResult:
    """A decoded sequence.

    Attributes:
        ids: Ids (T,) int64 of the whole sequence; ``[PAD]`` after the stop token of a text.
        log_probability: Sum of the log probabilities of the sampled ids among the candidates, in nats, before guidance,
            temperature and filters: by the last row of the request that is computed.
    """

    ids: NDArray[np.int64]
    log_probability: float


DecodingCallback: TypeAlias = Callable[[DecodingProgress], object]


def notify(callback: DecodingCallback, done: int, total: int, sequences: Callable[[], list[NDArray[np.int64]]]) -> None:
    """Call ``callback`` with the progress.

    Args:
        callback: The callback.
        done: Sampled blanks of the request that has the most blanks.
        total: All blanks of that request.
        sequences: Returns the ids of every request so far.

    Raises:
        DecodingStopped: The callback returned False.
    """
    if callback(DecodingProgress(done=done, total=total, sequences=sequences)) is False:
        raise DecodingStopped


def restore_tail(sequence: TokenSequence, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return all ids of ``sequence``, the first of them replaced by the decoded ``ids``.

    Args:
        sequence: The whole sequence.
        ids: Ids of its decoded beginning.
    """
    restored: NDArray[np.int64] = sequence.ids.copy()
    restored[: len(ids)] = ids
    return restored


def restore_blanks(sequence: TokenSequence, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return all ids of ``sequence`` with its blanks as they were decoded.

    Args:
        sequence: The whole sequence.
        ids: Ids of a row of a batch, whose last column is the last blank of ``sequence``.
    """
    end = len(sequence.until_last_blank())
    start = max(0, end - len(ids))
    restored: NDArray[np.int64] = sequence.ids.copy()
    restored[start:end] = np.where(sequence.blanks[start:end], ids[len(ids) - (end - start) :], restored[start:end])
    return restored
