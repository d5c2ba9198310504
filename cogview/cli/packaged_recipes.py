"""``cogview recipes``: list the recipes that come with the package, or print one."""

from __future__ import annotations

from pathlib import Path

import click

from cogview.cli.options import Command, argument
from cogview.formatting import shorten

LINE_WIDTH = 80  # characters of a recipe's first line


@click.command(cls=Command)
@argument("name", required=False, metavar="NAME", help="a recipe to print; without it, all are listed")
def command(name: str | None) -> int:
    """List the recipes that come with the package, or print one.

    The commands that read a recipe take the name as well as a file: cogview train emoji-cpu. To change a recipe, print
    it into a file first: cogview recipes emoji-cpu > mine.yaml.
    """
    from cogview.training.recipe import find_recipe, packaged_recipes

    if name is not None:
        print(find_recipe(Path(name)).read_text(encoding="utf-8"), end="")
        return 0
    known = packaged_recipes()
    width = max(map(len, known))
    for recipe, path in known.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        print(f"{recipe:{width}}  {shorten(first, LINE_WIDTH)}")
    return 0
