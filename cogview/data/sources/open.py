"""Open sources of captioned pictures by their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cogview.data.sources.coco import CocoCaptions
from cogview.data.sources.folders import PictureFolder
from cogview.data.sources.records import PictureSource
from cogview.data.sources.tables import PictureTable, TableOptions
from cogview.data.sources.tar_shards import TarShard
from cogview.errors import InputError
from cogview.input_files import looked_at, open_regular

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
KNOWN = "a folder, .csv, .tsv, .jsonl, .parquet, COCO's .json, or a .tar shard"


def _require_no_source(path: Path, options: TableOptions) -> None:
    """Raise InputError for a column of sources in what has no columns."""
    if options.source_column is not None:
        raise InputError(
            f"the column {options.source_column} of pictures before an edit needs a table, got {path}; expected "
            f"{', '.join(TABLES)}"
        )


def open_source(path: Path, options: TableOptions, on_note: Callable[[str], object]) -> PictureSource:
    """Open a source of captioned pictures.

    Args:
        path: A folder, or a file whose suffix selects the format.
        options: Folder and columns of tables.
        on_note: Called with a line about what was guessed.

    Raises:
        InputError: It does not exist, cannot be read, or has an unknown format.
    """
    if not path.exists():
        raise InputError(f"the source {path} does not exist; expected {KNOWN}{looked_at(path)}")
    if path.is_dir():
        _require_no_source(path, options)
        return PictureFolder(path)
    open_regular(path).close()
    suffix = path.suffix.lower()
    if suffix in TABLES:
        return PictureTable(path, options, on_note)
    _require_no_source(path, options)
    if suffix == ".json":
        return CocoCaptions(path, options)
    if suffix == ".tar":
        return TarShard(path, options.boxes_column)
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip", ".7z", ".rar")):
        raise InputError(f"{path} is compressed: unpack it first, and give the folder or the .tar file")
    raise InputError(f'{path}: the suffix "{suffix}" is unknown; expected {KNOWN}')
