"""``cogview new``: write a recipe for one's own pictures, with the reason for each setting."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.data import COLUMN_OPTIONS
from cogview.cli.messages import print_note
from cogview.cli.options import FILE, MODEL_HELP, Command, argument, device_option, option_group
from cogview.cli.translation import translate
from cogview.errors import InputError

if TYPE_CHECKING:
    import torch

    from cogview.data.sources.tables import TableOptions
    from cogview.training.new_model import NewRecipe
    from cogview.training.survey import PictureSurvey

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
@option_group(dict, "columns", ("image_column", "caption_columns"), *COLUMN_OPTIONS)
@click.option(
    "--size",
    type=click.Choice(SIZE_NAMES),
    show_default="by the number of pictures and the machine",
    help="size of the model: tiny and small for CPUs, base for a GPU, 4b for a cluster",
)
@click.option(
    "--adapter-for",
    "base",
    metavar="MODEL",
    help="write a recipe for a LoRA adapter of this model, from 20 to 200 pictures: " + MODEL_HELP,
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
def command(**values: Any) -> int:
    """Write a recipe for a model of your own pictures, which `cogview run` turns into the model.

    Looks at all captions, at a sample of the pictures and at the machine, and times some steps of both trainings. The
    recipe has the reason for each choice as a comment; the time is an estimate.
    """
    options = NewOptions(**values)
    options.check()
    from cogview.device import choose_placement, flush_denormals
    from cogview.image_io.png import prepared_folder
    from cogview.training.new_recipe import survey_lines
    from cogview.training.survey import survey_pictures

    if options.base is not None:
        from cogview.modeling.lora import require_peft

        require_peft()
    flush_denormals()
    device = choose_placement(options.device).device
    survey = survey_pictures(options.sources, print_note, options.table())
    survey.check(options.sources)
    for found_line in survey_lines(survey):
        print(found_line, file=sys.stderr)
    with prepared_folder(options.folder):
        chosen, found = choose_recipe(options, survey, device)
        write_recipe(options.target, found, survey, chosen)
    print(
        f"the estimate from a few steps, without reading pictures and evaluations: {found.estimate()}", file=sys.stderr
    )
    for doubt in found.doubts:
        print_note(f"the estimate is unreliable: {doubt}")
    if trial := found.trial():
        print(f"for a short trial: {shlex.join(['cogview', 'run', str(options.target), *trial])}", file=sys.stderr)
    print(f"next: cogview run {options.target}", file=sys.stderr)
    print(options.target)
    return 0


@dataclass(frozen=True, kw_only=True)
class NewOptions:
    """Options of the command.

    Attributes:
        folder: Folder of the recipe and the results.
        sources: Sources of the pictures.
        columns: Columns of tables, as fields of ``TableOptions``.
        size: Size of a whole model; None for one by the data and the machine.
        base: Model that gets an adapter; None for a whole model.
        seed: Seed of the trainings.
        overwrite: Whether to replace a recipe.
        device: Device of the trainings.
    """

    folder: Path
    sources: tuple[Path, ...]
    columns: dict[str, Any]
    size: str | None
    base: str | None
    seed: int
    overwrite: bool
    device: str

    @property
    def target(self) -> Path:
        """File of the recipe."""
        return self.folder / RECIPE_FILE

    def table(self) -> TableOptions:
        """Return the columns of tables."""
        from cogview.data.sources.tables import TableOptions

        return TableOptions(**self.columns)

    def check(self) -> None:
        """Raise InputError for a recipe that is there, and for options that contradict each other."""
        if self.size is not None and self.base is not None:
            raise InputError("--size is that of a whole model; with --adapter-for the size is that of its model")
        if self.target.is_dir():
            raise InputError(f"{self.target} is a folder; remove it, or choose another FOLDER")
        if self.target.exists() and not self.overwrite:
            raise InputError(
                f"{self.target} is there already: go on with cogview run {self.target}, or replace it with --overwrite"
            )


def choose_recipe(options: NewOptions, survey: PictureSurvey, device: torch.device) -> tuple[str, NewRecipe]:
    """Return a line about what was chosen, and the recipe.

    Args:
        options: The options.
        survey: The survey of the pictures.
        device: Device of the trainings.
    """
    from cogview.training.new_adapter import new_adapter_recipe
    from cogview.training.new_model import choose_size, new_model_recipe
    from cogview.training.new_recipe import SIZES, picture_lines

    folder, seed = options.folder, options.seed
    pictures = picture_lines(options.sources, options.table())
    if options.base is not None:
        chosen = f"an adapter for {options.base}"
        print(chosen, file=sys.stderr)
        return chosen, new_adapter_recipe(
            survey,
            pictures,
            options.base,
            folder,
            device=device,
            seed=seed,
            on_note=print_note,
            on_line=print_line,
        )
    name, reason = (options.size, "as asked for") if options.size else choose_size(survey, device)
    chosen = f"size {name}: {reason}"
    print(chosen, file=sys.stderr)
    rules = SIZES[name]
    return chosen, new_model_recipe(
        survey,
        pictures,
        rules,
        folder,
        device=device,
        seed=seed,
        on_line=print_line,
    )


def print_line(text: str) -> None:
    """Print a line about what is being done."""
    print(text, file=sys.stderr, flush=True)


def write_recipe(target: Path, found: NewRecipe, survey: PictureSurvey, chosen: str) -> None:
    """Write a recipe with what was found in the comments at its top.

    Args:
        target: The file.
        found: The recipe.
        survey: The survey of the pictures.
        chosen: A line about the kind of the recipe.
    """
    from cogview.files import atomic_write
    from cogview.training.new_recipe import recipe_header, render_lines, survey_lines

    about = [*survey_lines(survey), chosen, f"machine: {found.machine}", f"estimate: {found.estimate()}"]
    about += [f"the estimate is unreliable: {doubt}" for doubt in found.doubts]
    with atomic_write(target) as temporary:
        text = recipe_header(target, about, translate) + render_lines(found.lines, translate)
        temporary.write_text(text, encoding="utf-8")
