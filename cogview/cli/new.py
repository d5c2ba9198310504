"""``cogview new``: write a recipe for one's own pictures, with the reason for each setting."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cogview.cli.messages import print_note
from cogview.cli.options import FILE, Command, argument, device_option
from cogview.cli.translation import translate
from cogview.errors import InputError
from cogview.formatting import plural

SIZE_NAMES = ("tiny", "small", "base", "4b")
RECIPE_FILE = "recipe.yaml"


@click.command(cls=Command)
@argument("folder", type=FILE, metavar="FOLDER", help="folder for the recipe and all results")
@click.option(
    "--pictures",
    "sources",
    type=FILE,
    multiple=True,
    required=True,
    metavar="DIR",
    help="folder with NAME.txt beside NAME.jpg; a .csv, .tsv, .jsonl or .parquet table, COCO captions as .json, or a "
    ".tar shard will do; may be repeated",
)
@click.option(
    "--size",
    type=click.Choice(SIZE_NAMES),
    show_default="by the number of pictures and the machine",
    help="size of the model: tiny and small for CPUs, base for a GPU, 4b for a cluster",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**31 - 1),
    default=0,
    metavar="NUMBER",
    help="random seed of the trainings",
)
@click.option("--overwrite", is_flag=True, help="replace the recipe that FOLDER has")
@device_option()
def command(folder: Path, sources: tuple[Path, ...], size: str | None, seed: int, overwrite: bool, device: str) -> int:
    """Write a recipe for a model of your own pictures, which `cogview run` turns into the model.

    Looks at all captions, at a sample of the pictures and at the machine, and times some steps of both trainings. The
    recipe has the reason for each choice as a comment; the time is an estimate.
    """
    from cogview.device import choose_placement, flush_denormals
    from cogview.files import atomic_write
    from cogview.training.new_model import choose_size, new_model_recipe
    from cogview.training.new_recipe import SIZES, recipe_header, render_lines, survey_lines
    from cogview.training.survey import survey_pictures

    target = folder / RECIPE_FILE
    if target.exists() and not overwrite:
        raise InputError(f"{target} is there already: go on with cogview run {target}, or replace it with --overwrite")
    flush_denormals()
    placement = choose_placement(device).device
    survey = survey_pictures(sources, print_note)
    survey.check(sources)
    name, reason = (size, "as asked for") if size else choose_size(survey, placement)
    print(
        f"{plural(survey.pictures, 'picture')} with {plural(survey.rows, 'caption')}; size {name}: {reason}",
        file=sys.stderr,
    )
    print("timing some steps of both trainings", file=sys.stderr)
    found = new_model_recipe(survey, sources, SIZES[name], folder, placement, seed)
    chosen = (f"size {name}: {reason}", f"machine: {found.machine}", f"estimate: {found.estimate()}")
    header = recipe_header(target, [*survey_lines(survey), *chosen], translate)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        temporary.write_text(header + render_lines(found.lines, translate), encoding="utf-8")
    print(
        f"the estimate from a few steps, without reading pictures and evaluations: {found.estimate()}", file=sys.stderr
    )
    print(f"next: cogview run {target}", file=sys.stderr)
    print(target)
    return 0
