"""``cogview train-image``: train the VQ-VAE on scenes."""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import dataclass, field
from typing import Literal

from cogview.cli.recipes import add_recipe_arguments, add_training_arguments, open_recipe
from cogview.config_files import to_plain
from cogview.data.emoji.world import World
from cogview.device import choose_placement, flush_denormals, training_dtype
from cogview.training.image_tokenizer import ImageTokenizerRun, scene_batches
from cogview.training.run import Run, RunSettings, run_loop
from cogview.vqvae.model import VQVAEConfig
from cogview.vqvae.training import VQVAETraining


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The ``image`` section of a recipe."""

    training: VQVAETraining
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    things: int | Literal["all"] | None = None  # in the scenes it learns from (default: the world's)
    run: RunSettings = field(default_factory=RunSettings)
    precision: str = "auto"
    workers: int = 0  # processes that draw scenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_recipe_arguments(parser, "image")
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, then put the tokenizer where the next steps look for it."""
    flush_denormals()
    recipe = open_recipe(args)
    settings = recipe.settings(ImageSettings, "image")
    world = World.load(recipe.world).with_things(settings.things)
    device = choose_placement(args.device).device
    dtype = training_dtype(device, settings.precision)
    training = settings.training
    status = run_loop(
        ImageTokenizerRun(world, settings.model, training, device, dtype),
        lambda step: scene_batches(world, training.seed, training.batch_size, step, training.steps, settings.workers),
        Run(recipe.image_run),
        settings.run,
        recipe=to_plain(settings),
        steps=training.steps,
        batch_size=training.batch_size,
        resume=args.resume == "auto",
    )
    if status == 0:
        trained = Run(recipe.image_run).checkpoints()[-1] / "image"
        aside = recipe.image_tokenizer.with_name(".image-writing")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(trained, aside)
        shutil.rmtree(recipe.image_tokenizer, ignore_errors=True)
        os.replace(aside, recipe.image_tokenizer)
        print(recipe.image_tokenizer)
    return status
