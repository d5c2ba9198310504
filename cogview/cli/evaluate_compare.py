"""``cogview eval compare``: compare two results that were measured alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.messages import print_note
from cogview.cli.options import FILE, Command, argument, output_option
from cogview.errors import InputError
from cogview.formatting import aligned_columns

if TYPE_CHECKING:
    from cogview.evaluation.comparison import Comparison, Difference


@click.command(name="compare", cls=Command, keeps_results=False)
@argument("first", type=FILE, metavar="A", help="result file that another cogview eval has written")
@argument("second", type=FILE, metavar="B", help="result file of the same measure")
@click.option(
    "--allow",
    multiple=True,
    metavar="FIELD",
    help="field of the manifest that may differ, such as sampling or blur.sigma; repeat it for several",
)
@output_option(default=None, metavar="PAGE.html", help="HTML file to write: tables, curves and pictures")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def compare(first: Path, second: Path, allow: tuple[str, ...], output: Path | None, as_json: bool) -> int:
    """Compare two results.

    Prints the difference of each value with its 95% interval: paired where both results have the same items. An
    asterisk marks an interval that excludes 0. Results that were not measured alike are refused, and the fields are
    named.
    """
    from cogview.evaluation.comparison import compare_results
    from cogview.evaluation.manifest import read_result

    names = str(first), str(second)
    if output is not None:
        _check_page(output)
    comparison = compare_results(read_result(first), read_result(second), names, allow)
    if output is not None:
        write_page(comparison, first, second, output)
    if as_json:
        print(json.dumps(_as_plain(comparison), ensure_ascii=False))
    else:
        print("\n".join(_table(comparison)))
    for name in comparison.allowed:
        print_note(f"not measured alike, as allowed: {name}")
    if comparison.missing:
        print_note(f"in one result alone: {', '.join(comparison.missing)}")
    if output is not None:
        print(f"written to {output}", file=sys.stderr)
    return 0


def write_page(comparison: Comparison, first: Path, second: Path, output: Path) -> None:
    """Write the page of a comparison.

    Args:
        comparison: The comparison.
        first: File of its first result.
        second: File of its second result.
        output: HTML file to write or replace; its folder is made as needed.

    Raises:
        InputError: ``output`` is no HTML file, or its folder cannot be written.
    """
    from cogview.evaluation.page import ComparedFiles, comparison_page
    from cogview.files import atomic_write
    from cogview.image_io.png import prepared_folder

    _check_page(output)
    names = (first.name, second.name) if first.name != second.name else (_short(first), _short(second))
    page = comparison_page(comparison, ComparedFiles(names=names, folders=(first.parent, second.parent)))
    with prepared_folder(output.parent), atomic_write(output) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _check_page(output: Path) -> None:
    """Raise InputError for a name that is not that of an HTML file."""
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise InputError(f"-o must name an HTML file, such as page.html, got {output}")


def _short(path: Path) -> str:
    """Return the name of a file with that of its folder."""
    return "/".join(path.resolve().parts[-2:])


def _table(comparison: Comparison) -> list[str]:
    """Return lines of a table, and a legend."""
    rows = [["", "A", "B", "B - A", "", "95% interval", ""]]
    rows += [_row(each) for each in comparison.differences]
    lines = aligned_columns(rows, left={0, 4, 5, 6})
    tested = [each for each in comparison.differences if each.method]
    if tested:
        marked = sum(each.is_significant for each in tested)
        lines.append(f"* the interval excludes 0: {marked} of {len(tested)}")
    return lines


def _row(difference: Difference) -> list[str]:
    from cogview.evaluation.comparison import format_difference, format_interval, format_value

    unit = difference.a.unit
    cells = [format_value(each.value, unit) for each in (difference.a, difference.b)]
    interval = "no interval"
    if difference.low is not None and difference.high is not None:
        interval = f"{format_interval(difference.low, difference.high, unit, signed=True)}, {difference.method}"
    mark = "*" if difference.is_significant else ""
    change = format_difference(difference.value, unit)
    return [difference.name, *cells, change, mark, interval, difference.verdict]


def _as_plain(comparison: Comparison) -> dict[str, object]:
    """Return a comparison for ``--json``."""
    return {
        "measure": comparison.a.manifest.measure,
        "allowed": comparison.allowed,
        "missing": comparison.missing,
        "differences": {
            each.name: {
                "a": each.a.value,
                "b": each.b.value,
                "difference": each.value,
                "low": each.low,
                "high": each.high,
                "interval": each.method or None,
                "excludes_0": each.is_significant,
                "verdict": each.verdict or None,
            }
            for each in comparison.differences
        },
    }
