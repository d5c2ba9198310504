"""Token stores: rows of text pieces and image codes on disk, ready for training.

A store is an LMDB folder. Its main table holds two keys, ``header`` (JSON, :class:`StoreHeader`) and ``count``
(decimal); its table ``rows`` holds one value per row, under the row's number as eight big-endian bytes. A value
holds the row's fields in the order of the header as little-endian uint16. Where rows are long, a value holds several
(``store_rows.py``). Nothing is pickled, so a foreign store cannot run code, and a row of 24 pieces and 64 codes takes
176 bytes.

Reading maps the file into memory. The pages count as cache shared by all workers, not as memory of each.
"""

# N rows, W width of a field

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from cogview.config_io import from_mapping
from cogview.data.store_checksum import DATA_FILE, check_sum
from cogview.data.store_rows import read_rows
from cogview.errors import InputError, RetryLaterError
from cogview.formatting import printable, shorten
from cogview.input_files import looked_at
from cogview.plain_data import parse_json
from cogview.tokenizers.store_tasks import feeds
from cogview.tokenizers.tasks import INSTRUCTION_FIELD

if TYPE_CHECKING:
    import lmdb
    from torch import Tensor

FORMAT_VERSION = 2  # 1 has one row in each value
NO_TOKEN = 0xFFFF  # fills a text field behind its last piece
MAX_CODES = 1 << 16  # image codes have no such filling
TEXT_FIELD = "text"
TEXT_FIELDS = (TEXT_FIELD, INSTRUCTION_FIELD)  # piece ids, padded with NO_TOKEN
NAMES_FIELD = "named"  # for each code of an image, the text piece that names the object there, or NO_TOKEN
MAX_ROW_WIDTH = 1 << 20  # ids

