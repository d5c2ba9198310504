"""Text files and tables of users: lines, CSV, TSV and JSON lines, in UTF-8, UTF-16 or GB18030.

A table is parsed line by line, so that a mistake in one line is the problem of that line alone. Job files
(``cogview.jobs.records``) and lists of pictures with captions (``cogview.data.sources``) are read by these functions.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from cogview.errors import InputError, reason_of
from cogview.formatting import format_bytes, shorten
from cogview.input_files import conversion_advice, marked_encoding, open_regular, read_regular
from cogview.plain_data import parse_json

SHOWN = 40  # characters of a wrong value in a message
MAX_BYTES = 1 << 27  # of a file that is held in memory
MAX_LINE = 100_000  # characters
MAX_ROW_LINES = 100  # of a row with line ends between quotation marks
MIN_COMMON = 0.9  # share of frequent characters by which text in GB18030 is recognized

# Line numbers, each with the values of the line by name, or with the reason why it cannot be read.
TableLines: TypeAlias = Iterator[tuple[int, Mapping[str, Any] | str]]


class HeaderError(ValueError):
    """Raised for wrong column names, which make every line useless."""


def print_note(note: str) -> None:
    """Print a note on stderr."""
    print(f"note: {note}", file=sys.stderr)


def read_text(source: str, on_note: Callable[[str], object] = print_note, limit: int = MAX_BYTES) -> str:
    """Return the content of a UTF-8 file; of one in UTF-16, GBK or GB18030 with a note.

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
    """Return text of bytes in UTF-8; of bytes in UTF-16, with a byte order mark, GBK or GB18030 with a note.

    Args:
        content: The bytes.
        where: Name of the file, for messages.
        on_note: Called with the note.

    Raises:
        InputError: They have another encoding.
    """
    if (encoding := marked_encoding(content)) is not None:
        with suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            on_note(f"{where} is read as {encoding}")
            return text
    try:
        return content.decode("utf-8-sig")  # Windows editors start files with a byte-order mark
    except UnicodeDecodeError as error:
        if (chinese := _decode_chinese(content)) is not None:
            on_note(f"{where} is not UTF-8 and is read as GB18030 (GBK)")
            return chinese
        advice = conversion_advice(content, where if Path(where).exists() else "FILE")
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


def stream_lines(path: Path, on_note: Callable[[str], object] = print_note, *, limit: int = MAX_BYTES) -> Iterator[str]:
    """Yield the lines of a text file, each ending with a line feed; of a UTF-8 file, only one is in memory.

    Args:
        path: The file. In UTF-16, GBK or GB18030 it is read whole, with a note.
        on_note: Called with the note.
        limit: Maximum size of a file in such an encoding, in bytes.

    Yields:
        Each line; of a line beyond ``MAX_LINE`` only the beginning, which is too long as well.

    Raises:
        InputError: The file cannot be read, is no regular file, or has another encoding.
    """
    with open_regular(path) as file:
        if not _is_utf8(file):
            if file.seek(0, io.SEEK_END) > limit:
                file.seek(0)
                raise InputError(
                    f"{path} is not UTF-8, and with more than {format_bytes(limit)} too large to be read in another "
                    f"encoding; {conversion_advice(file.read(1 << 16), path)}"
                )
            yield from io.StringIO(read_text(str(path), on_note, limit), newline=None)
            return
        file.seek(0)
        text = io.TextIOWrapper(file, "utf-8-sig")
        while line := text.readline(MAX_LINE + 2):
            yield line
            while len(line) == MAX_LINE + 2 and not line.endswith("\n"):
                line = text.readline(MAX_LINE + 2)


def _is_utf8(file: BinaryIO) -> bool:
    """Return whether a file is UTF-8 from its position to its end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while part := file.read(1 << 16):
            decoder.decode(part)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number (from 1) and the stripped text of each line that is not blank."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if stripped := line.strip():
            yield number, stripped


def name_of(source: str) -> str:
    """Return the name of ``source`` in messages."""
    return "standard input" if source == "-" else source


def parse_objects(lines: str | Iterable[str]) -> TableLines:
    """Parse JSON lines.

    Args:
        lines: The content of the file, or its lines.

    Yields:
        The number of each line that is not blank, with its object or the reason why it is none.
    """
    for number, line in enumerate(map(str.strip, _lines_of(lines)), start=1):
        if not line:
            continue
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
    return f"the line is too long, expected at most {MAX_LINE} characters" if len(line) > MAX_LINE else ""


def parse_table(
    lines: str | Iterable[str],
    delimiter: str,
    *,
    column_problem: Callable[[str], str | None] = lambda column: None,
    parse_cell: Callable[[str, str], Any] = lambda column, cell: cell or None,
) -> TableLines:
    """Parse a header and a row per line.

    Args:
        lines: The content of the file, or its lines with their ends.
        delimiter: Character between two cells.
        column_problem: Return what is wrong with the name of a column, or None.
        parse_cell: Return the value of a cell, given its column and its text without spaces around it.

    Yields:
        The number of the first line of each row that is not blank, with its values by column or the reason why it
        cannot be read.

    Raises:
        HeaderError: The first row cannot be read, or names a column twice or one with a problem.
    """
    rows = _rows(_lines_of(lines), delimiter)
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


def _lines_of(lines: str | Iterable[str]) -> Iterable[str]:
    """Return the lines of a text with their ends, and anything else unchanged."""
    return io.StringIO(lines, newline="") if isinstance(lines, str) else lines


def _rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the number of the first line of each row that is not blank, and its cells or the reason of an error."""
    source, again = iter(lines), deque[str]()
    current: list[str] = []  # lines of the row that is being read

    def next_lines() -> Iterator[str]:
        while (line := again.popleft() if again else next(source, None)) is not None:
            current.append(line)
            if reason := line_problem(line.strip()):
                raise _LineError(reason)
            if len(current) > MAX_ROW_LINES:  # without a limit, each of many open marks would lead to the last line
                raise csv.Error(f"a row of more than {MAX_ROW_LINES} lines")
            yield line

    number = 1
    while True:
        try:
            for row in csv.reader(next_lines(), delimiter=delimiter, strict=True):
                if any(cell.strip() for cell in row):
                    yield number, row
                number += len(current)
                current.clear()
            return
        except _LineError as error:
            if len(current) == 1:
                yield number, str(error)
            else:
                yield number, "the quotation marks are not understood (a line that is too long follows)"
        except csv.Error as error:
            yield number, f"the quotation marks are not understood ({error})"
        # An open quotation mark must not swallow the lines below.
        number += 1
        again.extendleft(reversed(current[1:]))
        current.clear()


class _LineError(Exception):
    """Raised for a line that is too long."""


def as_whole(value: Any) -> Any:
    """Return a float without a fraction as an int, and anything else unchanged.

    Tables that lack some numbers store the others as 7.0.
    """
    return int(value) if type(value) is float and value.is_integer() else value
