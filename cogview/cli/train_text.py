"""``cogview train-text``: train the text tokenizer on captions."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from cogview.cli.recipes import add_recipe_arguments, open_recipe
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.files import atomic_write
from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The ``text`` section of a recipe."""

    captions: int = 50_000  # captions to learn from
    size: int = 2000  # at most so many pieces
    coverage: float = 1.0  # share of the characters that get pieces; the others are spelt in bytes
    max_piece_length: int = 1  # in characters
    whole_names: bool = False  # the names of the world's things are one piece each, however long

    def __post_init__(self) -> None:
        if self.captions < 1:
            raise ValueError(f"captions must be at least 1, got {self.captions}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_recipe_arguments(parser, "text")


def run(args: argparse.Namespace) -> int:
    """Train on the captions of training scenes, save the model."""
    recipe = open_recipe(args)
    settings = recipe.settings(TextSettings, "text")
    world = EmojiWorld.load(recipe.world)
    names = [name for thing in world.things for name in thing.names]
    captions = (world.caption(world.sample(0, index), index) for index in range(settings.captions))
    try:
        model = train_text_tokenizer(
            captions,
            size=settings.size,
            coverage=settings.coverage,
            max_piece_length=settings.max_piece_length,
            words=names if settings.whole_names else (),
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    with atomic_write(recipe.text_model) as temporary:
        temporary.write_bytes(model)
    print(f"{TextTokenizer(model).size} pieces (asked for at most {settings.size})", file=sys.stderr)
    print(recipe.text_model)
    return 0
