"""Beam search for the most probable texts, used by captions."""

# B sequences, K beams of each, N = B K rows, T columns, V candidate ids
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogview.device import float64_of
from cogview.generation.decoding_state import DecodingState
from cogview.generation.requests import DecodingResult, restore_tail
from cogview.generation.token_sampler import candidate_ids, logits_of, special_token_mask
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import SequenceBatch, pad_left
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary


@torch.inference_mode()
def beam_search(
    transformer: Transformer, vocabulary: Vocabulary, sequences: Sequence[TokenSequence], beams: int
) -> list[list[DecodingResult]]:
    """Return the most probable texts that a beam search finds for each sequence.

    The probability is that of the whole text, including its stop token, without length normalization.

    Args:
        transformer: Model that computes the logits.
        vocabulary: Vocabulary of the ids.
        sequences: Sequences that end in a text of blanks, all of one length and with the same stop token.
        beams: Number of hypotheses to keep, at least 1.

    Returns:
        For each sequence up to ``beams`` results, the most probable first.

    Raises:
        ValueError: ``beams`` is below 1, or the sequences do not end in such texts.
    """
    device = transformer.embedding.weight.device
    batch, columns = _batch_of_beams(sequences, beams, vocabulary)
    stop = sequences[0].stop
    state = DecodingState(transformer, batch, None)
    candidates = candidate_ids(vocabulary, TokenKind.TEXT, stop)
    mask_V = special_token_mask(stop, candidates, vocabulary, device)
    stop_index = candidates.index(stop) if stop is not None else 0  # continuation of a finished text, at log p 0
    # The beams of a sequence are equal at first: all but one are excluded.
    total_BK = torch.full((len(sequences), beams), -torch.inf, dtype=float64_of(device), device=device)
    total_BK[:, 0] = 0
    finished_BK = torch.zeros((len(sequences), beams), dtype=torch.bool, device=device)
    first_row_B1 = beams * torch.arange(len(sequences), device=device).unsqueeze(1)
    for column in columns:
        logits_NV = logits_of(transformer, state.forward_to(column), candidates, mask_V)
        log_p_BKV = logits_NV.to(total_BK.dtype).log_softmax(dim=-1).view(*total_BK.shape, -1)
        log_p_BKV = log_p_BKV.masked_fill(finished_BK.unsqueeze(-1), -torch.inf)
        log_p_BKV[..., stop_index] = torch.where(finished_BK, 0.0, log_p_BKV[..., stop_index])
        total_BK, choice_BK = (total_BK.unsqueeze(-1) + log_p_BKV).flatten(1).topk(beams, dim=1)
        parent_BK = choice_BK // len(candidates)
        ids_BK = choice_BK % len(candidates) + candidates.start
        parent_finished_BK = finished_BK.gather(1, parent_BK)
        state.select((first_row_B1 + parent_BK).flatten())
        state.ids_BT[:, column] = ids_BK.masked_fill(parent_finished_BK, vocabulary.pad).flatten()
        finished_BK = parent_finished_BK | (ids_BK == stop) if stop is not None else parent_finished_BK
        if finished_BK.all():
            break
    ids_BKT = state.ids_BT.view(*total_BK.shape, -1).cpu().numpy()
    return _results(sequences, batch.starts[::beams], ids_BKT, total_BK)


def _batch_of_beams(
    sequences: Sequence[TokenSequence], beams: int, vocabulary: Vocabulary
) -> tuple[SequenceBatch, list[int]]:
    """Return a batch with ``beams`` rows per sequence, and the columns of the texts; ValueError if they differ."""
    if beams < 1:
        raise ValueError(f"a beam search needs at least one beam, got {beams}")
    batch = pad_left([sequence.until_last_blank() for sequence in sequences for _ in range(beams)], vocabulary.pad)
    columns = np.flatnonzero(batch.blanks.any(axis=0))
    if not len(columns) or not batch.blanks[:, columns].all() or (batch.kinds[:, columns] != TokenKind.TEXT).any():
        raise ValueError("a beam search needs sequences that end in blank texts of one length")
    if any(sequence.stop != sequences[0].stop for sequence in sequences):
        raise ValueError("a beam search needs sequences whose texts have the same stop token")
    return batch, columns.tolist()


def _results(
    sequences: Sequence[TokenSequence], starts: NDArray[np.int64], ids_BKT: NDArray[np.int64], total_BK: Tensor
) -> list[list[DecodingResult]]:
    """Return the beams of each sequence that have a probability."""
    return [
        [
            DecodingResult(ids=restore_tail(sequence, ids[start:]), log_probability=float(total))
            for ids, total in zip(ids_KT, totals, strict=True)
            if total > -math.inf
        ]
        for sequence, start, ids_KT, totals in zip(sequences, starts, ids_BKT, total_BK.tolist(), strict=True)
    ]
