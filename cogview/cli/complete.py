"""``cogview complete``: keep the upper part of an image and draw the rest."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from cogview.cli.inputs import ImageReader, batches
from cogview.cli.options import (
    add_drawing_arguments,
    add_model_arguments,
    add_seed_argument,
    require_positive,
)
from cogview.cli.session import ImageOutput, open_session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Keep the upper rows of codes of an image, draw the others, and print the paths of the PNG files: "
        "NAME-rowsROWS-seedSEED-NUMBER.png. A row is 8 pixels high. An image of another size than the model's pictures "
        "is resized and cropped first. Images that cannot be read are named at the end, with status 1."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or globs")
    parser.add_argument("--rows", type=int, required=True, metavar="COUNT", help="rows of codes to keep, from above")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the whole picture shows")
    parser.add_argument("-n", type=int, default=1, metavar="COUNT", help="pictures per image")
    parser.add_argument("--grid", action="store_true", help="one contact sheet as well: a row per image")
    add_seed_argument(parser, "image, prompt and number give the same picture")
    add_drawing_arguments(parser)
    add_model_arguments(parser, "pictures")


def run(args: argparse.Namespace) -> int:
    """Complete every image that can be read; status 1 if there was one that cannot."""
    from cogview.image_io.png import prepare_folder, safe_name
    from cogview.vqvae.model import PIXELS_PER_CODE

    require_positive("-n", args.n)
    images = ImageReader()
    paths = images.find(args.images)
    prepare_folder(args.output)
    easel = open_session(args, ["generate"])
    easel.model.complete([], args.prompt, rows=args.rows)  # refuses wrong rows before an image is read
    easel.print_header()
    if not easel.check_prompt(args.prompt):
        return 2
    wishes = easel.requests(args.prompt, args.n)

    def parts() -> Iterator[list[ImageOutput]]:
        read = images.read_all(paths, PIXELS_PER_CODE * easel.grid)
        for some in batches(read, easel.read_at_a_time):
            codes = easel.model.encode_images([image for _, image in some])
            yield [
                ImageOutput(
                    request=replace(wish, codes=own[: args.rows]),
                    path=args.output / f"{safe_name(path.stem)}-rows{args.rows}-seed{easel.seed}-{wish.index}.png",
                    metadata={"task": "complete", "source": path.name, "rows": str(args.rows)},
                )
                for path, own in zip((paths[number] for number, _ in some), codes, strict=True)
                for wish in wishes
            ]

    done, sheet = 0, []
    codes = (easel.grid - args.rows) * easel.grid
    for order, picture in easel.generate(parts(), "drawing", len(paths) * args.n, codes):
        easel.save(order.path, picture, **order.metadata)
        done += 1
        if args.grid:
            sheet.append(picture)
    if sheet:
        easel.save_sheet(args.output / f"grid-seed{easel.seed}.png", sheet, columns=args.n)
    return images.report_failures(done)
