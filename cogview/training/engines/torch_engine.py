"""The engine of plain torch: one process with threads, or several with DistributedDataParallel."""

# K kinds of targets
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cogview.training.distributed import DistributedContext
from cogview.training.engines.base import (
    ADAM_MOMENTS,
    INITIAL_LOSS_SCALE,
    LOSS_SCALE_WINDOW,
    DeviceMicroBatch,
    Engine,
    StepResult,
    TrainingState,
    TransformerWithLoss,
    compile_layers,
    make_optimizer,
    to_cpu_float32,
)
from cogview.training.settings import EngineSettings, TransformerTraining

CLIP_EPSILON = 1e-6  # that PyTorch adds to the norm


class TorchEngine(Engine):
    """One process, or several with a full copy of the weights each, in float32 under autocast.

    On a CPU, one process computes the shards of a batch in ``num_threads`` threads, which synchronize once per step.
    Threads inside each matrix product would synchronize hundreds of times per step
    (``scripts/benchmarks/training_step.py threads``).
    """

    name = "torch"

    def __init__(
        self,
        model: TransformerWithLoss,
        training: TransformerTraining,
        settings: EngineSettings,
        context: DistributedContext,
        num_threads: int | None = None,
    ) -> None:
        """Wrap a model that is on the device of ``context``; see ``open_engine``."""
        self.model = model
        self.context = context
        self.training = training
        self._trained = model.trained_parameters()
        self._parameters = list(self._trained.values())
        if settings.compile:
            compile_layers(model.transformer)
        if num_threads is None:
            # Dropout, also that of an adapter, draws from one generator, so its threads would have to run in a fixed
            # order. One thread draws the same masks for the same seed, step and rows.
            drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
            single = context.device.type != "cpu" or context.size > 1 or drops
            num_threads = 1 if single else torch.get_num_threads()
        self.num_threads = num_threads
        self._threads = ThreadPoolExecutor(
            num_threads, initializer=partial(torch.set_num_threads, 1) if num_threads > 1 else None
        )
        self._module: nn.Module = model
        if context.size > 1:
            devices = [context.device] if context.device.type == "cuda" else None
            self._module = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(model, training)
        self._scaler = torch.amp.GradScaler(
            context.device.type,
            init_scale=INITIAL_LOSS_SCALE,
            growth_interval=LOSS_SCALE_WINDOW,
            enabled=model.dtype == torch.float16,
        )
        self._scaler.scale(torch.zeros((), device=context.device))  # initializes itself, before threads use it
        self._updates = 0

    @property
    def loss_scale(self) -> float:
        """Factor of the loss; see ``Engine.loss_scale``."""
        return self._scaler.get_scale()

    def accumulate_gradients(self, shards: Sequence[Sequence[DeviceMicroBatch]], *, learn: bool) -> Tensor:
        """Compute losses and gradients; see ``Engine.accumulate_gradients``.

        Args:
            shards: Micro-batches of each thread.
            learn: Whether to accumulate gradients.

        Returns:
            Sums (K,) of the losses of each kind, float64 on the CPU.
        """
        if self.num_threads == 1:
            parts = [part for shard in shards for part in shard]
            return sum(
                (self._accumulate(part, last=part is parts[-1], learn=learn) for part in parts),
                torch.zeros((), dtype=torch.float64),
            )
        done = list(self._threads.map(partial(self._compute_shard, learn=learn), shards))
        for _, gradients in done:  # in the order of the shards, so that a repeated step rounds alike
            for parameter, gradient in zip(self._parameters, gradients, strict=False):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return sum((sums for sums, _ in done), torch.zeros((), dtype=torch.float64))

    def _accumulate(self, part: DeviceMicroBatch, *, last: bool, learn: bool) -> Tensor:
        """Return the losses (K,) of one micro-batch; with ``learn``, add its gradients to the others."""
        if not learn:
            with torch.no_grad():
                sums: Tensor = self.model(part)[1]
            return sums.cpu().double()
        local = isinstance(self._module, DistributedDataParallel) and not last
        with self._module.no_sync() if local else nullcontext():  # type: ignore[operator]
            total, sums = self._module(part)
            # DistributedDataParallel averages the gradients of all processes; the sum is wanted.
            self._scaler.scale(total * self.context.size).backward()
        return sums.cpu().double()

    def _compute_shard(self, shard: Sequence[DeviceMicroBatch], *, learn: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the losses (K,) and the gradients of the micro-batches of one thread."""
        sums, gradients = torch.zeros((), dtype=torch.float64), list[Tensor]()
        with torch.set_grad_enabled(learn):
            for part in shard:
                total, losses = self.model(part)
                sums = sums + losses.double()
                if learn:
                    added = torch.autograd.grad(self._scaler.scale(total), self._parameters, materialize_grads=True)
                    gradients = (
                        [first + second for first, second in zip(gradients, added, strict=True)]
                        if gradients
                        else [gradient.contiguous() for gradient in added]
                    )
        return sums, gradients

    def optimizer_step(self, learning_rate: float) -> StepResult:
        """Update the weights; see ``Engine.optimizer_step``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        scale = self.loss_scale
        self._scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        total_norm = torch.nn.utils.get_total_norm(gradients)
        norm, limit = total_norm.item(), self.training.clip_norm or math.inf
        if not norm + CLIP_EPSILON <= limit:  # otherwise each gradient would be read and multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, total_norm)
        skipped = not math.isfinite(norm)
        if not skipped or self._scaler.is_enabled():  # the scaler skips such a step itself, and lowers the scale
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self._updates += not skipped
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(gradient_norm=norm, skipped=skipped, loss_scale=scale)

    def export_state(self) -> TrainingState | None:
        """Return a copy of the state; see ``Engine.export_state``."""
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
        """Load a state; see ``Engine.load_state``."""
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
        """Stop the threads."""
        self._threads.shutdown()
