"""``cogview eval model``: measure any model on a token store, or on images of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.evaluate_images import NETWORK, NETWORK_OPTIONS
from cogview.cli.messages import print_note
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
    sampling_options,
    speculative_option,
)
from cogview.cli.ranking_options import rank_by_option
from cogview.cli.result_file import check_result_path, save_result
from cogview.errors import ExitStatus, InputError
from cogview.formatting import aligned_columns

if TYPE_CHECKING:
    from cogview.evaluation.manifest import Manifest, ResultValue
    from cogview.evaluation.model_report import ResultTable
    from cogview.pipeline.cogview import CogView

ROWS = 500
PAIRS = 100
IMAGES = 8
IMAGES_MAXIMUM = 1000
# What a model is measured on, and the options of that measure alone; sampling settings are of prompts as well.
OPTIONS_OF = {
    "store": ("rows", "pairs"),
    "prompts": ("images", "seed", "rank_by", "judge", "speculative"),
    "pictures": ("network", "weights"),
}


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What a model is measured on; None for what is not given."""

    store: Path | None
    rows: int | None
    pairs: int | None
    prompts: Path | None
    images: int | None
    seed: int | None
    rank_by: str | None
    judge: Path | None
    speculative: int | None
    settings: Mapping[str, Any]
    pictures: Path | None
    network: str | None
    weights: Path | None

    def check(self) -> None:
        """Raise InputError unless there is one thing to measure on, with options of that measure alone."""
        given = [f"--{name}" for name in OPTIONS_OF if getattr(self, name) is not None]
        if not given:
            raise InputError(
                "there is nothing to measure the model on: give --store FOLDER, --prompts FILE or --pictures FOLDER"
            )
        if len(given) > 1:
            raise InputError(f"{given[0]} and {given[1]} are two measures: give one of them")
        for measure, names in OPTIONS_OF.items():
            used = [name for name in names if getattr(self, name) is not None]
            used += self.settings if measure == "prompts" else []
            if used and getattr(self, measure) is None:
                raise InputError(f"--{used[0].replace('_', '-')} applies to --{measure} only; leave it out")
        if self.judge is not None and self.rank_by is None:
            raise InputError("--judge judges the choice by a score: add --rank-by SCORE")
        if self.pairs == 1:
            raise InputError("--pairs must be 0 or at least 2, got 1: a single pair always matches")


@click.command(name="model", cls=Command, keeps_results=False)
@option_group(
    ModelOptions,
    "model",
    ("model", "revision", "adapter", "max_batch_size", "device", "dtype", "kv_dtype"),
    argument("model", metavar="MODEL", help=MODEL_HELP),
    revision_option(),
    adapter_option(),
    max_batch_size_option("rows or images"),
    device_option(),
    *precision_options(),
)
@option_group(
    MeasureOptions,
    "options",
    tuple(MeasureOptions.__annotations__),
    click.option("--store", type=FILE, metavar="FOLDER", help="token store of rows that the model was not trained on"),
    click.option(
        "--rows",
        type=click.IntRange(min=2),
        metavar="COUNT",
        show_default=str(ROWS),
        help="maximum number of rows, at equal distances",
    ),
    click.option(
        "--pairs",
        type=click.IntRange(min=0),
        metavar="COUNT",
        show_default=str(PAIRS),
        help="pairs of retrieval, all of which are scored with each other; 0 leaves retrieval out",
    ),
    click.option("--prompts", type=FILE, metavar="FILE", help="prompts to generate images of, one per line"),
    click.option(
        "--images",
        type=click.IntRange(min=2, max=IMAGES_MAXIMUM),
        metavar="COUNT",
        show_default=str(IMAGES),
        help="number of images per prompt",
    ),
    click.option(
        "--seed", type=click.IntRange(min=0), metavar="NUMBER", show_default="0", help="random seed of the images"
    ),
    rank_by_option(default=None, show_default="no choice is measured"),
    click.option(
        "--judge",
        type=FILE,
        metavar="RECIPE",
        show_default="another score of the model",
        help="recipe of an emoji world, such as emoji-cpu, whose grader judges the images that --rank-by chooses",
    ),
    speculative_option(),
    sampling_options("codes", image_options=True),
    click.option(
        "--pictures",
        type=FILE,
        metavar="FOLDER",
        help="pictures to reconstruct, which the image tokenizer was not trained on: a folder, or .tar shards",
    ),
    *NETWORK_OPTIONS,
)
@output_option(default=None, metavar="FILE", help="also write a result file with a manifest")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def model(model: ModelOptions, options: MeasureOptions, output: Path | None, as_json: bool) -> int:
    """Measure a model on rows of a token store, on images that it generates of prompts, or on pictures.

    With --store: the loss of each task by part and by position, the caption score, codes in use, and how often a text
    finds its picture and a picture its text by the scores of the model.

    With --prompts: how much the images of a prompt differ; with --rank-by, how good the best image of 1, 2, 4, … by
    that score is by an independent one.

    With --pictures: how far reconstructions by the image tokenizer are from held-out pictures (rFID, PSNR, SSIM), and
    the codes in use.
    """
    from cogview.cli.session import open_model
    from cogview.config_io import to_mapping
    from cogview.evaluation.model_report import ResultTable
    from cogview.evaluation.text_files import read_prompts

    options.check()
    prompts = {} if options.prompts is None else read_prompts(options.prompts)
    if output is not None:
        check_result_path(output)
    opened = open_model(model, [] if options.prompts is None else ["generate"])
    print(f"model {opened.label} on {opened.placement}", file=sys.stderr)
    table = ResultTable()
    left_out: tuple[str, ...] = ()
    if options.store is not None:
        pairs = PAIRS if options.pairs is None else options.pairs
        manifest = measure_store(table, opened, options.store, (options.rows or ROWS, pairs), model.max_batch_size)
    elif options.pictures is not None:
        manifest, left_out = measure_pictures(table, opened, options, model.max_batch_size)
    else:
        manifest = measure_prompt_lines(table, opened, prompts, options, model.max_batch_size)
    if output is not None:
        save_result(output, manifest, table.values, table.result_items(), table.curves)
    if as_json:
        print(json.dumps({"model": opened.label, "results": to_mapping(table.values)}, ensure_ascii=False))
    else:
        print("\n".join(format_values(table.values)))
    for problem in left_out:
        print(f"failed: {problem}", file=sys.stderr)
    return ExitStatus.of(1, len(left_out))


