"""Files that are whole or absent, locks, JSON, JSON lines and checksums.

New content is written under a temporary name in the same folder, and renamed when it is complete and on the disk. A
failure leaves whatever was there before. A killed process leaves at most the temporary file or folder, which the next
write replaces. Writers that run at the same time never share a temporary name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

from cogview.errors import InputError, RetryLaterError, disk_full_reason
from cogview.input_files import read_regular
from cogview.plain_data import parse_json

HASH_BLOCK = 1 << 20  # bytes
MAX_LINES_BYTES = 1 << 28  # of a file of JSON lines: a million steps of a run

# The first form is written. The others are leftovers of earlier versions, which a new write also removes.
_TEMPORARY_NAMES = (".{}.writing", ".{}-writing", ".writing-{}")
_OWNER_FILE = "owner.json"  # of a folder that is being written; locked while its writer lives


@contextmanager
def atomic_write(path: Path, *, overwrite: bool = True, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends without an error.

    Several threads and processes may write one path at once: each has a temporary file that it has locked, and the
    last one to finish stays. A temporary file whose writer was killed is not locked, and is used again.

    Args:
        path: The file to write or replace; its folder must exist.
        overwrite: Whether an existing file is replaced.
        durable: Whether the content reaches the disk before the name does, so that a power cut leaves the old or the
            new file. Costs milliseconds.

    Yields:
        The path to write to, in the same folder. After an error no file is left there, and ``path`` is unchanged.

    Raises:
        FileExistsError: ``path`` exists at the end of the block, and ``overwrite`` is false.
        InputError: ``path`` is a device or a pipe, which the file would replace, and ``overwrite`` is true.
    """
    if overwrite and path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a device or a pipe, which a file would replace; expected the name of a file")
    temporary, lock = _claim_temporary(path)
    try:
        yield temporary
        if durable:
            _sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            _publish_new(temporary, path)
        if durable:
            _sync(path.parent)
    except BaseException:
        with suppress(OSError):  # the error to report is the first one
            temporary.unlink()
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new, empty folder that becomes ``path`` when the block ends without an error.

    Args:
        path: The folder to make. Parent folders are made as needed.
        overwrite: Remove an older folder at ``path`` just before the new one takes its name.

    Yields:
        The folder to write into, inside a locked folder beside ``path``. After an error it is removed.

    Raises:
        RetryLaterError: Another process is writing ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    outer = temporary_path(path)
    lock = _claim_folder(outer, path)
    try:
        for name in _TEMPORARY_NAMES[1:]:
            shutil.rmtree(path.with_name(name.format(path.name)), ignore_errors=True)
        for leftover in outer.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != _OWNER_FILE:
                leftover.unlink()
        inner = outer / path.name
        inner.mkdir()
        yield inner
        for each in [*inner.rglob("*"), inner]:
            _sync(each)
        if overwrite and path.exists():
            shutil.rmtree(path)
        inner.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield the folder of ``atomic_folder``, for an output that a user has named.

    Args:
        path: The folder to make, which must not exist.

    Yields:
        The folder to write into.

    Raises:
        InputError: ``path`` exists.
        RetryLaterError: The disk is too small, or another process is writing ``path``.
    """
    try:
        with atomic_folder(path) as folder:
            if path.exists():
                raise InputError(f"{path} is there already: remove it, or choose another folder with -o")
            yield folder
    except OSError as error:
        if disk_full_reason(error) is None:
            raise
        free = shutil.disk_usage(path.parent).free / 1e9
        raise RetryLaterError(
            f"there is no room for {path}: {free:.1f} GB are free there; nothing was written"
        ) from None


def temporary_path(path: Path) -> Path:
    """Return the path at which the only writer of ``path`` writes until it is complete."""
    return path.with_name(_TEMPORARY_NAMES[0].format(path.name))


def remove_unfinished(parent: Path, pattern: str) -> None:
    """Remove temporary folders that killed processes left, also those of earlier versions.

    Args:
        parent: The folder in which to look; no other process may be writing there.
        pattern: Names of the folders that were being written, such as ``step-*``.
    """
    for name in _TEMPORARY_NAMES:
        for unfinished in parent.glob(name.format(pattern)):
            shutil.rmtree(unfinished, ignore_errors=True)


def try_lock(file: int, *, seconds: float = 0.0, shared: bool = False) -> bool:
    """Lock an open file until it is closed; the system also releases the lock of a process that ends.

    Args:
        file: The file descriptor.
        seconds: Time in which to try again.
        shared: Whether other processes may hold shared locks as well.

    Returns:
        False if another process, or another descriptor of this one, holds a lock that excludes this one.

    Raises:
        OSError: The file system or the operating system knows no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def write_owner(file: int) -> None:
    """Write this process into an open file that it has locked, for ``describe_owner``."""
    content = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(content).encode() + b"\n", 0)


