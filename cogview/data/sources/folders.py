"""A folder of pictures, each with its captions in a text file of the same name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cogview.data.sources.records import GB18030_NOTE, PictureFile, PictureRecord
from cogview.errors import InputError
from cogview.image_io.reading import EXPECTED, IMAGE_SUFFIXES, UNREAD_SUFFIXES
from cogview.tables import numbered_lines, read_text

CAPTION_SUFFIX = ".txt"
OTHER_SOURCES = (".csv", ".tsv", ".jsonl", ".parquet", ".json", ".tar")  # that a folder may hold instead


class PictureFolder:
    """Pictures below a folder, sorted by their paths; ``NAME.txt`` has the captions of ``NAME.jpg``, one a line.

    Hidden files and folders are passed over. Links to folders are followed, each folder once.

    Args:
        folder: The folder.

    Raises:
        InputError: The folder cannot be read, or has no pictures with captions at all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = sorted(files_below(folder))
        suffixes = {os.path.splitext(name)[1].lower() for name in self.names}  # noqa: PTH122  faster for millions
        self._stems = {name[: -len(CAPTION_SUFFIX)]: name for name in self.names if _is(name, (CAPTION_SUFFIX,))}
        self._pictures = {_stem(name) for name in self.names if _is(name, IMAGE_SUFFIXES)}
        others = [name for name in self.names if _is(name, OTHER_SOURCES)]
        if not self._pictures or (CAPTION_SUFFIX not in suffixes and others):
            lack = "no captions NAME.txt" if self._pictures else "no pictures"
            hint = f"; it holds {others[0]}: give {folder / others[0]} as the source" if others else ""
            raise InputError(f"{folder} has {lack}, expected NAME.jpg beside NAME.txt{hint}")
        used = (CAPTION_SUFFIX, *IMAGE_SUFFIXES, *UNREAD_SUFFIXES)
        self.names = [name for name in self.names if _is(name, used) and not self._is_caption_of_picture(name)]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[PictureRecord]:
        for name in self.names:
            yield self._record(name)

    def _is_caption_of_picture(self, name: str) -> bool:
        return _is(name, (CAPTION_SUFFIX,)) and _stem(name) in self._pictures

    def _record(self, name: str) -> PictureRecord:
        path = self.folder / name
        if _is(name, UNREAD_SUFFIXES):
            return PictureRecord(name=str(path), problem=f"this format is not read; expected {EXPECTED}")
        if _is(name, (CAPTION_SUFFIX,)):
            return PictureRecord(name=str(path), problem="a caption without a picture: none of this name is beside it")
        if (captions := self._stems.get(_stem(name))) is None:
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

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {error.filename} cannot be read: {error.strerror}")

    entered: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = os.path.relpath(parent, folder)
        for name in files:
            if not name.startswith("."):
                yield name if inner == "." else f"{inner}{os.sep}{name}"


def _is(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122
