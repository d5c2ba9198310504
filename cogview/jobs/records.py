"""Job files: one line for each result to generate, as plain text, CSV, TSV or JSON lines."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cogview.errors import InputError
from cogview.formatting import shorten
from cogview.image_io.masks import is_box
from cogview.limits import DEFAULT_KEEP, MAX_RESULTS
from cogview.tables import (
    SHOWN,
    HeaderError,
    TableLines,
    as_whole,
    line_problem,
    name_of,
    numbered_lines,
    parse_objects,
    parse_table,
    read_text,
)
from cogview.tokenizers.tasks import TASKS, Task, job_tasks


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One line of a job; None where the line sets nothing.

    Attributes:
        number: Number of its first line in the file, from 1.
        negative: Text that guidance leads away from.
        image: Path of the given image, relative to the current folder.
        images: Paths of the images to rank, likewise.
        mask: Part of the image that may change: the path of a mask, likewise, or a box ``x,y,w,h`` in pixels.
        strength: Share of the codes in the mask that may change.
        keep: Share of the codes that a variation keeps.
        sampling: Values of ``Sampling`` that the line sets, by name.

    Raises:
        ValueError: The values do not fit the task, or are out of range.
    """

    number: int
    id: str | None = None
    prompt: str | None = None
    negative: str | None = None
    task: str = "generate"
    image: Path | None = None
    images: tuple[Path, ...] | None = None
    rows: int | None = None
    mask: str | None = None
    strength: float | None = None
    keep: float | None = None
    n: int | None = None
    rank_by: str | None = None
    seed: int | None = None
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        tasks = job_tasks()
        if self.task not in tasks:
            raise ValueError(f'the task "{self.task}" is unknown; known: {", ".join(tasks)}')
        row = tasks[self.task]
        needed = row.inputs
        if missing := [key for key in needed if getattr(self, key) is None]:
            raise ValueError(f"the task {self.task} needs {' and '.join(missing)}")
        # Otherwise a line without its task would silently generate something else.
        for key in ("image", "images", "rows", "mask", "strength", "keep"):
            if getattr(self, key) is not None and key not in needed + row.options:
                users = ", ".join(name for name, task in tasks.items() if key in task.inputs + task.options)
                raise ValueError(f"{key} means nothing for the task {self.task}; it belongs to: {users}")
        if self.prompt is not None and row.output == "image" and "prompt" not in needed:
            raise ValueError(f"prompt means nothing for the task {self.task}, which has no text")
        if row.output == "ranking":
            given = [key for key in ("n", "seed") if getattr(self, key) is not None] + list(self.sampling)
            if given:
                raise ValueError(f"{' and '.join(given)} cannot be set for the task {self.task}, which samples nothing")
        if self.n is not None and not 1 <= self.n <= MAX_RESULTS:
            raise ValueError(f"n must be from 1 to {MAX_RESULTS}, got {self.n}")
        if self.rows is not None and self.rows < 0:
            raise ValueError(f"rows must be at least 0, got {self.rows}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {self.strength:g}")
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise ValueError(f"keep must be in [0, 1], got {self.keep:g}")
        if self.sampling or self.seed is not None:
            from cogview.generation.sampling import MAX_SEED
            from cogview.modeling.config import Sampling

            Sampling(**self.sampling)  # type: ignore[arg-type]  # top_k is an int
            if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
                raise ValueError(f"the seed must be from 0 to {MAX_SEED}, got {self.seed}")
        if self.negative is not None and self.row.weights != "generate":
            users = ", ".join(name for name, task in tasks.items() if task.weights == "generate")
            raise ValueError(f"negative means nothing for the task {self.task}; it belongs to: {users}")

    @property
    def key(self) -> str:
        """The id, or else ``line NUMBER``; unique among the records of ``read_job``."""
        return self.id or f"line {self.number}"

    @property
    def share(self) -> float:
        """Share of the codes that change, of those that may: ``strength`` of a request."""
        if self.task == "vary":
            return 1 - (DEFAULT_KEEP if self.keep is None else self.keep)
        return 1.0 if self.strength is None else self.strength

    @property
    def row(self) -> Task:
        """The row of its task in the table of tasks."""
        return TASKS[self.task]


