"""The ledger of a job: a file of JSON lines that says what the job is and, line by line, what of it is done."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

from cogview.errors import InputError
from cogview.files import atomic_write, json_line
from cogview.formatting import plural
from cogview.jobs.locks import JobLocks

FORMAT_VERSION = 1
BLOCK = 1 << 16  # bytes of weights that a fingerprint reads at each of
NUM_BLOCKS = 64  # places
LONGEST_HEADER = 100_000_000  # bytes that the safetensors library allows

_VERSION_KEY = "cogview_job"

log = logging.getLogger(__name__)


class DiskFull(InputError):
    """There is no space left for a result."""


class JobJournal:
    """What of a job is done, in a file that several processes append to.

    ``header`` is what the job is, ``done`` the facts of each result by its id: those of this process, and those of
    others as of the last ``refresh``.
    """

    @classmethod
    def open(
        cls, path: Path, header: Mapping[str, Any], *, locks: JobLocks, resume: bool, inherit_keys: Collection[str] = ()
    ) -> JobJournal:
        """Make the ledger, or go on with it if ``resume`` or if another process is at work with it.

        ``header`` holds what must stay the same, as JSON can hold it. The values of the keys in ``adopt`` are taken
        from a ledger that is there already; all others are compared. InputError where they differ, for a file that is
        no ledger, and for one that is there without ``resume``.
        """
        header = json.loads(json.dumps(header))
        with locks.exclusive():
            if not path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_bytes(json_line({_VERSION_KEY: FORMAT_VERSION, **header}))
            elif not resume:
                refuse_existing(path, locks)
            ledger = cls(path, locks)
            for key in {**header, **ledger.header}:
                was, now = (f"{key} {_told(of[key])}" if key in of else f"no {key}" for of in (ledger.header, header))
                if was != now and not (key in inherit_keys and key in ledger.header):
                    ledger.close()
                    raise InputError(
                        f"{path} was made with {was}, now with {now}: give the same, or choose another output folder"
                    )
            locks.register()  # not before: of two that start at once with an old ledger, none shall take it for new
        return ledger

    def __init__(self, path: Path, locks: JobLocks) -> None:
        """Of a file that is there; InputError if it is no ledger."""
        self.path = path
        with path.open("rb") as file:
            first = file.readline()
        self.header = _read_header(first, path)
        self.done: dict[str, dict[str, Any]] = {}
        self._locks = locks
        self._num_bytes, self._num_lines = len(first), 1  # that have been read: whole lines
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))  # Windows has O_BINARY
        self.refresh()

    def record(self, name: str, /, **facts: Any) -> None:
        """Append that the result with the id ``name`` is there; DiskFull, and no trace in the file, if it cannot be."""
        line = json_line({"id": name, **facts})
        with self._locks.exclusive(), self.translating_disk_full():
            before = os.lseek(self._file, 0, os.SEEK_END)
            os.lseek(self._file, before - 1, os.SEEK_SET)
            if os.read(self._file, 1) != b"\n":
                line = b"\n" + line  # behind a line that was cut short
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(ENOSPC, os.strerror(ENOSPC))
            except OSError:
                os.ftruncate(self._file, before)
                raise
        self.done[name] = facts

    def refresh(self) -> None:
        """Read what other processes have recorded since the last time."""
        os.lseek(self._file, self._num_bytes, os.SEEK_SET)
        content = b""
        while block := os.read(self._file, 1 << 24):
            content += block
        *lines, rest = content.split(b"\n")
        for line in lines:
            self._num_lines += 1
            if not self._parse(line) and line.strip():
                log.warning("line %d of %s is broken and counts for nothing", self._num_lines, self.path)
        self._num_bytes += len(content) - len(rest)
        self._parse(rest)  # whole but for its end, or cut short: what it says is lost, and done again

    @contextmanager
    def translating_disk_full(self) -> Iterator[None]:
        """Within, an error of the system that the disk is full becomes DiskFull."""
        try:
            yield
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT):
                raise
            kept = f"{plural(len(self.done), 'result')} {'is' if len(self.done) == 1 else 'are'}"
            raise DiskFull(f"the disk is full: {kept} kept; --resume goes on when there is space") from None

    def close(self) -> None:
        """Close the file; ``header`` and ``done`` stay."""
        os.close(self._file)

    def _parse(self, line: bytes) -> bool:
        """Note what a line says; False if it says nothing."""
        try:
            found = json.loads(line)
            self.done[found.pop("id")] = found
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return True


def refuse_existing(path: Path, claims: JobLocks) -> None:
    """InputError if there is a ledger and no other process is at work with it."""
    if path.exists() and not claims.has_live_peers():
        raise InputError(
            f"{path} is there from an earlier run: go on with it by --resume, or choose another output folder"
        )


def fingerprint(folder: Path) -> str:
    """SHA-256 that tells the weights of a checkpoint folder from others in a moment, however large they are.

    Of the configuration and the text model it takes all, of each file of weights its size, its header and 64 blocks.
    """
    sha256 = hashlib.sha256()
    for name in ("config.json", "text.model"):
        content = (folder / name).read_bytes()
        sha256.update(f"{name} {len(content)}\n".encode() + content)
    for name in ("model.safetensors", "image/model.safetensors"):
        with (folder / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            sha256.update(f"{name} {size}\n".encode())
            file.seek(0)
            header = int.from_bytes(file.read(8), "little")  # its length, in a safetensors file
            sha256.update(file.read(min(header, LONGEST_HEADER)))
            for number in range(NUM_BLOCKS):
                file.seek(max(0, size - BLOCK) * number // (NUM_BLOCKS - 1))
                sha256.update(file.read(BLOCK))
    return sha256.hexdigest()


def _read_header(line: bytes, path: Path) -> dict[str, Any]:
    """The header in the first line of a ledger."""
    header: Any = None
    with suppress(ValueError):
        header = json.loads(line)
    if not isinstance(header, dict) or (version := header.pop(_VERSION_KEY, None)) is None:
        raise InputError(f"{path} is no ledger of a job; move it away, or choose another output folder")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format {version}, this version of cogview knows {FORMAT_VERSION}: update cogview")
    return header


def _told(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