def describe_owner(content: bytes) -> str:
    """Return the process that ``write_owner`` wrote as ``content``."""
    try:
        owner = parse_json(content)
        return f"process {owner['pid']} on {owner['host']} since {owner['started']}"
    except (ValueError, TypeError, KeyError):
        return "which has just begun"


def _claim_temporary(path: Path) -> tuple[Path, int | None]:
    """Return an empty temporary file for ``path`` and its locked descriptor; None where files cannot be locked."""
    for number in count(1):
        temporary = temporary_path(path)
        if number > 1:
            temporary = temporary.with_name(f"{temporary.name}-{number}")
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            claimed = try_lock(file) and _is_at(file, temporary)
        except OSError:  # no locks here: the process keeps a name apart from those of others
            os.close(file)
            temporary.unlink()
            apart = temporary_path(path)
            apart = apart.with_name(f"{apart.name}-{os.getpid()}-{threading.get_ident()}")
            apart.write_bytes(b"")
            return apart, None
        if claimed:
            os.ftruncate(file, 0)
            return temporary, file
        os.close(file)
    raise AssertionError


def _claim_folder(outer: Path, path: Path) -> int | None:
    """Make the temporary folder of ``path`` and lock it; raise RetryLaterError if another process holds the lock.

    Returns:
        The descriptor of the lock; None where files cannot be locked.
    """
    while True:
        with suppress(FileExistsError):
            outer.mkdir()
        try:
            file = os.open(outer / _OWNER_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its writer has just finished
            continue
        try:
            free = try_lock(file)
        except OSError:
            os.close(file)
            return None
        if not free:
            owner = describe_owner(os.pread(file, 1000, 0))
            os.close(file)
            raise RetryLaterError(f"{path} is being written by another process ({owner}): wait, or choose another name")
        if _is_at(file, outer / _OWNER_FILE):
            write_owner(file)
            return file
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is the one at ``path``: it may have been renamed or removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _publish_new(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``; raise FileExistsError if that exists, without a moment between the two."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: an empty file claims the name
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary.replace(path)
    else:
        temporary.unlink()


def _sync(path: Path) -> None:
    """Wait until a file or the names of a folder are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    try:
        file = os.open(path, os.O_RDONLY)
    except PermissionError:  # a file that only its writer may open, or a folder that may not be listed
        return
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # not supported there
            raise
    finally:
        os.close(file)


def write_json(path: Path, content: object, *, indent: int | None = 2) -> None:
    """Write plain data as a JSON file that people read too; the file is whole or absent.

    Args:
        path: The file to write or replace.
        content: Mappings, sequences, strings, numbers, booleans and None.
        indent: Spaces for each level; None writes a single line.
    """
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    with atomic_write(path) as temporary:
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


def read_json_lines(path: Path, limit: int = MAX_LINES_BYTES) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, without lines that a kill cut short; none where no file is there.

    Args:
        path: The file.
        limit: Maximum size in bytes.

    Raises:
        InputError: It is larger, or cannot be read.
    """
    if not path.is_file():
        return
    for line in read_regular(path, limit).split(b"\n"):
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
