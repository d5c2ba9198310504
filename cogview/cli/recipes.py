"""Arguments and options that the commands of a recipe share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from cogview.cli.options import FILE, Decorator, argument, option_group, overrides_argument
from cogview.training.recipe import Recipe


def recipe_options(section_name: str | None, others: tuple[str, ...] = ()) -> Decorator:
    """Add RECIPE, overrides of the section that a command reads, and ``--work``; passed as ``recipe: Recipe``.

    Args:
        section_name: The section that KEY=VALUE arguments change; None for a command without them.
        others: Sections that the command reads as well, which SECTION.KEY=VALUE changes.
    """

    def build(path: Path, work: Path | None, overrides: tuple[str, ...] = ()) -> Recipe:
        recipe = Recipe.open(path, work)
        if section_name is None:
            return recipe
        found = {name: _of_section(name, overrides) for name in others}
        own = tuple(each for each in overrides if not each.startswith(tuple(f"{name}." for name in others)))
        return replace(recipe, overrides_by_section={section_name: own, **found})

    options: list[Decorator] = [
        argument("path", type=FILE, metavar="RECIPE", help="recipe file, or a name that `cogview recipes` lists"),
        click.option("--work", type=FILE, metavar="FOLDER", show_default="set by the recipe", help="results folder"),
    ]
    names = ["path", "work"]
    if section_name is not None:
        options.insert(1, overrides_argument(section_name))
        names.append("overrides")
    return option_group(build, "recipe", tuple(names), *options)


def _of_section(name: str, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Return KEY=VALUE of the overrides SECTION.KEY=VALUE of one section."""
    return tuple(each.removeprefix(f"{name}.") for each in overrides if each.startswith(f"{name}."))


def resume_option() -> Decorator:
    """Return ``--resume`` of training: auto or never."""
    return click.option(
        "--resume",
        type=click.Choice(["auto", "never"]),
        default="never",
        help="auto continues from the last checkpoint if there is one",
    )
