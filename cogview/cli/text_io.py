"""Lines of text that commands read, prompt for and write."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import click

from cogview.cli.streams import is_reader_gone
from cogview.errors import InputError


def read_lines(source: str, expected: str = "a prompt per line") -> list[str]:
    """Return the lines of a UTF-8 file, without blank ones.

    Args:
        source: The file, or ``-`` for standard input.
        expected: The content of a line, for the message of the error.

    Raises:
        InputError: The file cannot be read, is not UTF-8, or has no lines.
    """
    from cogview.tables import name_of, numbered_lines, read_text

    lines = [line for _, line in numbered_lines(read_text(source))]
    if not lines:
        raise InputError(f"{name_of(source)} is empty: expected {expected}")
    return lines


def prompt_lines(question: str) -> Iterator[str]:
    """Print ``question`` and yield the lines that are typed, until an empty line or the end of the input."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  lets input() edit wide characters
    print(question, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


class LineWriter:
    """Print lines on stdout and, given a path, write them to a file as well.

    The file is complete or absent: it replaces an older one when the ``with`` block ends without an error.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open the temporary file of ``path``.

        Raises:
            InputError: ``path`` is a folder, is named like an image, or lies in a folder that cannot be written.
        """
        from cogview.files import atomic_write
        from cogview.image_io.png import prepared_folder
        from cogview.image_io.reading import IMAGE_SUFFIXES

        self.path = path
        self._file: IO[str] | None = None
        if path is None:
            return
        if path.suffix.lower() in IMAGE_SUFFIXES:  # as the shell makes of `-o *.png`: an image would be lost
            raise InputError(f"the lines would replace {path}, which is named like an image; choose another name")
        if path.is_dir():
            raise InputError(f"the output {path} is a folder; expected the name of a file")
        self._stack = ExitStack()
        self._stack.enter_context(prepared_folder(path.parent))
        temporary = self._stack.enter_context(atomic_write(path))
        # A file name may hold bytes that are not UTF-8; as escapes they are valid JSON.
        self._file = temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._stack.enter_context(self._file)

    def write(self, line: str) -> None:
        """Write one line at once.

        Raises:
            click.exceptions.Exit: Nobody reads the lines any more; the status is 0.
        """
        from tqdm import tqdm

        tqdm.write(line, file=sys.stdout)  # keeps a progress bar intact
        sys.stdout.flush()
        if self._file is not None:
            self._file.write(line + "\n")
        elif is_reader_gone():  # as in `cogview caption FOLDER | head -1`
            raise click.exceptions.Exit(0)

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._stack.__exit__(kind, error, trace)
