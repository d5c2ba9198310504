"""What the commands of a recipe share: its file, its work folder, overrides, and where each step leaves its result."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cogview.cli.options import FILE, Decorator, argument, option_group, overrides_argument
from cogview.config_io import from_mapping, read_recipe, section
from cogview.errors import InputError
from cogview.tokenizers.text import TextTokenizer

if TYPE_CHECKING:
    from cogview.vqvae.model import VQVAE

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """A recipe file. Every step finds what earlier steps made at a fixed place below ``work``."""

    path: Path
    sections: Mapping[str, Any]
    overrides: tuple[str, ...]
    work: Path

    @property
    def world(self) -> Path:
        """The emoji world."""
        return self.work / "world"

    @property
    def text_model(self) -> Path:
        """The text tokenizer."""
        return self.work / "text.model"

    @property
    def image_run(self) -> Path:
        """The run folder of the VQ-VAE."""
        return self.work / "image-run"

    @property
    def image_tokenizer(self) -> Path:
        """The trained VQ-VAE."""
        return self.work / "image"

    @property
    def store(self) -> Path:
        """Token rows for training."""
        return self.work / "store"

    @property
    def held_out_store(self) -> Path:
        """Token rows of held-out scenes."""
        return self.work / "held-out-store"

    @property
    def transformer_run(self) -> Path:
        """The run folder of the transformer."""
        return self.work / "transformer-run"

    def open_text_tokenizer(self) -> TextTokenizer:
        """The text tokenizer; InputError where there is none yet."""
        try:
            return TextTokenizer.load(self.text_model)
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"{error}; make it with: cogview train-text {self.path}") from None

    def open_image_tokenizer(self) -> VQVAE:
        """The trained VQ-VAE, on the CPU; InputError where there is none yet."""
        from cogview.checkpoints.image_tokenizer import load_image_tokenizer

        if not self.image_tokenizer.is_dir():
            raise InputError(
                f"there is no image tokenizer at {self.image_tokenizer}; make it with: cogview train-image {self.path}"
            )
        return load_image_tokenizer(self.image_tokenizer)

    def section(self, name: str) -> dict[str, Any]:
        """Section ``name`` as plain values, changed by the command line's ``key=value``."""
        return section(self.sections, name, self.overrides)

    def settings(self, kind: type[T], name: str) -> T:
        """Section ``name`` as the dataclass ``kind``."""
        return from_mapping(kind, self.section(name), where=f"section {name} of {self.path}")


def recipe_options(section_name: str | None) -> Decorator:
    """Add RECIPE, overrides of the section that a command reads, and ``--work``; passed as ``recipe: Recipe``.

    Args:
        section_name: The section that KEY=VALUE arguments change; None for a command without them.
    """

    def build(path: Path, work: Path | None, overrides: tuple[str, ...] = ()) -> Recipe:
        return open_recipe(argparse.Namespace(recipe=path, work=work, overrides=overrides))

    options: list[Decorator] = [
        argument("path", type=FILE, metavar="RECIPE", help="recipe file, such as scripts/recipes/emoji-cpu.yaml"),
        click.option("--work", type=FILE, metavar="FOLDER", show_default="set by the recipe", help="results folder"),
    ]
    names = ["path", "work"]
    if section_name is not None:
        options.insert(1, overrides_argument(section_name))
        names.append("overrides")
    return option_group(build, "recipe", tuple(names), *options)


def resume_option() -> Decorator:
    """Return ``--resume`` of training: auto or never."""
    return click.option(
        "--resume",
        type=click.Choice(["auto", "never"]),
        default="never",
        help="auto continues from the last checkpoint if there is one",
    )


def add_recipe_arguments(parser: argparse.ArgumentParser, section_name: str | None) -> None:
    """RECIPE, and overrides of the section that the command reads, if there is one."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, as scripts/recipes/emoji-cpu.yaml")
    if section_name is not None:
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar="KEY=VALUE",
            help=f"changes to the section {section_name} of the recipe; inner keys with dots",
        )
    parser.add_argument("--work", type=Path, help="folder of the results (default: the recipe's)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """--resume and --device."""
    parser.add_argument(
        "--resume",
        choices=["auto", "never"],
        default="never",
        help="auto: go on from the last checkpoint, or begin if there is none",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def open_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the command line names."""
    sections = read_recipe(args.recipe)
    work = args.work or sections.get("work")
    if not isinstance(work, str | Path):
        raise InputError(f"{args.recipe} names no folder for its results: expected work: FOLDER, or give --work")
    return Recipe(path=args.recipe, sections=sections, overrides=tuple(getattr(args, "overrides", ())), work=Path(work))
