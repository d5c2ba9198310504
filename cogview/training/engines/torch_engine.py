"""What computes steps below the trainer: plain torch here, or DeepSpeed (``deepspeed_engine.py``).

An engine adds up gradients, makes updates, and tells or takes up the whole state of training. That state has one form,
whatever engine and however many processes it comes from: float32 weights and moments by the names of the parameters.
"""

# K kinds of what is told
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cogview.kernels.fused_linear_cross_entropy import LossTargets, fused_linear_cross_entropy
from cogview.modeling.transformer import Transformer
from cogview.training.distributed import DistributedContext
from cogview.training.settings import EngineSettings, TransformerTraining

# Loss scales of float16: where they begin, after how many good steps they double, and below which there is no use.
INITIAL_LOSS_SCALE, LOSS_SCALE_WINDOW, MIN_LOSS_SCALE = 2.0**16, 400, 1.0
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch and DeepSpeed name them


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceMicroBatch:
    """A part of a step on the device. ``targets`` has one entry for each of K kinds of what is told."""

    ids: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64
    targets: Sequence[LossTargets]

    def without_targets(self) -> DeviceMicroBatch:
        """The same rows, of which nothing is learnt: what a process computes while others have more parts."""
        nothing = [
            LossTargets(
                ids=own.ids, positions_M=own.positions_M[:0], targets_M=own.targets_M[:0], weights_M=own.weights_M[:0]
            )
            for own in self.targets
        ]
        return replace(self, targets=nothing)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """How an update went. ``gradient_norm`` is that before clipping; the update was left out if it is not finite."""

    gradient_norm: float
    skipped: bool
    loss_scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingState:
    """All that training goes on from, on the CPU: by name, what is trained and its moments, float32."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]  # of each of ``MOMENTS``; empty before the first update
    updates: int  # of the weights: what Adam corrects its moments by
    loss_scale: float
    good_steps: int  # since the loss scale last changed


class TransformerWithLoss(nn.Module):
    """The transformer with its loss, as one module: what engines wrap.

    ``dtype`` is what products are computed in (autocast), None for that of the weights; norms, the residual stream,
    softmaxes and losses are float32 in either case.
    """

    def __init__(self, transformer: Transformer, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.dtype = dtype

    def forward(self, ids: Tensor, positions: Tensor, targets: Sequence[LossTargets]) -> tuple[Tensor, Tensor]:
        """The weighted sum of all losses, and the sums (K,) of those of each kind, unweighted and detached."""
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype is not None):
            hidden_BTD = self.transformer.hidden(ids, positions)
            weight = self.transformer.embedding.weight
            total, losses = fused_linear_cross_entropy(hidden_BTD.flatten(0, 1), weight, targets)
        # In float32 the sum of thousands would be off by more than what processes differ by.
        exact = torch.float32 if ids.device.type == "mps" else torch.float64
        sums = [losses_M.sum(dtype=exact) for losses_M in losses]
        return total, torch.stack(sums) if sums else total.new_zeros(0)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are learnt, by their names in the transformer."""
        return {name: parameter for name, parameter in self.transformer.named_parameters() if parameter.requires_grad}


class Engine(ABC):
    """Adds up gradients over the processes of ``world`` and updates the weights.

    All methods but ``num_threads`` are for all processes at once. Gradients are those of the sum of the losses of all
    processes.
    """

    model: TransformerWithLoss
    context: DistributedContext
    num_threads = 1  # shares of parts that ``compute`` takes at once

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """What the loss is multiplied by, so that small gradients stay in half precision."""

    @abstractmethod
    def accumulate_gradients(self, shares: Sequence[Sequence[DeviceMicroBatch]], *, learn: bool) -> Tensor:
        """The sums (K,) of this process's losses, float64 on the CPU; with ``learn`` gradients are added up."""

    @abstractmethod
    def optimizer_step(self, learning_rate: float) -> StepResult:
        """Clip the gradients, make one update and forget them; where they are not finite they are only forgotten."""

    @abstractmethod
    def export_state(self) -> TrainingState | None:
        """The state, its tensors copied, in the first process; None in the others."""

    @abstractmethod
    def load_state(self, state: TrainingState) -> None:
        """Take up a state; every process gets all of it."""

    def whole_transformer(self) -> Transformer | None:
        """One with all its weights, to draw with, in the first process; None in the others."""
        return self.model.transformer if self.context.is_main_process else None

    @abstractmethod
    def close(self) -> None:
        """Let go of what the engine holds."""


