"""``cogview upscale``: draw images at twice their side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cogview.cli.inputs import ImageReader, TextImageQuery, read_queries
from cogview.cli.options import (
    add_drawing_arguments,
    add_model_arguments,
    add_query_arguments,
    add_seed_argument,
)
from cogview.cli.session import GenerationSession, UpscaleInput, open_session

LINE = "TEXT<TAB>IMAGE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Draw images at twice their side, in nine overlapping windows of codes, and print the paths of the PNG files: "
        "NAME-up-seedSEED.png. An image of another size than the model's pictures is resized and cropped first. "
        "Images that cannot be read are named at the end, with status 1."
    )
    add_query_arguments(parser, LINE)
    parser.add_argument(
        "--low-level",
        action="store_true",
        help="from half the size of the model's pictures to that size, in a single window",
    )
    add_seed_argument(parser, "image and prompt give the same picture")
    add_drawing_arguments(parser)
    add_model_arguments(parser, "images")


def run(args: argparse.Namespace) -> int:
    """Upscale every image that can be read; status 1 if there was one that cannot, 2 if a prompt was refused."""
    from cogview.image_io.png import prepare_folder

    images = ImageReader()
    queries = read_queries(args, images, LINE)
    prepare_folder(args.output)
    easel = open_session(args, ["low_level" if args.low_level else "upscale"])
    easel.print_header()
    if args.input is None:
        queries = [TextImageQuery(prompt=query.prompt, paths=(path,)) for query in queries for path in query.paths]
    return upscale_files(easel, images, [(query, args.output) for query in queries], low_level=args.low_level)


def upscale_files(
    easel: GenerationSession,
    images: ImageReader,
    queries: Sequence[tuple[TextImageQuery, Path]],
    *,
    low_level: bool = False,
) -> int:
    """Upscale the one image of each query into the folder beside it; returns the exit status."""
    from cogview.image_io.png import safe_name
    from cogview.vqvae.model import PIXELS_PER_CODE

    refused = [query for query, _ in queries if len(query.paths) != 1]
    for query in refused:
        print(f"skipped: “{query.prompt}” comes with {len(query.paths)} images; expected {LINE}", file=sys.stderr)
    prompts = dict.fromkeys(query.prompt for query, _ in queries if query not in refused)
    accepted = {prompt: easel.check_prompt(prompt) for prompt in prompts}
    good = [(query, folder) for query, folder in queries if query not in refused and accepted[query.prompt]]

    def enlargements() -> Iterator[UpscaleInput]:
        side = PIXELS_PER_CODE * (easel.grid // 2 if low_level else easel.grid)
        for number, image in images.read_all([query.paths[0] for query, _ in good], side):
            query, folder = good[number]
            yield UpscaleInput(
                image=image,
                prompt=query.prompt,
                source=query.paths[0].name,
                path=folder / f"{safe_name(query.paths[0].stem)}-up-seed{easel.seed}.png",
            )

    status = images.report_failures(easel.upscale(enlargements(), len(good), low_level=low_level))
    return status if len(good) == len(queries) else 2
