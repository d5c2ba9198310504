"""What a run folder tells of itself: where and how it was started, its metrics, and how runs differ.

Nothing here needs PyTorch to read a run; training writes, and anything may read meanwhile.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cogview import __version__
from cogview.config_io import read_recipe
from cogview.errors import InputError
from cogview.files import append_json_line, read_json_lines

if TYPE_CHECKING:
    import torch

BEST_FILE = "best.json"
ENVIRONMENT_FILE = "environment.jsonl"
HELD_OUT = "held_out_"  # how names of figures begin that were not measured in training itself
PACKAGES = ("torch", "numpy", "triton", "deepspeed", "peft", "safetensors", "lmdb", "sentencepiece")
PACKAGE_FILE = Path(__file__).parents[1] / "__init__.py"  # which tells where this package is
GIT_SECONDS = 5.0  # for each question
QUIET_SECONDS = 300.0  # a run that has written nothing for so long, and for three times its usual pause, is over

State = Literal["finished", "running", "stopped"]


# Where a run was started


def write_environment(
    folder: Path,
    *,
    recipe_path: Path | None,
    world_size: int,
    engine: str,
    device: torch.device | str,
    resumed_from: Path | None,
) -> None:
    """Append a line to ``folder/environment.jsonl``: what this start of a run runs on. For one process of a run.

    What cannot be found out is None, and a file that cannot be written is told on stderr: a run never stops here.
    """
    facts: dict[str, Callable[[], Any]] = {
        "time": lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": lambda: shlex.join(sys.orig_argv),
        "resumed_from": lambda: None if resumed_from is None else resumed_from.name,
        "recipe": lambda: None if recipe_path is None else str(recipe_path),
        "git": lambda: _checkout(PACKAGE_FILE, tracked=True),
        "recipe_git": lambda: None if recipe_path is None else _other_checkout(recipe_path),
        "versions": _versions,
        "engine": lambda: engine,
        "world_size": lambda: world_size,
        "device": lambda: str(device),
        "device_names": lambda: _device_names(str(device)),
        "cuda": _cuda_version,
        "driver": _driver_version,
        "cpu_threads": _cpu_threads,
        "platform": platform.platform,
        "hostname": socket.gethostname,
    }
    found = {name: _or_none(fact) for name, fact in facts.items()}
    path = folder / ENVIRONMENT_FILE
    try:
        append_json_line(path, found)
    except OSError as error:
        print(f"warning: {path} could not be written: {error.strerror or error}", file=sys.stderr)


def _or_none(fact: Callable[[], Any]) -> Any:
    try:
        return fact()
    except Exception:  # whatever a driver, a file system or a strange installation does: the run is worth more
        return None


def _versions() -> dict[str, str]:
    """Python, this package, and what is installed of ``PACKAGES``; nothing is imported."""
    found = {"cogview": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        version = _or_none(partial(metadata.version, name))
        if version is not None:
            found[name] = version
    return found


def _checkout(file: Path, *, tracked: bool) -> dict[str, Any] | None:
    """Root and commit of the git checkout that ``file`` lies in, and whether tracked files differ from the commit.

    None where there is no checkout, no commit or no git, or with ``tracked`` where the file is not one of the
    repository's: a package is often installed below somebody else's. A file that is not tracked counts as a change.
    """
    folder = file.resolve().parent
    is_tracked = _git(folder, "ls-files", "--error-unmatch", "--", file.name) is not None
    root, commit = (_git(folder, "rev-parse", what) for what in ("--show-toplevel", "HEAD"))
    if root is None or commit is None or (tracked and not is_tracked):
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"root": root, "commit": commit, "dirty": None if changes is None else bool(changes) or not is_tracked}


def _other_checkout(recipe: Path) -> dict[str, Any] | None:
    """That of the recipe, unless it is that of this package."""
    own, found = _checkout(PACKAGE_FILE, tracked=True), _checkout(recipe, tracked=False)
    return None if own and found and own["root"] == found["root"] else found


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says in ``folder``; None where it fails or takes too long."""
    # Variables such as GIT_DIR, as hooks have them, would speak of another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace").strip()


def _device_names(device: str) -> list[str]:
    """All GPUs that this process sees, or the CPU."""
    if device.startswith("cuda"):
        import torch

        return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    cpu = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpu.read_text(), re.MULTILINE) if cpu.is_file() else None
    return [named[1].strip() if named else platform.processor() or platform.machine()]


def _cuda_version() -> str | None:
    import torch

    return torch.version.cuda


def _driver_version() -> str | None:
    path = Path("/sys/module/nvidia/version")  # nvidia-smi, which may hang, is not asked
    return path.read_text().strip() if path.is_file() else None


def _cpu_threads() -> int:
    import torch

    return torch.get_num_threads()


# What a run has done


