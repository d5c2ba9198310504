"""Speculative decoding of images: several codes per forward pass, and exactly the codes of sequential decoding.

Noise is keyed, so the next code is a function of the codes before it, and drafts can be verified. A forward pass reads
a window of columns that holds drafts for unknown codes. If a draft equals the prediction of its column, the prediction
of the next column is right too. All codes up to the first wrong draft are accepted, and the prediction that replaces
it; the later predictions are the next drafts (Jacobi decoding, arXiv:2305.10427; keeping the noise of a position fixed
is the Gumbel coupling of arXiv:2510.24211). The first draft of a column is the last predicted code. For images of one
prompt it is sampled from logits that one row computes for all of them (``SpeculativeDecoder.share_drafts``).

Rows advance at different speeds. A step reads and writes buffers with fixed addresses and does not synchronize with the
device, so that CUDA can capture it as a graph and replay it.
"""

# J requests, B rows: one per request, then the unconditional ones. T columns, W columns of a window, D model width
from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogview.generation.decoding_state import DecodingState
from cogview.generation.requests import DecodingCallback, notify
from cogview.generation.token_sampler import TokenSampler
from cogview.modeling.native_layers import NativeLayers
from cogview.modeling.packed_layers import PackedLayers
from cogview.process_variables import choice_variable
from cogview.tokenizers.vocabulary import TokenKind


