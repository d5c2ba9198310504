"""The token store: rows of text pieces and image codes on disk, ready for training.

A store is an LMDB folder. Its main table holds two keys, ``header`` (JSON, :class:`StoreHeader`) and ``count``
(decimal); its table ``rows`` holds one value per row, under the row's number as eight big-endian bytes. A value is
the row's fields, one after the other in the order of the header, as little-endian uint16. Nothing is pickled, so a
store from elsewhere cannot run code, and a row of 24 pieces and 64 codes takes 176 bytes.

Reading maps the file into memory. The pages count as cache, shared by every worker, not as memory of each of them.
"""

# N rows, W width of a field

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from cogview.errors import InputError
from cogview.formatting import shorten

if TYPE_CHECKING:
    import lmdb
    from torch import Tensor

FORMAT_VERSION = 1
NO_TOKEN = 0xFFFF  # fills a text field behind its last piece
TEXT_FIELD = "text"
ROWS_PER_TRANSACTION = 16384
DATA_FILE = "data.mdb"

_HEADER_KEY = b"header"
_COUNT_KEY = b"count"
_RELEASED_COUNT_KEY = b"length"  # of a released dataset (cogview.data.v1_datasets)
_ROWS_TABLE = b"rows"
_ON_DISK = np.dtype("<u2")


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What the rows of a store are, and what they were made with.

    ``fields`` maps a field to its width, in the order of the row. The field ``text`` holds piece ids of the text
    model, without the offset they have in the vocabulary, and ``ABSENT`` behind the last; every other field holds
    image codes. ``layouts`` names the tasks the rows can feed. ``provenance`` is free, as long as JSON can hold it
    and it stays the same when a writing is resumed.
    """

    fields: dict[str, int]
    grid: int
    num_image_codes: int
    num_text_pieces: int
    layouts: tuple[str, ...]
    codebook_sha256: str
    text_sha256: str
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not self.fields or any(width < 1 for width in self.fields.values()):
            raise ValueError(f"a row needs fields of width 1 or more, got {self.fields}")
        if self.grid < 1:
            raise ValueError(f"the code grid must be 1 or more on a side, got {self.grid}")
        if self.fields.get("image", self.grid**2) != self.grid**2:
            raise ValueError(f'a grid of {self.grid} has {self.grid**2} codes, "image" is {self.fields["image"]} wide')
        for name in ("num_image_codes", "num_text_pieces"):
            if not 1 <= getattr(self, name) <= NO_TOKEN:
                raise ValueError(f"{name} must be in 1…{NO_TOKEN} to fit 16 bits, got {getattr(self, name)}")

    @property
    def row_width(self) -> int:
        """Ids in a row, all fields together."""
        return sum(self.fields.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> StoreHeader:
        """Read ``to_json`` back; a newer format or a header that is none raises ValueError."""
        mapping = json.loads(text)
        if not isinstance(mapping, dict):
            raise ValueError("its header is not a JSON object")
        version = mapping.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(f"it has format {version}, this version reads up to {FORMAT_VERSION}: update cogview")
        names = {known.name for known in fields(StoreHeader)}
        if set(mapping) != names:
            raise ValueError(f"its header has the fields {sorted(mapping)}, expected {sorted(names)}")
        return StoreHeader(**{**mapping, "layouts": tuple(mapping["layouts"])})


def pad_text(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Piece ids of N texts as a (N, ``width``) uint16 array, ``ABSENT`` behind the last piece of each."""
    text_NW = np.full((len(rows), width), NO_TOKEN, dtype=np.uint16)
    for row, ids in enumerate(rows):
        if len(ids) > width:
            raise InputError(f"text {row} has {len(ids)} pieces, the store has room for {width}: widen its text field")
        text_NW[row, : len(ids)] = ids
    return text_NW


def text_lengths(text_NW: np.ndarray) -> np.ndarray:
    """How many pieces each row of a text field holds: (N,) int64."""
    return (text_NW != NO_TOKEN).sum(axis=-1)