def parameter_groups(learner: TransformerWithLoss, weight_decay: float) -> list[dict[str, object]]:
    """What is trained, for AdamW: matrices decay, biases and norms do not."""
    trained = list(learner.trained_parameters().values())
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(learner: TransformerWithLoss, settings: TransformerTraining) -> torch.optim.AdamW:
    """AdamW as the settings have it; PyTorch's fused one, which goes over memory once."""
    return torch.optim.AdamW(
        parameter_groups(learner, settings.weight_decay), lr=settings.learning_rate, betas=settings.betas, fused=True
    )


def compile_layers(transformer: Transformer) -> None:
    """Have torch.compile fuse what each layer does between its products; lengths of rows may differ."""
    for layer in transformer.layers:
        layer.compile(dynamic=True)


class TorchEngine(Engine):
    """One process, or several with the same weights each (DistributedDataParallel), in float32 under autocast.

    On a CPU one process has ``num_threads`` threads compute a share of the parts each. They wait for each other once a
    step; threads that share every product wait hundreds of times (``scripts/benchmarks/training_step.py threads``).
    """

    def __init__(
        self,
        learner: TransformerWithLoss,
        settings: TransformerTraining,
        engine: EngineSettings,
        world: DistributedContext,
        num_threads: int | None = None,
    ) -> None:
        self.model = learner
        self.context = world
        self.settings = settings
        self._trained = learner.trained_parameters()
        self._parameters = list(self._trained.values())
        if engine.compile:
            compile_layers(learner.transformer)
        if num_threads is None:
            # Dropout draws from one generator, so its threads must come in one order.
            alone = world.device.type != "cpu" or world.size > 1 or learner.transformer.config.dropout > 0
            num_threads = 1 if alone else torch.get_num_threads()
        self.num_threads = num_threads
        self._threads = ThreadPoolExecutor(
            num_threads, initializer=partial(torch.set_num_threads, 1) if num_threads > 1 else None
        )
        self._module: nn.Module = learner
        if world.size > 1:
            on = [world.device] if world.device.type == "cuda" else None
            self._module = DistributedDataParallel(learner, device_ids=on, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(learner, settings)
        self._scaler = torch.amp.GradScaler(
            world.device.type,
            init_scale=INITIAL_LOSS_SCALE,
            growth_interval=LOSS_SCALE_WINDOW,
            enabled=learner.dtype == torch.float16,
        )
        self._scaler.scale(torch.zeros((), device=world.device))  # sets itself up, before threads ask it to
        self._updates = 0

    @property
    def loss_scale(self) -> float:
        """See ``Engine.loss_scale``."""
        return self._scaler.get_scale()

    def accumulate_gradients(self, shares: Sequence[Sequence[DeviceMicroBatch]], *, learn: bool) -> Tensor:
        """See ``Engine.compute``."""
        if self.num_threads == 1:
            return sum(
                (self._learn(part, last=part is shares[-1][-1], learn=learn) for share in shares for part in share),
                torch.zeros((), dtype=torch.float64),
            )
        done = list(self._threads.map(partial(self._share, learn=learn), shares))
        for _, gradients in done:  # in the order of the shares, so that a repeated step adds up alike
            for parameter, gradient in zip(self._parameters, gradients, strict=False):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return sum((sums for sums, _ in done), torch.zeros((), dtype=torch.float64))

    def _learn(self, part: DeviceMicroBatch, *, last: bool, learn: bool) -> Tensor:
        """The sums (K,) of the losses of one part; with ``learn`` its gradients are added to the others."""
        if not learn:
            with torch.no_grad():
                return self.model(part.ids, part.positions, part.targets)[1].cpu().double()
        apart = isinstance(self._module, DistributedDataParallel) and not last
        with self._module.no_sync() if apart else nullcontext():  # type: ignore[operator]
            total, sums = self._module(part.ids, part.positions, part.targets)
            # Processes take the mean of their gradients, and the sum is wanted.
            self._scaler.scale(total * self.context.size).backward()
        return sums.cpu().double()

    def _share(self, parts: Sequence[DeviceMicroBatch], *, learn: bool) -> tuple[Tensor, list[Tensor]]:
        """What one thread computes: the sums of its losses, and its gradients."""
        sums, gradients = torch.zeros((), dtype=torch.float64), list[Tensor]()
        with torch.set_grad_enabled(learn):
            for part in parts:
                total, own_sums = self.model(part.ids, part.positions, part.targets)
                sums = sums + own_sums.double()
                if learn:
                    own = torch.autograd.grad(self._scaler.scale(total), self._parameters, materialize_grads=True)
                    gradients = (
                        [first + second for first, second in zip(gradients, own, strict=True)]
                        if gradients
                        else [gradient.contiguous() for gradient in own]
                    )
        return sums, gradients

    def optimizer_step(self, learning_rate: float) -> StepResult:
        """See ``Engine.update``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        scale = self.loss_scale
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.clip_norm).item()
        skipped = not math.isfinite(norm)
        if not skipped or self._scaler.is_enabled():  # which leaves a step out by itself, and then scales less
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self._updates += not skipped
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(gradient_norm=norm, skipped=skipped, loss_scale=scale)

    def export_state(self) -> TrainingState | None:
        """See ``Engine.state``."""
        if not self.context.is_main_process:
            return None
        moments: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, parameter in self._trained.items():
            for moment in ADAM_MOMENTS if parameter in self.optimizer.state else ():
                moments[moment][name] = to_cpu_float32(self.optimizer.state[parameter][moment])
        scaling = self._scaler.state_dict()
        return TrainingState(
            weights={name: to_cpu_float32(parameter) for name, parameter in self._trained.items()},
            moments=dict(moments),
            updates=self._updates,
            loss_scale=float(scaling.get("scale", 1.0)),
            good_steps=int(scaling.get("_growth_tracker", 0)),
        )

    @torch.no_grad()
    def load_state(self, state: TrainingState) -> None:
        """See ``Engine.load``."""
        for name, parameter in self._trained.items():
            parameter.copy_(state.weights[name])
            if state.moments:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.updates), device=parameter.device),
                    **{moment: state.moments[moment][name].to(parameter.device, copy=True) for moment in ADAM_MOMENTS},
                }
        self._updates = state.updates
        if self._scaler.is_enabled():
            scaling = self._scaler.state_dict()
            self._scaler.load_state_dict({**scaling, "scale": state.loss_scale, "_growth_tracker": state.good_steps})
            self._scaler.scale(torch.zeros((), device=self.context.device))

    def close(self) -> None:
        """See ``Engine.close``."""
        self._threads.shutdown()


def to_cpu_float32(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU, which later updates leave alone."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def open_engine(
    learner: TransformerWithLoss,
    settings: TransformerTraining,
    engine: EngineSettings,
    world: DistributedContext,
    num_threads: int | None = None,
) -> Engine:
    """The engine that the settings name, with ``learner`` on the device of ``world``."""
    if engine.checkpointing != "auto":
        learner.transformer.checkpointing = engine.checkpointing
    if engine.name == "torch":
        learner.transformer.to(world.device)
        return TorchEngine(learner, settings, engine, world, num_threads)
    from cogview.training.engines.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(learner, settings, engine, world)