class JobProblem(str):
    """The reason why a line cannot be used; it starts with ``line NUMBER:``.

    Attributes:
        id: The id that the line sets, or else ``line NUMBER``.
        number: Number of the line, from 1.
        reason: The reason alone.
    """

    __slots__ = ("id", "number", "reason")
    id: str
    number: int
    reason: str

    @classmethod
    def of(cls, number: int, reason: str, name: str | None = None) -> JobProblem:
        """Return the problem of a line.

        Args:
            number: Number of the line.
            reason: The reason.
            name: The id of its record.
        """
        line, reason = f"line {number}", str(InputError(" ".join(reason.split())))
        problem = cls(f"{line}: {reason}")
        problem.id, problem.number, problem.reason = name or line, number, reason
        return problem


LIST_MARK = "|"  # between the images of a table's cell
_TYPE_NAMES = {str: "text", Path: "text", int: "a whole number", float: "a number", tuple: "a list of texts"}


@functools.cache
def _column_types() -> dict[str, type]:
    """Return the type of each column: the fields of a record, then those of ``Sampling``."""
    from cogview.modeling.config import Sampling

    hints = get_type_hints(JobRecord)
    given = {name: (get_args(hint) or (hint,))[0] for name, hint in hints.items() if name not in ("number", "sampling")}
    return {name: get_origin(kind) or kind for name, kind in given.items()} | get_type_hints(Sampling)


def read_job(source: str) -> tuple[list[JobRecord], list[JobProblem]]:
    """Read a job file.

    The suffix selects the format: .txt, none, or ``-`` (standard input) a prompt per line; .csv and .tsv a header and a
    row per line; .jsonl an object per line. The encoding is UTF-8, or GB18030 where the text is plainly in that.

    Args:
        source: The file, or ``-`` for standard input.

    Returns:
        The valid records, and a problem that starts with ``line NUMBER:`` for each other line.

    Raises:
        InputError: The file cannot be read, names an unknown column, or has no valid line.
    """
    suffix = "" if source == "-" else Path(source).suffix.lower()
    if suffix not in _FORMATS:
        known = ".txt (a prompt per line), .csv, .tsv, .jsonl"
        raise InputError(f'{source}: the suffix "{suffix}" is unknown; known: {known}')
    find, expected = _FORMATS[suffix]
    where = name_of(source)
    records: dict[str, JobRecord] = {}
    problems: list[JobProblem] = []
    problem_ids: set[str] = set()
    try:
        for number, found in find(read_text(source)):
            try:
                if isinstance(found, str):
                    raise ValueError(found)
                record = _build_record(number, found, _folder(source))
                if record.key in records:
                    raise ValueError(f'the id "{record.key}" is that of line {records[record.key].number} as well')
            except ValueError as error:
                name = found.get("id") if isinstance(found, Mapping) else None
                is_unique = isinstance(name, str) and name not in records and name not in problem_ids
                problems.append(JobProblem.of(number, str(error), name if is_unique else None))
                problem_ids.add(problems[-1].id)
            else:
                records[record.key] = record
    except HeaderError as error:
        raise InputError(f"{where}: {error}") from None
    if not records and problems:
        raise InputError(f"{where} has no line that can be used; the first problem is in {problems[0]}")
    if not records:
        raise InputError(f"{where} is empty: expected {expected}")
    return list(records.values()), problems


def digest(records: Sequence[JobRecord], source: str) -> str:
    """Return the SHA-256 of the content of a job; it does not depend on the format and the folder of ``source``.

    Args:
        records: The records of the job.
        source: Path of the job file.
    """
    plain = []
    for record in records:
        values = {each.name: getattr(record, each.name) for each in fields(record) if each.name != "sampling"}
        values = {key: value for key, value in (values | dict(record.sampling)).items() if value is not None}
        if record.image is not None:
            values["image"] = os.path.relpath(record.image, _folder(source))
        if record.mask is not None and not is_box(record.mask):
            values["mask"] = os.path.relpath(record.mask, _folder(source))
        if record.images is not None:
            values["images"] = [os.path.relpath(image, _folder(source)) for image in record.images]
        plain.append(values)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _folder(source: str) -> Path:
    """Return the folder that paths in ``source`` are relative to."""
    return Path() if source == "-" else Path(source).parent


