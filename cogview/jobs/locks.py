"""How several processes share one job, and how it is stopped."""

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

from cogview.errors import InputError

if TYPE_CHECKING:
    from cogview.jobs.journal import JobJournal

POLL_SECONDS = 1.0  # between two looks at what other processes have claimed

# Bytes of the lock file, which need not exist to be locked.
_ALIVE = 0  # held shared by every process of the job
_FIRST = 1  # claim number i is byte 1 + i
_DOOR = 2**30  # beyond every claim; held by the one process that makes the ledger or writes to it

log = logging.getLogger(__name__)


class JobLocks:
    """Which process works at what, as locks on bytes of ``LEDGER.lock``; the system lets go of them when one dies.

    Such locks belong to a process, and closing any descriptor of the file drops them all: have one ``Claims`` of a
    ledger in a process. Where there are none (Windows, some network folders), the process is taken to be alone.
    """

    def __init__(self, ledger: Path) -> None:
        """Of the processes at work with ``ledger``, which need not exist yet; its folder must."""
        self._joined = False
        self._file: int | None = None
        if fcntl is not None:
            self._file = os.open(ledger.with_name(f"{ledger.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
            try:
                with self.exclusive():
                    pass
            except OSError:
                self.close()
        if self._file is None and rank_and_world_size()[1] > 1:
            log.warning("%s cannot be locked here, so each process does the whole job: start one", ledger)

    def register(self) -> None:
        """Be one of the processes at work, until ``close`` or death."""
        self._joined = True
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_SH, 1, _ALIVE)

    def has_live_peers(self) -> bool:
        """Whether another process has joined."""
        if self._file is None:
            return False
        alone = self._try_lock(_ALIVE)
        fcntl.lockf(self._file, fcntl.LOCK_SH if self._joined else fcntl.LOCK_UN, 1, _ALIVE)
        return not alone

    def try_claim(self, number: int) -> bool:
        """Whether ``number`` is ours from now on; not if another process has it."""
        return self._file is None or self._try_lock(_FIRST + number)

    def release(self, number: int) -> None:
        """Let go of a claim."""
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _FIRST + number)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within, this process alone changes the ledger; it waits for its turn."""
        if self._file is None:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _DOOR)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _DOOR)

    def close(self) -> None:
        """Let go of everything."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _try_lock(self, byte: int) -> bool:
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
    ledger: JobJournal,
    claims: JobLocks,
    work: Callable[[int, Sequence[str]], None],
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Call ``work(number, ids)`` for each of ``chunks``, with those of its ids that are not in the ledger.

    ``work`` records what it has done; an id that it does not record is left for another run. With RANK r of WORLD_SIZE
    w in the environment it begins at chunk r / w of all. Returns when every chunk is done, also those that other
    processes have claimed (if one of them dies, its chunk is taken over), or as soon as ``stop()`` is true.
    """
    rank, size = rank_and_world_size()
    first = rank * len(chunks) // size
    todo = [*range(first, len(chunks)), *range(first)]

    def missing(number: int) -> list[str]:
        return [name for name in chunks[number] if name not in ledger.done]

    while True:
        claimed = []
        for number in todo:
            if stop():
                return
            if not missing(number):
                continue
            if not claims.try_claim(number):
                claimed.append(number)
                continue
            try:
                ledger.refresh()  # whoever had the claim before may have recorded something
                if names := missing(number):
                    with ledger.translating_disk_full():
                        work(number, names)
            finally:
                claims.release(number)
        ledger.refresh()
        todo = [number for number in claimed if missing(number)]
        if not todo:
            return
        time.sleep(POLL_SECONDS)


def rank_and_world_size() -> tuple[int, int]:
    """RANK and WORLD_SIZE of the environment: this process's number, from 0, among how many."""
    rank, size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(f'RANK "{rank}" and WORLD_SIZE "{size}" must be whole numbers, RANK from 0 to WORLD_SIZE - 1')
    return int(rank), int(size)
