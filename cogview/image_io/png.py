"""Pictures as files: safe names, PNG with text chunks that say how a picture was drawn, nothing overwritten."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from cogview.errors import InputError
from cogview.files import atomic_write

GREY = 128  # of what is not drawn yet
NAME_BYTES = 90  # of a prompt in a file name; file systems allow 143 to 255 for the whole name

_UNSAFE = re.compile(r'[\s<>:"/\\|?*_]+')  # what Windows forbids, the separators of all systems, and white space
_WINDOWS_DEVICE = re.compile(r"(CON|PRN|AUX|NUL|COM\d|LPT\d)(\.|$)", re.IGNORECASE)
_SETTINGS = ("temperature", "top_k", "top_p", "guidance", "text_attention")  # of ``Sampling``
# Figures of a drawing that may differ between two runs that draw the same picture.
_NOT_IDENTITY = ("log_probability", "score", "score_per_piece", "cogview")
# What drew the pictures of older files, which do not say so.
_DEFAULTS_OF_OLD_FILES = {"guidance": "1.0", "text_attention": "1.0"}


def safe_name(text: str) -> str:
    """``text`` as part of a file name on every system: at most 90 bytes of UTF-8, never empty, a path or hidden.

    Different texts may get one name; ``save_png`` keeps their files apart.
    """
    visible = (
        " " if unicodedata.category(character)[0] == "C" else character
        for character in unicodedata.normalize("NFC", text)
    )
    name = _UNSAFE.sub("_", "".join(visible)).lstrip("_.-~")
    name = name.encode("utf-8", "ignore")[:NAME_BYTES].decode("utf-8", "ignore").rstrip("_.")
    return f"_{name}" if not name or _WINDOWS_DEVICE.match(name) else name


def sheet_metadata(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The text chunks of a sheet of pictures with the chunks ``parts``.

    ``prompt`` has a line per prompt, ``score`` and ``score_per_piece`` a number per picture where all have one.
    """
    shared = {key: parts[0][key] for key in ("seed", "model", *_SETTINGS, "cogview")}
    codes = hashlib.sha256("\n".join(part["codes"] for part in parts).encode()).hexdigest()
    scores = {
        key: " ".join(part[key] for part in parts)
        for key in ("score", "score_per_piece")
        if all(key in part for part in parts)
    }
    prompts = "\n".join(dict.fromkeys(part["prompt"] for part in parts))
    return {"prompt": prompts, "codes_sha256": codes, **shared, **scores}


def save_png(path: Path, image: Image.Image, texts: Mapping[str, str]) -> Path:
    """Write ``image`` with text chunks; returns its path, which is ``path`` unless another picture has that name.

    A file with the same prompt, seed, number, model, settings and codes is the same picture and is written anew.
    Anything else is left alone, and the name continues with _2, _3, … The file is whole or absent, never half-written.
    """
    target, number = path, 1
    while target.exists() and not _is_same(read_metadata(target), texts):
        number += 1
        target = path.with_name(f"{path.stem}_{number}{path.suffix}")
    write_png(target, image, texts)
    return target


def write_png(path: Path, image: Image.Image, texts: Mapping[str, str]) -> None:
    """Write ``image`` with text chunks in place of whatever is there; the file is whole or absent."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        chunks.add_itxt(key, value, zip=key == "codes")
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def preview_path(path: Path) -> Path:
    """Where the picture that will be at ``path`` is shown while it is drawn."""
    return path.with_name(f"{path.stem}.preview.png")


def mask_undecoded(pixels: np.ndarray, hidden: np.ndarray) -> Image.Image:
    """``pixels`` (H, W, 3) uint8, plain grey where ``hidden`` (G, G) is true."""
    size = pixels.shape[0] // hidden.shape[0]
    covered = hidden.repeat(size, axis=0).repeat(size, axis=1)
    return Image.fromarray(np.where(covered[..., None], np.uint8(GREY), pixels))


def read_metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG; empty for any other file."""
    try:
        with Image.open(path) as image:
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for broken files
        return {}


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` and try that a file can be written there; InputError if not."""
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"the output folder {folder} cannot be written: {reason}; choose another") from None


def _is_same(old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    return all(
        old.get(key, _DEFAULTS_OF_OLD_FILES.get(key)) == value for key, value in new.items() if key not in _NOT_IDENTITY
    )
