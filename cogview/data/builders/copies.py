"""Find pictures of a build that are equal pixel for pixel.

What was seen stands in an index on the disk, so that memory does not grow with the number of pictures.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogview.data.builders.journal import JournalEntry
from cogview.data.builders.prepare import DIGEST_BYTES, PreparedPicture, is_held_out
from cogview.errors import RetryLaterError

# Capitals: a text with words in lower case counts as a message that is translated.
_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE PICTURES (DIGEST BLOB PRIMARY KEY, NAME BLOB) WITHOUT ROWID;
CREATE TABLE CAPTIONS (DIGEST BLOB PRIMARY KEY) WITHOUT ROWID;
"""


class CopyFinder:
    """Finds copies of pictures; a copy with other captions adds these to the picture.

    Args:
        path: File of the index. It is made anew, since a kill may have damaged it: the journal has the same facts.

    Raises:
        RetryLaterError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        with self._explained():
            self._index = sqlite3.connect(path)
            self._index.executescript(_SCHEMA)

    def __enter__(self) -> CopyFinder:
        return self

    def __exit__(self, *_: object) -> None:
        self._index.close()

    def add(self, entry: JournalEntry) -> None:
        """Remember the picture of an entry."""
        if not entry.captions:
            return
        digest = bytes.fromhex(entry.digest)
        name = entry.name.encode("utf-8", "surrogatepass")
        keys = [(_caption_digest(digest, caption),) for caption in entry.captions]
        with self._explained():
            self._index.execute("INSERT OR IGNORE INTO PICTURES VALUES (?, ?)", (digest, name))
            self._index.executemany("INSERT OR IGNORE INTO CAPTIONS VALUES (?)", keys)

    def entry(self, picture: PreparedPicture, source: str, share: float) -> JournalEntry:
        """Return the entry of a prepared picture, and remember it.

        Args:
            picture: The picture.
            source: Hash of its record.
            share: Share of the pictures that are held out.
        """
        left_out = picture.left_out
        captions = picture.captions
        if captions and (first := self._first_name(picture.digest)) is not None:
            captions = self._new_captions(picture)
            if not captions:
                left_out = (*left_out, f"a copy of {first}, with no other caption")
        entry = JournalEntry(
            name=picture.record.name,
            source=source,
            stamp=picture.stamp,
            digest=picture.digest,
            captions=captions,
            held_out=bool(captions) and is_held_out(picture.digest, share),
            left_out=left_out,
            notes=picture.notes,
        )
        self.add(entry)
        return entry

    def _first_name(self, digest: str) -> str | None:
        """Return the name of the first picture with these pixels."""
        with self._explained():
            found = self._index.execute("SELECT NAME FROM PICTURES WHERE DIGEST = ?", (bytes.fromhex(digest),))
            row = found.fetchone()
        return None if row is None else row[0].decode("utf-8", "surrogatepass")

    def _new_captions(self, picture: PreparedPicture) -> tuple[str, ...]:
        """Return the captions that no copy of a picture has."""
        digest = bytes.fromhex(picture.digest)
        query = "SELECT 1 FROM CAPTIONS WHERE DIGEST = ?"
        with self._explained():
            return tuple(
                caption
                for caption in picture.captions
                if self._index.execute(query, (_caption_digest(digest, caption),)).fetchone() is None
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise RetryLaterError for errors of the index, such as a full disk."""
        try:
            yield
        except sqlite3.Error as error:
            raise RetryLaterError(f"cannot write {self.path}: {error}; free space, and run the command again") from None


def _caption_digest(digest: bytes, caption: str) -> bytes:
    """Return a hash of a picture and one of its captions."""
    content = digest + caption.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
