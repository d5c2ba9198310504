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

from cogview.sampling import Sampling, draw, noise_keys
from cogview.tapes import Tapes, float64_of
from cogview.tokenizers.layouts import Arranged, Batch, pad_left, pad_right
from cogview.tokenizers.vocabulary import Kind, Vocabulary
from cogview.transformer import Transformer


# Guessing codes (``_draw_in_parallel``): the most columns of all rows together that a forward should read, the fewest
# of a row that it pays to read, and how many it begins with. How many of them hold, on average, says whether to read
# more of them or fewer; if of the first forwards each tells less than so many codes, guesses do not pay.
# (scripts/benchmarks/parallel.py)
PARALLEL_COLUMNS = {"cpu": 64, "cuda": 128, "mps": 1}
LEAST_WIDTH = 8
FIRST_WIDTH = 16
WIDEN, NARROW = 1 / 4, 1 / 8
TRIAL = 8
PAYS = 2.0


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


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where ``fill`` stands, for who watches it."""

    done: int  # of the blanks of the row that has most
    total: int
    rows: Callable[[], list[np.ndarray]]  # the ids of each job's row as they are now, [PAD] where nothing is drawn yet


class Stopped(Exception):
    """Who watched did not want to go on."""


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
    watch: Callable[[Moment], object] | None = None,
    *,
    int8_cache: bool = False,
    parallel: int | None = None,
) -> list[Filled]:
    """Draw every blank of every row; the result of a row does not depend on its neighbours.

    A text is over where its stop is drawn. ``watch`` is called as columns with blanks are done; where it returns False,
    ``Stopped`` is raised. All rows are held in memory at once; ``int8_cache`` rounds their keys and values.

    ``parallel`` is the most codes of a picture that are guessed and told at one go, 1 for none; by default what pays.
    The pictures are the same (``_draw_in_parallel``). Texts, and pictures with guidance, are drawn one by one.
    """
    guided = [index for index, job in enumerate(jobs) if job.sampling.guidance != 1]
    rows = [_cut(job.row) for job in jobs] + [_cut(_unguided(jobs[index])) for index in guided]
    batch = pad_left(rows, vocabulary.pad)
    text_weights = [job.sampling.text_attention for job in jobs]
    if parallel is None:
        parallel = parallel_columns(transformer, len(rows))
    if guided or not batch.blanks.any() or (batch.kinds[batch.blanks] != Kind.IMAGE).any():
        parallel = 1
    bias_BT = _text_bias(batch, text_weights)
    tapes = Tapes(transformer, batch, bias_BT, int8=int8_cache, may_share=parallel == 1)
    easels = _Easels(transformer, vocabulary, jobs, batch, guided)
    if parallel > 1:
        _draw_in_parallel(tapes, easels, jobs, batch, parallel, watch)
    else:
        _draw_one_by_one(tapes, easels, jobs, batch, watch)
    parts = zip(jobs, _ids_of(jobs, batch, tapes.ids_BT), easels.log_probability_B.tolist(), strict=True)
    return [Filled(ids=_uncut(job.row, ids), log_probability=log_probability) for job, ids, log_probability in parts]


def _draw_one_by_one(
    tapes: Tapes, easels: _Easels, jobs: Sequence[Job], batch: Batch, watch: Callable[[Moment], object] | None
) -> None:
    """Read a column, tell the next."""
    open_BT = batch.blanks[: len(jobs)].copy()  # still to be drawn
    columns = np.flatnonzero(open_BT.any(axis=0))
    texts = any(job.row.stop is not None for job in jobs)
    for done, column in enumerate(columns.tolist(), start=1):
        if texts and not open_BT[:, column:].any():  # every text is over
            break
        hidden_BD = tapes.read_until(column)
        for easel in easels.at(column, open_BT[:, column]):
            ids_R = easel.draw(hidden_BD, easels.keys_BT[:, column], easels.log_probability_B)
            easel.write(tapes.ids_BT, column, ids_R)
            if easel.stop is not None:
                over = easel.members[(ids_R == easel.stop).cpu().numpy()]
                open_BT[over] &= np.arange(open_BT.shape[1]) <= column
        if watch is not None:

            def rows() -> list[np.ndarray]:
                return [_uncut(job.row, ids) for job, ids in zip(jobs, _ids_of(jobs, batch, tapes.ids_BT), strict=True)]

            _show(watch, done, len(columns), rows)


def parallel_columns(transformer: Transformer, num_rows: int) -> int:
    """How many codes it may pay to guess at one go for so many rows; 1 for none.

    Where a forward of many columns takes hardly longer than one of a single: on a GPU, and on a CPU whose weights are
    packed.
    """
    device = transformer.embedding.weight.device
    if device.type == "cpu" and transformer.packed_heads is None:
        return 1
    width = PARALLEL_COLUMNS[device.type] // num_rows
    return width if width >= LEAST_WIDTH else 1


def _draw_in_parallel(
    tapes: Tapes,
    easels: _Easels,
    jobs: Sequence[Job],
    batch: Batch,
    most: int,
    watch: Callable[[Moment], object] | None,
) -> None:
    """Tell up to ``most`` codes of each row at one go, from guesses of those before them.

    Noise is keyed, so the next code is a function of the codes before it. Where a guess is what is told in its place,
    what was told behind it is right as well: all codes up to the first wrong guess are kept, and what is told in its
    place. What is told behind it is the next guess (Jacobi iteration; with the noise kept, "Gumbel coupling",
    arXiv:2510.24211). The first guess for a place is the last code that was told: better ones hardly save a forward.
    Where few guesses hold, the rest is drawn one by one.
    """
    device = tapes.ids_BT.device
    first, end = int(batch.blanks.any(axis=0).argmax()), batch.ids.shape[1]
    open_BT = torch.from_numpy(batch.blanks).to(device)
    next_B = np.full(len(jobs), first)  # the column of each row before which all is known
    told_BT = torch.full((len(jobs), 1), first, device=device)  # the columns that hidden states tell
    hidden_BTD = tapes.read_until(first).unsqueeze(1)
    forwards, width, held = 0, min(FIRST_WIDTH, most), 0.0

    def rows() -> list[np.ndarray]:
        ids_BT = np.where(np.arange(end) < next_B[:, None], tapes.ids_BT.cpu().numpy(), batch.ids)
        return [_uncut(job.row, ids[start:]) for job, ids, start in zip(jobs, ids_BT, batch.starts, strict=True)]

    while True:
        guesses_BT, ids_BT = tapes.ids_BT.gather(1, told_BT), torch.empty_like(told_BT)
        log_p_BT = torch.empty(told_BT.shape, device=device)
        keys_BT = easels.keys_BT.gather(1, told_BT)
        for easel in easels.at(first, np.ones(len(jobs), dtype=bool)):
            rows_R = slice(None) if easel.rows_R is None else easel.rows_R
            ids_N, log_p_N = easel.choose(hidden_BTD[rows_R].flatten(0, 1), keys_BT[rows_R].flatten())
            ids_BT[rows_R], log_p_BT[rows_R] = ids_N.view(-1, told_BT.shape[1]), log_p_N.view(-1, told_BT.shape[1])
        is_new_BT = told_BT >= torch.from_numpy(next_B).to(device).unsqueeze(1)
        drawn_BT = is_new_BT & open_BT.gather(1, told_BT)
        ids_BT = torch.where(drawn_BT, ids_BT, guesses_BT)
        tapes.ids_BT.scatter_(1, told_BT, ids_BT)
        # Right is what is told up to the first wrong guess, and in its place.
        wrong_BT = ids_BT != guesses_BT
        right_BT = is_new_BT & (wrong_BT.cumsum(dim=1) - wrong_BT.long() == 0)
        easels.log_probability_B += torch.where(right_BT & drawn_BT, log_p_BT, 0.0).sum(dim=1)
        count_B = right_BT.sum(dim=1).cpu().numpy()  # the one wait for the device
        next_B = next_B + count_B
        forwards += 1
        if watch is not None:
            _show(watch, int(next_B.min()) - first, end - first, rows)
        if (next_B == end).all():
            return
        if width > 1 and forwards > 1:
            count = count_B[count_B > 0].mean()  # rows that are done count no more
            held = count if forwards == 2 else (held + count) / 2
            width = min(2 * width, most) if held > WIDEN * width else width
            width = max(width // 2, min(LEAST_WIDTH, most)) if held < NARROW * width else width
            if forwards == TRIAL and (next_B - first).mean() < PAYS * forwards:
                width = 1
        width = min(width, end - first)
        start_B = np.minimum(next_B - 1, end - 1 - width)
        last_B1 = told_BT[:, -1:]
        read_BT = torch.from_numpy(start_B).to(device).unsqueeze(1) + torch.arange(width, device=device)
        never_told_BT = (read_BT > last_B1) & open_BT.gather(1, read_BT)
        ids_BT = torch.where(never_told_BT, tapes.ids_BT.gather(1, last_B1), tapes.ids_BT.gather(1, read_BT))
        tapes.ids_BT.scatter_(1, read_BT, ids_BT)
        hidden_BTD = tapes.read(read_BT, together=bool((start_B == start_B[0]).all()))
        told_BT = read_BT + 1


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
    batch = pad_left([_cut(row) for row in rows for _ in range(beams)], vocabulary.pad)
    columns = np.flatnonzero(batch.blanks.any(axis=0))
    if not len(columns) or not batch.blanks[:, columns].all() or (batch.kinds[:, columns] != Kind.TEXT).any():
        raise ValueError("a search needs rows whose blanks are texts of one length at their ends")
    stop = rows[0].stop
    if any(row.stop != stop for row in rows):
        raise ValueError("a search needs rows whose texts have the same stop")

    tapes = Tapes(transformer, batch, None)
    permitted = _permitted(vocabulary, Kind.TEXT, stop)
    mask_V = _commands_but(stop, permitted, vocabulary, device)
    never = permitted.index(stop) if stop is not None else 0  # the choice of a text that is over
    # All beams of a row are alike at first, and all but one are out of the race.
    total_BK = torch.full((len(rows), beams), -torch.inf, dtype=float64_of(device), device=device)
    total_BK[:, 0] = 0
    over_BK = torch.zeros((len(rows), beams), dtype=torch.bool, device=device)
    first_B1 = beams * torch.arange(len(rows), device=device).unsqueeze(1)
    for column in columns.tolist():
        logits_NV = _logits(transformer, tapes.read_until(column), permitted, mask_V)
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
            Filled(ids=_uncut(row, ids[start:]), log_probability=float(total))
            for ids, total in zip(found_KT, totals, strict=True)
            if total > -math.inf
        ]
        for row, start, found_KT, totals in zip(rows, starts, found_BKT, total_BK.tolist(), strict=True)
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
    log_p_N = _log_probability(transformer.head(before_ND, words), pieces_N).double().cpu()
    return [float(part.sum()) for part in log_p_N.split([span.stop - span.start for span in spans])]


class _Easels:
    """How the blanks of a batch are drawn, column by column."""

    def __init__(
        self, transformer: Transformer, vocabulary: Vocabulary, jobs: Sequence[Job], batch: Batch, guided: Sequence[int]
    ) -> None:
        device = transformer.embedding.weight.device
        self.transformer, self.vocabulary, self.jobs, self.batch = transformer, vocabulary, jobs, batch
        seeds_B1 = torch.tensor([[job.seed] for job in jobs], device=device)
        images_B1 = torch.tensor([[job.image] for job in jobs], device=device)
        self.keys_BT = noise_keys(seeds_B1, images_B1, torch.from_numpy(_places(jobs, batch)).to(device))
        self.log_probability_B = torch.zeros(len(jobs), dtype=float64_of(device), device=device)
        self._partner_B = np.full(len(jobs), -1)
        self._partner_B[guided] = np.arange(len(jobs), len(jobs) + len(guided))
        self._known: dict[bytes, list[_Easel]] = {}

    def at(self, column: int, open_B: np.ndarray) -> list[_Easel]:
        """One for all rows whose ``column`` is to be drawn among the same ids in the same way."""
        kinds_B = self.batch.kinds[: len(self.jobs), column]
        look = open_B.tobytes() + kinds_B.tobytes()
        if look not in self._known:  # mostly it is that of the column before
            groups: dict[tuple[Kind, int | None, Sampling], list[int]] = {}
            for index in np.flatnonzero(open_B).tolist():
                kind = Kind(kinds_B[index])
                stop = self.jobs[index].row.stop if kind == Kind.TEXT else None
                groups.setdefault((kind, stop, self.jobs[index].sampling), []).append(index)
            self._known[look] = [self._easel(np.array(members), *key) for key, members in groups.items()]
        return self._known[look]

    def _easel(self, members: np.ndarray, kind: Kind, stop: int | None, sampling: Sampling) -> _Easel:
        permitted = _permitted(self.vocabulary, kind, stop)
        device = self.keys_BT.device
        partners = self._partner_B[members] if sampling.guidance != 1 else None
        return _Easel(
            transformer=self.transformer,
            members=members,
            # All rows, in order, need no picking.
            rows_R=torch.from_numpy(members).to(device) if len(members) < len(self.batch.ids) else None,
            partners_R=None if partners is None else torch.from_numpy(partners).to(device),
            permitted=permitted,
            stop=stop,
            mask_V=_commands_but(stop, permitted, self.vocabulary, device),
            sampling=sampling,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Easel:
    """Rows R of a batch that are drawn among the same ids in the same way."""

    transformer: Transformer
    members: np.ndarray  # of the batch
    rows_R: Tensor | None  # the same on the device; None for all
    partners_R: Tensor | None  # the unguided twin of each, where there is guidance
    permitted: range
    stop: int | None
    mask_V: Tensor | None
    sampling: Sampling

    def draw(self, hidden_BD: Tensor, keys_B: Tensor, log_probability_B: Tensor) -> Tensor:
        """The ids (R,) that follow; their log-probability is added to that of their rows."""
        rows_R = self.rows_R
        without_RD = None if self.partners_R is None else hidden_BD[self.partners_R]
        ids_R, log_p_R = self.choose(
            hidden_BD if rows_R is None else hidden_BD[rows_R], keys_B if rows_R is None else keys_B[rows_R], without_RD
        )
        if rows_R is None:
            log_probability_B += log_p_R
        else:
            log_probability_B.index_add_(0, rows_R, log_p_R.to(log_probability_B.dtype))
        return ids_R

    def choose(self, hidden_RD: Tensor, keys_R: Tensor, without_RD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ids (R,) that follow and their log-probabilities; ``without_RD`` are the hidden states without text."""
        logits_RV = wanted_RV = _logits(self.transformer, hidden_RD, self.permitted, self.mask_V)
        if without_RD is not None:
            without_RV = _logits(self.transformer, without_RD, self.permitted, self.mask_V)
            wanted_RV = without_RV + self.sampling.guidance * (logits_RV - without_RV)
            if self.mask_V is not None:
                wanted_RV = wanted_RV.masked_fill(self.mask_V, -torch.inf)
        chosen_R = draw(wanted_RV, keys_R, self.permitted, self.sampling)
        return chosen_R + self.permitted.start, _log_probability(logits_RV, chosen_R)

    def write(self, ids_BT: Tensor, column: int, ids_R: Tensor) -> None:
        """Put drawn ids where they belong."""
        if self.rows_R is None:
            ids_BT[:, column] = ids_R
        else:
            ids_BT[self.rows_R, column] = ids_R
        if self.partners_R is not None:
            ids_BT[self.partners_R, column] = ids_R


