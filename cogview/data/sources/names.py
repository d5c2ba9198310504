"""Names of pictures and captions on the disk, so that memory does not grow with the number of files.

They stand in a temporary database, which vanishes with the process. Names are bytes there, as UTF-8 sorts them: the
order of their characters.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cogview.data.sources.records import PictureRecord
from cogview.errors import RetryLaterError
from cogview.image_io.reading import IMAGE_SUFFIXES, UNREAD_SUFFIXES

CAPTION_SUFFIX = ".txt"
PICTURE, CAPTIONS, UNREAD, OTHER = range(4)  # kinds of files

_HASHES = 1 << 10  # that are written together

# Capitals: a text with words in lower case counts as a message that is translated. 8 MB are in memory at most.
_PRAGMAS = "PRAGMA JOURNAL_MODE = OFF; PRAGMA SYNCHRONOUS = OFF; PRAGMA CACHE_SIZE = -8000;"
_FILES = "CREATE TABLE FILES (NAME BLOB, STEM BLOB, KIND INTEGER);"
_PAIRS = f"""
CREATE INDEX STEMS ON FILES (STEM, KIND, NAME);
CREATE TABLE PAIRS AS
SELECT NAME, KIND, (SELECT MAX(NAME) FROM FILES AS T WHERE T.STEM = F.STEM AND T.KIND = {CAPTIONS}) AS TEXT
FROM FILES AS F
WHERE KIND IN ({PICTURE}, {UNREAD}) OR KIND = {CAPTIONS}
AND NOT EXISTS (SELECT 1 FROM FILES AS P WHERE P.STEM = F.STEM AND P.KIND = {PICTURE})
ORDER BY NAME;
"""
_NAMED = "CREATE TABLE NAMED (HASH INTEGER); CREATE TABLE OTHERS (NAME BLOB);"


class FilePairs:
    """Pictures with their captions, captions without a picture, and files of formats that are not read, by names.

    Args:
        names: Names of files in any order. ``NAME.txt`` has the captions of ``NAME.jpg``.

    Raises:
        RetryLaterError: The disk of temporary files is full.
    """

    def __init__(self, names: Iterable[str]) -> None:
        with _explained():
            self._rows = _open(_FILES)
            self._rows.executemany("INSERT INTO FILES VALUES (?, ?, ?)", map(_file_of, names))
            self._rows.executescript(_PAIRS)

    def first(self, kind: int) -> str | None:
        """Return the first name of a kind; None if there is none."""
        name = self._rows.execute("SELECT MIN(NAME) FROM FILES WHERE KIND = ?", (kind,)).fetchone()[0]
        return None if name is None else _text(name)

    def first_other(self, suffixes: tuple[str, ...]) -> str | None:
        """Return the first name with one of some suffixes among those of other kinds; None if there is none."""
        names = self._rows.execute("SELECT NAME FROM FILES WHERE KIND = ? ORDER BY NAME", (OTHER,))
        return next((_text(name) for (name,) in names if _text(name).lower().endswith(suffixes)), None)

    def __len__(self) -> int:
        count: int = self._rows.execute("SELECT COUNT(*) FROM PAIRS").fetchone()[0]
        return count

    def __iter__(self) -> Iterator[tuple[str, int, str | None]]:
        """Yield name, kind, and the name of the captions if there are any, sorted by name."""
        for name, kind, captions in self._rows.execute("SELECT NAME, KIND, TEXT FROM PAIRS ORDER BY ROWID"):
            yield _text(name), kind, None if captions is None or kind == CAPTIONS else _text(captions)


class NamedPictures:
    """Pictures that a file names, and those beside them that it does not name.

    Raises:
        RetryLaterError: The disk of temporary files is full.
    """

    def __init__(self) -> None:
        with _explained():
            self._rows = _open(_NAMED)
        self._waiting: list[tuple[int]] = []
        self._folders: set[str] = set()

    def add(self, record: PictureRecord) -> PictureRecord:
        """Remember the picture of a record, and return the record."""
        self._waiting.append((_name_hash(record.name),))
        if record.source is not None:
            self._waiting.append((_name_hash(str(record.source.path)),))
        if len(self._waiting) >= _HASHES:
            self._write()
        if record.file is not None:
            self._folders.add(os.path.dirname(record.file.path))  # noqa: PTH120  faster for millions
        return record

    def find_others(self) -> None:
        """Look for pictures that were not added, in the folders of those that were and can be used."""
        self._write()
        with _explained():
            self._rows.execute("CREATE INDEX HASHES ON NAMED (HASH)")
            self._rows.executemany("INSERT INTO OTHERS VALUES (?)", ((_bytes(name),) for name in self._others()))

    def __len__(self) -> int:
        """Return the number of pictures that were found."""
        count: int = self._rows.execute("SELECT COUNT(*) FROM OTHERS").fetchone()[0]
        return count

    def __iter__(self) -> Iterator[str]:
        """Yield the pictures that were found, sorted by name."""
        for (name,) in self._rows.execute("SELECT NAME FROM OTHERS ORDER BY NAME"):
            yield _text(name)

    def _write(self) -> None:
        with _explained():
            self._rows.executemany("INSERT INTO NAMED VALUES (?)", self._waiting)
        self._waiting = []

    def _others(self) -> Iterator[str]:
        """Yield the pictures in the folders that were not added."""
        query = "SELECT 1 FROM NAMED WHERE HASH = ?"
        for folder in self._folders:
            with suppress(OSError), os.scandir(folder or ".") as entries:  # each picture there has its own problem
                for entry in entries:
                    if entry.name.startswith(".") or not entry.name.lower().endswith(IMAGE_SUFFIXES):
                        continue
                    picture = str(Path(folder, entry.name))
                    if self._rows.execute(query, (_name_hash(picture),)).fetchone() is None:
                        yield picture


def _open(schema: str) -> sqlite3.Connection:
    """Return a database in a temporary file, which is removed when it is closed."""
    rows = sqlite3.connect("", isolation_level=None)
    rows.executescript(_PRAGMAS + schema)
    return rows


@contextmanager
def _explained() -> Iterator[None]:
    """Raise RetryLaterError for errors of the database, such as a full disk."""
    try:
        yield
    except sqlite3.Error as error:
        raise RetryLaterError(
            f"the names of the files cannot be written to a temporary file ({error}): free space, or choose another "
            "folder by the variable TMPDIR, and run the command again"
        ) from None


def _file_of(name: str) -> tuple[bytes, bytes, int]:
    """Return name, stem and kind of a file."""
    lower = name.lower()
    kinds: tuple[tuple[tuple[str, ...], int], ...] = (
        (IMAGE_SUFFIXES, PICTURE),
        ((CAPTION_SUFFIX,), CAPTIONS),
        (UNREAD_SUFFIXES, UNREAD),
    )
    kind = next((kind for suffixes, kind in kinds if lower.endswith(suffixes)), OTHER)
    return _bytes(name), _bytes(os.path.splitext(name)[0]), kind  # noqa: PTH122  faster for millions


def _name_hash(name: str) -> int:
    """Return a hash of a name, in 64 bits with a sign."""
    return int.from_bytes(hashlib.blake2b(_bytes(name), digest_size=8).digest(), "little", signed=True)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")
