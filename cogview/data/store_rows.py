"""Rows of a token store in the table of its LMDB: one to a value, or several where rows are long.

LMDB gives pages of 4096 bytes of its own to a value that does not fit twice into a page, so that a row of 2176 bytes
(64 pieces and 1024 codes) would take nearly twice its bytes. 15 of them take 8 pages.
"""

# N rows
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PAGE, HEADER = 4096, 16  # bytes of a page, and of the header before a value on pages of its own
LARGEST_SINGLE = 1340  # bytes of a row of which three fit into a page, with their keys
MAX_PAGES = 8  # of a value


def best_rows_per_value(size: int) -> int:
    """Return the number of rows of ``size`` bytes in a value that wastes the least of its pages.

    Examples:
        >>> best_rows_per_value(176), best_rows_per_value(2176)
        (1, 15)
    """
    if size <= LARGEST_SINGLE:
        return 1
    counts = [(pages * PAGE - HEADER) // size for pages in range(1, MAX_PAGES + 1)]
    shares = [count * size / (pages * PAGE) for pages, count in enumerate(counts, start=1)]
    return max(1, counts[shares.index(max(shares))])


def read_rows(transaction: Any, indices_N: np.ndarray, size: int, per_value: int) -> list[bytes]:
    """Return rows, each as bytes; fewer than ``size`` where a row is missing.

    Args:
        transaction: A transaction of the table, with buffers.
        indices_N: (N,) int64 numbers of rows.
        size: Bytes of a row.
        per_value: Rows in a value.
    """
    if per_value == 1:
        return [bytes(transaction.get(key, b"")) for key in keys_of(indices_N)]
    values, places = np.divmod(indices_N, per_value)
    return [
        bytes(transaction.get(key, b"")[place * size : (place + 1) * size])
        for key, place in zip(keys_of(values), places.tolist(), strict=True)
    ]


def append_rows(transaction: Any, table: Any, count: int, rows: Sequence[bytes], per_value: int) -> None:
    """Append rows to a table that has ``count`` of them.

    Args:
        transaction: A transaction for writing.
        table: The table.
        count: Rows that it has.
        rows: The rows, each as bytes.
        per_value: Rows in a value.
    """
    first, present = divmod(count, per_value)
    if present and rows:  # the last value has room
        key = keys_of(np.array([first]))[0]
        filled, rows = rows[: per_value - present], rows[per_value - present :]
        transaction.put(key, transaction.get(key, db=table) + b"".join(filled), db=table)
        first += 1
    values = [b"".join(rows[start : start + per_value]) for start in range(0, len(rows), per_value)]
    keys = keys_of(np.arange(first, first + len(values)))
    with transaction.cursor(table) as cursor:
        cursor.putmulti(zip(keys, values, strict=True), append=True)


def keys_of(indices_N: np.ndarray) -> list[bytes]:
    """Return the keys of values: their numbers as eight big-endian bytes."""
    packed = indices_N.astype(">u8").tobytes()
    return [packed[at : at + 8] for at in range(0, len(packed), 8)]
