"""A run: its folder, its metrics, its checkpoints, and the loop that every trainer shares.

Of several processes that train together the first alone writes, and all take part in the rest.
"""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import yaml
from safetensors import SafetensorError
from tqdm import tqdm

from cogview.errors import InputError, ReportedByPeer
from cogview.files import (
    append_json_line,
    atomic_folder,
    atomic_write,
    json_line,
    read_json,
    read_json_lines,
    remove_unfinished,
    write_json,
)
from cogview.signals import GracefulStop
from cogview.training.distributed import DistributedContext, is_peer_failure, log_main
from cogview.training.run_record import BEST_FILE

Batch = TypeVar("Batch")
Writer = Callable[[Path], None]  # writes a checkpoint into an empty folder, whatever training does meanwhile


class Trainer(ABC, Generic[Batch]):
    """What the loop drives. ``step`` depends on nothing but the trainer's state, the batch and the step's number."""

    @abstractmethod
    def step(self, step: int, batch: Batch) -> Mapping[str, float]:
        """Train on one batch; return the figures to log. ``tokens``, if there, is how many were trained on."""

    @abstractmethod
    def snapshot(self) -> Writer | None:
        """What writes the state of now: a model folder that opens by itself, and what resuming needs; None: others do.

        Later steps must not change what is written.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take up what ``snapshot`` wrote."""

    @abstractmethod
    def evaluate(self, step: int, folder: Path) -> Mapping[str, float]:
        """Held-out figures; sample sheets go into ``folder``. The lowest ``held_out_loss`` is the best checkpoint."""

    def throughput_metrics(self, tokens_per_second: float) -> Mapping[str, float]:
        """More figures that follow from how fast training is, and what it takes."""
        return {}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How often a run speaks, saves and is judged, in steps. 0 means only at the end."""

    log_every: int = 50
    save_every: int = 500
    evaluate_every: int = 1000
    keep: int = 2  # checkpoints, and the best beside them

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.keep < 1:
            raise ValueError(f"log_every and keep must be at least 1, got {self.log_every} and {self.keep}")
        if self.save_every < 0 or self.evaluate_every < 0:
            raise ValueError("save_every and evaluate_every must not be negative")


class RunFolder:
    """The folder of a run: ``recipe.yaml``, ``metrics.jsonl``, TensorBoard events, ``samples/``, ``checkpoints/``.

    The train command adds ``environment.jsonl``, ``stores.jsonl``, ``curves.png``, and ``nonfinite/`` where need be.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder = folder
        self.writes = writes  # whether this process is the one that does
        self._writer: Any = None
        self._saving: BackgroundSave | None = None

    @property
    def samples(self) -> Path:
        """Where sample sheets go."""
        return self.folder / "samples"

    @property
    def metrics(self) -> Path:
        """A line of JSON for each time that figures were logged."""
        return self.folder / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """Every whole checkpoint, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def checkpoint_path(self, step: int) -> Path:
        """The checkpoint of a step, whether it is there or not."""
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def start(self, recipe: Mapping[str, Any], resume: bool) -> Path | None:
        """Make the folder or, to resume, find the checkpoint to go on from (None: from nothing)."""
        found = self.checkpoints()
        if found and not resume:
            raise InputError(
                f"{self.folder} already holds a run at {found[-1].name}; go on with --resume auto, or remove the folder"
            )
        self.samples.mkdir(parents=True, exist_ok=True)
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        remove_unfinished(self.folder / "checkpoints", "step-*")
        (self.folder / "recipe.yaml").write_text(
            yaml.safe_dump(dict(recipe), allow_unicode=True, sort_keys=False), encoding="utf-8"
        )
        self._truncate_metrics(step_of(found[-1]) if found else 0)
        return found[-1] if found else None

    def _truncate_metrics(self, step: int) -> None:
        """Drop metrics of steps that a resumed run will repeat."""
        path = self.metrics
        if not path.exists():
            return
        kept = [json_line(record) for record in read_json_lines(path) if record["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(kept))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one JSON line and the same figures to TensorBoard; ``step`` counts finished steps."""
        if not self.writes:
            return
        record = {"step": step, **{name: float(f"{value:.6g}") for name, value in metrics.items()}}
        append_json_line(self.metrics, record)
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                print("no TensorBoard curves: pip install 'cogview[train]' brings them", file=sys.stderr)
                self._writer = False
            else:
                self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def save(self, step: int, write: Writer | None, keep: int) -> Path:
        """Begin to write a checkpoint beside the training; it is whole or absent, and older ones go when it is there.

        ``write`` is None in processes that do not write. The last ``keep`` checkpoints stay, and the best.
        """
        target = self.checkpoint_path(step)
        self.finish_saving()
        if write is None or target.exists():
            return target
        self._saving = BackgroundSave(partial(self._write, target, write, keep))
        return target

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is being written; where that failed, say so and leave all as it was before."""
        if self._saving is None:
            return
        error, self._saving = self._saving.outcome(), None
        if error is None:
            return
        if not isinstance(error, OSError | SafetensorError | RuntimeError):  # as libraries tell of a full disk
            raise error
        last = self.checkpoints()
        kept = f"{last[-1].name} stays the last one" if last else "there is none yet"
        print(f"\nwarning: a checkpoint could not be written, {kept}: {error}", file=sys.stderr)

    def _write(self, target: Path, write: Writer, keep: int) -> None:
        with atomic_folder(target) as folder:
            write(folder)
        best = self.best()
        for old in self.checkpoints()[:-keep]:
            if best is None or old.name != f"step-{best['step']:08d}":
                shutil.rmtree(old)

    def best(self) -> dict[str, Any] | None:
        """The step with the lowest ``held_out_loss`` so far, and that loss; None before the first."""
        path = self.folder / "checkpoints" / BEST_FILE
        if not path.is_file():
            return None
        found: dict[str, Any] = read_json(path)
        return found

    def record_best(self, step: int, figures: Mapping[str, float]) -> bool:
        """Note a ``held_out_loss`` if it is the lowest yet; whether it is."""
        loss, best = figures.get("held_out_loss"), self.best()
        if loss is None or (best is not None and best["step"] < step and best["held_out_loss"] <= loss):
            return False
        if self.writes:
            path = self.folder / "checkpoints" / BEST_FILE
            write_json(path, {"step": step, "held_out_loss": loss}, indent=None)
        return True

    def close(self) -> None:
        """Wait for what is being written, and finish the TensorBoard file."""
        self.finish_saving()
        if self._writer:
            self._writer.close()


class BackgroundSave:
    """Work in a thread of its own, and how it ended."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def outcome(self) -> BaseException | None:
        """Wait; what was raised, or None."""
        self._thread.join()
        return self._error


