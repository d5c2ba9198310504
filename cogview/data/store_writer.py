"""Write token stores (the format is described in ``store.py``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from cogview.data.store import (
    _COUNT_KEY,
    _HEADER_KEY,
    _ON_DISK,
    _ROWS_TABLE,
    NO_TOKEN,
    TEXT_FIELDS,
    StoreHeader,
    _check_whole,
    _read_header,
    _shown,
    naming_damage,
)
from cogview.data.store_blocks import BLOCKS_FILE, write_blocks
from cogview.data.store_checksum import CHECKSUM_FILE, DATA_FILE, check_sum, write_checksum
from cogview.data.store_rows import append_rows, best_rows_per_value
from cogview.errors import InputError, RetryLaterError, reason_of
from cogview.files import try_lock
from cogview.formatting import format_bytes

ROWS_PER_TRANSACTION = 16384


def pad_text(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Pad the piece ids of texts to one width.

    Args:
        rows: N sequences of piece ids.
        width: width of the text field.

    Returns:
        (N, width) uint16 array, filled with ``NO_TOKEN`` after the last piece of each text.

    Raises:
        InputError: if a text has more than ``width`` pieces.
    """
    text_NW = np.full((len(rows), width), NO_TOKEN, dtype=np.uint16)
    for row, ids in enumerate(rows):
        if len(ids) > width:
            raise InputError(f"text {row} has {len(ids)} pieces, the store has room for {width}: widen its text field")
        text_NW[row, : len(ids)] = ids
    return text_NW


