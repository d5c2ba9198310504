"""Captions of sources of pictures, or of a text file, without the pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from cogview.data.sources.open import KNOWN, open_source
from cogview.data.sources.records import PictureRecord
from cogview.data.sources.tables import TableOptions
from cogview.errors import InputError
from cogview.input_files import looked_at
from cogview.tables import line_problem, numbered_lines, read_text


def caption_records(path: Path, options: TableOptions, on_note: Callable[[str], object]) -> Iterator[PictureRecord]:
    """Yield records with the captions of a source, whether or not their pictures can be read.

    Args:
        path: A source of pictures with captions, or a ``.txt`` file with a caption a line.
        options: Folder and columns of tables.
        on_note: Called with a line about what was guessed.

    Raises:
        InputError: It does not exist, cannot be read, or has an unknown format.
    """
    if not path.exists():
        raise InputError(
            f"the source {path} does not exist; expected a .txt file with a caption a line, {KNOWN}{looked_at(path)}"
        )
    if path.is_dir() or path.suffix.lower() != ".txt":
        yield from open_source(path, options, on_note)
        return
    for number, line in numbered_lines(read_text(str(path), on_note)):
        name = f"{path}, line {number}"
        if problem := line_problem(line):
            yield PictureRecord(name=name, problem=problem)
        else:
            yield PictureRecord(name=name, captions=(line,))