def _prompts(text: str) -> TableLines:
    """Parse a prompt per line."""
    for number, line in numbered_lines(text):
        yield number, line_problem(line) or {"prompt": line}


def _rows_of(text: str, delimiter: str) -> TableLines:
    """Parse a header and a row per line."""
    return parse_table(
        text,
        delimiter,
        column_problem=lambda column: None if column in _column_types() else _unknown(column),
        parse_cell=_parse_cell,
    )


def _parse_cell(column: str, cell: str) -> Any:
    """Return a cell as a number or a list, if its column holds those and it is one; else the cell."""
    kind = _column_types()[column]
    if not cell:
        return cell
    if kind is tuple:
        return cell.split(LIST_MARK)
    for number in (int, float) if kind is int else (float,) if kind is float else ():
        with suppress(ValueError):
            return number(cell)
    return cell


def _build_record(number: int, found: Mapping[str, Any], folder: Path) -> JobRecord:
    """Return the record of a line; raise ValueError with the reason if it is not valid."""
    values: dict[str, Any] = {}
    sampling: dict[str, float] = {}
    own = {each.name for each in fields(JobRecord)}
    for key, value in found.items():
        if key not in _column_types():
            raise ValueError(_unknown(key))
        if (converted := _convert(key, value)) is not None:
            target = values if key in own else sampling
            if key == "images":
                converted = tuple(folder / image for image in converted)
            if key == "mask" and not is_box(converted):
                converted = str(folder / converted)
            target[key] = folder / converted if key == "image" else converted
    task = job_tasks().get(values.get("task", JobRecord.task))
    if isinstance(found.get("prompt"), str) and "prompt" not in values and task is not None and "prompt" in task.inputs:
        from cogview.pipeline.requests import EMPTY_PROMPT

        raise ValueError(EMPTY_PROMPT)
    return JobRecord(number=number, sampling=sampling, **values)


def _convert(key: str, value: Any) -> Any:
    """Return a JSON value as the type of the column ``key``; None for null and for blank text."""
    kind = _column_types()[key]
    if kind is int or key == "id":
        value = as_whole(value)
    if key == "id" and type(value) is int:
        value = str(value)
    if kind is float and type(value) is int:
        with suppress(OverflowError):
            value = float(value)
    if value is None or (type(value) is str and not value.strip()):
        return None
    if kind is tuple and type(value) is list and value:
        texts = [_convert("image", text) for text in value]
        if None in texts:
            raise ValueError(f"{key}: expected the name of an image, got an empty text")
        return tuple(texts)
    if type(value) is not (str if kind is Path else kind):  # not isinstance: True is not a number here
        raise ValueError(
            f"{key}: expected {_TYPE_NAMES[kind]}, got {shorten(json.dumps(value, ensure_ascii=False), SHOWN)}"
        )
    if type(value) is str:
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{key}: holds an invalid character (0, or half of a surrogate pair)")
        return value.strip()
    return value


def _unknown(key: str) -> str:
    """Return the message of an unknown column or key."""
    near = get_close_matches(key, _column_types(), n=1)
    return f'"{shorten(key, SHOWN)}" is unknown; ' + (
        f'did you mean "{near[0]}"?' if near else f"known: {', '.join(_column_types())}"
    )


_FORMATS: dict[str, tuple[Callable[[str], TableLines], str]] = {
    "": (_prompts, "a prompt per line"),
    ".txt": (_prompts, "a prompt per line"),
    ".csv": (functools.partial(_rows_of, delimiter=","), "a header and a row for each result"),
    ".tsv": (functools.partial(_rows_of, delimiter="\t"), "a header and a row for each result"),
    ".jsonl": (parse_objects, "a JSON object per line"),
}
