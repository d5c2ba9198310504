"""Colours of images with an ICC profile, converted to sRGB, which models are trained on."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

LEVELS = (0, 51, 102, 153, 204, 255)  # of each channel, in the colours that two profiles are compared by
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # mode of an image by the colour space of its profile


def to_srgb(image: Image.Image, profile: bytes, on_note: Callable[[str], object]) -> Image.Image:
    """Return an image in sRGB.

    Args:
        image: Image of any mode with 8 bits.
        profile: Its ICC profile.
        on_note: Called with a line about a profile that cannot be used.

    Returns:
        The image as RGB or, with transparency, as RGBA. The same image if the profile cannot be used, or does what sRGB
        does to within one level.
    """
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if space not in MODES:
            raise ValueError(f"its colour space is {space.strip()}")
        mode = MODES[space]
        colours = _as_mode(image, mode)
        if colours is None:
            raise ValueError(f"it is for {mode}, the image is {image.mode}")
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB")
        if mode == "RGB" and _changes_nothing(transform.apply):
            return image
        converted = transform.apply(colours)
        del converted.info["icc_profile"]  # a reader of the result would convert it again
    except Exception as error:  # littleCMS is given whatever a file holds
        reason = " ".join(str(error).split()) or type(error).__name__
        on_note(f"its colour profile was ignored: {reason}")
        return image
    if not image.has_transparency_data:
        return converted
    converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def _as_mode(image: Image.Image, mode: str) -> Image.Image | None:
    """Return the colours of an image in the mode of its profile, without transparency; None if it has other colours."""
    if image.mode == mode:
        return image
    if mode == "RGB" and image.mode in ("RGBA", "RGBX", "P", "PA", "L", "LA", "1"):
        return image.convert("RGBA").convert("RGB") if image.has_transparency_data else image.convert("RGB")
    if mode == "L" and image.mode in ("LA", "1"):
        return image.getchannel("L") if image.mode == "LA" else image.convert("L")
    return None


def _changes_nothing(apply: Callable[[Image.Image], Image.Image]) -> bool:
    """Return whether a transform keeps all colours to within one level: the profile is sRGB, whatever its name."""
    grid = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS), axis=-1).reshape(len(LEVELS), -1, 3).astype(np.uint8)
    changed = np.asarray(apply(Image.fromarray(grid)))
    return bool(np.abs(changed.astype(int) - grid).max() <= 1)
