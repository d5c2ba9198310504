"""The trainer of the transformer for a mixture of tasks, on any engine and any number of processes.

A step is a function of the weights, the seed, the index of the step and the rows of the store. Random numbers are drawn
from (seed, step), so that a resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cogview.checkpoints.checkpoint import Model, read_config, save_model
from cogview.data.store import TokenStore
from cogview.device import peak_memory
from cogview.training.engines.base import Engine, TrainingState
from cogview.training.example_builder import ExampleBuilder
from cogview.training.examples import Rows, TargetKind, TrainingBatch
from cogview.training.loop import Trainer
from cogview.training.nonfinite import NonFiniteGuard, activation_maxima
from cogview.training.run_folder import Writer, warn_if_unwritten
from cogview.training.settings import TransformerTraining
from cogview.training.target_weighting import TargetWeighting
from cogview.training.trainer_state import (
    AdapterFiles,
    StateMismatchError,
    StoredTensors,
    check_stored,
    read_state,
    stored_state,
    whole_shape,
    write_state,
)

EVALUATED_ROWS = 1024  # rows of the validation store for each task
RANK_SEED_STRIDE = 1 << 40  # between the seeds of two processes


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """Monitoring of a run.

    Attributes:
        every: Interval of the activation maxima, in steps.
        peak_flops: Dense peak of one process in the dtype of its matrix products, in FLOP/s; None if unknown.
        flops_per_token: FLOPs of training on one token.
        dumps: Folder of dumps of steps that are not finite; None keeps none.
    """

    every: int = 50
    peak_flops: float | None = None
    flops_per_token: float = 0.0
    dumps: Path | None = None


class TransformerTrainer(Trainer[TrainingBatch]):
    """Trains the transformer of a model on an engine.

    Checkpoints hold the whole model or, with ``adapter``, the adapter alone.
    """

    def __init__(
        self,
        model: Model,
        settings: TransformerTraining,
        engine: Engine,
        *,
        validation_store: TokenStore | None = None,
        draw_sheet: Callable[[Model, Path], None] | None = None,
        adapter: AdapterFiles | None = None,
        monitor: MonitorSettings | None = None,
    ) -> None:
        """Train ``model``.

        Args:
            model: The model; ``engine`` updates its transformer.
            settings: Settings of the optimization.
            engine: Computes the steps.
            validation_store: Rows of the evaluation; None evaluates no losses. The trainer closes it.
            draw_sheet: Writes a sheet of samples of a model to a path, in the main process.
            adapter: How to write and read the adapter, where only an adapter is trained.
            monitor: Monitoring; the defaults if None.
        """
        self.model = model
        self.settings = settings
        self.engine = engine
        self.context = engine.context
        self.validation_store = validation_store
        self.draw_sheet = draw_sheet
        self.adapter = adapter
        self.monitor = monitor or MonitorSettings()
        pack = engine.context.device.type == "cpu" and model.transformer.packs_rows
        self.builder = ExampleBuilder(model.config, settings, pack=pack)
        self.targets = TargetWeighting(model.config.vocabulary, settings, engine.context.device)
        self.transformer = model.transformer
        self.guard = NonFiniteGuard(
            engine,
            settings,
            to_device=self.targets.evenly_weighted,
            snapshot=self.snapshot,
            dumps=self.monitor.dumps,
            can_replay=adapter is None,
        )

    def batch(self, step: int, rows: Rows) -> TrainingBatch:
        """Build the batch of a step from all its rows, with the random decisions of training.

        Args:
            step: The step, from 0.
            rows: All rows of the step.

        Returns:
            The batch.
        """
        plan = self.builder.plan_rows(step, *rows["image"].shape)
        return self.builder.build_batch(step, rows, plan, num_shards=self.engine.num_threads)

    def step(self, step: int, batch: TrainingBatch) -> dict[str, float]:
        """Update the weights once.

        Args:
            step: The step, from 0.
            batch: The batch of this process.

        Returns:
            Losses in nats per target for each task and kind, and metrics of the step.

        Raises:
            NonFiniteError: The loss or a gradient is not finite, and the settings say to stop.
        """
        seed = self._seed(step)
        torch.manual_seed(seed)
        self.transformer.train()
        monitor: AbstractContextManager[dict[str, float]] = nullcontext({})
        if (step + 1) % self.monitor.every == 0:
            monitor = activation_maxima(self.transformer)
        with monitor as activations:
            metrics = self.losses(batch, learn=True)
        rate = self.settings.learning_rate_at(step)
        result = self.engine.optimizer_step(rate)
        self.guard.check(result, batch, seed, metrics)
        if self.guard.skipped:
            metrics["skipped_steps"] = float(self.guard.skipped)
        if self.engine.model.dtype == torch.float16:
            metrics["loss_scale"] = result.loss_scale
        norm = {} if result.skipped else {"gradient_norm": result.gradient_norm}
        return {**metrics, **norm, "learning_rate": rate, **activations}

    def throughput_metrics(self, tokens_per_second: float) -> dict[str, float]:
        """Return the peak of allocated memory and, if the peak FLOP/s are known, the model FLOPs utilization."""
        metrics = {}
        if memory := peak_memory(self.context.device):
            metrics["memory_bytes"] = memory
        if self.monitor.peak_flops:
            peak = self.monitor.peak_flops * self.context.size
            metrics["mfu"] = tokens_per_second * self.monitor.flops_per_token / peak
        return metrics

    def memory_advice(self) -> str:
        """Return settings that take less memory than the present ones."""
        rows = self.settings.micro_batch_size
        fewer = f"training.micro_batch_size={rows // 2} or " if rows > 1 else ""
        return f"it computed {rows or 'all'} rows at once: set {fewer}engine.checkpointing=full, which take less"

    def losses(self, batch: TrainingBatch, *, learn: bool = False) -> dict[str, float]:
        """Compute the mean cross-entropy of each task and kind over all processes.

        Each kind of id competes only with ids of its kind. A task counts in ``loss`` by its share of the rows.

        Args:
            batch: The batch of this process.
            learn: Whether to accumulate gradients.

        Returns:
            ``loss``, the weighted sum that training minimizes; a loss such as ``generate_image_loss`` for each key with
            targets; ``tokens``, the number of input tokens.
        """
        totals = self.context.all_reduce_sum(
            np.concatenate([batch.target_counts, batch.rows_by_task, [batch.num_tokens]])
        )
        num_keys = len(batch.keys)
        counts = dict(zip(batch.keys, totals[:num_keys].tolist(), strict=True))
        rows_of = dict(zip(self.settings.tasks, totals[num_keys:-1].tolist(), strict=True))
        num_rows = sum(rows_of.values())
        weights = {
            key: rows_of[key[0]] / num_rows * self.targets.loss_weight(*key) for key, count in counts.items() if count
        }
        shards = self.targets.to_device(batch, {key: weights[key] / counts[key] for key in weights})
        local_sums = self.engine.accumulate_gradients(shards, learn=learn)
        sums = self.context.all_reduce_sum(local_sums.numpy()).tolist()
        means = {key: total / counts[key] for key, total in zip(weights, sums, strict=True)}
        loss = sum((weights[key] * mean for key, mean in means.items()), 0.0)
        return {"loss": loss, **{_metric_name(*key): mean for key, mean in means.items()}, "tokens": float(totals[-1])}

    def _seed(self, step: int) -> int:
        """Return the seed of dropout in a step of this process."""
        return (self.settings.seed * 1_000_003 + step + self.context.rank * RANK_SEED_STRIDE) % 2**64

    def snapshot(self) -> Writer | None:
        """Capture the state; see ``Trainer.snapshot``."""
        state = self.engine.export_state()
        if state is None:
            return None
        skipped, model = self.guard.skipped, self.model

        def write(folder: Path) -> None:
            if self.adapter is not None:
                self.adapter.write(folder, state.weights)
            else:
                save_model(folder, model, weights=state.weights)
            write_state(folder, state, engine=self.engine.name, num_processes=self.context.size, skipped_steps=skipped)

        return write

    def load(self, folder: Path) -> None:
        """Load weights and optimizer from a checkpoint of any engine and any number of processes.

        Raises:
            StateMismatchError: The checkpoint was trained on another codebook, or has other shapes.
            InputError: The checkpoint cannot be read.
        """
        state, skipped = self.context.run_everywhere(lambda: self._read_checkpoint(folder))
        self.engine.load_state(state)
        self.guard.skipped = skipped

    def _read_checkpoint(self, folder: Path) -> tuple[TrainingState, int]:
        """Return the state in a checkpoint and its number of skipped steps; tensors are read on access."""
        if self.adapter is None and read_config(folder).codebook_sha256 != self.model.config.codebook_sha256:
            raise StateMismatchError("it was trained on the codes of another image tokenizer")
        expected = {name: whole_shape(value) for name, value in self.engine.model.trained_parameters().items()}
        numbers = read_state(folder)
        weights = StoredTensors(folder / "model.safetensors") if self.adapter is None else self.adapter.read(folder)
        state = stored_state(folder, numbers, weights, expected)
        for tensors in (state.weights, *state.moments.values()):
            check_stored(tensors, self.context)
        return state, numbers["skipped_steps"]

    @torch.no_grad()
    def evaluate(self, step: int, folder: Path) -> dict[str, float]:
        """Compute losses on the validation store and write a sheet of samples; see ``Trainer.evaluate``.

        ``validation_loss`` is what training minimizes, averaged over the tasks by their shares.

        Args:
            step: Number of finished steps.
            folder: Folder of the samples.

        Returns:
            Losses in nats per target.
        """
        self.transformer.eval()
        metrics: dict[str, float] = {}
        if self.validation_store is not None:
            total = sum(self.settings.tasks.values())
            metrics["validation_loss"] = 0.0
            for task, share in self.settings.tasks.items():
                losses = self.store_losses(self.validation_store, task, EVALUATED_ROWS)
                metrics["validation_loss"] += share / total * losses.pop("loss")
                metrics |= {f"validation_{name}": value for name, value in losses.items()}
        if self.draw_sheet is not None:
            transformer = self.engine.whole_transformer()
            if transformer is not None:
                is_copy = transformer is not self.transformer
                model = replace(self.model, transformer=transformer) if is_copy else self.model
                with warn_if_unwritten(f"the sheet of step {step}"):
                    self.draw_sheet(model, folder / f"step-{step:08d}.png")
                transformer.cpu_layers = None  # which may keep packed copies of weights that the next step changes
            self.context.barrier()
        return metrics

    def store_losses(self, store: TokenStore, task: str, count: int, *, mask_all: bool = False) -> dict[str, float]:
        """Compute mean losses of the first rows of a store.

        Args:
            store: The store.
            task: Task of all rows.
            count: Number of rows.
            mask_all: Mask every input code of the generated image, so that no code sees another.

        Returns:
            ``loss``, the weighted sum that training minimizes, and the losses by name.
        """
        count = min(len(store), count)
        sums: dict[str, float] = {}
        for start in range(0, count, self.settings.batch_size):
            numbers = np.arange(start, min(start + self.settings.batch_size, count))
            local = numbers[self.context.rank :: self.context.size]
            batch = self.builder.validation_batch(store, task, local if len(local) else numbers[:1], mask_all=mask_all)
            batch = batch if len(local) else batch.as_padding()
            for name, loss in self.losses(batch).items():
                sums[name] = sums.get(name, 0.0) + loss * len(numbers) / count
        del sums["tokens"]
        return sums

    def close(self) -> None:
        """Close the engine and the validation store."""
        self.engine.close()
        if self.validation_store is not None:
            self.validation_store.close()


def _metric_name(task: str, kind: TargetKind) -> str:
    """Return the name of a loss in the metrics, such as ``generate_image_loss``."""
    return f"{task}_{kind.value}_loss"
