"""``cogview eval image-tokenizer``: measure the reconstructions of an image tokenizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.messages import print_note
from cogview.cli.options import (
    FILE,
    Command,
    argument,
    device_option,
    max_batch_size_option,
    output_option,
)
from cogview.errors import ExitStatus, InputError
from cogview.formatting import plural

if TYPE_CHECKING:
    import numpy as np

    from cogview.vqvae.model import VQVAE

SIDE = 64  # pixels, of a tokenizer without its model
SHEET_FILE = "reconstructions.png"
COLUMNS = 12  # of the sheet


@click.command(name="image-tokenizer", cls=Command)
@argument("folder", metavar="FOLDER", help="image tokenizer, or name or folder of a model with one")
@argument(
    "pictures",
    nargs=-1,
    required=True,
    type=FILE,
    metavar="PICTURES",
    help="pictures; folders, with those below them; tables, COCO files or tar shards",
)
@click.option(
    "--side",
    type=click.IntRange(min=16, max=4096),
    metavar="PIXELS",
    show_default=f"that of the model, or {SIDE}",
    help="side of the squares that pictures are fitted into",
)
@click.option(
    "--fit",
    type=click.Choice(["crop", "pad", "stretch"]),
    default="crop",
    help="how a picture becomes a square: crop its longer side, pad the shorter one with white, or stretch",
)
@output_option(default=SHEET_FILE, metavar="FILE", help="PNG file of the sheet of reconstructions, or a folder for it")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@max_batch_size_option("pictures")
@device_option()
def image_tokenizer(
    folder: str,
    pictures: tuple[Path, ...],
    side: int | None,
    fit: str,
    output: Path,
    as_json: bool,
    max_batch_size: int | None,
    device: str,
) -> int:
    """Measure reconstructions of pictures.

    Prints PSNR, SSIM, codes in use and perplexity, and saves a sheet of pictures above their reconstructions. Take
    pictures that the image tokenizer was not trained on. PSNR is that of all pixels; p05 and median are of single
    pictures.
    """
    from cogview.data.image_dataset import check_side
    from cogview.device import choose_placement
    from cogview.evaluation.reconstruction import ReconstructionReport
    from cogview.image_io.contact_sheet import contact_sheet
    from cogview.image_io.png import prepare_folder, save_png

    model, own_side = open_tokenizer(folder)
    side = side or own_side
    check_side(side, model.downsampling)
    model.to(choose_placement(device).device)
    report = ReconstructionReport(model=model)
    left_out: list[str] = []
    for batch in _batches(model, _fitted(pictures, side, fit, left_out), side // model.downsampling, max_batch_size):
        report.add(batch)
    if not report.psnr:
        raise InputError(f"none of {plural(len(left_out), 'picture')} can be used; the first: {left_out[0]}")
    found = report.summary()
    columns = min(COLUMNS, len(report.shown))
    if output.is_dir():
        output /= SHEET_FILE
    prepare_folder(output.parent)
    sheet = contact_sheet(report.sheet_images(columns), columns=columns, scale=2 if side <= 2 * SIDE else 1)
    saved = save_png(output, sheet, {"image_tokenizer": Path(folder).name})
    facts = {"image_tokenizer": folder, "side": side, "fit": fit, **found, "left_out": len(left_out)}
    if as_json:
        print(json.dumps({**facts, "sheet": str(saved)}, ensure_ascii=False))
    else:
        print(f"{plural(found['pictures'], 'picture')} of {side} x {side} pixels")
        print(f"PSNR {found['psnr']:.2f} dB (p05 {found['psnr_p05']:.2f}, median {found['psnr_median']:.2f})")
        print(f"SSIM {found['ssim']:.4f}")
        print(f"codes in use: {found['codes_used']:.1%} of {found['codes']}, perplexity {found['perplexity']:.0f}")
        print(saved)
    for reason in left_out:
        print(f"failed: {reason}", file=sys.stderr)
    return ExitStatus.of(found["pictures"], len(left_out))


def open_tokenizer(name: str) -> tuple[VQVAE, int]:
    """Return an image tokenizer and the side of the images of its model, which is ``SIDE`` without a model.

    Args:
        name: Folder of an image tokenizer, or name or folder of a model with one.

    Raises:
        InputError: There is none.
    """
    from cogview.checkpoints.checkpoint import read_config
    from cogview.checkpoints.image_tokenizer import load_image_tokenizer
    from cogview.checkpoints.registry import resolve_checkpoint

    folder = resolve_checkpoint(name)
    if not (folder / "image").is_dir():
        return load_image_tokenizer(folder), SIDE
    model = load_image_tokenizer(folder / "image")
    side = read_config(folder).grid * model.downsampling if (folder / "config.json").is_file() else SIDE
    return model, side


def _fitted(sources: tuple[Path, ...], side: int, fit: str, left_out: list[str]) -> Iterator[np.ndarray]:
    """Yield pictures as uint8 RGB (side, side, 3); add the reason for each that cannot be read to ``left_out``."""
    from tqdm import tqdm

    from cogview.data.builders.prepare import fit_picture
    from cogview.data.sources.pictures import picture_records
    from cogview.data.sources.tables import TableOptions
    from cogview.image_io.reading import read_image

    records = list(chain.from_iterable(picture_records(path, TableOptions(), print_note) for path in sources))
    for record in tqdm(records, unit="picture", desc="reconstructing", disable=None, leave=False):
        if record.file is None:
            left_out.append(f"{record.name}: {record.problem}")
            continue
        try:
            image = read_image(Path(record.name), content=record.file.read_part())
            yield fit_picture(image, side, fit)  # type: ignore[arg-type]  # click has checked the choice
        except InputError as error:
            left_out.append(str(error))


def _batches(model: VQVAE, images: Iterator[np.ndarray], side: int, max_batch_size: int | None) -> Iterator[np.ndarray]:
    """Yield images in batches that fit in memory, uint8 (N, H, W, 3).

    Args:
        model: The image tokenizer, on its device.
        images: The images.
        side: Codes on a side of an image.
        max_batch_size: Maximum number of images; None for as many as fit.
    """
    from itertools import islice

    import numpy as np

    from cogview.cli.data import planned_batch_size

    size = planned_batch_size(model, side, max_batch_size, decoding=True)
    while batch := list(islice(images, size)):
        yield np.stack(batch)
