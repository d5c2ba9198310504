"""Speculative decoding of images: several codes per forward pass, and exactly the codes of sequential decoding.

Noise is keyed, so the next code is a function of the codes before it, and drafts can be verified. A forward pass reads
a window of columns that holds drafts for unknown codes. If a draft equals the prediction of its column, the prediction
of the next column is right too. All codes up to the first wrong draft are accepted, and the prediction that replaces
it; the later predictions are the next drafts (Jacobi decoding, arXiv:2305.10427; keeping the noise of a position fixed
is the Gumbel coupling of arXiv:2510.24211). The first draft of a column is the last predicted code.

Rows advance at different speeds. A step reads and writes buffers with fixed addresses and does not synchronize with the
device, so that CUDA can capture it as a graph and replay it.
"""

# J requests, B rows: one per request, then the others of guided ones (``BatchRows``). K rows of a chain before its
# last, T columns, W columns of a window, D model width
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


@dataclass(frozen=True, kw_only=True)
class WindowLimits:
    """Limits of the windows, for one form of the layers.

    Attributes:
        columns: Columns of all rows together that a forward pass may read.
        min_width: Columns of a row; a smaller window is not worthwhile.
        max_width: Maximum number of columns of a row.
    """

    columns: int
    min_width: int = 8
    max_width: int = sys.maxsize

    def width(self, num_rows: int) -> int:
        """Return the maximal width of a window for ``num_rows`` rows; 1 for no speculation."""
        width = min(self.columns // num_rows, self.max_width)
        return width if width >= self.min_width else 1


# Measured on a CPU with scripts/benchmarks/speculative.py, assumed for GPUs.
LIMITS = {
    "native": WindowLimits(columns=14, min_width=5, max_width=12),
    "packed": WindowLimits(columns=64),
    "cuda": WindowLimits(columns=128),
}
INITIAL_WINDOW = 32
# A window is doubled if more than this fraction of it is accepted on average, and halved below the other.
GROW_ABOVE, SHRINK_BELOW = 1 / 5, 1 / 8
# Speculation ends if the first TRIAL_STEPS forward passes accept fewer codes than this per pass and row.
TRIAL_STEPS = 8
MIN_SPEEDUP = 2.0
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
    if width is not None:
        return WindowLimits(columns=sys.maxsize, min_width=1, max_width=width)
    form = "native" if isinstance(layers, NativeLayers) else "packed" if layers else device.type
    return LIMITS.get(form, WindowLimits(columns=1))


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


def decode_speculatively(
    state: DecodingState,
    sampler: TokenSampler,
    limits: WindowLimits,
    callback: DecodingCallback | None,
    partial_sequences: Callable[[NDArray[np.int64]], list[NDArray[np.int64]]],
) -> None:
    """Decode all blanks of a batch, which must be image codes.

    Args:
        state: State of the batch; the codes are written into it.
        sampler: Sampler of the batch; it sums the log probabilities.
        limits: Limits of the windows.
        callback: Function that is called after every step.
        partial_sequences: Function of the first undecoded column of each request that returns their ids so far.

    Raises:
        DecodingStopped: The callback returned False.
    """
    decoder = SpeculativeDecoder(state, sampler)
    graphs = CudaGraphCache(decoder) if uses_cuda_graphs(state.ids_BT.device) else None
    first, end = decoder.first, decoder.end
    next_J = np.full(len(sampler.requests), first)
    max_window = limits.width(len(state.ids_BT))
    num_steps, width, mean_accepted = 1, min(INITIAL_WINDOW, max_window), 0.0
    decoder.prefill()
    while True:
        if width > 1 or num_steps == 1:
            accepted_J = decoder.accepted_J.cpu().numpy()  # the only synchronization with the device
            next_J = next_J + accepted_J
        else:
            next_J = np.minimum(next_J + 1, end)  # one column per step: nothing to ask the device
        if callback is not None:
            notify(callback, int(next_J.min()) - first, end - first, partial(partial_sequences, next_J))
        if (next_J == end).all():
            return
        if width > 1 and num_steps > 1:
            accepted = accepted_J[accepted_J > 0].mean()  # of the rows that are not finished
            mean_accepted = accepted if num_steps == 2 else (mean_accepted + accepted) / 2
            width = _next_width(width, mean_accepted, limits.min_width, max_window)
            if num_steps == TRIAL_STEPS and (next_J - first).mean() < MIN_SPEEDUP * num_steps:
                width = 1
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
        self._has_chains = len(batch.ids) > num_requests
        self._groups = sampler.image_groups()

    def prefill(self) -> None:
        """Process the columns before the first blank, and predict that one."""
        self._predict(self.state.forward_to(self.first).unsqueeze(1), self.predicted_until_J.unsqueeze(1).clone())

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
            chains_KND = None if group.chains_KR is None else hidden_BWD[group.chains_KR].flatten(1, 2)
            hidden_ND, keys_N = hidden_BWD[rows_R].flatten(0, 1), keys_JW[rows_R].flatten()  # N = R W
            ids_N, log_p_N = group.sample_ids(hidden_ND, keys_N, chains_KND)
            ids_JW[rows_R], log_p_JW[rows_R] = ids_N.view(-1, width), log_p_N.view(-1, width)
        new_JW = columns_JW >= self.next_J.unsqueeze(1)
        sampled_JW = new_JW & self.open_JT.gather(1, columns_JW)
        ids_JW = torch.where(sampled_JW, ids_JW, drafts_JW)
        self._write(columns_JW, ids_JW)
        # The prediction that replaces the first wrong draft is right as well.
        wrong_JW = ids_JW != drafts_JW
        right_JW = new_JW & (wrong_JW.cumsum(dim=1) - wrong_JW.long() == 0)
        accepted_JW = torch.where(right_JW & sampled_JW, log_p_JW, 0.0)
        self.sampler.log_probability_JT.scatter_add_(1, columns_JW, accepted_JW)
        self.accepted_J.copy_(right_JW.sum(dim=1))
        self.next_J += self.accepted_J
        self.predicted_until_J.copy_(torch.maximum(self.predicted_until_J, columns_JW[:, -1]))

    def _for_all_rows(self, values_JW: Tensor) -> Tensor:
        """Return (B, W): every row has the values of its request."""
        return values_JW[self._request_of_row_B] if self._has_chains else values_JW

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
