"""``cogview complete``: keep the upper part of an image and generate the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from cogview.cli.inputs import IMAGES_HELP, ImageReader, batches
from cogview.cli.messages import print_note
from cogview.cli.options import Command, SessionOptions, argument, count_option, output_option, session_options
from cogview.cli.session import GenerationSession, ImageOutput


@click.command(cls=Command)
@argument("images", nargs=-1, required=True, metavar="IMAGE", help=IMAGES_HELP)
@click.option("--rows", type=int, required=True, metavar="COUNT", help="rows of codes to keep, counted from the top")
@click.option("--prompt", required=True, metavar="TEXT", help="text that describes the whole image")
@count_option("images per IMAGE")
@click.option("--grid", is_flag=True, help="also write a contact sheet with the images of each IMAGE above its name")
@output_option()
@session_options("images", "IMAGE, prompt and number of the image")
def command(
    images: tuple[str, ...], rows: int, prompt: str, n: int, grid: bool, output: Path, session: SessionOptions
) -> int:
    """Keep the upper rows of codes of images, generate the others, and print the paths of the PNG files.

    A file is named NAME-rowsROWS-seedSEED-NUMBER.png. A row of codes is 8 pixels high in cogview-emoji, and 4, 8
    or 16 in other models. An image of another size than the model's images is resized and cropped first. Images that
    cannot be read are listed at the end, with status 1.
    """
    from cogview.image_io.captioned_sheet import captioned_sheet, group_images, legend, require_sheet_fits
    from cogview.image_io.png import prepared_folder, safe_name

    reader = ImageReader()
    paths = reader.find(images)
    if grid:
        require_sheet_fits(len(paths) * n)
    with prepared_folder(output):
        opened = GenerationSession.open(session, ["generate"])
        opened.model.complete([], prompt, rows=rows)  # a wrong number of rows is reported before an image is read
    opened.print_header()
    if not opened.check_prompt(prompt):
        return 2
    requests = opened.requests(prompt, n)

    def parts() -> Iterator[list[ImageOutput]]:
        for part in batches(reader.read_all(paths, opened.model), opened.read_at_a_time):
            codes = opened.model.encode_images([image for _, image in part])
            yield [
                ImageOutput(
                    request=replace(request, codes=given[:rows]),
                    path=output / f"{safe_name(path.stem)}-rows{rows}-seed{opened.seed}-{request.index}.png",
                    metadata={"task": "complete", "source": path.name, "rows": str(rows)},
                )
                for path, given in zip((paths[index] for index, _ in part), codes, strict=True)
                for request in requests
            ]

    done, sheet, names = 0, [], []
    codes = (opened.grid - rows) * opened.grid
    for target, image in opened.generate(parts(), "generating", len(paths) * n, codes):
        opened.save(target.path, image, **target.metadata)
        done += 1
        if grid:
            sheet.append(image)
            names.append(target.metadata["source"])
    if sheet:
        facts = {"task": "complete", "source": "\n".join(dict.fromkeys(names)), "rows": str(rows), "n": str(n)}
        groups = group_images(names, sheet)
        page = captioned_sheet(groups, print_note)
        opened.save_sheet(output / f"grid-seed{opened.seed}.png", page, sheet, captions=legend(groups), **facts)
    return reader.report_failures(done)
