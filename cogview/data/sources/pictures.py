"""Pictures of sources, whether or not they have captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from cogview.data.sources.folders import files_below
from cogview.data.sources.open import KNOWN, open_source
from cogview.data.sources.records import PictureFile, PictureRecord
from cogview.data.sources.tables import TableOptions
from cogview.errors import InputError
from cogview.image_io.reading import EXPECTED, IMAGE_SUFFIXES, UNREAD_SUFFIXES
from cogview.input_files import looked_at


def picture_records(path: Path, options: TableOptions, on_note: Callable[[str], object]) -> Iterator[PictureRecord]:
    """Yield a record of each picture of a source.

    Args:
        path: A picture; a folder, of which all pictures are taken, in those below it too; or another source of pictures
            with captions.
        options: Folder and columns of tables.
        on_note: Called with a line about what was guessed.

    Raises:
        InputError: It does not exist, cannot be read, has an unknown format, or is a folder without pictures.
    """
    if not path.exists():
        raise InputError(f"the source {path} does not exist; expected a picture, {KNOWN}{looked_at(path)}")
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        yield PictureRecord(name=str(path), file=PictureFile(path=path))
    elif path.is_dir():
        yield from _records_below(path)
    else:
        yield from open_source(path, options, on_note)


def _records_below(folder: Path) -> Iterator[PictureRecord]:
    """Yield the records of the pictures below a folder, sorted by their paths."""
    names = sorted(files_below(folder))
    if not any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        raise InputError(f"{folder} has no pictures: looked for names in {', '.join(IMAGE_SUFFIXES)}")
    for name in names:
        path = folder / name
        if name.lower().endswith(IMAGE_SUFFIXES):
            yield PictureRecord(name=str(path), file=PictureFile(path=path))
        elif name.lower().endswith(UNREAD_SUFFIXES):
            yield PictureRecord(name=str(path), problem=f"this format is not read; expected {EXPECTED}")
