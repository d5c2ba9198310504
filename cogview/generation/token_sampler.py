"""Sampling of the next tokens of a batch: candidate ids, settings, guidance and noise of every blank."""

# J requests, B rows of a batch: one per request, then the others of guided ones (``BatchRows``). R rows of a group, K
# rows of a chain before its last, T columns, D width of the model, V candidate ids
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogview.generation.guidance import BatchRows
from cogview.generation.requests import DecodingRequest
from cogview.generation.sampling import noise_keys, sample
from cogview.modeling.config import Sampling
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import SequenceBatch
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary


class TokenSampler:
    """Sampling state of a batch: noise keys, log probabilities, and groups of rows that are sampled alike.

    Attributes:
        keys_JT: Noise keys, int64.
        log_probability_JT: Log probability of each id that is sampled, float32, in nats; 0 for the others.
        request_of_row: Index (B,) of the request of each row.
    """

    def __init__(
        self,
        transformer: Transformer,
        vocabulary: Vocabulary,
        requests: Sequence[DecodingRequest],
        batch: SequenceBatch,
        rows: BatchRows,
    ) -> None:
        """Prepare to sample the blanks of ``batch``.

        Args:
            transformer: Model that computes the logits.
            vocabulary: Vocabulary of the ids.
            requests: The requests, J of them.
            batch: Sequences of ``rows``.
            rows: Rows of the requests.
        """
        device = transformer.embedding.weight.device
        self.transformer, self.vocabulary, self.requests, self.batch = transformer, vocabulary, requests, batch
        seeds_J1 = torch.tensor([[request.seed] for request in requests], device=device)
        images_J1 = torch.tensor([[request.image] for request in requests], device=device)
        positions_JT = torch.from_numpy(_noise_positions(requests, batch)).to(device)
        self.keys_JT = noise_keys(seeds_J1, images_J1, positions_JT)
        self.log_probability_JT = torch.zeros(self.keys_JT.shape, device=device)
        self._rows = rows
        self.request_of_row = np.array(rows.request_of_row)
        self._groups: dict[bytes, list[SamplingGroup]] = {}

    def log_probabilities(self) -> list[float]:
        """Return the sum of the log probabilities of each request, in nats.

        It is rounded once, so it has the same bits in any batch, at any window of speculative decoding.
        """
        return [math.fsum(row) for row in self.log_probability_JT.tolist()]

    def groups_at(self, column: int, open_J: NDArray[np.bool_]) -> list[SamplingGroup]:
        """Return the groups of the requests whose blank in ``column`` is still to be sampled (``open_J``).

        Args:
            column: Column of the batch.
            open_J: Whether the blank of each request is still to be sampled, (J,) bool.
        """
        kinds_J = self.batch.kinds[: len(self.requests), column]
        key = open_J.tobytes() + kinds_J.tobytes()
        if key not in self._groups:  # usually equal to that of the column before
            self._groups[key] = self._grouped(open_J, kinds_J)
        return self._groups[key]

    def image_groups(self) -> list[SamplingGroup]:
        """Return the groups of all requests, for batches whose blanks are all image codes."""
        return self._grouped(np.ones(len(self.requests), dtype=bool), np.full(len(self.requests), TokenKind.IMAGE))

    def _grouped(self, open_J: NDArray[np.bool_], kinds_J: NDArray[np.integer]) -> list[SamplingGroup]:
        """Group the requests of ``open_J`` by kind, stop token, settings and scales."""
        groups: dict[tuple[TokenKind, int | None, Sampling, tuple[float, ...]], list[int]] = {}
        for index in np.flatnonzero(open_J).tolist():
            kind = TokenKind(kinds_J[index])
            stop = self.requests[index].sequence.stop if kind == TokenKind.TEXT else None
            key = (kind, stop, self.requests[index].sampling, self._rows.scales[index])
            groups.setdefault(key, []).append(index)
        return [self._group(np.array(members), *key) for key, members in groups.items()]

    def _group(
        self,
        members: NDArray[np.int64],
        kind: TokenKind,
        stop: int | None,
        sampling: Sampling,
        scales: tuple[float, ...],
    ) -> SamplingGroup:
        """Return the group of the requests ``members``."""
        candidates = candidate_ids(self.vocabulary, kind, stop)
        device = self.keys_JT.device
        chains_RK = np.array([self._rows.chains[index] for index in members.tolist()])
        return SamplingGroup(
            transformer=self.transformer,
            members=members,
            # All rows in their order need no indexing.
            rows_R=torch.from_numpy(members).to(device) if len(members) < len(self.batch.ids) else None,
            chains_KR=torch.from_numpy(chains_RK.T.copy()).to(device) if scales else None,
            scales=scales,
            candidates=candidates,
            stop=stop,
            mask_V=special_token_mask(stop, candidates, self.vocabulary, device),
            sampling=sampling,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplingGroup:
    """Rows of a batch that are sampled from the same candidates with the same settings.

    Attributes:
        transformer: Model that computes the logits.
        members: Indices (R,) of the requests.
        rows_R: The same on the device; None for all rows of the batch.
        chains_KR: Rows of each request before its last; None without guidance.
        scales: Scales of guidance, K of them.
        candidates: Ids that the blanks may take.
        stop: Id that ends a text; None for images.
        mask_V: Candidates that are excluded; None if there are none.
        sampling: Settings of sampling.
    """

    transformer: Transformer
    members: NDArray[np.int64]
    rows_R: Tensor | None
    chains_KR: Tensor | None
    scales: tuple[float, ...]
    candidates: range
    stop: int | None
    mask_V: Tensor | None
    sampling: Sampling

    def sample(self, hidden_BD: Tensor, keys_J: Tensor, log_probability_J: Tensor) -> Tensor:
        """Sample the next id of every row of the group, and write its log probability.

        Args:
            hidden_BD: Last hidden state of every row of the batch.
            keys_J: Noise key of each request, int64.
            log_probability_J: Log probabilities of this column, updated in place.

        Returns:
            Ids (R,), int64.
        """
        rows_R = self.rows_R
        chains_KRD = None if self.chains_KR is None else hidden_BD[self.chains_KR]
        hidden_RD, keys_R = (hidden_BD, keys_J) if rows_R is None else (hidden_BD[rows_R], keys_J[rows_R])
        ids_R, log_p_R = self.sample_ids(hidden_RD, keys_R, chains_KRD)
        if rows_R is None:
            log_probability_J.copy_(log_p_R)
        else:
            log_probability_J[rows_R] = log_p_R
        return ids_R

    def sample_ids(self, hidden_RD: Tensor, keys_R: Tensor, chains_KRD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sample one id per hidden state.

        Args:
            hidden_RD: Hidden states.
            keys_R: Noise keys, int64.
            chains_KRD: Hidden states of the rows before the last of each chain, for guidance.

        Returns:
            Ids (R,) int64, and their log probabilities (R,) float32 in nats, before guidance and filters.
        """
        logits_RV = guided_RV = logits_of(self.transformer, hidden_RD, self.candidates, self.mask_V)
        if chains_KRD is not None:
            guided_RV = self._guided_logits(chains_KRD, logits_RV)
        chosen_R, log_p_R = sample(guided_RV, keys_R, self.candidates, self.sampling, logits_RV)
        return chosen_R + self.candidates.start, log_p_R

    def _guided_logits(self, chains_KRD: Tensor, logits_RV: Tensor) -> Tensor:
        """Return the logits of chains that end in ``logits_RV``."""
        before_RV = guided_RV = logits_of(self.transformer, chains_KRD[0], self.candidates, self.mask_V)
        for index, scale in enumerate(self.scales, start=1):
            is_last = index == len(self.scales)
            after_RV = (
                logits_RV if is_last else logits_of(self.transformer, chains_KRD[index], self.candidates, self.mask_V)
            )
            guided_RV = guided_RV + scale * (after_RV - before_RV)
            before_RV = after_RV
        if self.mask_V is not None:  # -inf minus -inf is not a number
            guided_RV = guided_RV.masked_fill(self.mask_V, -torch.inf)
        return guided_RV

    def write_tokens(self, ids_BT: Tensor, column: int, ids_R: Tensor) -> None:
        """Write sampled ids into ``column`` of ``ids_BT``, in all rows of each request.

        Args:
            ids_BT: Ids of the batch, (B, T) int64; changed in place.
            column: Column to write.
            ids_R: Sampled ids of the group's rows, (R,) int64.
        """
        if self.rows_R is None:
            ids_BT[:, column] = ids_R
        else:
            ids_BT[self.rows_R, column] = ids_R
        if self.chains_KR is not None:
            ids_BT[self.chains_KR, column] = ids_R


def candidate_ids(vocabulary: Vocabulary, kind: TokenKind, stop: int | None) -> range:
    """Return the ids that a blank of ``kind`` may take.

    With a stop token the range includes all special tokens, since it must be contiguous; ``special_token_mask``
    excludes the others.

    Args:
        vocabulary: The vocabulary.
        kind: Kind of the blank.
        stop: Id of the stop token, or None.
    """
    permitted = vocabulary.permitted(kind)
    return permitted if stop is None else range(permitted.start, vocabulary.size)


def special_token_mask(
    stop: int | None, candidates: range, vocabulary: Vocabulary, device: torch.device
) -> Tensor | None:
    """Return a bool mask (V,) of the special tokens among ``candidates`` except ``stop``; None without a stop token.

    Args:
        stop: Id of the stop token, or None.
        candidates: Ids that the blank may take.
        vocabulary: The vocabulary.
        device: Device of the mask.
    """
    if stop is None:
        return None
    ids_V = torch.arange(candidates.start, candidates.stop, device=device)
    return (ids_V >= vocabulary.commands.start) & (ids_V != stop)


def logits_of(transformer: Transformer, hidden_RD: Tensor, candidates: range, mask_V: Tensor | None) -> Tensor:
    """Return float32 logits (R, V) of ``candidates``, -inf where ``mask_V`` is set.

    Args:
        transformer: The transformer.
        hidden_RD: Hidden states (R, D).
        candidates: Ids to compute logits of.
        mask_V: Ids to exclude, (V,) bool, or None.
    """
    logits_RV = transformer.head(hidden_RD, candidates)
    return logits_RV if mask_V is None else logits_RV.masked_fill(mask_V, -torch.inf)


def _noise_positions(requests: Sequence[DecodingRequest], batch: SequenceBatch) -> NDArray[np.int64]:
    """Return the position part (J, T) of the noise keys, which does not depend on padding."""
    positions_JT = np.zeros((len(requests), batch.ids.shape[1]), dtype=np.int64)
    for index, request in enumerate(requests):
        positions = request.noise_positions
        if positions is None:
            positions = np.zeros(len(request.sequence), dtype=np.int64)
            for span in request.sequence.spans.values():
                positions[span] = np.arange(span.stop - span.start)
        # Of a row that guidance leaves out, the row of the batch has another text, but ends in the same blanks.
        known = positions[: len(request.sequence.until_last_blank())][-positions_JT.shape[1] :]
        positions_JT[index, positions_JT.shape[1] - len(known) :] = known
    return positions_JT
