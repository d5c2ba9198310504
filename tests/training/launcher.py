"""Processes that train together in tests, as torchrun starts them, but forked from one that has all imports.

    python launcher.py MODULE [MODULE …]

imports the modules of this folder, then reads starts from stdin, one in each line: ``module``, whose ``main`` runs with
``arguments``, and for each rank of it the environment and the files of stdout and stderr. It answers each line with the
statuses. Imports take longer than the work of a tiny model, and nothing is computed before the fork.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 900  # of a start, after which an alarm ends its processes


class Launcher:
    """A process that starts others."""

    def __init__(self, *modules: str, **environment: str) -> None:
        """Start it; ``environment`` is there when it imports."""
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", __file__, *modules],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, module: str, arguments: list[str], size: int, folder: Path) -> list[int]:
        """Run ``main`` of a module in ``size`` processes.

        Args:
            module: Name of the module.
            arguments: Its arguments.
            size: Number of processes.
            folder: Folder of ``printed.RANK`` and ``errors.RANK``, their stdout and stderr, which are written anew.

        Returns:
            The statuses by rank, that of a killed process as minus the signal.
        """
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        ranks = [
            {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
            for rank in range(size)
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([module, arguments, ranks, str(folder), os.getcwd()]) + "\n")  # noqa: PTH109
        self._process.stdin.flush()
        return list(json.loads(self._process.stdout.readline()))


def _run(module: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    """Run ``main`` of a module in this process, which ends."""
    status = 1
    try:
        for number, name in ((1, "printed"), (2, "errors")):
            os.dup2(os.open(folder / f"{name}.{environment['RANK']}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        os.environ.update(environment)
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", 1) for number in (1, 2))
        sys.argv = [module, *arguments]
        status = sys.modules[module].main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def _start(module: str, arguments: list[str], ranks: list[dict[str, str]], folder: Path, place: str) -> list[int]:
    """Fork a process for each rank in the folder ``place`` and return the statuses."""
    os.chdir(place)
    children = []
    for environment in ranks:
        if (child := os.fork()) == 0:
            signal.alarm(SECONDS)
            _run(module, arguments, environment, folder)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def serve() -> None:
    """Answer the starts of stdin until it ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        module, arguments, ranks, folder, place = json.loads(line)
        print(json.dumps(_start(module, arguments, ranks, Path(folder), place)), flush=True)


if __name__ == "__main__":
    serve()
