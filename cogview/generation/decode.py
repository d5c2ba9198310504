"""Rows in, tokens out: fills the blanks of arranged rows, whatever task they come from.

Rows of different lengths and tasks share a batch. Each is cut behind its last blank and padded on the left, so that
all end at the same column; the columns are then read from left to right, those that are given in every row at one go.
``fill`` draws one way to fill each row, ``search`` finds the most probable ways, and ``score`` says how probable
what stands in a row is.
"""

# B rows of a batch, R some of them, T columns, S columns so far, D width of the model, V ids to choose from, K beams
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from cogview.device import float64_of
from cogview.generation.decoding_state import DecodingState
from cogview.generation.speculative import decode_speculatively, max_window, uses_cuda_graphs
from cogview.generation.token_sampler import (
    DecodingProgress,
    DecodingRequest,
    DecodingResult,
    TokenSampler,
    candidate_ids,
    log_probability_of,
    logits_of,
    notify,
    special_token_mask,
)
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import SequenceBatch, pad_left, pad_right
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary


@torch.inference_mode()
def decode(
    transformer: Transformer,
    vocabulary: Vocabulary,
    requests: Sequence[DecodingRequest],
    callback: Callable[[DecodingProgress], object] | None = None,
    *,
    int8_cache: bool = False,
    speculative: int | None = None,
) -> list[DecodingResult]:
    """Draw every blank of every row; the result of a row does not depend on its neighbours.

    A text is over where its stop is drawn. ``watch`` is called as columns with blanks are done; where it returns False,
    ``Stopped`` is raised. All rows are held in memory at once; ``int8_cache`` rounds their keys and values.

    ``parallel`` is the most codes of a picture that are guessed and told at one go, 1 for none; by default what pays.
    The pictures are the same (``parallel.py``). Texts are written one piece after another.
    """
    guided = [index for index, job in enumerate(requests) if job.sampling.guidance != 1]
    rows = [job.sequence.until_last_blank() for job in requests] + [
        _unconditional_sequence(requests[index]).until_last_blank() for index in guided
    ]
    batch = pad_left(rows, vocabulary.pad)
    device = transformer.embedding.weight.device
    pictures = bool(batch.blanks.any()) and bool((batch.kinds[batch.blanks] == TokenKind.IMAGE).all())
    most = speculative or max_window(device, len(rows), packed=transformer.packed_layers is not None)
    in_windows = pictures and (most > 1 or uses_cuda_graphs(device))
    bias_BT = _text_bias(batch, [job.sampling.text_attention for job in requests])
    tapes = DecodingState(transformer, batch, bias_BT, int8=int8_cache, share_prefix=not in_windows)
    easels = TokenSampler(transformer, vocabulary, requests, batch, guided)

    def rows_so_far(next_J: np.ndarray) -> list[np.ndarray]:
        """The ids of each job's row, drawn up to the column ``next_J`` of the batch."""
        undrawn_JT = batch.blanks[: len(requests)] & (np.arange(batch.ids.shape[1]) >= next_J[:, None])
        ids_JT = np.where(undrawn_JT, vocabulary.pad, tapes.ids_BT[: len(requests)].cpu().numpy())
        return [
            _restore_tail(job.sequence, ids[start:])
            for job, ids, start in zip(requests, ids_JT, batch.starts, strict=False)
        ]

    if in_windows:
        decode_speculatively(tapes, easels, most, callback, rows_so_far)
    else:
        _decode_sequentially(tapes, easels, callback, rows_so_far)
    rows_filled = rows_so_far(np.full(len(requests), batch.ids.shape[1]))
    return [
        DecodingResult(ids=ids, log_probability=log_probability)
        for ids, log_probability in zip(rows_filled, easels.log_probability_J.tolist(), strict=True)
    ]


def _decode_sequentially(
    tapes: DecodingState,
    easels: TokenSampler,
    watch: Callable[[DecodingProgress], object] | None,
    rows_so_far: Callable[[np.ndarray], list[np.ndarray]],
) -> None:
    """Read a column, tell the next."""
    jobs = easels.requests
    open_BT = easels.batch.blanks[: len(jobs)].copy()  # still to be drawn
    columns = np.flatnonzero(open_BT.any(axis=0))
    texts = any(job.sequence.stop is not None for job in jobs)
    for done, column in enumerate(columns.tolist(), start=1):
        if texts and not open_BT[:, column:].any():  # every text is over
            break
        hidden_BD = tapes.forward_to(column)
        for easel in easels.groups_at(column, open_BT[:, column]):
            ids_R = easel.sample(hidden_BD, easels.keys_JT[:, column], easels.log_probability_J)
            easel.write_tokens(tapes.ids_BT, column, ids_R)
            if easel.stop is not None:
                over = easel.members[(ids_R == easel.stop).cpu().numpy()]
                open_BT[over] &= np.arange(open_BT.shape[1]) <= column
        if watch is not None:
            notify(watch, done, len(columns), partial(rows_so_far, np.full(len(jobs), column + 1)))


