"""Reading of run folders: settings, metrics and checkpoints of a run, and the differences between runs.

Nothing here needs PyTorch. A run may be read while it is written.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cogview.config_io import read_recipe
from cogview.errors import InputError
from cogview.files import read_json_lines
from cogview.training.environment import ENVIRONMENT_FILE
from cogview.training.run_lock import is_training

BEST_FILE = "best.json"
VALIDATION = "validation_"  # prefix of metrics of the validation data
# Prefixes and names of metrics that earlier versions wrote, in metrics.jsonl and best.json.
RENAMED_METRICS = {"held_out_": VALIDATION}
QUIET_SECONDS = 300.0  # a run that has written nothing for this long, and for three usual intervals, has stopped

State = Literal["finished", "running", "stopped"]


def metric_name(name: str) -> str:
    """Return the present name of a metric that may have been written by an earlier version."""
    for old, new in RENAMED_METRICS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@dataclass(frozen=True)
class MetricSeries:
    """Values of a metric by the number of finished steps, in rising order."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """Latest value."""
        return self.values[-1]

    def at(self, step: int) -> float | None:
        """Return the value after ``step`` steps; None if there is none."""
        return self.values[self.steps.index(step)] if step in self.steps else None


@dataclass(frozen=True)
class Best:
    """The step with the lowest loss on the validation store."""

    step: int
    validation_loss: float


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run folder at the time of reading.

    Attributes:
        folder: Path of the folder.
        done: Number of finished steps.
        planned: Number of steps in the settings; None if they hold none.
        state: ``finished``, ``running`` or ``stopped``.
        settings: Settings of the run.
        training: Training metrics by name, in the order of ``metrics.jsonl``.
        validation: Validation metrics by name, without the prefix ``validation_``.
        checkpoints: Paths of the checkpoints, oldest first.
        best: The best step; None before the first evaluation.
        environments: A mapping for each start, written by ``write_environment``.
    """

    folder: Path
    done: int
    planned: int | None
    state: State
    settings: Mapping[str, Any]
    training: Mapping[str, MetricSeries]
    validation: Mapping[str, MetricSeries]
    checkpoints: tuple[Path, ...]
    best: Best | None
    environments: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """Name of the folder after that of its parent, since many runs are called transformer-run."""
        return "/".join(self.folder.resolve().parts[1:][-2:])

    @property
    def environment(self) -> Mapping[str, Any] | None:
        """Environment of the last start."""
        return self.environments[-1] if self.environments else None

    @property
    def seconds(self) -> float | None:
        """Seconds of the logged steps of all starts, without evaluation and saving; None if unknown."""
        rates, size = self.training.get("samples_per_second"), _number_in(self.settings, "training", "batch_size")
        if rates is None or size is None or not all(rate > 0 for rate in rates.values):
            return None
        before = (0, *rates.steps)
        return sum((step - last) * size / rate for last, step, rate in zip(before, *columns_of(rates), strict=False))


def is_run(folder: Path) -> bool:
    """Return whether ``folder`` is the folder of a run that has started."""
    started = (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file()
    return started and (folder / "recipe.yaml").is_file()


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Find run folders.

    Args:
        paths: Run folders, or folders with runs at any depth below them.

    Returns:
        The run folders, each once.

    Raises:
        InputError: A path is no folder.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            problem = "is a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {problem}: expected the folder of a run, or one with runs below it")
        for run in _runs_below(path):
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_below(folder: Path) -> Iterator[Path]:
    """Yield the run folders at and below ``folder``, in the order of their names."""
    if is_run(folder):
        yield folder
        return
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except PermissionError:
        return
    for path in inner:
        if not path.is_symlink() or is_run(path):  # a link to a parent folder would never end
            yield from _runs_below(path)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, skipping lines that cannot be read.

    Args:
        folder: The run folder; metrics under their former names are read under the present ones.

    Raises:
        InputError: The folder is not that of a run.
    """
    if not is_run(folder):
        missing = "" if folder.is_dir() else ", which does not exist,"
        raise InputError(
            f"{folder}{missing} is no run: expected recipe.yaml and metrics.jsonl, as cogview train has them"
        )
    settings = read_recipe(folder / "recipe.yaml")
    metrics = _read_metrics(folder / "metrics.jsonl")
    training = {name: series for name, series in metrics.items() if not name.startswith(VALIDATION)}
    checkpoints = _read_checkpoints(folder / "checkpoints")
    done = max(
        (step for steps in [*(series.steps for series in training.values()), checkpoints] for step in steps), default=0
    )
    planned = _number_in(settings, "training", "steps")
    return RunRecord(
        folder=folder,
        done=done,
        planned=None if planned is None else int(planned),
        state=_state(folder, done, planned, training.get("samples_per_second"), settings),
        settings=settings,
        training=training,
        validation={
            name.removeprefix(VALIDATION): series for name, series in metrics.items() if name.startswith(VALIDATION)
        },
        checkpoints=tuple(checkpoints.values()),
        best=read_best(folder / "checkpoints" / BEST_FILE),
        environments=tuple(read_json_lines(folder / ENVIRONMENT_FILE)),
    )


def _read_metrics(path: Path) -> dict[str, MetricSeries]:
    """Read ``metrics.jsonl``; if a step was logged twice, as after a restart, the later value counts."""
    logged: dict[str, dict[int, float]] = {}
    for record in read_json_lines(path):
        step = record.pop("step", None)
        if not _is_step(step):
            continue
        for name, value in record.items():
            if _is_number(value):
                logged.setdefault(metric_name(name), {})[step] = float(value)
    ordered = {name: sorted(values.items()) for name, values in logged.items()}
    return {name: MetricSeries(*map(tuple, zip(*pairs, strict=True))) for name, pairs in ordered.items()}


def _read_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints by their steps, oldest first."""
    found = {}
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))


