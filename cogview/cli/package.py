"""``cogview package``: write a checkpoint folder to publish, in float16, with its model card."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.evaluate import MEASURE_NAMES, last_checkpoint, read_report
from cogview.cli.options import Command, output_option
from cogview.cli.recipes import recipe_options
from cogview.errors import InputError, reason_of
from cogview.training.recipe import Recipe

if TYPE_CHECKING:
    from cogview.checkpoints.checkpoint import Model
    from cogview.checkpoints.grammar import PromptGrammar
    from cogview.modeling.config import Sampling


SHORT_CARD = "# A model of pictures\n\nTrained by a recipe of cogview on pictures with captions.\n\n{figures}\n"


@dataclass(frozen=True, kw_only=True)
class PackageSettings:
    """The ``package`` section of a recipe.

    Args:
        card: A Markdown file, or one of that name beside the recipe; ``{figures}`` is replaced by the tables of the
            reports, ``{things}`` by the objects. None for a card of its own.
        licence: Licence of the model.
        data: Where the pictures and captions are from, and their licences.
    """

    card: str | None = None
    licence: str = "not stated"
    data: str = "not stated"


@click.command(cls=Command)
@recipe_options("package")
@output_option(default=None, show_default="WORK/model", help="folder to write")
def command(recipe: Recipe, output: Path | None) -> int:
    """Package the last checkpoint with the sampling settings and tables of its reports.

    A model of pictures has no reports: it keeps the sampling settings of its recipe, and its card has the measures on
    held-out pictures.
    """
    import torch

    from cogview.checkpoints.checkpoint import load_model, save_model
    from cogview.files import atomic_folder, file_sha256
    from cogview.training.step_records import record_step

    settings = recipe.settings(PackageSettings, "package")
    card = SHORT_CARD if settings.card is None else read_card(recipe, settings.card)
    model = load_model(last_checkpoint(recipe), torch.device("cpu"), torch.float32)
    if "scenes" in recipe.sections or recipe.world.is_dir():
        figures = add_reports(model, recipe)
    else:
        figures = held_out_table(recipe)
        model.config = replace(model.config, sampling=sampling_of(recipe))
    things = "、".join(thing.emoji + thing.name for thing in model.things)
    model.card = card.replace("{figures}", figures).replace("{things}", things)
    target = output or recipe.work / "model"
    with atomic_folder(target, overwrite=True) as folder:
        save_model(folder, model, torch.float16)
    if output is None:
        record_step(recipe, "package", recorded_settings(recipe))
    print("for checkpoints.yaml:", file=sys.stderr)
    for path in sorted(target.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            print(f"    {path.relative_to(target).as_posix()}: {file_sha256(path)}", file=sys.stderr)
    print(target)
    return 0


def recorded_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a package depends on besides the checkpoint, as plain values.

    Args:
        recipe: The recipe.
    """
    from cogview.config_io import to_mapping

    return {
        "package": to_mapping(recipe.settings(PackageSettings, "package")),
        "sampling": to_mapping(sampling_of(recipe)),
    }


def sampling_of(recipe: Recipe) -> Sampling:
    """Return the sampling settings of a recipe, which may have changed since the training.

    Args:
        recipe: The recipe.
    """
    from cogview.training.settings import TransformerSettings

    return replace(recipe, overrides=()).settings(TransformerSettings, "transformer").sampling


def add_reports(model: Model, recipe: Recipe) -> str:
    """Give a model of the emoji world what its reports say; return their tables.

    Args:
        model: The model. Its sampling settings, the quality of its reconstructions and its grammar are set.
        recipe: The recipe.

    Raises:
        InputError: There is no report on scenes, or one of another checkpoint.
    """
    from cogview.config_io import from_mapping
    from cogview.emoji.evaluation.reports import MEASURES
    from cogview.modeling.config import ReconstructionQuality, Sampling

    reports = {name: report for name in MEASURE_NAMES if (report := read_report(recipe, name)) is not None}
    if "scenes" not in reports:
        raise InputError(f"the model has no report yet; evaluate it first: cogview eval scenes {recipe.path} --tune")
    sampling = from_mapping(Sampling, reports["scenes"]["protocol"]["sampling"], where="the report on scenes")
    model.config = replace(model.config, sampling=sampling)
    model.grammar = prompt_grammar(recipe.world)
    if quality := reports["scenes"].get("reconstruction_psnr"):  # reports of earlier versions have none
        quality = from_mapping(ReconstructionQuality, quality, where="the report on scenes")
        model.config = replace(model.config, reconstruction_psnr=quality)
    return "\n\n".join(
        f"`cogview eval {name}`, {report['protocol']['captions']} held-out scenes:\n\n{MEASURES[name].format(report)}"
        for name, report in reports.items()
    )


def held_out_table(recipe: Recipe) -> str:
    """Return the last measures on held-out pictures of a recipe's trainings, as a table.

    Args:
        recipe: The recipe.
    """
    from cogview.files import read_json_lines
    from cogview.training.run_folder import RunFolder
    from cogview.training.run_record import VALIDATION

    rows = ["| measure on held-out pictures | value |", "|---|---|"]
    for name, folder in (("image tokenizer", recipe.image_run), ("transformer", recipe.transformer_run)):
        last: dict[str, Any] = {}
        for line in read_json_lines(RunFolder(folder).metrics):
            last |= {key: value for key, value in line.items() if key.startswith(VALIDATION)}
        rows += [f"| {name}, {key.removeprefix(VALIDATION)} | {value:g} |" for key, value in last.items()]
    return "\n".join(rows)


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
