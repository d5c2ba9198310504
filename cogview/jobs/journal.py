"""The journal of a job: a file of JSON lines with the settings of the job and, line by line, its results and errors.

The first line is the header. Each other line is a result, or the error of a result or line that could not be made. An
error counts until its id has a result. The file is only appended to, so a killed process loses at most the line that it
was writing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import Any, TypeAlias

from cogview.errors import InputError, RetryLaterError, disk_full_reason
from cogview.files import atomic_write, json_line
from cogview.formatting import format_list, plural
from cogview.input_files import open_regular
from cogview.jobs.locks import JobLocks
from cogview.plain_data import parse_json
from cogview.process_variables import is_of_this_launch

FORMAT_VERSION = 2  # with errors, which version 1 would take for results

NAMES_KEY = "adapters"  # of the header: names beside the digests of "weights", which are compared

_VERSION_KEY = "cogview_job"
_OLD_SAMPLING = {"min_p": 0.0, "noise_version": 1}  # of journals written before 0.3, which do not name these settings

log = logging.getLogger(__name__)

ProblemOf: TypeAlias = Callable[[str, Mapping[str, Any]], str | None]


class DiskFull(RetryLaterError):
    """Raised when the disk has no space for a result."""


class Outcomes:
    """The results and errors that the lines of a journal record.

    Attributes:
        done: The facts of each result by its id.
        errors: The facts of each error by its id, without those of ids that have a result.
        lost: Why a recorded result cannot be used, by its id, for those that have no usable result.
    """

    def __init__(self, problem_of: ProblemOf = lambda name, facts: None) -> None:
        """Start without lines.

        Args:
            problem_of: Returns why a recorded result cannot be used, from its id and facts; None if it can.
        """
        self.done: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, dict[str, Any]] = {}
        self.lost: dict[str, str] = {}
        self._problem_of = problem_of

    def add(self, line: bytes) -> str | None:
        """Add a line; return its id, None if the line is damaged."""
        try:
            facts = parse_json(line)
            name = facts.pop("id")
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        if not isinstance(name, str):
            return None
        if "error" in facts:
            if name not in self.done:
                self.errors[name] = facts
        elif (problem := self._problem_of(name, facts)) is not None:
            if name not in self.done:
                self.lost[name] = problem
        else:
            self.set_done(name, facts)
        return name

    def set_done(self, name: str, facts: dict[str, Any]) -> None:
        """Set the facts of a result."""
        self.done[name] = facts
        self.errors.pop(name, None)
        self.lost.pop(name, None)


class JobJournal:
    """The results and errors of a job, in a file that several processes append to.

    Attributes:
        header: The settings of the job.
        outcomes: The results and errors: those of this process, and those of others as of the last ``refresh``.
    """

    @classmethod
    def open(
        cls,
        path: Path,
        header: Mapping[str, Any],
        *,
        locks: JobLocks,
        resume: bool,
        inherit_keys: Collection[str] = (),
        problem_of: ProblemOf = lambda name, facts: None,
    ) -> JobJournal:
        """Create a journal, or continue an existing one.

        Args:
            path: The file.
            header: The settings of the job, as plain data.
            locks: The locks of the job.
            resume: Whether to continue an existing journal. It is continued in any case while another process works
                on the job.
            inherit_keys: Keys of the header whose values come from an existing journal; all others must be equal.
            problem_of: Returns why a recorded result cannot be used, from its id and facts; None if it can.

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
            journal = cls(path, locks, problem_of)
            if (difference := _difference(journal.header, header, inherit_keys)) is not None:
                journal.close()
                raise InputError(f"{path} was made {difference}: give the same, or choose another output folder")
            # Not before: of two processes that start at once, neither may take an old journal for a new one.
            locks.register()
        journal._tried.clear()  # what failed in an earlier run is tried again
        return journal

    def __init__(self, path: Path, locks: JobLocks, problem_of: ProblemOf = lambda name, facts: None) -> None:
        """Open an existing file; raise InputError if it is not a journal."""
        self.path = path
        with open_regular(path) as file:
            first = file.readline()
        self.header = _read_header(first, path)
        self.outcomes = Outcomes(problem_of)
        self._tried: set[str] = set()  # ids whose error this process, or another one meanwhile, has recorded
        self._locks = locks
        self._num_bytes, self._num_lines = len(first), 1  # complete lines that have been read
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))  # Windows has O_BINARY
        self.refresh()

    @property
    def done(self) -> Mapping[str, dict[str, Any]]:
        """The facts of each usable result by its id."""
        return self.outcomes.done

    def has_failed(self, name: str) -> bool:
        """Return whether a result was tried without success since the journal was opened."""
        return name in self._tried and name not in self.done

    def record(self, name: str, /, **facts: Any) -> None:
        """Append a finished result.

        Args:
            name: The id of the result.
            **facts: Plain data about it.

        Raises:
            DiskFull: The line cannot be written; the file is unchanged.
        """
        with self._locks.exclusive():
            self._append({"id": name, **facts})
        self.outcomes.set_done(name, facts)

    def record_error(self, name: str, error: str, **facts: Any) -> None:
        """Append the error of a result or line that could not be made, unless the same one is recorded already.

        Args:
            name: The id of the result or line.
            error: The reason.
            **facts: Plain data about it.

        Raises:
            DiskFull: The line cannot be written; the file is unchanged.
        """
        facts = {"error": error, **facts}
        with self._locks.exclusive():
            self.refresh()
            if self.outcomes.errors.get(name) != json.loads(json_line(facts)):
                self._append({"id": name, **facts})
        self.outcomes.errors[name] = facts
        self._tried.add(name)

    def refresh(self) -> None:
        """Read the lines that other processes have appended since the last call."""
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
        """Turn an OSError about missing space into DiskFull within the block."""
        try:
            yield
        except OSError as error:
            if (reason := disk_full_reason(error)) is None:
                raise
            kept = f"{plural(len(self.done), 'result')} {'is' if len(self.done) == 1 else 'are'}"
            raise DiskFull(f"{reason}: {kept} kept; --resume continues when there is space") from None

    def close(self) -> None:
        """Close the file; ``header`` and ``done`` stay readable."""
        os.close(self._file)

    def _append(self, record: Mapping[str, Any]) -> None:
        """Append a line; raise DiskFull, and leave the file unchanged, if it cannot be written."""
        line = json_line(record)
        with self.translating_disk_full():
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

    def _parse(self, line: bytes) -> bool:
        """Add a line; return False if it is damaged."""
        if (name := self.outcomes.add(line)) is None:
            return False
        if name in self.outcomes.errors:
            self._tried.add(name)
        return True


