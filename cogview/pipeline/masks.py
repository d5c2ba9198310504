"""Masks of edits: which codes of an image may change, and the share of these that does."""

# H height, W width of an image in pixels, G codes on a side

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cogview.errors import InputError
from cogview.generation.sampling import noise_keys
from cogview.image_io.masks import is_box, masked_codes, painted_pixels, read_mask
from cogview.image_io.reading import FitRule
from cogview.pipeline.inputs import describe

MASK_FORMS = "an image, a bool array (H, W) or (G, G), or a box x,y,w,h in pixels"
Box: TypeAlias = tuple[int, int, int, int]  # left, top, width and height in pixels
MaskLike: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.bool_] | torch.Tensor | Box

_BOX = re.compile(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*")


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """A mask that was read, for images of any size.

    Attributes:
        box: A rectangle in pixels of the image.
        pixels: bool (H, W) with the size of the image.
        codes: bool, (G, G) codes or (H, W) pixels: an array, whose shape shows which.
    """

    box: Box | None = None
    pixels: NDArray[np.bool_] | None = None
    codes: NDArray[np.bool_] | None = None

    def fitted(
        self, size: tuple[int, int], grid: int, *, side: int, rule: FitRule, image: str = "the image"
    ) -> NDArray[np.bool_]:
        """Return the codes of an image that may change.

        Args:
            size: Width and height of the image in pixels, before it is fitted to the model.
            grid: G, codes on a side.
            side: Pixels on a side of the model's images.
            rule: How the image becomes a square.
            image: Name of the image, for messages.

        Returns:
            bool (G, G): True for a code of which a pixel is in the mask.

        Raises:
            InputError: If the mask has another size than the image, or covers no code of it.
        """
        width, height = size
        pixels = self.pixels
        if self.codes is not None:
            if self.codes.shape == (grid, grid):
                return _require_some(self.codes)
            pixels = self.codes
        if self.box is not None:
            x, y, w, h = self.box
            if x + w > width or y + h > height:
                raise InputError(
                    f"mask: the box {x},{y},{w},{h} reaches beyond the {width} x {height} pixels of {image}"
                )
            pixels = np.zeros((height, width), dtype=bool)
            pixels[y : y + h, x : x + w] = True
        assert pixels is not None
        if pixels.shape != (height, width):
            raise InputError(
                f"mask: it is {pixels.shape[1]} x {pixels.shape[0]} pixels, and {image} is {width} x {height}; "
                "expected the same size"
            )
        codes = masked_codes(_require_some(pixels), grid, side=side, rule=rule)
        if not codes.any():
            raise InputError(f"mask: it covers no part of {image} that is left once the image is cropped to a square")
        return codes


def load_mask(mask: MaskLike, name: str = "mask") -> Mask:
    """Read a mask of any form.

    Args:
        mask: A path or a PIL image, in which what may change is white, or opaque if a part of it is transparent; a bool
            array or tensor of pixels (H, W) or codes (G, G); or a box (x, y, w, h) in pixels, also as the text
            ``"x,y,w,h"``.
        name: Name of the argument, for messages.

    Raises:
        InputError: If it cannot be read, or is none of these.
    """
    if isinstance(mask, str) and not Path(mask).exists() and is_box(mask):
        found = _BOX.fullmatch(mask)
        box = tuple(map(int, found.groups())) if found else None
        if box is None or not (box[2] and box[3]):
            raise InputError(f'{name}: expected a box x,y,w,h in whole pixels, w and h from 1 on, got "{mask}"')
        return Mask(box=(box[0], box[1], box[2], box[3]))
    if isinstance(mask, str | os.PathLike):
        if not os.fspath(mask):
            raise InputError(f"{name}: the name is empty; expected {MASK_FORMS}")
        return Mask(pixels=read_mask(Path(mask)))
    if isinstance(mask, tuple):
        if len(mask) == 4 and all(type(number) is int for number in mask):
            return load_mask(",".join(map(str, mask)), name)
        raise InputError(f"{name}: expected four whole numbers x, y, w, h in pixels, got {mask!r}")
    if isinstance(mask, Image.Image):
        try:
            return Mask(pixels=painted_pixels(mask))
        except Exception as error:  # Pillow's readers raise nearly anything on broken data
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{name} is a PIL image that cannot be read: {reason}") from None
    if isinstance(mask, np.ndarray | torch.Tensor):
        values = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else mask
        if values.ndim == 2 and values.dtype == bool:
            return Mask(codes=values)
        raise InputError(f"{name} must be a bool array (H, W) or (G, G), got {describe(mask)}; compare it, as in m > 0")
    raise InputError(f"{name} must be {MASK_FORMS}, got {describe(mask)}")


def sample_changes(mask_GG: NDArray[np.bool_], strength: float, *, seed: int, index: int) -> NDArray[np.bool_]:
    """Choose by keyed noise the codes of a mask that change.

    The choice is nested: a code that changes at one strength changes at every higher one.

    Args:
        mask_GG: Codes that may change.
        strength: Share of them that changes, from 0 (none) to 1; above 0 one at least.
        seed: Seed of the image.
        index: Index of the image.

    Returns:
        bool (G, G).
    """
    if strength == 1:
        return mask_GG
    candidates = np.flatnonzero(mask_GG)
    count = min(len(candidates), max(1, round(strength * len(candidates)))) if strength > 0 else 0
    positions = -1 - torch.from_numpy(candidates)  # the noise of sampling has positions from 0 on
    keys = noise_keys(torch.tensor(seed), torch.tensor(index), positions).numpy()
    chosen = np.zeros(mask_GG.size, dtype=bool)
    chosen[candidates[np.argsort(keys, kind="stable")[:count]]] = True
    return chosen.reshape(mask_GG.shape)


def _require_some(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask; InputError if it is empty."""
    if not mask.any():
        raise InputError("mask: it is empty, so nothing would change; paint what may change in white, or opaque")
    return mask
