"""A table of pictures and captions: CSV, TSV, JSON lines or Parquet, a row for each picture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cogview.data.sources.columns import Columns, choose_columns
from cogview.data.sources.names import NamedPictures
from cogview.data.sources.records import MAX_SOURCE_BYTES, PictureFile, PictureRecord, boxes_cell
from cogview.errors import InputError
from cogview.tables import HeaderError, TableLines, as_whole, parse_objects, parse_table, stream_lines

PARQUET_ROWS = 1000  # rows in memory


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Where a table or a COCO file has its pictures and captions.

    Args:
        folder: Folder that paths are relative to; None for that of the file.
        image_column: Column of pictures in a table; None to guess it.
        caption_columns: Columns of captions in a table; none to guess them.
        source_column: Column of a table with the pictures before an edit; None for none.
        boxes_column: Column of a table, or key of a ``.json`` member of a shard, with named boxes; None for none.
    """

    folder: Path | None = None
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    source_column: str | None = field(default=None, metadata={"omit_default": True})
    boxes_column: str | None = None


class PictureTable:
    """The rows of a table, in its order. Rows of one picture that follow each other are one record.

    Pictures that no row names, in the folders of those that are named, follow as problems. Every iteration reads the
    table anew, so that only a row of it is in memory.

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
        try:
            names = self._column_names(on_note)
        except HeaderError as error:
            raise InputError(f"{path}: {error}") from None
        self.columns = choose_columns(
            names,
            options.image_column,
            options.caption_columns,
            str(path),
            options.boxes_column,
            options.source_column,
        )
        if self.columns.is_guessed:
            on_note(f"{path}: {self.columns}")
        named = NamedPictures()
        self._count = sum(1 for _ in merged_records(map(named.add, self._records())))
        named.find_others()
        self._unnamed = named

    def __len__(self) -> int:
        return self._count + len(self._unnamed)

    def __iter__(self) -> Iterator[PictureRecord]:
        yield from merged_records(self._records())
        yield from unnamed_records(self._unnamed, self.path)

    def _column_names(self, on_note: Callable[[str], object]) -> list[str]:
        """Return the columns in their order: those of the first row, or of all objects in JSON lines."""
        names: dict[str, None] = {}
        first = ""
        for number, row in self._rows(on_note):
            if isinstance(row, str):
                first = first or f"; line {number}: {row}"
                continue
            names.update(dict.fromkeys(row))
            if self.path.suffix.lower() != ".jsonl":
                break
        if not names:
            raise InputError(f"{self.path} has no rows that can be used{first}")
        return list(names)

    def _records(self) -> Iterator[PictureRecord]:
        """Yield a record for each row."""
        for number, row in self._rows(lambda note: None):
            yield _record(self, self.columns, number, row)

    def _rows(self, on_note: Callable[[str], object]) -> TableLines:
        """Yield the rows."""
        suffix = self.path.suffix.lower()
        if suffix == ".parquet":
            return _parse_parquet(self.path)
        lines = stream_lines(self.path, on_note, limit=MAX_SOURCE_BYTES)
        if suffix in (".csv", ".tsv"):
            return parse_table(lines, "\t" if suffix == ".tsv" else ",")
        return parse_objects(lines)


def merged_records(records: Iterable[PictureRecord]) -> Iterator[PictureRecord]:
    """Yield records, with those of one picture that follow each other as one with all captions."""
    for (file, source), group in itertools.groupby(records, key=lambda record: (record.file, record.source)):
        if file is None:
            yield from group
            continue
        first, *others = group
        captions = first.captions + tuple(caption for record in others for caption in record.captions)
        boxes = tuple(dict.fromkeys(cell for record in (first, *others) for cell in record.boxes))
        joint = PictureRecord(name=first.name, captions=captions, boxes=boxes, file=file, source=source)
        yield joint if others else first


def unnamed_records(names: Iterable[str], path: Path) -> Iterator[PictureRecord]:
    """Yield pictures that ``path`` does not name, as problems."""
    for name in names:
        yield PictureRecord(name=name, problem=f"a picture without a caption: {path} does not name it")


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
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(PARQUET_ROWS))
            yield from enumerate(rows, start=1)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"{path} is no Parquet file that can be read: {' '.join(str(error).split())}") from None


def _record(table: PictureTable, columns: Columns, number: int, row: Mapping[str, Any] | str) -> PictureRecord:
    """Return the record of a row."""
    problem = partial(PictureRecord, name=f"{table.path}, line {number}")
    if isinstance(row, str):
        return problem(problem=row)
    paths = {}
    for column in filter(None, (columns.picture, columns.source)):
        name = as_whole(row.get(column))
        if name is None or isinstance(name, bool | float | list | dict) or not str(name).strip():
            return problem(problem=f'the column "{column}" names no picture')
        paths[column] = table.folder / str(name).strip()
    captions: list[str] = []
    for column in columns.captions:
        found = row.get(column)
        for text in found if isinstance(found, list) else [found]:
            text = as_whole(text)
            if text is not None and not isinstance(text, str | int):
                return problem(problem=f'the column "{column}" holds no text')
            if text is not None and str(text).strip():
                captions.append(str(text).strip())
    path = paths[columns.picture]
    if not captions:
        return PictureRecord(name=str(path), problem=f"a picture without a caption in line {number} of {table.path}")
    for column, each in paths.items():
        if "\0" in str(each):
            return problem(problem=f'the column "{column}" holds an invalid character (0)')
    boxes = boxes_cell(row.get(columns.boxes)) if columns.boxes is not None else ()
    source = None if columns.source is None else PictureFile(path=paths[columns.source])
    file = PictureFile(path=path)
    return PictureRecord(name=str(path), captions=tuple(captions), boxes=boxes, file=file, source=source)
