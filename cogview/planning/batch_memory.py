"""Peak bytes of decoding, beam search and scoring for given sequences, weights excluded.

Unlike ``estimate_inference``, which assumes sequences of maximal length, these functions account for shared prefixes
and for the length of each sequence. ``BatchPlanner`` sizes batches with them.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cogview.generation.decoding_state import group_by_prefix, worth_sharing_prefix
from cogview.generation.guidance import arrange_rows
from cogview.generation.requests import DecodingRequest
from cogview.generation.scoring import ScoringRequest
from cogview.generation.token_sampler import candidate_ids
from cogview.modeling.config import TransformerConfig
from cogview.planning.model_memory import (
    ACTIVATION_BYTES,
    POSITION_BYTES,
    ForwardPass,
    forward_bytes,
    hidden_bytes,
    position_bytes,
    sampling_bytes,
    workspace_bytes,
)
from cogview.tokenizers.batching import pad_left
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary

BEAM_SEARCH_BYTES = 20  # of a candidate: its logit, and float64 log-probabilities of the id and of the beam with it
SCORING_BYTES = 8  # of a candidate: its logit and its log-probability


@dataclass(frozen=True, kw_only=True)
class DecodingPeaks:
    """Bytes of decoding a batch: those that stay, and the peaks of two moments."""

    constant: int  # the KV cache, the positions and the workspace of converted weights
    forward: int  # activations of the forward pass that takes the largest number of bytes
    hidden: int  # hidden states of the first forward pass, which are alive while its tokens are sampled


def decode_bytes(
    config: TransformerConfig,
    vocabulary: Vocabulary,
    requests: Sequence[DecodingRequest],
    *,
    dtype: str,
    device_type: str,
    int8_cache: bool = False,
    max_window: int | None = None,
) -> int:
    """Return the peak of the bytes that ``generation.decode.decode`` takes, without weights and their packed copies.

    Args:
        config: Shape of the transformer.
        vocabulary: The ids of the model.
        requests: The sequences of one batch.
        dtype: Weight format, a key of ``ACTIVATION_BYTES``.
        device_type: cpu, cuda or mps.
        int8_cache: Whether keys and values are int8.
        max_window: Maximum of the codes that speculative decoding drafts per forward pass; None without it. Texts are
            decoded without it.
    """
    rows = arrange_rows(requests)
    if any(request.sequence.blanks[request.sequence.kinds == TokenKind.TEXT].any() for request in requests):
        max_window = None
    peaks = _decoding_peaks(
        *(config, vocabulary, rows.sequences, rows.text_attention, dtype, device_type, int8_cache, max_window)
    )
    groups = Counter(
        (request.sampling, scales, len(candidate_ids(vocabulary, _last_blank_kind(request), request.sequence.stop)))
        for request, scales in zip(requests, rows.scales, strict=True)
    )
    sampling_peak = max(
        (max_window or 1) * count * sampling_bytes(sampling, num_ids, dtype, device_type, guidance_rows=len(scales))
        for (sampling, scales, num_ids), count in groups.items()
    )
    return peaks.constant + max(peaks.forward, peaks.hidden + sampling_peak)


def beam_search_bytes(
    config: TransformerConfig,
    vocabulary: Vocabulary,
    sequences: Sequence[TokenSequence],
    beams: int,
    *,
    dtype: str,
    device_type: str,
    int8_cache: bool = False,
) -> int:
    """Return the peak of the bytes that ``generation.decode.beam_search`` takes, without weights and packed copies.

    Args:
        config: Shape of the transformer.
        vocabulary: The ids of the model.
        sequences: The sequences of one batch, one per image.
        beams: Beams of each sequence.
        dtype: Weight format, a key of ``ACTIVATION_BYTES``.
        device_type: cpu, cuda or mps.
        int8_cache: Whether keys and values are int8.
    """
    rows = [sequence for sequence in sequences for _ in range(beams)]
    peaks = _decoding_peaks(config, vocabulary, rows, [1.0] * len(rows), dtype, device_type, int8_cache, None)
    candidates = len(rows) * (vocabulary.size - vocabulary.text.start)
    return peaks.constant + max(peaks.forward, BEAM_SEARCH_BYTES * candidates)


def score_bytes(
    config: TransformerConfig,
    candidates: range,
    requests: Sequence[ScoringRequest],
    *,
    dtype: str,
    device_type: str,
) -> int:
    """Return the peak of the bytes that ``generation.scoring.token_scores`` takes, without weights and packed copies.

    Args:
        config: Shape of the transformer.
        candidates: Ids that compete.
        requests: The sequences of one batch, with their scored tokens.
        dtype: Weight format, a key of ``ACTIVATION_BYTES``.
        device_type: cpu, cuda or mps.
    """
    longest = max(len(request.sequence) for request in requests)
    num_rows, width = len(requests), config.width * hidden_bytes(dtype, device_type)
    forward_pass = ForwardPass(new_positions=longest, total_positions=longest, output_ids=0)
    tokens = sum(len(request.indices) for request in requests)
    forward = forward_bytes(config, dtype, device_type, forward_pass, rows=num_rows, padded=False)
    logits = SCORING_BYTES * tokens * len(candidates)
    # Hidden states of all positions, and of those that predict a scored token.
    scoring = (num_rows * longest + tokens) * width + logits
    positions = num_rows * longest * POSITION_BYTES
    return workspace_bytes(config, dtype, device_type) + positions + max(forward, scoring)


def _last_blank_kind(request: DecodingRequest) -> TokenKind:
    """Return the kind of the last token to decode."""
    return TokenKind(request.sequence.kinds[request.sequence.blanks][-1])


def _decoding_peaks(
    config: TransformerConfig,
    vocabulary: Vocabulary,
    sequences: Sequence[TokenSequence],
    attentions: Sequence[float],
    dtype: str,
    device_type: str,
    int8_cache: bool,
    max_window: int | None,
) -> DecodingPeaks:
    """Return the peaks of decoding; ``attentions`` are the weights of the attention to the text."""
    batch = pad_left([sequence.until_last_blank() for sequence in sequences], vocabulary.pad)
    num_rows, num_columns = batch.ids.shape
    prefix_length, prefix_rows = group_by_prefix(batch, attentions)
    num_prefixes = 1 + max(prefix_rows)
    shared = worth_sharing_prefix(batch, prefix_length, num_prefixes)
    prefixes = (num_prefixes, prefix_length) if shared else None
    peak_of = functools.partial(
        forward_bytes,
        config,
        dtype,
        device_type,
        padded=bool(batch.starts.any()) or any(weight != 1 for weight in attentions),
        int8_cache=int8_cache,
    )

    def forward_pass(new: int, total: int) -> ForwardPass:
        return ForwardPass(new_positions=new, total_positions=total, output_ids=0)

    peak = peak_of(forward_pass(prefix_length, prefix_length), rows=num_prefixes)
    size = ACTIVATION_BYTES[dtype]
    if num_prefixes < num_rows and not shared:  # keys and values are copied to every sequence, a layer at a time
        copied = 2 * num_rows * (1 if int8_cache else size)
        peak = max(peak, (num_prefixes * size + copied) * prefix_length * config.width)
    blank_columns = np.flatnonzero(batch.blanks.any(axis=0)).tolist()
    # Of the passes over equally many columns, the last has the largest peak.
    later = {column - previous: column for previous, column in itertools.pairwise(blank_columns)}
    if max_window is not None:
        later[min(max_window, num_columns - prefix_length)] = num_columns
    for new, total in later.items():
        peak = max(peak, peak_of(forward_pass(new, total), rows=num_rows, prefixes=prefixes))

    cached = num_rows * num_columns - shared * prefix_length * (num_rows - num_prefixes)
    cache = cached * position_bytes(config, dtype, int8_cache=int8_cache) + num_rows * num_columns * POSITION_BYTES
    return DecodingPeaks(
        constant=workspace_bytes(config, dtype, device_type) + cache,
        forward=peak,
        hidden=num_rows * prefix_length * config.width * hidden_bytes(dtype, device_type)
        if num_prefixes == num_rows
        else 0,
    )
