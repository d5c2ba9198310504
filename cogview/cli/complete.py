"""``cogview complete``: keep a part of an image and generate the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.image_tasks import (
    ImageTaskOptions,
    MaskOption,
    edit_images,
    generate_from_images,
    image_task_options,
    mask_option,
)
from cogview.cli.inputs import IMAGES_HELP, ImageReader
from cogview.cli.options import Command, SessionOptions, argument, session_options
from cogview.cli.session import GenerationSession, ImageOutput
from cogview.errors import InputError

if TYPE_CHECKING:
    import numpy as np


@click.command(cls=Command)
@argument("images", nargs=-1, required=True, metavar="IMAGE", help=IMAGES_HELP)
@click.option("--rows", type=int, metavar="COUNT", help="rows of codes to keep, counted from the top")
@mask_option("to generate, in place of --rows")
@click.option("--prompt", required=True, metavar="TEXT", help="text that describes the whole image")
@image_task_options(1)
@session_options("images", "IMAGE, prompt and number of the image")
def command(
    images: tuple[str, ...],
    rows: int | None,
    mask: str | None,
    prompt: str,
    options: ImageTaskOptions,
    session: SessionOptions,
) -> int:
    """Keep the upper rows of codes of images, or what a mask leaves; generate the rest, and print the paths.

    A file is named NAME-rowsROWS-seedSEED-NUMBER.png, or NAME-fill-seedSEED-NUMBER.png. A row of codes is 8 pixels high
    in cogview-emoji, and 4, 8 or 16 in other models. --mask needs a model that was trained for the task fill. An image
    of another size than the model's images is resized and cropped first. Images that cannot be used are listed at the
    end, with status 1.
    """
    from cogview.image_io.captioned_sheet import require_sheet_fits
    from cogview.image_io.png import prepared_folder

    if (rows is None) == (mask is None):
        raise InputError("give either --rows COUNT, the rows to keep, or --mask, the part to generate")
    given = None if mask is None else MaskOption.read(mask)
    reader = ImageReader()
    paths = reader.find(images)
    if options.grid:
        require_sheet_fits(len(paths) * options.n)
    with prepared_folder(options.output):
        opened = GenerationSession.open(session, ["generate" if given is None else "fill"])
        if rows is not None:
            opened.model.complete([], prompt, rows=rows)  # a wrong number is reported before an image is read
    opened.print_header()
    if not opened.check_prompt(prompt):
        return 2
    if rows is None:
        return edit_images(opened, reader, paths, options, task="fill", prompt=prompt, mask=given)
    return _complete_rows(opened, reader, paths, options, rows=rows, prompt=prompt)


def _complete_rows(
    session: GenerationSession,
    reader: ImageReader,
    paths: list[Path],
    options: ImageTaskOptions,
    *,
    rows: int,
    prompt: str,
) -> int:
    """Keep the first rows of codes of image files and generate the others; return the exit status."""
    from cogview.image_io.png import safe_name

    requests = session.requests(prompt, options.n)
    facts = {"task": "complete", "rows": str(rows)}

    def build(path: Path, codes: np.ndarray) -> list[ImageOutput]:
        return [
            ImageOutput(
                request=replace(request, codes=codes[:rows]),
                path=options.output / f"{safe_name(path.stem)}-rows{rows}-seed{session.seed}-{request.index}.png",
                metadata={**facts, "source": path.name},
            )
            for request in requests
        ]

    codes = (session.grid - rows) * session.grid
    return generate_from_images(
        session, reader, paths, build, options=options, task="generate", codes=codes, facts=facts
    )
