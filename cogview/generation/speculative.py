"""Pictures drawn several codes at one go, and yet exactly as one by one.

Noise is keyed, so the next code is a function of the codes before it, and guesses can be verified: a window of columns
is read at one go, with guesses for the codes that are not known yet. Where a guess is what is told in its place, what
is told behind it is right as well. All codes up to the first wrong guess are kept, and what is told in its place; what
is told behind it is the next guess (Jacobi iteration; that the noise of a place stays the same is the Gumbel coupling
of arXiv:2510.24211). The first guess for a place is the last code that was told: better ones hardly save a forward.

Each row goes at its own pace. A step reads and writes buffers that stay where they are and does not wait for the
device, so that on CUDA it can be captured as a graph and replayed.
"""

# J jobs, B rows: one for each job, then the unguided twins. T columns, W columns of a window, S columns so far
from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cogview.generation.decoding_state import DecodingState
from cogview.generation.token_sampler import DecodingProgress, TokenSampler, notify

# The most columns of all rows together that a forward should read, the fewest of a row that it pays to read, and how
# many it begins with. How many guesses hold, on average, says whether to read more or fewer; if of the first forwards
# each tells less than so many codes, guesses do not pay. (scripts/benchmarks/parallel.py; a GPU's columns are assumed)
WINDOW_BUDGET = {"cpu": 64, "cuda": 128, "mps": 1}
MIN_WINDOW = 8
INITIAL_WINDOW = 32
GROW_ABOVE, SHRINK_BELOW = 1 / 5, 1 / 8
TRIAL_STEPS = 8
MIN_SPEEDUP = 2.0
# A captured step looks at a fixed number of columns, and is captured anew for every so many; before that, it is run so
# often, for what is made at the first use.
BUCKET = 128
WARM_UP = 2
log = logging.getLogger(__name__)


def max_window(device: torch.device, num_rows: int, *, packed: bool) -> int:
    """How many codes of a row it may pay to tell at one go; 1 for no guesses.

    It pays where a forward of many columns takes hardly longer than one of a single: on a GPU, and on a CPU whose
    weights are ``packed``.
    """
    if device.type == "cpu" and not packed:
        return 1
    width = WINDOW_BUDGET[device.type] // num_rows
    return width if width >= MIN_WINDOW else 1


def uses_cuda_graphs(device: torch.device) -> bool:
    """Whether steps are replayed as CUDA graphs, which is so on CUDA; COGVIEW_STEPS=eager|captured forces it.

    "Captured" elsewhere runs the same steps, and captures nothing.
    """
    forced = os.environ.get("COGVIEW_STEPS")
    if forced not in (None, "eager", "captured"):
        raise ValueError(f"COGVIEW_STEPS={forced!r} is unknown; known: eager, captured")
    return device.type == "cuda" if forced is None else forced == "captured"


