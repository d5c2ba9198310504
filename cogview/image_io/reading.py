"""Images that users give: found in folders and by patterns, read from any file Pillow knows, fitted to a model."""

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
    """The files that ``arguments`` stand for, in their order; what is named twice comes twice.

    An argument is a file, a folder (the images directly in it, sorted by name) or a pattern such as ``photos/*.png``,
    which means what a shell would have made of it. An existing file is never taken for a pattern. A named file is
    neither opened nor looked for: ``read_image`` says what is wrong with it, when its turn comes.
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
    """The image in the file ``path``, RGB, turned upright by its EXIF data; the first one of several frames.

    Any mode is read: transparency is laid on white, greys of more than 8 bits are scaled to 8. InputError if the file
    is missing, no image, damaged, or has more than ``MAX_PIXELS`` pixels; Pillow's warnings are kept to ourselves.
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
        with contextlib.suppress(Exception):  # broken EXIF data says nothing of the pixels: viewers pass over it, too
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def fit(image: Image.Image, side: int) -> tuple[np.ndarray, str | None]:
    """``image`` as uint8 RGB (side, side, 3), owned by the caller, and a note on what was done; None if nothing was.

    The short side becomes ``side`` pixels long (Lanczos), the middle is kept: as if the whole image were resized and
    then cropped, but only what is kept is computed.
    """
    width, height = image.size
    short = min(width, height)
    if not short:
        raise InputError(f"the image is {width} x {height} pixels, expected at least 1 x 1")
    left, top = (width - short) // 2, (height - short) // 2
    middle = (left, top, left + short, top + short)
    # A large image is first averaged by whole factors, quickly, to no less than 3 times the size: hardly to be seen.
    square = _rgb(image).resize((side, side), Image.Resampling.LANCZOS, box=middle, reducing_gap=3.0)
    before, after = f"{width} x {height}", f"{side} x {side}"
    if width == height:
        note = None if short == side else f"resized from {before} to {after}"
    else:
        note = f"cropped from {before} to {after}" if short == side else f"resized from {before} and cropped to {after}"
    return np.array(square), note


def _images_in(folder: Path) -> list[Path]:
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
    """The image as it is stored. Its size is known from the header and judged before anything is decoded."""
    start = b""
    pillows_limit = Image.MAX_IMAGE_PIXELS
    try:
        start = file.peek(16)
        Image.MAX_IMAGE_PIXELS = None  # ours says the size, and what to do
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
    """``image``, of any mode, as a new RGB image: transparency on white, greys of more than 8 bits scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    paint = image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(paint, mask=paint)
    return on_white


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits, or floats, as mode L. White is 65535; of floats 1, 255 or 65535, whichever holds them.

    Where a value is greater still, the greatest is white: nothing but negative values is clipped.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0).clip(min=0.0)
    greatest = float(values.max())
    usual_whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((white for white in usual_whites if white >= greatest), greatest)
    levels = np.rint(values * (255.0 / white)).astype(np.uint8)
    if "transparency" in image.info:  # the one grey of a PNG that is transparent
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels)
