"""Read the datasets of CogView v1 as they are.

There are two formats. An LMDB folder holds a value for each row under its decimal number, and the number of rows under
``length``. A value is a pickle (``v1_rows.py``): the ids of a sequence ``[ROI1] text [BASE] [BOI1] codes [EOI1]``,
perhaps padded with ``[PAD]``, or a pair of text ids and codes. A ``.bin`` file holds 64 text ids, padded with -1, and
1024 codes a row, all as little-endian int32. Ids are those of the vocabulary: pieces follow the codes.

Neither format records the tokenizers of its ids, so the caller must name them. Only ids that these tokenizers cannot
have made are noticed.
"""

# N rows, W width of the text field, C codes of an image

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogview.data.store import NO_TOKEN, StoreHeader, TokenStore, naming_damage, open_environment
from cogview.data.store_checksum import DATA_FILE
from cogview.data.v1_rows import ForbiddenGlobal, RowUnpickler, numbers_of
from cogview.errors import InputError
from cogview.pickle_limits import bounded_pickle
from cogview.tokenizers.store_tasks import tasks_of_store
from cogview.tokenizers.vocabulary import GRID_COMMANDS, Vocabulary

TEXT_WIDTH = 64  # text ids in a row of a .bin file
_BIN_ID = np.dtype("<i4")
_ROWS_TO_TRY = 1000  # to find the first usable one


class InvalidRow(InputError):
    """An unusable row, while others may be usable; ``reason`` is the message without the remedy."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class V1Dataset(TokenStore):
    """A CogView v1 dataset, read as if it were a token store with the fields ``text`` (N, W) and ``image`` (N, C).

    The file is opened on first use in each process. The dataset cannot prove which tokenizers made it: their sizes and
    hashes come from the caller. All images have the grid of the first usable row.

    Args:
        path: an LMDB folder or a ``.bin`` file.
        num_text_pieces: size of the text tokenizer.
        num_image_codes: size of the codebook.
        codebook_sha256: hash of the codebook.
        text_sha256: hash of the text tokenizer.
        text_width: maximum number of pieces of a text.
        grid: side of the images in codes, for a ``.bin`` file.

    Raises:
        InputError: if there is no such dataset, it is empty, or its first rows are all unusable.
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
            raise InputError(f"there is no CogView v1 dataset at {self.path}: expected an LMDB folder or a .bin file")
        if not self._is_bin and not self._open().is_v1:
            raise InputError(f"{self.path} is a token store already, not a CogView v1 dataset")
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
            layouts=tasks_of_store({"text", "image"}),
            codebook_sha256=codebook_sha256,
            text_sha256=text_sha256,
            provenance={"released": self.path.name},
        )

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Read rows.

        Args:
            indices: N row numbers, in any order.

        Returns:
            uint16 arrays "text" (N, W), ``NO_TOKEN`` after the last piece, and "image" (N, C).

        Raises:
            InvalidRow: if a row is unusable.
            InputError: if a row's pickle would run code.
        """
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
        """Close the file; a later read opens it again."""
        super().close()
        self._mapped = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mapped": None}

    def _bad(self, index: int, reason: str) -> InvalidRow:
        reason = f"row {index} of {self.path} {reason}"
        return InvalidRow(f"{reason}; `cogview import-data --skip-bad` makes a store without such rows", reason)

    # .bin files

    def _map_bin(self) -> np.ndarray:
        """Return all rows of the file, (N, 64 + C) int32, mapped into memory."""
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
            n, column = np.argwhere(wrong)[0]
            expected = f"-1 or {_ends(pieces)}" if column < TEXT_WIDTH else _ends(self._vocabulary.image)
            raise self._bad(
                wanted[n], f"holds {ids[n, column]} at {column}, expected {expected} there (all as little-endian int32)"
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
        """Return the side of the images of the first usable row; raise the first InvalidRow after many."""
        first_error = None
        for index in range(min(self._count, _ROWS_TO_TRY)):
            try:
                _, codes = self._parse_row(index, self._values([index])[0])
                return math.isqrt(len(codes))
            except InvalidRow as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _values(self, indices: Sequence[int] | np.ndarray) -> list[bytes | None]:
        with naming_damage(self.path), self._open().environment.begin() as transaction:
            return [transaction.get(b"%d" % index) for index in indices]

    def _parse_row(self, index: int, value: bytes | None) -> tuple[np.ndarray, np.ndarray]:
        """Return pieces and codes of a row, both counted from 0: (up to W,) and (C,) int64."""
        if value is None:
            raise self._bad(index, "is missing")
        try:
            row = RowUnpickler(bounded_pickle(io.BytesIO(value))).load()
        except ForbiddenGlobal as error:
            raise InputError(f"row {index} of {self.path} {error}: the dataset is refused") from None
        except pickle.UnpicklingError as error:
            raise self._bad(index, f"cannot be read: {error}") from None
        except Exception as error:  # a damaged pickle may fail in any way
            raise self._bad(index, f"is no pickled row of ids ({type(error).__name__})") from None
        try:
            if isinstance(row, (list, tuple)) and len(row) == 2 and not any(isinstance(part, int) for part in row):
                text, codes = map(numbers_of, row)
            else:
                text, codes = self._split_sequence(numbers_of(row))
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
        """Return text ids and codes of a whole sequence; raise ValueError for any other sequence."""
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
    """Open the token store or CogView v1 dataset at a path.

    Args:
        path: a token store, or a v1 dataset as an LMDB folder or ``.bin`` file.
        num_image_codes: size of the codebook, believed for a v1 dataset.
        num_text_pieces: size of the text tokenizer, believed for a v1 dataset.
        codebook_sha256: hash of the codebook, believed for a v1 dataset.
        text_sha256: hash of the text tokenizer, believed for a v1 dataset.

    Returns:
        The store. A token store knows its own tokenizers: see ``TokenStore.check_compatible``.

    Raises:
        InputError: if neither is there.
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


def _names_a_bin(path: Path) -> bool:
    return path.suffix == ".bin" and not path.is_dir()


def _outside(ids: np.ndarray, allowed: range) -> np.ndarray:
    return (ids < allowed.start) | (ids >= allowed.stop)


def _ends(allowed: range) -> str:
    return f"{allowed.start}…{allowed.stop - 1}"
