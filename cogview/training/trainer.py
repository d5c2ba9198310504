"""Training the transformer for a mixture of tasks, on any engine and any number of processes.

A step is a function of the weights, the seed, the step's number and the rows of the store, which ``lessons.py``
arranges. What is random in it is drawn from (seed, step), so that a resumed run repeats it.
"""

# B rows, T places of a row, K kinds of what is told
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogview.checkpoints.checkpoint import Model, read_config, save_model
from cogview.checkpoints.image_tokenizer import write_weights
from cogview.checkpoints.safetensors_io import describe_mismatch
from cogview.config_io import to_mapping
from cogview.data.store import TokenStore
from cogview.device import peak_memory, precision_name
from cogview.errors import InputError
from cogview.files import read_json, write_json
from cogview.kernels.fused_linear_cross_entropy import LossTargets
from cogview.training.distributed import DistributedContext, log_main
from cogview.training.engines.torch_engine import (
    ADAM_MOMENTS,
    MIN_LOSS_SCALE,
    DeviceMicroBatch,
    Engine,
    TrainingState,
    TransformerWithLoss,
    open_engine,
)
from cogview.training.examples import ExampleBuilder, LossKey, MicroBatch, TargetKind, TrainingBatch
from cogview.training.loop import Trainer, Writer
from cogview.training.nonfinite import NonFiniteReport, activation_maxima, first_nonfinite, write_dump
from cogview.training.settings import EngineSettings, TransformerTraining

EVALUATED_ROWS = 1024  # of the held-out store, for each task
MAX_SKIPPED_IN_A_ROW = 50  # steps in a row: more, and nothing is being learnt
RANK_SEED_STRIDE = 1 << 40  # between the seeds of two processes

# Of a checkpoint, beside the model: moments by "exp_avg.NAME", and all else that training goes on from.
MOMENTS_FILE, STATE_FILE = "trainer.safetensors", "trainer.json"


class NonFiniteError(InputError):
    """Training has met a number that is not finite and was to stop there. The weights are those of the step before."""


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """What a run wants to know: how often activations are looked at, what the hardware could do, where dumps go."""

    every: int = 50  # steps
    peak_flops: float | None = None  # of one process, dense, in the precision of the products
    flops_per_token: float = 0.0
    dumps: Path | None = None  # None: nothing is kept of a step that is not finite


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """How an adapter, where that is all that is learnt, is written to a checkpoint and read from it: by parameters."""

    write: Callable[[Path, Mapping[str, Tensor]], None]
    read: Callable[[Path], Mapping[str, Tensor]]


