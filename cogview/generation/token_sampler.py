"""How the blanks of a batch are drawn: which ids may stand there, by whose settings, with which noise."""

# B rows of a batch, J jobs, R some of them, T columns, D width of the model, V ids to choose from
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogview.device import float64_of
from cogview.generation.sampling import Sampling, draw, noise_keys
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.layouts import Arranged, Batch
from cogview.tokenizers.vocabulary import Kind, Vocabulary


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


class Easels:
    """How the blanks of a batch are drawn, column by column."""

    def __init__(
        self, transformer: Transformer, vocabulary: Vocabulary, jobs: Sequence[Job], batch: Batch, guided: Sequence[int]
    ) -> None:
        device = transformer.embedding.weight.device
        self.transformer, self.vocabulary, self.jobs, self.batch = transformer, vocabulary, jobs, batch
        seeds_J1 = torch.tensor([[job.seed] for job in jobs], device=device)
        images_J1 = torch.tensor([[job.image] for job in jobs], device=device)
        self.keys_JT = noise_keys(seeds_J1, images_J1, torch.from_numpy(_places(jobs, batch)).to(device))
        self.log_probability_J = torch.zeros(len(jobs), dtype=float64_of(device), device=device)
        self._partner_B = np.full(len(jobs), -1)
        self._partner_B[guided] = np.arange(len(jobs), len(jobs) + len(guided))
        self.owners = np.concatenate([np.arange(len(jobs)), np.array(guided, dtype=np.int64)])  # the job of each row
        self._known: dict[bytes, list[Easel]] = {}

    def at(self, column: int, open_J: np.ndarray) -> list[Easel]:
        """One for all rows whose ``column`` is to be drawn among the same ids in the same way."""
        kinds_J = self.batch.kinds[: len(self.jobs), column]
        look = open_J.tobytes() + kinds_J.tobytes()
        if look not in self._known:  # mostly it is that of the column before
            self._known[look] = self._grouped(open_J, kinds_J)
        return self._known[look]

    def of_pictures(self) -> list[Easel]:
        """Those of all rows, where all blanks are codes."""
        return self._grouped(np.ones(len(self.jobs), dtype=bool), np.full(len(self.jobs), Kind.IMAGE))

    def _grouped(self, open_J: np.ndarray, kinds_J: np.ndarray) -> list[Easel]:
        groups: dict[tuple[Kind, int | None, Sampling], list[int]] = {}
        for index in np.flatnonzero(open_J).tolist():
            kind = Kind(kinds_J[index])
            stop = self.jobs[index].row.stop if kind == Kind.TEXT else None
            groups.setdefault((kind, stop, self.jobs[index].sampling), []).append(index)
        return [self._easel(np.array(members), *key) for key, members in groups.items()]

    def _easel(self, members: np.ndarray, kind: Kind, stop: int | None, sampling: Sampling) -> Easel:
        permitted = permitted_ids(self.vocabulary, kind, stop)
        device = self.keys_JT.device
        partners = self._partner_B[members] if sampling.guidance != 1 else None
        return Easel(
            transformer=self.transformer,
            members=members,
            # All rows, in order, need no picking.
            rows_R=torch.from_numpy(members).to(device) if len(members) < len(self.batch.ids) else None,
            partners_R=None if partners is None else torch.from_numpy(partners).to(device),
            permitted=permitted,
            stop=stop,
            mask_V=commands_but(stop, permitted, self.vocabulary, device),
            sampling=sampling,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Easel:
    """Rows R of a batch that are drawn among the same ids in the same way."""

    transformer: Transformer
    members: np.ndarray  # of the batch
    rows_R: Tensor | None  # the same on the device; None for all
    partners_R: Tensor | None  # the unguided twin of each, where there is guidance
    permitted: range
    stop: int | None
    mask_V: Tensor | None
    sampling: Sampling

    def draw(self, hidden_BD: Tensor, keys_B: Tensor, log_probability_J: Tensor) -> Tensor:
        """The ids (R,) that follow; their log-probability is added to that of their rows."""
        rows_R = self.rows_R
        without_RD = None if self.partners_R is None else hidden_BD[self.partners_R]
        ids_R, log_p_R = self.choose(
            hidden_BD if rows_R is None else hidden_BD[rows_R], keys_B if rows_R is None else keys_B[rows_R], without_RD
        )
        if rows_R is None:
            log_probability_J += log_p_R
        else:
            log_probability_J.index_add_(0, rows_R, log_p_R.to(log_probability_J.dtype))
        return ids_R

    def choose(self, hidden_RD: Tensor, keys_R: Tensor, without_RD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ids (R,) that follow and their log-probabilities; ``without_RD`` are the hidden states without text."""
        logits_RV = wanted_RV = logits_of(self.transformer, hidden_RD, self.permitted, self.mask_V)
        if without_RD is not None:
            without_RV = logits_of(self.transformer, without_RD, self.permitted, self.mask_V)
            wanted_RV = without_RV + self.sampling.guidance * (logits_RV - without_RV)
            if self.mask_V is not None:
                wanted_RV = wanted_RV.masked_fill(self.mask_V, -torch.inf)
        chosen_R = draw(wanted_RV, keys_R, self.permitted, self.sampling)
        return chosen_R + self.permitted.start, log_probability_of(logits_RV, chosen_R)

    def write(self, ids_BT: Tensor, column: int, ids_R: Tensor) -> None:
        """Put drawn ids where they belong."""
        if self.rows_R is None:
            ids_BT[:, column] = ids_R
        else:
            ids_BT[self.rows_R, column] = ids_R
        if self.partners_R is not None:
            ids_BT[self.partners_R, column] = ids_R


def show(watch: Callable[[Moment], object], done: int, total: int, rows: Callable[[], list[np.ndarray]]) -> None:
    """Call ``watch``; raises ``Stopped`` where it returns False."""
    if watch(Moment(done=done, total=total, rows=rows)) is False:
        raise Stopped


def permitted_ids(vocabulary: Vocabulary, kind: Kind, stop: int | None) -> range:
    """The ids that a blank may take; with a ``stop``, commands too, of which ``logits_of`` leaves the stop alone."""
    permitted = vocabulary.permitted(kind)
    return permitted if stop is None else range(permitted.start, vocabulary.size)


def commands_but(stop: int | None, permitted: range, vocabulary: Vocabulary, device: torch.device) -> Tensor | None:
    """(V,) bool: the commands among the permitted ids, without the one that ends a text; None where there are none."""
    if stop is None:
        return None
    ids_V = torch.arange(permitted.start, permitted.stop, device=device)
    return (ids_V >= vocabulary.commands.start) & (ids_V != stop)


def logits_of(transformer: Transformer, hidden_RD: Tensor, permitted: range, mask_V: Tensor | None) -> Tensor:
    """Float32 logits (R, V) of the permitted ids; -inf where the mask is."""
    logits_RV = transformer.head(hidden_RD, permitted)
    return logits_RV if mask_V is None else logits_RV.masked_fill(mask_V, -torch.inf)


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


def log_probability_of(logits_RV: Tensor, chosen_R: Tensor) -> Tensor:
    """log p (R,) of the chosen ids among all that were permitted."""
    return logits_RV.log_softmax(dim=-1).gather(1, chosen_R.unsqueeze(1)).squeeze(1)
