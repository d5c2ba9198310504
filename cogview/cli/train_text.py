"""``cogview train-text``: train the text tokenizer on captions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from cogview.cli.messages import print_note
from cogview.cli.options import Command
from cogview.cli.recipes import recipe_options
from cogview.formatting import plural
from cogview.training.recipe import Recipe

if TYPE_CHECKING:
    from cogview.tokenizers.text import TextTokenizer
    from cogview.training.text_tokenizer import TextTokenizerRecipe


@click.command(cls=Command)
@recipe_options("text")
def command(recipe: Recipe) -> int:
    """Train the text tokenizer on captions: of the sources that the recipe names, or of the emoji world."""
    from cogview.training.step_records import record_step
    from cogview.training.text_tokenizer import TextTokenizerRecipe

    settings = recipe.settings(TextTokenizerRecipe, "text")
    tokenizer = (_train_on_sources if settings.pictures else _train_on_scenes)(recipe, settings)
    record_step(recipe, "train-text", settings, recipe.text_model)
    print(f"{tokenizer.size} pieces (at most {settings.size} requested)", file=sys.stderr)
    print(recipe.text_model)
    return 0


def _train_on_scenes(recipe: Recipe, settings: TextTokenizerRecipe) -> TextTokenizer:
    """Train on captions of the emoji world; those of a rich one are beside instructions of edits."""
    from cogview.data.image_dataset import texts
    from cogview.emoji.datasets import TEXT_SEED, EditDataset, SceneDataset
    from cogview.emoji.world import EmojiWorld
    from cogview.training.text_tokenizer import train_text_model

    world = EmojiWorld.load(recipe.world)
    scenes = (EditDataset if world.settings.is_rich else SceneDataset)(world, TEXT_SEED)
    return train_text_model(recipe.text_model, settings, texts(scenes), scenes.names)


def _train_on_sources(recipe: Recipe, settings: TextTokenizerRecipe) -> TextTokenizer:
    """Train on captions of sources, and print how the tokenizer spells the held-out ones."""
    from cogview.training.text_tokenizer import measure_held_out, read_captions, train_text_model

    corpus = read_captions(settings, print_note)
    if corpus.skipped:
        print_note(f"{plural(corpus.skipped, 'record')} without a usable caption, the first: {corpus.first_skipped}")
    tokenizer = train_text_model(recipe.text_model, settings, corpus.training.captions)
    counts = corpus.training.count, corpus.held_out.count
    print(
        f"{plural(corpus.records, 'record')}: {counts[0]} captions to train on, {counts[1]} held out by their text",
        file=sys.stderr,
    )
    trained, given = len(corpus.training.captions), corpus.training.count
    used = plural(trained, "caption")
    print(f"trained on {used}, a random part of {given}" if trained < given else f"trained on {used}", file=sys.stderr)
    measured = measure_held_out(tokenizer, corpus.held_out.captions)
    if not measured.captions:
        if settings.held_out:
            print_note(
                f"no caption fell into the held-out share of {settings.held_out:g}: the share of bytes is unknown"
            )
        return tokenizer
    print(
        f"{plural(measured.captions, 'held-out caption')}: {measured.byte_share:.2%} of the characters are spelt in "
        f"bytes, {measured.pieces:.1f} pieces a caption",
        file=sys.stderr,
    )
    if measured.foreign:
        print(f"spelt in bytes most often: {' '.join(measured.foreign)}", file=sys.stderr)
    return tokenizer
