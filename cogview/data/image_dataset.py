"""Protocol of captioned images, from which tokenizers are trained and token stores are built.

An application implements :class:`ImageDataset` for one split of its images. The VQ-VAE trainer
(``cogview.training.vqvae_trainer``), the text tokenizer (``cogview.training.text_tokenizer``) and the store builder
(``cogview.data.builders.encode``) read nothing else. ``cogview.emoji.datasets`` is an implementation.
"""

# H, W image in pixels
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cogview.errors import InputError
from cogview.tokenizers.tasks import TASKS
from cogview.tokenizers.vocabulary import MAX_GRID


@dataclass(frozen=True, kw_only=True)
class NamedRegion:
    """Part of an image that shows one named object.

    Args:
        names: Names of the object in captions.
        box: Left, top, right and bottom as fractions of the image's side, in [0, 1].
    """

    names: tuple[str, ...]
    box: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageExample:
    """One image of a dataset with its captions.

    Args:
        identity: Name of the example that no other example of the data has, and that is the same in every run.
        captions: One caption or several; none where only an image tokenizer is trained.
        render: Return the image at a scale of the dataset's ``side``, as uint8 RGB (side * scale, side * scale, 3).
            All scales show the same content: 1 is the image itself, 2 a larger rendition for the task upscale, 0.5 a
            smaller one for the task low_level.
        regions: Where named objects are, for stores that supervise names; empty by default.
        instruction: Text of the edit that leads from another image to this one; empty without such an image.
        render_source: Return the image before the edit, as ``render`` does; None without one.
    """

    identity: str
    captions: tuple[str, ...]
    render: Callable[[float], np.ndarray]
    regions: tuple[NamedRegion, ...] = ()
    instruction: str = ""
    render_source: Callable[[float], np.ndarray] | None = None

    @staticmethod
    def from_pixels(pixels: np.ndarray, *, side: int, identity: str, captions: tuple[str, ...]) -> ImageExample:
        """Return an example that is rendered by resizing a stored image.

        Args:
            pixels: uint8 RGB (H, H, 3); at least twice ``side`` where a larger rendition is needed.
            side: Side of the image at scale 1, in pixels.
            identity: As of the class.
            captions: As of the class.

        Raises:
            ValueError: The image is not square uint8 RGB.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape != (len(pixels), len(pixels), 3):
            raise ValueError(f"example {identity} needs uint8 (H, H, 3), got {pixels.dtype} {pixels.shape}")

        def render(scale: float) -> np.ndarray:
            from PIL import Image

            size = round(side * scale)
            if len(pixels) == size:
                return pixels
            return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))

        return ImageExample(identity=identity, captions=captions, render=render)


class ImageDataset(Protocol):
    """One split of captioned square images; a second dataset holds the held-out split.

    Example ``i`` must be a function of ``i`` alone, so that interrupted work can be resumed. Worker processes get a
    pickled copy of the dataset.
    """

    @property
    def side(self) -> int:
        """Side of the images at scale 1, in pixels."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Every name that regions may have, and that may become a text piece; empty without regions."""
        ...

    @property
    def is_shuffled(self) -> bool:
        """Whether consecutive examples are independent, as those of a generator; others are shuffled for training."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Description of the data for the header of a store, as plain JSON data."""
        ...

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> ImageExample:
        """Return example ``index``, from 0 to ``len`` - 1."""
        ...


def render(example: ImageExample, side: int, scale: float = 1) -> np.ndarray:
    """Render an example and check the result.

    Args:
        example: The example.
        side: Side of the dataset's images at scale 1, in pixels.
        scale: Scale of the rendition.

    Returns:
        uint8 RGB (side * scale, side * scale, 3).

    Raises:
        InputError: The rendition has another shape or dtype.
    """
    return _checked(example.render(scale), example, round(side * scale), scale)


def render_source(example: ImageExample, side: int) -> np.ndarray:
    """Render the image before the edit of an example and check the result.

    Args:
        example: The example.
        side: Side of the dataset's images at scale 1, in pixels.

    Returns:
        uint8 RGB (side, side, 3).

    Raises:
        InputError: The example has no edit, or the rendition has another shape or dtype.
    """
    if example.render_source is None or not example.instruction:
        raise InputError(
            f"image {example.identity} has no edit that leads to it, expected render_source and instruction of its "
            "example; leave out source: true otherwise"
        )
    return _checked(example.render_source(1), example, side, 1)


def _checked(pixels: np.ndarray, example: ImageExample, size: int, scale: float) -> np.ndarray:
    """Return a rendition; InputError unless it is uint8 RGB (size, size, 3)."""
    if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
        raise InputError(
            f"image {example.identity} at scale {scale:g} must be uint8 ({size}, {size}, 3), "
            f"got {pixels.dtype} {pixels.shape}"
        )
    return pixels


def check_dataset(dataset: ImageDataset, downsampling: int, tasks: Iterable[str] = ()) -> None:
    """Check that a dataset has images, and that their sides divide into codes (``check_side``).

    Args:
        dataset: The images.
        downsampling: Pixels on each side of the square that one code stands for.
        tasks: Names of the tasks that the images are for.

    Raises:
        InputError: There are no images, or their side does not divide.
    """
    if not len(dataset):
        raise InputError("the dataset has no images, expected at least 1")
    check_side(dataset.side, downsampling, tasks)


def check_side(side: int, downsampling: int, tasks: Iterable[str] = ()) -> None:
    """Check that images divide into codes, and these into the parts that tasks need.

    Args:
        side: Side of the images in pixels.
        downsampling: Pixels on each side of the square that one code stands for.
        tasks: Names of tasks.

    Raises:
        InputError: They do not; the message has the nearest sides that do.
    """
    multiples = {task: TASKS[task].grid_multiple for task in tasks}
    step, largest = downsampling * math.lcm(*multiples.values()), downsampling * MAX_GRID
    if side % step == 0 and side <= largest:
        return
    grid, below = side // downsampling, min(side, largest) // step * step
    nearest = " and ".join(str(fitting) for fitting in (below, below + step) if 0 < fitting <= largest)
    if side % downsampling:
        raise InputError(
            f"images of {side} pixels do not divide into codes of {downsampling} x {downsampling} pixels; the nearest "
            f"sides that fit: {nearest}"
        )
    for task, multiple in multiples.items():
        if grid % multiple:
            raise InputError(
                f"images of {side} pixels have {grid} codes on a side, but the task {task} needs a multiple of "
                f"{multiple}; the nearest sides that fit: {nearest}"
            )
    raise InputError(
        f"images of {side} pixels have {grid} codes on a side, at most {MAX_GRID} fit a model; the nearest side that "
        f"fits: {nearest}"
    )


def caption_of(dataset: ImageDataset, row: int) -> tuple[ImageExample, str]:
    """Return the example and caption of a row; rows beyond the examples pair them with their next captions.

    Row r holds example r % len and its caption number r // len, modulo the number of its captions.

    Args:
        dataset: The images and captions.
        row: Row of the store, from 0.

    Raises:
        InputError: The example has no caption.
    """
    size = len(dataset)
    example = dataset[row % size]
    if not example.captions:
        raise InputError(f"example {example.identity} has no caption, expected at least one")
    return example, example.captions[row // size % len(example.captions)]


def texts(dataset: ImageDataset) -> Iterator[str]:
    """Yield every caption and instruction of every example, in the order of the dataset."""
    for index in range(len(dataset)):
        example = dataset[index]
        yield from example.captions
        if example.instruction:
            yield example.instruction
