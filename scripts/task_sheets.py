"""Write the README's sheets of the other tasks of one model: captions, reranking, upscaling, completion.

    python scripts/task_sheets.py WORLD -o cogview/models/cogview-emoji

WORLD is the folder of ``cogview scenes``; its held-out scenes are the inputs of the model. Text is rendered with a font
that has Chinese characters (``apt-get install fonts-wqy-microhei``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cogview.cli.main import run_command
from cogview.cli.options import FILE, Command, argument, device_option, model_option, output_option
from cogview.emoji.evaluation.scenes import check_world, held_out_scenes
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.pipeline.cogview import CogView

FONT = Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc")
SIDE, GAP, LINE, TEXT_SIZE = 192, 12, 24, 18  # pixels
GREY = (232, 232, 232)
CANDIDATES = (
    "左边是狐狸，右边是红苹果，绿色背景",
    "左边是红苹果，右边是狐狸，绿色背景",
    "上面是狐狸，下面是红苹果，绿色背景",
    "左边是狐狸，右边是足球，绿色背景",
    "左边是狐狸，右边是红苹果，蓝色背景",
    "绿色背景上的两只狐狸",
    "绿色背景上的三个红苹果",
    "绿色背景上的一个足球",
)
COMPLETED = ("一只狐狸", "一个红苹果", "一只企鹅")


@dataclass(frozen=True)
class Tile:
    """An image and the lines below it."""

    image: np.ndarray  # uint8 (H, W, 3)
    lines: tuple[str, ...] = ()


def sheet(tiles: Sequence[Tile], columns: int, font: ImageFont.FreeTypeFont, side: int = SIDE) -> Image.Image:
    """Return the tiles in rows of ``columns``, every image ``side`` pixels wide, on white."""
    height = side + LINE * max(len(tile.lines) for tile in tiles) + GAP
    rows = -(-len(tiles) // columns)
    image = Image.new("RGB", (columns * (side + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(image)
    for number, tile in enumerate(tiles):
        left, top = GAP + number % columns * (side + GAP), GAP + number // columns * height
        image.paste(Image.fromarray(tile.image).resize((side, side), Image.Resampling.NEAREST), (left, top))
        for index, line in enumerate(tile.lines):
            draw.text((left, top + side + 2 + LINE * index), line, font=font, fill="black")
    return image


def headed(rows: Sequence[tuple[str, Image.Image]], font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return sheets below each other, each below its heading."""
    image = Image.new("RGB", (rows[0][1].width, sum(LINE + row.height for _, row in rows) + GAP), "white")
    draw, top = ImageDraw.Draw(image), GAP
    for heading, row in rows:
        draw.text((GAP, top), heading, font=font, fill="black")
        image.paste(row, (0, top + LINE))
        top += LINE + row.height
    return image


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> tuple[str, ...]:
    """Return ``text`` in lines of at most ``width`` pixels."""
    lines = [""]
    for character in text:
        if font.getlength(lines[-1] + character) > width:
            lines.append("")
        lines[-1] += character
    return tuple(lines)


def captions(model: CogView, world: EmojiWorld, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return held-out scenes with the captions of the model."""
    given = [world.render(scene, number) for number, (scene, _) in enumerate(held_out_scenes(world, 10, seed=7))]
    found = model.caption([Image.fromarray(image) for image in given])
    tiles = [
        Tile(image, (*wrapped(best.text, font, SIDE), f"log p = {best.log_probability:.1f}"))
        for image, (best,) in zip(given, found, strict=True)
    ]
    return sheet(tiles, 5, font)


def reranking(model: CogView, world: EmojiWorld, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return the same images ordered by their scores for two texts."""
    images = model.generate(CANDIDATES, seed=7)
    rows = []
    for text in CANDIDATES[:2]:
        scores = [score.log_probability for score in model.score(images, text)]
        order = sorted(range(len(images)), key=lambda number: -scores[number])
        tiles = [Tile(np.asarray(images[number]), (f"{scores[number]:.1f}",)) for number in order]
        rows.append((text, sheet(tiles, len(tiles), font, side=SIDE * 5 // len(tiles))))
    return headed(rows, font)


def upscaling(model: CogView, world: EmojiWorld, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return decoded codes of held-out scenes, their bicubic enlargement, the upscaled and the true large image."""
    asked = held_out_scenes(world, 4, seed=7)
    small = [Image.fromarray(world.render(scene, number)) for number, (scene, _) in enumerate(asked)]
    large = model.upscale(small, [caption for _, caption in asked], seed=7)
    tiles = []
    given = model.decode_images(model.encode_images(small))
    for number, ((scene, _), decoded, upscaled) in enumerate(zip(asked, given, large, strict=True)):
        enlarged = Image.fromarray(decoded).resize(upscaled.size, Image.Resampling.BICUBIC)
        four = (decoded, np.asarray(enlarged), np.asarray(upscaled), world.render(scene, number, scale=2))
        tiles += [
            Tile(image, (title,))
            for image, title in zip(four, ("given", "bicubic", "cogview upscale", "true"), strict=True)
        ]
    return sheet(tiles, 4, font, side=256)


def completion(model: CogView, world: EmojiWorld, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return an image, its upper half, and completions of that half for its text and for others."""
    (image,) = model.generate(f"蓝色背景上的{COMPLETED[0]}", seed=7)
    half = np.asarray(image).copy()
    half[len(half) // 2 :] = GREY
    tiles = [Tile(np.asarray(image), ("image",)), Tile(half, ("given",))]
    for text in COMPLETED:
        (completed,) = model.complete([image], f"蓝色背景上的{text}", rows=model.config.grid // 2, seed=7)
        tiles.append(Tile(np.asarray(completed), (f"蓝色背景上的{text}",)))
    return sheet(tiles, len(tiles), font)


SHEETS = {"captions": captions, "reranking": reranking, "upscaling": upscaling, "completion": completion}


@click.command(cls=Command)
@argument("world", type=FILE, metavar="WORLD", help="folder of the emoji world")
@model_option()
@click.option(
    "--font", "font_file", type=FILE, default=FONT, metavar="FILE", help="TrueType font with Chinese characters"
)
@device_option()
@output_option(help="folder for the sheets")
def command(world: Path, model: str, font_file: Path, device: str, output: Path) -> int:
    """Write the README's sheets of captions, reranking, upscaling and completion."""
    if not font_file.is_file():
        raise InputError(f"font {font_file} does not exist; install the package fonts-wqy-microhei, or give --font")
    scenes = EmojiWorld.load(world)
    opened = CogView.from_pretrained(model, device=device)
    for task in ("caption", "upscale"):
        opened.require_task(task)
    check_world(opened, scenes)
    try:
        font = ImageFont.truetype(str(font_file), TEXT_SIZE)
    except OSError as error:
        raise InputError(f"{font_file} cannot be read as a font ({error}); give a TrueType font by --font") from None
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in SHEETS.items():
        path = output / f"{name}.png"
        draw(opened, scenes, font).quantize(256).save(path, optimize=True)
        print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    return run_command(command, argv, "task_sheets.py")


if __name__ == "__main__":
    sys.exit(main())
