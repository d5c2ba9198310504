"""Scoring: the log-probability of a given text or image, for ranking images and measuring models."""

# B sequences, T columns, D width of the model, N scored tokens of all sequences, M those of one sequence
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cogview.generation.sampling import log_probability_of
from cogview.kernels.window_mask import WindowMask
from cogview.modeling.pivots import fixed_pivots
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import pad_right
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.tasks import TASKS, ImageElement
from cogview.tokenizers.vocabulary import Vocabulary


def scored_ids(vocabulary: Vocabulary, task: str, name: str) -> range:
    """Return the ids among which the tokens of a span are scored.

    Codes compete with codes. Text tokens compete with each other and with special tokens, but not with image codes, as
    in the released code of CogView v1 (``inverse_prompt_score`` in
    https://github.com/THUDM/CogView/blob/169a0234990d4507ab5ec8e70b15831d8d5b3dd3/generation/sampling.py).

    Args:
        vocabulary: Vocabulary of the ids.
        task: Task whose layout has the span.
        name: Name of the text or image.
    """
    if isinstance(TASKS[task].contents[name], ImageElement):
        return vocabulary.image
    return range(vocabulary.text.start, vocabulary.padded_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringRequest:
    """Tokens of one sequence to score.

    Attributes:
        sequence: The sequence, without blanks.
        indices: Indices (M,) of the scored tokens; the first token of a sequence has no score.
        masked: Whether the input has [MASK] in place of every scored token.
    """

    sequence: TokenSequence
    indices: NDArray[np.int64]
    masked: bool = False

    @classmethod
    def of_span(cls, sequence: TokenSequence, name: str, *, masked: bool = False) -> ScoringRequest:
        """Return a request for all tokens of a text or image of ``sequence``."""
        return cls(sequence=sequence, indices=np.arange(len(sequence))[sequence.spans[name]], masked=masked)


def score(
    transformer: Transformer, vocabulary: Vocabulary, sequences: Sequence[TokenSequence], name: str = "text"
) -> list[float]:
    """Return log p(text | everything before it) of each sequence, in nats, at temperature 1.

    Args:
        transformer: Model that computes the logits.
        vocabulary: Vocabulary of the ids.
        sequences: Sequences without blanks.
        name: Span of the text in each sequence.

    Returns:
        One sum over the tokens of the text per sequence.
    """
    requests = [ScoringRequest.of_span(sequence, name) for sequence in sequences]
    candidates = range(vocabulary.text.start, vocabulary.padded_size)
    return [float(part.sum()) for part in token_scores(transformer, vocabulary, requests, candidates)]


@torch.inference_mode()
def token_scores(
    transformer: Transformer, vocabulary: Vocabulary, requests: Sequence[ScoringRequest], candidates: range
) -> list[NDArray[np.float64]]:
    """Return log p(token | input before it) of some tokens of each sequence, in nats, at temperature 1.

    Args:
        transformer: Model that computes the logits.
        vocabulary: Vocabulary of the ids.
        requests: Sequences with their scored tokens.
        candidates: Ids that compete; all scored tokens are among them.

    Returns:
        float64 (M,) per request.
    """
    device = transformer.embedding.weight.device
    batch = pad_right([request.sequence for request in requests], vocabulary.pad)
    ids_BT = torch.from_numpy(batch.ids).to(device)
    inputs_BT = batch.ids.copy()
    for row, request in enumerate(requests):
        if request.masked:
            inputs_BT[row, request.indices] = vocabulary.command("[MASK]")
    positions_BT = torch.from_numpy(batch.positions).to(device)
    attention = transformer.config.attention
    pivots = fixed_pivots(attention, batch, device)
    mask = None if pivots is None else WindowMask.of_sequences(attention.window, pivots, batch.ids.shape[1])
    hidden_BTD = transformer.hidden(torch.from_numpy(inputs_BT).to(device), positions_BT, window=mask)
    # One product with the output embedding for all sequences: hidden states before each scored token.
    counts = [len(request.indices) for request in requests]
    rows_N = torch.from_numpy(np.repeat(np.arange(len(requests)), counts)).to(device)
    columns_N = torch.from_numpy(np.concatenate([request.indices for request in requests])).to(device)
    chosen_N = ids_BT[rows_N, columns_N] - candidates.start
    log_p_N = log_probability_of(transformer.head(hidden_BTD[rows_N, columns_N - 1], candidates), chosen_N)
    return [part.numpy() for part in torch.split(log_p_N.double().cpu(), counts)]
