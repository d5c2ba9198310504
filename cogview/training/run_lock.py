"""The lock of a run folder, which one training holds at a time; the system releases it when the process ends."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from cogview.errors import RetryLaterError
from cogview.files import describe_owner, try_lock, write_owner

LOCK_FILE = "run.lock"
RETRY_SECONDS = 1.0  # in which ``is_training`` of another process has released the lock again


class RunLock:
    """The exclusive lock of a run folder, taken by its first training."""

    def __init__(self, folder: Path) -> None:
        """Name the lock of ``folder``, which need not exist."""
        self.path = folder / LOCK_FILE
        self._file: int | None = None
        self._created: list[Path] = []  # folders, the innermost first

    def acquire(self) -> None:
        """Take the lock, unless it is held; where locks are not supported, print a warning.

        Raises:
            RetryLaterError: Another training holds the lock.
        """
        if self._file is not None:
            return
        self._created = [path for path in (self.path.parent, *self.path.parent.parents) if not path.exists()]
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                free = try_lock(file, seconds=RETRY_SECONDS)
            except OSError as error:
                os.close(file)
                print(
                    f"warning: {self.path} cannot be locked ({error.strerror}): start one training of it",
                    file=sys.stderr,
                )
                return
            if not free:
                holder = describe_owner(os.pread(file, 1000, 0))
                os.close(file)
                raise RetryLaterError(
                    f"{self.path.parent} is trained by another process ({holder}): wait for its end, or choose "
                    "another folder with --work"
                )
            if self._is_current(file):
                break
            os.close(file)  # a refused training has removed it meanwhile
        self._file = file
        write_owner(file)

    def release(self) -> None:
        """Release the lock, if this process holds it. A folder without anything else was of no use, and is removed."""
        if self._file is None:
            return
        with suppress(OSError):  # an open file cannot be removed on Windows; another process may use a folder
            if [path.name for path in self.path.parent.iterdir()] == [self.path.name]:
                self.path.unlink()
                for folder in self._created:
                    folder.rmdir()
        os.close(self._file)
        self._file = None

    def _is_current(self, file: int) -> bool:
        """Return whether the path still names an open file."""
        try:
            return os.path.samestat(os.fstat(file), self.path.stat())
        except FileNotFoundError:
            return False


def is_training(folder: Path) -> bool | None:
    """Return whether a training holds the lock of a run folder; None if that cannot be found out.

    Args:
        folder: The run folder.
    """
    try:
        file = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:  # a run of an earlier version
        return None
    try:
        return not try_lock(file, shared=True)
    except OSError:
        return None
    finally:
        os.close(file)
