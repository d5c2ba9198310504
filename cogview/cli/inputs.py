"""Images that commands read, and the texts that belong to them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from cogview.cli.messages import print_message
from cogview.cli.options import Decorator, argument, option_group
from cogview.cli.text_io import read_lines
from cogview.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from cogview.pipeline.cogview import CogView

IMAGES_HELP = "image files, folders or glob patterns"
READ_AT_A_TIME = 64  # images in memory where no batch size limits them

T = TypeVar("T")


class ImageReader:
    """Reader of the images of one command; images that cannot be read are skipped and listed at the end.

    Attributes:
        problems: Message of each image that cannot be read, in the order in which they were tried.
        sizes: Width and height of each image that was read, before it was fitted.
    """

    def __init__(self) -> None:
        self.problems: dict[Path, str] = {}
        self.sizes: dict[Path, tuple[int, int]] = {}
        self._noted: set[Path] = set()

    def find(self, arguments: Sequence[str]) -> list[Path]:
        """Return the files that names, folders and glob patterns stand for.

        An argument that matches no file is returned as a path with a problem.

        Raises:
            InputError: No argument matches a file.
        """
        from cogview.image_io.reading import find_images

        paths: list[Path] = []
        for name in arguments:
            try:
                paths += find_images([name], lambda note: print_message("note", note))
            except InputError as error:
                self.problems[Path(name)] = str(error)
                paths.append(Path(name))
        self.require_some(sum(path not in self.problems for path in paths))
        return paths

    def read(self, path: Path, model: CogView, task: str, *, tiles: bool = False) -> Image.Image | None:
        """Read an image and fit it to the size that ``task`` of ``model`` is given; one for ``tiles`` keeps its size.

        Prints notes on stderr, once for each file: how the image was read, resized or cropped, and that it is unlike
        the images of the training.

        Returns:
            The image; None, with a problem recorded, if it cannot be read.
        """
        from cogview.image_io.reading import read_image
        from cogview.pipeline.captioning import NOTED
        from cogview.pipeline.tiles import tiles_problem

        if path in self.problems:
            return None
        notes: list[str] = []
        try:
            image = read_image(path, notes.append)
            self.sizes[path] = image.size
            note = None
            if tiles:
                problem = tiles_problem(image.width, image.height, model.image_size(task))
            else:
                problem = model.enlargement_problem(image, task=task)
            if problem is not None:
                raise InputError(f"image {path}: {problem}")
            if not tiles:
                image, note = model.fit_image(image, task=task)
        except InputError as error:
            self.problems[path] = str(error)
            return None
        image.info[NOTED] = True
        if path not in self._noted:
            self._noted.add(path)
            for line in (*notes, note, model.image_warning(image, task=task, tiles=tiles)):
                if line is not None:
                    print_message("note", f"{path}: {line}", file=str(path))
        return image

    def read_all(
        self, paths: Sequence[Path], model: CogView, task: str = "generate", *, tiles: bool = False
    ) -> Iterator[tuple[int, Image.Image]]:
        """Yield the index in ``paths`` and the image of each path that can be read; see ``read``."""
        for index, path in enumerate(paths):
            if (image := self.read(path, model, task, tiles=tiles)) is not None:
                yield index, image

    def require_some(self, done: int) -> None:
        """Raise InputError if images could not be read and none was processed (``done`` is 0)."""
        if self.problems and not done:
            first, count = next(iter(self.problems.values())), len(self.problems)
            raise InputError(first if count == 1 else f"none of {count} images can be read; the first: {first}")

    def report_failures(self, done: int) -> int:
        """Print the images that could not be read on stderr.

        Args:
            done: Number of images that were processed.

        Returns:
            The exit status: 1 if there were failures, else 0.

        Raises:
            InputError: All images failed.
        """
        self.require_some(done)
        for path, problem in self.problems.items():
            print_message("failed", problem, file=str(path))
        return 1 if self.problems else 0


@dataclass(frozen=True, kw_only=True)
class TextImageQuery:
    """A text and the images that it belongs to."""

    prompt: str
    paths: tuple[Path, ...]

    @classmethod
    def parse(cls, line: str) -> TextImageQuery:
        """Parse TEXT<TAB>IMAGE<TAB>IMAGE…, with any number of images."""
        prompt, *names = (field.strip() for field in line.split("\t"))
        return cls(prompt=prompt, paths=tuple(map(Path, names)))


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """Texts and images of a command: IMAGE… with one ``--prompt``, or the lines of ``--input``."""

    images: tuple[str, ...]
    prompt: str | None
    input: str | None
    line: str  # form of a line of the file

    def read(self, reader: ImageReader) -> list[TextImageQuery]:
        """Return one query for the prompt, or one for each line of the file.

        Raises:
            InputError: Neither or both were given, no image matches, or the file cannot be read.
        """
        if self.input is not None:
            if self.images or self.prompt is not None:
                raise InputError("--input holds texts and images: give either --input or --prompt TEXT and IMAGE…")
            return [TextImageQuery.parse(text) for text in read_lines(self.input, f"lines {self.line}")]
        if self.prompt is None or not self.images:
            raise InputError(f"give --prompt TEXT and IMAGE…, or --input FILE with lines {self.line}")
        return [TextImageQuery(prompt=self.prompt, paths=tuple(reader.find(self.images)))]


def query_options(line: str) -> Decorator:
    """Add IMAGE…, ``--prompt`` and ``--input``, passed as ``queries: QueryOptions``.

    Args:
        line: Form of a line of the file, such as ``TEXT<TAB>IMAGE``.
    """
    return option_group(
        functools.partial(QueryOptions, line=line),
        "queries",
        ("images", "prompt", "input"),
        argument("images", nargs=-1, metavar="IMAGE", help=IMAGES_HELP),
        click.option("--prompt", metavar="TEXT", help="text of every IMAGE"),
        click.option(
            "--input",
            metavar="FILE",
            help=f"UTF-8 file with lines {line}, in place of --prompt and IMAGE; - reads standard input",
        ),
    )


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield ``items`` in lists of ``size``; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