class StoreWriter:
    """Write a token store; a context manager.

    Rows and their count are committed together, ``ROWS_PER_TRANSACTION`` at a time: after a crash or a full disk the
    store holds ``count`` whole rows and is readable. A store must not be read while it is written. One process at a
    time writes a store.

    Args:
        path: folder of the store.
        header: header of the store.
        resume: continue a partly written store, or begin one if there is none; the caller continues with row ``count``.
        map_size: initial limit of the file in bytes; it doubles when needed.

    Raises:
        InputError: if the folder holds a store and ``resume`` is False, if its header differs or it is not writable.
        RetryLaterError: if another process writes the store.
    """

    def __init__(self, path: str | Path, header: StoreHeader, *, resume: bool = False, map_size: int = 2**26) -> None:
        import lmdb

        self.path = Path(path)
        size = header.row_width * _ON_DISK.itemsize
        self.header = replace(header, rows_per_value=best_rows_per_value(size))
        if (is_there := (self.path / DATA_FILE).exists()) and not resume:
            raise InputError(f"{self.path} already holds a store: remove it, or resume the writing")
        self._sum_is_due = False
        with ExitStack() as on_error:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = _lock(self.path / DATA_FILE)
                on_error.callback(os.close, lock)
                if is_there:
                    check_sum(self.path)
                # LMDB would map its own file of locks, and on a full disk a write to that ends the process by a signal.
                self._environment = lmdb.open(str(self.path), map_size=map_size, max_dbs=1, lock=False)
                on_error.callback(self._environment.close)
            except (OSError, lmdb.Error) as error:
                raise InputError(f"cannot write a store to {self.path}: {reason_of(error)}") from error
            with naming_damage(self.path):
                begun = self._environment.stat()["entries"] > 0
            if begun:
                _check_whole(self.path, self._environment)
                stored, self._count = _read_header(self.path, self._environment)
                self.header = replace(header, rows_per_value=stored.rows_per_value)
                _check_same_header(self.path, stored, self.header)
            else:
                self._count = 0
            with naming_damage(self.path):
                self._commit([])
            self._lock: int | None = lock
            on_error.pop_all()

    @property
    def count(self) -> int:
        """Number of rows committed so far, earlier runs included."""
        return self._count

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append and commit rows. Many rows per call are faster, since every commit waits for the disk.

        Args:
            rows: an (N, width) integer array for every field of the header.

        Raises:
            InputError: if fields, shapes, dtypes or ids do not match the header.
            RetryLaterError: if the disk is full.
        """
        packed_NW = self._pack(rows)
        width = self.header.row_width * _ON_DISK.itemsize
        for start in range(0, len(packed_NW), ROWS_PER_TRANSACTION):
            chunk = packed_NW[start : start + ROWS_PER_TRANSACTION].tobytes()
            self._commit([chunk[at : at + width] for at in range(0, len(chunk), width)])

    def close(self) -> None:
        """Close the file and write its checksums."""
        self._environment.close()
        if self._sum_is_due:
            self._sum_is_due = False
            with suppress(OSError):  # a store without checksums is whole, too
                write_checksum(self.path)
                write_blocks(self.path, self._count)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pack(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        header = self.header
        if set(rows) != set(header.fields):
            raise InputError(f"the rows have the fields {sorted(rows)}, the store has {sorted(header.fields)}")
        num_rows = len(next(iter(rows.values())))
        for name, width in header.fields.items():
            ids_NW = rows[name]
            if ids_NW.shape != (num_rows, width):
                raise InputError(f'field "{name}" has shape {ids_NW.shape}, expected {(num_rows, width)}')
            if not np.issubdtype(ids_NW.dtype, np.integer):
                raise InputError(f'field "{name}" holds {ids_NW.dtype}, expected integers')
            if (wrong := header.ids_outside(name, ids_NW)).size:
                raise InputError(f'field "{name}" holds {wrong[0]}, expected ids in 0…{header.limit_of(name) - 1}')
            absent_NW = ids_NW == NO_TOKEN
            if name in TEXT_FIELDS and (absent_NW[:, :-1] & ~absent_NW[:, 1:]).any():
                raise InputError(f'field "{name}" has a piece after padding; padding comes last')
        return np.concatenate([rows[name].astype(_ON_DISK) for name in header.fields], axis=1)

    def _commit(self, values: Sequence[bytes]) -> None:
        """Append ``values`` in one transaction with the new count; in an empty store, write header and table too."""
        import lmdb

        if not self._sum_is_due:  # a checksum that the next commit makes wrong must not survive a kill
            for name in (CHECKSUM_FILE, BLOCKS_FILE):
                (self.path / name).unlink(missing_ok=True)
            self._sum_is_due = True
        end = self._count + len(values)
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    if self._count == 0:
                        transaction.put(_HEADER_KEY, self.header.to_json().encode())
                    table = self._environment.open_db(_ROWS_TABLE, txn=transaction)
                    append_rows(transaction, table, self._count, values, self.header.rows_per_value)
                    transaction.put(_COUNT_KEY, b"%d" % end)
                break
            except lmdb.MapFullError:  # the transaction is undone, nothing is lost
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
            except lmdb.Error as error:  # on a full disk, an error of input and output
                free = shutil.disk_usage(self.path).free
                raise RetryLaterError(
                    f"rows could not be written to {self.path} ({error}), where {format_bytes(free)} are free: "
                    f"{self._count} rows are kept; make room, or raise a limit on files (ulimit -f), and run the "
                    "same command again"
                ) from None
        self._count = end


def _lock(data: Path) -> int:
    """Lock the data of a store for its writer until the descriptor is closed; return the descriptor.

    Raises:
        RetryLaterError: Another writer has the lock.
    """
    file = os.open(data, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(OSError):  # on a file system without locks, one process writes at a time
        if not try_lock(file):
            os.close(file)
            raise RetryLaterError(f"the store {data.parent} is being written by another process: wait until it ends")
    return file


def is_being_written(data: Path) -> bool:
    """Return whether a writer has the data of a store open."""
    try:
        with data.open("rb") as file:
            return not try_lock(file.fileno(), shared=True)
    except OSError:
        return False


def _check_same_header(path: Path, stored: StoreHeader, given: StoreHeader) -> None:
    before, now = asdict(stored), asdict(StoreHeader.from_json(given.to_json()))
    for name, value in now.items():
        if before[name] != value:
            raise InputError(
                f"{path} was started with {name} {_shown(before[name])}, now it is {_shown(value)}: "
                "remove the store, or resume with the settings it was started with"
            )
