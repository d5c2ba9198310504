"""``cogview train-image``: train the VQ-VAE on pictures or scenes."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from cogview.cli.messages import print_note
from cogview.cli.options import Command, device_option
from cogview.cli.processor import note_busy_processor
from cogview.cli.recipes import recipe_options, resume_option
from cogview.process_variables import rank_and_world_size
from cogview.training.recipe import Recipe

if TYPE_CHECKING:
    from cogview.data.builders.picture_index import PictureIndex
    from cogview.data.image_dataset import ImageDataset
    from cogview.training.distributed import DistributedContext
    from cogview.training.run_folder import RunFolder
    from cogview.training.vqvae_recipe import VQVAERecipe

INDEX_TIMEOUT = timedelta(days=7)  # the others wait while the first process reads all pictures


@click.command(cls=Command)
@recipe_options("image")
@resume_option()
@device_option()
def command(recipe: Recipe, resume: str, device: str) -> int:
    """Train the VQ-VAE on pictures that the recipe names, or on scenes, and export the trained image tokenizer.

    Several processes share the batch of the recipe. Start them with
    ``torchrun --nproc-per-node N --no-python cogview train-image RECIPE``. With ``train: decoder`` in the recipe, the
    codes of all images stay as they are, and ``init_from`` is copied with its new decoder.
    """
    from cogview.device import flush_denormals
    from cogview.training.distributed import destroy_distributed, exit_process, init_distributed, report_once
    from cogview.training.vqvae_initial import image_settings

    flush_denormals()
    with report_once():
        if rank_and_world_size()[1] == 1:
            note_busy_processor(device)
        settings = image_settings(recipe)
        context = init_distributed(device, timeout=INDEX_TIMEOUT)
    try:
        status = _train(recipe, settings, context, resumes=resume == "auto")
    finally:
        destroy_distributed()
    exit_process(status)
    return status


def _train(recipe: Recipe, settings: VQVAERecipe, context: DistributedContext, *, resumes: bool) -> int:
    """Train in this process of ``context``; the main one exports the result and prints its folders."""
    from cogview.training.run_folder import RunFolder

    context.run_everywhere(lambda: _check(settings, context))
    run = RunFolder(recipe.image_run, context.is_main_process)
    context.run_on_main(run.lock)
    try:  # the list of pictures is that of the run: it is written by the training that may go on
        context.run_on_main(lambda: run.check(resumes))
        return _train_in(run, recipe, settings, context, resumes=resumes)
    finally:
        run.unlock()


def _check(settings: VQVAERecipe, context: DistributedContext) -> None:
    """Raise InputError for settings that do not suit each other or the processes, before pictures are read."""
    from cogview.data.image_dataset import check_side
    from cogview.device import training_dtype

    training_dtype(context.device, settings.precision)
    context.local_slice(settings.training.batch_size)
    if settings.pictures:
        check_side(settings.side, settings.model.downsampling)


def _train_in(
    run: RunFolder, recipe: Recipe, settings: VQVAERecipe, context: DistributedContext, *, resumes: bool
) -> int:
    """Train in the folder of a run, which no other training changes meanwhile."""
    from cogview.training.vqvae_trainer import train_vqvae

    if settings.pictures:
        goes_on = resumes and bool(run.checkpoints())
        index = context.run_on_main(lambda: _index_pictures(recipe, settings, resumes=goes_on))
        training, held_out = _picture_splits(settings, index)
    else:
        training, held_out = context.run_everywhere(lambda: _scene_splits(recipe, settings))
    status = train_vqvae(settings, training, held_out, run, context, resume=resumes)
    if status == 0:
        context.run_on_main(lambda: _export(recipe, settings, run, held_out))
    return status


def _export(recipe: Recipe, settings: VQVAERecipe, run: RunFolder, held_out: ImageDataset) -> None:
    """Export the image tokenizer; with ``train: decoder``, also the model that it was taken from, with its decoder."""
    from cogview.checkpoints.registry import resolve_checkpoint
    from cogview.training.step_records import record_step
    from cogview.training.vqvae_export import copy_with_image_tokenizer
    from cogview.training.vqvae_trainer import export_image_tokenizer

    export_image_tokenizer(run, recipe.image_tokenizer)
    record_step(recipe, "train-image", settings, recipe.image_tokenizer / "model.safetensors")
    print(recipe.image_tokenizer)
    if settings.train == "decoder" and settings.init_from is not None:
        source = resolve_checkpoint(settings.init_from)
        if (source / "image").is_dir():
            model = recipe.work / "tuned-model"
            copy_with_image_tokenizer(source, recipe.image_tokenizer, held_out, model)
            print(model)


def _scene_splits(recipe: Recipe, settings: VQVAERecipe) -> tuple[ImageDataset, ImageDataset]:
    """Return scenes of the emoji world to train on, and held-out ones."""
    from cogview.emoji.datasets import HELD_OUT_SEED, SceneDataset
    from cogview.emoji.world import EmojiWorld

    world = EmojiWorld.load(recipe.world)
    return SceneDataset(world, settings.training.seed), SceneDataset(world, HELD_OUT_SEED, held_out=True)


def _index_pictures(recipe: Recipe, settings: VQVAERecipe, *, resumes: bool) -> PictureIndex:
    """Return the index of the pictures; print their number, and what is left out."""
    from cogview.training.vqvae_pictures import indexed_pictures, write_left_out

    index = indexed_pictures(recipe.picture_index, settings, resumes=resumes, on_note=print_note)
    if index.left_out:
        report = recipe.picture_index.with_name("pictures-left-out.jsonl")
        write_left_out(report, index)
        print(f"left out: {len(index.left_out)}, listed in {report}", file=sys.stderr)
    index.check(settings.held_out)
    counts = [len(index.training), len(index.held_out), len(index.left_out)]
    print(
        f"{sum(counts)} pictures: {counts[0]} to train on, {counts[1]} held out, {counts[2]} left out", file=sys.stderr
    )
    return index


def _picture_splits(settings: VQVAERecipe, index: PictureIndex) -> tuple[ImageDataset, ImageDataset]:
    """Return the pictures of an index to train on, and the held-out ones."""
    from cogview.data.picture_images import PictureImages

    training, held_out = (
        PictureImages(pictures=pictures, side=settings.side, fit=settings.fit)
        for pictures in (index.training, index.held_out)
    )
    return training, held_out
