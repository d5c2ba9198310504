"""The engine of DeepSpeed: ZeRO stages 1 to 3 (arXiv:1910.02054), with the optimizer on the host on request.

Clipping, gradients that are not finite, and the time of reductions are configured explicitly, since DeepSpeed's
defaults changed between versions. This engine counts skipped steps itself, since DeepSpeed does not report them in
bfloat16. DeepSpeed's checkpoints belong to one stage and one number of processes. Those of this toolkit belong to none:
parameters are read and written one by one through whole tensors (``deepspeed.utils.safe_get_full_*``).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cogview.errors import InputError
from cogview.modeling.transformer import Transformer
from cogview.planning.training import REDUCE_BUCKET
from cogview.process_variables import number_variable
from cogview.training.distributed import DistributedContext
from cogview.training.engines.base import (
    ADAM_MOMENTS,
    INITIAL_LOSS_SCALE,
    LOSS_SCALE_WINDOW,
    MIN_LOSS_SCALE,
    DeviceMicroBatch,
    Engine,
    StepResult,
    TrainingState,
    TransformerWithLoss,
    compile_layers,
    make_optimizer,
    to_cpu_float32,
)
from cogview.training.engines.deepspeed_extensions import SHARED_MEMORY_EXTENSION, remove_stale_locks
from cogview.training.settings import EngineSettings, TransformerTraining


class DeepSpeedEngine(Engine):
    """A DeepSpeed engine: weights in the dtype of the products, master weights and moments in float32."""

    name = "deepspeed"

    def __init__(
        self,
        model: TransformerWithLoss,
        training: TransformerTraining,
        settings: EngineSettings,
        context: DistributedContext,
    ) -> None:
        """Initialize DeepSpeed around ``model``; see ``open_engine``."""
        deepspeed = context.run_everywhere(lambda: import_deepspeed(model.dtype, context.device))
        if number_variable("LOCAL_RANK", 0) == 0:  # one process of each machine
            remove_stale_locks()
        context.barrier()
        self.model = model
        self.context = context
        self.stage = settings.zero
        self._trained = model.trained_parameters()
        if settings.compile:
            compile_layers(model.transformer)
        num_trained = sum(math.prod(parameter.shape) for parameter in self._trained.values())
        self._shell = _without_weights(model.transformer) if settings.zero == 3 else None
        initial = {name: to_cpu_float32(parameter) for name, parameter in self._trained.items()}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model, training),
            config=configuration(training, settings, context, model.dtype, num_trained),
            dist_init_required=False,
        )
        self._scaler = self._engine.optimizer.loss_scaler if model.dtype == torch.float16 else None
        self._allocate_moments()
        for name, parameter in self._trained.items():  # DeepSpeed made the master weights from rounded ones
            self._set(parameter, initial[name])

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The AdamW inside; its parameters are this process's flat partitions of the float32 master weights."""
        inner: torch.optim.Optimizer = self._engine.basic_optimizer
        return inner

    @property
    def loss_scale(self) -> float:
        """Factor of the loss; see ``Engine.loss_scale``."""
        return 1.0 if self._scaler is None else float(self._scaler.cur_scale)

    def accumulate_gradients(self, shards: Sequence[Sequence[DeviceMicroBatch]], *, learn: bool) -> Tensor:
        """Compute losses and gradients; see ``Engine.accumulate_gradients``.

        All processes compute the same number of micro-batches, since each one exchanges weights and gradients.

        Args:
            shards: Micro-batches of this process.
            learn: Whether to accumulate gradients.

        Returns:
            Sums (K,) of the losses of each kind, float64 on the CPU.
        """
        parts = [part for shard in shards for part in shard]
        missing = int(self.context.all_reduce_max(len(parts))) - len(parts)
        parts += [parts[-1].without_targets()] * missing
        sums = torch.zeros((), dtype=torch.float64)
        for part in parts:
            with torch.set_grad_enabled(learn):
                total, losses = self._engine(part)
            if learn:  # DeepSpeed averages over processes; the sum is wanted
                self._engine.backward(total * self.context.size)
            sums = sums + losses.cpu().double()
        return sums

    def optimizer_step(self, learning_rate: float) -> StepResult:
        """Update the weights; see ``Engine.optimizer_step``."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        scale = self.loss_scale
        before = self._engine.skipped_steps
        self._engine.step()
        skipped = self._engine.skipped_steps > before
        norm = self._engine.get_global_grad_norm()
        return StepResult(
            gradient_norm=math.inf if skipped or norm is None else float(norm), skipped=skipped, loss_scale=scale
        )

    def export_state(self) -> TrainingState | None:
        """Return a copy of the state; see ``Engine.export_state``.

        All processes gather one parameter after another; only the main process keeps it.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in ADAM_MOMENTS}
        updates = self._updates
        for name, parameter in self._trained.items():
            for kept, whole in (
                (weights, safe_get_full_fp32_param(parameter)),
                *(
                    (moments[moment], safe_get_full_optimizer_state(parameter, moment))
                    for moment in ADAM_MOMENTS
                    if updates
                ),
            ):
                if self.context.is_main_process:
                    kept[name] = to_cpu_float32(whole)
        if not self.context.is_main_process:
            return None
        return TrainingState(
            weights=weights,
            moments=moments if updates else {},
            updates=updates,
            loss_scale=self.loss_scale,
            good_steps=0 if self._scaler is None else self._scaler.cur_iter - self._scaler.last_overflow_iter,
        )

    @property
    def _updates(self) -> int:
        """Number of updates that Adam has made."""
        steps = [int(state["step"]) for state in self._adam.state.values()]
        return max(steps, default=0)

    @torch.no_grad()
    def load_state(self, state: TrainingState) -> None:
        """Load a state; see ``Engine.load_state``."""
        for adam in self._adam.state.values():
            adam["step"].fill_(state.updates)
        for name, parameter in self._trained.items():
            with self._whole([parameter], writing=True):
                parameter.copy_(state.weights[name])
            self._set(parameter, state.weights[name])
            for moment in ADAM_MOMENTS if state.moments else ():
                self._set(parameter, state.moments[moment][name], moment)
        if self._scaler is not None:
            self._scaler.cur_scale = state.loss_scale
            self._scaler.last_overflow_iter = self._scaler.cur_iter - state.good_steps

    def _allocate_moments(self) -> None:
        """Allocate Adam's moments as zeros, so that they can be read and set before the first update.

        DeepSpeed looks them up only once, after updating the first parameter group, when those of the other groups do
        not exist yet.
        """
        zero = self._engine.optimizer
        flat = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        for masters in flat if self.stage < 3 else zero.fp32_partitioned_groups_flat:
            self._adam.state[masters] = {
                "step": torch.zeros((), device=masters.device),
                **{moment: torch.zeros_like(masters) for moment in ADAM_MOMENTS},
            }
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Set this process's partition of the master weight of ``parameter``, or of its ``moment``, from ``value``."""
        from deepspeed import utils

        value = value.to(self.context.device)
        if self.stage < 3:
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)
            return
        # DeepSpeed's setter of whole tensors ignores that the last partition is padded with zeros.
        part = utils.safe_get_local_fp32_param(parameter).numel()
        flat = torch.zeros(part * self.context.size, device=value.device)
        flat[: value.numel()] = value.flatten()
        local = flat[self.context.rank * part :][:part]
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, local)
        else:
            utils.safe_set_local_optimizer_state(parameter, local, moment)

    def whole_transformer(self) -> Transformer | None:
        """Return a transformer with all its weights; see ``Engine.whole_transformer``.

        In stage 3 it is a copy, since DeepSpeed releases gathered weights after use.
        """
        if self._shell is None:
            return super().whole_transformer()
        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.transformer.named_parameters():
            with self._whole([parameter]):
                if self.context.is_main_process:
                    weights[name] = parameter.detach().clone()
        if not self.context.is_main_process:
            return None
        whole = copy.deepcopy(self._shell)
        whole.load_state_dict(weights, assign=True)
        return whole.eval()

    @contextmanager
    def _whole(self, parameters: Sequence[nn.Parameter], *, writing: bool = False) -> Iterator[None]:
        """Gather ``parameters`` within the block; with ``writing``, broadcast writes of the main process."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if writing else None):
            yield

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks."""
        self._engine.destroy()


