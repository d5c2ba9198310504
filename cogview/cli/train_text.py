"""``cogview train-text``: train the text tokenizer on captions."""

from __future__ import annotations

import sys

import click

from cogview.cli.options import Command
from cogview.cli.recipes import recipe_options
from cogview.training.recipe import Recipe


@click.command(cls=Command)
@recipe_options("text")
def command(recipe: Recipe) -> int:
    """Train the text tokenizer on captions of training scenes."""
    from cogview.data.image_dataset import captions
    from cogview.emoji.datasets import TEXT_SEED, SceneDataset
    from cogview.emoji.world import EmojiWorld
    from cogview.training.text_tokenizer import TextTokenizerRecipe, train_text_model

    settings = recipe.settings(TextTokenizerRecipe, "text")
    scenes = SceneDataset(EmojiWorld.load(recipe.world), TEXT_SEED)
    tokenizer = train_text_model(recipe.text_model, settings, captions(scenes), scenes.names)
    print(f"{tokenizer.size} pieces (at most {settings.size} requested)", file=sys.stderr)
    print(recipe.text_model)
    return 0
