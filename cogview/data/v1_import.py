"""Convert CogView v1 datasets to token stores."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cogview.data.store_writer import StoreWriter
from cogview.data.v1_datasets import InvalidRow, V1Dataset
from cogview.errors import InputError

_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """Result of an import: rows written, rows skipped, and why the first of them was unusable."""

    rows: int
    skipped: int
    first_error: str  # why the first skipped row was unusable; empty if none was


def import_dataset(path: Path, sources: Sequence[V1Dataset], *, skip_bad: bool = False) -> ImportReport:
    """Write the rows of v1 datasets, one after the other, to a token store.

    The store is written beside ``path`` and renamed when it is complete; an interrupted import is continued.

    Args:
        path: folder of the new store.
        sources: the datasets, with images of one size.
        skip_bad: skip unusable rows instead of stopping at the first.

    Returns:
        Numbers of rows written and skipped.

    Raises:
        InvalidRow: for the first unusable row, without ``skip_bad``.
        InputError: if ``path`` exists, images differ in size, or no row is usable.
    """
    first = sources[0]
    for source in sources[1:]:
        if source.header.grid != first.header.grid:
            raise InputError(
                f"{source.path} has {source.header.grid} x {source.header.grid} codes a row, {first.path} has "
                f"{first.header.grid} x {first.header.grid}: import them into stores of their own"
            )
    if path.exists():
        raise InputError(f"{path} is already there: remove it, or choose another name")
    header = replace(
        first.header,
        provenance={
            "released": [source.path.name for source in sources],
            "rows": [len(source) for source in sources],
        },
    )
    unfinished = path.with_name(f".{path.name}-importing")  # survives a kill, and is continued
    writer = StoreWriter(unfinished, header, resume=True)
    # Rows of an earlier import are read again, not written: the store does not record the skipped rows.
    known, skipped, first_error = writer.count, 0, ""
    try:
        with writer, tqdm(total=sum(map(len, sources)), unit="row", desc=path.name, disable=None) as bar:
            for source in sources:
                for start in range(0, len(source), _ROWS_AT_A_TIME):
                    numbers = range(start, min(start + _ROWS_AT_A_TIME, len(source)))
                    rows, errors = _usable_rows(source, numbers, skip_bad)
                    skipped += len(errors)
                    first_error = first_error or next(iter(errors), "")
                    count = len(rows["image"])
                    if count > known:
                        writer.append({name: ids[known:] for name, ids in rows.items()})
                    known = max(0, known - count)
                    bar.update(len(numbers))
        if not writer.count:
            raise InputError(f"none of the {skipped} rows can be used; the first: {first_error}")
    finally:
        if not writer.count:  # nothing to continue, and the header may be wrong
            shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.replace(path)
    return ImportReport(rows=writer.count, skipped=skipped, first_error=first_error)


def _usable_rows(source: V1Dataset, numbers: range, skip_bad: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the usable ones of the rows ``numbers``, and the reasons of the others if they may be skipped."""
    try:
        return source.read(numbers), []
    except InvalidRow:
        if not skip_bad:
            raise
    good, errors = [], []
    for number in numbers:
        try:
            good.append(source.read([number]))
        except InvalidRow as error:
            errors.append(error.reason)
    empty = source.read([])
    return {name: np.concatenate([ids, *(row[name] for row in good)]) for name, ids in empty.items()}, errors
