"""Records of captioned pictures, and the protocol of their sources."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cogview.errors import InputError, reason_of

GB18030_NOTE = "its captions are not UTF-8 and are read as GB18030 (GBK)"

MAX_SOURCE_BYTES = 1 << 30  # of a COCO file or a table in GBK, which are held in memory; several make one store


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """The bytes of a picture: a file, or a part of an archive.

    Args:
        path: The file.
        offset: First byte of the part.
        size: Bytes of the part; None for a file of its own.
    """

    path: Path
    offset: int = 0
    size: int | None = None

    def stamp(self) -> str:
        """Return size and time of change of the file, as text; empty if there is none."""
        try:
            status = self.path.stat()
        except (OSError, ValueError):
            return ""
        return f"{status.st_size} {status.st_mtime_ns}"

    def read_part(self) -> bytes | None:
        """Return the bytes of a part of an archive; None for a file of its own, which its reader opens.

        Raises:
            InputError: The archive cannot be read, or ends before the part.
        """
        if self.size is None:
            return None
        try:
            with self.path.open("rb") as archive:
                archive.seek(self.offset)
                content = archive.read(self.size)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {reason_of(error)}") from None
        if len(content) < self.size:
            raise InputError(f"{self.path} ends within it, after {len(content)} of {self.size} bytes")
        return content


@dataclass(frozen=True, kw_only=True)
class PictureRecord:
    """A picture with its captions, or an entry of a source that cannot be used.

    Args:
        name: Name in messages and reports: the path of the file, or archive and member.
        captions: The captions as the source has them.
        boxes: Lists of named boxes as the source has them, in JSON.
        file: The picture; None with a ``problem``.
        source: The picture before an edit that the captions ask for; None for a picture that they describe.
        problem: Why the entry cannot be used.
        notes: What was chosen in reading the captions.
    """

    name: str
    captions: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()
    file: PictureFile | None = None
    source: PictureFile | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()

    def stamp(self) -> str:
        """Return size and time of change of the files, as text; empty if there are none."""
        return " ".join(file.stamp() for file in (self.file, self.source) if file is not None)


def boxes_cell(value: Any) -> tuple[str, ...]:
    """Return a value with named boxes as JSON: text stays as it is, and lists become text; none for an empty value."""
    if value is None or value == "":
        return ()
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str),)


class PictureSource(Protocol):
    """Captioned pictures in a stated order, which is the same in every iteration."""

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __iter__(self) -> Iterator[PictureRecord]:
        """Yield the records."""
        ...