def as_tensors(rows: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Rows from ``TokenStore.read`` as int64 tensors; the ``collate_fn`` of a DataLoader over a store."""
    import torch

    return {name: torch.from_numpy(ids.astype(np.int64)) for name, ids in rows.items()}


class StoreWriter:
    """Writes a store; a context manager.

    Rows and their count are committed together, ``ROWS_PER_TRANSACTION`` at a time: after a crash or a full disk the
    store holds ``count`` whole rows and can be read. ``resume=True`` goes on with such a store (or begins one where
    there is none); the caller continues with row ``count``. ``map_size`` is where the file's limit starts, in bytes;
    it doubles as needed. A store must not be read while it is written.
    """

    def __init__(self, path: str | Path, header: StoreHeader, *, resume: bool = False, map_size: int = 2**26) -> None:
        import lmdb

        self.path = Path(path)
        self.header = header
        if (self.path / DATA_FILE).exists() and not resume:
            raise InputError(f"{self.path} already holds a store: remove it, or resume the writing")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._environment = lmdb.open(str(self.path), map_size=map_size, max_dbs=1)
        except (OSError, lmdb.Error) as error:
            raise InputError(f"cannot write a store to {self.path}: {error}") from error
        try:
            if self._environment.stat()["entries"]:
                _check_whole(self.path, self._environment)
                stored, self._count = _read_header(self.path, self._environment)
                _check_same_header(self.path, stored, header)
            else:
                self._count = 0
            self._commit([])
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """Rows committed so far, those of an earlier writing included."""
        return self._count

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append and commit N rows: for every field of the header an (N, width) array of integers.

        Many rows at once are quicker: every commit waits for the disk.
        """
        packed_NW = self._pack(rows)
        width = self.header.row_width * _ON_DISK.itemsize
        for start in range(0, len(packed_NW), ROWS_PER_TRANSACTION):
            chunk = packed_NW[start : start + ROWS_PER_TRANSACTION].tobytes()
            self._commit([chunk[at : at + width] for at in range(0, len(chunk), width)])

    def close(self) -> None:
        self._environment.close()

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
            is_text = name == TEXT_FIELD
            limit = header.num_text_pieces if is_text else header.num_image_codes
            absent_NW = ids_NW == NO_TOKEN if is_text else np.zeros_like(ids_NW, dtype=bool)
            wrong = ids_NW[~absent_NW & ((ids_NW < 0) | (ids_NW >= limit))]
            if wrong.size:
                raise InputError(f'field "{name}" holds {wrong[0]}, expected ids in 0…{limit - 1}')
            if (absent_NW[:, :-1] & ~absent_NW[:, 1:]).any():
                raise InputError(f'field "{name}" has a piece behind an absent one: absent pieces come last')
        return np.concatenate([rows[name].astype(_ON_DISK) for name in header.fields], axis=1)

    def _commit(self, values: Sequence[bytes]) -> None:
        """Append ``values`` in one transaction, with the new count and, in an empty store, the header and the table."""
        import lmdb

        end = self._count + len(values)
        keys = _keys(np.arange(self._count, end))
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    if self._count == 0:
                        transaction.put(_HEADER_KEY, self.header.to_json().encode())
                    table = self._environment.open_db(_ROWS_TABLE, txn=transaction)
                    with transaction.cursor(table) as cursor:
                        cursor.putmulti(zip(keys, values, strict=True), append=True)
                    transaction.put(_COUNT_KEY, b"%d" % end)
                break
            except lmdb.MapFullError:  # the transaction is undone, nothing is lost
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
        self._count = end


class TokenStore:
    """Reads a store. ``store[i]`` is a row, ``store.read(indices)`` many; ``len``, ``header`` and ``path`` as named.

    The file is opened on first use in each process, so a store can be pickled, and handed to the workers of a
    DataLoader started by fork or by spawn. ``DataLoader(store, batch_sampler=…, collate_fn=as_tensors)`` reads whole
    batches. Several stores on one path share one open file, which goes when the last is closed or forgotten.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._opened: OpenEnvironment | None = None
        opened = self._open()
        if opened.is_released:
            raise InputError(
                f"{self.path} is a released dataset, not a token store: make one of it with `cogview import-data`"
            )
        self.header = opened.header
        self._count = opened.count
        self._splits = np.cumsum(list(self.header.fields.values()))[:-1]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row ``index`` as {field: (width,) uint16 array}; IndexError outside 0…len-1."""
        return {name: ids_NW[0] for name, ids_NW in self.read([index]).items()}

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Rows ``indices``, in that order, as {field: (N, width) uint16 array}, the caller's own."""
        wanted = self._existing(indices)
        opened = self._open()
        with opened.environment.begin(opened.rows) as transaction:
            packed = b"".join(filter(None, [transaction.get(key) for key in _keys(wanted)]))
        if len(packed) != len(wanted) * self.header.row_width * _ON_DISK.itemsize:
            raise InputError(f"{self.path} is damaged, rows are missing or too short: encode the store again")
        ids_NW = np.frombuffer(packed, dtype=_ON_DISK).reshape(len(wanted), self.header.row_width)
        parts = np.split(ids_NW, self._splits, axis=1)
        return {name: part.astype(np.uint16) for name, part in zip(self.header.fields, parts, strict=True)}

    __getitems__ = read  # what a DataLoader calls with the indices of a batch

    def check_compatible(
        self,
        *,
        codebook_sha256: str | None = None,
        text_sha256: str | None = None,
        num_image_codes: int | None = None,
        num_text_pieces: int | None = None,
        grid: int | None = None,
        layout: str | None = None,
    ) -> None:
        """Raise InputError unless the store was made with what is given (None: anything will do)."""
        expected = {
            "codebook_sha256": codebook_sha256,
            "text_sha256": text_sha256,
            "num_image_codes": num_image_codes,
            "num_text_pieces": num_text_pieces,
            "grid": grid,
        }
        for name, wanted in expected.items():
            stored = getattr(self.header, name)
            if wanted is not None and wanted != stored:
                raise InputError(
                    f"{self.path} was made with {name} {_shown(stored)}, but {_shown(wanted)} is needed here: "
                    "encode the store again, or use the tokenizers it was made with"
                )
        if layout is not None and layout not in self.header.layouts:
            raise InputError(
                f'{self.path} feeds {", ".join(self.header.layouts)}, but "{layout}" is needed here: '
                "encode a store for that task"
            )

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        self._opened = None

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _existing(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """``indices`` as (N,) int64; IndexError unless there are such rows."""
        wanted = np.asarray(indices, dtype=np.int64)
        outside = wanted[(wanted < 0) | (wanted >= self._count)]
        if outside.size:
            raise IndexError(f"row {outside[0]} of {self.path}, which has the rows 0…{self._count - 1}")
        return wanted

    def _open(self) -> OpenEnvironment:
        if self._opened is None or self._opened.process != os.getpid():
            self._opened = open_environment(self.path)
        return self._opened


class OpenEnvironment:
    """An LMDB folder as one process has it open: a token store, or a released dataset.

    A store has a ``header``, a table ``rows`` and a ``count``; of a released dataset the ``count`` alone is known.
    """

    header: StoreHeader
    rows: Any

    def __init__(self, path: Path) -> None:
        import lmdb

        self.process = os.getpid()
        if not path.exists():
            raise InputError(f"there is no token store at {path}: make one with `cogview encode RECIPE`")
        if not (path / DATA_FILE).is_file():
            raise InputError(f"{path} is not a token store: it has no {DATA_FILE}")
        try:
            # Rows are read in random order, so reading ahead would mostly fetch pages that are evicted unused.
            self.environment: lmdb.Environment = lmdb.open(
                str(path), create=False, readonly=True, lock=False, readahead=False, max_dbs=1
            )
        except lmdb.Error as error:
            raise InputError(f"{path} cannot be opened as a token store: {error}") from error
        try:
            _check_whole(path, self.environment)
            with self.environment.begin() as transaction:
                released_count = transaction.get(_RELEASED_COUNT_KEY)
            self.is_released = released_count is not None
            if released_count is None:
                self.header, self.count = _read_header(path, self.environment)
                self.rows = self.environment.open_db(_ROWS_TABLE, create=False)
            elif released_count.isdigit():
                self.count = int(released_count)
            else:
                raise InputError(f"{path} has the length {_shown(released_count)}, expected a number: copy it again")
        except BaseException:
            self.environment.close()
            raise


# LMDB refuses to open a path twice in a process, hence one table for all. It keeps nothing alive by itself.
_OPENED: WeakValueDictionary[str, OpenEnvironment] = WeakValueDictionary()


def open_environment(path: Path) -> OpenEnvironment:
    """The LMDB folder ``path`` as this process has it open; InputError where it cannot be read."""
    key = os.path.realpath(path)
    opened = _OPENED.get(key)
    if opened is not None and opened.process != os.getpid():
        opened.environment.close()  # inherited through a fork: the parent keeps its own
        opened = None
    if opened is None:
        opened = _OPENED[key] = OpenEnvironment(path)
    return opened


def _check_whole(path: Path, environment: lmdb.Environment) -> None:
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (path / DATA_FILE).stat().st_size
    if size < needed:  # reading behind the end of a mapped file kills the process
        raise InputError(f"{path} is cut off, it has {size} of {needed} bytes: copy it again")


def _read_header(path: Path, environment: lmdb.Environment) -> tuple[StoreHeader, int]:
    with environment.begin() as transaction:
        header, count = transaction.get(_HEADER_KEY), transaction.get(_COUNT_KEY)
    if header is None or count is None:
        raise InputError(
            f"{path} is an LMDB, but not a token store: it has no header (nor a released dataset: it has no length)"
        )
    try:
        return StoreHeader.from_json(header.decode()), int(count)
    except ValueError as error:
        raise InputError(f"{path} is not a token store that can be read: {error}") from error


def _keys(indices: np.ndarray) -> list[bytes]:
    packed = indices.astype(">u8").tobytes()
    return [packed[at : at + 8] for at in range(0, len(packed), 8)]


def _check_same_header(path: Path, stored: StoreHeader, given: StoreHeader) -> None:
    before, now = asdict(stored), asdict(StoreHeader.from_json(given.to_json()))
    for name, value in now.items():
        if before[name] != value:
            raise InputError(
                f"{path} was begun with {name} {_shown(before[name])}, now it is {_shown(value)}: "
                "remove the store, or resume with the settings it was begun with"
            )


def _shown(value: object) -> str:
    """A value of a header in a message: a checksum is cut."""
    return shorten(str(value), 60, keep=16)
