"""Text files and tables of users: lines, CSV, TSV and JSON lines, in UTF-8 or GB18030.

A table is parsed line by line, so that a mistake in one line is the problem of that line alone. Job files
(``cogview.jobs.records``) and lists of pictures with captions (``cogview.data.sources``) are read by these functions.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cogview.errors import InputError, reason_of
from cogview.formatting import format_bytes, shorten
from cogview.input_files import read_regular
from cogview.plain_data import parse_json

SHOWN = 40  # characters of a wrong value in a message
MAX_BYTES = 1 << 27  # of a file: its lines are held in memory
MAX_LINE = 100_000  # characters
MIN_COMMON = 0.9  # share of frequent characters by which text in GB18030 is recognized

# Line numbers, each with the values of the line by name, or with the reason why it cannot be read.
TableLines: TypeAlias = Iterator[tuple[int, Mapping[str, Any] | str]]


class HeaderError(ValueError):
    """Raised for wrong column names, which make every line useless."""


def print_note(note: str) -> None:
    """Print a note on stderr."""
    print(f"note: {note}", file=sys.stderr)


def read_text(source: str, on_note: Callable[[str], object] = print_note, limit: int = MAX_BYTES) -> str:
    """Return the content of a UTF-8 file; of one in GBK or GB18030 with a note.

    Args:
        source: The file, or ``-`` for standard input.
        on_note: Called with the note.
        limit: Maximum size of a file in bytes.

    Raises:
        InputError: The file cannot be read, is no regular file, is larger than ``limit``, or has another encoding.
    """
    where = name_of(source)
    content = read_regular(Path(source), limit) if source != "-" else _read_stdin()
    return decode_text(content, where, on_note)


def decode_text(content: bytes, where: str, on_note: Callable[[str], object] = print_note) -> str:
    """Return text of bytes in UTF-8; of bytes in GBK or GB18030 with a note.

    Args:
        content: The bytes.
        where: Name of the file, for messages.
        on_note: Called with the note.

    Raises:
        InputError: They have another encoding.
    """
    try:
        return content.decode("utf-8-sig")  # Windows editors start files with a byte-order mark
    except UnicodeDecodeError as error:
        if (text := _decode_chinese(content)) is not None:
            on_note(f"{where} is not UTF-8 and is read as GB18030 (GBK)")
            return text
        advice = "if it is GBK, convert it: iconv -f GB18030 -t UTF-8"
        line = 1 + content.count(b"\n", 0, error.start)
        raise InputError(
            f"{where} is not UTF-8: byte {error.start} in line {line} is 0x{content[error.start]:02x}; {advice}"
        ) from None


def _read_stdin() -> bytes:
    """Return the content of standard input; raise InputError if it is closed or too large."""
    if sys.stdin is None:
        raise InputError("standard input is closed; give a file, or input through a pipe")
    try:
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read standard input: {reason_of(error)}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"standard input is too large: at most {format_bytes(MAX_BYTES)} are read")
    return content


def _decode_chinese(content: bytes) -> str | None:
    """Return text in GB18030, which covers GBK; None unless nearly all of its characters are frequent in Chinese.

    Any other encoding read as GB18030 is invalid, or consists of rare characters.
    """
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        return None
    if any(character < " " and character not in "\t\r\n" for character in text):
        return None
    others = [character.encode("gb2312", "replace") for character in text if not character.isascii()]
    # Leading bytes of GB2312: 0xA1 and 0xA3 punctuation, from 0xB0 to 0xD7 the 3,755 frequent characters.
    common = sum(each[0] in (0xA1, 0xA3) or 0xB0 <= each[0] <= 0xD7 for each in others)
    return text if others and common >= MIN_COMMON * len(others) else None


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number (from 1) and the stripped text of each line that is not blank."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if stripped := line.strip():
            yield number, stripped


def name_of(source: str) -> str:
    """Return the name of ``source`` in messages."""
    return "standard input" if source == "-" else source


def parse_objects(text: str) -> TableLines:
    """Parse JSON lines.

    Args:
        text: The content of the file.

    Yields:
        The number of each line that is not blank, with its object or the reason why it is none.
    """
    for number, line in numbered_lines(text):
        if reason := line_problem(line):
            yield number, reason
            continue
        try:
            found = parse_json(line)
        except json.JSONDecodeError as error:
            yield number, f"this is not JSON: {error.msg} (character {error.colno})"
        except ValueError as error:
            yield number, str(error)
        else:
            wrong = f"expected an object in braces, got {shorten(line, SHOWN)}"
            yield number, found if isinstance(found, dict) else wrong


def line_problem(line: str) -> str:
    """Return the reason why a line is too long to be used; empty for all others."""
    return f"the line has {len(line)} characters, expected at most {MAX_LINE}" if len(line) > MAX_LINE else ""


def parse_table(
    text: str,
    delimiter: str,
    *,
    column_problem: Callable[[str], str | None] = lambda column: None,
    parse_cell: Callable[[str, str], Any] = lambda column, cell: cell or None,
) -> TableLines:
    """Parse a header and a row per line.

    Args:
        text: The content of the file.
        delimiter: Character between two cells.
        column_problem: Return what is wrong with the name of a column, or None.
        parse_cell: Return the value of a cell, given its column and its text without spaces around it.

    Yields:
        The number of the first line of each row that is not blank, with its values by column or the reason why it
        cannot be read.

    Raises:
        HeaderError: The first row cannot be read, or names a column twice or one with a problem.
    """
    lines = io.StringIO(text, newline="").readlines()
    too_long = {number: reason for number, line in enumerate(lines, 1) if (reason := line_problem(line.strip()))}
    rows = _rows(["\n" if number in too_long else line for number, line in enumerate(lines, 1)], delimiter)
    number, columns = next(rows, (1, []))
    if isinstance(columns, str):
        raise HeaderError(f"line {number}: {columns}")
    columns = [column.strip() for column in columns]
    for index, column in enumerate(columns):
        if (problem := column_problem(column)) is not None:
            raise HeaderError(f"line {number} must name the columns: {problem}")
        if column in columns[:index]:
            raise HeaderError(f'line {number} names the column "{column}" twice')
    for number, row in rows:
        if isinstance(row, str):
            yield number, row
        elif len(row) != len(columns):
            mark = "tab" if delimiter == "\t" else "comma"
            advice = f"a text that holds a {mark} belongs between quotation marks"
            yield number, f"{len(row)} columns, expected {len(columns)}; {advice}"
        else:
            yield number, {column: parse_cell(column, cell.strip()) for column, cell in zip(columns, row, strict=True)}
    yield from too_long.items()


def _rows(lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the number of the first line of each row that is not blank, and its cells or the reason of an error."""
    start = 0
    while start < len(lines):
        rows = csv.reader(lines[start:], delimiter=delimiter, strict=True)
        number = start + 1
        try:
            for row in rows:
                if any(cell.strip() for cell in row):
                    yield number, row
                number = start + rows.line_num + 1
            return
        except csv.Error as error:
            yield number, f"the quotation marks are not understood ({error})"
            start = number  # an unclosed quotation mark must not swallow the lines below


def as_whole(value: Any) -> Any:
    """Return a float without a fraction as an int, and anything else unchanged.

    Tables that lack some numbers store the others as 7.0.
    """
    return int(value) if type(value) is float and value.is_integer() else value
