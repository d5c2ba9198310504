"""``cogview vary``: generate variations of images."""

from __future__ import annotations

import click

from cogview.cli.image_tasks import ImageTaskOptions, edit_images, image_task_options
from cogview.cli.inputs import IMAGES_HELP, ImageReader
from cogview.cli.options import Command, SessionOptions, argument, session_options
from cogview.cli.session import GenerationSession
from cogview.limits import DEFAULT_KEEP


@click.command(cls=Command)
@argument("images", nargs=-1, required=True, metavar="IMAGE", help=IMAGES_HELP)
@click.option(
    "--keep",
    type=click.FloatRange(min=0, max=1),
    default=DEFAULT_KEEP,
    metavar="SHARE",
    help="share of the codes that are kept; larger shares keep these as well, and 1 keeps the image",
)
@image_task_options(4)
@session_options("images", "IMAGE and number of the image")
def command(images: tuple[str, ...], keep: float, options: ImageTaskOptions, session: SessionOptions) -> int:
    """Generate variations of images without any text, and print the paths of the PNG files.

    A file is named NAME-vary-seedSEED-NUMBER.png. The model must have been trained for the task fill. Some codes of an
    image are kept, and the others are generated anew. Images that cannot be used are listed at the end, with status 1.
    """
    from cogview.image_io.captioned_sheet import require_sheet_fits
    from cogview.image_io.png import prepared_folder

    reader = ImageReader()
    paths = reader.find(images)
    if options.grid:
        require_sheet_fits(len(paths) * options.n)
    with prepared_folder(options.output):
        opened = GenerationSession.open(session, ["vary"])
    opened.print_header()
    return edit_images(opened, reader, paths, options, task="vary", strength=1 - keep)
