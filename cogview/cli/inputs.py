"""Images that commands read, and the texts that belong to them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cogview.cli.text_io import read_lines
from cogview.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

READ_AT_A_TIME = 64  # images, where nothing says how many

T = TypeVar("T")


class ImageReader:
    """The images of one command. One that cannot be read stops no other, and is told at the end."""

    def __init__(self) -> None:
        self.problems: dict[Path, str] = {}  # of images that cannot be read, in the order they were tried
        self._noted: set[Path] = set()

    def find(self, arguments: Sequence[str]) -> list[Path]:
        """The files that names, folders and globs stand for; what stands for none keeps its place, with a problem.

        InputError if there is nothing else.
        """
        from cogview.image_io.reading import find_images

        paths: list[Path] = []
        for argument in arguments:
            try:
                paths += find_images([argument])
            except InputError as error:
                self.problems[Path(argument)] = str(error)
                paths.append(Path(argument))
        self.require_some(sum(path not in self.problems for path in paths))
        return paths

    def read(self, path: Path, side: int) -> Image.Image | None:
        """The image at ``path``, ``side`` x ``side`` pixels in RGB; None, and a problem, if there is none to be had.

        Says on stderr, once for each file, if that took more than reading.
        """
        from PIL import Image
        from tqdm import tqdm

        from cogview.image_io.reading import fit, read_image

        if path in self.problems:
            return None
        try:
            pixels, note = fit(read_image(path), side)
        except InputError as error:
            self.problems[path] = str(error)
            return None
        if note is not None and path not in self._noted:
            self._noted.add(path)
            tqdm.write(f"note: {path}: {note}", file=sys.stderr)
        return Image.fromarray(pixels)

    def read_all(self, paths: Sequence[Path], side: int) -> Iterator[tuple[int, Image.Image]]:
        """Those of ``paths`` that can be read, each when it is its turn, with their numbers in the list."""
        for number, path in enumerate(paths):
            if (image := self.read(path, side)) is not None:
                yield number, image

    def require_some(self, done: int) -> None:
        """InputError if images could not be read and none was ``done``."""
        if self.problems and not done:
            first, count = next(iter(self.problems.values())), len(self.problems)
            raise InputError(first if count == 1 else f"none of {count} images can be read; the first: {first}")

    def report_failures(self, done: int) -> int:
        """Name on stderr the images that could not be read; returns 1 if there were some beside the ``done``, else 0.

        InputError if there were no others.
        """
        self.require_some(done)
        for problem in self.problems.values():
            print(f"failed: {problem}", file=sys.stderr)
        return 1 if self.problems else 0


@dataclass(frozen=True, kw_only=True)
class TextImageQuery:
    """A text and the images that it belongs to."""

    prompt: str
    paths: tuple[Path, ...]

    @classmethod
    def parse(cls, line: str) -> TextImageQuery:
        """From TEXT<TAB>IMAGE<TAB>IMAGE…, with any number of images."""
        prompt, *names = (field.strip() for field in line.split("\t"))
        return cls(prompt=prompt, paths=tuple(map(Path, names)))


def read_queries(args: argparse.Namespace, images: ImageReader, line: str) -> list[TextImageQuery]:
    """What ``add_query_arguments`` was given: one query, or one for each ``line`` of the file."""
    if args.input is not None:
        if args.images or args.prompt is not None:
            raise InputError("--input brings texts and images: give it alone, or --prompt TEXT and IMAGE…")
        return [TextImageQuery.parse(text) for text in read_lines(args.input, f"lines {line}")]
    if args.prompt is None or not args.images:
        raise InputError(f"give --prompt TEXT and IMAGE…, or --input FILE with lines {line}")
    return [TextImageQuery(prompt=args.prompt, paths=tuple(images.find(args.images)))]


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``, the last of which may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
