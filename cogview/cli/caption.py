"""``cogview caption``: caption images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.inputs import IMAGES_HELP, READ_AT_A_TIME, ImageReader, batches
from cogview.cli.options import (
    Command,
    ModelOptions,
    argument,
    count_option,
    json_option,
    model_options,
    output_option,
    sampling_options,
    seed_option,
)
from cogview.cli.session import open_model
from cogview.cli.text_io import LineWriter

if TYPE_CHECKING:
    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.results import Caption


@click.command(cls=Command)
@argument("images", nargs=-1, required=True, metavar="IMAGE", help=IMAGES_HELP)
@count_option("captions per IMAGE")
@click.option(
    "--method",
    type=click.Choice(["greedy", "sample", "beam"]),
    show_default="greedy for -n 1, else beam",
    help="greedy: the most probable piece each time, one caption; beam: the most probable captions, best first; "
    "sample: sampled captions",
)
@sampling_options("pieces", image_options=False, note=", with --method sample")
@seed_option("IMAGE and number of the caption")
@output_option(default=None, metavar="FILE", help="file for the lines, in addition to stdout")
@model_options("images")
@json_option()
def command(
    images: tuple[str, ...],
    n: int,
    method: str | None,
    settings: Mapping[str, Any],
    seed: int | None,
    output: Path | None,
    model: ModelOptions,
) -> int:
    """Caption images: print a line of JSON for each caption.

    Keys: file, index, caption, log_probability (of the whole caption, in nats) and seed. An image of another size than
    the model's images is resized and cropped first. Images that cannot be read are listed at the end, with status 1.
    """
    from cogview.pipeline.inputs import resolve_seed

    method = method or ("greedy" if n == 1 else "beam")
    settings = {"method": method, "n": n, "seed": resolve_seed(seed), **settings}
    reader = ImageReader()
    paths = reader.find(images)
    with LineWriter(output) as lines:
        captioner = load_captioner(model, settings)
        done = 0
        for index, captions in caption_files(captioner, reader, paths, settings, model.max_batch_size):
            for caption in captions:
                lines.write(caption_line(caption, file=str(paths[index])))
            done += 1
        return reader.report_failures(done)


def load_captioner(options: ModelOptions, settings: Mapping[str, Any]) -> CogView:
    """Load a model for ``caption_files``, check its ``settings``, and print a header on stderr.

    Raises:
        InputError: The model cannot be loaded or writes no captions, or a setting is wrong.
    """
    model = open_model(options, ["caption"])
    model.caption([], **settings)
    print(f"{model.label} on {model.placement}, seed {settings['seed']}", file=sys.stderr)
    return model


def caption_files(
    model: CogView,
    reader: ImageReader,
    paths: Sequence[Path],
    settings: Mapping[str, Any],
    max_batch_size: int | None,
) -> Iterator[tuple[int, list[Caption]]]:
    """Yield the captions of each image that can be read, batch by batch.

    Args:
        model: A model for the task "caption".
        reader: The reader of the images.
        paths: The image files.
        settings: Arguments of ``CogView.caption``.
        max_batch_size: Maximum number of images in a batch; None for as many as fit into memory.

    Yields:
        The index in ``paths``, and the captions of the image.
    """
    from tqdm import tqdm

    with tqdm(total=len(paths), unit="image", desc="captioning", disable=None, leave=False) as bar:
        for batch in batches(reader.read_all(paths, model, task="caption"), max_batch_size or READ_AT_A_TIME):
            captions = model.caption([image for _, image in batch], batch_size=max_batch_size, **settings)
            yield from zip((index for index, _ in batch), captions, strict=True)
            bar.update(batch[-1][0] + 1 - bar.n)


def caption_line(caption: Caption, **about: str) -> str:
    """Return a caption as a line of JSON that starts with the values of ``about``."""
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