def step_of(checkpoint: Path) -> int:
    """The number of finished steps of a checkpoint folder ``step-00001000``."""
    return int(checkpoint.name.removeprefix("step-"))


def run_loop(
    trainer: Trainer[Batch],
    batches: Callable[[int], Iterator[Batch]],
    run: RunFolder,
    settings: RunSettings,
    *,
    recipe: Mapping[str, Any],
    steps: int,
    batch_size: int,
    resume: bool,
    world: DistributedContext | None = None,
    renew: Callable[[int], bool] | None = None,
    started: Callable[[Path | None], None] | None = None,
) -> int:
    """Train until ``steps`` are done; return 0, or 128 + the signal that stopped the run, 1 if it could not be saved.

    ``batches(k)`` yields the batches of steps k, k + 1, … A stopped run has saved itself and goes on exactly
    where it stood. ``renew(k)`` is asked from time to time whether the batches from step k on are others than before.
    ``started`` is called in the first process with the checkpoint that the run goes on from, or None.
    """
    world = world or DistributedContext(torch.device("cpu"))
    checkpoint = world.run_on_main(lambda: run.start(recipe, resume))
    if started is not None and world.is_main_process:
        started(checkpoint)
    done = 0
    if checkpoint is not None:
        try:
            trainer.load(checkpoint)
        except ReportedByPeer:
            raise
        except (RuntimeError, ValueError) as error:  # sizes that differ
            reason = " ".join(str(error).split())[:300]
            message = f"{checkpoint} does not fit the recipe, go back to its settings or remove {run.folder}: {reason}"
            raise InputError(message) from None
        done = step_of(checkpoint)
        log_main(f"resuming {run.folder} after step {done}", world)
    try:
        return _train(trainer, batches, run, settings, steps, batch_size, done, world, renew)
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        run.close()
        last = run.checkpoints()
        kept = f"the last checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        reason = str(error).splitlines()[0][:200]
        message = f"another process is gone, so process {world.rank} stops; {kept}; go on with --resume auto ({reason})"
        print(message, file=sys.stderr)
        return 1