def read_best(path: Path) -> Best | None:
    """Read ``best.json``; None if it is missing or damaged."""
    for record in read_json_lines(path):
        found = {metric_name(name): value for name, value in record.items()}
        if _is_step(found.get("step")) and _is_number(found.get("validation_loss")):
            return Best(found["step"], float(found["validation_loss"]))
    return None


def _is_step(value: object) -> bool:
    """Return whether a value of a file is a number of steps."""
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    """Return whether a value of a file is a number, perhaps NaN, that a float can hold."""
    return type(value) is float or (isinstance(value, int) and abs(value) <= sys.float_info.max)


def _state(
    folder: Path, done: int, planned: float | None, rates: MetricSeries | None, settings: Mapping[str, Any]
) -> State:
    """Return whether a run has finished, is running, or has stopped: by its lock, or by the age of its files."""
    if planned is not None and done >= planned:
        return "finished"
    if (is_locked := is_training(folder)) is not None:
        return "running" if is_locked else "stopped"
    files = [path for path in (folder / "metrics.jsonl", folder / "recipe.yaml") if path.is_file()]
    quiet = time.time() - max(path.stat().st_mtime for path in files)
    usual, size = 0.0, _number_in(settings, "training", "batch_size")
    if rates is not None and size is not None and rates.last > 0:
        usual = (rates.steps[-1] - (0, *rates.steps)[-2]) * size / rates.last
    return "running" if quiet < max(QUIET_SECONDS, 3 * usual) else "stopped"


def _number_in(settings: Mapping[str, Any], *keys: str) -> float | None:
    """Return a number in nested settings; None if there is none."""
    found: Any = settings
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    is_finite = _is_number(found) and not isinstance(found, bool) and math.isfinite(found)
    return found if is_finite else None


def columns_of(series: MetricSeries) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the steps and the values of a series."""
    return series.steps, series.values


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested settings to keys with dots, such as ``training.tasks.generate``; lists stay whole.

    Args:
        settings: Nested settings.
        above: Prefix of the keys.

    Returns:
        The flat settings.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of flat settings whose values differ, or that are missing in some of them."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(key not in each or each[key] != settings[0].get(key) for each in settings)]


def common_steps(series: Sequence[MetricSeries | None], max_steps: int) -> list[int]:
    """Return steps at which all series have a value: the last one, and evenly spaced ones before it.

    Args:
        series: The series; with a missing one, there are no common steps.
        max_steps: Maximum number of steps.
    """
    if not series or any(each is None for each in series):
        return []
    shared = sorted(set.intersection(*(set(each.steps) for each in series if each is not None)))
    count = min(max_steps, len(shared))
    return [shared[math.ceil(len(shared) * (number + 1) / count) - 1] for number in range(count)]


def names_apart(records: Sequence[RunRecord]) -> list[str]:
    """Return a name for each run: the end of its path, as long as needed to be unique."""
    parts = [record.folder.resolve().parts[1:] for record in records]
    names = [record.name for record in records]
    for length in range(2, max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names
