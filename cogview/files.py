"""Files that are whole or absent, JSON, JSON lines and checksums.

New content is written under a temporary name in the same folder and renamed when it is complete. A failure leaves
whatever was there before. A killed process leaves at most the temporary file or folder, which the next write replaces.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cogview.errors import InputError
from cogview.plain_data import parse_json

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HASH_BLOCK = 1 << 20  # bytes

# The first form is written. The others are leftovers of earlier versions, which a new write also removes.
_TEMPORARY_NAMES = (".{}.writing", ".{}-writing", ".writing-{}")


@contextmanager
def atomic_write(path: Path, *, per_process: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends without an error.

    Args:
        path: The file to write or replace; its folder must exist.
        per_process: Put the process id into the temporary name, for files that several processes may write at once.

    Yields:
        The path to write to, in the same folder. After an error no file is left there, and ``path`` is unchanged.
    """
    temporary = temporary_path(path)
    if per_process:
        temporary = temporary.with_name(f"{temporary.name}-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the error to report is the first one
            temporary.unlink()
        raise


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new, empty folder that becomes ``path`` when the block ends without an error.

    Args:
        path: The folder to make. Parent folders are made as needed.
        overwrite: Remove an older folder at ``path`` just before the new one takes its name.

    Yields:
        The folder to write into, beside ``path``. After an error it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent, glob.escape(path.name))
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        if overwrite and path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield the folder of ``atomic_folder``, for an output that a user has named.

    Args:
        path: The folder to make, which must not exist.

    Yields:
        The folder to write into.

    Raises:
        InputError: ``path`` exists, or the disk is too small.
    """
    if path.exists():
        raise InputError(f"{path} is there already: remove it, or choose another folder with -o")
    try:
        with atomic_folder(path) as folder:
            yield folder
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        free = shutil.disk_usage(path.parent).free / 1e9
        raise InputError(f"there is no room for {path}: {free:.1f} GB are free there; nothing was written") from None


def temporary_path(path: Path) -> Path:
    """Return the path at which ``path`` is written until it is complete."""
    return path.with_name(_TEMPORARY_NAMES[0].format(path.name))


def remove_unfinished(parent: Path, pattern: str) -> None:
    """Remove temporary folders that killed processes left, also those of earlier versions.

    Args:
        parent: The folder in which to look.
        pattern: Names of the folders that were being written, such as ``step-*``.
    """
    for name in _TEMPORARY_NAMES:
        for unfinished in parent.glob(name.format(pattern)):
            shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, content: object, *, indent: int | None = 2, per_process: bool = False) -> None:
    """Write plain data as a JSON file that people read too; the file is whole or absent.

    Args:
        path: The file to write or replace.
        content: Mappings, sequences, strings, numbers, booleans and None.
        indent: Spaces for each level; None writes a single line.
        per_process: As for ``atomic_write``.
    """
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    with atomic_write(path, per_process=per_process) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def json_line(content: Mapping[str, Any]) -> bytes:
    """Return ``content`` as a line of JSON in UTF-8, its newline included.

    A file's name may hold bytes that are not UTF-8; they become escapes, which are valid JSON.
    """
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def append_json_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append ``content`` to a file of JSON lines; after a line that a kill cut short, on a new line.

    Args:
        path: The file; it need not exist.
        content: The object to append.
    """
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json_line(content))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, without lines that a kill cut short; none where no file is there."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            found = parse_json(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def file_sha256(path: Path, on_read: Callable[[int], object] = lambda count: None) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Args:
        path: The file to read.
        on_read: Called with the number of bytes of each block that was read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            on_read(len(block))
    return digest.hexdigest()
