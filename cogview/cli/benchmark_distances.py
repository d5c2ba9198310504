"""MS-COCO-30k of ``cogview eval benchmark``: the blurred FID-k of generated pictures against true ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.messages import print_note
from cogview.cli.options import FILE, Decorator, option_group
from cogview.errors import InputError
from cogview.formatting import plural

if TYPE_CHECKING:
    from cogview.evaluation.field_benchmarks.benchmark import Benchmark, BenchmarkItem
    from cogview.evaluation.manifest import Manifest, ResultCurve

NETWORK = "efficientnet-lite0"


@dataclass(frozen=True, kw_only=True)
class DistanceOptions:
    """The true pictures, and the protocol of FID-k."""

    reference: Path | None
    network: str | None
    weights: Path | None
    blur: str


def distance_options() -> Decorator:
    """Add the options of ``DistanceOptions``, passed as ``distances``."""
    return option_group(
        DistanceOptions,
        "distances",
        ("reference", "network", "weights", "blur"),
        click.option(
            "--reference",
            type=FILE,
            metavar="PICTURES",
            help="coco-30k: measure FID-k against these true pictures, a folder or tar shards",
        ),
        click.option(
            "--network",
            metavar="NAME",
            show_default=NETWORK,
            help="feature network of --reference: efficientnet-lite0, inception, stub, or a model",
        ),
        click.option("--weights", type=FILE, metavar="FILE", help="weights of the network inception"),
        click.option(
            "--blur",
            type=click.Choice(["both", "reference"]),
            default="both",
            help="which pictures FID-k blurs; CogView blurs both",
        ),
    )


def measure_distances(
    chosen: Benchmark,
    items: Sequence[BenchmarkItem],
    samples: int,
    output: Path,
    options: DistanceOptions,
    settings: dict[str, Any],
) -> tuple[Manifest, dict[str, Any], dict[str, ResultCurve]]:
    """Return the manifest, FID-k for each k, and the curve over k.

    Args:
        chosen: The benchmark.
        items: Its prompts.
        samples: Pictures of each prompt.
        output: The folder of the run.
        options: The true pictures and the protocol.
        settings: Settings of the measure for the manifest.

    Raises:
        InputError: A generated picture is missing, or a set cannot be measured.
    """
    from dataclasses import asdict, replace

    import torch
    from tqdm import tqdm

    from cogview.evaluation.features import open_network
    from cogview.evaluation.field_benchmarks.coco_distances import SIDE, SIGMAS, blur_curve, blurred_distances
    from cogview.evaluation.field_benchmarks.manifest import describe_pictures
    from cogview.evaluation.image_sets import open_image_set
    from cogview.evaluation.image_statistics import SquareResize, rank_deficiency_note
    from cogview.evaluation.manifest import BlurRecord

    reference = options.reference
    if chosen.name != "coco-30k" or reference is None:
        raise InputError("--reference measures the pictures of coco-30k alone; leave it out")
    root = output / "pictures"
    paths = [root / chosen.layout(number, item, k, "") for number, item in enumerate(items) for k in range(samples)]
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError(
            f"{len(missing)} of {plural(len(paths), 'picture')} are missing, first {missing[0]}; the same command "
            "without --reference generates them"
        )
    network = open_network(options.network or NETWORK, options.weights, torch.device("cpu"))
    candidate, true = (open_image_set(path, _no_store) for path in (root, reference))
    if len(candidate.keys) != len(paths):
        raise InputError(
            f"{root} has {len(candidate.keys)} pictures, the prompts ask for {len(paths)}; remove the others"
        )
    resize = SquareResize(side=SIDE)
    total = len(true.keys) + len(candidate.keys)
    with tqdm(total=total, unit="picture", desc="measuring", disable=None, leave=False) as bar:
        results, (measured, measured_true) = blurred_distances(
            candidate, true, network, resize, options.blur, on_image=bar.update
        )
    if (note := rank_deficiency_note(measured, measured_true)) is not None:
        print_note(note)
    manifest = replace(
        describe_pictures(chosen, items, output, {**settings, "sigmas": list(SIGMAS)}),
        candidate=measured.record,
        reference=measured_true.record,
        resize=resize.record(),
        network=network.record,
        blur=BlurRecord(sigma=float(max(SIGMAS)), which=options.blur),
    )
    return manifest, {name: asdict(value) for name, value in results.items()}, {"fid_k": blur_curve(results)}


def _no_store() -> Any:
    raise InputError("FID-k compares pictures; expected a folder or tar shards as --reference, got a token store")
