"""``cogview data``: build token stores from pictures with captions, and look into stores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.data_stores import export, inspect, merge, stats, validate
from cogview.cli.finite_range import FiniteRange
from cogview.cli.messages import print_note
from cogview.cli.options import (
    FILE,
    MODEL_HELP,
    Command,
    Decorator,
    Group,
    argument,
    device_option,
    max_batch_size_option,
    model_option,
    option_group,
    output_option,
)
from cogview.errors import ExitStatus, InputError
from cogview.formatting import plural

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    import torch

    from cogview.data.builders.pictures import BuildReport, PictureBuild, StorePaths
    from cogview.data.sources.tables import TableOptions
    from cogview.vqvae.model import VQVAE

MAX_WORKERS = 8  # by default
SOURCE_HELP = (
    "folder with NAME.txt beside NAME.jpg; a .csv, .tsv, .jsonl or .parquet table; captions of COCO as .json; "
    "or a .tar shard; several make one store, in this order"
)
COLUMN_OPTIONS = (
    click.option(
        "--image-column", metavar="NAME", show_default="guessed, printed", help="column of a table with the paths"
    ),
    click.option(
        "--caption-column",
        "caption_columns",
        multiple=True,
        metavar="NAME",
        show_default="guessed, printed",
        help="column of a table with captions; may be repeated",
    ),
)


@click.group(cls=Group, no_args_is_help=False)
def command() -> None:
    """Build token stores from pictures with captions, and look into stores."""


for _action in (inspect, stats, validate, merge, export):
    command.add_command(_action)


def table_options() -> Decorator:
    """Add ``--pictures`` and the columns of a table, passed as ``table: TableOptions``."""

    def build(**values: Any) -> TableOptions:
        from cogview.data.sources.tables import TableOptions

        return TableOptions(**values)

    return option_group(
        build,
        "table",
        ("folder", "image_column", "caption_columns", "source_column", "boxes_column"),
        click.option(
            "--pictures",
            "folder",
            type=FILE,
            metavar="FOLDER",
            show_default="that of the file",
            help="folder that paths in a table or a COCO file are relative to",
        ),
        *COLUMN_OPTIONS,
        click.option(
            "--source-column",
            metavar="NAME",
            show_default="none",
            help="column of a table with the pictures before an edit, for the task edit: captions are instructions",
        ),
        click.option(
            "--boxes-column",
            metavar="NAME",
            show_default="none",
            help="column of a table, or key of KEY.json in a shard, with boxes of objects that captions name: "
            '[{"text": "狐狸", "box": [x, y, width, height]}] in pixels of the upright picture',
        ),
    )


def picture_options() -> Decorator:
    """Add the options of ``PictureSettings``, passed as ``settings``: a mapping of its fields."""
    return option_group(
        dict,
        "settings",
        ("held_out", "fit", "simplified", "num_workers"),
        click.option(
            "--held-out",
            type=FiniteRange(min=0, max=1, max_open=True),
            default=0.05,
            metavar="SHARE",
            help="share of the pictures for the store STORE-held-out, chosen by a hash of their pixels",
        ),
        click.option(
            "--fit",
            type=click.Choice(["crop", "pad", "stretch"]),
            default="crop",
            help="how a picture becomes a square: crop its longer side, pad the shorter one with white, or stretch",
        ),
        click.option(
            "--traditional-to-simplified",
            "simplified",
            is_flag=True,
            help="convert traditional characters of captions to simplified ones (needs the package opencc)",
        ),
        click.option(
            "--workers",
            "num_workers",
            type=click.IntRange(min=0, max=1024),
            metavar="COUNT",
            show_default=f"one per core but one, up to {MAX_WORKERS}",
            help="number of processes that read pictures; 0 reads in the main process",
        ),
    )


@command.command(cls=Command)
@argument("sources", nargs=-1, required=True, type=FILE, metavar="SOURCE", help=SOURCE_HELP)
@output_option(required=True, metavar="STORE", help="folder of the store")
@model_option(required=True, help=f"model whose tokenizers encode: {MODEL_HELP}")
@picture_options()
@table_options()
@max_batch_size_option("pictures")
@device_option()
def build(
    sources: tuple[Path, ...],
    output: Path,
    model: str,
    settings: dict[str, Any],
    table: TableOptions,
    max_batch_size: int | None,
    device: str,
) -> int:
    """Build a token store from pictures with captions; an interrupted build is continued.

    Writes STORE and STORE-held-out, which cogview train reads, with a row for each caption. Captions are normalized
    (NFKC, single spaces). Files that are left out are listed with the reason in STORE-left-out.jsonl, with status 1.
    """
    from cogview.data.sources.open import open_source

    opened = {str(path): open_source(path, table, print_note) for path in sources}
    settings["named"] = table.boxes_column is not None
    settings["source"] = table.source_column is not None
    task = open_build(output, model, settings, max_batch_size, device)
    return report_build(task.with_sources(opened).run(), task.paths)


def open_build(
    output: Path, model: str, settings: dict[str, Any], max_batch_size: int | None, device: str
) -> PictureBuild:
    """Return a build without sources, with the tokenizers of a model.

    Raises:
        InputError: The model cannot be opened.
    """
    from cogview.checkpoints.checkpoint import read_config
    from cogview.checkpoints.image_tokenizer import load_image_tokenizer
    from cogview.checkpoints.registry import resolve_checkpoint
    from cogview.data.builders.pictures import PictureBuild, StorePaths
    from cogview.data.builders.prepare import PictureSettings
    from cogview.device import choose_placement
    from cogview.tokenizers.text import TextTokenizer

    folder = resolve_checkpoint(model)
    if not (folder / "config.json").exists() and any((folder / name).exists() for name in ("text.model", "image")):
        raise InputError(
            f"{folder} has tokenizers, but no model: `cogview encode RECIPE` builds stores with the tokenizers of a "
            "recipe"
        )
    config = read_config(folder)
    image_tokenizer = load_image_tokenizer(folder / "image").to(choose_placement(device).device)
    large = "upscale" in config.tasks
    workers = settings.pop("num_workers")
    return PictureBuild(
        paths=StorePaths(store=output),
        sources={},
        text_tokenizer=TextTokenizer.load(folder / "text.model"),
        image_tokenizer=image_tokenizer,
        settings=PictureSettings(
            text_width=config.max_text,
            large=large,
            small="low_level" in config.tasks,
            batch_size=planned_batch_size(image_tokenizer, config.grid * (1 + large), max_batch_size),
            num_workers=default_workers() if workers is None else workers,
            **settings,
        ),
        side=config.grid * image_tokenizer.downsampling,
    )


def planned_batch_size(image_tokenizer: VQVAE, side: int, max_batch_size: int | None, *, decoding: bool = False) -> int:
    """Return the number of pictures that are encoded together.

    Args:
        image_tokenizer: The image tokenizer, on its device.
        side: Codes on a side of the largest rendition.
        max_batch_size: None for as many as fit into memory.
        decoding: Whether they are decoded again.

    Raises:
        InputError: Not even one fits.
    """
    from cogview.planning.batches import BatchPlanner
    from cogview.planning.model_memory import image_bytes

    device: torch.device = image_tokenizer.codebook.device
    passes = (False, True) if decoding else (False,)
    bytes_each = sum(image_bytes(image_tokenizer.config, side, decoding=each) for each in passes)
    planner = BatchPlanner(device, max_batch_size)
    items = range(planner.max_batch_size)
    return planner.chunks(items, lambda batch: bytes_each * len(batch), "encoding images")[0]


def default_workers() -> int:
    """Return the number of processes that read pictures by default."""
    from cogview.device import usable_cpus

    return max(1, min(MAX_WORKERS, usable_cpus() - 1))


def report_build(report: BuildReport, paths: StorePaths) -> int:
    """Print the stores, and on stderr what to know about them; return the exit status."""
    for held_out in (False, True):
        if report.rows[held_out]:
            pictures = plural(report.pictures[held_out], "picture")
            print(f"{paths.of_split(held_out)}: {plural(report.rows[held_out], 'row')} of {pictures}")
    training, held_out_pictures = report.pictures[False], report.pictures[True]
    without = report.records - training - held_out_pictures
    print(
        f"{report.records} entries: {training} pictures to train on, {held_out_pictures} held out, {without} left out",
        file=sys.stderr,
    )
    for note, count in report.notes.most_common():
        print_note(f"{plural(count, 'picture')}: {note}")
    for note in report.warnings():
        print_note(note)
    if not report.left_out:
        return ExitStatus.DONE
    print(f"left out: {report.left_out}, listed in {paths.report}", file=sys.stderr)
    print(f"failed: {report.first_left_out}", file=sys.stderr)
    return ExitStatus.PARTLY_DONE
