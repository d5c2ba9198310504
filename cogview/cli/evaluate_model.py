"""``cogview eval model``: measure any model on a token store."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.options import (
    FILE,
    MODEL_HELP,
    Command,
    ModelOptions,
    adapter_option,
    argument,
    device_option,
    max_batch_size_option,
    option_group,
    output_option,
    precision_options,
    revision_option,
)
from cogview.errors import InputError
from cogview.formatting import aligned_columns

if TYPE_CHECKING:
    from cogview.evaluation.manifest import Manifest, ResultValue
    from cogview.evaluation.model_report import ResultTable
    from cogview.pipeline.cogview import CogView

ROWS = 500
PAIRS = 100


@click.command(name="model", cls=Command)
@option_group(
    ModelOptions,
    "model",
    ("model", "revision", "adapter", "max_batch_size", "device", "dtype", "kv_dtype"),
    argument("model", metavar="MODEL", help=MODEL_HELP),
    revision_option(),
    adapter_option(),
    max_batch_size_option("rows"),
    device_option(),
    *precision_options(),
)
@click.option(
    "--store", type=FILE, metavar="FOLDER", required=True, help="token store of rows that the model was not trained on"
)
@click.option(
    "--rows",
    type=click.IntRange(min=2),
    default=ROWS,
    metavar="COUNT",
    help="maximum number of rows, at equal distances",
)
@click.option(
    "--pairs",
    type=click.IntRange(min=0),
    default=PAIRS,
    metavar="COUNT",
    help="pairs of retrieval, all of which are scored with each other; 0 leaves retrieval out",
)
@output_option(default=None, metavar="FILE", help="also write a result file with a manifest")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def model(model: ModelOptions, store: Path, rows: int, pairs: int, output: Path | None, as_json: bool) -> int:
    """Measure a model on held-out rows of a token store.

    Prints the loss of each task by part and by position, the caption score, codes in use, and how often a text finds
    its picture and a picture its text by the scores of the model.
    """
    from cogview.cli.session import open_model
    from cogview.config_io import to_mapping
    from cogview.evaluation.manifest import write_result
    from cogview.evaluation.model_report import ResultTable
    from cogview.image_io.png import prepare_folder

    if pairs == 1:
        raise InputError("--pairs must be 0 or at least 2, got 1: a single pair always matches")
    if output is not None:
        prepare_folder(output.parent)
    opened = open_model(model, [])
    print(f"model {opened.label} on {opened.placement}", file=sys.stderr)
    table = ResultTable()
    manifest = measure_store(table, opened, store, (rows, pairs), model.max_batch_size)
    if output is not None:
        write_result(output, manifest, table.values, table.result_items(), table.curves)
    if as_json:
        print(json.dumps({"model": opened.label, "results": to_mapping(table.values)}, ensure_ascii=False))
    else:
        print("\n".join(format_values(table.values)))
    return 0


def measure_store(
    table: ResultTable, model: CogView, path: Path, counts: tuple[int, int], batch_size: int | None
) -> Manifest:
    """Measure a model on a token store.

    Args:
        table: Receives the results.
        model: The model.
        path: The store.
        counts: Maximum numbers of rows, and of pairs for retrieval; no pairs leave it out.
        batch_size: Maximum number of rows in a batch; None: as many as memory holds and pay.

    Returns:
        How the results were measured.

    Raises:
        InputError: The store is empty, feeds no task of the model, or is of other tokenizers.
    """
    from cogview.evaluation.manifest import Manifest
    from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions
    from cogview.evaluation.model_report import (
        add_code_usage,
        add_likelihood,
        add_retrieval,
        describe_rows,
        open_matching_store,
        spread_rows,
    )

    rows, pairs = counts
    with open_matching_store(model, path) as store:
        chosen = spread_rows(store, rows)
        add_likelihood(table, model, store, chosen, batch_size)
        add_code_usage(table, store, chosen, model.vocabulary.num_image_codes)
        if pairs:
            add_retrieval(table, model, store, pairs, batch_size)
        return Manifest(
            measure="model",
            reference=describe_rows(store, chosen),
            model=describe_model(model),
            settings=table.settings,
            versions=describe_versions(),
            hardware=describe_hardware(model.placement.device),
        )


def format_values(values: Mapping[str, ResultValue]) -> list[str]:
    """Return a line for each result: its name, value, interval, unit and number of items."""
    lines = []
    for name, row in values.items():
        interval = "" if row.low is None else f"{row.low:.4g} – {row.high:.4g}"
        lines.append([name, f"{row.value:.4g}", interval, row.unit, f"n = {row.n}"])
    return aligned_columns(lines, left=(0, 3))
