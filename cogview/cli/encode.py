"""``cogview encode``: encode scenes, or pictures with captions, into token stores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cogview.cli.data import report_build
from cogview.cli.options import Command, device_option
from cogview.cli.recipes import recipe_options
from cogview.errors import InputError
from cogview.training.recipe import Recipe
from cogview.training.step_records import record_step

if TYPE_CHECKING:
    from cogview.training.model_setup import Tokenizers


@click.command(cls=Command)
@recipe_options("encode", others=("transformer",))
@device_option()
def command(recipe: Recipe, device: str) -> int:
    """Encode scenes, or pictures that the recipe names, into token stores; an interrupted run is continued.

    A training store and a held-out one are written. Pictures that are left out are listed with the reason in
    store-left-out.jsonl, with status 1.
    """
    if "pictures" in recipe.section("encode"):
        return _encode_pictures(recipe, device)
    return _encode_scenes(recipe, device)


def _encode_scenes(recipe: Recipe, device: str) -> int:
    """Encode scenes of the emoji world."""
    from cogview.data.builders.encode import encode_dataset
    from cogview.device import choose_placement
    from cogview.emoji.datasets import SceneEncodeSettings
    from cogview.emoji.world import EmojiWorld

    settings = recipe.settings(SceneEncodeSettings, "encode")
    world = EmojiWorld.load(recipe.world)
    image_tokenizer = recipe.open_image_tokenizer().to(choose_placement(device).device)
    text_tokenizer = recipe.open_text_tokenizer()
    held_out, training = (settings.dataset(world, held_out=split) for split in (True, False))
    for path, scenes, rows in (
        (recipe.held_out_store, held_out, settings.held_out_rows),
        (recipe.store, training, settings.rows),
    ):
        encode_dataset(path, scenes, text_tokenizer, image_tokenizer, settings, rows=rows)
        print(path)
    record_step(recipe, "encode", settings)
    return 0


def _encode_pictures(recipe: Recipe, device: str) -> int:
    """Encode pictures with captions, by the same rules as ``cogview data build``."""
    from cogview.data.builders.pictures import PictureBuild
    from cogview.data.sources.open import open_source
    from cogview.device import choose_placement
    from cogview.tables import print_note
    from cogview.training.picture_encoding import PictureEncodeSettings, RecipeStorePaths

    settings = recipe.settings(PictureEncodeSettings, "encode")
    recipe.require_held_out_store()
    tokenizers = _open_tokenizers(recipe)
    if recipe.store.exists():
        raise InputError(f"{recipe.store} is there already: remove it, or choose another folder with --work")
    paths = RecipeStorePaths(store=recipe.store, validation_store=recipe.held_out_store)
    task = PictureBuild(
        paths=paths,
        sources={str(path): open_source(path, settings.table, print_note) for path in settings.pictures},
        text_tokenizer=tokenizers.text,
        image_tokenizer=tokenizers.image.to(choose_placement(device).device),
        settings=settings,
        side=settings.side,
    )
    report = task.run()
    record_step(recipe, "encode", settings)
    return report_build(report, paths)


def _open_tokenizers(recipe: Recipe) -> Tokenizers:
    """Return the tokenizers of the model that the section ``transformer`` names, or those that the recipe trains."""
    from cogview.training.model_setup import Tokenizers, open_tokenizers
    from cogview.training.settings import TransformerSettings

    if "transformer" in recipe.sections:
        others = replace(recipe, overrides=())  # which are those of the section encode
        return open_tokenizers(recipe, others.settings(TransformerSettings, "transformer"))
    return Tokenizers(image=recipe.open_image_tokenizer(), text=recipe.open_text_tokenizer())
