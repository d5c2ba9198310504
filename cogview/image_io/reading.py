"""Images of users: found in folders and by patterns, read from files of named formats, fitted to a model."""

from __future__ import annotations

import contextlib
import glob
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cogview.errors import InputError, reason_of
from cogview.formatting import format_list
from cogview.image_io.colour import to_srgb

FitRule: TypeAlias = Literal["crop", "pad", "stretch"]  # how an image becomes a square
# No other format is ever opened: Pillow would start Ghostscript for PostScript, whatever the name of the file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
EXPECTED = "PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"
# Looked for in folders; a file that is named may have any other.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
UNREAD_SUFFIXES = (".avif", ".cr2", ".dng", ".eps", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".nef", ".psd", ".svg")
MAX_PIXELS = 64_000_000  # Pillow takes 4 bytes a pixel, and again as much to turn the image or to lay it on white
MAX_JPEG_PIXELS = 128_000_000  # photos of 108-megapixel phones pass
MAX_SIDE = 65_535  # pixels, as JPEG has it: each row of an image costs time, however narrow it is
MAX_WEBP_BYTES = 200_000_000  # which Pillow holds in memory as a whole
MAX_SHOWN = 5  # names in a note
REDUCING_GAP = 3.0  # times the size, from which on images are averaged before they are resized
SHEET_PREFIX = "grid-"  # of the file name of a contact sheet
SHEET_KEY = "codes_sha256"  # of the metadata of a contact sheet
# White of greys with more than 8 bits: that of 8, 10, 12 and 16 bits. A photo whose brightest pixel has a fraction of
# 1/16 of the nominal white is hardly meant to be black.
_INTEGER_WHITES = (255.0, 1023.0, 4095.0, 65535.0)
_FLOAT_WHITES = (1.0, 255.0, 65535.0)

_PILLOW = threading.Lock()  # filters of warnings and Pillow's own limit belong to the whole process


def ignore_note(note: str) -> None:
    """Ignore a note."""


def find_images(arguments: Sequence[str], on_note: Callable[[str], object] = ignore_note) -> list[Path]:
    """Return the image files that arguments of a command name, in their order; repeats are kept.

    Args:
        arguments: Files, folders (for the images directly in them, sorted by name, without contact sheets) or patterns
            such as ``photos/*.png``, expanded as a shell does. An existing file is never taken for a pattern.
        on_note: Called with a line about the images of a folder that are passed over: contact sheets, and formats that
            no reader knows.

    Returns:
        Paths. Named files are not opened; ``read_image`` reports what is wrong with them.

    Raises:
        InputError: If there is no argument, a pattern matches no file, or a folder has no image.
    """
    if not arguments:
        raise InputError("no image was given; name files, folders, or patterns such as 'photos/*.png'")
    images = []
    for argument in arguments:
        if not argument:  # Path("") is the working folder
            raise InputError("the name of an image is empty; name files, folders, or patterns such as 'photos/*.png'")
        names = [argument]
        if glob.has_magic(argument) and not os.path.lexists(argument):
            names = sorted(glob.glob(argument))  # noqa: PTH207  a pattern may be absolute
            if not names:
                raise InputError(f'the pattern "{argument}" matches no file')
        for name in names:
            images += _images_in(Path(name), on_note) if Path(name).is_dir() else [Path(name)]
    return images


def read_image(
    path: Path, on_note: Callable[[str], object] = ignore_note, *, content: bytes | None = None
) -> Image.Image:
    """Read an image file.

    Any mode is read: transparency is laid on white, greys of more than 8 bits are scaled to 8, and colours are
    converted to sRGB if the file has a colour profile. Warnings of Pillow are suppressed.

    Args:
        path: The file; its format is detected by its content and must be one of ``FORMATS``.
        on_note: Called with a line about a choice that changes the pixels, such as a colour profile that is ignored.
        content: Bytes of the file where they are a part of another one, such as an archive; ``path`` then names them.

    Returns:
        The first frame as RGB, turned upright by its EXIF data.

    Raises:
        InputError: If the file is missing, no image, damaged, or has too many pixels (``MAX_PIXELS``, ``MAX_SIDE``).
    """
    with open_image(path, content=content) as image:
        if _has_frames(image):
            on_note("it has several frames, and the first is taken")
        try:
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF data does not affect the pixels
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image, on_note)
        except Exception as error:  # Pillow's readers raise nearly anything on broken data
            raise damaged_image(path, error) from None


