"""``cogview caption``: describe images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.cli.inputs import READ_AT_A_TIME, ImageReader, batches
from cogview.cli.options import (
    add_model_arguments,
    add_sampling_arguments,
    add_seed_argument,
    parse_max_batch_size,
    require_positive,
    sampling_settings,
)
from cogview.cli.session import open_model
from cogview.cli.text_io import LineWriter

if TYPE_CHECKING:
    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.results import Caption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Describe images: a line of JSON for each caption, with file, index, caption, log_probability (of the whole "
        "caption, in nats) and seed. An image of another size than the model's pictures is resized and cropped first. "
        "Images that cannot be read are named at the end, with status 1."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or globs")
    parser.add_argument("-n", type=int, default=1, metavar="COUNT", help="captions per image")
    parser.add_argument(
        "--method",
        choices=["greedy", "sample", "beam"],
        help="greedy: the likeliest piece each time, one caption; beam: the likeliest captions, the best first; "
        "sample: drawn (default: greedy for -n 1, beam for more)",
    )
    add_sampling_arguments(parser, "pieces", "as the model has it; with --method sample only")
    add_seed_argument(parser, "image and number give the same sample")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="a file for the lines as well")
    add_model_arguments(parser, "images")


def run(args: argparse.Namespace) -> int:
    """Describe every image that can be read; status 1 if there was one that cannot."""
    from cogview.pipeline.cogview import resolve_seed

    require_positive("-n", args.n)
    at_a_time = parse_max_batch_size(args)
    method = args.method or ("greedy" if args.n == 1 else "beam")
    seed = resolve_seed(args.seed)
    images = ImageReader()
    paths = images.find(args.images)
    with LineWriter(args.output) as lines:
        settings = {"method": method, "n": args.n, "seed": seed, **sampling_settings(args)}
        model = open_describer(
            args.model,
            settings,
            device=args.device,
            dtype=args.dtype,
            kv_dtype=args.kv_dtype,
            adapter=args.adapter,
            revision=args.revision,
        )
        described = describe(model, images, paths, settings, at_a_time)
        done = 0
        for number, captions in described:
            for caption in captions:
                lines.write(caption_line(caption, file=str(paths[number])))
            done += 1
        return images.report_failures(done)


def open_describer(name: str, settings: Mapping[str, Any], **opening: Any) -> CogView:
    """A model for ``describe`` with the same ``settings``: wrong ones end here. Says on stderr where it runs.

    ``opening`` is what ``open_model`` takes.
    """
    model = open_model(name, tasks=["caption"], **opening)
    model.caption([], **settings)
    print(f"{model.label} on {model.placement}, seed {settings['seed']}", file=sys.stderr)
    return model


def describe(
    model: CogView, images: ImageReader, paths: Sequence[Path], settings: Mapping[str, Any], ceiling: int | None
) -> Iterator[tuple[int, list[Caption]]]:
    """The captions of each of ``paths`` that can be read, with its number in the list, batch by batch.

    ``settings`` are those of ``CogView.caption``, ``ceiling`` is the most images at a time. What comes out of a batch
    can be written before the next begins.
    """
    from tqdm import tqdm

    read = images.read_all(paths, model.image_size())
    with tqdm(total=len(paths), unit="image", desc="describing", disable=None, leave=False) as bar:
        for batch in batches(read, ceiling or READ_AT_A_TIME):
            captions = model.caption([image for _, image in batch], batch_size=ceiling, **settings)
            yield from zip((number for number, _ in batch), captions, strict=True)
            bar.update(batch[-1][0] + 1 - bar.n)


def caption_line(caption: Caption, **about: str) -> str:
    """JSON of a caption behind what ``about`` says of its image."""
    return json.dumps(
        {
            **about,
            "index": caption.index,
            "caption": caption.text,
            "log_probability": caption.log_probability,
            "seed": caption.seed,
        },
        ensure_ascii=False,
    )
