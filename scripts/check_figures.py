"""Check numbers of pages against result files.

Run ``python scripts/check_figures.py``. A number is marked by a comment behind it, which names a result file of
``scripts/benchmarks/results`` and a value in it::

    28.6<!-- result: embedded-upscale#upscaled.psnr --> dB
    98.6% (97.1%–99.3%)<!-- result: embedded-captions#true_scenes.object value low high -->

The words behind the name, ``value`` by default, say what the numbers before the comment are: value, low, high or n. A
table is marked by a comment above it, with a pattern of names, its rows and its columns; a dash leaves one out. Cells
hold a value, or a value with its interval, or a dash where the result has no value::

    <!-- results: embedded-scenes {column}.{row} | colour object | generated - true_scenes -->

A number must be the value, rounded to the digits that it shows; "100%" must be all, and "0%" none. A result of an
embedded model must be of the weights that the package holds. ``--keep NAME FILE`` copies a result there, without its
items.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cogview.errors import InputError
from cogview.evaluation.manifest import Result, read_result, write_result
from cogview.evaluation.model_record import hash_weights

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("scripts/benchmarks/results")
MODELS = Path("cogview/models")
PAGES = ("README.md", "README.zh.md", "docs/*.md", "scripts/benchmarks/RESULTS.md", "cogview/models/*/README.md")
FIELDS = ("value", "low", "high", "n")

MARK = re.compile(r"<!-- result: ([\w.-]+)#([\w.-]+)((?: [a-z]+)*) -->")
TABLE = re.compile(r"<!-- results: ([\w.-]+) (\S+) \| ([^|>]+) \| ([^|>]+) -->")
NO_VALUE = "–"  # in a cell of a table
ANY_MARK = re.compile(r"<!-- results?:")
COMMENT = re.compile(r"<!--.*?-->")
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?%?")


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """A number of a page.

    Attributes:
        line: Number of its line, from 1.
        text: The number as it is written.
        file: Name of the result file, without its suffix.
        key: Name of the value.
        field: One of ``FIELDS``.
    """

    line: int
    text: str
    file: str
    key: str
    field: str


def page_figures(text: str) -> Iterator[PageFigure | str]:
    """Yield the marked numbers of a page, and a message for each mark that is wrong.

    Args:
        text: The page, Markdown.
    """
    lines = text.splitlines()
    in_code = False
    for index, line in enumerate(lines):
        in_code ^= line.startswith("```")
        if in_code:
            continue
        found = 0
        for mark in MARK.finditer(line):
            found += 1
            file, key, words = mark.groups()
            fields = words.split() or ["value"]
            numbers = NUMBER.findall(COMMENT.sub("", line[: mark.start()]))[-len(fields) :]
            if len(numbers) < len(fields) or not set(fields) <= set(FIELDS):
                yield f"line {index + 1}: expected {', '.join(fields)} as numbers before the mark of {key}"
                continue
            for number, field in zip(numbers, fields, strict=True):
                yield PageFigure(line=index + 1, text=number, file=file, key=key, field=field)
        for table in TABLE.finditer(line):
            found += 1
            yield from _table_figures(lines, index, table)
        if len(ANY_MARK.findall(line)) > found:
            yield f"line {index + 1}: a mark of a result cannot be read"


def _table_figures(lines: Sequence[str], index: int, mark: re.Match[str]) -> Iterator[PageFigure | str]:
    """Yield the numbers of the table after a mark.

    Args:
        lines: Lines of the page.
        index: Index of the line of the mark.
        mark: The mark.
    """
    file, pattern, rows, columns = mark[1], mark[2], mark[3].split(), mark[4].split()
    start = next((at for at in range(index + 1, len(lines)) if lines[at].strip()), len(lines))
    end = next((at for at in range(start, len(lines)) if not lines[at].startswith("|")), len(lines))
    if end - start - 2 != len(rows):
        yield f"line {index + 1}: the mark names {len(rows)} rows, its table has {max(0, end - start - 2)}"
        return
    for at, row in zip(range(start + 2, end), rows, strict=True):
        cells = re.split(r"(?<!\\)\|", COMMENT.sub("", lines[at]).strip().strip("|"))[1:]
        if len(cells) != len(columns):
            yield f"line {at + 1}: the mark names {len(columns)} columns, the row has {len(cells)}"
            continue
        for cell, column in zip(cells, columns, strict=True):
            if "-" in (row, column):
                continue
            numbers = [NO_VALUE] if cell.strip() == NO_VALUE else NUMBER.findall(cell)
            if len(numbers) not in (1, 3):
                yield f"line {at + 1}: expected a value, or a value with its interval, got {cell.strip()}"
                continue
            key = pattern.format(row=row, column=column)
            for number, field in zip(numbers, FIELDS, strict=False):
                yield PageFigure(line=at + 1, text=number, file=file, key=key, field=field)


def check_figure(figure: PageFigure, result: Result) -> str | None:
    """Return what is wrong with a number, in one line; None if it agrees with its result.

    Args:
        figure: The number.
        result: The result file that it names.
    """
    where = f"line {figure.line}: {figure.text}"
    value = result.results.get(figure.key)
    if figure.text == NO_VALUE:
        return None if value is None else f"{where}: {figure.key} of {figure.file} is {value.value:.4g}"
    if value is None:
        return f"{where}: {figure.file} has no value {figure.key}"
    actual = getattr(value, figure.field)
    if actual is None:
        return f"{where}: {figure.key} of {figure.file} has no {figure.field}"
    is_percent = figure.text.endswith("%")
    expected = 100 * actual if is_percent else actual
    plain = figure.text.rstrip("%").replace(",", "").replace("−", "-")
    digits = len(plain.partition(".")[2])
    written = float(plain)
    if is_percent and figure.field == "value" and written in (0, 100) and expected != written:
        return f"{where}: {figure.key} of {figure.file} is {expected:.4g}%, not all or none"
    if abs(written - expected) > 0.5 * 10.0**-digits + 1e-9:
        unit = "%" if is_percent else ""
        return f"{where}: {figure.field} of {figure.key} in {figure.file} is {expected:.{digits + 2}f}{unit}"
    return None


def check_weights(name: str, result: Result, root: Path) -> str | None:
    """Return a message if a result is of other weights than the embedded model of its name, None otherwise.

    Args:
        name: Name of the result file.
        result: The result.
        root: Root of the checkout.
    """
    model = result.manifest.model
    folder = None if model is None else root / MODELS / model.name
    if model is None or model.adapters or folder is None or not (folder / "config.json").is_file():
        return None
    if model.sha256 == _weights_of(folder):
        return None
    return f"{name} was measured on other weights of {model.name} than the package holds: measure again"


def check_pages(root: Path = ROOT) -> tuple[int, list[str]]:
    """Return how many numbers were checked, and what is wrong, a line each.

    Args:
        root: Root of the checkout.
    """
    problems: list[str] = []
    results: dict[str, Result | None] = {}
    count = 0
    for page in sorted(path for pattern in PAGES for path in root.glob(pattern)):
        for figure in page_figures(page.read_text(encoding="utf-8")):
            if isinstance(figure, str):
                problems.append(f"{page.relative_to(root)}, {figure}")
                continue
            if figure.file not in results:
                results[figure.file] = _open_result(figure.file, root, problems)
            result = results[figure.file]
            if result is None:
                continue
            count += 1
            if problem := check_figure(figure, result):
                problems.append(f"{page.relative_to(root)}, {problem}")
    unused = {path.stem for path in (root / RESULTS).glob("*.json")} - results.keys()
    return count, problems + [f"{RESULTS / name}.json: no page has a number of it" for name in sorted(unused)]


def keep_result(name: str, path: Path, root: Path = ROOT) -> Path:
    """Copy a result to the folder of results, without its items; return the path of the copy.

    Args:
        name: Name of the copy.
        path: The result file.
        root: Root of the checkout.
    """
    result = read_result(path)
    copy = root / RESULTS / f"{name}.json"
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_result(copy, result.manifest, result.results, curves=result.curves)
    return copy


@cache
def _weights_of(folder: Path) -> str:
    return hash_weights([folder])


def _open_result(name: str, root: Path, problems: list[str]) -> Result | None:
    """Return a result, or None after adding to ``problems`` why it cannot be used."""
    try:
        result = read_result(root / RESULTS / f"{name}.json")
    except InputError as error:
        problems.append(str(error))
        return None
    if problem := check_weights(name, result, root):
        problems.append(problem)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Check all pages; the status is 1 if a number disagrees."""
    parser = argparse.ArgumentParser(description="Check numbers of pages against result files.")
    parser.add_argument("--keep", nargs=2, metavar=("NAME", "FILE"), help="copy a result file, without its items")
    arguments = parser.parse_args(argv)
    if arguments.keep:
        name, file = arguments.keep
        try:
            print(keep_result(name, Path(file)))
        except InputError as error:
            print(f"check_figures.py: {error}", file=sys.stderr)
            return 2
        return 0
    count, problems = check_pages()
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{count} numbers checked, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
