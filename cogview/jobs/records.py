"""Job files: a line for each thing to make, as plain text, CSV, TSV or JSON lines."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cogview.errors import InputError
from cogview.formatting import shorten
from cogview.tokenizers.tasks import job_tasks

SHOWN = 40  # characters of a wrong value in a message
_SAMPLING = ("temperature", "top_k", "top_p", "guidance", "text_attention")  # of ``Sampling``


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One line of a job; None where the line does not say. ValueError for what no model could do.

    ``number`` is that of its first line in the file, from 1; ``image`` is found from the current folder.
    """

    number: int
    id: str | None = None
    prompt: str | None = None
    task: str = "generate"
    image: Path | None = None
    rows: int | None = None
    n: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | None = None
    text_attention: float | None = None

    def __post_init__(self) -> None:
        tasks = job_tasks()
        if self.task not in tasks:
            raise ValueError(f'the task "{self.task}" is unknown; known: {", ".join(tasks)}')
        needed = tasks[self.task].inputs
        if missing := [key for key in needed if getattr(self, key) is None]:
            raise ValueError(f"the task {self.task} needs {' and '.join(missing)}")
        for key in ("image", "rows"):  # else a forgotten task would draw something else without a word
            if getattr(self, key) is not None and key not in needed:
                users = ", ".join(name for name, task in tasks.items() if key in task.inputs)
                raise ValueError(f"{key} means nothing for the task {self.task}; it belongs to: {users}")
        if self.n is not None and self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if self.rows is not None and self.rows < 0:
            raise ValueError(f"rows must be at least 0, got {self.rows}")
        sampling = {key: value for key in _SAMPLING if (value := getattr(self, key)) is not None}
        if sampling or self.seed is not None:
            from cogview.generation.sampling import MAX_SEED
            from cogview.modeling.config import Sampling

            Sampling(**sampling)
            if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
                raise ValueError(f"the seed must be from 0 to {MAX_SEED}, got {self.seed}")

    @property
    def key(self) -> str:
        """Its id, or else ``line NUMBER``: no two lines that ``read_job`` returns have the same."""
        return self.id or f"line {self.number}"


_KINDS: dict[str, type] = {
    name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(JobRecord).items() if name != "number"
}
_KIND_NAMES = {str: "text", Path: "text", int: "a whole number", float: "a number"}

# Line numbers, and what stands there by name, or what is wrong with it.
_Found = Iterator[tuple[int, Mapping[str, Any] | str]]


def read_job(source: str) -> tuple[list[JobRecord], list[str]]:
    """The good lines of a job file, and a problem, beginning with ``line NUMBER:``, for each of the others.

    The suffix tells the format: .txt, none, or ``-`` (standard input) a prompt per line; .csv and .tsv a row of column
    names and a row per line; .jsonl an object per line. The encoding is UTF-8. InputError for a file that cannot be
    read, an unknown column, and where there is no good line.
    """
    suffix = "" if source == "-" else Path(source).suffix.lower()
    if suffix not in _FORMATS:
        known = ".txt (a prompt per line), .csv, .tsv, .jsonl"
        raise InputError(f'{source}: the suffix "{suffix}" is unknown; known: {known}')
    find, expected = _FORMATS[suffix]
    where = name_of(source)
    lines: dict[str, JobRecord] = {}
    problems: list[str] = []
    try:
        for number, found in find(read_text(source)):
            try:
                if isinstance(found, str):
                    raise ValueError(found)
                line = _line(number, found, _folder(source))
                if line.key in lines:
                    raise ValueError(f'the id "{line.key}" is that of line {lines[line.key].number} as well')
            except ValueError as error:
                problems.append(f"line {number}: {' '.join(str(error).split())}")
            else:
                lines[line.key] = line
    except _HeadError as error:
        raise InputError(f"{where}: {error}") from None
    if not lines and problems:
        raise InputError(f"{where} has no line that can be used; the first problem is in {problems[0]}")
    if not lines:
        raise InputError(f"{where} is empty: expected {expected}")
    return list(lines.values()), problems


def digest(lines: Sequence[JobRecord], source: str) -> str:
    """SHA-256 of what ``lines`` ask for, whatever the format of ``source`` and the folder that it is named from."""
    plain = []
    for line in lines:
        values = {key: value for key, value in vars(line).items() if value is not None}
        if line.image is not None:
            values["image"] = os.path.relpath(line.image, _folder(source))
        plain.append(values)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_text(source: str) -> str:
    """The content of a UTF-8 file, or of standard input for ``-``; InputError where there is none."""
    where = name_of(source)
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {where}: {error.strerror or error}") from None
    try:
        return content.decode("utf-8-sig")  # Windows editors begin files with a mark
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, without white space around them, and their numbers from 1."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if stripped := line.strip():
            yield number, stripped


