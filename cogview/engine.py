"""Rows in, tokens out: fills the blanks of arranged rows, whatever task they come from.

Rows of different lengths and tasks share a batch. Each is cut behind its last blank and padded on the left, so that
all end at the same column; the columns are then read from left to right, those that are given in every row at one go.
"""

# B rows of a batch, T columns, D width of the model, V ids to choose from
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogview.cache import KVCache
from cogview.sampling import Sampling, draw, keyed_gumbel
from cogview.tokenizers.layouts import Arranged, pad_left
from cogview.tokenizers.vocabulary import Kind, Vocabulary
from cogview.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row to fill. Its noise is keyed by ``seed`` and ``image``, the number of the picture among those of a seed."""

    row: Arranged
    seed: int
    image: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Filled:
    """A row without blanks."""

    ids: np.ndarray  # (T,) int64, as long as the job's row
    log_probability: float  # of the drawn ids: the sum of their log p among permitted ids, before any filter


@torch.inference_mode()
def fill(
    transformer: Transformer,
    vocabulary: Vocabulary,
    jobs: Sequence[Job],
    sampling: Sampling,
    on_column: Callable[[int, int], None] | None = None,
) -> list[Filled]:
    """Draw every blank of every row; the result of a row does not depend on its neighbours.

    ``on_column(done, total)`` is called after each column with blanks. All rows are held in memory at once.
    """
    device = transformer.embedding.weight.device
    ends = [int(np.flatnonzero(job.row.blanks)[-1]) + 1 if job.row.blanks.any() else 1 for job in jobs]
    batch = pad_left([job.row.cut(end) for job, end in zip(jobs, ends, strict=True)], vocabulary.pad)
    num_rows, num_columns = batch.ids.shape

    ids_BT = torch.from_numpy(batch.ids).to(device)
    positions_BT = torch.from_numpy(batch.positions).to(device)
    starts_B = torch.from_numpy(batch.starts).to(device) if batch.starts.any() else None
    places_BT = torch.from_numpy(_places(jobs, batch.starts, num_columns)).to(device)
    seeds_B = torch.tensor([job.seed for job in jobs], device=device)
    images_B = torch.tensor([job.image for job in jobs], device=device)
    log_probability_B = torch.zeros(num_rows, dtype=torch.float64)

    cache = KVCache(transformer.config, num_rows, num_columns, device, transformer.embedding.weight.dtype)
    columns = np.flatnonzero(batch.blanks.any(axis=0))
    for done, column in enumerate(columns, start=1):
        known = slice(cache.length, int(column))
        hidden_BTD = transformer.hidden(ids_BT[:, known], positions_BT[:, known], starts_B=starts_B, cache=cache)
        for kind in (Kind.TEXT, Kind.IMAGE):
            rows = np.flatnonzero(batch.blanks[:, column] & (batch.kinds[:, column] == kind))
            if not len(rows):
                continue
            rows_R = torch.from_numpy(rows).to(device)
            permitted = vocabulary.permitted(kind)
            logits_RV = transformer.head(hidden_BTD[rows_R, -1], permitted)
            noise_RV = keyed_gumbel(seeds_B[rows_R], images_B[rows_R], places_BT[rows_R, column], permitted)
            chosen_R = draw(logits_RV, noise_RV, sampling)
            ids_BT[rows_R, column] = chosen_R + permitted.start
            log_probability_B[rows] += _log_probability(logits_RV, chosen_R)
        if on_column is not None:
            on_column(done, len(columns))

    filled_BT = ids_BT.cpu().numpy()
    results = []
    for index, (job, end) in enumerate(zip(jobs, ends, strict=True)):
        ids = job.row.ids.copy()
        ids[:end] = filled_BT[index, batch.starts[index] :]
        results.append(Filled(ids=ids, log_probability=float(log_probability_B[index])))
    return results


def _places(jobs: Sequence[Job], starts: np.ndarray, num_columns: int) -> np.ndarray:
    """(B, T) int64: which code of its image, or piece of its text, a column is; so padding cannot change the noise."""
    places_BT = np.zeros((len(jobs), num_columns), dtype=np.int64)
    for index, job in enumerate(jobs):
        for span in job.row.spans.values():
            first = span.start + starts[index]
            last = min(span.stop + starts[index], num_columns)
            places_BT[index, first:last] = np.arange(max(0, last - first))
    return places_BT


def _log_probability(logits_RV: Tensor, chosen_R: Tensor) -> Tensor:
    """log p of the chosen ids among all that were permitted, float64 on the CPU."""
    return logits_RV.log_softmax(dim=-1).gather(1, chosen_R.unsqueeze(1)).squeeze(1).double().cpu()
