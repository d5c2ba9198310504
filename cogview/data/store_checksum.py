"""The checksum of a token store, which is compared before LMDB maps a page.

LMDB trusts its pages, so a damaged one may end the process by a signal. ``data.sha256`` has the form of ``sha256sum``,
which checks it, too: ``sha256sum -c data.sha256``.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from cogview.data.store_pages import check_pages
from cogview.errors import InputError
from cogview.files import atomic_write, file_sha256
from cogview.formatting import printable

DATA_FILE = "data.mdb"
CHECKSUM_FILE = "data.sha256"
ALWAYS_HASHED = 1 << 26  # bytes: a smaller file is hashed whenever a process opens it, a larger one when it has changed

_CHECKSUM_BYTES = 1000  # of a checksum file, at most


def write_checksum(path: Path) -> None:
    """Write the checksum of the finished store at ``path``, so that damage is found before a page is mapped."""
    data = path / DATA_FILE
    _write_checksum(path, file_sha256(data), data.stat())


def check_sum(path: Path) -> None:
    """Compare the data of the store at ``path`` with its checksum.

    Stores of earlier versions and CogView v1 datasets have none: their pages are checked.

    Raises:
        InputError: They differ, or a page is damaged.
    """
    data, checksum = path / DATA_FILE, path / CHECKSUM_FILE
    if not checksum.is_file():
        check_pages(data)
        return
    stat = data.stat()
    with checksum.open("rb") as file:
        expected, _, rest = file.read(_CHECKSUM_BYTES).decode("utf-8", "replace").partition(" ")
    if stat.st_size > ALWAYS_HASHED and _state(stat) in rest:
        return
    if (found := file_sha256(data)) != expected:
        raise InputError(
            f"{path} is damaged or was changed: the SHA-256 of {DATA_FILE} is {found[:12]}…, {CHECKSUM_FILE} says "
            f"{printable(expected[:12])}…: copy it again, or encode the store again"
        )
    if _state(stat) not in rest:
        with suppress(OSError):  # in a folder that is not writable, the file is hashed each time
            _write_checksum(path, found, stat)


def _write_checksum(path: Path, sha256: str, stat: os.stat_result) -> None:
    """Write a checksum, with the state of the file in which it was found right, as a comment of ``sha256sum``."""
    with atomic_write(path / CHECKSUM_FILE) as temporary:  # on a full disk no half of it remains
        temporary.write_text(f"{sha256}  {DATA_FILE}\n# {_state(stat)}\n", encoding="utf-8")


def _state(stat: os.stat_result) -> str:
    """Return what changes when a file is written or copied."""
    return f"{stat.st_size} bytes, inode {stat.st_ino}, written at {stat.st_mtime_ns}"
