"""``cogview train``: train the transformer on one token store or several."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cogview.cli.options import Command, device_option
from cogview.cli.processor import note_busy_processor
from cogview.cli.recipes import recipe_options, resume_option
from cogview.process_variables import rank_and_world_size

if TYPE_CHECKING:
    from pathlib import Path

    from cogview.checkpoints.checkpoint import NamedThing
    from cogview.training.recipe import Recipe


@click.command(cls=Command)
@recipe_options("transformer")
@resume_option()
@device_option()
@click.option(
    "--init-from",
    metavar="NAME_OR_FOLDER",
    help="start from the weights of this model or checkpoint, with a new optimizer at step 0; the key init_from of the "
    "recipe",
)
def command(recipe: Recipe, resume: str, device: str, init_from: str | None) -> int:
    """Train the transformer of RECIPE; each checkpoint is a folder that ``cogview generate --model`` opens.

    Several processes share the batch of the recipe. Start them with
    ``torchrun --nproc-per-node N --no-python cogview train RECIPE`` or ``deepspeed --module cogview train RECIPE``.
    """
    from cogview.device import flush_denormals
    from cogview.training.distributed import destroy_distributed, exit_process, init_distributed, report_once
    from cogview.training.settings import TransformerSettings
    from cogview.training.setup import train
    from cogview.training.step_records import record_step

    flush_denormals()
    with report_once():
        if rank_and_world_size()[1] == 1:
            note_busy_processor(device)
        settings = recipe.settings(TransformerSettings, "transformer")
        if init_from is not None:
            settings = replace(settings, init_from=init_from)
        context = init_distributed(device, needs_group=settings.engine.name == "deepspeed")
    try:
        things = context.run_everywhere(lambda: named_things(recipe.world))
        status = train(recipe, settings, context, resume=resume == "auto", things=things)
        if status == 0 and context.is_main_process:
            record_step(recipe, "train", settings)
    finally:
        destroy_distributed()
    exit_process(status)
    return status


def named_things(world: Path) -> tuple[NamedThing, ...]:
    """Return the objects of the emoji world in a folder; none if there is no world.

    Raises:
        InputError: The world cannot be read.
    """
    from cogview.checkpoints.checkpoint import NamedThing
    from cogview.emoji.world import EmojiWorld

    if not world.is_dir():
        return ()
    return tuple(
        NamedThing(name=thing.name, emoji=thing.emoji, synonyms=thing.synonyms)
        for thing in EmojiWorld.load(world).things
    )
