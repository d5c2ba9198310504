"""The pictures that a VQ-VAE is trained on, as a recipe names them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

from cogview.config_io import to_mapping
from cogview.data.builders.picture_index import PictureIndex, divide, make_index, read_index
from cogview.data.sources.pictures import picture_records
from cogview.files import atomic_write, json_line
from cogview.training.vqvae_recipe import VQVAERecipe


def indexed_pictures(
    path: Path, recipe: VQVAERecipe, *, resumes: bool, on_note: Callable[[str], object]
) -> PictureIndex:
    """Return the pictures of a recipe with ``pictures``.

    Args:
        path: File of the index. It is read where a training is resumed, and written anew otherwise.
        recipe: The recipe.
        resumes: Whether a training is resumed.
        on_note: Called with a line about what was guessed, or is read again.

    Raises:
        InputError: A source cannot be read.
    """
    settings = {"pictures": list(map(str, recipe.pictures)), "table": to_mapping(recipe.table)}
    pictures = read_index(path, settings) if resumes else None
    if pictures is None:
        if resumes:
            on_note("the pictures are listed anew, since the recipe names others than the training was started with")
        records = chain.from_iterable(picture_records(source, recipe.table, on_note) for source in recipe.pictures)
        pictures = make_index(path, settings, records, recipe.num_workers, on_note)
    return divide(pictures, recipe.held_out)


def write_left_out(path: Path, index: PictureIndex) -> None:
    """Write a report of the pictures that are left out: lines of JSON with file and reason.

    Args:
        path: The report.
        index: The pictures.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.writelines(json_line({"file": name, "reason": reason}) for name, reason in index.left_out)
