"""Grader of the emoji world: find out what an image shows and compare it with a scene.

The grader works by analysis-by-synthesis and is independent of any model. It explains an image by the background and
the sprites that, composed, are nearest to it. The candidates are all known objects, also those that a model was
not trained on.
"""

# H, W canvas in pixels, S side of a sprite, N candidate sprites, P positions, D = S * S * 3 values of a patch

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cogview.emoji.scene import LAYOUTS, Cell, Colour, Scene
from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

_MAX_COLOURS = 4  # backgrounds with which the whole image is explained ...
_MIN_VOTES = 0.1  # ... each with at least this fraction of the winner's votes
_COLOUR_SCALE = 30.0  # RGB distance at which a pixel's vote for a background has fallen to exp(-1/2)
_MIN_GAIN = 12.0  # squared bytes per value; the faintest single object (a red teapot on red) changes 79
_COARSE_SIDE = 32  # with free positions, the search starts in an image reduced to this side
_SHORTLIST = 24  # sprites per cell that are searched again at full resolution


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Content of an image, as the grader explains it.

    Args:
        colour: The background.
        layout: The arrangement: a key of ``LAYOUTS``, or "empty".
        things: The objects in the cells of the arrangement.
        error: Mean squared difference, in RGB bytes, between the image and the rendered explanation.
    """

    colour: Colour
    layout: str
    things: tuple[EmojiObject, ...]
    error: float


@dataclass(frozen=True, kw_only=True)
class SceneGrade(ABC):
    """Verdicts on a description of a scene; None for a part that the scene does not ask for.

    Args:
        scene: The requested scene.
        colour: The background is right.
        object: The objects are right.
        count: For several of one object, their number is right.
        relation: For a pair, each object is on its side.
    """

    scene: Scene
    colour: bool | None
    object: bool | None
    count: bool | None
    relation: bool | None

    @property
    def parts(self) -> dict[str, bool | None]:
        """The verdicts by their names."""
        return {"colour": self.colour, "object": self.object, "count": self.count, "relation": self.relation}

    @property
    def everything(self) -> bool:
        """Whether no part is wrong."""
        return all(part is not False for part in self.parts.values())

    @abstractmethod
    def confusions(self) -> list[tuple[str, str]]:
        """Return (asked, found) names of wrong colours, and of wrong objects whose counterpart is clear."""


@dataclass(frozen=True, kw_only=True)
class ImageGrade(SceneGrade):
    """Grade of an image.

    ``object``: for one object, exactly one is found and it is the right one; for several of one, more than half of
    the found objects are that object; for a pair, both are found, at any position. ``count``: as many objects are
    found, of any kind.

    Args:
        explanation: The content that the grader found.
    """

    explanation: Explanation

    def confusions(self) -> list[tuple[str, str]]:
        """Return (asked, found); ``found`` is "" for every object of an empty image."""
        asked, found = self.scene.things, self.explanation.things
        pairs = [] if self.colour else [(self.scene.colour.name, self.explanation.colour.name)]
        if not found:
            pairs.extend((thing.name, "") for thing in asked)
        elif len(asked) == 1 and not self.object:
            pairs.append((asked[0].name, Counter(thing.name for thing in found).most_common(1)[0][0]))
        elif self.explanation.layout == self.scene.kind and not self.object:
            pairs.extend((a.name, f.name) for a, f in zip(asked, found, strict=True) if a.emoji != f.emoji)
        return pairs


class SceneGrader:
    """Grader of images of one world; scaled sprites are cached, so one grader should grade many images.

    Args:
        world: The world of the images.
    """

    def __init__(self, world: EmojiWorld) -> None:
        self.world = world
        self._banks: dict[tuple[int, int], _SpriteBank] = {}

    def grade(self, image: np.ndarray, scene: Scene, /) -> ImageGrade:
        """Return the grade of an image, uint8 (H, W, 3) of the world's canvas, for a scene.

        Args:
            image: The image.
            scene: The scene that it should show.
        """
        return grade_explanation(self.explain(image), scene)

    def explain(self, image: np.ndarray) -> Explanation:
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
        explanations = [self._explain(pixels, colour) for colour in self._likely_colours(pixels)]
        return min(explanations, key=lambda explanation: explanation.error)

    def _likely_colours(self, pixels: np.ndarray) -> list[Colour]:
        """Backgrounds near to the colours of most pixels, the most probable first."""
        palette = np.array([colour.rgb for colour in self.world.colours], dtype=np.float32)
        distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
        votes = np.exp(-0.5 * (distances / _COLOUR_SCALE) ** 2).sum(axis=(0, 1))
        order = np.argsort(-votes)[:_MAX_COLOURS]
        return [self.world.colours[index] for index in order if votes[index] >= _MIN_VOTES * votes[order[0]]]

    def _explain(self, pixels: np.ndarray, colour: Colour) -> Explanation:
        """Best arrangement of sprites on a background, by squared error."""
        residual = pixels - np.array(colour.rgb, dtype=np.float32)
        power = float((residual**2).sum())
        found = {cell: self._best_sprite(residual, cell, colour) for cells in LAYOUTS.values() for cell in cells}
        gains = {name: sum(found[cell][0] for cell in cells) for name, cells in LAYOUTS.items()}
        layout = max(gains, key=lambda name: gains[name])
        if gains[layout] < _MIN_GAIN * pixels.size:
            return Explanation(colour=colour, layout="empty", things=(), error=power / pixels.size)
        things = tuple(self.world.candidates[found[cell][1]] for cell in LAYOUTS[layout])
        return Explanation(colour=colour, layout=layout, things=things, error=(power - gains[layout]) / pixels.size)

    def _best_sprite(self, residual: np.ndarray, cell: Cell, colour: Colour) -> tuple[float, int]:
        """(gain, candidate) of the sprite with the largest gain: the decrease of the squared error in ``cell``."""
        sides = self.world.sides_in(cell)
        if self.world.settings.jitter == 0:
            best = (-math.inf, 0)
            for side in sides:
                ((x, y),) = self.world.positions_in(cell, side)
                gains = self._bank(side, 1).gains(patches_of(residual, [(x, y)], side), colour)[0]
                best = max(best, (float(gains.max()), int(gains.argmax())))
            return best
        return self._search(residual, cell, colour, sides)

    def _search(self, residual: np.ndarray, cell: Cell, colour: Colour, sides: Sequence[int]) -> tuple[float, int]:
        """``_best_sprite`` with free positions: all positions of a reduced image, then positions near the best ones."""
        factor = max(1, self.world.settings.canvas // _COARSE_SIDE)
        reduced = _reduce(residual, factor)
        shortlist: list[tuple[float, int, int, int, int]] = []
        for side in sides:
            small = max(1, round(side / factor))
            limit = len(reduced) - small
            positions = sorted(
                {
                    (min(round(x / factor), limit), min(round(y / factor), limit))
                    for x, y in self.world.positions_in(cell, side)
                }
            )
            gains_PN = self._bank(side, factor).gains(patches_of(reduced, positions, small), colour)
            best_position_N = gains_PN.argmax(axis=0)
            gains_N = gains_PN.max(axis=0) * factor**2  # a reduced pixel stands for factor**2
            for candidate in np.argsort(-gains_N)[:_SHORTLIST]:
                x, y = positions[best_position_N[candidate]]
                shortlist.append((float(gains_N[candidate]), int(candidate), side, x * factor, y * factor))
        best = (-math.inf, 0)
        for _, candidate, side, near_x, near_y in sorted(shortlist, reverse=True)[:_SHORTLIST]:
            positions = [
                (x, y)
                for x, y in self.world.positions_in(cell, side)
                if abs(x - near_x) <= factor and abs(y - near_y) <= factor
            ]
            gains = self._bank(side, 1).gains(patches_of(residual, positions, side), colour, candidate)
            best = max(best, (float(gains.max(initial=-math.inf)), candidate))
        return best

    def _bank(self, side: int, factor: int) -> _SpriteBank:
        """All candidates at ``side`` pixels of the canvas, for an image reduced ``factor`` times."""
        if (side, factor) not in self._banks:
            scaled = [self.world.scaled_sprite(thing, max(1, round(side / factor))) for thing in self.world.candidates]
            self._banks[side, factor] = _SpriteBank(
                colour=np.stack([colour.reshape(-1) for colour, _ in scaled]),
                alpha=np.stack([1 - keep.reshape(-1) for _, keep in scaled]),
            )
        return self._banks[side, factor]


@dataclass(frozen=True, kw_only=True)
class _SpriteBank:
    """All candidate sprites at one size: ``colour`` (N, D) times alpha, in [0, 255]; ``alpha`` (N, S * S) in [0, 1].

    Composed with a background b, a sprite changes it by p = colour - alpha * b. It lowers the squared error of a
    residual r (image minus background) by its gain 2 r.p - p.p. Both products are split so that b stays outside the
    sums over pixels.
    """

    colour: np.ndarray
    alpha: np.ndarray

    def gains(self, patches: np.ndarray, colour: Colour, candidate: int | None = None) -> np.ndarray:
        """Return gains (P, N) of all sprites at patches (P, S * S, 3), or (P, 1) of one ``candidate``."""
        chosen = slice(None) if candidate is None else slice(candidate, candidate + 1)
        background = np.array(colour.rgb, dtype=np.float32)
        products = patches.reshape(len(patches), -1) @ self.colour[chosen].T
        products -= (patches @ background) @ self.alpha[chosen].T
        colour_power, cross, alpha_power = self._powers
        norms = colour_power - 2 * cross @ background + (background**2).sum() * alpha_power
        gains: np.ndarray = 2 * products - norms[chosen]
        return gains

    @cached_property
    def _powers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three parts of p.p: (N,) of colour, (N, 3) of colour with alpha, (N,) of alpha."""
        per_pixel = self.colour.reshape(*self.alpha.shape, 3)
        return (
            (self.colour**2).sum(axis=1),
            np.einsum("ns,nsc->nc", self.alpha, per_pixel),
            (self.alpha**2).sum(axis=1),
        )