@contextlib.contextmanager
def open_image(
    path: Path, formats: tuple[str, ...] = FORMATS, *, content: bytes | None = None
) -> Iterator[Image.Image]:
    """Open an image file, check its size by its header, and yield it before its pixels are decoded.

    Args:
        path: The file, which must be a regular one: reading a pipe might wait for ever.
        formats: Formats to accept, by Pillow's names.
        content: Bytes of the file where they are a part of another one; ``path`` then only names them.

    Yields:
        The image; the file is closed when the block ends. Other threads wait meanwhile.

    Raises:
        InputError: If the file is missing, no image of these formats, damaged, or has too many pixels.
    """
    file: BufferedReader[Any] = _open_file(path) if content is None else BufferedReader(BytesIO(content))
    with file, _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(file, path, formats)
        _check_size(image, path)
        yield image


def fit(
    image: Image.Image,
    side: int,
    rule: FitRule = "crop",
    *,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
    reducing_gap: float | None = REDUCING_GAP,
) -> tuple[np.ndarray, str | None]:
    """Make a square of an image, by an antialiased filter.

    Args:
        image: Image of any mode.
        side: Pixels.
        rule: ``crop`` keeps the middle, of which alone pixels are computed; ``pad`` adds white on both sides;
            ``stretch`` changes the aspect ratio.
        resampling: The filter.
        reducing_gap: An image of more than this many times the size is first averaged by whole factors, which is
            fast and hardly visible; None for the filter alone, as measures need it.

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
    before, after = f"{width} x {height}", f"{side} x {side}"
    resize = partial(to_rgb(image).resize, resample=resampling, reducing_gap=reducing_gap)
    if rule != "crop" and width != height:
        square = _padded(resize, image.size, side) if rule == "pad" else resize((side, side))
        done = f"padded from {before} to {after}" if rule == "pad" else f"stretched from {before} to {after}"
        return np.array(square), done
    left, top = (width - short) // 2, (height - short) // 2
    middle = (left, top, left + short, top + short)
    square = resize((side, side), box=middle)
    if width == height:
        note = None if short == side else f"resized from {before} to {after}"
    else:
        note = f"cropped from {before} to {after}" if short == side else f"resized from {before} and cropped to {after}"
    return np.array(square), note


def padded_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the width and height of an image that is scaled to fit into a square of ``side`` pixels."""
    longer = max(size)
    return max(1, round(size[0] * side / longer)), max(1, round(size[1] * side / longer))


