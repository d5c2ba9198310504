"""``cogview package``: write a checkpoint folder to publish, in float16, with its model card."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.evaluate import MEASURE_NAMES, last_checkpoint, read_report
from cogview.cli.options import Command, output_option
from cogview.cli.recipes import recipe_options
from cogview.errors import InputError, reason_of
from cogview.training.recipe import Recipe

if TYPE_CHECKING:
    from cogview.checkpoints.grammar import PromptGrammar


@dataclass(frozen=True, kw_only=True)
class PackageSettings:
    """The ``package`` section of a recipe.

    Args:
        card: A Markdown file, or one of that name beside the recipe; ``{figures}`` is replaced by the tables of the
            reports, ``{things}`` by the objects.
    """

    card: str


@click.command(cls=Command)
@recipe_options("package")
@output_option(default=None, show_default="WORK/model", help="folder to write")
def command(recipe: Recipe, output: Path | None) -> int:
    """Package the last checkpoint with the sampling settings and tables of its reports."""
    import torch

    from cogview.checkpoints.checkpoint import load_model, save_model
    from cogview.config_io import from_mapping
    from cogview.emoji.evaluation.reports import MEASURES
    from cogview.files import atomic_folder, file_sha256
    from cogview.modeling.config import ReconstructionQuality, Sampling

    settings = recipe.settings(PackageSettings, "package")
    card = read_card(recipe, settings.card)
    reports = {name: report for name in MEASURE_NAMES if (report := read_report(recipe, name)) is not None}
    if "scenes" not in reports:
        raise InputError(f"the model has no report yet; evaluate it first: cogview eval scenes {recipe.path} --tune")
    model = load_model(last_checkpoint(recipe), torch.device("cpu"), torch.float32)
    sampling = from_mapping(Sampling, reports["scenes"]["protocol"]["sampling"], where="the report on scenes")
    model.config = replace(model.config, sampling=sampling)
    model.grammar = prompt_grammar(recipe.world)
    if quality := reports["scenes"].get("reconstruction_psnr"):  # reports of earlier versions have none
        quality = from_mapping(ReconstructionQuality, quality, where="the report on scenes")
        model.config = replace(model.config, reconstruction_psnr=quality)
    things = "、".join(thing.emoji + thing.name for thing in model.things)
    tables = "\n\n".join(
        f"`cogview eval {name}`, {report['protocol']['captions']} held-out scenes:\n\n{MEASURES[name].format(report)}"
        for name, report in reports.items()
    )
    model.card = card.replace("{figures}", tables).replace("{things}", things)
    target = output or recipe.work / "model"
    with atomic_folder(target, overwrite=True) as folder:
        save_model(folder, model, torch.float16)
    print("for checkpoints.yaml:", file=sys.stderr)
    for path in sorted(target.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            print(f"    {path.relative_to(target).as_posix()}: {file_sha256(path)}", file=sys.stderr)
    print(target)
    return 0


def read_card(recipe: Recipe, name: str) -> str:
    """Return the text of a model card.

    Args:
        recipe: The recipe.
        name: The file; one of that name beside the recipe will do, as in an installed package.

    Raises:
        InputError: It cannot be read.
    """
    path = Path(name) if Path(name).exists() else recipe.path.parent / Path(name).name
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the model card {name} of {recipe.path} cannot be read: {reason_of(error)}") from None


def prompt_grammar(world: Path) -> PromptGrammar | None:
    """Return the grammar of the prompts of the emoji world in a folder.

    Without the files that it is built from, print a note and return None.
    """
    from cogview.emoji.prompt_grammar import build_grammar
    from cogview.emoji.world import EmojiWorld

    try:
        return build_grammar(EmojiWorld.load(world).things)
    except InputError as error:
        print(f"note: no grammar.json, so that prompts are hardly checked: {error}", file=sys.stderr)
        return None
