"""``cogview train-image``: train the VQ-VAE on scenes."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, field

from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.cli.recipes import add_recipe_arguments, add_training_arguments, open_recipe
from cogview.config_io import to_mapping
from cogview.device import choose_placement, flush_denormals, training_dtype
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.files import atomic_folder
from cogview.training.loop import RunFolder, RunSettings, run_loop
from cogview.training.vqvae_trainer import VQVAERun, scene_batches
from cogview.vqvae.model import VQVAE, VQVAEConfig
from cogview.vqvae.training import VQVAETrainingSettings


@dataclass(frozen=True, kw_only=True)
class VQVAERecipe:
    """The ``image`` section of a recipe."""

    training: VQVAETrainingSettings
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    scales: tuple[int, ...] = (1,)  # sides of the scenes it learns from, in turn; for upscaling: [1, 2]
    init_from: str | None = None  # an image tokenizer, or a model's, to begin with, by name or folder
    run: RunSettings = field(default_factory=RunSettings)
    precision: str = "auto"
    num_workers: int = 0  # processes that draw scenes

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) < 1:
            raise ValueError(f"scales must be whole numbers from 1, got {list(self.scales)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_recipe_arguments(parser, "image")
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, then put the tokenizer where the next steps look for it."""
    flush_denormals()
    recipe = open_recipe(args)
    settings = recipe.settings(VQVAERecipe, "image")
    world = EmojiWorld.load(recipe.world)
    start = None if settings.init_from is None else open_start(settings.init_from, settings.model)
    device = choose_placement(args.device).device
    dtype = training_dtype(device, settings.precision)
    training = settings.training
    status = run_loop(
        VQVAERun(world, settings.model, training, device, dtype, settings.scales, start),
        lambda step: scene_batches(
            world, training.seed, training.batch_size, step, training.steps, settings.num_workers, settings.scales
        ),
        RunFolder(recipe.image_run),
        settings.run,
        recipe=to_mapping(settings),
        steps=training.steps,
        batch_size=training.batch_size,
        resume=args.resume == "auto",
    )
    if status == 0:
        trained = RunFolder(recipe.image_run).checkpoints()[-1] / "image"
        with atomic_folder(recipe.image_tokenizer, overwrite=True) as folder:
            shutil.copytree(trained, folder, dirs_exist_ok=True)
        print(recipe.image_tokenizer)
    return status


def open_start(name: str, config: VQVAEConfig) -> VQVAE:
    """The image tokenizer in the folder ``name``, or that of the model ``name``; InputError where its shape differs."""
    folder = resolve_checkpoint(name)
    model = load_image_tokenizer(folder / "image" if (folder / "image").is_dir() else folder)
    if model.config != config:
        raise InputError(f"init_from: {name} has another shape than this recipe; expected {config}, got {model.config}")
    return model
