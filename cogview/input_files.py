"""Open files that users name: regular files only, and no more of them than fits into memory.

A pipe or a device in the place of a file would make a command wait for ever, or read without end.
"""

from __future__ import annotations

import codecs
import os
import stat
import zipfile
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.errors import InputError, reason_of
from cogview.formatting import format_bytes, shorten

if TYPE_CHECKING:
    import numpy as np

MAX_ARRAYS_BYTES = 1 << 30

# Byte order marks that begin a file; that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def marked_encoding(content: bytes) -> str | None:
    """Return the encoding that a byte order mark at the beginning of a file names: UTF-16 or UTF-32; else None."""
    return next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)


def conversion_advice(content: bytes, path: Path | str = "FILE") -> str:
    """Return the command that converts a file to UTF-8, as the end of a message.

    Args:
        content: The file, or its beginning.
        path: Its name.
    """
    name = marked_encoding(content)
    if name is None and b"\0" in content:
        name = _unmarked_utf16(content)
        if name is None:
            return "it holds bytes 0, so it is no text: check that it is the right file"
    to = f"-t UTF-8 {path} > NEW"
    return f"if it is GBK, convert it: iconv -f GB18030 {to}" if name is None else f"it is {name}: iconv -f {name} {to}"


def _unmarked_utf16(content: bytes) -> str | None:
    """Return UTF-16LE or UTF-16BE if nearly all characters of the content are usual ones in it; else None."""
    for name in ("UTF-16BE", "UTF-16LE") if content.startswith(b"\0") else ("UTF-16LE", "UTF-16BE"):
        text = content[: 1 << 16].decode(name, "replace")
        usual = sum(character.isascii() and (character.isprintable() or character in "\t\r\n") for character in text)
        usual += sum("\u3000" <= character <= "\u30ff" or "\u4e00" <= character <= "\u9fff" for character in text)
        if usual >= 0.95 * len(text):
            return name
    return None


def looked_at(path: Path) -> str:
    """Return where a missing relative path was looked for, as the end of a message; nothing for an absolute one.

    Args:
        path: The path, of a command line or of a recipe.
    """
    looked = f"a path starts at the current folder, so it would be {path.absolute()}"
    return "" if path.is_absolute() else f"; {looked}"


def missing_file(folder: Path, name: str) -> str:
    """Return why a folder has no file of some name, as the end of a message.

    Args:
        folder: The folder, which may be missing as well, or be a file.
        name: The file in it that is missing.
    """
    if folder.is_dir():
        return f"{name} is missing"
    return "it is a file" if folder.exists() else f"there is no such folder{looked_at(folder)}"


def open_regular(path: Path, kind: str = "") -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: The file.
        kind: A word for messages, such as ``recipe``.

    Returns:
        The open file.

    Raises:
        InputError: There is no such file, it is a folder, a pipe, a device or a socket, or it cannot be read.
    """
    try:
        # Without waiting for the writer of a pipe; for regular files the flag means nothing.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise _unreadable(path, kind, reason_of(error)) from None
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(file, "rb")
    os.close(file)
    if stat.S_ISDIR(mode):
        raise _unreadable(path, kind, "it is a folder")
    raise InputError(f"{path} is no regular file; a command reads a pipe as its standard input, named -")


def read_regular(path: Path, limit: int, kind: str = "") -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.
        limit: Maximum size in bytes.
        kind: A word for messages, such as ``recipe``.

    Raises:
        InputError: The file is larger, or cannot be opened (`open_regular`).
    """
    with open_regular(path, kind) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""  # a read takes memory for all that it asks for
        if len(content) > size:  # the file grew, or it is one of the system's, which state no size
            content += file.read(limit + 1 - len(content))
    if max(size, len(content)) > limit:
        raise InputError(f"{path} is too large ({format_bytes(size)}): at most {format_bytes(limit)} are read")
    return content


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file of ``numpy.savez``, by name; no pickle in it is read.

    Args:
        path: The file.

    Raises:
        InputError: The file cannot be opened (`open_regular`), is damaged, or unpacks to more than
            ``MAX_ARRAYS_BYTES``.
    """
    import numpy as np

    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_ARRAYS_BYTES:
                raise InputError(
                    f"{path} unpacks to {format_bytes(size)}: at most {format_bytes(MAX_ARRAYS_BYTES)} are read"
                )
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: np.asarray(arrays[name]) for name in arrays.files}
        except InputError:
            raise
        except Exception as error:  # numpy's and zipfile's readers raise nearly anything on broken data
            reason = shorten(" ".join(reason_of(error).split()), 100)
            raise InputError(f"{path} is damaged or holds no arrays of numpy: {reason}") from None


def _unreadable(path: Path, kind: str, reason: str) -> InputError:
    """Return the error of a file that cannot be opened."""
    return InputError(f"cannot read the {kind} {path}: {reason}" if kind else f"cannot read {path}: {reason}")
