"""``cogview train-image``: train the VQ-VAE on scenes."""

from __future__ import annotations

import click

from cogview.cli.options import Command, device_option
from cogview.cli.recipes import recipe_options, resume_option
from cogview.training.recipe import Recipe


@click.command(cls=Command)
@recipe_options("image")
@resume_option()
@device_option()
def command(recipe: Recipe, resume: str, device: str) -> int:
    """Train the VQ-VAE on scenes and export the trained image tokenizer."""
    from cogview.device import choose_placement, flush_denormals
    from cogview.emoji.datasets import HELD_OUT_SEED, SceneDataset
    from cogview.emoji.world import EmojiWorld
    from cogview.training.run_folder import RunFolder
    from cogview.training.vqvae_trainer import VQVAERecipe, export_image_tokenizer, train_vqvae

    flush_denormals()
    settings = recipe.settings(VQVAERecipe, "image")
    world = EmojiWorld.load(recipe.world)
    run = RunFolder(recipe.image_run)
    status = train_vqvae(
        settings,
        SceneDataset(world, settings.training.seed),
        SceneDataset(world, HELD_OUT_SEED, held_out=True),
        run,
        choose_placement(device).device,
        resume=resume == "auto",
    )
    if status == 0:
        export_image_tokenizer(run, recipe.image_tokenizer)
        print(recipe.image_tokenizer)
    return status
