"""DeepSpeed below the trainer: ZeRO stages 1 to 3 (arXiv:1910.02054), with the optimizer on the host where wanted.

What DeepSpeed would decide by itself is said explicitly, since its defaults changed between versions: clipping, what
happens to gradients that are not finite, and when gradients are reduced. A step that it skips is counted here, for it
says nothing of it in bfloat16. Its own checkpoints belong to a stage and a number of processes; ours do not, and are
read and written parameter by parameter through its access to whole tensors (``deepspeed.utils.safe_get_full_*``).
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
from cogview.training.distributed import DistributedContext
from cogview.training.engines.torch_engine import (
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
from cogview.training.settings import EngineSettings, TransformerTraining


class DeepSpeedEngine(Engine):
    """A DeepSpeed engine around ``learner``: weights in the dtype of its products, masters and moments in float32."""

    def __init__(
        self,
        learner: TransformerWithLoss,
        settings: TransformerTraining,
        engine: EngineSettings,
        world: DistributedContext,
    ) -> None:
        deepspeed = world.run_everywhere(lambda: import_deepspeed(learner.dtype, world.device))
        self.model = learner
        self.context = world
        self.stage = engine.zero
        self._trained = learner.trained_parameters()
        if engine.compile:
            compile_layers(learner.transformer)
        shapes = [parameter.shape for parameter in self._trained.values()]
        self._shell = _without_weights(learner.transformer) if engine.zero == 3 else None
        first = {name: to_cpu_float32(parameter) for name, parameter in self._trained.items()}
        self._engine, *_ = deepspeed.initialize(
            model=learner,
            optimizer=make_optimizer(learner, settings),
            config=configuration(settings, engine, world, learner.dtype, sum(map(math.prod, shapes))),
            dist_init_required=False,
        )
        self._scale = self._engine.optimizer.loss_scaler if learner.dtype == torch.float16 else None
        self._make_moments()
        for name, parameter in self._trained.items():  # the masters were made from what was rounded already
            self._set(parameter, first[name])

    @property
    def _basic(self) -> torch.optim.Optimizer:
        """The AdamW inside, whose parameters are what this process keeps of the float32 masters, flat."""
        inner: torch.optim.Optimizer = self._engine.basic_optimizer
        return inner

    @property
    def loss_scale(self) -> float:
        """See ``Engine.loss_scale``."""
        return 1.0 if self._scale is None else float(self._scale.cur_scale)

    def accumulate_gradients(self, shares: Sequence[Sequence[DeviceMicroBatch]], *, learn: bool) -> Tensor:
        """See ``Engine.compute``. Every process computes as many parts, since weights and gradients travel in each."""
        parts = [part for share in shares for part in share]
        missing = int(self.context.all_reduce_max(len(parts))) - len(parts)
        parts += [parts[-1].without_targets()] * missing
        sums = torch.zeros((), dtype=torch.float64)
        for part in parts:
            with torch.set_grad_enabled(learn):
                total, own = self._engine(part.ids, part.positions, part.targets)
            if learn:  # DeepSpeed takes the mean over processes, and the sum is wanted
                self._engine.backward(total * self.context.size)
            sums = sums + own.cpu().double()
        return sums

    def optimizer_step(self, learning_rate: float) -> StepResult:
        """See ``Engine.update``."""
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
        """See ``Engine.state``. One parameter after another is gathered, and kept by the first process alone."""
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
            good_steps=0 if self._scale is None else self._scale.cur_iter - self._scale.last_overflow_iter,
        )

    @property
    def _updates(self) -> int:
        """How many updates Adam has made."""
        steps = [int(state["step"]) for state in self._basic.state.values()]
        return max(steps, default=0)

    @torch.no_grad()
    def load_state(self, state: TrainingState) -> None:
        """See ``Engine.load``."""
        for adam in self._basic.state.values():
            adam["step"].fill_(state.updates)
        for name, parameter in self._trained.items():
            with self._whole([parameter], writing=True):
                parameter.copy_(state.weights[name])
            self._set(parameter, state.weights[name])
            for moment in ADAM_MOMENTS if state.moments else ():
                self._set(parameter, state.moments[moment][name], moment)
        if self._scale is not None:
            self._scale.cur_scale = state.loss_scale
            self._scale.last_overflow_iter = self._scale.cur_iter - state.good_steps

    def _make_moments(self) -> None:
        """Have Adam hold its moments, all 0, from the start, so that they can be told and set at any time.

        DeepSpeed looks them up after the update of the first group of parameters, when those of the others are not
        there yet, and never again.
        """
        zero = self._engine.optimizer
        flat = [parameter for group in self._basic.param_groups for parameter in group["params"]]
        for masters in flat if self.stage < 3 else zero.fp32_partitioned_groups_flat:
            self._basic.state[masters] = {
                "step": torch.zeros((), device=masters.device),
                **{moment: torch.zeros_like(masters) for moment in ADAM_MOMENTS},
            }
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Set this process's part of the master of ``parameter``, or of its ``moment``, from the whole ``value``."""
        from deepspeed import utils

        value = value.to(self.context.device)
        if self.stage < 3:
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)
            return
        # Its setter of whole tensors leaves out that the last process's part is filled up with zeros.
        part = utils.safe_get_local_fp32_param(parameter).numel()
        flat = torch.zeros(part * self.context.size, device=value.device)
        flat[: value.numel()] = value.flatten()
        own = flat[self.context.rank * part :][:part]
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, own)
        else:
            utils.safe_set_local_optimizer_state(parameter, own, moment)

    def whole_transformer(self) -> Transformer | None:
        """See ``Engine.whole_transformer``. In stage 3 it is a copy, since weights leave as soon as they were used."""
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
        """Inside, ``parameters`` are whole; with ``writing`` all take over what the first process writes."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if writing else None):
            yield

    def close(self) -> None:
        """See ``Engine.close``."""
        self._engine.destroy()


def configuration(
    settings: TransformerTraining,
    engine: EngineSettings,
    world: DistributedContext,
    dtype: torch.dtype | None,
    trained: int = REDUCE_BUCKET,
) -> dict[str, Any]:
    """DeepSpeed's configuration; what the recipe has in ``engine.config`` goes over it, section by section.

    ``trained`` is how many parameters are learnt: buckets for their gradients need not be larger.
    """
    config: dict[str, Any] = {
        # The trainer says where a step ends: its parts are as many as the rows of the step ask for.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        "gradient_clipping": settings.clip_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # PyTorch's fused AdamW
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": engine.zero,
            "contiguous_gradients": True,
            "reduce_bucket_size": min(trained, REDUCE_BUCKET),
            "overlap_comm": world.device.type == "cuda",
        },
    }
    if engine.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    if dtype is not None:
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # parts of a large batch are many
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
    for key, value in engine.config.items():
        ours = config.get(key)
        config[key] = {**ours, **value} if isinstance(ours, dict) and isinstance(value, dict) else value
    return config


def import_deepspeed(dtype: torch.dtype | None, device: torch.device) -> Any:
    """The package; InputError where it is missing, or cannot compute in ``dtype`` on ``device``."""
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
    return deepspeed


def _without_weights(transformer: Transformer) -> Transformer:
    """A copy whose parameters take no memory."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in transformer.parameters()
    }
    return copy.deepcopy(transformer, empty)