def _train(
    trainer: Trainer[Batch],
    batches: Callable[[int], Iterator[Batch]],
    run: RunFolder,
    settings: RunSettings,
    steps: int,
    batch_size: int,
    done: int,
    world: DistributedContext,
    renew: Callable[[int], bool] | None,
) -> int:
    """The loop itself, after ``done`` steps."""
    meter = ThroughputMeter(batch_size)
    stopped = False
    disable = None if world.is_main_process else True
    message = "stopping after this step (once more: at once, without saving)" if world.is_main_process else None
    with (
        GracefulStop(message) as stop,
        tqdm(total=steps, initial=done, unit="step", disable=disable, dynamic_ncols=True) as bar,
    ):
        stream = batches(done)
        while done < steps:
            stopped = world.all_reduce_any(stop.requested())
            if stopped:
                break
            began = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - began
            try:
                figures = trainer.step(done, batch)
            except InputError as error:  # none of the processes can go on; what was learnt before is kept
                run.save(done, trainer.snapshot(), settings.keep)
                run.close()
                if world.is_main_process:
                    raise
                raise ReportedByPeer(str(error)) from None
            done += 1
            meter.add(figures, waited)
            bar.update()
            if done % settings.log_every == 0 or done == steps:
                means = meter.means()
                means |= trainer.throughput_metrics(means.get("tokens_per_second", 0.0))
                run.log(done, means)
                bar.set_postfix({name: f"{means[name]:.3g}" for name in list(means)[:3]})
                if renew is not None and renew(done):
                    stream = batches(done)
            best = False
            if _due(done, settings.evaluate_every) or done == steps:
                with meter.paused():
                    held_out = trainer.evaluate(done, run.samples)
                    run.log(done, held_out)
                    best = world.run_on_main(partial(run.record_best, done, held_out))
            if _due(done, settings.save_every) or best:
                with meter.paused():
                    run.save(done, trainer.snapshot(), settings.keep)
        path = run.checkpoint_path(done)
        run.finish_saving()
        if not world.run_on_main(path.exists):  # it was not saved just now
            path = run.save(done, trainer.snapshot(), settings.keep)
    run.close()
    world.barrier()
    if not path.exists():
        log_main(f"step {done} of {steps} could not be saved; make room and go on with --resume auto", world)
        return 1
    if stopped:
        log_main(f"stopped after step {done} of {steps}, saved in {path}; go on with --resume auto", world)
        return 128 + (stop.number or signal.SIGTERM)
    log_main(f"{steps} steps done, saved in {path}", world)
    return 0


class ThroughputMeter:
    """Means of the figures of steps, and how fast they were, without what is done between them."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._told: dict[str, list[float]] = {}  # a mixture of tasks may not tell every figure in every step
        self._start()

    def _start(self) -> None:
        self._told.clear()
        self._steps, self._waited, self._tokens, self._began = 0, 0.0, 0.0, time.perf_counter()

    def add(self, figures: Mapping[str, float], waited: float) -> None:
        """A step, and the seconds that it waited for its batch."""
        self._steps += 1
        self._waited += waited
        for name, value in figures.items():
            if name == "tokens":
                self._tokens += value
            else:
                self._told.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        """The means since the last time."""
        seconds = time.perf_counter() - self._began
        means = {name: sum(values) / len(values) for name, values in self._told.items()}
        means["samples_per_second"] = self._steps * self._batch_size / seconds
        if self._tokens:
            means["tokens_per_second"] = self._tokens / seconds
        means["data_wait"] = self._waited / seconds
        self._start()
        return means

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside takes no time."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
