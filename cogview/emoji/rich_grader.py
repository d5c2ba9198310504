"""Grader of rich worlds: find out what an image shows, with styles, patterns of the background and signs.

As the grader of plain worlds, it works by analysis-by-synthesis and is independent of any model. It explains an image
by the background, sprites and characters that, composed, are nearest to it. The style of each object is found by
itself, and every cell of an arrangement may be empty. An image tokenizer blurs fine details, and a blurred sprite is
nearer to one of smooth shades than to itself; so the compositions are compared at the sharpness of the image.
"""

# H, W canvas in pixels
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cogview.emoji.attributes import Pattern, Sign, Style
from cogview.emoji.grader import Explanation
from cogview.emoji.rich_search import Fit, SceneSearch
from cogview.emoji.scene import TILES
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

# Filters of the rows and columns, from sharp to soft.
_BLURS = ((1.0,), (0.125, 0.75, 0.125), (0.25, 0.5, 0.25), (0.0625, 0.25, 0.375, 0.25, 0.0625))
_COMPARED = 12  # sprites in each cell that are compared at the sharpness of the image


@dataclass(frozen=True, kw_only=True)
class RichExplanation(Explanation):
    """Content of an image of a rich world, as the grader explains it.

    ``layout`` is a key of ``RICH_LAYOUTS``, or "empty"; where cells of it are empty, ``things`` are fewer.

    Args:
        styles: The style of each of ``things``.
        pattern: The pattern of the background; None if it is plain.
        sign: The sign, if there is one.
    """

    styles: tuple[Style, ...]
    pattern: Pattern | None
    sign: Sign | None


class RichExplainer:
    """Finder of the content of images of a rich world; scaled sprites are kept, so one should see many images.

    Args:
        world: The world of the images.
    """

    def __init__(self, world: EmojiWorld) -> None:
        self.world = world
        self.search = SceneSearch(world)

    def explain(self, image: np.ndarray) -> RichExplanation:
        """Return the explanation of an image with the smallest squared error.

        Args:
            image: uint8 RGB (H, W, 3) of the world's canvas.

        Raises:
            InputError: The shape or dtype is another.
        """
        canvas = self.world.settings.canvas
        if image.shape != (canvas, canvas, 3) or image.dtype != np.uint8:
            raise InputError(
                f"the grader of this world needs uint8 ({canvas}, {canvas}, 3), got {image.dtype} {image.shape}"
            )
        pixels = image.astype(np.float32)
        candidates: list[tuple[float, int, int, Fit]] = []
        for shade, fits in self.search.fits(pixels):
            for fit in fits:
                composed = self._compose(shade, fit)
                candidates += [
                    (_squared_error(pixels, composed, blur) + fit.minimum, blur, shade, fit)
                    for blur in range(len(_BLURS))
                ]
        _, blur, shade, fit = min(candidates, key=lambda each: each[0])
        if blur:
            fit = self._refine(pixels, shade, fit, blur)
        return self._explanation(pixels, shade, fit)

    def _refine(self, pixels: np.ndarray, shade: int, fit: Fit, blur: int) -> Fit:
        """The same arrangement with the sprites that are nearest at the sharpness of the image."""
        for cell, gains in enumerate(fit.gains):
            others = np.argsort(-gains)[:_COMPARED]
            tried = [
                replace(fit, sprites=(*fit.sprites[:cell], int(sprite), *fit.sprites[cell + 1 :])) for sprite in others
            ]
            fit = min((fit, *tried), key=lambda each: _squared_error(pixels, self._compose(shade, each), blur))
        return fit

    def _compose(self, shade: int, fit: Fit) -> np.ndarray:
        """The image of an explanation: float32 (H, W, 3)."""
        image: np.ndarray = self.search.shades[shade].pixels.copy()
        for cell, sprite in zip(fit.cells, fit.sprites, strict=True):
            x, y, side = (length * len(image) // 8 for length in (cell.x, cell.y, cell.side))
            style, thing = self.search.sprite_of(sprite)
            colour, keep = self.world.scaled_sprite(thing, side, style, cell.align)
            patch = image[y : y + side, x : x + side]
            patch[:] = colour + keep * patch
        if fit.sign is not None and self.world.characters is not None:
            tiles = TILES[fit.layout, len(fit.sign.text)]
            self.world.characters.paste(image, fit.sign, tiles, border=fit.layout == "sign")
        return image

    def _explanation(self, pixels: np.ndarray, shade: int, fit: Fit) -> RichExplanation:
        shown = [self.search.sprite_of(sprite) for sprite in fit.sprites]
        background = self.search.shades[shade]
        return RichExplanation(
            colour=background.colour,
            pattern=background.pattern,
            layout=fit.layout,
            things=tuple(thing for _, thing in shown),
            styles=tuple(style for style, _ in shown),
            sign=fit.sign,
            error=_squared_error(pixels, self._compose(shade, fit), 0) / pixels.size,
        )


def _squared_error(pixels: np.ndarray, composed: np.ndarray, blur: int) -> float:
    """Sum of the squared differences between an image and a blurred composition."""
    for axis in (0, 1):
        composed = _filtered(composed, _BLURS[blur], axis)
    return float(np.square(pixels - composed).sum())


def _filtered(image: np.ndarray, weights: tuple[float, ...], axis: int) -> np.ndarray:
    """An image with a filter along an axis; its border continues beyond it."""
    reach = len(weights) // 2
    if not reach:
        return image
    widths = [(reach, reach) if one == axis else (0, 0) for one in range(image.ndim)]
    padded = np.pad(image, widths, mode="edge")
    length = image.shape[axis]
    shifted = (padded.take(range(start, start + length), axis) for start in range(len(weights)))
    filtered: np.ndarray = np.stack([weight * part for weight, part in zip(weights, shifted, strict=True)]).sum(axis=0)
    return filtered