@dataclass(frozen=True, kw_only=True)
class WindowLimits:
    """Limits of the windows, for one form of the layers.

    Attributes:
        columns: Columns of all rows together that a forward pass may read.
        min_width: Columns of a row; a smaller window is not worthwhile.
        max_width: Maximum number of columns of a row.
        shared_rows: Maximum number of rows that share drafts, where that permits more rows than ``columns`` does.
        shared_width: Columns of each of these rows.
        fixed_columns: Columns that take as long as the fixed part of a forward pass, such as reading the weights; None
            if that part outweighs every window.
    """

    columns: int
    min_width: int = 8
    max_width: int = sys.maxsize
    shared_rows: int = 0
    shared_width: int = 1
    fixed_columns: int | None = None

    def widths(self, num_rows: int) -> tuple[int, int]:
        """Return the maximal width of a window for ``num_rows`` rows, without and with shared drafts; 1 for none."""
        alone = min(self.columns // num_rows, self.max_width)
        alone = alone if alone >= self.min_width else 1
        return alone, max(alone, self.shared_width) if num_rows <= self.shared_rows else alone

    def min_accepted(self, num_rows: int, width: int) -> float:
        """Return the number of codes per row and forward pass below which sequential decoding is faster."""
        if self.fixed_columns is None:
            return MIN_SPEEDUP
        return max(MIN_SPEEDUP, (self.fixed_columns + num_rows * width) / (self.fixed_columns + num_rows))


# Measured on a CPU with scripts/benchmarks/speculative.py, assumed for GPUs.
LIMITS = {
    "native": WindowLimits(columns=14, min_width=5, max_width=12, shared_rows=16, shared_width=7, fixed_columns=12),
    "packed": WindowLimits(columns=64),
    "cuda": WindowLimits(columns=128),
}
INITIAL_WINDOW = 32
# A window is doubled if more than this fraction of it is accepted on average, and halved below the other.
GROW_ABOVE, SHRINK_BELOW = 1 / 5, 1 / 8
# Speculation ends if the first TRIAL_STEPS forward passes accept fewer codes per pass and row than
# ``WindowLimits.min_accepted``, which is at least this.
TRIAL_STEPS = 8
MIN_SPEEDUP = 2.0
MIN_SHARED_DRAFTS = 4  # requests for each row of shared drafts, on average; one row serves any number from 2 on
BUCKET = 128  # columns; a captured graph attends to a multiple of these, so that few graphs serve all lengths
WARM_UP = 2  # runs before a capture, in which libraries allocate what they need at first use
log = logging.getLogger(__name__)


def window_limits(
    device: torch.device, layers: NativeLayers | PackedLayers | None, width: int | None = None
) -> WindowLimits:
    """Return the limits of the windows.

    Speculation is worthwhile where a forward pass of many columns takes hardly longer than one of a single column: on a
    GPU, and on a CPU with native kernels or prepacked weights.

    Args:
        device: Device of the model.
        layers: Layers that are prepared for a CPU (``Transformer.prepare_cpu``), or None.
        width: Maximal width of a window, for any number of rows; 1 for no speculation. None chooses.
    """
    limits = LIMITS.get("native" if isinstance(layers, NativeLayers) else "packed" if layers else device.type)
    if width is not None:
        fixed_columns = None if limits is None else limits.fixed_columns
        return WindowLimits(columns=sys.maxsize, min_width=1, max_width=width, fixed_columns=fixed_columns)
    return limits or WindowLimits(columns=1)


def uses_cuda_graphs(device: torch.device) -> bool:
    """Return whether steps run through ``CudaGraphCache``: by default on CUDA alone.

    ``COGVIEW_CUDA_GRAPHS=0|1`` forces it; on a CPU 1 runs the same steps without capturing them. The former variable
    ``COGVIEW_STEPS=eager|captured`` is still read.

    Raises:
        InputError: A variable has another value.
    """
    for variable, values in (("COGVIEW_CUDA_GRAPHS", ("0", "1")), ("COGVIEW_STEPS", ("eager", "captured"))):
        if (forced := choice_variable(variable, values)) is not None:
            return forced == values[1]
    return device.type == "cuda"


def may_share_drafts(state: DecodingState, sampler: TokenSampler) -> bool:
    """Return whether requests may share drafts (``SpeculativeDecoder.share_drafts``).

    Some must have the same prefix. With guidance, or with codes in the prefix, shared drafts saved no time.

    Args:
        state: State of the batch, before the prefill.
        sampler: Sampler of the batch.
    """
    batch = sampler.batch
    first = int(batch.blanks.any(axis=0).argmax())
    has_codes = bool((batch.kinds[:, :first] == TokenKind.IMAGE).any())
    return state.has_equal_prefixes and len(batch.ids) == len(sampler.requests) and not has_codes


def decode_speculatively(
    state: DecodingState,
    sampler: TokenSampler,
    limits: WindowLimits,
    callback: DecodingCallback | None,
    partial_sequences: Callable[[NDArray[np.int64]], list[NDArray[np.int64]]],
) -> bool:
    """Decode all blanks of a batch, which must be image codes, or the first if speculation is not worthwhile.

    Args:
        state: State of the batch; the codes are written into it.
        sampler: Sampler of the batch; it sums the log probabilities.
        limits: Limits of the windows.
        callback: Function that is called after every step.
        partial_sequences: Function of the first undecoded column of each request that returns their ids so far.

    Returns:
        Whether all blanks are decoded. If not, those of the first column with blanks are.

    Raises:
        DecodingStopped: The callback returned False.
    """
    decoder = SpeculativeDecoder(state, sampler)
    graphs = CudaGraphCache(decoder) if uses_cuda_graphs(state.ids_BT.device) else None
    first, end, num_rows = decoder.first, decoder.end, len(state.ids_BT)
    next_J = np.full(len(sampler.requests), first)
    max_window, shared_window = limits.widths(num_rows)
    decoder.prefill()
    if shared_window > 1 and decoder.share_drafts(shared_window * num_rows):
        max_window = shared_window
    num_steps, width, mean_accepted = 1, min(INITIAL_WINDOW, max_window), 0.0
    while True:
        if width > 1 or num_steps == 1:
            accepted_J = decoder.accepted_J.cpu().numpy()  # the only synchronization with the device
            next_J = next_J + accepted_J
        else:
            next_J = np.minimum(next_J + 1, end)  # one column per step: nothing to ask the device
        if callback is not None:
            notify(callback, int(next_J.min()) - first, end - first, partial(partial_sequences, next_J))
        if (next_J == end).all():
            return True
        if max_window == 1 and graphs is None:
            return False
        if width > 1 and num_steps > 1:
            accepted = accepted_J[accepted_J > 0].mean()  # of the rows that are not finished
            mean_accepted = accepted if num_steps == 2 else (mean_accepted + accepted) / 2
            width = _next_width(width, mean_accepted, limits.min_width, max_window)
            if num_steps == TRIAL_STEPS:
                min_accepted = limits.min_accepted(num_rows, width)
                width = 1 if (next_J - first).mean() < min_accepted * num_steps else width
        width = min(width, end - first - 1)  # the column before the first blank may be in a shared prefix
        if graphs is not None:
            graphs.run(width, int(next_J.max()))
        else:
            starts_J = np.minimum(next_J - 1, end - 1 - width)
            aligned = bool((starts_J == starts_J[0]).all())
            decoder.step(width, int(starts_J.max()) + width, int(starts_J[0]) if aligned else None)
        num_steps += 1


def _next_width(width: int, mean_accepted: float, min_width: int, max_width: int) -> int:
    """Return the width of the next window."""
    if mean_accepted > GROW_ABOVE * width:
        width = min(2 * width, max_width)
    if mean_accepted < SHRINK_BELOW * width:
        width = max(width // 2, min(min_width, max_width))
    return width


class SpeculativeDecoder:
    """State of speculative decoding, in tensors on the device.

    Attributes:
        first: Column of the first blank.
        end: Number of columns.
        next_J: Column of each request before which every code is known.
        predicted_until_J: Last column of each request that has a prediction.
        accepted_J: Number of columns that the last step accepted.
    """

    def __init__(self, state: DecodingState, sampler: TokenSampler) -> None:
        device, batch, num_requests = state.ids_BT.device, sampler.batch, len(sampler.requests)
        self.state, self.sampler = state, sampler
        self.first, self.end = int(batch.blanks.any(axis=0).argmax()), batch.ids.shape[1]
        self.open_JT = torch.from_numpy(batch.blanks[:num_requests]).to(device)
        self.next_J = torch.full((num_requests,), self.first, device=device)
        self.predicted_until_J = self.next_J.clone()
        self.accepted_J = torch.zeros_like(self.next_J)
        self._request_of_row_B = torch.from_numpy(sampler.request_of_row).to(device)
        self._has_unconditional = len(batch.ids) > num_requests
        self._groups = sampler.image_groups()

    def prefill(self) -> None:
        """Process the columns before the first blank, and predict that one."""
        self._predict(self.state.forward_to(self.first).unsqueeze(1), self.predicted_until_J.unsqueeze(1).clone())

    def share_drafts(self, max_columns: int) -> bool:
        """Draft all codes of requests that have the same prefix and the same first code in one row for all of them.

        The row repeats the first code. Its logits, with the noise of each request, predict most of the codes; those of
        another first code do not.

        Args:
            max_columns: Columns of all rows together that a forward pass may read.

        Returns:
            Whether there are drafts; not if they would take too many rows.
        """
        num_requests = len(self.next_J)
        if not may_share_drafts(self.state, self.sampler):
            return False
        alike = self._group_alike()
        if len(alike) > max(1, num_requests // MIN_SHARED_DRAFTS):
            return False
        rows_G = torch.tensor([row for _, row in alike], device=self.next_J.device)
        ids_GT, ids_JT = self._repeat_first_codes()[rows_G], self.state.ids_BT.clone()
        for columns, hidden_GTD in self.state.forward_drafts(rows_G, ids_GT, max_columns // len(alike)):
            predicted = slice(columns.start + 1, columns.stop + 1)
            for ((number, _), members), hidden_TD in zip(alike.items(), hidden_GTD, strict=True):
                group = self._groups[number]
                _, logits_TV = group.guided_logits(hidden_TD, None)
                for member in members:
                    keys_T = self.sampler.keys_JT[member, predicted]
                    ids_JT[member, predicted] = group.sample_guided(logits_TV, keys_T)
        later = slice(self.first + 1, self.end)
        self.state.ids_BT[:, later] = torch.where(self.open_JT, ids_JT, self.state.ids_BT)[:, later]
        self.predicted_until_J.fill_(self.end - 1)
        return True

    def _repeat_first_codes(self) -> Tensor:
        """Return the ids (J, T) of batches without guidance, with the first code of a row in place of its blanks."""
        return torch.where(self.open_JT, self.state.ids_BT[:, self.first : self.first + 1], self.state.ids_BT)

    def _group_alike(self) -> dict[tuple[int, int], list[int]]:
        """Return requests that can share drafts, by the number of their sampling group and the first row among them."""
        ids = self._repeat_first_codes()[:, self.first :].cpu().numpy()
        positions = self.sampler.batch.positions[:, self.first :]
        rows: dict[object, int] = {}
        alike: dict[tuple[int, int], list[int]] = {}
        for number, group in enumerate(self._groups):
            for member in group.members.tolist():
                key = (number, self.state.prefix_of_row[member], ids[member].tobytes(), positions[member].tobytes())
                alike.setdefault((number, rows.setdefault(key, member)), []).append(member)
        return alike

    def step(self, width: int, num_keys: int, start: int | None) -> None:
        """Process ``width`` columns of each row from its last known one, and accept what they verify.

        Args:
            width: Columns per row.
            num_keys: Number of columns that attention reads, from the first.
            start: First column of the windows, if it is the same for all rows.
        """
        start_J1 = (self.next_J - 1).clamp(max=self.end - 1 - width).unsqueeze(1)
        columns_JW = start_J1 + torch.arange(width, device=start_J1.device)
        last_J1 = self.predicted_until_J.unsqueeze(1)
        ids_JT = self.state.ids_BT[: len(self.next_J)]
        undrafted_JW = (columns_JW > last_J1) & self.open_JT.gather(1, columns_JW)
        draft_tokens_JW = torch.where(undrafted_JW, ids_JT.gather(1, last_J1), ids_JT.gather(1, columns_JW))
        self._write(columns_JW, draft_tokens_JW)
        hidden_BWD = self.state.forward_columns(self._for_all_rows(columns_JW), num_keys, start)
        self._predict(hidden_BWD, columns_JW + 1)

    def _predict(self, hidden_BWD: Tensor, columns_JW: Tensor) -> None:
        """Predict ``columns_JW`` from the hidden states before them, and accept up to the first wrong draft."""
        num_requests, width = columns_JW.shape
        drafts_JW = self.state.ids_BT[:num_requests].gather(1, columns_JW)
        keys_JW = self.sampler.keys_JT.gather(1, columns_JW)
        ids_JW, log_p_JW = torch.empty_like(columns_JW), torch.empty(columns_JW.shape, device=columns_JW.device)
        for group in self._groups:
            rows_R = slice(num_requests) if group.rows_R is None else group.rows_R
            unconditional = None if group.unconditional_R is None else hidden_BWD[group.unconditional_R].flatten(0, 1)
            hidden_ND, keys_N = hidden_BWD[rows_R].flatten(0, 1), keys_JW[rows_R].flatten()  # N = R W
            ids_N, log_p_N = group.sample_ids(hidden_ND, keys_N, unconditional)
            ids_JW[rows_R], log_p_JW[rows_R] = ids_N.view(-1, width), log_p_N.view(-1, width)
        new_JW = columns_JW >= self.next_J.unsqueeze(1)
        sampled_JW = new_JW & self.open_JT.gather(1, columns_JW)
        ids_JW = torch.where(sampled_JW, ids_JW, drafts_JW)
        self._write(columns_JW, ids_JW)
        # The prediction that replaces the first wrong draft is right as well.
        wrong_JW = ids_JW != drafts_JW
        right_JW = new_JW & (wrong_JW.cumsum(dim=1) - wrong_JW.long() == 0)
        self.sampler.log_probability_J += torch.where(right_JW & sampled_JW, log_p_JW, 0.0).sum(dim=1)
        self.accepted_J.copy_(right_JW.sum(dim=1))
        self.next_J += self.accepted_J
        self.predicted_until_J.copy_(torch.maximum(self.predicted_until_J, columns_JW[:, -1]))

    def _for_all_rows(self, values_JW: Tensor) -> Tensor:
        """Return (B, W): each unconditional row has the values of its request."""
        return values_JW[self._request_of_row_B] if self._has_unconditional else values_JW

    def _write(self, columns_JW: Tensor, ids_JW: Tensor) -> None:
        """Write ids into the given columns of all rows."""
        self.state.ids_BT.scatter_(1, self._for_all_rows(columns_JW), self._for_all_rows(ids_JW))


class CudaGraphCache:
    """Runs the steps of a ``SpeculativeDecoder``, on CUDA as captured graphs: one per width and number of keys."""

    def __init__(self, decoder: SpeculativeDecoder) -> None:
        self.decoder = decoder
        self._num_runs: dict[tuple[int, int], int] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._captures = decoder.next_J.device.type == "cuda"

    def run(self, width: int, num_known: int) -> None:
        """Run a step.

        Args:
            width: Columns per row.
            num_known: Known columns of the row that is furthest ahead.
        """
        num_keys = min(-(-(num_known - 1 + width) // BUCKET) * BUCKET, self.decoder.end)
        shape = (width, num_keys)
        self._num_runs[shape] = self._num_runs.get(shape, 0) + 1
        if not self._captures or self._num_runs[shape] <= WARM_UP:
            self.decoder.step(width, num_keys, None)
            return
        if shape not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self.decoder.step(width, num_keys, None)
            log.info("captured a step of %d columns and %d keys", *shape)
            self._graphs[shape] = graph
        self._graphs[shape].replay()
