"""A table of pictures and captions: CSV, TSV, JSON lines or Parquet, a row for each picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cogview.data.sources.columns import Columns, choose_columns
from cogview.data.sources.records import MAX_SOURCE_BYTES, PictureFile, PictureRecord
from cogview.errors import InputError
from cogview.image_io.reading import IMAGE_SUFFIXES
from cogview.tables import HeaderError, TableLines, as_whole, parse_objects, parse_table, read_text


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Where a table or a COCO file has its pictures and captions.

    Args:
        folder: Folder that paths are relative to; None for that of the file.
        image_column: Column of pictures in a table; None to guess it.
        caption_columns: Columns of captions in a table; none to guess them.
    """

    folder: Path | None = None
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()


class PictureTable:
    """The rows of a table, in its order. Rows of one picture that follow each other are one record.

    Pictures that no row names, in the folders of those that are named, follow as problems.

    Args:
        path: The table.
        options: Its folder and columns.
        on_note: Called with a note about the guessed columns.

    Raises:
        InputError: The table cannot be read, or its columns are not known.
    """

    def __init__(self, path: Path, options: TableOptions, on_note: Callable[[str], object]) -> None:
        self.path = path
        self.folder = path.parent if options.folder is None else options.folder
        lines = _parse_parquet(path) if path.suffix.lower() == ".parquet" else _parse_text(path, on_note)
        try:
            rows = list(lines)
        except HeaderError as error:
            raise InputError(f"{path}: {error}") from None
        names = list(dict.fromkeys(name for _, row in rows if isinstance(row, Mapping) for name in row))
        if not names:
            reason = f"; line {rows[0][0]}: {rows[0][1]}" if rows else ""
            raise InputError(f"{path} has no rows that can be used{reason}")
        columns = choose_columns(names, options.image_column, options.caption_columns, str(path))
        if columns.is_guessed:
            on_note(f"{path}: {columns}")
        self._records = merged_records([_record(self, columns, number, row) for number, row in rows])
        self._records += unnamed_pictures(self._records, self.path)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[PictureRecord]:
        return iter(self._records)


def merged_records(records: Sequence[PictureRecord]) -> list[PictureRecord]:
    """Return records in which those of one picture that follow each other are one, with all captions."""
    merged: list[PictureRecord] = []
    for record in records:
        if record.file is not None and merged and merged[-1].file == record.file:
            first = merged.pop()
            record = PictureRecord(name=first.name, captions=first.captions + record.captions, file=first.file)
        merged.append(record)
    return merged


def unnamed_pictures(records: Sequence[PictureRecord], path: Path) -> Iterator[PictureRecord]:
    """Yield the pictures that lie in the folders of the records' files and are not named by them, as problems.

    Args:
        records: The records of ``path``.
        path: The file of captions.
    """
    named = {record.name for record in records}
    for folder in sorted({os.path.dirname(record.file.path) for record in records if record.file is not None}):  # noqa: PTH120
        try:
            names = sorted(os.listdir(folder or "."))
        except OSError:  # each picture there has its own problem
            continue
        for name in names:
            picture = str(Path(folder, name))
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") and picture not in named:
                yield PictureRecord(name=picture, problem=f"a picture without a caption: {path} does not name it")


def _parse_text(path: Path, on_note: Callable[[str], object]) -> TableLines:
    """Parse a table in a text file."""
    suffix = path.suffix.lower()
    text = read_text(str(path), on_note, limit=MAX_SOURCE_BYTES)
    if suffix in (".csv", ".tsv"):
        return parse_table(text, "\t" if suffix == ".tsv" else ",")
    return parse_objects(text)


def _parse_parquet(path: Path) -> TableLines:
    """Parse a Parquet file."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f'{path} is a Parquet file, which needs pyarrow: pip install "cogview[data]", or save it as .csv'
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"{path} is no Parquet file that can be read: {' '.join(str(error).split())}") from None
    yield from enumerate(rows, start=1)


def _record(table: PictureTable, columns: Columns, number: int, row: Mapping[str, Any] | str) -> PictureRecord:
    """Return the record of a row."""
    problem = partial(PictureRecord, name=f"{table.path}, line {number}")
    if isinstance(row, str):
        return problem(problem=row)
    name = as_whole(row.get(columns.picture))
    if name is None or isinstance(name, bool | float | list | dict) or not str(name).strip():
        return problem(problem=f'the column "{columns.picture}" names no picture')
    captions: list[str] = []
    for column in columns.captions:
        found = row.get(column)
        for text in found if isinstance(found, list) else [found]:
            text = as_whole(text)
            if text is not None and not isinstance(text, str | int):
                return problem(problem=f'the column "{column}" holds no text')
            if text is not None and str(text).strip():
                captions.append(str(text).strip())
    path = table.folder / str(name).strip()
    if not captions:
        return PictureRecord(name=str(path), problem=f"a picture without a caption in line {number} of {table.path}")
    if "\0" in str(path):
        return problem(problem=f'the column "{columns.picture}" holds an invalid character (0)')
    return PictureRecord(name=str(path), captions=tuple(captions), file=PictureFile(path=path))
