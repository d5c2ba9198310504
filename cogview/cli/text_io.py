"""Lines of text that commands read, ask for and write."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from cogview.errors import InputError
from cogview.files import atomic_write
from cogview.jobs.records import name_of, numbered_lines, read_text


def read_lines(source: str, expected: str = "a prompt per line") -> list[str]:
    """The lines of a UTF-8 file, or of standard input for ``-``, without blank ones; InputError if there are none."""
    lines = [line for _, line in numbered_lines(read_text(source))]
    if not lines:
        raise InputError(f"{name_of(source)} is empty: expected {expected}")
    return lines


def prompt_lines(question: str) -> Iterator[str]:
    """What is typed, line by line, until an empty line or the end of the input."""
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
    """Prints lines, and writes them into a file as well if there is a ``path``: it is there whole, or not at all.

    A file of that name is replaced at the end; what goes wrong inside ``with`` leaves it as it was.
    """

    def __init__(self, path: Path | None = None) -> None:
        from cogview.image_io.png import prepare_folder
        from cogview.image_io.reading import IMAGE_SUFFIXES

        self.path = path
        self._file: IO[str] | None = None
        if path is None:
            return
        if path.suffix.lower() in IMAGE_SUFFIXES:  # as `-o *.png` makes it, and the picture would be lost
            raise InputError(f"the lines would replace {path}, which is named like a picture; choose another name")
        if path.is_dir():
            raise InputError(f"the output {path} is a folder; expected the name of a file")
        prepare_folder(path.parent)
        self._stack = ExitStack()
        temporary = self._stack.enter_context(atomic_write(path))
        # A file's name may hold bytes that are no UTF-8; as escapes they are valid JSON.
        self._file = temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._stack.enter_context(self._file)

    def write(self, line: str) -> None:
        """One more line, at once."""
        from tqdm import tqdm

        tqdm.write(line, file=sys.stdout)  # beside a progress bar, if there is one
        sys.stdout.flush()
        if self._file is not None:
            self._file.write(line + "\n")

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._stack.__exit__(kind, error, trace)
