"""``cogview complete``: keep the upper part of an image and draw the rest."""

from __future__ import annotations

import argparse

from cogview.cli.easel import Progress, easel_of
from cogview.cli.options import (
    add_drawing_arguments,
    add_model_arguments,
    add_seed_argument,
    require_positive,
)
from cogview.cli.sources import Images, batches


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
    add_model_arguments(parser, "pictures drawn at a time")


def run(args: argparse.Namespace) -> int:
    """Complete every image that can be read; status 1 if there was one that cannot."""
    from cogview.pictures import prepare_folder, safe_name
    from cogview.vqvae.model import PIXELS_PER_CODE

    require_positive("-n", args.n)
    images = Images()
    paths = images.find(args.images)
    prepare_folder(args.output)
    easel = easel_of(args, ["generate"])
    easel.model.complete([], args.prompt, rows=args.rows)  # refuses wrong rows before an image is read
    easel.announce()
    if not easel.accepts(args.prompt):
        return 2
    done, sheet = 0, []
    with Progress("drawing", len(paths) * args.n, (easel.grid - args.rows) * easel.grid) as progress:
        read = images.read_all(paths, PIXELS_PER_CODE * easel.grid)
        for batch in batches(read, max(1, args.batch_size // args.n)):
            pictures = easel.model.complete(
                [image for _, image in batch],
                args.prompt,
                rows=args.rows,
                n=args.n,
                seed=easel.seed,
                batch_size=args.batch_size,
                on_code=progress.of(len(batch) * args.n, args.batch_size),
                **easel.settings,
            )
            owners = [paths[number] for number, _ in batch for _ in range(args.n)]
            for path, picture in zip(owners, pictures, strict=True):
                name = f"{safe_name(path.stem)}-rows{args.rows}-seed{easel.seed}-{picture.index}.png"
                easel.save(args.output / name, picture, task="complete", source=path.name, rows=str(args.rows))
            done += len(batch)
            if args.grid:
                sheet += pictures
    if sheet:
        easel.save_sheet(args.output / f"grid-seed{easel.seed}.png", sheet, columns=args.n)
    return images.finish(done)
