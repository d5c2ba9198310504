"""How the blanks of a batch are drawn: which ids may stand there, by whose settings, with which noise."""

# B rows of a batch, J jobs, R some of them, T columns, D width of the model, V ids to choose from
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogview.device import float64_of
from cogview.generation.sampling import noise_keys, sample
from cogview.modeling.config import Sampling
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import SequenceBatch
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodingRequest:
    """A row to fill. Its noise is keyed by ``seed``, ``image``, the number of the picture among those of a seed, and
    for each place of the row by its entry in ``places`` (T,) int64: by default which code of its image, or piece of
    its text, it is.

    ``unguided`` is the same row without what guides it, its text: needed where ``sampling`` asks for guidance. It ends
    as ``row`` does, with the same blanks.
    """

    sequence: TokenSequence
    seed: int
    sampling: Sampling
    image: int = 0
    noise_positions: np.ndarray | None = None
    unconditional: TokenSequence | None = None


@dataclass(frozen=True, kw_only=True)
class DecodingProgress:
    """Where ``fill`` stands, for who watches it."""

    done: int  # of the blanks of the row that has most
    total: int
    sequences: Callable[
        [], list[np.ndarray]
    ]  # the ids of each job's row as they are now, [PAD] where nothing is drawn yet


class DecodingStopped(Exception):
    """Who watched did not want to go on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodingResult:
    """A row without blanks, but for ``[PAD]`` behind the stop of a text."""

    ids: np.ndarray  # (T,) int64, as long as the job's row
    log_probability: float  # of the drawn ids: the sum of their log p among permitted ids, before guidance or filters


class TokenSampler:
    """How the blanks of a batch are drawn, column by column."""

    def __init__(
        self,
        transformer: Transformer,
        vocabulary: Vocabulary,
        jobs: Sequence[DecodingRequest],
        batch: SequenceBatch,
        guided: Sequence[int],
    ) -> None:
        device = transformer.embedding.weight.device
        self.transformer, self.vocabulary, self.requests, self.batch = transformer, vocabulary, jobs, batch
        seeds_J1 = torch.tensor([[job.seed] for job in jobs], device=device)
        images_J1 = torch.tensor([[job.image] for job in jobs], device=device)
        self.keys_JT = noise_keys(seeds_J1, images_J1, torch.from_numpy(_noise_positions(jobs, batch)).to(device))
        self.log_probability_J = torch.zeros(len(jobs), dtype=float64_of(device), device=device)
        self._unconditional_B = np.full(len(jobs), -1)
        self._unconditional_B[guided] = np.arange(len(jobs), len(jobs) + len(guided))
        self.request_of_row = np.concatenate(
            [np.arange(len(jobs)), np.array(guided, dtype=np.int64)]
        )  # the job of each row
        self._groups: dict[bytes, list[SamplingGroup]] = {}

    def groups_at(self, column: int, open_J: np.ndarray) -> list[SamplingGroup]:
        """One for all rows whose ``column`` is to be drawn among the same ids in the same way."""
        kinds_J = self.batch.kinds[: len(self.requests), column]
        look = open_J.tobytes() + kinds_J.tobytes()
        if look not in self._groups:  # mostly it is that of the column before
            self._groups[look] = self._grouped(open_J, kinds_J)
        return self._groups[look]

    def image_groups(self) -> list[SamplingGroup]:
        """Those of all rows, where all blanks are codes."""
        return self._grouped(np.ones(len(self.requests), dtype=bool), np.full(len(self.requests), TokenKind.IMAGE))

    def _grouped(self, open_J: np.ndarray, kinds_J: np.ndarray) -> list[SamplingGroup]:
        groups: dict[tuple[TokenKind, int | None, Sampling], list[int]] = {}
        for index in np.flatnonzero(open_J).tolist():
            kind = TokenKind(kinds_J[index])
            stop = self.requests[index].sequence.stop if kind == TokenKind.TEXT else None
            groups.setdefault((kind, stop, self.requests[index].sampling), []).append(index)
        return [self._group(np.array(members), *key) for key, members in groups.items()]

    def _group(self, members: np.ndarray, kind: TokenKind, stop: int | None, sampling: Sampling) -> SamplingGroup:
        permitted = candidate_ids(self.vocabulary, kind, stop)
        device = self.keys_JT.device
        partners = self._unconditional_B[members] if sampling.guidance != 1 else None
        return SamplingGroup(
            transformer=self.transformer,
            members=members,
            # All rows, in order, need no picking.
            rows_R=torch.from_numpy(members).to(device) if len(members) < len(self.batch.ids) else None,
            unconditional_R=None if partners is None else torch.from_numpy(partners).to(device),
            candidates=permitted,
            stop=stop,
            mask_V=special_token_mask(stop, permitted, self.vocabulary, device),
            sampling=sampling,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplingGroup:
    """Rows R of a batch that are drawn among the same ids in the same way."""

    transformer: Transformer
    members: np.ndarray  # of the batch
    rows_R: Tensor | None  # the same on the device; None for all
    unconditional_R: Tensor | None  # the unguided twin of each, where there is guidance
    candidates: range
    stop: int | None
    mask_V: Tensor | None
    sampling: Sampling

    def sample(self, hidden_BD: Tensor, keys_B: Tensor, log_probability_J: Tensor) -> Tensor:
        """The ids (R,) that follow; their log-probability is added to that of their rows."""
        rows_R = self.rows_R
        without_RD = None if self.unconditional_R is None else hidden_BD[self.unconditional_R]
        ids_R, log_p_R = self.sample_ids(
            hidden_BD if rows_R is None else hidden_BD[rows_R], keys_B if rows_R is None else keys_B[rows_R], without_RD
        )
        if rows_R is None:
            log_probability_J += log_p_R
        else:
            log_probability_J.index_add_(0, rows_R, log_p_R.to(log_probability_J.dtype))
        return ids_R

    def sample_ids(self, hidden_RD: Tensor, keys_R: Tensor, without_RD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ids (R,) that follow and their log-probabilities; ``without_RD`` are the hidden states without text."""
        logits_RV = wanted_RV = logits_of(self.transformer, hidden_RD, self.candidates, self.mask_V)
        if without_RD is not None:
            without_RV = logits_of(self.transformer, without_RD, self.candidates, self.mask_V)
            wanted_RV = without_RV + self.sampling.guidance * (logits_RV - without_RV)
            if self.mask_V is not None:
                wanted_RV = wanted_RV.masked_fill(self.mask_V, -torch.inf)
        chosen_R = sample(wanted_RV, keys_R, self.candidates, self.sampling)
        return chosen_R + self.candidates.start, log_probability_of(logits_RV, chosen_R)

    def write_tokens(self, ids_BT: Tensor, column: int, ids_R: Tensor) -> None:
        """Put drawn ids where they belong."""
        if self.rows_R is None:
            ids_BT[:, column] = ids_R
        else:
            ids_BT[self.rows_R, column] = ids_R
        if self.unconditional_R is not None:
            ids_BT[self.unconditional_R, column] = ids_R