def read_journal(path: Path) -> tuple[dict[str, Any], Outcomes]:
    """Read a journal that no other process may be writing to, or whose last results do not matter.

    Args:
        path: The file.

    Returns:
        Its header, and what it records. Damaged lines are ignored.

    Raises:
        InputError: The file is not a journal.
    """
    first, *lines = path.read_bytes().split(b"\n")
    header, outcomes = _read_header(first, path), Outcomes()
    for line in lines:
        outcomes.add(line)
    return header, outcomes


def is_journal(path: Path) -> bool:
    """Return whether a path is a regular file that begins as a journal does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_VERSION_KEY) + 10).startswith(f'{{"{_VERSION_KEY}"'.encode())


def refuse_existing(path: Path, locks: JobLocks) -> None:
    """Raise InputError if a journal exists and no other process works on the job.

    A process of several that were started together may come when the others have finished.

    Args:
        path: Path of the journal.
        locks: The locks of the job.
    """
    if path.exists() and not locks.has_live_peers() and not is_of_this_launch(path.stat().st_mtime):
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
    if version not in range(1, FORMAT_VERSION + 1):
        raise InputError(f"{path} has format {version}, this version of cogview knows {FORMAT_VERSION}: update cogview")
    settings = header.get("sampling")
    if isinstance(settings, dict) and all(isinstance(sampling, dict) for sampling in settings.values()):
        header["sampling"] = {task: {**_OLD_SAMPLING, **sampling} for task, sampling in settings.items()}
    return header


def _difference(stored: Mapping[str, Any], given: Mapping[str, Any], inherit_keys: Collection[str]) -> str | None:
    """Return how the header of a journal differs from that of a job; None if the job can continue it.

    Args:
        stored: The header of the journal.
        given: The header of the job.
        inherit_keys: Keys whose values come from ``stored``.

    Returns:
        The end of a sentence, such as ``with seed 7, now with seed 8``. Digests are not shown.
    """
    for key in {**given, **stored}:
        was, now = (f"{key} {_as_json(of[key])}" if key in of else f"no {key}" for of in (stored, given))
        if was == now or key == NAMES_KEY or (key in inherit_keys and key in stored):
            continue
        if key == "job":
            return "from other lines than the job file has now"
        if key != "weights":
            return f"with {was}, now with {now}"
        if NAMES_KEY not in stored:  # a journal of an earlier version
            return "with other weights than now, of the model or of an adapter"
        if stored[NAMES_KEY] != given.get(NAMES_KEY):
            return f"with {_adapters(stored)}, now with {_adapters(given)}"
        if not given[NAMES_KEY]:
            return "with other weights of the model than now"
        return f"with other weights than now, of the model or of {_adapters(given)}"
    return None


def _adapters(header: Mapping[str, Any]) -> str:
    """Return the names and the scales of the adapters of a job, for a message."""
    names = header.get(NAMES_KEY)
    return f"the adapters {format_list(names)}" if isinstance(names, list) and names else "no adapters"


def _as_json(value: Any) -> str:
    """Return a value of the header for a message."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
