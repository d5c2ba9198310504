"""Images of users: found in folders and by patterns, read from any file that Pillow knows, fitted to a model."""

from __future__ import annotations

import contextlib
import glob
import os
import threading
import warnings
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cogview.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # looked for in folders; a file that is named may have any other
MAX_PIXELS = 128_000_000  # photos of 108-megapixel phones pass; Pillow takes 4 bytes a pixel, and a copy to turn it

_PILLOW = threading.Lock()  # filters of warnings and Pillow's own limit belong to the whole process


def find_images(arguments: Sequence[str]) -> list[Path]:
    """Return the image files that arguments of a command name, in their order; repeats are kept.

    Args:
        arguments: Files, folders (for the images directly in them, sorted by name) or patterns such as
            ``photos/*.png``, expanded as a shell does. An existing file is never taken for a pattern.

    Returns:
        Paths. Named files are not opened; ``read_image`` reports what is wrong with them.

    Raises:
        InputError: If there is no argument, a pattern matches no file, or a folder has no image.
    """
    if not arguments:
        raise InputError("no image was given; name files, folders, or patterns such as 'photos/*.png'")
    images = []
    for argument in arguments:
        names = [argument]
        if glob.has_magic(argument) and not os.path.lexists(argument):
            names = sorted(glob.glob(argument))  # noqa: PTH207  a pattern may be absolute
            if not names:
                raise InputError(f'the pattern "{argument}" matches no file')
        for name in names:
            images += _images_in(Path(name)) if Path(name).is_dir() else [Path(name)]
    return images


def read_image(path: Path) -> Image.Image:
    """Read an image file.

    Any mode is read: transparency is laid on white, greys of more than 8 bits are scaled to 8. Warnings of Pillow are
    suppressed.

    Args:
        path: The file; its format is detected by its content.

    Returns:
        The first frame as RGB, turned upright by its EXIF data.

    Raises:
        InputError: If the file is missing, no image, damaged, or has more than ``MAX_PIXELS`` pixels.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, expected an image file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"image {path} cannot be read: {reason}") from None
    with file, _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _decode(file, path)
        with contextlib.suppress(Exception):  # damaged EXIF data does not affect the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def fit(image: Image.Image, side: int) -> tuple[np.ndarray, str | None]:
    """Resize and crop an image to a square.

    The short side is resized to ``side`` pixels (Lanczos), and the middle is kept. Only the kept part is computed.

    Args:
        image: Image of any mode.
        side: Pixels.

    Returns:
        The uint8 RGB pixels (side, side, 3), and a note such as "resized from 128 x 96 and cropped to 64 x 64", or
        None if nothing was changed.

    Raises:
        InputError: If the image has no pixels.
    """
    width, height = image.size
    short = min(width, height)
    if not short:
        raise InputError(f"the image is {width} x {height} pixels, expected at least 1 x 1")
    left, top = (width - short) // 2, (height - short) // 2
    middle = (left, top, left + short, top + short)
    # A large image is first averaged by whole factors to at least 3 times the size: fast, and hardly visible.
    square = _rgb(image).resize((side, side), Image.Resampling.LANCZOS, box=middle, reducing_gap=3.0)
    before, after = f"{width} x {height}", f"{side} x {side}"
    if width == height:
        note = None if short == side else f"resized from {before} to {after}"
    else:
        note = f"cropped from {before} to {after}" if short == side else f"resized from {before} and cropped to {after}"
    return np.array(square), note


def _images_in(folder: Path) -> list[Path]:
    """Return the images directly in a folder, sorted by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from None
    images = [
        folder / name
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") and not (folder / name).is_dir()
    ]
    if not images:
        raise InputError(
            f"the folder {folder} holds no image: looked for names in {', '.join(IMAGE_SUFFIXES)}, not in folders below"
        )
    return images


def _decode(file: BufferedReader, path: Path) -> Image.Image:
    """Return the image as it is stored; its size is checked by the header, before anything is decoded."""
    start = b""
    pillows_limit = Image.MAX_IMAGE_PIXELS
    try:
        start = file.peek(16)
        Image.MAX_IMAGE_PIXELS = None  # the message below has the size and the remedy
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = pillows_limit
        if image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"{path} is {image.width} x {image.height} pixels, {image.width * image.height:,} in all; "
                f"at most {MAX_PIXELS:,} are read: scale it down first"
            )
        image.load()
    except InputError:
        raise
    except UnidentifiedImageError:  # no format's header, or not a whole one
        if not start:
            raise InputError(f"{path} is empty, expected an image") from None
        if not start.startswith((b"\x89PNG", b"\xff\xd8\xff")) and start[8:12] != b"WEBP":
            raise InputError(f"{path} is no image that can be read; expected PNG, JPEG or WebP") from None
        raise InputError(f"{path} is cut off or damaged: its header does not give the size of an image") from None
    except Exception as error:  # Pillow's readers raise nearly anything on broken data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is cut off or damaged: {reason}") from None
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as a new RGB image: transparency on white, greys of more than 8 bits scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    paint = image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(paint, mask=paint)
    return on_white


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return greys of 16 or 32 bits, or floats, as mode L.

    White is 65535, and for floats the smallest of 1, 255 and 65535 that is not exceeded. If a value exceeds them all,
    the largest value is white: only negative values are clipped.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0).clip(min=0.0)
    greatest = float(values.max())
    usual_whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((white for white in usual_whites if white >= greatest), greatest)
    levels = np.rint(values * (255.0 / white)).astype(np.uint8)
    if "transparency" in image.info:  # the one grey of a PNG that is transparent
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels)
