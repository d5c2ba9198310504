"""``cogview scenes``: create the emoji world."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cogview.cli.messages import print_note
from cogview.cli.options import FILE, Command
from cogview.cli.recipes import recipe_options
from cogview.training.recipe import Recipe

SHEET_SCENES = 48


@click.command(cls=Command)
@recipe_options("scenes")
@click.option("--font", type=FILE, metavar="FILE", show_default="that of Debian", help="the Noto Color Emoji font")
@click.option(
    "--annotations",
    type=FILE,
    nargs=2,
    metavar="FILE FILE",
    show_default="those of Debian",
    help="Chinese names of the Unicode CLDR: the files zh.xml of annotations and annotationsDerived",
)
@click.option(
    "--emoji-test", type=FILE, metavar="FILE", show_default="that of Debian", help="list of emoji, emoji-test.txt"
)
def command(recipe: Recipe, font: Path | None, annotations: tuple[Path, Path] | None, emoji_test: Path | None) -> int:
    """Create the emoji world, and a sheet of its scenes; export scenes as pictures if the recipe asks for them."""
    from cogview.emoji.export import SceneRecipe, export_scenes
    from cogview.emoji.things import EmojiFiles
    from cogview.image_io.contact_sheet import contact_sheet
    from cogview.training.step_records import record_step

    settings = recipe.settings(SceneRecipe, "scenes")
    files = EmojiFiles()
    files = EmojiFiles(
        font=font or files.font,
        annotations=annotations or files.annotations,
        emoji_test=emoji_test or files.emoji_test,
    )
    world = settings.create(files)
    if settings.sprites is not None:
        print_note(f"{len(world.candidates)} objects have a sprite in {settings.sprites}")
    world.save(recipe.world)
    scenes = [world.sample_scene(0, index) for index in range(SHEET_SCENES)]
    contact_sheet([world.render(scene, index) for index, scene in enumerate(scenes)]).save(recipe.world / "scenes.png")
    if settings.exported:
        pictures, captions = export_scenes(world, settings, recipe.scene_pictures)
        print(f"{pictures} pictures with {captions} captions in {recipe.scene_pictures}", file=sys.stderr)
    record_step(recipe, "scenes", settings, recipe.world / "world.json")
    print(f"{len(world.things)} objects, {settings.canvas} x {settings.canvas} pixels", file=sys.stderr)
    print(recipe.world)
    return 0
