"""``cogview upscale``: generate images at twice their side."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from cogview.cli.inputs import ImageReader, QueryOptions, TextImageQuery, query_options
from cogview.cli.options import Command, SessionOptions, output_option, session_options
from cogview.cli.session import GenerationSession, UpscaleInput
from cogview.errors import ExitStatus

LINE = "TEXT<TAB>IMAGE"


@click.command(cls=Command)
@query_options(LINE)
@click.option(
    "--low-level",
    is_flag=True,
    help="upscale from half the size of the model's images to that size, in a single window; needs weights trained for "
    "the task low_level, which cogview-emoji was not",
)
@click.option(
    "--tiles",
    is_flag=True,
    help="upscale each IMAGE to twice its own sides, in overlapping tiles of the size of the model's images, of which "
    "each takes the time of an image",
)
@output_option()
@session_options("images", "IMAGE and prompt")
def command(queries: QueryOptions, low_level: bool, tiles: bool, output: Path, session: SessionOptions) -> int:
    """Generate images at twice their side and print the paths of the PNG files, NAME-up-seedSEED.png.

    Without --prompt, a PNG file of cogview has its own. The codes are generated in nine overlapping windows. An
    image of another size than the model's images is resized and cropped first; one that is larger than the result
    is refused, unless --tiles upscales its parts. Images that cannot be used are listed at the end, with status 1.
    """
    from cogview.image_io.png import prepared_folder

    reader = ImageReader()
    own_prompts = queries.prompt is None and queries.input is None and bool(queries.images)
    pairs = _queries_of_images(queries.images, reader) if own_prompts else queries.read(reader)
    if queries.input is None:
        pairs = [replace(query, paths=(path,)) for query in pairs for path in query.paths]
    with prepared_folder(output):
        opened = GenerationSession.open(session, ["low_level" if low_level else "upscale"])
    opened.print_header()
    return upscale_files(opened, reader, [(query, output) for query in pairs], low_level=low_level, tiles=tiles)


def _queries_of_images(images: Sequence[str], reader: ImageReader) -> list[TextImageQuery]:
    """Return a query with its own prompt for each image that was generated; the others become failures of ``reader``.

    Raises:
        InputError: No image matches, or none holds a prompt.
    """
    from cogview.image_io.png import read_metadata

    queries = []
    for path in reader.find(images):
        texts = read_metadata(path)
        if "cogview" in texts and texts.get("prompt", "").strip():
            queries.append(TextImageQuery(prompt=texts["prompt"], paths=(path,)))
        elif path not in reader.problems:
            reader.problems[path] = f"image {path} holds no prompt, only images of cogview do: give --prompt TEXT"
    reader.require_some(len(queries))
    return queries


def upscale_files(
    session: GenerationSession,
    reader: ImageReader,
    queries: Sequence[tuple[TextImageQuery, Path]],
    *,
    low_level: bool = False,
    tiles: bool = False,
) -> int:
    """Upscale image files.

    Args:
        session: The session of a model for the task.
        reader: The reader of the images.
        queries: A query with one image, and the folder of the result, for each file.
        low_level: Whether to start from half the size of the model's images.
        tiles: Whether to upscale images of other sizes in tiles.

    Returns:
        The exit status: 1 if an image could not be read or a query was skipped, 2 if no image was upscaled.
    """
    from cogview.image_io.png import safe_name

    refused = [query for query, _ in queries if len(query.paths) != 1]
    for query in refused:
        print(f"skipped: “{query.prompt}” comes with {len(query.paths)} images; expected {LINE}", file=sys.stderr)
    prompts = dict.fromkeys(query.prompt for query, _ in queries if query not in refused)
    accepted = {prompt: session.check_prompt(prompt) for prompt in prompts}
    good = [(query, folder) for query, folder in queries if query not in refused and accepted[query.prompt]]

    task = "low_level" if low_level else "upscale"

    def inputs() -> Iterator[UpscaleInput]:
        paths = [query.paths[0] for query, _ in good]
        for index, image in reader.read_all(paths, session.model, task=task, tiles=tiles):
            query, folder = good[index]
            yield UpscaleInput(
                image=image,
                prompt=query.prompt,
                source=query.paths[0].name,
                path=folder / f"{safe_name(query.paths[0].stem)}-up-seed{session.seed}.png",
            )

    done = session.upscale_tiles(inputs(), task) if tiles else session.upscale(inputs(), len(good), task=task)
    reader.report_failures(done)
    queried = {path for query, _ in queries for path in query.paths}
    without_prompt = sum(path not in queried for path in reader.problems)
    return ExitStatus.of(done, len(queries) - done + without_prompt)
