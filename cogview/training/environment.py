"""The environment of a run: a line of ``environment.jsonl`` for each start."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview import __version__
from cogview.errors import reason_of
from cogview.files import append_json_line

if TYPE_CHECKING:
    import torch

ENVIRONMENT_FILE = "environment.jsonl"
PACKAGES = ("torch", "numpy", "triton", "deepspeed", "peft", "safetensors", "lmdb", "sentencepiece")
PACKAGE_FILE = Path(__file__).parents[1] / "__init__.py"  # whose checkout is that of this package
GIT_SECONDS = 5.0  # timeout of each git command


def write_environment(
    folder: Path,
    *,
    recipe_path: Path | None,
    world_size: int,
    engine: str,
    device: torch.device | str,
    resumed_from: Path | None,
) -> None:
    """Append a line on this start of a run to ``folder/environment.jsonl``; called in the main process.

    A fact that cannot be determined is None. A file that cannot be written is a warning on stderr; the run goes on.

    Args:
        folder: The run folder.
        recipe_path: The recipe's file, if there is one.
        world_size: Number of processes.
        engine: Name of the engine.
        device: Device of this process.
        resumed_from: Checkpoint from which the run resumes; None if it starts.
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
        print(f"warning: {path} could not be written: {reason_of(error)}", file=sys.stderr)


def _or_none(fact: Callable[[], Any]) -> Any:
    """Return a fact, or None where determining it fails."""
    try:
        return fact()
    except Exception:  # a broken driver or installation must not stop the run
        return None


def _versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the installed ``PACKAGES``, without importing them."""
    found = {"cogview": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        version = _or_none(partial(metadata.version, name))
        if version is not None:
            found[name] = version
    return found


def _checkout(file: Path, *, tracked: bool) -> dict[str, Any] | None:
    """Return root and commit of the git checkout of ``file``, and whether tracked files differ from the commit.

    An untracked file counts as a difference. The result is None without a checkout, a commit or git, and with
    ``tracked`` also for an untracked file, since a package is often installed below another project's checkout.
    """
    folder = file.resolve().parent
    is_tracked = _git(folder, "ls-files", "--error-unmatch", "--", file.name) is not None
    root, commit = (_git(folder, "rev-parse", argument) for argument in ("--show-toplevel", "HEAD"))
    if root is None or commit is None or (tracked and not is_tracked):
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"root": root, "commit": commit, "dirty": None if changes is None else bool(changes) or not is_tracked}


def _other_checkout(recipe: Path) -> dict[str, Any] | None:
    """Return the checkout of the recipe, unless it is that of this package."""
    package, found = _checkout(PACKAGE_FILE, tracked=True), _checkout(recipe, tracked=False)
    return None if package and found and package["root"] == found["root"] else found


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git in ``folder``; None where it fails or takes too long."""
    # Variables such as GIT_DIR, which hooks set, would select another repository.
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
    """Return the names of all visible GPUs, or of the CPU."""
    if device.startswith("cuda"):
        import torch

        return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    from cogview.device import cpu_name

    return [cpu_name()]


def _cuda_version() -> str | None:
    import torch

    return torch.version.cuda


def _driver_version() -> str | None:
    path = Path("/sys/module/nvidia/version")  # nvidia-smi may hang
    return path.read_text().strip() if path.is_file() else None


def _cpu_threads() -> int:
    import torch

    return torch.get_num_threads()
