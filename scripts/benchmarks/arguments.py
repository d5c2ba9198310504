"""Arguments of the benchmarks: types that refuse what would fail after minutes of work, and one line for a mistake."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cogview.cli.main import run_safely


class Parser(argparse.ArgumentParser):
    """A parser that prints the docstring of a script as it is, and a mistake as one line."""

    def __init__(self, description: str | None) -> None:
        """Create a parser.

        Args:
            description: Docstring of the script.
        """
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and the remedy on stderr, and exit with status 2."""
        line = message.removeprefix("argument ").replace("\n", " ")
        self.exit(2, f"{Path(self.prog).name}: {line}; see {Path(self.prog).name} --help\n")


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script and exit with its status; a mistake, a full disk or Ctrl-C is one line.

    Args:
        main: Function that parses the command line and returns the exit status.
    """
    sys.exit(run_safely(main, Path(sys.argv[0]).name))


def count(text: str) -> int:
    """Return a whole number from 1."""
    return _whole(text, 1)


def whole(text: str) -> int:
    """Return a whole number from 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    """Return whole numbers from 1 that commas separate."""
    return [count(part) for part in text.split(",")]


def shape(text: str) -> tuple[int, int]:
    """Return the numbers of a text such as ``6x256``."""
    parts = text.split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected two whole numbers such as 6x256, got {text!r}")
    return count(parts[0]), count(parts[1])


def positive(text: str) -> float:
    """Return a finite number above 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def fraction(text: str) -> float:
    """Return a number from 0 to 1."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def folder(text: str) -> Path:
    """Return the path of a folder that exists."""
    return _existing(text, Path.is_dir, "folder")


def file(text: str) -> Path:
    """Return the path of a file that exists."""
    return _existing(text, Path.is_file, "file")


def _existing(text: str, exists: Callable[[Path], bool], kind: str) -> Path:
    path = Path(text)
    if not text or not exists(path):
        raise argparse.ArgumentTypeError(f"expected a {kind} that exists, got {text!r}")
    return path


def output_file(text: str) -> Path:
    """Return the path of a file that can be written at the end: its folder exists."""
    path = Path(text)
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected the name of a file, got {text!r}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}; make it first")
    return path


def output_folder(text: str) -> Path:
    """Return the path of a folder that exists or can be made."""
    path = Path(text)
    if not text or any(each.exists() and not each.is_dir() for each in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"expected the name of a folder, got {text!r}")
    return path
