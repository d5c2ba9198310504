"""``cogview edit``: change images as an instruction says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from cogview.cli.image_tasks import ImageTaskOptions, MaskOption, edit_images, image_task_options, mask_option
from cogview.cli.inputs import IMAGES_HELP, ImageReader
from cogview.cli.options import MODEL_DEFAULT, Command, SessionOptions, argument, session_options
from cogview.cli.session import GenerationSession
from cogview.errors import InputError


@click.command(cls=Command)
@argument("images", nargs=-1, required=True, metavar="IMAGE", help=IMAGES_HELP)
@argument("instruction", metavar="INSTRUCTION", help="text that says what to change, such as 把苹果变成绿色")
@mask_option("that may change, while all else stays")
@click.option(
    "--strength",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    metavar="SHARE",
    help="share of the codes that may change; the others are kept, and lower shares keep these as well",
)
@click.option(
    "--image-guidance",
    type=click.FloatRange(min=0),
    metavar="S",
    show_default=MODEL_DEFAULT,
    help="scale of the guidance by the image; 1 disables, and other values need weights trained with source dropout",
)
@image_task_options(1)
@session_options("images", "IMAGE, instruction and number of the image")
def command(
    images: tuple[str, ...],
    instruction: str,
    mask: str | None,
    strength: float,
    image_guidance: float | None,
    options: ImageTaskOptions,
    session: SessionOptions,
) -> int:
    """Change images as an instruction says, and print the paths of the PNG files.

    A file is named NAME-edit-seedSEED-NUMBER.png. The model must have been trained for the task edit. An image of
    another size than the model's images is resized and cropped first, with its mask. Images that cannot be used are
    listed at the end, with status 1.
    """
    from cogview.image_io.captioned_sheet import require_sheet_fits
    from cogview.image_io.png import prepared_folder
    from cogview.pipeline.editing import EMPTY_INSTRUCTION

    if image_guidance is not None:
        session = replace(session, settings={**session.settings, "image_guidance": image_guidance})
    if not instruction.strip():
        raise InputError(EMPTY_INSTRUCTION)
    if Path(instruction).exists():
        raise InputError(f"{instruction} is a file: write the instruction after the images")
    given = None if mask is None else MaskOption.read(mask)
    reader = ImageReader()
    paths = reader.find(images)
    if options.grid:
        require_sheet_fits(len(paths) * options.n)
    with prepared_folder(options.output):
        opened = GenerationSession.open(session, ["edit"])
        opened.model.tokenize_instructions([instruction])
    opened.print_header()
    return edit_images(opened, reader, paths, options, task="edit", prompt=instruction, mask=given, strength=strength)
