"""The datasets of the released CogView v1, read as they are and converted to token stores.

There are two formats. An LMDB folder has a value for each row, under its number in decimal, and their number under
``length``. A value is a pickle: the ids of a whole sequence ``[ROI1] text [BASE] [BOI1] codes [EOI1]``, perhaps with
``[PAD]`` behind it, or a pair of text ids and codes. A ``.bin`` file has 64 text ids, -1 where there is none, and
1024 codes a row, all as little-endian int32. Ids are those of the vocabulary: a piece counts from the end of the codes.

Neither format says which tokenizers its ids are of, and nothing here can find out: whoever opens a released dataset
says so, and ids that these tokenizers cannot have made are all that is noticed.
"""

# N rows, W width of the text field, C codes of an image

from __future__ import annotations

import io
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from cogview.data.store import DATA_FILE, NO_TOKEN, StoreHeader, TokenStore, open_environment
from cogview.data.store_writer import StoreWriter
from cogview.errors import InputError
from cogview.tokenizers.vocabulary import GRID_COMMANDS, Vocabulary

TEXT_WIDTH = 64  # text ids in a row of a .bin file
_BIN_ID = np.dtype("<i4")
_ROWS_AT_A_TIME = 4096
_ROWS_TO_LOOK_AT = 1000  # for the first that can be used


