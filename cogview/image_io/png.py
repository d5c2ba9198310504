"""PNG files: safe names, text chunks with the metadata of an image, and no other image overwritten.

Metadata are plain mappings of texts; ``GeneratedImage.metadata`` makes those of a generated image.
"""

# H height, W width, G codes on a side of an image

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from cogview.errors import InputError, reason_of
from cogview.files import atomic_write
from cogview.image_io.a1111 import A1111_KEY, a1111_parameters
from cogview.image_io.reading import SHEET_KEY, open_image

GREY = 128  # of codes that are not sampled yet
NAME_BYTES = 90  # of a prompt in a file name; file systems allow 143 to 255 for the whole name

_UNSAFE = re.compile(r'[\s<>:"/\\|?*_]+')  # what Windows forbids, the separators of all systems, and white space
_WINDOWS_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\.|$)", re.IGNORECASE)
# Fields of ``Sampling``.
SAMPLING_KEYS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "guidance",
    "text_attention",
    "noise_version",
    "image_guidance",
)
# The formats of weights and KV cache, and the revision of a model on the Hub; older files do not name them.
PRECISION_KEYS = ("dtype", "kv_dtype", "revision")
# The task of a small image that was upscaled, and its settings in JSON.
SOURCE_KEYS = ("source_task", "source_sampling")
# Keys whose values may differ between two runs that generate the same image.
_NOT_IDENTITY = ("log_probability", "score", "score_per_piece", "rank", "cogview", *PRECISION_KEYS, *SOURCE_KEYS)
# Settings of images in older files, which do not name them.
DEFAULTS_OF_OLD_FILES = {"guidance": "1.0", "text_attention": "1.0", "min_p": "0.0", "noise_version": "1"}


def safe_name(text: str) -> str:
    """Return ``text`` as part of a file name that is valid on every system.

    The name has at most 90 bytes of UTF-8. It is never empty, hidden or a path. Different texts may get one name;
    ``save_png`` keeps their files apart.
    """
    visible = (
        " " if unicodedata.category(character)[0] == "C" else character
        for character in unicodedata.normalize("NFC", text)
    )
    name = _UNSAFE.sub("_", "".join(visible)).lstrip("_.-~")
    name = name.encode("utf-8", "ignore")[:NAME_BYTES].decode("utf-8", "ignore").rstrip("_.")
    return f"_{name}" if not name or _WINDOWS_DEVICE.match(name) else name


def ranked_path(path: Path, rank: int, count: int) -> Path:
    """Return the path of an image among the best of its prompt, so that names sort by rank.

    Args:
        path: Path of the image by its number, such as ``一只猫-seed7-12.png``.
        rank: From 1, the best.
        count: Number of the best images.

    Returns:
        A path such as ``一只猫-seed7-best1-12.png``.
    """
    head, _, number = path.stem.rpartition("-")
    return path.with_name(f"{head}-best{rank:0{len(str(count))}}-{number}{path.suffix}")


def sheet_metadata(parts: Sequence[Mapping[str, str]], **facts: str) -> dict[str, str]:
    """Return the metadata of a contact sheet.

    Args:
        parts: Metadata of its images.
        **facts: Further text chunks.

    Returns:
        The settings of the first image; ``prompt`` with a line for each prompt; ``codes_sha256`` of all codes; and
        ``score`` and ``score_per_piece`` with a number for each image, if all have one.
    """
    shared = {
        key: parts[0][key]
        for key in ("seed", "model", "negative", *SAMPLING_KEYS, *PRECISION_KEYS, "cogview")
        if key in parts[0]
    }
    codes = hashlib.sha256("\n".join(part["codes"] for part in parts).encode()).hexdigest()
    scores = {
        key: " ".join(part[key] for part in parts)
        for key in ("score", "score_per_piece")
        if all(key in part for part in parts)
    }
    prompts = "\n".join(dict.fromkeys(part["prompt"] for part in parts))
    return {"prompt": prompts, SHEET_KEY: codes, **shared, **scores, **facts}


