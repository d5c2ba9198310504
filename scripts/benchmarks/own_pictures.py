"""Measure whether a model draws its training pictures back from their captions: a measure of memory, not of skill.

Each distinct caption of the training pictures is generated once. The nearest picture is that with the smallest mean
squared error at the size of the model, among all pictures of the recipe, the held-out ones included. An image is right
if the nearest picture has its caption: where several pictures share a caption, each of them is right. The same is
measured on reconstructions of the pictures, which the generated images can hardly surpass.

    python scripts/benchmarks/own_pictures.py RECIPE [--model FOLDER] [-o SHEET.png] [--json FILE]

RECIPE is one of pictures whose steps have run (``cogview run``); its section ``encode`` names the pictures. The sheet
shows a part of the captions: the picture, its reconstruction, and the generated image.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from cogview import CogView
from cogview.cli.main import run_command
from cogview.cli.messages import print_note
from cogview.cli.options import Command
from cogview.cli.recipes import recipe_options
from cogview.data.builders.prepare import PicturePreparer, PreparedPicture, is_held_out
from cogview.data.sources.open import open_source
from cogview.errors import InputError
from cogview.evaluation.metrics import accuracy, format_accuracy, pixel_distances
from cogview.files import read_json_lines, write_json
from cogview.image_io.captioned_sheet import captioned_sheet
from cogview.training.picture_encoding import PictureEncodeSettings
from cogview.training.recipe import Recipe
from cogview.vqvae.codec import psnr, reconstruct

SEED = 0
SHOWN = 48  # captions on the sheet

Generator = Callable[[Sequence[str]], Sequence[np.ndarray]]  # captions to uint8 RGB (H, H, 3), one each
Reconstructor = Callable[[np.ndarray], np.ndarray]  # uint8 RGB (N, H, H, 3) to the same


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownPicture:
    """A picture of the recipe. Copies of it are the same picture.

    Attributes:
        image: uint8 RGB (H, H, 3), at the size of the model.
        captions: Its captions, normalized.
        held_out: Whether the model was not trained on it.
    """

    image: np.ndarray
    captions: tuple[str, ...]
    held_out: bool


def merged(prepared: Iterable[PreparedPicture], held_out: float) -> list[KnownPicture]:
    """Return pictures without copies; a picture has the captions of all its copies.

    Args:
        prepared: Pictures as they are encoded; those that cannot be used are ignored.
        held_out: Share of the pictures that are held out, by the hash of their pixels.
    """
    images: dict[str, np.ndarray] = {}
    captions: dict[str, dict[str, None]] = defaultdict(dict)
    for picture in prepared:
        if picture.digest:
            images.setdefault(picture.digest, picture.images["image"])
            captions[picture.digest].update(dict.fromkeys(picture.captions))
    return [
        KnownPicture(image=image, captions=tuple(captions[digest]), held_out=is_held_out(digest, held_out))
        for digest, image in images.items()
    ]


def nearest(images: Sequence[np.ndarray], pictures: Sequence[KnownPicture]) -> np.ndarray:
    """Return the index of the nearest picture of each image, by the mean squared error of the pixels."""
    indices: np.ndarray = pixel_distances(images, [picture.image for picture in pictures]).argmin(axis=1)
    return indices


def evenly_chosen(captions: Sequence[str], count: int | None) -> list[str]:
    """Return ``count`` of the captions, as far apart as can be; all of them if it is None or there are no more."""
    if count is None or count >= len(captions):
        return list(captions)
    return [captions[index * len(captions) // count] for index in range(count)]


def measure(
    pictures: Sequence[KnownPicture], generate: Generator, reconstruct_all: Reconstructor, count: int | None = None
) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """Generate every caption of the training pictures and look for the nearest pictures.

    Args:
        pictures: All pictures.
        generate: Generates an image of each caption.
        reconstruct_all: Encodes and decodes images.
        count: Captions to generate, evenly chosen; None for all.

    Returns:
        The measures, and the generated image of each caption.
    """
    trained = [picture for picture in pictures if not picture.held_out]
    captions = evenly_chosen(list(dict.fromkeys(chain.from_iterable(picture.captions for picture in trained))), count)
    generated = dict(zip(captions, generate(captions), strict=True))
    found = nearest([generated[caption] for caption in captions], pictures)
    right = [caption in pictures[index].captions for caption, index in zip(captions, found, strict=True)]
    shared = sum(sum(caption in picture.captions for picture in trained) > 1 for caption in captions)
    restored = reconstruct_all(np.stack([picture.image for picture in trained]))
    own = nearest(restored, pictures)
    quality = [psnr(picture.image, image) for picture, image in zip(trained, restored, strict=True)]
    report = {
        "pictures": len(pictures),
        "training_pictures": len(trained),
        "captions": len(captions),
        "captions_of_several_pictures": shared,
        "nearest_is_own": accuracy(sum(right), len(right)),
        "nearest_of_reconstructions": accuracy(
            sum(pictures[index] is picture for index, picture in zip(own, trained, strict=True)), len(trained)
        ),
        "reconstruction_psnr_median": round(float(np.median(quality)), 2),
        "wrong": [caption for caption, is_right in zip(captions, right, strict=True) if not is_right],
    }
    return report, generated


def sheet_of(
    pictures: Sequence[KnownPicture],
    generated: Mapping[str, np.ndarray],
    reconstruct_all: Reconstructor,
) -> Image.Image:
    """Return a sheet of evenly chosen captions: the picture, its reconstruction, and the generated image."""
    own = {
        caption: picture.image for picture in reversed(pictures) if not picture.held_out for caption in picture.captions
    }
    captions = evenly_chosen(list(generated), SHOWN)
    restored = reconstruct_all(np.stack([own[caption] for caption in captions]))
    return captioned_sheet(
        [
            (caption, [Image.fromarray(one) for one in (own[caption], image, generated[caption])])
            for caption, image in zip(captions, restored, strict=True)
        ],
        print_note,
    )


def held_out_losses(recipe: Recipe) -> dict[str, float]:
    """Return the first, lowest and last held-out loss of the generated codes, in nats per code."""
    losses = [
        line["validation_generate_image_loss"]
        for line in read_json_lines(recipe.transformer_run / "metrics.jsonl")
        if "validation_generate_image_loss" in line
    ]
    return {"first": losses[0], "lowest": min(losses), "last": losses[-1]} if losses else {}


@click.command(cls=Command)
@recipe_options("encode")
@click.option("--model", metavar="FOLDER", help="the model; without it, the packaged one of the recipe")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="own-pictures.png", show_default=True, help="the sheet"
)
@click.option("--json", "report_file", type=click.Path(path_type=Path), help="also write the measures to this file")
@click.option(
    "--captions", "count", type=click.IntRange(min=1), help="captions to generate, evenly chosen; without it, all"
)
@click.option("--temperature", type=float, help="sampling temperature; without it, that of the model")
def command(
    recipe: Recipe,
    model: str | None,
    output: Path,
    report_file: Path | None,
    count: int | None,
    temperature: float | None,
) -> int:
    """Measure how many captions of the training pictures are drawn as their own picture."""
    settings = recipe.settings(PictureEncodeSettings, "encode")
    drawer = CogView.from_pretrained(model or str(recipe.work / "model"), device="cpu")
    preparer = PicturePreparer(drawer.text_tokenizer, settings, settings.side, drawer.config.grid)
    records = chain.from_iterable(open_source(source, settings.table, print_note) for source in settings.pictures)
    prepared = [preparer[record] for record in records]
    pictures = merged(prepared, settings.held_out)
    if all(picture.held_out for picture in pictures):
        reasons = [f"{picture.record.name}: {reason}" for picture in prepared for reason in picture.left_out]
        raise InputError(f"none of the recipe's training pictures can be used; the first: {[*reasons, '-'][0]}")

    def generate(captions: Sequence[str]) -> list[np.ndarray]:
        overrides = {} if temperature is None else {"temperature": temperature}
        return [np.asarray(image) for image in drawer.generate(captions, seed=SEED, **overrides)]

    reconstruct_all = partial(reconstruct, drawer.image_tokenizer)
    report, generated = measure(pictures, generate, reconstruct_all, count)
    sheet_of(pictures, generated, reconstruct_all).save(output)
    report["held_out_loss"] = held_out_losses(recipe)
    if report_file is not None:
        write_json(report_file, report, indent=1)
    print(f"{report['training_pictures']} training pictures of {report['pictures']}")
    print(f"{report['captions']} captions, {report['captions_of_several_pictures']} of them of several pictures")
    print(f"nearest picture has the caption: {format_accuracy(report['nearest_is_own'])}")
    print(f"nearest picture of reconstructions is their own: {format_accuracy(report['nearest_of_reconstructions'])}")
    print(f"reconstruction: median {report['reconstruction_psnr_median']:.2f} dB")
    print("held-out loss, nats per code: " + ", ".join(f"{k} {v:.3f}" for k, v in report["held_out_loss"].items()))
    print(output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    return run_command(command, argv, "own_pictures.py")


if __name__ == "__main__":
    sys.exit(main())
