"""``cogview runs``: list and compare training runs."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.options import FILE, Command, argument
from cogview.errors import InputError
from cogview.formatting import MAX_ENTRY, aligned_columns, format_list, shorten

if TYPE_CHECKING:
    from cogview.training.run_record import MetricSeries, RunRecord

FOLDER = "runs"  # in which recipes put their work
MAX_ROWS = 12  # steps at which losses are compared
RECENT = 10  # lines of metrics.jsonl whose median is the printed speed
PASSING = ("time", "command", "resumed_from", "recipe")  # keys that differ at every start of a run


@click.command(cls=Command)
@argument(
    "sources",
    nargs=-1,
    type=FILE,
    metavar="FOLDER",
    help=f"run folder, or folder with runs below it; by default {FOLDER}",
)
@click.option("--compare", is_flag=True, help="print the settings that differ between the runs, and their losses")
@click.option("--plot", type=FILE, metavar="FILE", help="plot the curves of all runs: .png, .pdf or .svg")
@click.option("--json", "as_json", is_flag=True, help="print a JSON document with every value")
def command(sources: tuple[Path, ...], compare: bool, plot: Path | None, as_json: bool) -> int:
    """List the training runs in folders and below them: steps, losses, speed, hours spent in steps, and state.

    Nothing is changed, and a run may continue meanwhile. Runs that cannot be read are listed at the end, with status 1.
    """
    from cogview.training.run_record import find_runs, read_run

    folders = list(sources) or [Path(FOLDER)]
    if not sources and not folders[0].is_dir():
        raise InputError(f"there is no folder {FOLDER} here: name the folders of runs, cogview runs FOLDER …")
    records, problems = [], []
    for folder in find_runs(folders):
        try:
            records.append(read_run(folder))
        except InputError as error:
            problems.append(str(error))
    if compare and len(records) < 2:
        found = "one was" if records else "none was"
        raise InputError(f"--compare needs two runs or more, {found} found in {_names(folders)}")
    if plot is not None:
        from cogview.training.plots import plot_runs

        plot_runs(records, plot)
    if as_json:
        document: Any = [describe_run(record) for record in records]
        if compare:
            document = {"runs": document, **compare_runs(records)}
        print(json.dumps(_finite(document), ensure_ascii=False, indent=2))
    elif records:
        print("\n".join(run_table(records)))
        if compare:
            print("\n" + "\n".join(comparison_lines(records)))
    if not records and not problems:
        print(f"no runs in {_names(folders)}", file=sys.stderr)
    if plot is not None:
        print(f"curves: {plot}", file=sys.stderr)
    for problem in problems:
        print(f"cogview runs: {' '.join(problem.split())}", file=sys.stderr)
    return 1 if problems else 0


def describe_run(record: RunRecord) -> dict[str, Any]:
    """Return a run as plain data, with the last value of each metric; metrics.jsonl has the others."""
    return {
        "name": record.name,
        "folder": str(record.folder),
        "state": record.state,
        "steps_done": record.done,
        "steps_planned": record.planned,
        "hours": None if record.seconds is None else record.seconds / 3600,
        "training": {name: series.last for name, series in record.training.items()},
        "validation": {name: series.last for name, series in record.validation.items()},
        "best": None
        if record.best is None
        else {"step": record.best.step, "validation_loss": record.best.validation_loss},
        "checkpoints": [str(path) for path in record.checkpoints],
        "starts": len(record.environments),
        "environment": record.environment,
        "settings": record.settings,
    }


def run_table(records: Sequence[RunRecord]) -> list[str]:
    """Return a header and a line for each run."""
    rows = [("run", "step", "loss", "validation (best at step)", "speed", "MFU", "hours", "state")]
    for record in records:
        loss, mfu = record.training.get("loss"), _recent(record.training.get("mfu"))
        rows.append(
            (
                str(record.folder),
                f"{record.done}/{'?' if record.planned is None else record.planned}",
                _loss(None if loss is None else loss.last),
                _validation(record),
                _speed(record),
                "-" if mfu is None else f"{mfu:.1%}",
                "-" if record.seconds is None else f"{record.seconds / 3600:.2f}",
                record.state,
            )
        )
    return aligned_columns(rows, left=(0, 7))


def compare_runs(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the differences between runs as plain data.

    ``settings`` and ``environment`` have the value of each run by key, "-" where a run lacks the key. ``loss`` and
    ``validation_loss`` have the value of each run by step, and ``last`` those of the last common step.
    """
    from cogview.training.run_record import differing, flat

    settings = [flat(record.settings) for record in records]
    starts = [
        {key: value for key, value in flat(record.environment or {}).items() if key not in PASSING}
        for record in records
    ]
    return {
        part: {key: [each.get(key, "-") for each in every] for key in differing(every)}
        for part, every in (("settings", settings), ("environment", starts))
    } | {
        "loss": _at_common_steps([record.training.get("loss") for record in records]),
        "validation_loss": _at_common_steps([record.validation.get("loss") for record in records]),
        "last": {
            "training": _last_in_common([record.training for record in records]),
            "validation": _last_in_common([record.validation for record in records]),
        },
    }


