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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogview.cache import KVCache
from cogview.sampling import Sampling, draw, keyed_gumbel
from cogview.tokenizers.layouts import Arranged, Batch, pad_left, pad_right
from cogview.tokenizers.vocabulary import Kind, Vocabulary
from cogview.transformer import Transformer


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A row to fill. Its noise is keyed by ``seed``, ``image``, the number of the picture among those of a seed, and
    for each place of the row by its entry in ``places`` (T,) int64: by default which code of its image, or piece of
    its text, it is.

    ``unguided`` is the same row without what guides it, its text: needed where ``sampling`` asks for guidance. It ends
    as ``row`` does, with the same blanks.
    """

    row: Arranged
    seed: int
    sampling: Sampling
    image: int = 0
    places: np.ndarray | None = None
    unguided: Arranged | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Filled:
    """A row without blanks, but for ``[PAD]`` behind the stop of a text."""

    ids: np.ndarray  # (T,) int64, as long as the job's row
    log_probability: float  # of the drawn ids: the sum of their log p among permitted ids, before guidance or filters


@torch.inference_mode()
def fill(
    transformer: Transformer,
    vocabulary: Vocabulary,
    jobs: Sequence[Job],
    on_column: Callable[[int, int], None] | None = None,
) -> list[Filled]:
    """Draw every blank of every row; the result of a row does not depend on its neighbours.

    A text is over where its stop is drawn. ``on_column(done, total)`` is called after each column with blanks. All
    rows are held in memory at once.
    """
    device = transformer.embedding.weight.device
    guided = [index for index, job in enumerate(jobs) if job.sampling.guidance != 1]
    rows = [_cut(job.row) for job in jobs] + [_cut(_unguided(jobs[index])) for index in guided]
    batch = pad_left(rows, vocabulary.pad)
    tapes = _Tapes(transformer, batch, _text_bias(batch, [job.sampling.text_attention for job in jobs]))

    partner_B = np.full(len(jobs), -1)
    partner_B[guided] = np.arange(len(jobs), len(rows))
    places_BT = torch.from_numpy(_places(jobs, batch)).to(device)
    seeds_B = torch.tensor([job.seed for job in jobs], device=device)
    images_B = torch.tensor([job.image for job in jobs], device=device)
    log_probability_B = torch.zeros(len(jobs), dtype=torch.float64)

    open_BT = batch.blanks[: len(jobs)].copy()  # still to be drawn
    columns = np.flatnonzero(open_BT.any(axis=0))
    for done, column in enumerate(columns, start=1):
        if not open_BT[:, column:].any():  # every text is over
            break
        hidden_BD = tapes.read_until(int(column))
        for members, kind, stop, sampling in _groups(jobs, batch, open_BT[:, column], int(column)):
            rows_R = torch.from_numpy(members).to(device)
            permitted = _permitted(vocabulary, kind, stop)
            logits_RV = _logits(transformer, hidden_BD[rows_R], vocabulary, permitted, stop)
            wanted_RV = logits_RV
            if sampling.guidance != 1:
                partners_R = torch.from_numpy(partner_B[members]).to(device)
                without_RV = _logits(transformer, hidden_BD[partners_R], vocabulary, permitted, stop)
                wanted_RV = torch.where(
                    logits_RV.isinf(), logits_RV, without_RV + sampling.guidance * (logits_RV - without_RV)
                )
            noise_RV = keyed_gumbel(seeds_B[rows_R], images_B[rows_R], places_BT[rows_R, column], permitted)
            chosen_R = draw(wanted_RV, noise_RV, sampling)
            ids_R = chosen_R + permitted.start
            tapes.ids_BT[rows_R, column] = ids_R
            if sampling.guidance != 1:
                tapes.ids_BT[partners_R, column] = ids_R
            log_probability_B[members] += _log_probability(logits_RV, chosen_R)
            if stop is not None:
                over = members[(ids_R == stop).cpu().numpy()]
                open_BT[over] &= np.arange(open_BT.shape[1]) <= column
        if on_column is not None:
            on_column(done, len(columns))

    filled_BT = tapes.ids_BT.cpu().numpy()
    return [
        Filled(ids=_uncut(job.row, filled_BT[index, start:]), log_probability=float(log_probability_B[index]))
        for index, (job, start) in enumerate(zip(jobs, batch.starts, strict=False))
    ]


@torch.inference_mode()
def search(
    transformer: Transformer, vocabulary: Vocabulary, rows: Sequence[Arranged], beams: int
) -> list[list[Filled]]:
    """Beam search: for each row, whose blanks are the text at its end, the ``beams`` most probable texts found.

    The most probable comes first; probabilities are those of whole texts, stop included, without any reward for length.
    """
    if beams < 1:
        raise ValueError(f"a search needs at least one beam, got {beams}")
    device = transformer.embedding.weight.device
    cut = [_cut(row) for row in rows]
    batch = pad_left(cut, vocabulary.pad)
    columns = np.flatnonzero(batch.blanks.any(axis=0))
    if not len(columns) or not batch.blanks[:, columns].all() or (batch.kinds[:, columns] != Kind.TEXT).any():
        raise ValueError("a search needs rows whose blanks are texts of one length at their ends")
    stop = rows[0].stop
    if any(row.stop != stop for row in rows):
        raise ValueError("a search needs rows whose texts have the same stop")

    tapes = _Tapes(transformer, batch, None)
    permitted = _permitted(vocabulary, Kind.TEXT, stop)
    never = permitted.index(stop) if stop is not None else 0  # the choice of a text that is over
    total_BK = torch.full((len(rows), 1), 0.0, dtype=torch.float64, device=device)
    over_BK = torch.zeros((len(rows), 1), dtype=torch.bool, device=device)
    for column in columns:
        hidden_BD = tapes.read_until(int(column))
        log_p_BV = _logits(transformer, hidden_BD, vocabulary, permitted, stop).double().log_softmax(dim=-1)
        log_p_BKV = log_p_BV.view(*total_BK.shape, -1)
        log_p_BKV = log_p_BKV.masked_fill(over_BK.unsqueeze(-1), -torch.inf)
        log_p_BKV[..., never] = torch.where(over_BK, 0.0, log_p_BKV[..., never])
        scores_BN = (total_BK.unsqueeze(-1) + log_p_BKV).flatten(1)
        total_BK, choice_BK = scores_BN.topk(min(beams, scores_BN.shape[1]), dim=1)
        parent_BK = choice_BK // len(permitted)
        ids_BK = choice_BK % len(permitted) + permitted.start
        was_over_BK = over_BK.gather(1, parent_BK)
        first_B1 = torch.arange(len(rows), device=device).unsqueeze(1) * over_BK.shape[1]
        tapes.select((first_B1 + parent_BK).flatten())
        tapes.ids_BT[:, column] = ids_BK.masked_fill(was_over_BK, vocabulary.pad).flatten()
        over_BK = was_over_BK | (ids_BK == stop) if stop is not None else was_over_BK
        if over_BK.all():
            break

    found_BKT = tapes.ids_BT.view(*total_BK.shape, -1).cpu().numpy()
    return [
        [
            Filled(ids=_uncut(row, ids[start:]), log_probability=float(total))
            for ids, total in zip(found_KT, totals, strict=True)
            if total > -math.inf
        ]
        for row, start, found_KT, totals in zip(rows, batch.starts, found_BKT, total_BK.tolist(), strict=True)
    ]


@torch.inference_mode()
def score(
    transformer: Transformer, vocabulary: Vocabulary, rows: Sequence[Arranged], name: str = "text"
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
    log_p_N = _log_probability(transformer.head(before_ND, words), pieces_N)
    return [float(part.sum()) for part in log_p_N.split([span.stop - span.start for span in spans])]


class _Tapes:
    """The rows of a batch as they are read and written, column by column, with the keys and values of what was read."""

    def __init__(self, transformer: Transformer, batch: Batch, bias_BT: np.ndarray | None) -> None:
        embedding = transformer.embedding.weight
        self.transformer = transformer
        self.ids_BT = torch.from_numpy(batch.ids).to(embedding.device)
        self.positions_BT = torch.from_numpy(batch.positions).to(embedding.device)
        self.starts_B = torch.from_numpy(batch.starts).to(embedding.device) if batch.starts.any() else None
        self.bias_BT = None if bias_BT is None else torch.from_numpy(bias_BT).to(embedding.device)
        num_rows, num_columns = batch.ids.shape
        self.cache = KVCache(transformer.config, num_rows, num_columns, embedding.device, embedding.dtype)

    def read_until(self, column: int) -> Tensor:
        """Hidden states (B, D) from which column ``column`` is told: all columns before it have been read."""
        new = slice(self.cache.length, column)
        hidden_BTD = self.transformer.hidden(
            self.ids_BT[:, new],
            self.positions_BT[:, new],
            starts_B=self.starts_B,
            bias_BS=None if self.bias_BT is None else self.bias_BT[:, :column],
            cache=self.cache,
        )
        return hidden_BTD[:, -1]

    def select(self, rows: Tensor) -> None:
        """Row i becomes a copy of what row ``rows[i]`` was."""
        self.ids_BT, self.positions_BT = self.ids_BT[rows], self.positions_BT[rows]
        self.starts_B = None if self.starts_B is None else self.starts_B[rows]
        self.bias_BT = None if self.bias_BT is None else self.bias_BT[rows]
        self.cache.select(rows)


def _cut(row: Arranged) -> Arranged:
    """``row`` up to its last blank; its first place where it has none."""
    return row.cut(int(np.flatnonzero(row.blanks)[-1]) + 1 if row.blanks.any() else 1)


def _uncut(row: Arranged, ids: np.ndarray) -> np.ndarray:
    """All ids of ``row``, those of its cut part filled."""
    whole = row.ids.copy()
    whole[: len(ids)] = ids
    return whole


def _unguided(job: Job) -> Arranged:
    if job.unguided is None:
        raise ValueError("guidance needs the row without its text as well")
    ends = [_cut(row).blanks[::-1] for row in (job.row, job.unguided)]
    shorter = min(map(len, ends))
    if not np.array_equal(ends[0][:shorter], ends[1][:shorter]) or any(end[shorter:].any() for end in ends):
        raise ValueError("a row and its unguided twin must end in the same blanks")
    return job.unguided


def _groups(
    jobs: Sequence[Job], batch: Batch, open_B: np.ndarray, column: int
) -> list[tuple[np.ndarray, Kind, int | None, Sampling]]:
    """Rows whose ``column`` is to be drawn, together where the same ids are permitted and drawn in the same way."""
    groups: dict[tuple[Kind, int | None, Sampling], list[int]] = {}
    for index in np.flatnonzero(open_B).tolist():
        kind = Kind(batch.kinds[index, column])
        stop = jobs[index].row.stop if kind == Kind.TEXT else None
        groups.setdefault((kind, stop, jobs[index].sampling), []).append(index)
    return [(np.array(members), *key) for key, members in groups.items()]


def _permitted(vocabulary: Vocabulary, kind: Kind, stop: int | None) -> range:
    """The ids that a blank may take; with a ``stop``, commands too, of which ``_logits`` leaves the stop alone."""
    permitted = vocabulary.permitted(kind)
    return permitted if stop is None else range(permitted.start, vocabulary.size)


def _logits(
    transformer: Transformer, hidden_RD: Tensor, vocabulary: Vocabulary, permitted: range, stop: int | None
) -> Tensor:
    """Float32 logits (R, V) of the permitted ids; -inf for the commands that are not ``stop``."""
    logits_RV = transformer.head(hidden_RD, permitted)
    if stop is not None:
        ids_V = torch.arange(permitted.start, permitted.stop, device=logits_RV.device)
        logits_RV = logits_RV.masked_fill((ids_V >= vocabulary.commands.start) & (ids_V != stop), -torch.inf)
    return logits_RV


def _text_bias(batch: Batch, weights: Sequence[float]) -> np.ndarray | None:
    """(B, T) float32: log w at the given text of the first rows, which have ``weights``; None where all are 1."""
    if all(weight == 1 for weight in weights):
        return None
    bias_BT = np.zeros(batch.ids.shape, dtype=np.float32)
    for index, weight in enumerate(weights):
        bias_BT[index, (batch.kinds[index] == Kind.TEXT) & ~batch.blanks[index]] = math.log(weight)
    return bias_BT


def _places(jobs: Sequence[Job], batch: Batch) -> np.ndarray:
    """(B, T) int64: the key of each column's noise, which padding cannot change."""
    places_BT = np.zeros((len(jobs), batch.ids.shape[1]), dtype=np.int64)
    for index, job in enumerate(jobs):
        start = int(batch.starts[index])
        own = np.zeros(len(job.row), dtype=np.int64) if job.places is None else job.places
        if job.places is None:
            for span in job.row.spans.values():
                own[span] = np.arange(span.stop - span.start)
        places_BT[index, start:] = own[: places_BT.shape[1] - start]
    return places_BT


def _log_probability(logits_RV: Tensor, chosen_R: Tensor) -> Tensor:
    """log p of the chosen ids among all that were permitted, float64 on the CPU."""
    return logits_RV.log_softmax(dim=-1).gather(1, chosen_R.unsqueeze(1)).squeeze(1).double().cpu()