def _padded(resize: Callable[[tuple[int, int]], Image.Image], size: tuple[int, int], side: int) -> Image.Image:
    """Return an RGB image in the middle of a white square.

    Args:
        resize: Returns the image with another size.
        size: Its size.
        side: Pixels of the square.
    """
    width, height = padded_size(size, side)
    square = Image.new("RGB", (side, side), "white")
    square.paste(resize((width, height)), ((side - width) // 2, (side - height) // 2))
    return square


def _images_in(folder: Path, on_note: Callable[[str], object]) -> list[Path]:
    """Return the images directly in a folder, sorted by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from None
    files = [name for name in names if not name.startswith(".") and not (folder / name).is_dir()]
    images = [folder / name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    if unread := [name for name in files if name.lower().endswith(UNREAD_SUFFIXES)]:
        on_note(f"{folder}: passed over {format_list(unread, MAX_SHOWN)}; expected {EXPECTED}")
    if sheets := [path for path in images if _is_contact_sheet(path)]:
        shown = format_list((path.name for path in sheets), MAX_SHOWN)
        on_note(f"{folder}: passed over contact sheets: {shown}")
        images = [path for path in images if path not in set(sheets)]
    if not images:
        raise InputError(
            f"the folder {folder} holds no image: looked for names in {', '.join(IMAGE_SUFFIXES)}, not in folders below"
        )
    return images


def _is_contact_sheet(path: Path) -> bool:
    """Return whether a file has the name and the metadata of a contact sheet of the commands."""
    if not path.name.startswith(SHEET_PREFIX):
        return False
    try:
        with open_image(path, ("PNG",)) as image:
            return SHEET_KEY in getattr(image, "text", {})
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for broken files; InputError is a ValueError
        return False


def _open_file(path: Path) -> BufferedReader:
    """Open a regular file; raise InputError for anything else."""
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise InputError(f"image {path} is no regular file; expected an image file")
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, expected an image file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, InputError):
            raise
        raise InputError(f"image {path} cannot be read: {reason_of(error)}") from None


def _has_frames(image: Image.Image) -> bool:
    """Return whether an image has several frames; the previews in photos of cameras (MPO) do not count."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # damaged beyond its first frame, which may be whole
        return False


def _open(file: BufferedReader[Any], path: Path, formats: tuple[str, ...]) -> Image.Image:
    """Return the image of an open file; nothing but its header is read."""
    start = b""
    pillows_limit = Image.MAX_IMAGE_PIXELS
    try:
        start = file.peek(16)
        if start[8:12] == b"WEBP" and (size := file.seek(0, os.SEEK_END)) > MAX_WEBP_BYTES:
            raise InputError(f"{path} has {size:,} bytes; at most {MAX_WEBP_BYTES:,} are read: scale it down first")
        file.seek(0)
        Image.MAX_IMAGE_PIXELS = None  # ``_check_size`` has the size and the remedy
        try:
            return Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = pillows_limit
    except UnidentifiedImageError:  # no format's header, or not a whole one
        if not start:
            raise InputError(f"{path} is empty, expected an image") from None
        if not start.startswith((b"\x89PNG", b"\xff\xd8\xff")) and start[8:12] != b"WEBP":
            raise InputError(f"{path} is no image that can be read; expected {EXPECTED}") from None
        raise InputError(f"{path} is cut off or damaged: its header does not give the size of an image") from None
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on broken data
        raise damaged_image(path, error) from None


def _check_size(image: Image.Image, path: Path) -> None:
    """Raise InputError if an image is too large to be decoded."""
    width, height = image.size
    most = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS
    if width * height > most:
        raise InputError(
            f"{path} is {width} x {height} pixels, {width * height:,} in all; "
            f"at most {most:,} are read: scale it down first"
        )
    if max(width, height) > MAX_SIDE:
        raise InputError(f"{path} is {width} x {height} pixels; at most {MAX_SIDE:,} a side are read: crop it first")


def damaged_image(path: Path, error: Exception) -> InputError:
    """Return the error of a file that Pillow cannot decode."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path} is cut off or damaged: {reason}")


def to_rgb(image: Image.Image, on_note: Callable[[str], object] = ignore_note) -> Image.Image:
    """Return an image of any mode as RGB: in sRGB, transparency on white, greys of more than 8 bits scaled to 8."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, on_note)
    if profile:
        image = to_srgb(image, profile, on_note)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large photo takes much memory
    paint = image if image.mode == "RGBA" else image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(paint, mask=paint)
    return on_white


def _eight_bits(image: Image.Image, on_note: Callable[[str], object]) -> Image.Image:
    """Return greys of 16 or 32 bits, or floats, as mode L.

    White is the smallest of the usual whites that no value exceeds. If a value exceeds them all, the largest value is
    white: only negative values are clipped.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0).clip(min=0.0)
    greatest = float(values.max(initial=0.0))
    whites = _FLOAT_WHITES if image.mode == "F" else _INTEGER_WHITES
    white = next((white for white in whites if white >= greatest), greatest)
    if white not in (1.0, 65535.0):
        on_note(f"its values reach {greatest:g}, so {white:g} was taken for white")
    levels = np.rint(values * (255.0 / white)).astype(np.uint8)
    if "transparency" in image.info:  # the one grey of a PNG that is transparent
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels)
