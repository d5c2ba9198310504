"""``cogview runs``: training runs in a table, how they differ, and their curves."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.errors import InputError
from cogview.formatting import aligned_columns

if TYPE_CHECKING:
    from cogview.training.run_record import MetricSeries, RunRecord

FOLDER = "runs"  # where recipes put their work
MOST_ROWS = 12  # of steps to compare at
RECENT = 10  # lines of metrics.jsonl that a speed is the median of
# What differs at every start of a run, and says nothing.
PASSING = ("time", "command", "resumed_from", "recipe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "List the training runs in folders and below them: steps, losses, speed, hours spent in steps, and whether a "
        "run is finished, running or stopped. Nothing is changed, and a run may go on meanwhile."
    )
    parser.add_argument(
        "sources", nargs="*", metavar="FOLDER", help=f"run folders, or folders with runs below them (default: {FOLDER})"
    )
    parser.add_argument(
        "--compare", action="store_true", help="what differs in the settings of the runs, and their losses"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of all of them: .png, .pdf or .svg")
    parser.add_argument("--json", action="store_true", help="one JSON document with all of it")


def run(args: argparse.Namespace) -> int:
    """Print; a run that cannot be read is named at the end."""
    from cogview.training.run_record import find_runs, read_run

    folders = [Path(name) for name in args.sources or [FOLDER]]
    if not args.sources and not folders[0].is_dir():
        raise InputError(f"there is no folder {FOLDER} here: name the folders of runs, cogview runs FOLDER …")
    records, problems = [], []
    for folder in find_runs(folders):
        try:
            records.append(read_run(folder))
        except InputError as error:
            problems.append(str(error))
    if args.compare and len(records) < 2:
        found = "one was" if records else "none was"
        raise InputError(f"--compare needs two runs or more, {found} found in {_all(folders)}")
    if args.plot is not None:
        from cogview.training.plots import plot_runs

        plot_runs(records, args.plot)
    if args.json:
        document: Any = [describe(record) for record in records]
        if args.compare:
            document = {"runs": document, **compare(records)}
        print(json.dumps(_finite(document), ensure_ascii=False, indent=2))
    elif records:
        print("\n".join(table_of(records)))
        if args.compare:
            print("\n" + "\n".join(comparison_lines(records)))
    if not records and not problems:
        print(f"no runs in {_all(folders)}", file=sys.stderr)
    if args.plot is not None:
        print(f"curves: {args.plot}", file=sys.stderr)
    for problem in problems:
        print(f"cogview runs: {' '.join(problem.split())}", file=sys.stderr)
    return 1 if problems else 0


def describe(record: RunRecord) -> dict[str, Any]:
    """A run as plain values; of its figures the last ones, the others are in its metrics.jsonl."""
    return {
        "name": record.name,
        "folder": str(record.folder),
        "state": record.state,
        "steps_done": record.done,
        "steps_planned": record.planned,
        "hours": None if record.seconds is None else record.seconds / 3600,
        "training": {name: series.last for name, series in record.training.items()},
        "held_out": {name: series.last for name, series in record.validation.items()},
        "best": None
        if record.best is None
        else {"step": record.best.step, "held_out_loss": record.best.validation_loss},
        "checkpoints": [str(path) for path in record.checkpoints],
        "starts": len(record.environments),
        "environment": record.environment,
        "settings": record.settings,
    }


def table_of(records: Sequence[RunRecord]) -> list[str]:
    """A line for each run below a line of headings."""
    rows = [("run", "step", "loss", "held out (best at step)", "speed", "MFU", "hours", "state")]
    for record in records:
        loss, mfu = record.training.get("loss"), _recent(record.training.get("mfu"))
        rows.append(
            (
                str(record.folder),
                f"{record.done}/{'?' if record.planned is None else record.planned}",
                _loss(None if loss is None else loss.last),
                _held_out(record),
                _speed(record),
                "-" if mfu is None else f"{mfu:.1%}",
                "-" if record.seconds is None else f"{record.seconds / 3600:.2f}",
                record.state,
            )
        )
    return aligned_columns(rows, left=(0, 7))


def compare(records: Sequence[RunRecord]) -> dict[str, Any]:
    """What differs: ``settings`` and ``environment`` by key, a list with the value of each run; and losses by step.

    A key that a run lacks is the word "-" there, as None is a value of settings.
    """
    from cogview.training.run_record import differing, flat

    settings = [flat(record.settings) for record in records]
    starts = [
        {key: value for key, value in flat(record.environment or {}).items() if key not in PASSING}
        for record in records
    ]
    return {
        part: {key: [own.get(key, "-") for own in every] for key in differing(every)}
        for part, every in (("settings", settings), ("environment", starts))
    } | {
        "loss": _at_common_steps([record.training.get("loss") for record in records]),
        "held_out_loss": _at_common_steps([record.validation.get("loss") for record in records]),
        "last": {
            "training": _last_in_common([record.training for record in records]),
            "held_out": _last_in_common([record.validation for record in records]),
        },
    }


def comparison_lines(records: Sequence[RunRecord]) -> list[str]:
    """``compare`` as tables, a column for each run."""
    from cogview.training.run_record import names_apart

    found, names = compare(records), names_apart(records)
    lines: list[str] = []
    for part, title, none in (
        ("settings", "settings that differ", "their settings are the same"),
        ("environment", "what they ran on, where it differs", ""),
    ):
        if found[part]:
            rows = [(title, *names), *((key, *map(_plain, values)) for key, values in found[part].items())]
            lines += [*aligned_columns(rows, left=range(len(names) + 1)), ""]
        elif none:
            lines += [none, ""]
    for part, title in (("loss", "loss at step"), ("held_out_loss", "held-out loss at step")):
        if found[part]:
            rows = [(title, *names), *((str(step), *map(_loss, values)) for step, values in found[part].items())]
            lines += [*aligned_columns(rows, left=()), ""]
    for part, title in (("training", "losses at their last common step"), ("held_out", "on held-out rows")):
        rows = [(f"{name} ({row['step']})", *map(_loss, row["values"])) for name, row in found["last"][part].items()]
        if rows:
            lines += [*aligned_columns([(title, *names), *rows], left=(0,)), ""]
    if not found["loss"]:
        lines += ["their losses have no step in common", ""]
    return lines[:-1]


def _at_common_steps(series: Sequence[MetricSeries | None]) -> dict[int, list[float | None]]:
    from cogview.training.run_record import common_steps

    return {step: [None if own is None else own.at(step) for own in series] for step in common_steps(series, MOST_ROWS)}


def _last_in_common(figures: Sequence[Mapping[str, MetricSeries]]) -> dict[str, dict[str, Any]]:
    """Of each loss that all have, the last step that they share and the values there."""
    from cogview.training.run_record import common_steps

    found = {}
    for name in figures[0]:
        every = [own.get(name) for own in figures]
        if name.endswith("_loss") and (steps := common_steps(every, 1)):
            values = [None if own is None else own.at(steps[0]) for own in every]
            found[name] = {"step": steps[0], "values": values}
    return found


def _held_out(record: RunRecord) -> str:
    series = record.validation.get("loss")
    if series is None:
        return "-"
    best = "" if record.best is None else f" ({_loss(record.best.validation_loss)} at {record.best.step})"
    return _loss(series.last) + best


def _speed(record: RunRecord) -> str:
    for name, unit in (("tokens_per_second", "tokens/s"), ("samples_per_second", "samples/s")):
        if (speed := _recent(record.training.get(name))) is not None:
            return f"{speed:,.0f} {unit}" if speed >= 100 else f"{speed:.3g} {unit}"
    return "-"


def _recent(series: MetricSeries | None) -> float | None:
    return None if series is None else statistics.median(series.values[-RECENT:])


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """``value`` without NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _all(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))
