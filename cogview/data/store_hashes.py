"""Count equal rows by their hashes, which stand on the disk, so that memory does not grow with the number of rows."""

# N rows, W width of a field
from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np

from cogview.errors import RetryLaterError, reason_of

DIGEST_BYTES = 8
PART_ROWS = 1 << 17  # rows whose hashes are in memory at a time: 2 MB
MAX_PARTS = 256  # files

_ENTRY = np.dtype([("hash", "<u8"), ("row", "<u8")])


class HashCounter:
    """Counts rows that are equal. Rows are divided by their hashes into files, and one file at a time is counted.

    Args:
        rows: Number of rows that will be added, about.

    Raises:
        RetryLaterError: The disk of temporary files is full.
    """

    def __init__(self, rows: int) -> None:
        self._parts = min(MAX_PARTS, max(1, -(-rows // PART_ROWS)))
        self._rows = 0
        self._folder = Path(tempfile.mkdtemp(prefix="cogview-"))

    def __enter__(self) -> HashCounter:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, ids_NW: np.ndarray) -> None:
        """Add rows."""
        rows = (row.tobytes() for row in np.ascontiguousarray(ids_NW))
        digests = b"".join(hashlib.blake2b(row, digest_size=DIGEST_BYTES).digest() for row in rows)
        entries = np.empty(len(ids_NW), dtype=_ENTRY)
        entries["hash"] = np.frombuffer(digests, dtype="<u8")
        entries["row"] = np.arange(self._rows, self._rows + len(ids_NW))
        self._rows += len(ids_NW)
        part = entries["hash"] % np.uint64(self._parts)
        for number in range(self._parts):
            self._append(number, entries[part == number].tobytes())

    def count(self, num_frequent: int = 0) -> tuple[int, list[tuple[int, int]]]:
        """Return the number of different rows, and the most frequent of those that repeat.

        Args:
            num_frequent: Number of rows to return at most.

        Returns:
            The number, and the first occurrence of each frequent row with its occurrences: the most frequent first, of
            equally frequent ones the first.
        """
        distinct = 0
        frequent: list[tuple[int, int]] = []
        for number in range(self._parts):
            path = self._folder / str(number)
            entries = np.fromfile(path, dtype=_ENTRY) if path.exists() else np.empty(0, dtype=_ENTRY)
            _, first, counts = np.unique(entries["hash"], return_index=True, return_counts=True)
            distinct += len(first)
            rows = entries["row"][first]
            order = np.lexsort((rows, -counts))[:num_frequent]
            frequent += [(int(rows[index]), int(counts[index])) for index in order if counts[index] > 1]
        return distinct, sorted(frequent, key=lambda each: (-each[1], each[0]))[:num_frequent]

    def _append(self, number: int, content: bytes) -> None:
        try:
            with (self._folder / str(number)).open("ab") as file:
                file.write(content)
        except OSError as error:
            raise RetryLaterError(
                f"hashes of rows cannot be written to {self._folder.parent}: {reason_of(error)}; free space, or choose "
                "another folder by the variable TMPDIR"
            ) from None
