"""``cogview scenes``: make the emoji world."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cogview.cli.recipes import add_recipe_arguments, open_recipe
from cogview.emoji.things import EmojiFiles
from cogview.emoji.world import EmojiWorld, WorldSettings
from cogview.image_io.contact_sheet import contact_sheet

SHEET_SCENES = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_recipe_arguments(parser, "scenes")
    files = EmojiFiles()
    parser.add_argument("--font", type=Path, default=files.font, help="the Noto Color Emoji font")
    parser.add_argument(
        "--annotations", type=Path, nargs="+", default=files.annotations, help="CLDR's Chinese names, two files zh.xml"
    )
    parser.add_argument("--emoji-test", type=Path, default=files.emoji_test, help="Unicode's emoji-test.txt")


def run(args: argparse.Namespace) -> int:
    """Draw the things, save the world and a sheet of scenes."""
    recipe = open_recipe(args)
    settings = recipe.settings(WorldSettings, "scenes")
    files = EmojiFiles(font=args.font, annotations=tuple(args.annotations), emoji_test=args.emoji_test)
    world = EmojiWorld.create(settings, files)
    world.save(recipe.world)
    scenes = [world.sample(0, index) for index in range(SHEET_SCENES)]
    contact_sheet([world.render(scene, index) for index, scene in enumerate(scenes)]).save(recipe.world / "scenes.png")
    print(f"{len(world.things)} things, {settings.canvas} x {settings.canvas} pixels", file=sys.stderr)
    print(recipe.world)
    return 0