@torch.inference_mode()
def beam_search(
    transformer: Transformer, vocabulary: Vocabulary, rows: Sequence[TokenSequence], beams: int
) -> list[list[DecodingResult]]:
    """Beam search: for each row, whose blanks are the text at its end, the ``beams`` most probable texts found.

    The most probable comes first; probabilities are those of whole texts, stop included, without any reward for length.
    """
    if beams < 1:
        raise ValueError(f"a search needs at least one beam, got {beams}")
    device = transformer.embedding.weight.device
    batch = pad_left([row.until_last_blank() for row in rows for _ in range(beams)], vocabulary.pad)
    columns = np.flatnonzero(batch.blanks.any(axis=0))
    if not len(columns) or not batch.blanks[:, columns].all() or (batch.kinds[:, columns] != TokenKind.TEXT).any():
        raise ValueError("a search needs rows whose blanks are texts of one length at their ends")
    stop = rows[0].stop
    if any(row.stop != stop for row in rows):
        raise ValueError("a search needs rows whose texts have the same stop")

    tapes = DecodingState(transformer, batch, None)
    permitted = candidate_ids(vocabulary, TokenKind.TEXT, stop)
    mask_V = special_token_mask(stop, permitted, vocabulary, device)
    never = permitted.index(stop) if stop is not None else 0  # the choice of a text that is over
    # All beams of a row are alike at first, and all but one are out of the race.
    total_BK = torch.full((len(rows), beams), -torch.inf, dtype=float64_of(device), device=device)
    total_BK[:, 0] = 0
    over_BK = torch.zeros((len(rows), beams), dtype=torch.bool, device=device)
    first_B1 = beams * torch.arange(len(rows), device=device).unsqueeze(1)
    for column in columns.tolist():
        logits_NV = logits_of(transformer, tapes.forward_to(column), permitted, mask_V)
        log_p_BKV = logits_NV.to(total_BK.dtype).log_softmax(dim=-1).view(*total_BK.shape, -1)
        log_p_BKV = log_p_BKV.masked_fill(over_BK.unsqueeze(-1), -torch.inf)
        log_p_BKV[..., never] = torch.where(over_BK, 0.0, log_p_BKV[..., never])
        total_BK, choice_BK = (total_BK.unsqueeze(-1) + log_p_BKV).flatten(1).topk(beams, dim=1)
        parent_BK = choice_BK // len(permitted)
        ids_BK = choice_BK % len(permitted) + permitted.start
        was_over_BK = over_BK.gather(1, parent_BK)
        tapes.select((first_B1 + parent_BK).flatten())
        tapes.ids_BT[:, column] = ids_BK.masked_fill(was_over_BK, vocabulary.pad).flatten()
        over_BK = was_over_BK | (ids_BK == stop) if stop is not None else was_over_BK
        if over_BK.all():
            break

    found_BKT = tapes.ids_BT.view(*total_BK.shape, -1).cpu().numpy()
    starts = batch.starts[::beams]
    return [
        [
            DecodingResult(ids=_restore_tail(row, ids[start:]), log_probability=float(total))
            for ids, total in zip(found_KT, totals, strict=True)
            if total > -math.inf
        ]
        for row, start, found_KT, totals in zip(rows, starts, found_BKT, total_BK.tolist(), strict=True)
    ]


@torch.inference_mode()
def score(
    transformer: Transformer, vocabulary: Vocabulary, rows: Sequence[TokenSequence], name: str = "text"
) -> list[float]:
    """log p of the text ``name`` of each row given all that stands before it, in nats: the sum over its pieces.

    As in the release, pieces compete with each other and with commands, and not with image codes.
    """
    device = transformer.embedding.weight.device
    batch = pad_right(rows, vocabulary.pad)
    ids_BT = torch.from_numpy(batch.ids).to(device)
    hidden_BTD = transformer.hidden(ids_BT, torch.from_numpy(batch.positions).to(device))
    words = range(vocabulary.text.start, vocabulary.padded_size)
    spans = [row.spans[name] for row in rows]
    # One head for all texts: hidden states of the places before each piece, row after row.
    before_ND = torch.cat([hidden_BTD[b, span.start - 1 : span.stop - 1] for b, span in enumerate(spans)])
    pieces_N = torch.cat([ids_BT[b, span] for b, span in enumerate(spans)]) - words.start
    log_p_N = log_probability_of(transformer.head(before_ND, words), pieces_N).double().cpu()
    return [float(part.sum()) for part in log_p_N.split([span.stop - span.start for span in spans])]


def _restore_tail(row: TokenSequence, ids: np.ndarray) -> np.ndarray:
    """All ids of ``row``, those of its cut part filled."""
    whole = row.ids.copy()
    whole[: len(ids)] = ids
    return whole


def _unconditional_sequence(job: DecodingRequest) -> TokenSequence:
    if job.unconditional is None:
        raise ValueError("guidance needs the row without its text as well")
    ends = [row.until_last_blank().blanks[::-1] for row in (job.sequence, job.unconditional)]
    shorter = min(map(len, ends))
    if not np.array_equal(ends[0][:shorter], ends[1][:shorter]) or any(end[shorter:].any() for end in ends):
        raise ValueError("a row and its unguided twin must end in the same blanks")
    return job.unconditional


def _text_bias(batch: SequenceBatch, weights: Sequence[float]) -> np.ndarray | None:
    """(B, T) float32: log w at the given text of the first rows, which have ``weights``; None where all are 1."""
    if all(weight == 1 for weight in weights):
        return None
    bias_BT = np.zeros(batch.ids.shape, dtype=np.float32)
    for index, weight in enumerate(weights):
        bias_BT[index, (batch.kinds[index] == TokenKind.TEXT) & ~batch.blanks[index]] = math.log(weight)
    return bias_BT