def save_png(path: Path, image: Image.Image, metadata: Mapping[str, str]) -> Path:
    """Write an image with metadata and return its path.

    A file with the same prompt, seed, index, model, settings and codes is the same image and is overwritten. Any other
    file is kept, and the name continues with _2, _3, … A name is claimed before it is used, so that processes which
    save at the same time get different names.

    Args:
        path: Wanted path of the file.
        image: The image.
        metadata: Its text chunks.

    Returns:
        The path of the file.
    """
    target, number = path, 1
    while True:
        is_taken = os.path.lexists(target)  # also by a link that leads nowhere, or elsewhere; it is replaced at most
        if is_taken and not _is_same(read_metadata(target), metadata):
            number += 1
            target = path.with_name(f"{path.stem}_{number}{path.suffix}")
            continue
        try:
            with atomic_write(target, overwrite=is_taken) as temporary:
                _write(temporary, image, metadata)
        except FileExistsError:  # another process has taken the name meanwhile, perhaps for the same image
            continue
        return target


def write_png(path: Path, image: Image.Image, metadata: Mapping[str, str]) -> None:
    """Write an image with metadata to ``path``, atomically; a file that is there is overwritten.

    Args:
        path: The file.
        image: The image.
        metadata: Text chunks by keyword.
    """
    with atomic_write(path) as temporary:
        _write(temporary, image, metadata)


def _write(path: Path, image: Image.Image, metadata: Mapping[str, str]) -> None:
    """Write an image with its text chunks, and those of a generated image once more in the form of A1111."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        chunks.add_itxt(key, value, zip=key == "codes")
    if "codes" in metadata and "seed" in metadata:
        chunks.add_itxt(A1111_KEY, a1111_parameters(metadata, image.size))
    image.save(path, format="PNG", pnginfo=chunks)


def preview_path(path: Path) -> Path:
    """Return the path of the preview of the image that will be at ``path``."""
    return path.with_name(f"{path.stem}.preview.png")


def mask_undecoded(pixels: np.ndarray, hidden: np.ndarray) -> Image.Image:
    """Return an image of uint8 ``pixels`` (H, W, 3) that is grey where ``hidden`` (G, G) is true.

    Args:
        pixels: uint8 (H, W, 3).
        hidden: bool (G, G), true for codes that are not sampled yet.
    """
    size = pixels.shape[0] // hidden.shape[0]
    covered = hidden.repeat(size, axis=0).repeat(size, axis=1)
    return Image.fromarray(np.where(covered[..., None], np.uint8(GREY), pixels))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the text chunks of a PNG file, empty for any other file."""
    try:
        with open_image(Path(path), ("PNG",)) as image:
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for broken files; InputError is a ValueError
        return {}


def prepare_folder(folder: Path) -> None:
    """Create a folder and check that a file can be written there.

    Raises:
        InputError: If it cannot.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = "it is a file" if folder.is_file() else reason_of(error)
        if folder.is_symlink() and not folder.exists():
            reason = "it is a link that leads nowhere"
        raise InputError(f"the output folder {folder} cannot be written: {reason}; choose another") from None


@contextmanager
def prepared_folder(folder: Path) -> Iterator[None]:
    """Prepare a folder for output, and remove it if the block fails before anything was written.

    A folder that cannot be written is so reported before a model is loaded, and a model that is refused leaves no empty
    folder.

    Args:
        folder: The folder.

    Raises:
        InputError: If no file can be written there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    prepare_folder(folder)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty
            for path in made:
                path.rmdir()
        raise


def _is_same(old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Return whether two files have the metadata of one image."""
    return all(
        old.get(key, DEFAULTS_OF_OLD_FILES.get(key)) == value for key, value in new.items() if key not in _NOT_IDENTITY
    )