def comparison_lines(records: Sequence[RunRecord]) -> list[str]:
    """Return the differences between runs as tables with a column for each run."""
    from cogview.training.run_record import names_apart

    found, names = compare_runs(records), names_apart(records)
    lines: list[str] = []
    for part, title, none in (
        ("settings", "settings that differ", "their settings are equal"),
        ("environment", "environments that differ", ""),
    ):
        if found[part]:
            rows = [(title, *names), *((key, *map(_plain, values)) for key, values in found[part].items())]
            lines += [*aligned_columns(rows, left=range(len(names) + 1)), ""]
        elif none:
            lines += [none, ""]
    for part, title in (("loss", "loss at step"), ("validation_loss", "validation loss at step")):
        if found[part]:
            rows = [(title, *names), *((str(step), *map(_loss, values)) for step, values in found[part].items())]
            lines += [*aligned_columns(rows, left=()), ""]
    for part, title in (("training", "losses at the last common step"), ("validation", "on validation rows")):
        rows = [(f"{name} ({row['step']})", *map(_loss, row["values"])) for name, row in found["last"][part].items()]
        if rows:
            lines += [*aligned_columns([(title, *names), *rows], left=(0,)), ""]
    if not found["loss"]:
        lines += ["their losses have no step in common", ""]
    return lines[:-1]


def _at_common_steps(series: Sequence[MetricSeries | None]) -> dict[int, list[float | None]]:
    """Return the values of each run at steps that all runs have."""
    from cogview.training.run_record import common_steps

    return {
        step: [None if each is None else each.at(step) for each in series] for step in common_steps(series, MAX_ROWS)
    }


def _last_in_common(metrics: Sequence[Mapping[str, MetricSeries]]) -> dict[str, dict[str, Any]]:
    """Return the last common step of each loss that all runs have, and the values there."""
    from cogview.training.run_record import common_steps

    found = {}
    for name in metrics[0]:
        every = [each.get(name) for each in metrics]
        if name.endswith("_loss") and (steps := common_steps(every, 1)):
            values = [None if each is None else each.at(steps[0]) for each in every]
            found[name] = {"step": steps[0], "values": values}
    return found


def _validation(record: RunRecord) -> str:
    """Return the last validation loss and the best one."""
    series = record.validation.get("loss")
    if series is None:
        return "-"
    best = "" if record.best is None else f" ({_loss(record.best.validation_loss)} at {record.best.step})"
    return _loss(series.last) + best


def _speed(record: RunRecord) -> str:
    """Return the recent speed with its unit."""
    for name, unit in (("tokens_per_second", "tokens/s"), ("samples_per_second", "samples/s")):
        if (speed := _recent(record.training.get(name))) is not None:
            return f"{speed:,.0f} {unit}" if speed >= 100 else f"{speed:.3g} {unit}"
    return "-"


def _recent(series: MetricSeries | None) -> float | None:
    """Return the median of the last values."""
    return None if series is None else statistics.median(series.values[-RECENT:])


def _loss(value: float | None) -> str:
    """Return a loss with four digits; - for None."""
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def _plain(value: Any) -> str:
    """Return a setting as text; a long one, such as a list of words, is shortened."""
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), MAX_ENTRY)


def _finite(value: Any) -> Any:
    """Return ``value`` with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names(folders: Sequence[Path]) -> str:
    """Return the folders as a list in a message."""
    return format_list(folders)
