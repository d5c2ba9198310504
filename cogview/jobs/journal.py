"""The journal of a job: a file of JSON lines with the settings of the job and, line by line, its finished results.

The first line is the header, the others are results. The file is only appended to, so a killed process loses at most
the line that it was writing.
"""

from __future__ import annotations

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
from cogview.plain_data import parse_json

FORMAT_VERSION = 1

_VERSION_KEY = "cogview_job"
_OLD_SAMPLING = {"min_p": 0.0, "noise_version": 1}  # of journals written before 0.3, which do not name these settings

log = logging.getLogger(__name__)


class DiskFull(InputError):
    """Raised when the disk has no space for a result."""


class JobJournal:
    """The finished results of a job, in a file that several processes append to.

    Attributes:
        header: The settings of the job.
        done: The facts of each result by its id: those of this process, and those of others as of the last ``refresh``.
    """

    @classmethod
    def open(
        cls, path: Path, header: Mapping[str, Any], *, locks: JobLocks, resume: bool, inherit_keys: Collection[str] = ()
    ) -> JobJournal:
        """Create a journal, or continue an existing one.

        Args:
            path: The file.
            header: The settings of the job, as plain data.
            locks: The locks of the job.
            resume: Whether to continue an existing journal. It is continued in any case while another process works
                on the job.
            inherit_keys: Keys of the header whose values come from an existing journal; all others must be equal.

        Returns:
            The open journal.

        Raises:
            InputError: The file is not a journal, exists without ``resume``, or has another header.
        """
        header = json.loads(json.dumps(header))
        with locks.exclusive():
            if not path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_bytes(json_line({_VERSION_KEY: FORMAT_VERSION, **header}))
            elif not resume:
                refuse_existing(path, locks)
            journal = cls(path, locks)
            for key in {**header, **journal.header}:
                was, now = (
                    f"{key} {_as_json(of[key])}" if key in of else f"no {key}" for of in (journal.header, header)
                )
                if was != now and not (key in inherit_keys and key in journal.header):
                    journal.close()
                    raise InputError(
                        f"{path} was made with {was}, now with {now}: give the same, or choose another output folder"
                    )
            # Not before: of two processes that start at once, neither may take an old journal for a new one.
            locks.register()
        return journal

    def __init__(self, path: Path, locks: JobLocks) -> None:
        """Open an existing file; raise InputError if it is not a journal."""
        self.path = path
        with path.open("rb") as file:
            first = file.readline()
        self.header = _read_header(first, path)
        self.done: dict[str, dict[str, Any]] = {}
        self._locks = locks
        self._num_bytes, self._num_lines = len(first), 1  # complete lines that have been read
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))  # Windows has O_BINARY
        self.refresh()

    def record(self, name: str, /, **facts: Any) -> None:
        """Append a finished result.

        Args:
            name: The id of the result.
            **facts: Plain data about it.

        Raises:
            DiskFull: The line cannot be written; the file is unchanged.
        """
        line = json_line({"id": name, **facts})
        with self._locks.exclusive(), self.translating_disk_full():
            before = os.lseek(self._file, 0, os.SEEK_END)
            os.lseek(self._file, before - 1, os.SEEK_SET)
            if os.read(self._file, 1) != b"\n":
                line = b"\n" + line  # after a line that was cut off
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(ENOSPC, os.strerror(ENOSPC))
            except OSError:
                os.ftruncate(self._file, before)
                raise
        self.done[name] = facts

    def refresh(self) -> None:
        """Read the results that other processes have recorded since the last call."""
        os.lseek(self._file, self._num_bytes, os.SEEK_SET)
        content = b""
        while block := os.read(self._file, 1 << 24):
            content += block
        *lines, rest = content.split(b"\n")
        for line in lines:
            self._num_lines += 1
            if not self._parse(line) and line.strip():
                log.warning("line %d of %s is damaged and is ignored", self._num_lines, self.path)
        self._num_bytes += len(content) - len(rest)
        self._parse(rest)  # complete but for its newline; or cut off, and then its result is generated again

    @contextmanager
    def translating_disk_full(self) -> Iterator[None]:
        """Turn an OSError about a full disk into DiskFull within the block."""
        try:
            yield
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT):
                raise
            kept = f"{plural(len(self.done), 'result')} {'is' if len(self.done) == 1 else 'are'}"
            raise DiskFull(f"the disk is full: {kept} kept; --resume continues when there is space") from None

    def close(self) -> None:
        """Close the file; ``header`` and ``done`` stay readable."""
        os.close(self._file)

    def _parse(self, line: bytes) -> bool:
        """Add the result of a line; return False if the line is damaged."""
        try:
            found = parse_json(line)
            self.done[found.pop("id")] = found
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return True


def refuse_existing(path: Path, locks: JobLocks) -> None:
    """Raise InputError if a journal exists and no other process works on the job.

    Args:
        path: Path of the journal.
        locks: The locks of the job.
    """
    if path.exists() and not locks.has_live_peers():
        raise InputError(
            f"{path} exists from an earlier run: continue it with --resume, or choose another output folder"
        )


def _read_header(line: bytes, path: Path) -> dict[str, Any]:
    """Return the header in the first line of a journal; raise InputError if there is none."""
    header: Any = None
    with suppress(ValueError):
        header = parse_json(line)
    if not isinstance(header, dict) or (version := header.pop(_VERSION_KEY, None)) is None:
        raise InputError(f"{path} is not the journal of a job; move it away, or choose another output folder")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format {version}, this version of cogview knows {FORMAT_VERSION}: update cogview")
    settings = header.get("sampling")
    if isinstance(settings, dict) and all(isinstance(sampling, dict) for sampling in settings.values()):
        header["sampling"] = {task: {**_OLD_SAMPLING, **sampling} for task, sampling in settings.items()}
    return header


def _as_json(value: Any) -> str:
    """Return a value of the header for a message."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