def notify(
    callback: Callable[[DecodingProgress], object], done: int, total: int, sequences: Callable[[], list[np.ndarray]]
) -> None:
    """Call ``watch``; raises ``Stopped`` where it returns False."""
    if callback(DecodingProgress(done=done, total=total, sequences=sequences)) is False:
        raise DecodingStopped


def candidate_ids(vocabulary: Vocabulary, kind: TokenKind, stop: int | None) -> range:
    """The ids that a blank may take; with a ``stop``, commands too, of which ``logits_of`` leaves the stop alone."""
    permitted = vocabulary.permitted(kind)
    return permitted if stop is None else range(permitted.start, vocabulary.size)


def special_token_mask(
    stop: int | None, permitted: range, vocabulary: Vocabulary, device: torch.device
) -> Tensor | None:
    """(V,) bool: the commands among the permitted ids, without the one that ends a text; None where there are none."""
    if stop is None:
        return None
    ids_V = torch.arange(permitted.start, permitted.stop, device=device)
    return (ids_V >= vocabulary.commands.start) & (ids_V != stop)


def logits_of(transformer: Transformer, hidden_RD: Tensor, permitted: range, mask_V: Tensor | None) -> Tensor:
    """Float32 logits (R, V) of the permitted ids; -inf where the mask is."""
    logits_RV = transformer.head(hidden_RD, permitted)
    return logits_RV if mask_V is None else logits_RV.masked_fill(mask_V, -torch.inf)


def _noise_positions(jobs: Sequence[DecodingRequest], batch: SequenceBatch) -> np.ndarray:
    """(B, T) int64: the key of each column's noise, which padding cannot change."""
    places_BT = np.zeros((len(jobs), batch.ids.shape[1]), dtype=np.int64)
    for index, job in enumerate(jobs):
        start = int(batch.starts[index])
        own = np.zeros(len(job.sequence), dtype=np.int64) if job.noise_positions is None else job.noise_positions
        if job.noise_positions is None:
            for span in job.sequence.spans.values():
                own[span] = np.arange(span.stop - span.start)
        places_BT[index, start:] = own[: places_BT.shape[1] - start]
    return places_BT


def log_probability_of(logits_RV: Tensor, chosen_R: Tensor) -> Tensor:
    """log p (R,) of the chosen ids among all that were permitted."""
    return logits_RV.log_softmax(dim=-1).gather(1, chosen_R.unsqueeze(1)).squeeze(1)
