"""``cogview eval image-tokenizer``: measure the reconstructions of an image tokenizer."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
from cogview.cli.result_file import check_result_path
from cogview.errors import ExitStatus, InputError
from cogview.formatting import plural

if TYPE_CHECKING:
    import numpy as np

    from cogview.evaluation.reconstruction import ReconstructionReport
    from cogview.vqvae.model import VQVAE

SIDE = 64  # pixels, of a tokenizer without its model
SHEET_FILE = "reconstructions.png"
COLUMNS = 12  # of the sheet


class MeasuredPicture(NamedTuple):
    """A picture that was reconstructed: name of its file, and SHA-256 of its content."""

    name: str
    sha256: str


@click.command(name="image-tokenizer", cls=Command, keeps_results=False)
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
    pictures. A result file with a manifest is written beside the sheet.
    """
    from cogview.data.image_dataset import check_side
    from cogview.device import choose_placement
    from cogview.evaluation.reconstruction import ReconstructionReport
    from cogview.image_io.contact_sheet import contact_sheet
    from cogview.image_io.png import prepare_folder, save_png

    if output.is_dir():
        output /= SHEET_FILE
    check_result_path(output.with_suffix(".json"))
    model, own_side = open_tokenizer(folder)
    side = side or own_side
    check_side(side, model.downsampling)
    model.to(choose_placement(device).device)
    report = ReconstructionReport(model=model)
    left_out: list[str] = []
    measured: list[MeasuredPicture] = []
    for batch in _batches(
        model, _fitted(pictures, side, fit, (measured, left_out)), side // model.downsampling, max_batch_size
    ):
        report.add(batch)
    if not report.psnr:
        raise InputError(f"none of {plural(len(left_out), 'picture')} can be used; the first: {left_out[0]}")
    found = report.summary()
    columns = min(COLUMNS, len(report.shown))
    prepare_folder(output.parent)
    sheet = contact_sheet(report.sheet_images(columns), columns=columns, scale=2 if side <= 2 * SIDE else 1)
    saved = save_png(output, sheet, {"image_tokenizer": Path(folder).name})
    result = saved.with_suffix(".json")
    write_tokenizer_result(result, folder, (side, fit), report, measured)
    facts = {"image_tokenizer": folder, "side": side, "fit": fit, **found, "left_out": len(left_out)}
    if as_json:
        print(json.dumps({**facts, "sheet": str(saved), "result": str(result)}, ensure_ascii=False))
    else:
        print(f"{plural(found['pictures'], 'picture')} of {side} x {side} pixels")
        print(f"PSNR {found['psnr']:.2f} dB (p05 {found['psnr_p05']:.2f}, median {found['psnr_median']:.2f})")
        print(f"SSIM {found['ssim']:.4f}")
        print(f"codes in use: {found['codes_used']:.1%} of {found['codes']}, perplexity {found['perplexity']:.0f}")
        print(f"{saved}\n{result}")
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

    folder, own = resolve_checkpoint(name), tokenizer_folder(name)
    model = load_image_tokenizer(own)
    has_model = own != folder and (folder / "config.json").is_file()
    return model, read_config(folder).grid * model.downsampling if has_model else SIDE


def tokenizer_folder(name: str) -> Path:
    """Return the folder of an image tokenizer: that of ``name``, or ``image`` in it."""
    from cogview.checkpoints.registry import resolve_checkpoint

    folder = resolve_checkpoint(name)
    return folder / "image" if (folder / "image").is_dir() else folder


def write_tokenizer_result(
    path: Path,
    name: str,
    fitting: tuple[int, str],
    report: ReconstructionReport,
    measured: Sequence[MeasuredPicture],
) -> None:
    """Write the result file of reconstructions.

    Args:
        path: The file.
        name: Name or folder of the image tokenizer.
        fitting: Side of the squares in pixels, and how pictures were fitted into them.
        report: The measures.
        measured: The pictures, in their order.
    """
    from cogview.evaluation.manifest import Manifest, ResizeRecord, hash_set, write_result
    from cogview.evaluation.model_record import (
        describe_hardware,
        describe_image_tokenizer,
        describe_versions,
    )

    side, fit = fitting
    manifest = Manifest(
        measure="image-tokenizer",
        reference=hash_set("pictures", [each.sha256 for each in measured]),
        resize=ResizeRecord(side=side, filter="lanczos", antialias=True, fit=fit),
        model=describe_image_tokenizer(name, tokenizer_folder(name)),
        versions=describe_versions("pillow"),
        hardware=describe_hardware(report.model.codebook.device),
    )
    seen: Counter[str] = Counter()
    ids = []
    for each in measured:
        seen[each.sha256] += 1
        ids.append(f"{each.sha256}-{seen[each.sha256]}")
    items = {"ids": ids, "labels": [each.name for each in measured], "values": report.item_values()}
    write_result(path, manifest, report.result_values(), items)


def _fitted(
    sources: tuple[Path, ...], side: int, fit: str, lists: tuple[list[MeasuredPicture], list[str]]
) -> Iterator[np.ndarray]:
    """Yield pictures as uint8 RGB (side, side, 3).

    Args:
        sources: Pictures, folders, tables or shards.
        side: Pixels of a side.
        fit: How a picture becomes a square.
        lists: Lists to extend: the pictures, and the reason for each that cannot be read.
    """
    measured, left_out = lists
    from tqdm import tqdm

    from cogview.data.builders.prepare import fit_picture
    from cogview.data.sources.pictures import picture_records
    from cogview.data.sources.tables import TableOptions
    from cogview.files import file_sha256
    from cogview.image_io.reading import read_image

    records = list(chain.from_iterable(picture_records(path, TableOptions(), print_note) for path in sources))
    for record in tqdm(records, unit="picture", desc="reconstructing", disable=None, leave=False):
        if record.file is None:
            left_out.append(f"{record.name}: {record.problem}")
            continue
        try:
            content = record.file.read_part()
            image = fit_picture(
                read_image(Path(record.name), content=content),
                side,
                fit,  # type: ignore[arg-type]  # click has checked the choice
            )
        except InputError as error:
            left_out.append(str(error))
            continue
        sha256 = file_sha256(Path(record.name)) if content is None else hashlib.sha256(content).hexdigest()
        measured.append(MeasuredPicture(Path(record.name).name, sha256))
        yield image


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
