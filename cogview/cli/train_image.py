"""``cogview train-image``: train the VQ-VAE on pictures or scenes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from cogview.cli.messages import print_note
from cogview.cli.options import Command, device_option
from cogview.cli.recipes import recipe_options, resume_option
from cogview.training.recipe import Recipe

if TYPE_CHECKING:
    from cogview.data.image_dataset import ImageDataset
    from cogview.training.vqvae_recipe import VQVAERecipe


@click.command(cls=Command)
@recipe_options("image")
@resume_option()
@device_option()
def command(recipe: Recipe, resume: str, device: str) -> int:
    """Train the VQ-VAE on pictures that the recipe names, or on scenes, and export the trained image tokenizer."""
    from cogview.device import choose_placement, flush_denormals
    from cogview.training.run_folder import RunFolder
    from cogview.training.step_records import record_step
    from cogview.training.vqvae_recipe import VQVAERecipe
    from cogview.training.vqvae_trainer import export_image_tokenizer, train_vqvae

    flush_denormals()
    settings = recipe.settings(VQVAERecipe, "image")
    run = RunFolder(recipe.image_run)
    resumes = resume == "auto"
    if settings.pictures:
        training, held_out = _picture_splits(recipe, settings, resumes=resumes and bool(run.checkpoints()))
    else:
        training, held_out = _scene_splits(recipe, settings)
    status = train_vqvae(settings, training, held_out, run, choose_placement(device).device, resume=resumes)
    if status == 0:
        export_image_tokenizer(run, recipe.image_tokenizer)
        record_step(recipe, "train-image", settings, recipe.image_tokenizer / "model.safetensors")
        print(recipe.image_tokenizer)
    return status


def _scene_splits(recipe: Recipe, settings: VQVAERecipe) -> tuple[ImageDataset, ImageDataset]:
    """Return scenes of the emoji world to train on, and held-out ones."""
    from cogview.emoji.datasets import HELD_OUT_SEED, SceneDataset
    from cogview.emoji.world import EmojiWorld

    world = EmojiWorld.load(recipe.world)
    return SceneDataset(world, settings.training.seed), SceneDataset(world, HELD_OUT_SEED, held_out=True)


def _picture_splits(recipe: Recipe, settings: VQVAERecipe, *, resumes: bool) -> tuple[ImageDataset, ImageDataset]:
    """Return pictures to train on, and held-out ones; print their number, and what is left out."""
    from cogview.data.picture_images import PictureImages
    from cogview.training.vqvae_pictures import indexed_pictures, write_left_out

    index = indexed_pictures(recipe.picture_index, settings, resumes=resumes, on_note=print_note)
    if index.left_out:
        report = recipe.picture_index.with_name("pictures-left-out.jsonl")
        write_left_out(report, index)
        print(f"left out: {len(index.left_out)}, listed in {report}", file=sys.stderr)
    index.check(settings.held_out)
    print(f"{len(index.training)} pictures to train on, {len(index.held_out)} held out", file=sys.stderr)
    training, held_out = (
        PictureImages(pictures=pictures, side=settings.side, fit=settings.fit)
        for pictures in (index.training, index.held_out)
    )
    return training, held_out
