"""``cogview encode``: encode scenes into a token store."""

from __future__ import annotations

import click

from cogview.cli.options import Command, device_option
from cogview.cli.recipes import recipe_options
from cogview.training.recipe import Recipe


@click.command(cls=Command)
@recipe_options("encode")
@device_option()
def command(recipe: Recipe, device: str) -> int:
    """Encode held-out and training scenes into token stores; an interrupted run is continued."""
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
    return 0
