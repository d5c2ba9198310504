"""A folder of pictures, each with its captions in a text file of the same name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cogview.data.sources.names import CAPTION_SUFFIX, CAPTIONS, PICTURE, UNREAD, FilePairs
from cogview.data.sources.records import GB18030_NOTE, PictureFile, PictureRecord
from cogview.errors import InputError, reason_of
from cogview.image_io.reading import EXPECTED
from cogview.tables import numbered_lines, read_text

OTHER_SOURCES = (".csv", ".tsv", ".jsonl", ".parquet", ".json", ".tar")  # that a folder may hold instead


class PictureFolder:
    """Pictures below a folder, sorted by their paths; ``NAME.txt`` has the captions of ``NAME.jpg``, one a line.

    Hidden files and folders are passed over. Links to folders are followed, each folder once. The names stand on the
    disk.

    Args:
        folder: The folder.

    Raises:
        InputError: The folder cannot be read, or has no pictures with captions at all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pairs = FilePairs(files_below(folder))
        has_pictures = self._pairs.first(PICTURE) is not None
        other = self._pairs.first_other(OTHER_SOURCES)
        if not has_pictures or (self._pairs.first(CAPTIONS) is None and other):
            lack = "no captions NAME.txt" if has_pictures else "no pictures"
            hint = f"; it holds {other}: give {folder / other} as the source" if other else ""
            raise InputError(f"{folder} has {lack}, expected NAME.jpg beside NAME.txt{hint}")

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[PictureRecord]:
        for name, kind, captions in self._pairs:
            yield self._record(name, kind, captions)

    def _record(self, name: str, kind: int, captions: str | None) -> PictureRecord:
        path = self.folder / name
        if kind == UNREAD:
            return PictureRecord(name=str(path), problem=f"this format is not read; expected {EXPECTED}")
        if kind == CAPTIONS:
            return PictureRecord(name=str(path), problem="a caption without a picture: none of this name is beside it")
        if captions is None:
            expected = path.with_suffix(CAPTION_SUFFIX).name
            return PictureRecord(name=str(path), problem=f"a picture without a caption: expected {expected} beside it")
        notes: list[str] = []
        try:
            text = read_text(str(self.folder / captions), lambda note: notes.append(GB18030_NOTE))
        except InputError as error:
            return PictureRecord(name=str(path), problem=str(error))
        lines = tuple(line for _, line in numbered_lines(text))
        if not lines:
            return PictureRecord(name=str(path), problem=f"a picture without a caption: {captions} is empty")
        return PictureRecord(name=str(path), captions=lines, file=PictureFile(path=path), notes=tuple(notes))


def files_below(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, relative to it, in any order; each folder is entered once, whatever links do.

    Args:
        folder: The folder.

    Raises:
        InputError: The folder cannot be listed.
    """

    entered: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        folders = []
        try:
            status = (folder / inner).stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder / inner) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    name = f"{inner}{os.sep}{entry.name}" if inner else entry.name
                    if _is_folder(entry):
                        folders.append(name)
                    else:
                        yield name
        except OSError as error:
            raise InputError(f"the folder {folder / inner} cannot be read: {reason_of(error)}") from None
        waiting += sorted(folders, reverse=True)  # the first one is entered next


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False
