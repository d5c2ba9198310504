"""Locks between the processes of a job, and the loop in which they share its chunks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EACCES, EAGAIN
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

from cogview.process_variables import rank_and_world_size

if TYPE_CHECKING:
    from cogview.jobs.journal import JobJournal

POLL_SECONDS = 1.0  # between two looks at the chunks that other processes have claimed

# Bytes of the lock file, which need not exist to be locked.
_ALIVE_BYTE = 0  # locked, shared, by every process of the job
_FIRST_CLAIM_BYTE = 1  # claim number i locks byte 1 + i
_JOURNAL_BYTE = 2**30  # beyond every claim; locked by the one process that creates the journal or writes to it

log = logging.getLogger(__name__)


class JobLocks:
    """Claims of the processes of a job, as locks on bytes of ``JOURNAL.lock``; the system releases those of the dead.

    Such locks belong to a process, and closing any descriptor of the file drops them all: create one ``JobLocks`` of a
    journal in a process. Where locks are not supported (Windows, some network folders), the process works alone.
    """

    def __init__(self, journal: Path) -> None:
        """Open the lock file of ``journal``, which need not exist; its folder must."""
        self._joined = False
        self._file: int | None = None
        if fcntl is not None:
            self._file = os.open(journal.with_name(f"{journal.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
            try:
                with self.exclusive():
                    pass
            except OSError:
                self.close()
        if self._file is None and rank_and_world_size()[1] > 1:
            log.warning("%s cannot be locked here, so each process does the whole job: start one", journal)

    def register(self) -> None:
        """Register this process as a live worker, until ``close`` or its end."""
        self._joined = True
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_SH, 1, _ALIVE_BYTE)

    def has_live_peers(self) -> bool:
        """Return whether another process is registered."""
        if self._file is None:
            return False
        alone = self._try_lock(_ALIVE_BYTE)
        fcntl.lockf(self._file, fcntl.LOCK_SH if self._joined else fcntl.LOCK_UN, 1, _ALIVE_BYTE)
        return not alone

    def try_claim(self, number: int) -> bool:
        """Claim a chunk; return False if another process has claimed it."""
        return self._file is None or self._try_lock(_FIRST_CLAIM_BYTE + number)

    def release(self, number: int) -> None:
        """Release the claim of a chunk."""
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _FIRST_CLAIM_BYTE + number)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Give this process the only right to change the journal within the block, as soon as it is free."""
        if self._file is None:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _JOURNAL_BYTE)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _JOURNAL_BYTE)

    def close(self) -> None:
        """Release every lock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _try_lock(self, byte: int) -> bool:
        """Lock a byte of the file; return False if another process holds it."""
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in (EACCES, EAGAIN):
                return False
            raise
        return True


def run_chunks(
    chunks: Sequence[Sequence[str]],
    journal: JobJournal,
    locks: JobLocks,
    work: Callable[[int, Sequence[str]], None],
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Do the unfinished part of a job, together with other processes.

    Returns when every chunk is done, also those that other processes have claimed, or as soon as ``stop()`` is true.
    The chunk of a process that dies is taken over. Rank r of w processes starts at chunk r / w of all.

    Args:
        chunks: Ids of the results of each chunk.
        journal: The journal. What ``work`` records as an error is left for another run, as is what it leaves out.
        locks: The locks of the job.
        work: Called with the index of a chunk and its ids that are not in the journal.
        stop: Called before each chunk.

    Raises:
        DiskFull: The disk has no space for a result.
        InputError: RANK or WORLD_SIZE of the environment is wrong.
    """
    rank, size = rank_and_world_size()
    first = rank * len(chunks) // size
    todo = [*range(first, len(chunks)), *range(first)]

    def missing(number: int) -> list[str]:
        return [name for name in chunks[number] if name not in journal.done and not journal.has_failed(name)]

    while True:
        claimed = []
        for number in todo:
            if stop():
                return
            if not missing(number):
                continue
            if not locks.try_claim(number):
                claimed.append(number)
                continue
            try:
                journal.refresh()  # another process may have held the claim and recorded results
                if names := missing(number):
                    with journal.translating_disk_full():
                        work(number, names)
            finally:
                locks.release(number)
        journal.refresh()
        todo = [number for number in claimed if missing(number)]
        if not todo:
            return
        time.sleep(POLL_SECONDS)
