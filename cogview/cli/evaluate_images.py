"""``cogview eval images``: distances between sets of pictures, and measures of pairs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from cogview.cli.finite_range import FiniteRange
from cogview.cli.messages import print_note
from cogview.cli.options import FILE, Command, argument, device_option, model_option, option_group, output_option
from cogview.cli.result_file import check_result_path
from cogview.errors import ExitStatus, InputError
from cogview.formatting import aligned_columns, plural

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from cogview.evaluation.image_sets import ImageSet
    from cogview.evaluation.image_statistics import SquareResize
    from cogview.evaluation.manifest import Manifest, ResultItems, ResultValue
    from cogview.vqvae.model import VQVAE

    _Measured: TypeAlias = tuple[Manifest, dict[str, ResultValue], ResultItems | None, tuple[str, ...]]

RESULT_FILE = "images.json"
NETWORK = "efficientnet-lite0"
TITLES = {
    "fid": "Fréchet distance",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception Score",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS",
}


@dataclass(frozen=True, kw_only=True)
class ImageMeasureOptions:
    """What is measured, and the protocol."""

    pairs: bool
    network: str | None
    weights: Path | None
    lpips: Path | None
    side: int | None
    filter: Any
    fit: Any
    blur_sigma: float
    blur: str
    seed: int
    sample: int
    workers: int


NETWORK_OPTIONS = (
    click.option(
        "--network",
        metavar="NAME",
        show_default=NETWORK,
        help="feature network: efficientnet-lite0, inception, stub, or a model whose image tokenizer encodes",
    ),
    click.option(
        "--weights", type=FILE, metavar="FILE", help="weights of the network inception, or efficientnet-lite0"
    ),
)
_OPTIONS = option_group(
    ImageMeasureOptions,
    "options",
    tuple(ImageMeasureOptions.__annotations__),
    click.option("--pairs", is_flag=True, help="measure pairs of the same names: PSNR, SSIM and MS-SSIM"),
    *NETWORK_OPTIONS,
    click.option(
        "--lpips",
        type=FILE,
        metavar="FILE",
        help="with --pairs: measure LPIPS as well, by these weights of AlexNet, as of torchvision",
    ),
    click.option(
        "--side",
        type=click.IntRange(min=8, max=4096),
        metavar="PIXELS",
        show_default="that of the network; pairs keep their size",
        help="side of the squares that pictures are resized to",
    ),
    click.option(
        "--filter",
        type=click.Choice(["bicubic", "lanczos", "bilinear", "box"]),
        default="bicubic",
        help="filter of resizing, with antialiasing",
    ),
    click.option(
        "--fit",
        type=click.Choice(["crop", "pad", "stretch"]),
        default="crop",
        help="how a picture becomes a square: crop its longer side, pad the shorter one with white, or stretch",
    ),
    click.option(
        "--blur-sigma",
        type=FiniteRange(min=0, max=64),
        default=0,
        metavar="SIGMA",
        help="standard deviation, in pixels, of a Gaussian blur after resizing; 0 disables",
    ),
    click.option(
        "--blur", type=click.Choice(["both", "reference"]), default="both", help="which pictures --blur-sigma blurs"
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, metavar="NUMBER", help="random seed of subsets"),
    click.option(
        "--sample",
        type=click.IntRange(min=2),
        default=10_000,
        metavar="COUNT",
        help="maximum number of pictures of a set that KID, precision and recall use",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=0, max=1024),
        default=0,
        metavar="COUNT",
        help="processes that read pictures ahead; the values are the same",
    ),
)


@click.command(name="images", cls=Command, keeps_results=False)
@argument("candidate", type=FILE, metavar="A", help="pictures to measure: a folder, .tar shards, or a token store")
@argument("reference", type=FILE, metavar="B", help="reference pictures, alike")
@_OPTIONS
@model_option(default=None, show_default="none", help="model whose image tokenizer decodes token stores")
@device_option()
@output_option(default=RESULT_FILE, metavar="FILE", help="result file, or a folder for it")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def images(
    candidate: Path,
    reference: Path,
    options: ImageMeasureOptions,
    model: str | None,
    device: str,
    output: Path,
    as_json: bool,
) -> int:
    """Measure pictures against reference pictures.

    Prints the Fréchet distance of features (FID), KID, precision, recall and the Inception Score, or, with --pairs,
    PSNR, SSIM, MS-SSIM and LPIPS. Writes a result file with the protocol.
    """
    from cogview.device import choose_placement
    from cogview.evaluation.image_sets import is_store, open_image_set
    from cogview.evaluation.manifest import write_result
    from cogview.image_io.png import prepared_folder

    _refuse_unused(options)
    placement = choose_placement(device).device
    if output.is_dir():
        output /= RESULT_FILE
    check_result_path(output)
    if model is not None and not any(is_store(path) for path in (candidate, reference)):
        raise InputError(f"--model decodes token stores, and {candidate} and {reference} are none: leave it out")
    opened = [open_image_set(path, lambda: _tokenizer(model, placement)) for path in (candidate, reference)]
    measure = _measure_pairs if options.pairs else _measure_sets
    manifest, results, items, problems = measure(opened, options, placement)
    with prepared_folder(output.parent):
        write_result(output, manifest, results, items)
    if as_json:
        values: dict[str, Any] = {name: value.value for name, value in results.items()}
        values["intervals"] = {name: [row.low, row.high] for name, row in results.items() if row.low is not None}
        if "rank_deficient" in manifest.settings:
            values["rank_deficient"] = manifest.settings["rank_deficient"]
        print(json.dumps({**values, "left_out": len(problems), "result": str(output)}, ensure_ascii=False))
    else:
        _print_table(manifest, results)
        print(output)
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    return ExitStatus.of(1, len(problems))


def _refuse_unused(options: ImageMeasureOptions) -> None:
    """Raise InputError for an option that has no effect."""
    if options.pairs and (options.network or options.weights):
        raise InputError("--network and --weights have no effect on --pairs: leave them out, or measure the sets")
    if options.pairs and options.blur_sigma:
        raise InputError("--blur-sigma has no effect on --pairs: leave it out, or measure the sets")
    if options.lpips and not options.pairs:
        raise InputError("--lpips measures pairs: add --pairs")


def _tokenizer(model: str | None, device: torch.device) -> VQVAE:
    """Return the image tokenizer that decodes stores."""
    from cogview.cli.evaluate_image_tokenizer import open_tokenizer

    if model is None:
        raise InputError("the codes of a token store are decoded by an image tokenizer: name its model with --model")
    return open_tokenizer(model)[0].to(device)


def _measure_sets(opened: list[ImageSet], options: ImageMeasureOptions, device: torch.device) -> _Measured:
    """Measure distances of two sets."""
    from cogview.evaluation.features import open_network
    from cogview.evaluation.image_statistics import (
        ImageProtocol,
        distribution_results,
        kernel_subset_size,
        measure_set,
    )
    from cogview.evaluation.manifest import BlurRecord, Manifest, SeedsRecord
    from cogview.evaluation.model_record import describe_hardware, describe_versions

    network = open_network(options.network or NETWORK, options.weights, device)
    protocol = ImageProtocol(
        resize=_resize(options, options.side or network.side, network.downsampling),
        blur=BlurRecord(sigma=options.blur_sigma, which=options.blur) if options.blur_sigma else None,
        seed=options.seed,
        sample=options.sample,
    )
    with _progress(sum(len(each.keys) for each in opened)) as bar:
        a, b = (
            measure_set(
                each,
                network,
                protocol,
                is_reference=each is opened[1],
                workers=options.workers,
                on_image=bar.update,
            )
            for each in opened
        )
    notes: list[str] = []
    results = distribution_results(a, b, protocol, notes)
    for note in notes:
        print_note(note)
    manifest = Manifest(
        measure="images",
        reference=b.record,
        candidate=a.record,
        resize=protocol.resize.record(),
        network=network.record,
        blur=protocol.blur,
        seeds=SeedsRecord(first=options.seed, count=1),
        settings={
            **protocol.settings(network, kernel_subset_size(a, b, options.sample)),
            "rank_deficient": any(each.statistics.moments.is_rank_deficient for each in (a, b)),
        },
        versions=describe_versions("pillow", "torch-fidelity", "efficientnet-lite-pytorch"),
        hardware=describe_hardware(device),
    )
    return manifest, results, None, (*a.problems, *b.problems)


def _measure_pairs(opened: list[ImageSet], options: ImageMeasureOptions, device: torch.device) -> _Measured:
    """Measure pairs of pictures."""
    from cogview.evaluation.image_pairs import as_pixels, measure_pairs
    from cogview.evaluation.lpips import AlexNetDistance
    from cogview.evaluation.manifest import Manifest
    from cogview.evaluation.model_record import describe_hardware, describe_versions

    resize = _resize(options, options.side) if options.side else None
    distance = AlexNetDistance(options.lpips, device) if options.lpips else None
    notes: list[str] = []
    with _progress(len(opened[0].keys)) as bar:
        report = measure_pairs(
            opened[0],
            opened[1],
            resize or as_pixels,
            more={"lpips": distance} if distance else {},
            workers=options.workers,
            notes=notes,
            on_pair=bar.update,
        )
    for note in notes:
        print_note(note)
    manifest = Manifest(
        measure="image pairs",
        reference=report.reference,
        candidate=report.candidate,
        resize=resize.record() if resize else None,
        network=distance.record if distance else None,
        versions=describe_versions("pillow"),
        hardware=describe_hardware(device),
    )
    return manifest, report.results(), report.items(), report.problems


def _resize(options: ImageMeasureOptions, side: int, downsampling: int = 1) -> SquareResize:
    """Return the resize; InputError for a side that does not divide into the codes of the network."""
    from cogview.data.image_dataset import check_side
    from cogview.evaluation.image_statistics import SquareResize

    if downsampling > 1:
        check_side(side, downsampling)
    return SquareResize(side=side, filter=options.filter, rule=options.fit)


@contextmanager
def _progress(total: int) -> Iterator[tqdm[Any]]:
    from tqdm import tqdm

    with tqdm(total=total, unit="picture", desc="measuring", disable=None, leave=False) as bar:
        yield bar


def _print_table(manifest: Manifest, results: dict[str, ResultValue]) -> None:
    """Print sets, protocol and values."""
    assert manifest.candidate is not None
    assert manifest.reference is not None
    if manifest.measure == "images":
        counts = f"{manifest.candidate.count:,} against {manifest.reference.count:,}"
        print(f"pictures: {counts}")
    else:
        print(plural(manifest.candidate.count, "pair"))
    if manifest.resize is not None:
        resize = manifest.resize
        print(f"resized to {resize.side} x {resize.side} pixels: {resize.filter}, antialiased, {resize.fit}")
    if manifest.network is not None:
        print(f"network: {manifest.network.label}")
    if manifest.blur is not None:
        print(f"blurred by sigma {manifest.blur.sigma:g}: {manifest.blur.which}")
    rows = []
    for name, value in results.items():
        is_fid = name == "fid" and manifest.network is not None and manifest.network.name == "inception"
        interval = "" if value.low is None else f"({value.low:.4f}–{value.high:.4f})"
        if name == "fid" and manifest.settings.get("rank_deficient"):
            interval = "rank-deficient"
        rows.append(["FID" if is_fid else TITLES[name], f"{value.value:.4f}", interval])
    print("\n".join(line.rstrip() for line in aligned_columns(rows, left={0, 2})))
