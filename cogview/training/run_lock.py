"""The lock of a run folder, which one training holds at a time; the system releases it when the process ends."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

from cogview.errors import InputError
from cogview.plain_data import parse_json

LOCK_FILE = "run.lock"
RETRY_SECONDS = 1.0  # in which ``is_training`` of another process has released the lock again


class RunLock:
    """The exclusive lock of a run folder, taken by its first training."""

    def __init__(self, folder: Path) -> None:
        """Name the lock of ``folder``, which need not exist."""
        self.path = folder / LOCK_FILE
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock; where locks are not supported, print a warning.

        Raises:
            InputError: Another training holds the lock.
        """
        if fcntl is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _try_lock(file, fcntl.LOCK_EX)
        except OSError as error:
            os.close(file)
            print(
                f"warning: {self.path} cannot be locked ({error.strerror}): start one training of it", file=sys.stderr
            )
            return
        if not free:
            holder = os.pread(file, 1000, 0)
            os.close(file)
            raise InputError(
                f"{self.path.parent} is trained by another process ({_describe(holder)}): wait for its end, or choose "
                "another folder with --work"
            )
        self._file = file
        content = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(content).encode() + b"\n", 0)

    def release(self) -> None:
        """Release the lock, if this process holds it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def is_training(folder: Path) -> bool | None:
    """Return whether a training holds the lock of a run folder; None if that cannot be found out.

    Args:
        folder: The run folder.
    """
    if fcntl is None:
        return None
    try:
        file = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:  # a run of an earlier version
        return None
    try:
        return not _try_lock(file, fcntl.LOCK_SH, 0.0)
    except OSError:
        return None
    finally:
        os.close(file)


def _try_lock(file: int, kind: int, seconds: float = RETRY_SECONDS) -> bool:
    """Lock an open file; return False if another process still holds it after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def _describe(holder: bytes) -> str:
    """Return the process that wrote a lock file."""
    try:
        content = parse_json(holder)
        return f"process {content['pid']} on {content['host']} since {content['started']}"
    except (ValueError, TypeError, KeyError):
        return "which has just begun"