def configuration(
    training: TransformerTraining,
    settings: EngineSettings,
    context: DistributedContext,
    dtype: torch.dtype | None,
    num_trained: int = REDUCE_BUCKET,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        training: Settings of the optimizer.
        settings: The engine's settings; the sections of ``settings.config`` override those of this function.
        context: The processes that train together.
        dtype: Dtype of matrix products; None for float32.
        num_trained: Number of trained parameters; gradient buckets need not be larger.
    """
    config: dict[str, Any] = {
        # The trainer decides where a step ends: the number of its micro-batches depends on the rows.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": context.size,
        "gradient_clipping": training.clip_norm or 0.0,  # 0 turns it off
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # PyTorch's fused AdamW
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": settings.zero,
            "contiguous_gradients": True,
            "reduce_bucket_size": min(num_trained, REDUCE_BUCKET),
            "overlap_comm": context.device.type == "cuda",
        },
    }
    if settings.offload:
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": context.device.type == "cuda",
        }
    if dtype is not None:
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # a large batch has many micro-batches
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if dtype == torch.float16:
        config["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": int(math.log2(INITIAL_LOSS_SCALE)),
            "loss_scale_window": LOSS_SCALE_WINDOW,
            "hysteresis": 1,
            "min_loss_scale": MIN_LOSS_SCALE,
        }
    for key, value in settings.config.items():
        default = config.get(key)
        config[key] = {**default, **value} if isinstance(default, dict) and isinstance(value, dict) else value
    return config


def import_deepspeed(dtype: torch.dtype | None, device: torch.device) -> Any:
    """Return the package ``deepspeed``.

    Args:
        dtype: Dtype of matrix products; None for float32.
        device: Device of this process.

    Raises:
        InputError: The package is missing, or cannot compute in ``dtype`` on ``device``.
    """
    if dtype == torch.float16 and device.type == "cpu":
        raise InputError(
            "DeepSpeed has no float16 on a CPU: set precision: bfloat16 or float32, or name: torch in engine"
        )
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f"the recipe's engine is deepspeed, which cannot be imported ({error}): pip install 'cogview[deepspeed]', "
            "or set name: torch in engine"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":  # DeepSpeed compiles it for minutes, and calls it only for inference
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_EXTENSION] = False
    return deepspeed


def _without_weights(transformer: Transformer) -> Transformer:
    """Return a copy whose parameters are on the meta device."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in transformer.parameters()
    }
    return copy.deepcopy(transformer, empty)
