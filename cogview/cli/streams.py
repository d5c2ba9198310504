"""The standard streams of a command: missing ones, readers that are gone, and encodings without Chinese characters."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def command_line(argv: Sequence[str] | None) -> list[str]:
    """Return the words of a command line, without the program's name.

    Python decodes the words of the process and encodes the names of files alike. Where that encoding has no Chinese
    characters, as in the locale C with ``PYTHONUTF8=0``, the process starts again in Python's UTF-8 mode.

    Args:
        argv: The words; None stands for those of the process.
    """
    if argv is not None:
        return list(argv)
    chosen = "utf8" in getattr(sys, "_xoptions", {})  # by python -X utf8=0, which would win again
    if not _encodes_chinese(sys.getfilesystemencoding()) and sys.executable and not chosen:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    return sys.argv[1:]


def prepare_streams() -> None:
    """Make the standard streams usable, whatever the process was started with.

    * A stream that the parent closed, as services do, reads nothing or discards what is written.
    * When the reader of stdout or stderr is gone, as in ``cogview models | head -1``, the rest of it is discarded.
    * A character that the encoding of an output lacks is written as an escape. Typed text is read as UTF-8 at least.
    """
    # A file opened later would take the number of a closed stream, and libraries would write their messages into it.
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(file, True)
    os.close(file)
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdin, io.TextIOWrapper) and not _encodes_chinese(sys.stdin.encoding):
        with suppress(io.UnsupportedOperation):  # something has been read already
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _discarding(stream, number))


def is_reader_gone() -> bool:
    """Return whether stdout was a pipe whose reader is gone, so that results printed there are lost."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return isinstance(raw, _Output) and raw.is_reader_gone


class _Output(io.FileIO):
    """A file descriptor for writing that discards everything after an error, and has none when its reader is gone."""

    is_reader_gone = False

    def write(self, data: Any, /) -> int:
        """Write bytes; return how many."""
        try:
            return super().write(data)
        except OSError as error:
            # For libraries and children of this process as well; and the interpreter writes again when it ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise
            self.is_reader_gone = True
            return len(data)


def _discarding(stream: io.TextIOWrapper, number: int) -> io.TextIOWrapper:
    """Return a stream like ``stream`` that escapes unknown characters and, on descriptor ``number``, is an _Output."""
    stream.reconfigure(errors="backslashreplace")
    raw: Any = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer in between
    if type(raw) is not io.FileIO or raw.fileno() != number:  # in tests and notebooks, or prepared already
        return stream
    stream.flush()
    output = _Output(number, "w", closefd=False)
    is_unbuffered = raw is stream.buffer
    return io.TextIOWrapper(
        output if is_unbuffered else io.BufferedWriter(output),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _encodes_chinese(encoding: str) -> bool:
    """Return whether ``encoding`` has Chinese characters."""
    try:
        "一".encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