def decode_speculatively(
    tapes: DecodingState,
    easels: TokenSampler,
    max_window: int,
    callback: Callable[[DecodingProgress], object] | None,
    partial_sequences: Callable[[np.ndarray], list[np.ndarray]],
) -> None:
    """Draw all blanks, which are codes, telling up to ``most`` of each row at one go."""
    windows = SpeculativeDecoder(tapes, easels)
    steps = CudaGraphCache(windows) if uses_cuda_graphs(tapes.ids_BT.device) else None
    first, end = windows.first, windows.end
    next_J = np.full(len(easels.requests), first)
    forwards, width, held = 1, min(INITIAL_WINDOW, max_window), 0.0
    windows.begin()
    while True:
        if width > 1 or forwards == 1:
            count_J = windows.accepted_J.cpu().numpy()  # the one wait for the device
            next_J = next_J + count_J
        else:
            next_J = np.minimum(next_J + 1, end)  # as it must be; no need to ask
        if callback is not None:
            notify(callback, int(next_J.min()) - first, end - first, partial(partial_sequences, next_J))
        if (next_J == end).all():
            return
        if width > 1 and forwards > 1:
            count = count_J[count_J > 0].mean()  # rows that are done count no more
            held = count if forwards == 2 else (held + count) / 2
            width = min(2 * width, max_window) if held > GROW_ABOVE * width else width
            width = max(width // 2, min(MIN_WINDOW, max_window)) if held < SHRINK_BELOW * width else width
            if forwards == TRIAL_STEPS and (next_J - first).mean() < MIN_SPEEDUP * forwards:
                width = 1
        width = min(width, end - first)
        if steps is not None:
            steps.run(width, int(next_J.max()))
        else:
            starts_J = np.minimum(next_J - 1, end - 1 - width)
            together = bool((starts_J == starts_J[0]).all())
            windows.step(width, int(starts_J.max()) + width, int(starts_J[0]) if together else None)
        forwards += 1


class SpeculativeDecoder:
    """The state of such a drawing, in tensors of the device."""

    def __init__(self, tapes: DecodingState, easels: TokenSampler) -> None:
        device, batch, num_jobs = tapes.ids_BT.device, easels.batch, len(easels.requests)
        self.state, self.sampler = tapes, easels
        self.first, self.end = int(batch.blanks.any(axis=0).argmax()), batch.ids.shape[1]
        self.open_JT = torch.from_numpy(batch.blanks[:num_jobs]).to(device)
        self.next_J = torch.full((num_jobs,), self.first, device=device)  # the column before which all is known
        self.predicted_until_J = self.next_J.clone()  # the last column that was told
        self.accepted_J = torch.zeros_like(self.next_J)  # codes that the last step settled
        self._owner_B = torch.from_numpy(easels.request_of_row).to(device)  # the job of each row
        self._has_unconditional = len(batch.ids) > num_jobs
        self._groups = easels.image_groups()

    def begin(self) -> None:
        """Read all that is given before the first blank, and tell that."""
        self._predict(self.state.forward_to(self.first).unsqueeze(1), self.predicted_until_J.unsqueeze(1).clone())

    def step(self, width: int, keys: int, start: int | None) -> None:
        """Read ``width`` columns of each row, from the last known one, looking at the first ``keys`` columns.

        ``start`` is the column that they begin at, where that is the same for all rows.
        """
        start_J1 = (self.next_J - 1).clamp(max=self.end - 1 - width).unsqueeze(1)
        read_JW = start_J1 + torch.arange(width, device=start_J1.device)
        last_J1 = self.predicted_until_J.unsqueeze(1)
        ids_JT = self.state.ids_BT[: len(self.next_J)]
        guessed_JW = (read_JW > last_J1) & self.open_JT.gather(1, read_JW)
        self._write(read_JW, torch.where(guessed_JW, ids_JT.gather(1, last_J1), ids_JT.gather(1, read_JW)))
        hidden_BWD = self.state.forward_columns(self._of_rows(read_JW), keys, start)
        self._predict(hidden_BWD, read_JW + 1)

    def _predict(self, hidden_BWD: Tensor, told_JW: Tensor) -> None:
        """Settle what the hidden states tell of the columns ``told_JW``."""
        num_jobs, width = told_JW.shape
        guesses_JW = self.state.ids_BT[:num_jobs].gather(1, told_JW)
        keys_JW = self.sampler.keys_JT.gather(1, told_JW)
        ids_JW, log_p_JW = torch.empty_like(told_JW), torch.empty(told_JW.shape, device=told_JW.device)
        for easel in self._groups:
            rows_R = slice(num_jobs) if easel.rows_R is None else easel.rows_R
            without_BWD = None if easel.unconditional_R is None else hidden_BWD[easel.unconditional_R].flatten(0, 1)
            ids_N, log_p_N = easel.sample_ids(hidden_BWD[rows_R].flatten(0, 1), keys_JW[rows_R].flatten(), without_BWD)
            ids_JW[rows_R], log_p_JW[rows_R] = ids_N.view(-1, width), log_p_N.view(-1, width)
        new_JW = told_JW >= self.next_J.unsqueeze(1)
        drawn_JW = new_JW & self.open_JT.gather(1, told_JW)
        ids_JW = torch.where(drawn_JW, ids_JW, guesses_JW)
        self._write(told_JW, ids_JW)
        # Right is what is told up to the first wrong guess, and in its place.
        wrong_JW = ids_JW != guesses_JW
        right_JW = new_JW & (wrong_JW.cumsum(dim=1) - wrong_JW.long() == 0)
        self.sampler.log_probability_J += torch.where(right_JW & drawn_JW, log_p_JW, 0.0).sum(dim=1)
        self.accepted_J.copy_(right_JW.sum(dim=1))
        self.next_J += self.accepted_J
        self.predicted_until_J.copy_(torch.maximum(self.predicted_until_J, told_JW[:, -1]))

    def _of_rows(self, columns_JW: Tensor) -> Tensor:
        """The same for every row: twins keep step with their jobs."""
        return columns_JW[self._owner_B] if self._has_unconditional else columns_JW

    def _write(self, columns_JW: Tensor, ids_JW: Tensor) -> None:
        self.state.ids_BT.scatter_(1, self._of_rows(columns_JW), self._of_rows(ids_JW))


class CudaGraphCache:
    """Runs the steps of ``windows``, on CUDA as graphs: one for each width and length."""

    def __init__(self, windows: SpeculativeDecoder) -> None:
        self.decoder = windows
        self._runs: dict[tuple[int, int], int] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._captures = windows.next_J.device.type == "cuda"

    def run(self, width: int, most_known: int) -> None:
        """A step of ``width`` columns, where no row is known beyond ``most_known`` columns."""
        keys = min(-(-(most_known - 1 + width) // BUCKET) * BUCKET, self.decoder.end)
        look = (width, keys)
        self._runs[look] = self._runs.get(look, 0) + 1
        if not self._captures or self._runs[look] <= WARM_UP:
            self.decoder.step(width, keys, None)
            return
        if look not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self.decoder.step(width, keys, None)
            log.info("captured a step of %d columns that looks at %d", *look)
            self._graphs[look] = graph
        self._graphs[look].replay()
