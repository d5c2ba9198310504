"""The interface of engines, the state that they exchange, and the loss that they minimize.

An engine accumulates gradients, updates the weights, and exports or loads the state of training. The state has one form
for every engine and any number of processes: float32 weights and moments by the names of the parameters.
"""

# B rows, T positions of a row, D width, K kinds of targets, M targets of a kind
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from cogview.kernels.fused_linear_cross_entropy import LossTargets, fused_linear_cross_entropy
from cogview.kernels.window_mask import Pivots, WindowMask
from cogview.modeling.transformer import Transformer
from cogview.training.distributed import DistributedContext
from cogview.training.settings import TransformerTraining

# Dynamic loss scaling of float16 (arXiv:1710.03740): the initial scale, the finite steps after which it doubles, and
# the scale below which a smaller one cannot help.
INITIAL_LOSS_SCALE, LOSS_SCALE_WINDOW, MIN_LOSS_SCALE = 2.0**16, 400, 1.0
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # the names of torch and of DeepSpeed


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceMicroBatch:
    """A micro-batch on the device.

    Attributes:
        ids: Input ids (B, T), int64.
        positions: Positions (B, T), int64.
        targets: Targets of each of K kinds.
        lengths: Positions of each row without its padding, in ascending order, for ``Transformer.hidden``; None where
            rows should not be packed.
        pivots: Pivots of window attention; None for dense attention.
    """

    ids: Tensor
    positions: Tensor
    targets: Sequence[LossTargets]
    lengths: Sequence[int] | None = None
    pivots: Pivots | None = None

    def without_targets(self) -> DeviceMicroBatch:
        """Return a copy without targets, for a process that runs out of micro-batches before the others."""
        empty = [
            LossTargets(
                ids=kind.ids,
                positions_M=kind.positions_M[:0],
                targets_M=kind.targets_M[:0],
                weights_M=kind.weights_M[:0],
            )
            for kind in self.targets
        ]
        return replace(self, targets=empty)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of an optimizer step.

    Attributes:
        gradient_norm: Norm before clipping.
        skipped: Whether the weights were left unchanged, because a gradient was not finite.
        loss_scale: The scale of the loss in this step.
    """

    gradient_norm: float
    skipped: bool
    loss_scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingState:
    """State from which training resumes, in float32 on the CPU.

    Attributes:
        weights: Trained parameters by name.
        moments: Adam's moments by name, for each of ``ADAM_MOMENTS``; empty before the first update.
        updates: Number of updates, for Adam's bias correction.
        loss_scale: Scale of the loss.
        good_steps: Steps since the scale last changed.
    """

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    updates: int
    loss_scale: float
    good_steps: int


class TrainingLoss(Protocol):
    """A loss of the transformer on a micro-batch. Another objective is another object with this method."""

    def __call__(self, transformer: Transformer, batch: DeviceMicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Compute the loss, under the autocast of the engine.

        Args:
            transformer: The transformer that is trained.
            batch: Inputs and targets. A batch without targets contributes 0 but has the same graph.

        Returns:
            The scalar to minimize, with its graph, and for each of K kinds the unweighted losses (M,), detached.
        """


