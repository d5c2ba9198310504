"""The training loop that every trainer shares: batches, metrics, evaluation, checkpoints, and graceful stops.

All processes that train together run the same loop; the main process alone writes.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from cogview.checkpoints.finite import NonFiniteWeightsError
from cogview.errors import InputError, ReportedByPeer, RetryLaterError, is_out_of_memory
from cogview.formatting import format_duration
from cogview.signals import GracefulStop, exit_status_of_signal
from cogview.training.distributed import DistributedContext, is_peer_failure, log_main
from cogview.training.run_folder import RunFolder, Writer, step_of
from cogview.training.settings import RunSettings
from cogview.training.trainer_state import StateMismatchError

Batch = TypeVar("Batch")
LINE_SECONDS = 30.0  # without a terminal, at most so long without a line while steps are done


class Trainer(ABC, Generic[Batch]):
    """What the loop drives. A step depends only on the trainer's state, the batch and the step's index."""

    @abstractmethod
    def step(self, step: int, batch: Batch) -> Mapping[str, float]:
        """Train on one batch and return metrics; ``tokens`` counts the tokens that were trained on.

        Args:
            step: The step, from 0.
            batch: The batch of this process.

        Returns:
            The metrics.

        Raises:
            InputError: Training cannot continue; the loop saves the state of the step before.
        """

    @abstractmethod
    def snapshot(self) -> Writer | None:
        """Capture the state, which later steps must not change.

        Returns:
            A function that writes a checkpoint: a model folder with the state of training. None in processes that do
            not write.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Load a checkpoint that ``snapshot`` wrote."""

    @abstractmethod
    def evaluate(self, step: int, folder: Path) -> Mapping[str, float]:
        """Return validation metrics and write sample sheets.

        Args:
            step: Number of finished steps.
            folder: Folder of the sheets.

        Returns:
            Metrics; the checkpoint with the lowest ``validation_loss`` is kept as the best.
        """

    def throughput_metrics(self, tokens_per_second: float) -> Mapping[str, float]:
        """Return more metrics that follow from the throughput; none by default."""
        return {}

    def memory_advice(self) -> str:
        """Return which settings take less memory, for the message of a training that is out of memory."""
        return "a smaller batch_size takes less"


def _never(step: int) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class BatchSource(Generic[Batch]):
    """The batches of a run.

    Attributes:
        batches: ``batches(k)`` iterates over the batches of steps k, k + 1, …
        steps: Number of steps of the run.
        batch_size: Rows of a step, over all processes.
        refresh: ``refresh(k)`` returns whether the batches from step k on have changed, so that the loop asks for new
            ones. It is called after each logged step.
    """

    batches: Callable[[int], Iterator[Batch]]
    steps: int
    batch_size: int
    refresh: Callable[[int], bool] = _never


def run_loop(
    trainer: Trainer[Batch],
    source: BatchSource[Batch],
    run: RunFolder,
    settings: RunSettings,
    *,
    recipe: Mapping[str, Any],
    resume: bool,
    context: DistributedContext | None = None,
    on_start: Callable[[Path | None], None] | None = None,
) -> int:
    """Train until all steps of ``source`` are done. A stopped run saves itself and resumes exactly where it stopped.

    Args:
        trainer: The trainer.
        source: Its batches.
        run: The folder of the run.
        settings: Intervals of logging, saving and evaluation.
        recipe: Settings of the run, for its folder.
        resume: Whether to resume from the last checkpoint, if there is one.
        context: The processes that train together; one process on the CPU by default.
        on_start: Called in the main process with the checkpoint to resume from, or None.

    Returns:
        0; 128 plus the signal that stopped the run; 1 if the last state could not be saved, or a peer was lost.

    Raises:
        InputError: The folder holds a run, its checkpoint does not fit, or a step cannot be computed.
        RetryLaterError: Another process trains the run, or a device is out of memory.
    """
    context = context or DistributedContext(torch.device("cpu"))
    context.run_on_main(run.lock)
    try:
        done = _start(trainer, run, recipe, resume, source.steps, context, on_start)
        return TrainingLoop(trainer, source, run, settings, context, done).run_to_end()
    except (RuntimeError, MemoryError) as error:
        run.close()
        last = run.checkpoints()
        kept = f"the last checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if is_out_of_memory(error):
            raise RetryLaterError(
                f"training is out of memory; {trainer.memory_advice()}; {kept}; go on with --resume auto ({reason})"
            ) from None
        if not is_peer_failure(error):
            raise
        message = (
            f"another process is gone, so process {context.rank} stops; {kept}; go on with --resume auto ({reason})"
        )
        print(message, file=sys.stderr)
        return 1
    finally:
        run.unlock()


def _start(
    trainer: Trainer[Batch],
    run: RunFolder,
    recipe: Mapping[str, Any],
    resume: bool,
    steps: int,
    context: DistributedContext,
    on_start: Callable[[Path | None], None] | None,
) -> int:
    """Prepare the folder of a run and load its last checkpoint; return the number of finished steps."""
    checkpoint = context.run_on_main(lambda: run.start(recipe, resume, steps))
    if on_start is not None and context.is_main_process:
        on_start(checkpoint)
    if checkpoint is None:
        return 0
    try:
        trainer.load(checkpoint)
    except (ReportedByPeer, NonFiniteWeightsError):
        raise
    except (RuntimeError, ValueError) as error:  # of tensors of other sizes
        if isinstance(error, RuntimeError) and (is_out_of_memory(error) or is_peer_failure(error)):
            raise
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, InputError) and not isinstance(error, StateMismatchError):
            raise InputError(f"{checkpoint} cannot be resumed, {_remedy(run, checkpoint)}: {reason}") from None
        message = f"{checkpoint} does not fit the recipe, go back to its settings or remove {run.folder}: {reason}"
        raise InputError(message) from None
    log_main(f"resuming {run.folder} after step {step_of(checkpoint)}", context)
    return step_of(checkpoint)


def _remedy(run: RunFolder, checkpoint: Path) -> str:
    """Return how to continue a run whose last checkpoint is damaged."""
    earlier = [path for path in run.checkpoints() if path != checkpoint]
    return f"remove it to go on from {earlier[-1].name}" if earlier else f"remove {run.folder} to start again"


class TrainingLoop(Generic[Batch]):
    """The steps of a run from ``done`` on."""

    def __init__(
        self,
        trainer: Trainer[Batch],
        source: BatchSource[Batch],
        run: RunFolder,
        settings: RunSettings,
        context: DistributedContext,
        done: int,
    ) -> None:
        """Prepare to continue after ``done`` steps; see ``run_loop``."""
        self.trainer = trainer
        self.source = source
        self.run = run
        self.settings = settings
        self.context = context
        self.done = done
        self.meter = ThroughputMeter(source.batch_size)
        self.line_at = -math.inf  # time of the last line of progress; the first step has one

    def run_to_end(self) -> int:
        """Train until the last step or a stop; return the exit status."""
        context, stopped = self.context, False
        disable = None if context.is_main_process else True
        message = "stopping after this step (once more: at once, without saving)" if context.is_main_process else None
        with (
            GracefulStop(message) as stop,
            tqdm(total=self.source.steps, initial=self.done, unit="step", disable=disable, dynamic_ncols=True) as bar,
        ):
            stream = self.source.batches(self.done)
            while self.done < self.source.steps:
                stopped = context.all_reduce_any(stop.requested())
                if stopped:
                    break
                self._step(stream)
                bar.update()
                if self._is_due(self.settings.log_every):
                    means = self._log()
                    bar.set_postfix({name: f"{means[name]:.3g}" for name in list(means)[:3]})
                    if bar.disable:
                        self._print_progress(means)
                    if self.source.refresh(self.done):
                        stream = self.source.batches(self.done)
                elif bar.disable and time.monotonic() - self.line_at >= LINE_SECONDS:
                    self._print_progress(self.meter.means_so_far())
                is_best = self._is_due(self.settings.evaluate_every) and self._evaluate()
                if is_best or _divides(self.settings.save_every, self.done):
                    with self.meter.paused():
                        self._save()
            path = self.run.checkpoint_path(self.done)
            self.run.finish_saving()
            if not context.run_on_main(path.exists):  # it was not saved just now
                path = self._save()
        self.run.close()
        context.barrier()
        return self._finish(path, stopped, stop.number)

    def _step(self, stream: Iterator[Batch]) -> None:
        """Train on the next batch; save the state before it if that is impossible."""
        began = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - began
        try:
            metrics = self.trainer.step(self.done, batch)
        except InputError as error:  # in all processes alike
            self._save()
            self.run.close()
            if self.context.is_main_process:
                raise
            raise ReportedByPeer(str(error)) from None
        self.done += 1
        self.meter.add(metrics, waited)

    def _log(self) -> dict[str, float]:
        """Log the means since the last time and return them."""
        means = self.meter.means()
        means |= self.trainer.throughput_metrics(means.get("tokens_per_second", 0.0))
        self.run.log(self.done, means)
        return means

    def _print_progress(self, means: Mapping[str, float]) -> None:
        """Print the progress where stderr is no terminal: of logged steps, the first one, and after LINE_SECONDS."""
        self.line_at = time.monotonic()
        rate = means["samples_per_second"]
        left = (self.source.steps - self.done) * self.source.batch_size / rate
        loss = f"loss {means['loss']:.4g}, " if "loss" in means else ""
        log_main(
            f"step {self.done}/{self.source.steps}, {loss}{rate:.3g} samples/s, {format_duration(left)} left",
            self.context,
        )

    def _evaluate(self) -> bool:
        """Log validation metrics; return whether this step is the best so far."""
        with self.meter.paused():
            metrics = self.trainer.evaluate(self.done, self.run.samples)
            self.run.log(self.done, metrics)
            return self.context.run_on_main(partial(self.run.record_best, self.done, metrics))

    def _save(self) -> Path:
        """Start to save the state; return the path of the checkpoint."""
        return self.run.save(self.done, self.trainer.snapshot(), self.settings.keep)

    def _is_due(self, every: int) -> bool:
        """Return whether work with an interval of ``every`` steps is due; at the last step it always is."""
        return _divides(every, self.done) or self.done == self.source.steps

    def _finish(self, path: Path, stopped: bool, signal_number: int | None) -> int:
        """Print how the run ended; return the exit status."""
        steps = self.source.steps
        if not path.exists():
            log_main(
                f"step {self.done} of {steps} could not be saved; make room and go on with --resume auto", self.context
            )
            return 1
        if stopped:
            log_main(
                f"stopped after step {self.done} of {steps}, saved in {path}; go on with --resume auto", self.context
            )
            return exit_status_of_signal(signal_number or signal.SIGTERM)
        beyond = f"; the recipe asks for {steps}" if self.done > steps else ""  # resumed with fewer steps
        log_main(f"{self.done} steps done, saved in {path}{beyond}", self.context)
        return 0


class ThroughputMeter:
    """Means of the metrics of steps and their throughput, without pauses between them."""

    def __init__(self, batch_size: int) -> None:
        """Start to measure steps of ``batch_size`` rows."""
        self._batch_size = batch_size
        self._values: dict[str, list[float]] = {}  # a metric of one task may be missing in some steps
        self._start()

    def _start(self) -> None:
        self._values.clear()
        self._steps, self._waited, self._tokens, self._began = 0, 0.0, 0.0, time.perf_counter()

    def add(self, metrics: Mapping[str, float], waited: float) -> None:
        """Add a step.

        Args:
            metrics: Its metrics; ``tokens`` counts towards the throughput.
            waited: Seconds that it waited for its batch.
        """
        self._steps += 1
        self._waited += waited
        for name, value in metrics.items():
            if name == "tokens":
                self._tokens += value
            else:
                self._values.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        """Return the means since the last call, and start anew; see ``means_so_far``."""
        means = self.means_so_far()
        self._start()
        return means

    def means_so_far(self) -> dict[str, float]:
        """Return the means since the start, with ``samples_per_second`` and ``data_wait`` (fraction of time)."""
        seconds = time.perf_counter() - self._began
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        means["samples_per_second"] = self._steps * self._batch_size / seconds
        if self._tokens:
            means["tokens_per_second"] = self._tokens / seconds
        means["data_wait"] = self._waited / seconds
        return means

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began


def _divides(every: int, step: int) -> bool:
    """Return whether ``step`` is a multiple of ``every``; 0 divides none."""
    return every > 0 and step % every == 0