_HEADER_KEY = b"header"
_COUNT_KEY = b"count"
_V1_COUNT_KEY = b"length"  # of a CogView v1 dataset (cogview.data.v1_datasets)
_ROWS_TABLE = b"rows"
_ON_DISK = np.dtype("<u2")


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """Contents and origin of a store's rows.

    ``fields`` maps each field to its width, in the order of the row. The field ``text`` holds piece ids of the text
    model, without their offset in the vocabulary, and ``NO_TOKEN`` after the last piece; every other field holds image
    codes. ``layouts`` lists the tasks that the rows can feed. ``provenance`` is free JSON that must stay the same when
    writing is resumed. ``rows_per_value`` is chosen by the writer.
    """

    fields: dict[str, int]
    grid: int
    num_image_codes: int
    num_text_pieces: int
    layouts: tuple[str, ...]
    codebook_sha256: str
    text_sha256: str
    provenance: dict[str, Any] = field(default_factory=dict)
    rows_per_value: int = 1

    def __post_init__(self) -> None:
        if not self.fields or any(width < 1 for width in self.fields.values()) or self.row_width > MAX_ROW_WIDTH:
            raise ValueError(f"a row needs fields of width 1 or more, {MAX_ROW_WIDTH} in all, got {self.fields}")
        if not 1 <= self.grid <= MAX_ROW_WIDTH:
            raise ValueError(f"the code grid must be 1 or more on a side, got {self.grid}")
        if self.fields.get("image", self.grid**2) != self.grid**2:
            raise ValueError(f'a grid of {self.grid} has {self.grid**2} codes, "image" is {self.fields["image"]} wide')
        for name, most in (("num_image_codes", MAX_CODES), ("num_text_pieces", NO_TOKEN), ("rows_per_value", NO_TOKEN)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be in 1…{most} to fit 16 bits, got {getattr(self, name)}")

    @property
    def row_width(self) -> int:
        """Number of ids in a row, over all fields."""
        return sum(self.fields.values())

    def limit_of(self, name: str) -> int:
        """Return the number of ids that the values of a field may have: pieces or codes."""
        return self.num_text_pieces if name in (*TEXT_FIELDS, NAMES_FIELD) else self.num_image_codes

    def ids_outside(self, name: str, ids_NW: np.ndarray) -> np.ndarray:
        """Return the values of a field that are neither ids nor, among pieces, ``NO_TOKEN``: (M,)."""
        wrong_NW = (ids_NW < 0) | (ids_NW >= self.limit_of(name))
        if name in (*TEXT_FIELDS, NAMES_FIELD):
            wrong_NW &= ids_NW != NO_TOKEN
        wrong: np.ndarray = ids_NW[wrong_NW]
        return wrong

    def to_json(self) -> str:
        """Return the header as JSON."""
        mapping = {**asdict(self), "format_version": FORMAT_VERSION if self.rows_per_value > 1 else 1}
        if self.rows_per_value == 1:  # earlier versions know no such key, and read the store
            del mapping["rows_per_value"]
        return json.dumps(mapping, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> StoreHeader:
        """Parse a header written by ``to_json``.

        Raises:
            ValueError: if the format is newer or the header is invalid.
        """
        mapping = parse_json(text)
        if not isinstance(mapping, dict):
            raise ValueError("its header is not a JSON object")
        version = mapping.pop("format_version", None)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(f"it has format {version}, this version reads up to {FORMAT_VERSION}: update cogview")
        return from_mapping(StoreHeader, mapping, where="its header")


def text_lengths(text_NW: np.ndarray) -> np.ndarray:
    """Return the number of pieces in each row of a text field: (N,) int64."""
    lengths: np.ndarray = (text_NW != NO_TOKEN).sum(axis=-1)
    return lengths


def as_tensors(rows: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert rows from ``TokenStore.read`` to int64 tensors; the ``collate_fn`` of a DataLoader over a store."""
    import torch

    return {name: torch.from_numpy(ids.astype(np.int64)) for name, ids in rows.items()}


class TokenStore:
    """Read a token store: ``store[i]`` is a row, ``store.read(indices)`` reads many.

    The file is opened on first use in each process, so a store can be pickled and sent to the workers of a DataLoader
    started by fork or spawn. ``DataLoader(store, batch_sampler=…, collate_fn=as_tensors)`` reads whole batches. Several
    stores on one path share one open file, which is closed with the last of them.

    Args:
        path: folder of the store.

    Raises:
        InputError: if there is no store, it is damaged, or it is a CogView v1 dataset.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._opened: OpenEnvironment | None = None
        opened = self._open()
        if opened.is_v1:
            raise InputError(
                f"{self.path} is a CogView v1 dataset, not a token store: convert it with `cogview import-data`"
            )
        self.header = opened.header
        self._count = opened.count
        self._splits = np.cumsum(list(self.header.fields.values()))[:-1]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return row ``index`` as {field: (width,) uint16 array}; raise IndexError outside 0…len-1."""
        return {name: ids_NW[0] for name, ids_NW in self.read([index]).items()}

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Read rows.

        Args:
            indices: N row numbers, in any order.

        Returns:
            {field: (N, width) uint16 array} in the order of ``indices``, new arrays.

        Raises:
            IndexError: if a row does not exist.
            InputError: if the store is damaged.
        """
        wanted = self._existing(indices)
        opened = self._open()
        size = self.header.row_width * _ON_DISK.itemsize
        with naming_damage(self.path), opened.environment.begin(opened.rows, buffers=True) as transaction:
            values = read_rows(transaction, wanted, size, self.header.rows_per_value)
        if any(len(value) != size for value in values):
            raise InputError(f"{self.path} is damaged, rows are missing or too short: encode the store again")
        ids_NW = np.frombuffer(b"".join(values), dtype=_ON_DISK).reshape(len(wanted), self.header.row_width)
        parts = dict(zip(self.header.fields, np.split(ids_NW, self._splits, axis=1), strict=True))
        for name, part_NW in parts.items():
            if (outside := self.header.ids_outside(name, part_NW)).size:
                raise InputError(
                    f'{self.path} is damaged, field "{name}" holds {outside[0]}, expected ids in '
                    f"0…{self.header.limit_of(name) - 1}: encode the store again"
                )
        return {name: part_NW.astype(np.uint16) for name, part_NW in parts.items()}

    __getitems__ = read  # DataLoader calls this with the indices of a batch

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
        """Check that the store was made with the given tokenizers and feeds a task; None matches anything.

        Args:
            codebook_sha256: hash of the codebook.
            text_sha256: hash of the text tokenizer.
            num_image_codes: size of the codebook.
            num_text_pieces: size of the text tokenizer.
            grid: side of the images in codes.
            layout: task that the rows must feed.

        Raises:
            InputError: if a checksum, size or task differs.
        """
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
        if layout is not None and not feeds(self.header.layouts, layout):
            raise InputError(
                f'{self.path} feeds {", ".join(self.header.layouts)}, but "{layout}" is needed here: '
                "encode a store for that task"
            )

    def check_same_tokenizers(self, header: StoreHeader) -> None:
        """Check that the store was made with the tokenizers and the grid of another one.

        Args:
            header: Header of the other store.

        Raises:
            InputError: A checksum or size differs.
        """
        self.check_compatible(
            codebook_sha256=header.codebook_sha256,
            text_sha256=header.text_sha256,
            num_image_codes=header.num_image_codes,
            num_text_pieces=header.num_text_pieces,
            grid=header.grid,
        )

    def close(self) -> None:
        """Close the file; a later read opens it again."""
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
        """Return ``indices`` as (N,) int64; raise IndexError if a row does not exist."""
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
    """An LMDB folder opened by one process: a token store or a CogView v1 dataset.

    A store has a ``header``, a table ``rows`` and a ``count``; a v1 dataset has only a ``count``.
    """

    header: StoreHeader
    rows: Any

    def __init__(self, path: Path) -> None:
        import lmdb

        self.process = os.getpid()
        if not path.exists():
            raise InputError(
                f"there is no token store at {path}: make one with `cogview encode RECIPE`{looked_at(path)}"
            )
        if not (path / DATA_FILE).is_file():
            raise InputError(f"{path} is not a token store: it has no {DATA_FILE}")
        check_sum(path)
        try:
            # Rows are read in random order, so read-ahead would mostly fetch pages that are evicted unused.
            self.environment: lmdb.Environment = lmdb.open(
                str(path), create=False, readonly=True, lock=False, readahead=False, max_dbs=1
            )
        except lmdb.Error as error:
            raise InputError(f"{path} cannot be opened as a token store: {error}") from error
        try:
            with naming_damage(path):
                self._read(path)
        except BaseException:
            self.environment.close()
            raise

    def _read(self, path: Path) -> None:
        """Read header and count; raise InputError if they are not those of a store or a v1 dataset."""
        _check_whole(path, self.environment)
        with self.environment.begin() as transaction:
            v1_count = transaction.get(_V1_COUNT_KEY)
            entries = transaction.stat()["entries"]
        self.is_v1 = v1_count is not None
        if v1_count is not None:
            self.count = _number_of(v1_count, path)
        else:
            self.header, self.count = _read_header(path, self.environment)
            self.rows = self.environment.open_db(_ROWS_TABLE, create=False)
            with self.environment.begin(self.rows) as transaction:
                entries = transaction.stat(self.rows)["entries"]
            entries *= self.header.rows_per_value
        if self.count > entries:
            raise InputError(f"{path} is damaged, it states {self.count} rows and has {entries}: copy it again")


# LMDB refuses to open a path twice in a process, hence one table of weak references for all stores.
_OPENED: WeakValueDictionary[str, OpenEnvironment] = WeakValueDictionary()


def open_environment(path: Path) -> OpenEnvironment:
    """Return this process's open environment of ``path``; raise InputError if it is not readable."""
    key = os.path.realpath(path)
    opened = _OPENED.get(key)
    if opened is not None and opened.process != os.getpid():
        opened.environment.close()  # inherited through a fork: the parent keeps its own
        opened = None
    if opened is None:
        opened = _OPENED[key] = OpenEnvironment(path)
    return opened


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turn an error of LMDB within the block into an InputError that names the store and the remedy."""
    import lmdb

    try:
        yield
    except lmdb.MapResizedError:
        raise RetryLaterError(
            f"{path} cannot be read while another process writes to it: wait for its end, and try again; if none does, "
            "it is damaged: copy it again"
        ) from None
    except lmdb.Error as error:
        raise InputError(f"{path} is damaged ({error}): copy it again, or encode the store again") from None


def _number_of(count: bytes, path: Path) -> int:
    """Return the number of rows that a store or dataset states; raise InputError for anything else."""
    if not count.isdigit() or len(count) > 18:
        raise InputError(f"{path} has the length {_shown(count)}, expected a number: copy it again")
    return int(count)


def _check_whole(path: Path, environment: lmdb.Environment) -> None:
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (path / DATA_FILE).stat().st_size
    if size < needed:  # reading behind the end of a mapped file kills the process
        raise InputError(f"{path} is cut off, it has {size} of {needed} bytes: copy it again")


def _read_header(path: Path, environment: lmdb.Environment) -> tuple[StoreHeader, int]:
    with naming_damage(path), environment.begin() as transaction:
        header, count = transaction.get(_HEADER_KEY), transaction.get(_COUNT_KEY)
    if header is None or count is None:
        raise InputError(
            f"{path} is an LMDB, but not a token store: it has no header (nor a CogView v1 dataset: it has no length)"
        )
    try:
        return StoreHeader.from_json(header.decode()), _number_of(count, path)
    except ValueError as error:
        raise InputError(f"{path} is not a token store that can be read: {error}") from error


def _shown(value: object) -> str:
    """Return a header's value for a message; shorten checksums."""
    return shorten(printable(str(value)), 60, keep=16)
