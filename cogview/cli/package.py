"""``cogview package``: write a folder to publish: a model in float16 or an adapter, with its model card."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.evaluate import MEASURE_NAMES, last_checkpoint, read_report
from cogview.cli.messages import print_note
from cogview.cli.options import Command, output_option
from cogview.cli.package_card import unfinished_lines
from cogview.cli.recipes import recipe_options
from cogview.cli.steps import packaged_folder
from cogview.errors import InputError, reason_of
from cogview.files import file_sha256
from cogview.training.recipe import Recipe

if TYPE_CHECKING:
    from cogview.checkpoints.checkpoint import Model
    from cogview.checkpoints.grammar import PromptGrammar
    from cogview.modeling.config import Sampling


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
@recipe_options("package", others=("transformer",))
@output_option(default=None, show_default="WORK/model, or WORK/adapter", help="folder to write")
def command(recipe: Recipe, output: Path | None) -> int:
    """Package the last checkpoint with a model card that has what `cogview eval` has measured.

    An emoji model keeps the sampling settings of its report; any other model has those of its recipe, and the sheet of
    `cogview eval samples` beside its card. transformer.sampling.KEY=VALUE changes them for this package.
    """
    from cogview.files import atomic_folder
    from cogview.training.step_records import record_step

    settings = recipe.settings(PackageSettings, "package")
    card = None if settings.card is None else read_card(recipe, settings.card)
    checkpoint = last_checkpoint(recipe)
    for unfinished in unfinished_lines(recipe):
        print_note(unfinished)
    target = output or packaged_folder(recipe)
    with atomic_folder(target, overwrite=True) as folder:
        if packaged_folder(recipe).name == "adapter":
            package_adapter(recipe, settings, card, checkpoint, folder)
        elif "scenes" in recipe.sections or recipe.world.is_dir():
            package_emoji_model(recipe, card or "{figures}\n", checkpoint, folder)
        else:
            package_picture_model(recipe, settings, card, checkpoint, folder)
    if output is None:
        record_step(recipe, "package", recorded_settings(recipe))
    if "scenes" in recipe.sections:
        print("for checkpoints.yaml:", file=sys.stderr)
        for path in sorted(target.rglob("*")):
            if path.is_file() and path.suffix != ".md":
                print(f"    {path.relative_to(target).as_posix()}: {file_sha256(path)}", file=sys.stderr)
    print(target)
    return 0


def package_emoji_model(recipe: Recipe, card: str, checkpoint: Path, folder: Path) -> None:
    """Write a model of the emoji world with what its reports say.

    Args:
        recipe: The recipe.
        card: Text of the card.
        checkpoint: The checkpoint.
        folder: The folder to write.

    Raises:
        InputError: There is no report on scenes, or one of another checkpoint.
    """
    model = open_checkpoint(checkpoint)
    tables = "\n\n".join([*unfinished_lines(recipe), add_reports(model, recipe)])
    things = "、".join(thing.emoji + thing.name for thing in model.things)
    model.card = card.replace("{figures}", tables).replace("{things}", things)
    save_half(folder, model)


def package_picture_model(
    recipe: Recipe, settings: PackageSettings, card: str | None, checkpoint: Path, folder: Path
) -> None:
    """Write a model of pictures with the sampling settings of its recipe, and what ``cogview eval samples`` measured.

    Args:
        recipe: The recipe.
        settings: The section ``package``.
        card: Text of the card; None for one that is written from the facts.
        checkpoint: The checkpoint.
        folder: The folder to write.
    """
    from cogview.cli.package_card import copy_samples, picture_card, report_tables
    from cogview.config_io import from_mapping
    from cogview.modeling.config import ReconstructionQuality

    report = read_report(recipe, "samples")
    model = open_checkpoint(checkpoint)
    model.config = replace(model.config, sampling=sampling_of(recipe))
    if report is None:
        print_note(f"there are no samples, the card has none; generate some with cogview eval samples {recipe.path}")
    elif quality := report.get("reconstruction_psnr"):
        quality = from_mapping(ReconstructionQuality, quality, where="the report on samples")
        model.config = replace(model.config, reconstruction_psnr=quality)
    tables = report_tables(recipe, report)
    facts = (settings.licence, settings.data)
    model.card = card.replace("{figures}", tables) if card else picture_card(recipe, facts, tables, model)
    save_half(folder, model)
    copy_samples(recipe, report, folder)


def package_adapter(
    recipe: Recipe, settings: PackageSettings, card: str | None, checkpoint: Path, folder: Path
) -> None:
    """Write an adapter without the state of its training.

    Args:
        recipe: The recipe.
        settings: The section ``package``.
        card: Text of the card; None for one that is written from the facts.
        checkpoint: The checkpoint.
        folder: The folder to write.
    """
    import shutil

    from cogview.cli.package_card import adapter_card, copy_samples, report_tables
    from cogview.training.trainer_state import MOMENTS_FILE, STATE_FILE

    report = read_report(recipe, "samples")
    tables = report_tables(recipe, report)
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MOMENTS_FILE, STATE_FILE))
    text = card.replace("{figures}", tables) if card else adapter_card(recipe, settings.licence, settings.data, tables)
    (folder / "README.md").write_text(text, encoding="utf-8")
    copy_samples(recipe, report, folder)


def open_checkpoint(checkpoint: Path) -> Model:
    """Return the model of a checkpoint in float32 on the CPU."""
    import torch

    from cogview.checkpoints.checkpoint import load_model

    return load_model(checkpoint, torch.device("cpu"), torch.float32)


def save_half(folder: Path, model: Model) -> None:
    """Write a model in float16."""
    import torch

    from cogview.checkpoints.checkpoint import save_model

    save_model(folder, model, torch.float16)


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


def check_sampling(recipe: Recipe) -> None:
    """Raise InputError for sampling settings of the command line that the package would not have."""
    given = [each for each in recipe.overrides_of("transformer") if each.startswith(("sampling=", "sampling."))]
    if not given:
        return
    if packaged_folder(recipe).name == "adapter":
        reason = "an adapter has none, its base model has"
    elif "scenes" in recipe.sections or recipe.world.is_dir():
        reason = "a model of the emoji world has those that cogview eval scenes --tune finds"
    else:
        return
    raise InputError(
        f"transformer.{given[0]}: sampling settings do not reach the package, {reason}; leave them out, or set those "
        "of the sample sheets in the recipe"
    )


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
    except FileNotFoundError:
        looked = f"looked for {Path(name).absolute()} and {path.absolute()}"
        raise InputError(f"the model card {name} of {recipe.path} does not exist: {looked}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the model card {name} of {recipe.path} cannot be read: {reason_of(error)}") from None


def prompt_grammar(world: Path) -> PromptGrammar | None:
    """Return the grammar of the prompts of the emoji world in a folder.

    Without the files that it is built from, print a note and return None.
    """
    from cogview.emoji.prompt_grammar import build_grammar
    from cogview.emoji.world import EmojiWorld

    try:
        loaded = EmojiWorld.load(world)
        return build_grammar(loaded.things, max_kinds=2 if loaded.settings.weights.pair else 1)
    except InputError as error:
        print(f"note: no grammar.json, so that prompts are hardly checked: {error}", file=sys.stderr)
        return None