def _show(watch: Callable[[Moment], object], done: int, total: int, rows: Callable[[], list[np.ndarray]]) -> None:
    if watch(Moment(done=done, total=total, rows=rows)) is False:
        raise Stopped


def _ids_of(jobs: Sequence[Job], batch: Batch, ids_BT: Tensor) -> list[np.ndarray]:
    """The ids of each job's row, without the padding before it."""
    return [ids[start:] for ids, start in zip(ids_BT[: len(jobs)].cpu().numpy(), batch.starts, strict=False)]


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


def _permitted(vocabulary: Vocabulary, kind: Kind, stop: int | None) -> range:
    """The ids that a blank may take; with a ``stop``, commands too, of which ``_logits`` leaves the stop alone."""
    permitted = vocabulary.permitted(kind)
    return permitted if stop is None else range(permitted.start, vocabulary.size)


def _commands_but(stop: int | None, permitted: range, vocabulary: Vocabulary, device: torch.device) -> Tensor | None:
    """(V,) bool: the commands among the permitted ids, without the one that ends a text; None where there are none."""
    if stop is None:
        return None
    ids_V = torch.arange(permitted.start, permitted.stop, device=device)
    return (ids_V >= vocabulary.commands.start) & (ids_V != stop)


def _logits(transformer: Transformer, hidden_RD: Tensor, permitted: range, mask_V: Tensor | None) -> Tensor:
    """Float32 logits (R, V) of the permitted ids; -inf where the mask is."""
    logits_RV = transformer.head(hidden_RD, permitted)
    return logits_RV if mask_V is None else logits_RV.masked_fill(mask_V, -torch.inf)


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
    """log p (R,) of the chosen ids among all that were permitted."""
    return logits_RV.log_softmax(dim=-1).gather(1, chosen_R.unsqueeze(1)).squeeze(1)
