"""A process that reads damaged files, and its parent, which survives whatever happens to it.

``python -m tests.fuzz.worker KIND NUMBER`` repeats one input of a failure.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import damage_copy
from tests.fuzz.reader import Reader

ROOT = Path(__file__).parents[2]
CPU_SECONDS = 10.0  # of one input; ``try_input`` of sound files comes before, which imports what the reader needs
WALL_SECONDS = 60.0  # of one input that waits, as for a pipe; a busy machine may be slow
GROWTH = 500 << 20  # bytes of memory, at the peak of one input
ADDRESS_SPACE = 3 << 30  # bytes beyond those at the start: protects the machine
START_SECONDS = 120.0
SOUND = -1  # number of the input without damage


@dataclass(frozen=True)
class Outcome:
    """What one input did: ``read``, ``refused``, or a failure.

    Attributes:
        kind: ``read``, ``refused``, ``error``, ``memory``, ``hang`` or ``death``.
        text: The message, or the traceback.
        damage: What was done to the files.
    """

    kind: str
    text: str
    damage: str = ""

    @property
    def failed(self) -> bool:
        """Whether it is a bug."""
        return self.kind not in ("read", "refused")


class Worker:
    """A process that reads damaged files; it is started again when it has died."""

    def __init__(
        self, module: str = "tests.fuzz.readers", cpu_seconds: float = CPU_SECONDS, growth: int = GROWTH
    ) -> None:
        """Name what an input may take; the process starts with the first one.

        Args:
            module: Module with ``READERS``.
            cpu_seconds: CPU time, in seconds.
            growth: Memory at its peak, in bytes.
        """
        self._module = module
        self._cpu_seconds = cpu_seconds
        self._growth = growth
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[str] = queue.Queue()

    def try_input(self, kind: str, number: int, seed: Path, case: Path) -> Outcome:
        """Let the process damage a copy of ``seed`` and read it.

        Args:
            kind: Name of the reader.
            number: Number of the input, which determines the damage; ``SOUND`` for none, without a limit of CPU time.
            seed: Valid files.
            case: Folder for the damaged files; it stays if the input failed.

        Returns:
            The outcome.
        """
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(json.dumps([kind, number, str(seed), str(case), self._growth]) + "\n")
        process.stdin.flush()
        begin, cpu = time.monotonic(), _cpu_seconds(process.pid)
        limits = (START_SECONDS, START_SECONDS) if number == SOUND else (self._cpu_seconds, WALL_SECONDS)
        while True:
            try:
                reply = self._replies.get(timeout=0.25)
            except queue.Empty:
                waited, used = time.monotonic() - begin, _cpu_seconds(process.pid) - cpu
                if used > limits[0] or waited > limits[1]:
                    self.close()
                    return Outcome("hang", f"no answer after {waited:.0f} s, {used:.0f} s of them on the CPU")
                continue
            if not reply:
                status = process.wait()
                self.close()
                name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                return Outcome("death", f"the process ended: {name}")
            return Outcome(**json.loads(reply))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        """Return the process, started if there is none."""
        if self._process is None:
            self._replies = queue.Queue()
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COGVIEW_LANGUAGE": "en"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", self._module],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            threading.Thread(target=_collect, args=(self._process.stdout, self._replies), daemon=True).start()
            assert self._replies.get(timeout=START_SECONDS) == "ready\n"
        return self._process


def _collect(stream: Any, replies: queue.Queue[str]) -> None:
    """Put each line of ``stream`` into ``replies``, and an empty one at its end."""
    for line in stream:
        replies.put(line)
    replies.put("")


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _kilobytes(key: str) -> int:
    """Return a size of this process in bytes."""
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def read_input(reader: Reader, kind: str, number: int, seed: Path, case: Path, growth: int = GROWTH) -> Outcome:
    """Damage a copy of valid files, and read it in this process.

    Args:
        reader: The reader.
        kind: Its name.
        number: Number of the input, or ``SOUND``.
        seed: Valid files: a folder for each variant.
        case: Folder for the damaged files.
        growth: Memory that it may take at its peak, in bytes.

    Returns:
        The outcome.
    """
    from cogview.errors import InputError

    variants = sorted(path for path in seed.iterdir() if path.is_dir())
    variant = variants[number % len(variants)]
    damage = "" if number == SOUND else damage_copy(variant, case, f"{kind} {number}")
    if number == SOUND:
        shutil.copytree(variant, case)
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    try:
        reader.read(case)
    except InputError as error:
        message = str(error)
        if not message or len(message) > 2000 or "Errno" in message:
            outcome = Outcome("error", f"the message is not one clear line: {message[:3000]}", damage)
        else:
            outcome = Outcome("refused", message, damage)
    except reader.allowed as error:
        outcome = Outcome("refused", repr(error)[:2000], damage)
    except BaseException:
        outcome = Outcome("error", _shortened(traceback.format_exc()), damage)
    else:
        outcome = Outcome("read", "", damage)
    if (grown := _kilobytes("VmHWM") - before) > growth:
        outcome = Outcome("memory", f"{grown >> 20} MB more at the peak; {outcome.text}", damage)
    return outcome


def _shortened(text: str) -> str:
    """Return the beginning and the end of a long text."""
    return text if len(text) < 8000 else f"{text[:4000]}\n…\n{text[-4000:]}"


def serve(module: str) -> None:
    """Read inputs that the parent names until it closes the pipe, with the readers of a module."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print must not be taken for a reply
    readers = importlib.import_module(module).READERS  # with all that it imports, before memory is measured
    virtual = _kilobytes("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ADDRESS_SPACE, virtual + ADDRESS_SPACE))
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        kind, number, seed, case, growth = json.loads(line)
        outcome = read_input(readers[kind], kind, number, Path(seed), Path(case), growth)
        if not outcome.failed:
            shutil.rmtree(case, ignore_errors=True)
        replies.write(json.dumps(vars(outcome)) + "\n")
        replies.flush()


def repeat(kind: str, number: int) -> None:
    """Repeat one input in this process, with its traceback on stdout."""
    from tests.fuzz.readers import READERS

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    READERS[kind].make(folder / "seed")
    print(folder / "case", flush=True)
    print(read_input(READERS[kind], kind, number, folder / "seed", folder / "case"))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        repeat(sys.argv[1], int(sys.argv[2]))
    else:
        serve(sys.argv[1])