def grade_explanation(explanation: Explanation, scene: Scene) -> ImageGrade:
    """Compare the content of an image with a scene; ``ImageGrade`` defines the verdicts.

    Args:
        explanation: The content that the grader found.
        scene: The requested scene.

    Returns:
        The verdicts.
    """
    found = [thing.emoji for thing in explanation.things]
    asked = [thing.emoji for thing in scene.things]
    count = relation = None
    if scene.kind == "one":
        right = found == asked
    elif scene.kind == "many":
        right = 2 * found.count(asked[0]) > len(found)
        count = len(found) == scene.count
    else:
        right = set(asked) <= set(found)
        relation = explanation.layout == scene.kind and found == asked
    colour = explanation.colour.name == scene.colour.name
    return ImageGrade(scene=scene, explanation=explanation, colour=colour, object=right, count=count, relation=relation)


def patches_of(image: np.ndarray, positions: Sequence[tuple[int, int]], side: int) -> np.ndarray:
    """Squares of an image at positions (left, top): (P, S * S, 3)."""
    squares = [image[y : y + side, x : x + side].reshape(side * side, 3) for x, y in positions]
    return np.stack(squares) if squares else np.empty((0, side * side, 3), dtype=image.dtype)


def _reduce(image: np.ndarray, factor: int) -> np.ndarray:
    """Means of ``factor`` x ``factor`` squares."""
    height, width, channels = image.shape
    reduced: np.ndarray = image.reshape(height // factor, factor, width // factor, factor, channels).mean(axis=(1, 3))
    return reduced
