"""The journal of a store that is being built: what became of each record, in blocks, so that a kill loses no work.

Its first line holds the settings of the build. A line follows for each record. The lines of a block are on the disk
before the rows of the block are committed to the stores, so a block counts as done if the stores hold its rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cogview.errors import InputError
from cogview.files import json_line
from cogview.plain_data import parse_json

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """What became of a record.

    Attributes:
        name: Name of the record.
        source: Hash of its name and captions, by which a changed source is found.
        stamp: Size and time of change of its file, by which a changed picture is found.
        digest: Hash of the pixels; empty if the picture is left out.
        captions: Captions that became rows.
        held_out: Whether the rows belong to the held-out store.
        left_out: Why the picture or captions of it are left out.
        notes: Choices that changed pixels or captions.
    """

    name: str
    source: str
    stamp: str = ""
    digest: str = ""
    captions: tuple[str, ...] = ()
    held_out: bool = False
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_line(self) -> bytes:
        """Return the entry as a line of JSON."""
        return json_line({key: value for key, value in asdict(self).items() if value})

    @classmethod
    def from_mapping(cls, found: Mapping[str, Any]) -> JournalEntry:
        """Return the entry of a line; raise ValueError if it is none."""
        types = {each.name: type(each.default) for each in fields(cls)} | {"name": str, "source": str}
        values: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in found.items()}
        if not {"name", "source"} <= values.keys() or any(
            type(each) is not types.get(key)
            or (type(each) is tuple and not all(isinstance(text, str) for text in each))
            for key, each in values.items()
        ):
            raise ValueError("no entry")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a build continues.

    Attributes:
        records: Records of the blocks that are done.
        surplus: Rows beyond those blocks, by whether they are held out, that the stores hold already.
    """

    records: int = 0
    surplus: Mapping[bool, int]


class BuildJournal:
    """The journal at ``path``.

    Args:
        path: The file; it need not exist.
        settings: Settings of the build, as plain data, which must be the same whenever it is continued.
        kept: Further settings, which keep the values of the first start.

    Attributes:
        header: The settings as they are stored.

    Raises:
        InputError: The journal was begun with other settings, or by a newer version.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
        self.path = path
        self._end = 0  # where the next block is written, after ``resume``
        given = {"format_version": FORMAT_VERSION, **settings}
        stored = self._read_header()
        if stored is None:
            with path.open("wb") as file:
                file.write(json_line({**given, **kept}))
        self.header: dict[str, Any] = self._read_header() or {}
        for key, value in parse_json(json_line(given)).items():
            if self.header.get(key) != value:
                raise InputError(
                    f"{path.parent} holds a build that was started with other settings ({key}): "
                    f"run it with the same command, or remove {path.parent} to start anew"
                )

    def entries(self) -> Iterator[JournalEntry]:
        """Yield the entries up to one that a kill cut short."""
        for _, entry in self._positions():
            yield entry

    def resume(self, block: int, rows: Mapping[bool, int]) -> ResumePoint:
        """Return where to continue; the next block is written there.

        The entries of a block that is not done stay until they are written again, since rows of it may be committed.

        Args:
            block: Records in a block.
            rows: Committed rows of the training store (False) and of the held-out store (True).

        Raises:
            InputError: The stores hold rows that the journal does not explain.
        """
        done = {False: 0, True: 0}
        count, self._end = 0, self._start()
        point = ResumePoint(surplus=dict(rows))
        for count, (end, entry) in enumerate(self._positions(), start=1):
            done[entry.held_out] += len(entry.captions)
            if count % block == 0 and all(done[split] <= rows[split] for split in done):
                point = ResumePoint(records=count, surplus={split: rows[split] - done[split] for split in done})
                self._end = end
        if any(rows[split] > done[split] for split in done):
            raise InputError(
                f"{self.path.parent} is damaged, its journal of {count} records has fewer rows than its stores: "
                f"remove {self.path.parent} to start anew"
            )
        return point

    def append(self, entries: Sequence[JournalEntry]) -> None:
        """Write the entries of the next block, and wait until they are on the disk."""
        with self.path.open("r+b") as file:
            file.seek(self._end)
            file.write(b"".join(entry.to_line() for entry in entries))
            self._end = file.tell()
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    def _read_header(self) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            with self.path.open("rb") as file:
                line = file.readline()
            found = parse_json(line)
            if line.endswith(b"\n") and isinstance(found, dict):
                return found
        return None

    def _start(self) -> int:
        """Return the position after the header."""
        with self.path.open("rb") as file:
            return len(file.readline())

    def _positions(self) -> Iterator[tuple[int, JournalEntry]]:
        """Yield the entries, each with the position of its end."""
        with self.path.open("rb") as file:
            position = len(file.readline())
            for line in file:
                try:
                    found = parse_json(line)
                    if not line.endswith(b"\n") or not isinstance(found, dict):
                        return
                    entry = JournalEntry.from_mapping(found)
                except (ValueError, TypeError):
                    return
                position += len(line)
                yield position, entry