def name_of(source: str) -> str:
    """``source`` in a message."""
    return "standard input" if source == "-" else source


class _HeadError(ValueError):
    """The names of the columns cannot be used, and so no line can."""


def _folder(source: str) -> Path:
    return Path() if source == "-" else Path(source).parent


def _prompts(text: str) -> _Found:
    for number, line in numbered_lines(text):
        yield number, {"prompt": line}


def _objects(text: str) -> _Found:
    for number, line in numbered_lines(text):
        try:
            found = json.loads(line, object_pairs_hook=_without_repeats)
        except json.JSONDecodeError as error:
            yield number, f"this is not JSON: {error.msg} (character {error.colno})"
        except RecursionError:
            yield number, "this is nested too deeply to be read"
        except ValueError as error:
            yield number, str(error)
        else:
            wrong = f"expected an object in braces, got {shorten(line, SHOWN)}"
            yield number, found if isinstance(found, dict) else wrong


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(name for name in names if names.count(name) > 1)}" stands here twice')
    return found


def _table(text: str, delimiter: str) -> _Found:
    rows = _rows(text, delimiter)
    number, columns = next(rows, (1, []))
    if isinstance(columns, str):
        raise _HeadError(f"line {number}: {columns}")
    columns = [column.strip() for column in columns]
    for place, column in enumerate(columns):
        if column not in _KINDS:
            raise _HeadError(f"line {number} must name the columns: {_unknown(column)}")
        if column in columns[:place]:
            raise _HeadError(f'line {number} names the column "{column}" twice')
    for number, row in rows:
        if isinstance(row, str):
            yield number, row
        elif len(row) != len(columns):
            mark = "tab" if delimiter == "\t" else "comma"
            advice = f"a text that holds a {mark} belongs between quotation marks"
            yield number, f"{len(row)} columns, expected {len(columns)}; {advice}"
        else:
            yield number, {column: _number(column, cell.strip()) for column, cell in zip(columns, row, strict=True)}


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """The rows that are not blank, or what is wrong with them, and the numbers of their first lines."""
    lines = io.StringIO(text, newline="").readlines()
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
            start = number  # a mark that is never closed must not swallow the lines below


def _number(column: str, cell: str) -> Any:
    """A cell as the number that its column holds, where it is one, or else as it is; None for an empty one."""
    kind = _KINDS[column]
    try:
        return kind(cell) if kind in (int, float) and cell else cell or None
    except ValueError:
        return cell


def _line(number: int, found: Mapping[str, Any], folder: Path) -> JobRecord:
    """ValueError says what is wrong."""
    values: dict[str, Any] = {}
    for key, value in found.items():
        if key not in _KINDS:
            raise ValueError(_unknown(key))
        if (converted := _convert(key, value)) is not None:
            values[key] = folder / converted if key == "image" else converted
    return JobRecord(number=number, **values)


def _convert(key: str, value: Any) -> Any:
    """A value of JSON as what ``key`` holds; None for nothing and for blank text."""
    kind = _KINDS[key]
    if key == "id" and type(value) is int:
        value = str(value)
    if kind is float and type(value) is int:
        with suppress(OverflowError):
            value = float(value)
    if value is None or (type(value) is str and not value.strip()):
        return None
    if type(value) is not (str if kind is Path else kind):  # not isinstance: True is no number here
        raise ValueError(
            f"{key}: expected {_KIND_NAMES[kind]}, got {shorten(json.dumps(value, ensure_ascii=False), SHOWN)}"
        )
    if type(value) is str:
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{key}: holds a character that is none (0, or half of a surrogate pair)")
        return value.strip()
    return value


def _unknown(key: str) -> str:
    near = get_close_matches(key, _KINDS, n=1)
    return f'"{shorten(key, SHOWN)}" is unknown; ' + (
        f'did you mean "{near[0]}"?' if near else f"known: {', '.join(_KINDS)}"
    )


_FORMATS: dict[str, tuple[Callable[[str], _Found], str]] = {
    "": (_prompts, "a prompt per line"),
    ".txt": (_prompts, "a prompt per line"),
    ".csv": (lambda text: _table(text, ","), "a row of column names, and below it a row for each thing to make"),
    ".tsv": (lambda text: _table(text, "\t"), "a row of column names, and below it a row for each thing to make"),
    ".jsonl": (_objects, "a JSON object per line"),
}
