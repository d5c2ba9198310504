"""Classifier-free guidance: the rows of a request and the scales that combine their logits.

A guided request is a chain of rows r_0 to r_k, of which the last is its sequence and the others leave out parts of it.
The logits are r_0 + s_1 (r_1 - r_0) + … + s_k (r_k - r_{k-1}). A single scale is that of a text (arXiv:2207.12598), two
are those of a source image and of an instruction (arXiv:2211.09800).
"""

# J requests, B rows of a batch, T tokens of a sequence
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogview.generation.requests import DecodingRequest
from cogview.modeling.config import GUIDANCE_SETTINGS, Sampling
from cogview.tokenizers.layouts import TokenSequence


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """Rows that a batch computes: the last row of each request, then the other rows of each.

    Attributes:
        sequences: Sequences of the B rows; the first J are the last rows of the requests.
        text_attention: Weight of the attention to the text of each row. It is that of the request in the row of its
            sequence, and 1 in all others.
        request_of_row: Index of the request of each row.
        chains: For each request, the indices of its rows r_0 to r_{k-1}.
        scales: For each request, the scales s_1 to s_k.
    """

    sequences: list[TokenSequence]
    text_attention: list[float]
    request_of_row: list[int]
    chains: list[list[int]]
    scales: list[tuple[float, ...]]


def arrange_rows(requests: Sequence[DecodingRequest]) -> BatchRows:
    """Return the rows of a batch, without those that the scales of their requests leave out.

    Args:
        requests: The requests.

    Raises:
        ValueError: The unconditional sequences of a request are missing, too many, or end in other blanks.
    """
    kept = [_necessary_sequences(request) for request in requests]
    sequences = [chain[-1] for chain, _ in kept]
    attention = [
        request.sampling.text_attention if sequence is request.sequence else 1.0
        for request, sequence in zip(requests, sequences, strict=True)
    ]
    request_of_row, chains = list(range(len(requests))), []
    for index, (chain, _) in enumerate(kept):
        chains.append(list(range(len(sequences), len(sequences) + len(chain) - 1)))
        sequences += chain[:-1]
        request_of_row += [index] * (len(chain) - 1)
    attention += [1.0] * (len(sequences) - len(requests))
    return BatchRows(
        sequences=sequences,
        text_attention=attention,
        request_of_row=request_of_row,
        chains=chains,
        scales=[scales for _, scales in kept],
    )


def necessary_rows(scales: Sequence[float]) -> tuple[list[int], tuple[float, ...]]:
    """Return the rows of a chain that its logits depend on, and the scales between them.

    Examples:
        >>> necessary_rows([2.0, 5.0])
        ([0, 1, 2], (2.0, 5.0))
        >>> necessary_rows([1.0, 5.0])  # r_0 + (r_1 - r_0) is r_1
        ([1, 2], (5.0,))
        >>> necessary_rows([3.0, 3.0])  # r_1 is added and subtracted
        ([0, 2], (3.0,))
        >>> necessary_rows([1.0, 0.0])
        ([1], ())

    Args:
        scales: Scales s_1 to s_k.

    Returns:
        Indices of the rows, at least one, and their scales, of which there is one fewer.
    """
    rows, kept = list(range(len(scales) + 1)), list(scales)
    while kept and kept[-1] == 0:
        del rows[-1], kept[-1]
    for index in reversed(range(1, len(kept))):
        if kept[index - 1] == kept[index]:
            del rows[index], kept[index]
    if kept and kept[0] == 1:
        del rows[0], kept[0]
    return rows, tuple(kept)


def _necessary_sequences(request: DecodingRequest) -> tuple[list[TokenSequence], tuple[float, ...]]:
    """Return the sequences of the rows of a request that are computed, and the scales between them."""
    names = GUIDANCE_SETTINGS[len(GUIDANCE_SETTINGS) - len(request.unconditional) :]
    _check_settings(request.sampling, names, len(request.unconditional))
    rows, scales = necessary_rows([getattr(request.sampling, name) for name in names])
    chain = [*request.unconditional, request.sequence]
    sequences = [chain[row] for row in rows]
    for sequence in sequences:
        if not _same_blanks(request.sequence, sequence):
            raise ValueError("a sequence and its unconditional sequences must end in the same blanks")
    return sequences, scales


def _check_settings(sampling: Sampling, names: Sequence[str], count: int) -> None:
    """Raise ValueError unless each scale has an unconditional sequence."""
    if count > len(GUIDANCE_SETTINGS):
        raise ValueError(f"a request has at most two unconditional sequences, got {count}")
    if "guidance" not in names and sampling.guidance != 1:
        raise ValueError("guidance needs the sequence without its text as well: set DecodingRequest.unconditional")
    if "image_guidance" not in names and sampling.image_guidance != 1:
        raise ValueError(
            "image_guidance needs the sequences without its text and with neither source nor text: set "
            "DecodingRequest.unconditional to both"
        )


def _same_blanks(sequence: TokenSequence, other: TokenSequence) -> bool:
    """Return whether two sequences, cut after their last blanks, end in the same blanks and have no others."""
    if other is sequence:
        return True
    blanks = [one.until_last_blank().blanks[::-1] for one in (sequence, other)]
    shorter = min(map(len, blanks))
    same = np.array_equal(blanks[0][:shorter], blanks[1][:shorter])
    return same and not any(each[shorter:].any() for each in blanks)
