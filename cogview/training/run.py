"""A run: its folder, its metrics, its checkpoints, and the loop that every trainer shares."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import yaml
from tqdm import tqdm

from cogview.errors import InputError

Batch = TypeVar("Batch", contravariant=True)


class Trainer(Protocol[Batch]):
    """What the loop drives. ``step`` depends on nothing but the trainer's state, the batch and the step's number."""

    def step(self, step: int, batch: Batch) -> Mapping[str, float]:
        """Train on one batch; return the figures to log."""

    def save(self, folder: Path) -> None:
        """Write a model folder that opens by itself, and beside it what resuming needs, into an empty folder."""

    def load(self, folder: Path) -> None:
        """Take up what ``save`` wrote."""

    def evaluate(self, step: int, folder: Path) -> Mapping[str, float]:
        """Held-out figures; sample sheets go into ``folder``."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How often a run speaks, saves and is judged, in steps. 0 means only at the end."""

    log_every: int = 50
    save_every: int = 500
    evaluate_every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.keep < 1:
            raise ValueError(f"log_every and keep must be at least 1, got {self.log_every} and {self.keep}")
        if self.save_every < 0 or self.evaluate_every < 0:
            raise ValueError("save_every and evaluate_every must not be negative")


class Run:
    """The folder of a run: ``recipe.yaml``, ``metrics.jsonl``, TensorBoard events, ``samples/``, ``checkpoints/``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    @property
    def samples(self) -> Path:
        """Where sample sheets go."""
        return self.folder / "samples"

    def checkpoints(self) -> list[Path]:
        """Every whole checkpoint, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def start(self, recipe: Mapping[str, Any], resume: bool) -> Path | None:
        """Make the folder or, to resume, find the checkpoint to go on from (None: from nothing)."""
        found = self.checkpoints()
        if found and not resume:
            raise InputError(
                f"{self.folder} already holds a run at {found[-1].name}; go on with --resume auto, or remove the folder"
            )
        self.samples.mkdir(parents=True, exist_ok=True)
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        for unfinished in (self.folder / "checkpoints").glob(".writing-*"):
            shutil.rmtree(unfinished)
        (self.folder / "recipe.yaml").write_text(
            yaml.safe_dump(dict(recipe), allow_unicode=True, sort_keys=False), encoding="utf-8"
        )
        self._forget_after(step_of(found[-1]) if found else 0)
        return found[-1] if found else None

    def _forget_after(self, step: int) -> None:
        """Drop metrics of steps that a resumed run will repeat."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a line that a kill cut short
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
        path.write_text("".join(kept), encoding="utf-8")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one JSON line and the same figures to TensorBoard; ``step`` counts finished steps."""
        record = {"step": step, **{name: float(f"{value:.6g}") for name, value in figures.items()}}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                print("no TensorBoard curves: pip install 'cogview[train]' brings them", file=sys.stderr)
                self._writer = False
            else:
                self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        if self._writer:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def save(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """A checkpoint that is whole or absent: written aside, then renamed; only the last ``keep`` stay."""
        target = self.folder / "checkpoints" / f"step-{step:08d}"
        if target.exists():
            return target
        aside = target.with_name(f".writing-{target.name}")
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        try:
            write(aside)
        except BaseException:  # a full disk, say: leave it no fuller
            shutil.rmtree(aside, ignore_errors=True)
            raise
        os.replace(aside, target)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return target

    def close(self) -> None:
        """Finish the TensorBoard file."""
        if self._writer:
            self._writer.close()


def step_of(checkpoint: Path) -> int:
    """The number of finished steps of a checkpoint folder ``step-00001000``."""
    return int(checkpoint.name.removeprefix("step-"))


class StopSignal:
    """While active, SIGINT and SIGTERM set ``number`` instead of stopping the process; a second one stops it."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        print("\nstopping after this step (once more: at once, without saving)", file=sys.stderr)


def leave_signals_to_parent(worker: int) -> None:
    """For the workers of a DataLoader: Ctrl-C reaches them too, and the step under way still needs their batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def run_loop(
    trainer: Trainer[Batch],
    batches: Callable[[int], Iterator[Batch]],
    run: Run,
    settings: RunSettings,
    *,
    recipe: Mapping[str, Any],
    steps: int,
    batch_size: int,
    resume: bool,
) -> int:
    """Train until ``steps`` are done; return 0, or 128 + the signal that stopped the run.

    ``batches(k)`` yields the batches of steps k, k + 1, … A stopped run has saved itself and goes on exactly
    where it stood.
    """
    checkpoint = run.start(recipe, resume)
    done = 0
    if checkpoint is not None:
        try:
            trainer.load(checkpoint)
        except (RuntimeError, ValueError) as error:  # sizes that differ
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{checkpoint} does not fit the recipe, go back to its settings or remove {run.folder}: {reason}"
            ) from None
        done = step_of(checkpoint)
        print(f"resuming {run.folder} after step {done}", file=sys.stderr)
    told: dict[str, list[float]] = {}  # a mixture of tasks may not tell every figure in every step
    counted, last = 0, time.perf_counter()
    with StopSignal() as stop, tqdm(total=steps, initial=done, unit="step", disable=None, dynamic_ncols=True) as bar:
        stream = batches(done)
        while done < steps and stop.number is None:
            figures = trainer.step(done, next(stream))
            done += 1
            counted += 1
            for name, value in figures.items():
                told.setdefault(name, []).append(value)
            bar.update()
            if done % settings.log_every == 0 or done == steps:
                now = time.perf_counter()
                means = {name: sum(values) / len(values) for name, values in told.items()}
                means["samples_per_second"] = counted * batch_size / (now - last)
                run.log(done, means)
                bar.set_postfix({name: f"{means[name]:.3g}" for name in list(means)[:3]})
                told.clear()
                counted, last = 0, now
            if _due(done, settings.evaluate_every) or done == steps:
                run.log(done, trainer.evaluate(done, run.samples))
                last = time.perf_counter()
            if _due(done, settings.save_every):
                run.save(done, trainer.save, settings.keep)
        path = run.save(done, trainer.save, settings.keep)
    run.close()
    if stop.number is not None and done < steps:
        print(f"stopped after step {done} of {steps}, saved in {path}; go on with --resume auto", file=sys.stderr)
        return 128 + stop.number
    print(f"{steps} steps done, saved in {path}", file=sys.stderr)
    return 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
