"""The folder of a run: its recipe, metrics, samples and checkpoints.

Of several processes that train together, the main process alone writes.
"""

from __future__ import annotations

import math
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from cogview.errors import InputError, reason_of
from cogview.files import (
    append_json_line,
    atomic_folder,
    atomic_write,
    json_line,
    read_json_lines,
    remove_unfinished,
    write_json,
)
from cogview.plain_data import read_json
from cogview.training.run_lock import RunLock
from cogview.training.run_record import BEST_FILE, Best, read_best

Writer = Callable[[Path], None]  # writes a checkpoint into an empty folder, in a thread beside the training


class RunFolder:
    """The folder of a run: ``recipe.yaml``, ``metrics.jsonl``, TensorBoard events, ``samples/``, ``checkpoints/``.

    Training adds ``environment.jsonl``, ``stores.jsonl`` and ``curves.png``, and ``nonfinite/`` if it writes dumps.

    Attributes:
        folder: Path of the folder.
        writes: Whether this process writes into it.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        """Name a folder, which need not exist before ``start``."""
        self.folder = folder
        self.writes = writes
        self._writer: Any = None  # of TensorBoard; False if it is not installed
        self._saving: BackgroundSave | None = None
        self._logs = True  # until metrics cannot be written
        self._lock = RunLock(folder)

    @property
    def samples(self) -> Path:
        """Folder of the sample sheets."""
        return self.folder / "samples"

    @property
    def metrics(self) -> Path:
        """File with one JSON line per logged step."""
        return self.folder / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """Return all complete checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def checkpoint_path(self, step: int) -> Path:
        """Return the path of the checkpoint after ``step`` steps, which need not exist."""
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def lock(self) -> None:
        """Keep other trainings out of the folder until ``unlock`` or the end of this process.

        Raises:
            RetryLaterError: Another training holds the folder.
        """
        self._lock.acquire()

    def unlock(self) -> None:
        """Admit other trainings."""
        self._lock.release()

    def check(self, resume: bool) -> None:
        """Raise InputError if there are checkpoints and ``resume`` is false; nothing is written."""
        found = self.checkpoints()
        if found and not resume:
            raise InputError(
                f"{self.folder} already holds a run at {found[-1].name}; go on with --resume auto, or remove the folder"
            )

    def start(self, recipe: Mapping[str, Any], resume: bool, steps: float = math.inf) -> Path | None:
        """Create the folder, or prepare it to be resumed.

        Damaged checkpoints, as a power cut leaves them, are set aside under the name ``damaged-step-…``.

        Args:
            recipe: Settings of the run, written to ``recipe.yaml``.
            resume: Whether checkpoints may exist.
            steps: Steps of the run. If as many are done, ``recipe.yaml`` stays that of the steps that were trained.

        Returns:
            The checkpoint to resume from; None to start from step 0.

        Raises:
            InputError: There are checkpoints, and ``resume`` is false or all of them are damaged.
        """
        self.check(resume)
        last = self._last_sound(self.checkpoints())
        self.samples.mkdir(parents=True, exist_ok=True)
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        remove_unfinished(self.folder / "checkpoints", "step-*")
        if last is None or step_of(last) < steps or not (self.folder / "recipe.yaml").is_file():
            with atomic_write(self.folder / "recipe.yaml") as temporary:
                text = yaml.safe_dump(dict(recipe), allow_unicode=True, sort_keys=False)
                temporary.write_text(text, encoding="utf-8")
        self._truncate_metrics(0 if last is None else step_of(last))
        return last

    def _last_sound(self, found: list[Path]) -> Path | None:
        """Return the last checkpoint that can be opened; set later ones aside and print their damage."""
        damages: list[tuple[Path, str]] = []
        for checkpoint in reversed(found):
            damage = find_damage(checkpoint)
            if damage is None:
                break
            damages.append((checkpoint, damage))
        if found and len(damages) == len(found):
            listed = ", ".join(f"{path.name} ({damage})" for path, damage in damages)
            raise InputError(
                f"every checkpoint of {self.folder} is damaged: {listed}; remove the folder to start again"
            )
        if not found:
            return None
        last = found[-1 - len(damages)]
        for path, damage in damages:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(
                f"warning: {path} is damaged ({damage}), as after a power cut: it is set aside as {aside.name}, and "
                f"training goes on from {last.name}",
                file=sys.stderr,
            )
        return last

    def _truncate_metrics(self, step: int) -> None:
        """Drop metrics of the steps that a resumed run repeats."""
        path = self.metrics
        if not path.exists():
            return
        kept = [
            json_line(record)
            for record in read_json_lines(path)
            if isinstance(record.get("step"), int) and record["step"] <= step
        ]
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(kept))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append metrics to ``metrics.jsonl`` and to TensorBoard.

        Args:
            step: Number of finished steps.
            metrics: Values by name; the JSON line keeps six significant digits.
        """
        if not self.writes:
            return
        record = {"step": step, **{name: float(f"{value:.6g}") for name, value in metrics.items()}}
        try:
            append_json_line(self.metrics, record)
            self._write_events(step, metrics)
        except OSError as error:  # such as a full disk: the training is worth more than its curves
            if self._logs:
                print(f"warning: metrics cannot be written from step {step} on: {reason_of(error)}", file=sys.stderr)
            self._logs = False

    def _write_events(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics to TensorBoard, if it is installed."""
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
        """Start to write a checkpoint in the background; it is complete or absent, and older ones are then removed.

        Args:
            step: Number of finished steps.
            write: Writes the checkpoint; None in processes that do not write.
            keep: Number of recent checkpoints to keep besides the best one.

        Returns:
            The path of the checkpoint.
        """
        target = self.checkpoint_path(step)
        self.finish_saving()
        if write is None or target.exists():
            return target
        self._saving = BackgroundSave(partial(self._write, target, write, keep))
        return target

    def finish_saving(self) -> None:
        """Wait for the checkpoint under way; if it failed, print a warning and keep the older ones."""
        if self._saving is None:
            return
        error, self._saving = self._saving.outcome(), None
        if error is None:
            return
        if not isinstance(error, OSError | SafetensorError | RuntimeError):  # the errors of libraries on a full disk
            raise error
        last = self.checkpoints()
        kept = f"{last[-1].name} stays the last one" if last else "there is none yet"
        print(f"\nwarning: a checkpoint could not be written, {kept}: {reason_of(error)}", file=sys.stderr)

    def _write(self, target: Path, write: Writer, keep: int) -> None:
        """Write a checkpoint, then remove old ones."""
        with atomic_folder(target) as folder:
            write(folder)
        best = self.best()
        for old in self.checkpoints()[:-keep]:
            if best is None or old.name != f"step-{best.step:08d}":
                shutil.rmtree(old)

    def best(self) -> Best | None:
        """Return the step with the lowest ``validation_loss`` so far; None before the first evaluation."""
        return read_best(self.folder / "checkpoints" / BEST_FILE)

    def record_best(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Record a ``validation_loss`` if it is the lowest so far; return whether it is.

        Args:
            step: Number of finished steps.
            metrics: Metrics of an evaluation; without ``validation_loss`` nothing is recorded.

        Returns:
            Whether the loss is the lowest so far.
        """
        loss, best = metrics.get("validation_loss"), self.best()
        if loss is None or (best is not None and best.step < step and best.validation_loss <= loss):
            return False
        if self.writes:
            with warn_if_unwritten(f"{BEST_FILE} of step {step}"):
                path = self.folder / "checkpoints" / BEST_FILE
                write_json(path, {"step": step, "validation_loss": loss}, indent=None)
        return True

    def close(self) -> None:
        """Wait for the checkpoint under way and close the TensorBoard file."""
        self.finish_saving()
        if self._writer:
            self._writer.close()


@contextmanager
def warn_if_unwritten(what: str) -> Iterator[None]:
    """Print a warning for an OSError of the block, such as that of a full disk: the training is worth more.

    Args:
        what: The file that the block writes, for the warning.
    """
    try:
        yield
    except OSError as error:
        print(f"warning: {what} could not be written: {reason_of(error)}", file=sys.stderr)


class BackgroundSave:
    """A function that runs in a thread, and its outcome."""

    def __init__(self, work: Callable[[], None]) -> None:
        """Start ``work``."""
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
        """Wait for the end; return the exception that was raised, or None."""
        self._thread.join()
        return self._error


def find_damage(checkpoint: Path) -> str | None:
    """Return the first damaged file of a checkpoint, and its damage; None if every file can be opened.

    A power cut may leave files that are empty or filled with zeros. Headers are read, not tensors.

    Args:
        checkpoint: The folder of the checkpoint.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:
        name = path.relative_to(checkpoint)
        try:
            with path.open("rb") as file:
                head = file.read(4096)
            if not head:
                return f"{name} is empty"
            if not any(head):
                return f"{name} is filled with zeros"
            if path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".pt" and not zipfile.is_zipfile(path):
                return f"{name} is incomplete"
        except SafetensorError:
            return f"{name} is incomplete"
        except (OSError, InputError):
            return f"{name} cannot be read"
    return None if files else "it holds no files"


def step_of(checkpoint: Path) -> int:
    """Return the number of finished steps of a checkpoint folder such as ``step-00001000``."""
    return int(checkpoint.name.removeprefix("step-"))