@dataclass(frozen=True)
class MetricSeries:
    """A figure by the number of finished steps, which rises."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The latest value."""
        return self.values[-1]

    def at(self, step: int) -> float | None:
        """The value behind ``step``, if there is one."""
        return self.values[self.steps.index(step)] if step in self.steps else None


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest loss on held-out rows."""

    step: int
    held_out_loss: float


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run folder as it stood when it was read."""

    folder: Path
    done: int  # steps
    planned: int | None  # steps; None where the settings do not say
    state: State
    settings: Mapping[str, Any]
    training: Mapping[str, MetricSeries]  # in the order in which metrics.jsonl names them
    held_out: Mapping[str, MetricSeries]  # by their names without ``held_out_``
    checkpoints: tuple[Path, ...]  # oldest first
    best: Best | None
    environments: tuple[Mapping[str, Any], ...]  # of each start, as ``write_environment`` has them

    @property
    def name(self) -> str:
        """The folder's name behind that of the folder it lies in: many a run is called transformer-run."""
        return "/".join(self.folder.resolve().parts[1:][-2:])

    @property
    def environment(self) -> Mapping[str, Any] | None:
        """That of the last start."""
        return self.environments[-1] if self.environments else None

    @property
    def seconds(self) -> float | None:
        """How long the logged steps took, in all starts, without evaluating and saving; None where it is not known."""
        paces, size = self.training.get("samples_per_second"), _number_in(self.settings, "training", "batch_size")
        if paces is None or size is None or not all(pace > 0 for pace in paces.values):
            return None
        before = (0, *paces.steps)
        return sum((step - last) * size / pace for last, step, pace in zip(before, *columns_of(paces), strict=False))


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a run, begun at least."""
    begun = (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file()
    return begun and (folder / "recipe.yaml").is_file()


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among ``paths`` and below them, each once; InputError for a folder that does not exist."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise InputError(f"{path} {what}: expected the folder of a run, or one with runs below it")
        for run in _runs_below(path):
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_below(folder: Path) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except PermissionError:
        return
    for path in inner:
        if not path.is_symlink() or is_run(path):  # a link to a folder around it would have no end
            yield from _runs_below(path)


def read_run(folder: Path) -> RunRecord:
    """What ``folder`` tells; InputError where it is that of no run. Lines that cannot be read are passed over."""
    if not is_run(folder):
        missing = "" if folder.is_dir() else ", which does not exist,"
        raise InputError(
            f"{folder}{missing} is no run: expected recipe.yaml and metrics.jsonl, as cogview train has them"
        )
    settings = read_recipe(folder / "recipe.yaml")
    figures = _read_metrics(folder / "metrics.jsonl")
    training = {name: series for name, series in figures.items() if not name.startswith(HELD_OUT)}
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
        held_out={name.removeprefix(HELD_OUT): series for name, series in figures.items() if name.startswith(HELD_OUT)},
        checkpoints=tuple(checkpoints.values()),
        best=_read_best(folder / "checkpoints" / BEST_FILE),
        environments=tuple(read_json_lines(folder / ENVIRONMENT_FILE)),
    )


def _read_metrics(path: Path) -> dict[str, MetricSeries]:
    """All figures of ``metrics.jsonl``; of a step that was told twice, as after a restart, the later one counts."""
    told: dict[str, dict[int, float]] = {}
    for record in read_json_lines(path):
        step = record.pop("step", None)
        if not isinstance(step, int):
            continue
        for name, value in record.items():
            if isinstance(value, int | float):
                told.setdefault(name, {})[step] = float(value)
    ordered = {name: sorted(values.items()) for name, values in told.items()}
    return {name: MetricSeries(*map(tuple, zip(*pairs, strict=True))) for name, pairs in ordered.items()}


def _read_checkpoints(folder: Path) -> dict[int, Path]:
    """Whole checkpoints by their steps, oldest first."""
    found = {}
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))


def _read_best(path: Path) -> Best | None:
    for found in read_json_lines(path):
        if {"step", "held_out_loss"} <= found.keys():
            return Best(int(found["step"]), float(found["held_out_loss"]))
    return None


def _state(
    folder: Path, done: int, planned: float | None, paces: MetricSeries | None, settings: Mapping[str, Any]
) -> State:
    if planned is not None and done >= planned:
        return "finished"
    files = [path for path in (folder / "metrics.jsonl", folder / "recipe.yaml") if path.is_file()]
    quiet = time.time() - max(path.stat().st_mtime for path in files)
    usual, size = 0.0, _number_in(settings, "training", "batch_size")
    if paces is not None and size is not None and paces.last > 0:
        usual = (paces.steps[-1] - (0, *paces.steps)[-2]) * size / paces.last
    return "running" if quiet < max(QUIET_SECONDS, 3 * usual) else "stopped"


def _number_in(settings: Mapping[str, Any], *keys: str) -> float | None:
    """A number among nested settings, if there is one."""
    found: Any = settings
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def columns_of(series: MetricSeries) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return series.steps, series.values


# How runs differ


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by keys with dots, ``training.tasks.generate``; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of flat settings that some lack, or that have not the same value in all."""
    keys = dict.fromkeys(key for own in settings for key in own)
    return [key for key in keys if any(key not in own or own[key] != settings[0].get(key) for own in settings)]


def common_steps(series: Sequence[MetricSeries | None], most: int) -> list[int]:
    """Steps at which all have a value: the last, and others at even distances before it, ``most`` in all."""
    if not series or any(own is None for own in series):
        return []
    shared = sorted(set.intersection(*(set(own.steps) for own in series if own is not None)))
    count = min(most, len(shared))
    return [shared[math.ceil(len(shared) * (number + 1) / count) - 1] for number in range(count)]


def names_apart(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run: the end of its path, as long as it takes to tell them apart."""
    parts = [record.folder.resolve().parts[1:] for record in records]
    names = [record.name for record in records]
    for length in range(2, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names