class InvalidRow(InputError):
    """A row that cannot be used, while others may be; ``reason`` is the message without its remedy."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


# Reading pickles. numpy's own functions are never called: a pickle that is made to harm could have them take numbers
# for addresses. What stands for them below does no more than put numbers together.


class _Dtype:
    """Stands for ``numpy.dtype``: numbers of up to 8 bytes."""

    def __init__(self, name: str, *_: object) -> None:
        if not re.fullmatch("[iu][1248]|f[248]", name):
            raise pickle.UnpicklingError(f"it holds an array of {name}, expected whole numbers")
        self.numpy = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.numpy = self.numpy.newbyteorder(">")


class _Array:
    """Stands for ``numpy.ndarray``; ``ids`` is the array once the pickle has filled it."""

    def __init__(self, *_: object) -> None:
        self.ids: np.ndarray = np.zeros(0, dtype=np.int64)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        self.fill(content, dtype, shape, "F" if is_fortran else "C")

    def fill(self, content: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> None:
        self.ids = np.frombuffer(content, dtype.numpy).reshape(shape, order=order)


def _array_of_buffer(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.fill(content, dtype, shape, order)
    return array


def _scalar(dtype: _Dtype, content: Any) -> int | float:
    return np.frombuffer(content, dtype.numpy)[0].item()


def _bytes_of_text(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")


# What the pickles of numpy 1 and 2 in protocols 0 to 5 ask for, and what they are given.
_SAFE_GLOBALS: Final[dict[tuple[str, str], Callable[..., object]]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _bytes_of_text,  # bytes, up to protocol 2
    ("__builtin__", "bytes"): lambda: b"",  # empty ones
    **{
        (f"numpy.{core}.{name}", function): stand_in
        for core in ("core", "_core")
        for name, function, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_of_buffer),
        )
    },
}


class RowUnpickler(pickle.Unpickler):
    """Reads the pickle of a row: arrays of numbers, numpy scalars, and what Python has without any import.

    Arrays come as objects whose ``ids`` is the numpy array. A pickle that asks for anything else has nothing run for
    it: ``Refused``.
    """

    def find_class(self, module: str, name: str) -> Any:
        """What stands for ``module.name``."""
        if (module, name) not in _SAFE_GLOBALS:
            raise ForbiddenGlobal(f"asks to run {module}.{name}, which no row of ids needs")
        return _SAFE_GLOBALS[module, name]


class ForbiddenGlobal(pickle.UnpicklingError):
    """A pickle that asks for more than a row of ids needs."""


class V1Dataset(TokenStore):
    """A released dataset, read as if it were a token store with the fields ``text`` (N, W) and ``image`` (N, C).

    ``path`` is an LMDB folder or a ``.bin`` file, opened on first use in each process. The dataset cannot prove which
    tokenizers made it: their sizes and hashes are taken from the caller, and ``require`` compares with nothing else.
    ``text_width`` is the most pieces a text may have. ``grid`` is the side of the images of a ``.bin`` file; an LMDB
    has that of its first row, and every other row must have it, too.

    Reading a row that cannot be used raises BadRow, and one that would run code InputError; both name the row.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        num_text_pieces: int,
        num_image_codes: int = 8192,
        codebook_sha256: str,
        text_sha256: str,
        text_width: int = TEXT_WIDTH,
        grid: int = 32,
    ) -> None:
        self.path = Path(path)
        self._vocabulary = Vocabulary(num_image_codes=num_image_codes, num_text_pieces=num_text_pieces)
        self._text_width = text_width
        self._grid = grid
        self._opened = None
        self._mapped: np.ndarray | None = None  # the rows of a .bin file
        self._is_bin = _names_a_bin(self.path)
        if not (self.path if self._is_bin else self.path / DATA_FILE).is_file():
            raise InputError(f"there is no released dataset at {self.path}: expected an LMDB folder or a .bin file")
        if not self._is_bin and not self._open().is_v1:
            raise InputError(f"{self.path} is a token store already, not a released dataset")
        self._count = len(self._map_bin()) if self._is_bin else self._open().count
        if not self._count:
            raise InputError(f"{self.path} has no rows")
        if not self._is_bin:
            self._grid = self._first_grid()
        self.header = StoreHeader(
            fields={"text": text_width, "image": self._grid**2},
            grid=self._grid,
            num_image_codes=num_image_codes,
            num_text_pieces=num_text_pieces,
            layouts=("generate", "caption"),
            codebook_sha256=codebook_sha256,
            text_sha256=text_sha256,
            provenance={"released": self.path.name},
        )

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Rows ``indices``, in that order: uint16 arrays "text" (N, W), ABSENT behind the last piece, and "image"."""
        wanted = self._existing(indices)
        if self._is_bin:
            return self._read_bin(wanted)
        text_NW = np.full((len(wanted), self._text_width), NO_TOKEN, dtype=np.uint16)
        image_NC = np.zeros((len(wanted), self._grid**2), dtype=np.uint16)
        for n, (index, value) in enumerate(zip(wanted.tolist(), self._values(wanted), strict=True)):
            text, codes = self._parse_row(index, value)
            if len(codes) != self._grid**2:
                raise self._bad(index, f"has {len(codes)} codes, expected {self._grid**2} as in the first row")
            text_NW[n, : len(text)] = text
            image_NC[n] = codes
        return {"text": text_NW, "image": image_NC}

    __getitems__ = read

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        super().close()
        self._mapped = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mapped": None}

    def _bad(self, index: int, reason: str) -> InvalidRow:
        reason = f"row {index} of {self.path} {reason}"
        return InvalidRow(f"{reason}; `cogview import-data --skip-bad` makes a store without such rows", reason)

    # .bin files

    def _map_bin(self) -> np.ndarray:
        """All rows of the file, (N, 64 + C) int32, mapped into memory."""
        if self._mapped is None:
            size, width = self.path.stat().st_size, TEXT_WIDTH + self._grid**2
            if size % (width * _BIN_ID.itemsize):
                raise InputError(
                    f"{self.path} has {size} bytes, expected a multiple of {width * _BIN_ID.itemsize} ({TEXT_WIDTH} "
                    f"text ids and {self._grid**2} codes a row, as int32): copy it again"
                )
            # An empty file cannot be mapped.
            ids = np.memmap(self.path, dtype=_BIN_ID, mode="r") if size else np.zeros(0, dtype=_BIN_ID)
            self._mapped = ids.reshape(-1, width)
        return self._mapped

    def _read_bin(self, wanted: np.ndarray) -> dict[str, np.ndarray]:
        ids = self._map_bin()[wanted]
        text, codes = ids[:, :TEXT_WIDTH], ids[:, TEXT_WIDTH:]
        present = text != -1
        pieces = self._vocabulary.text
        wrong = np.concatenate([_outside(text, pieces) & present, _outside(codes, self._vocabulary.image)], axis=1)
        if wrong.any():
            n, place = np.argwhere(wrong)[0]
            expected = f"-1 or {_ends(pieces)}" if place < TEXT_WIDTH else _ends(self._vocabulary.image)
            raise self._bad(
                wanted[n], f"holds {ids[n, place]} at {place}, expected {expected} there (all as little-endian int32)"
            )
        lengths = present.sum(axis=1)
        if (long := lengths > self._text_width).any():
            raise self._too_long(wanted[long.argmax()], lengths[long.argmax()])
        text_NW = np.full((len(wanted), self._text_width), NO_TOKEN, dtype=np.uint16)
        text_NW[np.arange(self._text_width) < lengths[:, None]] = text[present] - pieces.start
        return {"text": text_NW, "image": codes.astype(np.uint16)}

    def _too_long(self, index: int, length: int) -> InvalidRow:
        return self._bad(index, f"has a text of {length} pieces, there is room for {self._text_width}")

    # LMDB folders

    def _first_grid(self) -> int:
        """The side of the images of the first row that can be used; the first row's BadRow where many cannot be."""
        first_error = None
        for index in range(min(self._count, _ROWS_TO_LOOK_AT)):
            try:
                _, codes = self._parse_row(index, self._values([index])[0])
                return math.isqrt(len(codes))
            except InvalidRow as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _values(self, indices: Sequence[int] | np.ndarray) -> list[bytes | None]:
        with self._open().environment.begin() as transaction:
            return [transaction.get(b"%d" % index) for index in indices]

    def _parse_row(self, index: int, value: bytes | None) -> tuple[np.ndarray, np.ndarray]:
        """Pieces and codes of a row, both counted from 0: (up to W,) and (C,) int64."""
        if value is None:
            raise self._bad(index, "is missing")
        try:
            row = RowUnpickler(io.BytesIO(value)).load()
        except ForbiddenGlobal as error:
            raise InputError(f"row {index} of {self.path} {error}: the dataset is refused") from None
        except pickle.UnpicklingError as error:
            raise self._bad(index, f"cannot be read: {error}") from None
        except Exception as error:  # damaged pickles raise whatever their bytes happen to mean
            raise self._bad(index, f"is no pickled row of ids ({type(error).__name__})") from None
        try:
            if isinstance(row, (list, tuple)) and len(row) == 2 and not any(isinstance(part, int) for part in row):
                text, codes = map(_numbers, row)
            else:
                text, codes = self._split_sequence(_numbers(row))
            if math.isqrt(len(codes)) not in GRID_COMMANDS or math.isqrt(len(codes)) ** 2 != len(codes):
                raise ValueError(f"has {len(codes)} codes, expected {' or '.join(str(g * g) for g in GRID_COMMANDS)}")
            for ids, allowed, what in ((text, self._vocabulary.text, "text"), (codes, self._vocabulary.image, "codes")):
                wrong = _outside(ids, allowed)
                if wrong.any():
                    raise ValueError(f"holds {ids[wrong.argmax()]} in its {what}, expected {_ends(allowed)}")
        except ValueError as error:
            raise self._bad(index, str(error)) from None
        if len(text) > self._text_width:
            raise self._too_long(index, len(text))
        return text - self._vocabulary.text.start, codes

    def _split_sequence(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Text ids and codes of a whole sequence; ValueError where it is none of a text and its picture."""
        command = self._vocabulary.command
        filled = np.flatnonzero(ids != self._vocabulary.pad)
        ids = ids[: filled[-1] + 1] if filled.size else ids[:0]
        begins = np.flatnonzero(ids == command("[BOI1]"))
        if len(begins) == 1 and begins[0] >= 2:
            begin = int(begins[0])
            sizes = {command(name): side**2 for side, name in GRID_COMMANDS.items()}
            codes = ids[begin + 1 : -1]
            if (
                ids[0] == command("[ROI1]")
                and sizes.get(int(ids[begin - 1])) == len(codes)
                and ids[-1] == command("[EOI1]")
            ):
                return ids[1 : begin - 1], codes
        raise ValueError(f"of {len(ids)} ids is no sequence [ROI1] text [BASE] [BOI1] codes [EOI1]")


def open_dataset(
    path: str | Path, *, num_image_codes: int, num_text_pieces: int, codebook_sha256: str, text_sha256: str
) -> TokenStore:
    """The token store or released dataset at ``path``, whichever it is.

    The tokenizers that are given are believed of a released dataset. A store knows its own: see ``require``.
    """
    path = Path(path)
    if not _names_a_bin(path) and not open_environment(path).is_v1:
        return TokenStore(path)
    return V1Dataset(
        path,
        num_image_codes=num_image_codes,
        num_text_pieces=num_text_pieces,
        codebook_sha256=codebook_sha256,
        text_sha256=text_sha256,
    )


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import made."""

    rows: int
    skipped: int
    first_error: str  # why the first of those left out could not be used; empty if there is none


def import_dataset(path: Path, sources: Sequence[V1Dataset], *, skip_bad: bool = False) -> ImportReport:
    """Write the rows of ``sources``, one after the other, to a token store at ``path``.

    The store is written beside ``path`` and takes its name when it is whole; an import that was interrupted is
    continued. A row that cannot be used raises BadRow, or with ``skip_bad`` is left out.
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
    unfinished = path.with_name(f".{path.name}-importing")  # stays after a kill, and is continued
    writer = StoreWriter(unfinished, header, resume=True)
    # Rows of an earlier import are read again, not written: the store cannot tell how many were left out before them.
    known, left_out, first_error = writer.count, 0, ""
    try:
        with writer, tqdm(total=sum(map(len, sources)), unit="row", desc=path.name, disable=None) as bar:
            for source in sources:
                for start in range(0, len(source), _ROWS_AT_A_TIME):
                    numbers = range(start, min(start + _ROWS_AT_A_TIME, len(source)))
                    rows, errors = _usable(source, numbers, skip_bad)
                    left_out += len(errors)
                    first_error = first_error or next(iter(errors), "")
                    count = len(rows["image"])
                    if count > known:
                        writer.append({name: ids[known:] for name, ids in rows.items()})
                    known = max(0, known - count)
                    bar.update(len(numbers))
        if not writer.count:
            raise InputError(f"none of the {left_out} rows can be used; the first: {first_error}")
    finally:
        if not writer.count:  # nothing to go on with, and the header may be a mistake
            shutil.rmtree(unfinished, ignore_errors=True)
    os.replace(unfinished, path)
    return ImportReport(rows=writer.count, skipped=left_out, first_error=first_error)


def _usable(source: V1Dataset, numbers: range, skip_bad: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of the rows ``numbers`` that can be used, and what is wrong with the others, if these may be skipped."""
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


def _names_a_bin(path: Path) -> bool:
    return path.suffix == ".bin" and not path.is_dir()


def _numbers(value: object) -> np.ndarray:
    """Whole numbers as a flat int64 array; ValueError for anything else."""
    if not isinstance(value, (_Array, list, tuple)):
        raise ValueError(f"holds {type(value).__name__} where an array of ids is expected")
    ids = (value.ids if isinstance(value, _Array) else np.asarray(value)).ravel()
    if ids.dtype.kind == "f":  # an empty array is one of floats in numpy, and so is what it is joined to
        if (broken := ~((np.floor(ids) == ids) & (np.abs(ids) < 2**53))).any():
            raise ValueError(f"holds {ids[broken.argmax()]}, expected whole numbers")
    elif ids.dtype.kind not in "iu":
        raise ValueError("holds a list of other things than ids")
    return ids.astype(np.int64)


def _outside(ids: np.ndarray, allowed: range) -> np.ndarray:
    return (ids < allowed.start) | (ids >= allowed.stop)


def _ends(allowed: range) -> str:
    return f"{allowed.start}…{allowed.stop - 1}"