class CrossEntropyLoss:
    """Next-token cross-entropy, computed with the output projection in chunks: the loss of pretraining."""

    def __call__(self, transformer: Transformer, batch: DeviceMicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Compute the loss; see ``TrainingLoss``."""
        attention, mask = transformer.config.attention, None
        if batch.pivots is not None:
            mask = WindowMask.of_sequences(attention.window, batch.pivots, batch.ids.shape[1])
        outputs_M, targets = None, batch.targets
        if targets and batch.ids.device.type == "cpu":  # on a GPU the number of positions would have to be waited for
            outputs_M, targets = _without_other_positions(targets)
        hidden = transformer.hidden(batch.ids, batch.positions, lengths=batch.lengths, window=mask, outputs_M=outputs_M)
        return fused_linear_cross_entropy(hidden.flatten(0, -2), transformer.embedding.weight, targets)


def _without_other_positions(targets: Sequence[LossTargets]) -> tuple[Tensor, list[LossTargets]]:
    """Return the positions (M,) that have a target, ascending, and the targets with indices of these positions."""
    counts = [len(kind.positions_M) for kind in targets]
    outputs_M, indices = torch.cat([kind.positions_M for kind in targets]).unique(return_inverse=True)
    parts = indices.split(counts)
    return outputs_M, [replace(kind, positions_M=part) for kind, part in zip(targets, parts, strict=True)]


class TransformerWithLoss(nn.Module):
    """The transformer and its loss as one module, which engines wrap.

    Norms, the residual stream, softmaxes and losses are computed in float32 in any case.
    """

    def __init__(self, transformer: Transformer, dtype: torch.dtype | None, loss: TrainingLoss | None = None) -> None:
        """Combine a transformer and a loss.

        Args:
            transformer: The transformer to train.
            dtype: Dtype of matrix products (autocast); None computes in the dtype of the weights.
            loss: The objective; cross-entropy by default.
        """
        super().__init__()
        self.transformer = transformer
        self.dtype = dtype
        self.loss = loss or CrossEntropyLoss()

    def forward(self, batch: DeviceMicroBatch) -> tuple[Tensor, Tensor]:
        """Compute the loss of a micro-batch.

        Returns:
            The scalar to minimize, and the detached, unweighted sums (K,) of the losses of each kind.
        """
        device = batch.ids.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype is not None):
            total, losses = self.loss(self.transformer, batch)
        # The rounding error of a float32 sum over thousands of losses exceeds the differences between processes.
        exact = torch.float32 if device == "mps" else torch.float64
        sums = [losses_M.sum(dtype=exact) for losses_M in losses]
        return total, torch.stack(sums) if sums else total.new_zeros(0)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that require gradients, by their names in the transformer."""
        return {name: parameter for name, parameter in self.transformer.named_parameters() if parameter.requires_grad}


class Engine(ABC):
    """Accumulates gradients over all processes and updates the weights.

    All processes call each method together. Gradients are those of the sum of the losses of all processes.

    Attributes:
        name: Name in recipes.
        model: The transformer and its loss.
        context: The processes that train together.
        num_threads: Number of shards that ``accumulate_gradients`` computes in parallel.
    """

    name: ClassVar[str]
    model: TransformerWithLoss
    context: DistributedContext
    num_threads = 1

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """Factor of the loss that keeps small gradients in the range of float16; 1 for other dtypes."""

    @abstractmethod
    def accumulate_gradients(self, shards: Sequence[Sequence[DeviceMicroBatch]], *, learn: bool) -> Tensor:
        """Compute the losses of a batch and, with ``learn``, add up their gradients.

        Args:
            shards: Micro-batches of each thread.
            learn: Whether to compute gradients.

        Returns:
            Sums (K,) of the losses of this process, float64 on the CPU.
        """

    @abstractmethod
    def optimizer_step(self, learning_rate: float) -> StepResult:
        """Clip the accumulated gradients, update the weights and clear the gradients.

        Gradients that are not finite are cleared without an update.
        """

    @abstractmethod
    def export_state(self) -> TrainingState | None:
        """Return a copy of the state in the main process; None in the others."""

    @abstractmethod
    def load_state(self, state: TrainingState) -> None:
        """Load a state; every process passes the whole of it."""

    def whole_transformer(self) -> Transformer | None:
        """Return a transformer with all its weights, for sampling, in the main process; None in the others."""
        return self.model.transformer if self.context.is_main_process else None

    @abstractmethod
    def close(self) -> None:
        """Release threads and buffers of the engine."""


def parameter_groups(model: TransformerWithLoss, weight_decay: float) -> list[dict[str, object]]:
    """Return the parameter groups of AdamW: matrices decay, biases and norms do not.

    Args:
        model: The transformer and its loss; only trained parameters are returned.
        weight_decay: The decay of matrices.
    """
    trained = list(model.trained_parameters().values())
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: TransformerWithLoss, settings: TransformerTraining) -> torch.optim.AdamW:
    """Return AdamW for the trained parameters, in its fused form, which reads memory once.

    Args:
        model: The model with its loss.
        settings: Learning rate, betas and weight decay.
    """
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=settings.betas, fused=True
    )


def compile_layers(transformer: Transformer) -> None:
    """Compile each layer with ``torch.compile`` for rows of varying length, which are then not packed."""
    transformer.packs_rows = False
    for layer in transformer.layers:
        layer.compile(dynamic=True)


def to_cpu_float32(tensor: Tensor) -> Tensor:
    """Return a contiguous float32 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