class TransformerTrainer(Trainer[TrainingBatch]):
    """The transformer of ``model`` on an engine, and what a run asks of it.

    ``draw_sheet`` is called in the first process. Checkpoints hold the whole model, or with ``adapter`` that alone.
    """

    def __init__(
        self,
        model: Model,
        settings: TransformerTraining,
        context: DistributedContext,
        dtype: torch.dtype | None = None,
        *,
        engine: EngineSettings | None = None,
        validation_store: TokenStore | None = None,
        draw_sheet: Callable[[Model, Path], None] | None = None,
        adapter: AdapterFiles | None = None,
        monitor: MonitorSettings | None = None,
        num_threads: int | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.context = context
        self.dtype = dtype
        self.validation_store = validation_store
        self.draw_sheet = draw_sheet
        self.adapter = adapter
        self.monitor = monitor or MonitorSettings()
        self.builder = ExampleBuilder(model.config, settings)
        self.vocabulary = model.config.vocabulary
        self.transformer = model.transformer
        self.engine_settings = engine or EngineSettings()
        self.engine: Engine = open_engine(
            TransformerWithLoss(model.transformer, dtype), settings, self.engine_settings, context, num_threads
        )
        self.skipped = 0  # steps in all
        self._skipped_in_a_row = 0
        self._looked_into = False

    @property
    def num_threads(self) -> int:
        """Shares that a batch is to come in."""
        return self.engine.num_threads

    def batch(self, step: int, rows: Mapping[str, np.ndarray]) -> TrainingBatch:
        """``rows`` as the batch of ``step``, arranged by chance as training has it."""
        choices = self.builder.plan_rows(step, *rows["image"].shape)
        return self.builder.build_batch(
            step, rows, choices, num_shards=self.num_threads, micro_batch_size=self.settings.micro_batch_size
        )

    def step(self, step: int, batch: TrainingBatch) -> dict[str, float]:
        """One update; returns the losses in nats per code and per piece, for each task apart."""
        seed = self._seed(step)
        torch.manual_seed(seed)
        self.transformer.train()
        watched: AbstractContextManager[dict[str, float]] = nullcontext({})
        if (step + 1) % self.monitor.every == 0:
            watched = activation_maxima(self.transformer)
        with watched as activations:
            figures = self.losses(batch, learn=True)
        rate = self.settings.learning_rate_at(step)
        update = self.engine.optimizer_step(rate)
        self.skipped += update.skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if update.skipped else 0
        if update.skipped:
            self._handle_skipped_step(batch, seed, figures, update.loss_scale)
        if self.skipped:
            figures["skipped_steps"] = float(self.skipped)
        if self.dtype == torch.float16:
            figures["loss_scale"] = update.loss_scale
        norm = {} if update.skipped else {"gradient_norm": update.gradient_norm}
        return {**figures, **norm, "learning_rate": rate, **activations}

    def throughput_metrics(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOP/s utilisation, where the peak is known, and the most memory that was taken."""
        figures = {}
        if memory := peak_memory(self.context.device):
            figures["memory_bytes"] = memory
        if self.monitor.peak_flops:
            peak = self.monitor.peak_flops * self.context.size
            figures["mfu"] = tokens_per_second * self.monitor.flops_per_token / peak
        return figures

    def losses(self, batch: TrainingBatch, *, learn: bool = False) -> dict[str, float]:
        """Mean cross-entropy of each task's image codes, text pieces and names, and ``loss``, the sum that is learnt.

        Each kind of id competes with its own kind alone. A task counts in ``loss`` as its share of the rows has it.
        With ``learn`` gradients are added up. Means are those of all processes.
        """
        totals = self.context.all_reduce_sum(
            np.concatenate([batch.target_counts, batch.rows_by_task, [batch.num_tokens]])
        )
        num_keys = len(batch.keys)
        counts = dict(zip(batch.keys, totals[:num_keys].tolist(), strict=True))
        rows_of = dict(zip(self.settings.tasks, totals[num_keys:-1].tolist(), strict=True))
        num_rows = sum(rows_of.values())
        worth = {key: rows_of[key[0]] / num_rows * self._loss_weight(*key) for key, count in counts.items() if count}
        weights = {key: worth[key] / counts[key] for key in worth}  # of one place
        shares = [[self._to_device(part, weights) for part in share] for share in batch.thread_shards]
        sums = dict(
            zip(
                worth,
                self.context.all_reduce_sum(self.engine.accumulate_gradients(shares, learn=learn).numpy()).tolist(),
                strict=True,
            )
        )
        means = {key: total / counts[key] for key, total in sums.items()}
        loss = sum((worth[key] * mean for key, mean in means.items()), 0.0)
        return {"loss": loss, **{_metric_name(*key): mean for key, mean in means.items()}, "tokens": float(totals[-1])}

    def to_device(self, batch: TrainingBatch) -> list[list[DeviceMicroBatch]]:
        """``batch`` on the device, where each kind of what this process is told counts as much as any other."""
        weights = {key: 1 / count for key, count in zip(batch.keys, batch.target_counts.tolist(), strict=True) if count}
        return [[self._to_device(part, weights) for part in share] for share in batch.thread_shards]

    def _to_device(self, part: MicroBatch, weights: Mapping[LossKey, float]) -> DeviceMicroBatch:
        """``part`` on the device, where one place of each of K kinds weighs so much."""
        device = self.context.device
        targets = []
        for (task, told), weight in weights.items():
            places, right = part.targets[task, told]
            targets.append(
                LossTargets(
                    ids=self._competing_ids(told),
                    positions_M=torch.from_numpy(places).to(device),
                    targets_M=torch.from_numpy(right).to(device),
                    weights_M=torch.full(places.shape, weight, dtype=torch.float32, device=device),
                )
            )
        ids, positions = (torch.from_numpy(array).to(device) for array in (part.inputs, part.positions))
        return DeviceMicroBatch(ids=ids, positions=positions, targets=targets)

    def _competing_ids(self, told: TargetKind) -> range:
        """The ids that compete where ``told`` is learnt."""
        if told == TargetKind.IMAGE:
            return self.vocabulary.image
        # A text may end in a command, so commands compete with the pieces.
        return (
            self.vocabulary.text if told == TargetKind.NAME else range(self.vocabulary.text.start, self.vocabulary.size)
        )

    def _loss_weight(self, task: str, told: TargetKind) -> float:
        if told == TargetKind.NAME:
            return self.settings.name_loss_weight
        return self.settings.text_loss_weight if (task, told) == ("generate", TargetKind.TEXT) else 1.0

    def _seed(self, step: int) -> int:
        return self.settings.seed * 1_000_003 + step + self.context.rank * RANK_SEED_STRIDE

    def _handle_skipped_step(
        self, batch: TrainingBatch, seed: int, figures: dict[str, float], loss_scale: float
    ) -> None:
        """After a step that was left out: find out why if that is news; NonFiniteError if that is the end."""
        step = batch.step
        if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"step {step}: no gradient was finite in the last {self._skipped_in_a_row} steps; lower the learning "
                "rate, or resume earlier"
            )
        if self.dtype == torch.float16 and math.isfinite(figures["loss"]) and loss_scale > MIN_LOSS_SCALE:
            return  # too large a loss scale, which is now smaller
        what = "gradient" if math.isfinite(figures["loss"]) else "loss"
        message = f"step {step}: the {what} is not finite"
        if not self._looked_into:
            self._looked_into = True
            message += self._diagnose_nonfinite(batch, seed)
        if self.settings.nonfinite == "stop":
            raise NonFiniteError(
                f"{message}; lower the learning rate, resume earlier, or go on without such steps: nonfinite: skip"
            )
        log_main(f"{message}; skipped", self.context)
        for name in [name for name, value in figures.items() if not math.isfinite(value)]:
            del figures[name]

    def _diagnose_nonfinite(self, batch: TrainingBatch, seed: int) -> str:
        """What is said of the first step that is not finite; all that it takes to see it again is kept."""
        finding = first_nonfinite(self.engine, self.to_device(batch), seed)
        first = int(self.context.all_reduce_max(-1.0 if finding is None else self.context.size - self.context.rank))
        said = [f" in process {self.context.size - first}" if first > 0 and self.context.size > 1 else ""]
        if first > 0:
            own = finding is not None and self.context.size - self.context.rank == first
            rank = self.context.size - first
            said.append(f", first in {self._from_rank(str(finding) if own else '', rank)}")
        if self.monitor.dumps is not None:
            said.append(self._write_dump(batch, seed, finding, self.monitor.dumps / f"step-{batch.step:08d}"))
        return "".join(said)

    def _write_dump(self, batch: TrainingBatch, seed: int, finding: NonFiniteReport | None, folder: Path) -> str:
        """Write all that it takes to see a step again; what is to be said of it."""
        rank, size = self.context.rank, self.context.size
        write = self.snapshot()
        try:
            write_dump(folder, batch, finding, rank=rank, processes=size, seed=seed)
            if write is not None:
                write(folder / "model")
                kept = {"training": to_mapping(self.settings), "dtype": precision_name(self.dtype)}
                write_json(folder / "settings.json", kept)
        except (OSError, SafetensorError) as error:  # a full disk, say
            return f" (it could not be kept in {folder}: {error})"
        look_again = f", look again with: cogview doctor --dump {folder}" if self.adapter is None else ""
        return f"; the batch and the weights are kept in {folder}{look_again}"

    def _from_rank(self, text: str, rank: int) -> str:
        """``text`` of process ``rank``, for all."""
        width = 512
        own = np.zeros(width, dtype=np.int64)
        if self.context.rank == rank:
            encoded = text.encode()[:width]
            own[: len(encoded)] = list(encoded)
        return bytes(self.context.all_reduce_sum(own).tolist()).rstrip(b"\0").decode(errors="replace")

    def snapshot(self) -> Writer | None:
        """What writes a checkpoint of now: a folder that opens by itself, with the trainer's state beside the model."""
        state = self.engine.export_state()
        if state is None:
            return None
        skipped, model = self.skipped, self.model

        def write(folder: Path) -> None:
            if self.adapter is not None:
                self.adapter.write(folder, state.weights)
            else:
                save_model(folder, model, weights=state.weights)
            moments = {
                f"{moment}.{name}": value for moment, own in state.moments.items() for name, value in own.items()
            }
            write_weights(folder / MOMENTS_FILE, moments)
            content = {
                "engine": self.engine_settings.name,
                "processes": self.context.size,
                "updates": state.updates,
                "loss_scale": state.loss_scale,
                "good_steps": state.good_steps,
                "skipped_steps": skipped,
            }
            write_json(folder / STATE_FILE, content)

        return write

    def load(self, folder: Path) -> None:
        """Take up weights and optimizer from a checkpoint of any engine and any number of processes.

        InputError, in one process, where it belongs to other codes or has other shapes, or cannot be read there.
        """
        state, skipped = self.context.run_everywhere(lambda: self._stored(folder))
        self.engine.load_state(state)
        self.skipped = skipped

    def _stored(self, folder: Path) -> tuple[TrainingState, int]:
        """The state in a checkpoint, and the steps skipped by then; its tensors are read when they are asked for."""
        if self.adapter is None and read_config(folder).codebook_sha256 != self.model.config.codebook_sha256:
            raise InputError("it was trained on the codes of another image tokenizer")
        content = read_state(folder)
        wanted = {name: whole_shape(parameter) for name, parameter in self.engine.model.trained_parameters().items()}
        weights: Mapping[str, Tensor]
        weights = StoredTensors(folder / "model.safetensors") if self.adapter is None else self.adapter.read(folder)
        moments = {moment: StoredTensors(folder / MOMENTS_FILE, f"{moment}.") for moment in ADAM_MOMENTS}
        for stored in (weights, *(own for own in moments.values() if len(own))):
            if problem := describe_mismatch(wanted, shapes_of(stored)):
                raise InputError(problem)
        state = TrainingState(
            weights=weights,
            moments=moments if all(map(len, moments.values())) else {},
            updates=content["updates"],
            loss_scale=content["loss_scale"],
            good_steps=content["good_steps"],
        )
        return state, content["skipped_steps"]

    @torch.no_grad()
    def evaluate(self, step: int, folder: Path) -> dict[str, float]:
        """Losses on the held-out store, and a sheet of pictures.

        ``held_out_loss`` is what training minimises, of the tasks by their shares.
        """
        self.transformer.eval()
        figures: dict[str, float] = {}
        if self.validation_store is not None:
            whole = sum(self.settings.tasks.values())
            figures["held_out_loss"] = 0.0
            for task, share in self.settings.tasks.items():
                losses = self.store_losses(self.validation_store, task, EVALUATED_ROWS)
                figures["held_out_loss"] += share / whole * losses.pop("loss")
                figures |= {f"held_out_{name}": value for name, value in losses.items()}
        if self.draw_sheet is not None:
            transformer = self.engine.whole_transformer()
            if transformer is not None:
                own = transformer is self.transformer
                model = self.model if own else replace(self.model, transformer=transformer)
                self.draw_sheet(model, folder / f"step-{step:08d}.png")
                transformer.packed_layers = None  # weights in another order, which the next step makes old
            self.context.barrier()
        return figures

    def store_losses(self, store: TokenStore, task: str, count: int, *, hidden: bool = False) -> dict[str, float]:
        """Mean losses of the first ``count`` rows of ``store``, all for ``task``; ``loss`` is what is learnt of them.

        With ``hidden`` every code of the image that is drawn is told without having seen another.
        """
        count = min(len(store), count)
        sums: dict[str, float] = {}
        for start in range(0, count, self.settings.batch_size):
            numbers = np.arange(start, min(start + self.settings.batch_size, count))
            own = numbers[self.context.rank :: self.context.size]
            batch = self.builder.validation_batch(store, task, own if len(own) else numbers[:1], hidden=hidden)
            batch = batch if len(own) else batch.as_padding()
            for name, loss in self.losses(batch).items():
                sums[name] = sums.get(name, 0.0) + loss * len(numbers) / count
        del sums["tokens"]
        return sums

    def close(self) -> None:
        """Let go of the engine, and of the held-out store's file."""
        self.engine.close()
        if self.validation_store is not None:
            self.validation_store.close()


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file whose names begin with ``prefix``, by the rest; read when they are asked for."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._prefix = prefix
        try:
            self._file = safe_open(path, "pt")
            self._names = [name for name in self._file.keys() if name.startswith(prefix)]  # noqa: SIM118 it is no dict
        except (SafetensorError, FileNotFoundError) as error:
            raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of all tensors, which are not read."""
        return {name.removeprefix(self._prefix): tuple(self._file.get_slice(name).get_shape()) for name in self._names}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name; those in a file are not read for it."""
    if isinstance(tensors, StoredTensors):
        return tensors.shapes()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_state(folder: Path) -> dict[str, Any]:
    """What training goes on from besides tensors; InputError where a folder holds a model alone."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} holds a model but no state of a training to go on with ({STATE_FILE} is missing): begin from "
            f"its weights with --init-from {folder}"
        )
    content: dict[str, Any] = read_json(path)
    return content


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, which in ZeRO stage 3 it does not have itself."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _metric_name(task: str, told: TargetKind) -> str:
    """The name of a loss in the metrics, such as ``generate_image_loss``."""
    return f"{task}_{told.value}_loss"
