"""Images that are generated from given ones: the part that ``complete``, ``edit`` and ``vary`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.inputs import ImageReader, batches
from cogview.cli.messages import print_note
from cogview.cli.options import Decorator, count_option, option_group, output_option
from cogview.cli.session import GenerationSession, ImageOutput
from cogview.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    import numpy as np

    from cogview.pipeline.masks import Mask
    from cogview.pipeline.results import GeneratedImage

MASK_HELP = (
    "part of each IMAGE {purpose}: a file of the same size, in which that part is white, or opaque where others are "
    "transparent; or a box x,y,w,h in pixels"
)


@dataclass(frozen=True, kw_only=True)
class ImageTaskOptions:
    """How many images each given one gets, and where they are written."""

    n: int
    grid: bool
    output: Path


@dataclass(frozen=True, kw_only=True)
class MaskOption:
    """A mask as it was given, and what was read of it."""

    text: str
    mask: Mask

    @classmethod
    def read(cls, text: str) -> MaskOption:
        """Read a mask.

        Args:
            text: A file, or a box x,y,w,h.

        Raises:
            InputError: The file cannot be read, or the box is none.
        """
        from cogview.pipeline.masks import load_mask

        return cls(text=text, mask=load_mask(text, "--mask"))

    @property
    def name(self) -> str:
        """The name of the file alone, or the box, for metadata."""
        return self.text.replace(" ", "") if self.mask.box is not None else Path(self.text).name


def mask_option(purpose: str) -> Decorator:
    """Return ``--mask``; ``purpose`` says what happens to the part that it names."""
    return click.option("--mask", metavar="FILE|X,Y,W,H", help=MASK_HELP.format(purpose=purpose))


def image_task_options(n: int) -> Decorator:
    """Add ``-n``, by default ``n``, ``--grid`` and ``--output``, passed as ``options: ImageTaskOptions``."""
    return option_group(
        ImageTaskOptions,
        "options",
        ("n", "grid", "output"),
        count_option("images per IMAGE", default=n),
        click.option(
            "--grid", is_flag=True, help="also write a contact sheet with the images of each IMAGE above its name"
        ),
        output_option(),
    )


def edit_images(
    session: GenerationSession,
    reader: ImageReader,
    paths: Sequence[Path],
    options: ImageTaskOptions,
    *,
    task: str,
    prompt: str = "",
    mask: MaskOption | None = None,
    strength: float = 1.0,
) -> int:
    """Edit, fill or vary image files, and save the results as NAME-TASK-seedSEED-NUMBER.png.

    Args:
        session: The session of a model for the task.
        reader: The reader of the images.
        paths: The images.
        options: The number of results, and where they are written.
        task: ``edit``, ``fill`` or ``vary``.
        prompt: The text.
        mask: Part that may change; None: everything.
        strength: Share of the codes of that part that changes.

    Returns:
        The exit status: 1 if an image cannot be used, else 0.

    Raises:
        InputError: No image can be used.
    """
    from cogview.image_io.png import safe_name
    from cogview.pipeline.editing import require_partial

    requests = [replace(request, strength=strength) for request in session.requests(prompt, options.n, task=task)]
    shared = {"task": task} | ({} if mask is None else {"mask": mask.name})

    def build(path: Path, codes: np.ndarray) -> list[ImageOutput]:
        fitted = None if mask is None else session.model.fit_mask(mask.mask, reader.sizes[path], str(path))
        if task == "fill":
            require_partial(fitted)
        return [
            ImageOutput(
                request=replace(request, codes=codes, mask=fitted),
                path=options.output / f"{safe_name(path.stem)}-{task}-seed{session.seed}-{request.index}.png",
                metadata={**shared, "source": path.name},
            )
            for request in requests
        ]

    codes = round(strength * session.grid**2) if mask is None else None
    return generate_from_images(session, reader, paths, build, options=options, task=task, codes=codes, facts=shared)


def generate_from_images(
    session: GenerationSession,
    reader: ImageReader,
    paths: Sequence[Path],
    build: Callable[[Path, np.ndarray], list[ImageOutput]],
    *,
    options: ImageTaskOptions,
    task: str,
    codes: int | None,
    facts: Mapping[str, str],
) -> int:
    """Generate images from image files and save them.

    Args:
        session: The session of the model.
        reader: The reader of the images.
        paths: The images.
        build: Returns the outputs of an image, from its path and codes; it raises InputError for one that cannot be
            used.
        options: The number of results, and where they are written.
        task: Task of the requests.
        codes: Number of codes that are sampled for a result; None: it depends on the mask of an image.
        facts: Text chunks of a contact sheet that name the task and its settings.

    Returns:
        The exit status: 1 if an image cannot be used, else 0.

    Raises:
        InputError: No image can be used.
    """
    from cogview.tokenizers.tasks import TASKS

    def parts() -> Iterator[list[ImageOutput]]:
        for part in batches(reader.read_all(paths, session.model), session.read_at_a_time):
            encoded = session.model.encode_images([image for _, image in part])
            outputs: list[ImageOutput] = []
            for path, given in zip((paths[index] for index, _ in part), encoded, strict=True):
                try:
                    outputs += build(path, given)
                except InputError as error:
                    reader.problems[path] = str(error)
            if outputs:
                yield outputs

    made: Iterator[list[ImageOutput]] = parts()
    if codes is None:
        first = next(made, [])
        reader.require_some(len(first))
        codes = sum(map(_num_sampled, first)) // len(first)
        made = chain([first], made)
    done, sheet, names = 0, [], []
    activity = TASKS[task].activity
    for target, image in session.generate(made, activity, len(paths) * options.n, max(1, codes)):
        session.save(target.path, image, **target.metadata)
        done += 1
        if options.grid:
            sheet.append(image)
            names.append(target.metadata["source"])
    if sheet:
        _save_sheet(session, options, sheet, names, facts)
    return reader.report_failures(done)


def _save_sheet(
    session: GenerationSession,
    options: ImageTaskOptions,
    images: Sequence[GeneratedImage],
    names: Sequence[str],
    facts: Mapping[str, str],
) -> None:
    """Save a contact sheet of images in groups by the names of the given ones."""
    from cogview.image_io.captioned_sheet import captioned_sheet, group_images, legend

    groups = group_images(names, images)
    page = captioned_sheet(groups, print_note)
    shared = {key: text for key, text in images[0].metadata("").items() if key in ("strength", "keep")}
    texts = {**facts, **shared, "source": "\n".join(dict.fromkeys(names)), "n": str(options.n)}
    path = options.output / f"grid-seed{session.seed}.png"
    session.save_sheet(path, page, images, captions=legend(groups), **texts)


def _num_sampled(output: ImageOutput) -> int:
    """Return the number of codes that are sampled for an image with a mask."""
    assert output.request.mask is not None
    return round(output.request.strength * int(output.request.mask.sum()))
