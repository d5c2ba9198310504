"""``cogview encode``: scenes to token rows in an LMDB store."""

from __future__ import annotations

import argparse

from cogview.cli.recipes import add_recipe_arguments, open_recipe
from cogview.device import choose_placement
from cogview.emoji.encode import EncodeSettings, encode_scenes
from cogview.emoji.world import EmojiWorld


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_recipe_arguments(parser, "encode")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def run(args: argparse.Namespace) -> int:
    """Encode the training scenes and the held-out ones; an interrupted run is continued."""
    recipe = open_recipe(args)
    settings = recipe.settings(EncodeSettings, "encode")
    world = EmojiWorld.load(recipe.world)
    placement = choose_placement(args.device)
    image_tokenizer = recipe.open_image_tokenizer().to(placement.device)
    text_tokenizer = recipe.open_text_tokenizer()
    for path, rows, held_out in (
        (recipe.held_out_store, settings.held_out_rows, True),
        (recipe.store, settings.rows, False),
    ):
        encode_scenes(path, world, text_tokenizer, image_tokenizer, settings, rows=rows, held_out=held_out)
        print(path)
    return 0