def measure_prompt_lines(
    table: ResultTable, model: CogView, lines: Mapping[int, str], options: MeasureOptions, batch_size: int | None
) -> Manifest:
    """Measure a model on images of prompts.

    Args:
        table: Receives the results.
        model: The model.
        lines: The prompts by the numbers of their lines.
        options: Their file, and how the images are generated.
        batch_size: Maximum number of images in a batch; None: as many as memory holds and pay.

    Returns:
        How the results were measured.

    Raises:
        InputError: A prompt is too long, or a setting cannot be used.
    """
    from cogview.cli.session import note_unknown_words
    from cogview.evaluation.prompt_report import PromptSettings, measure_prompts, require_usable
    from cogview.pipeline.inputs import resolve_seed

    assert options.prompts is not None
    judge = None
    if options.judge is not None:
        from cogview.cli.evaluate_gate import open_world
        from cogview.emoji.evaluation.judge import grader_judge

        judge = grader_judge(open_world(options.judge), lines, options.prompts)
    model.speculative = options.speculative
    settings = PromptSettings(
        images=options.images or IMAGES,
        seed=resolve_seed(options.seed or 0),
        sampling=model.sampling(**options.settings),
        rank_by=options.rank_by,
        judge=judge,
        batch_size=batch_size,
    )
    prompts = require_usable(model, lines, options.prompts)
    note_unknown_words(model, prompts)
    return measure_prompts(table, model, prompts, settings)


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


def measure_pictures(
    table: ResultTable, model: CogView, options: MeasureOptions, batch_size: int | None
) -> tuple[Manifest, tuple[str, ...]]:
    """Measure the image tokenizer of a model on pictures.

    Args:
        table: Receives the results.
        model: The model.
        options: The pictures and the feature network.
        batch_size: Maximum number of pictures in a batch; None: as many as memory holds and pay.

    Returns:
        How the results were measured, and why pictures were left out.

    Raises:
        InputError: The network is unknown, or fewer than two pictures can be read.
    """
    from cogview.cli.data import planned_batch_size
    from cogview.evaluation.features import open_network
    from cogview.evaluation.image_sets import BATCH, open_image_set
    from cogview.evaluation.tokenizer_report import measure_reconstructions

    assert options.pictures is not None
    images = open_image_set(options.pictures, _no_store)
    network = open_network(options.network or NETWORK, options.weights, model.placement.device)
    size = min(BATCH, planned_batch_size(model.image_tokenizer, model.config.grid, batch_size, decoding=True))
    manifest, problems = measure_reconstructions(table, model, images, network, size)
    for note in problems.notes:
        print_note(note)
    return manifest, problems.left_out


def _no_store() -> Any:
    raise InputError("--pictures reconstructs pictures, and a token store has codes alone: give --store instead")


def format_values(values: Mapping[str, ResultValue]) -> list[str]:
    """Return a line for each result: its name, value, interval, unit and number of items."""
    lines = []
    for name, row in values.items():
        interval = "" if row.low is None else f"{row.low:.4g} – {row.high:.4g}"
        lines.append([name, f"{row.value:.4g}", interval, row.unit, f"n = {row.n}"])
    return aligned_columns(lines, left=(0, 3))
