"""The grader of the emoji world: what does a picture show, and is it what was asked?

Analysis by synthesis, and independent of any model: the grader explains a picture by the background and the
sprites that, drawn together, come nearest to it, and compares that explanation with the scene asked for. It looks
for every known thing, not only for those a model was trained on.
"""

# H, W canvas in pixels, S side of a sprite, N candidate sprites, P places, D = S * S * 3 values of a patch

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cogview.emoji.scene import LAYOUTS, Cell, Colour, Scene
from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

_COLOURS_TRIED = 4  # backgrounds worth explaining the whole picture with, at most ...
_LEAST_VOTES = 0.1  # ... and each with at least this share of the winner's votes
_COLOUR_SCALE = 30.0  # RGB distance at which a pixel's vote for a background has fallen to exp(-1/2)
_LEAST_GAIN = 12.0  # squared bytes per value; the faintest single thing (a red teapot on red) changes 79
_COARSE_CANVAS = 32  # where places are free, candidates are first sought in a picture reduced to this side
_SHORTLIST = 24  # sprites per cell that the search at full resolution looks at again


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the grader sees: the background, the arrangement (a key of LAYOUTS, or "empty"), the things in its cells.

    ``error`` is the mean squared difference, in RGB bytes, between the picture and this explanation of it.
    """

    colour: Colour
    layout: str
    things: tuple[EmojiObject, ...]
    error: float


@dataclass(frozen=True, kw_only=True)
class SceneGrade:
    """Which parts of ``scene`` a picture got right; None for what the scene does not ask.

    ``object``: for one thing, that exactly one thing is seen and it is the right one; for several of one, that more
    than half of what is seen is that thing; for a pair, that both things are seen, wherever. ``count``: for several
    of one, that as many things are seen, whatever they are. ``relation``: for a pair, that both things are seen and
    each on its side.
    """

    scene: Scene
    explanation: Explanation
    colour: bool
    object: bool
    count: bool | None
    relation: bool | None

    @property
    def everything(self) -> bool:
        """True when nothing that was asked is wrong."""
        return all(part is not False for part in (self.colour, self.object, self.count, self.relation))


class SceneGrader:
    """Grades pictures of one world. It keeps the scaled sprites, so one grader serves many pictures."""

    def __init__(self, world: EmojiWorld) -> None:
        self.world = world
        self._banks: dict[tuple[int, int], _SpriteBank] = {}

    def grade(self, image: np.ndarray, scene: Scene) -> SceneGrade:
        """Grade ``image``, uint8 (H, W, 3) of the world's canvas, as a picture of ``scene``."""
        return grade_explanation(self.explain(image), scene)

    def explain(self, image: np.ndarray) -> Explanation:
        """The explanation of ``image`` with the least squared error."""
        canvas = self.world.settings.canvas
        if image.shape != (canvas, canvas, 3) or image.dtype != np.uint8:
            raise InputError(
                f"the grader of this world needs uint8 ({canvas}, {canvas}, 3), got {image.dtype} {image.shape}"
            )
        pixels = image.astype(np.float32)
        sights = [self._explain(pixels, colour) for colour in self._likely_colours(pixels)]
        return min(sights, key=lambda sight: sight.error)

    def _likely_colours(self, pixels: np.ndarray) -> list[Colour]:
        """The backgrounds most pixels are near to, the likeliest first."""
        palette = np.array([colour.rgb for colour in self.world.colours], dtype=np.float32)
        distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
        votes = np.exp(-0.5 * (distances / _COLOUR_SCALE) ** 2).sum(axis=(0, 1))
        order = np.argsort(-votes)[:_COLOURS_TRIED]
        return [self.world.colours[index] for index in order if votes[index] >= _LEAST_VOTES * votes[order[0]]]

    def _explain(self, pixels: np.ndarray, colour: Colour) -> Explanation:
        """The arrangement of sprites on ``colour`` that leaves the least squared error."""
        residual = pixels - np.array(colour.rgb, dtype=np.float32)
        power = float((residual**2).sum())
        found = {cell: self._best_sprite(residual, cell, colour) for cells in LAYOUTS.values() for cell in cells}
        gains = {name: sum(found[cell][0] for cell in cells) for name, cells in LAYOUTS.items()}
        layout = max(gains, key=lambda name: gains[name])
        if gains[layout] < _LEAST_GAIN * pixels.size:
            return Explanation(colour=colour, layout="empty", things=(), error=power / pixels.size)
        things = tuple(self.world.candidates[found[cell][1]] for cell in LAYOUTS[layout])
        return Explanation(colour=colour, layout=layout, things=things, error=(power - gains[layout]) / pixels.size)

    def _best_sprite(self, residual: np.ndarray, cell: Cell, colour: Colour) -> tuple[float, int]:
        """(gain, candidate) of the sprite that lowers the squared error in ``cell`` most, and by how much."""
        sides = self.world.sides_in(cell)
        if self.world.settings.jitter == 0:
            best = (-math.inf, 0)
            for side in sides:
                ((x, y),) = self.world.places_in(cell, side)
                gains = self._bank(side, 1).gains(_patches(residual, [(x, y)], side), colour)[0]
                best = max(best, (float(gains.max()), int(gains.argmax())))
            return best
        return self._search(residual, cell, colour, sides)

    def _search(self, residual: np.ndarray, cell: Cell, colour: Colour, sides: Sequence[int]) -> tuple[float, int]:
        """``_best_sprite`` where places are free: every place in a reduced picture, then near the best ones."""
        factor = max(1, self.world.settings.canvas // _COARSE_CANVAS)
        reduced = _reduce(residual, factor)
        shortlist: list[tuple[float, int, int, int, int]] = []
        for side in sides:
            small = max(1, round(side / factor))
            limit = len(reduced) - small
            places = sorted(
                {
                    (min(round(x / factor), limit), min(round(y / factor), limit))
                    for x, y in self.world.places_in(cell, side)
                }
            )
            gains_PN = self._bank(side, factor).gains(_patches(reduced, places, small), colour)
            best_place_N = gains_PN.argmax(axis=0)
            gains_N = gains_PN.max(axis=0) * factor**2  # a reduced pixel stands for factor**2
            for candidate in np.argsort(-gains_N)[:_SHORTLIST]:
                x, y = places[best_place_N[candidate]]
                shortlist.append((float(gains_N[candidate]), int(candidate), side, x * factor, y * factor))
        best = (-math.inf, 0)
        for _, candidate, side, near_x, near_y in sorted(shortlist, reverse=True)[:_SHORTLIST]:
            places = [
                (x, y)
                for x, y in self.world.places_in(cell, side)
                if abs(x - near_x) <= factor and abs(y - near_y) <= factor
            ]
            gains = self._bank(side, 1).gains(_patches(residual, places, side), colour, candidate)
            best = max(best, (float(gains.max(initial=-math.inf)), candidate))
        return best

    def _bank(self, side: int, factor: int) -> _SpriteBank:
        """All candidates at ``side`` pixels of the canvas, for a picture reduced ``factor`` times."""
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

    Drawn on a background b, a sprite changes it by p = colour - alpha * b. It lowers the squared error of a
    residual r (picture minus background) by 2 r.p - p.p, its gain; both products split so that b stays outside the
    sums over pixels.
    """

    colour: np.ndarray
    alpha: np.ndarray

    def gains(self, patches: np.ndarray, colour: Colour, candidate: int | None = None) -> np.ndarray:
        """Gains (P, N) of every sprite at every patch, or (P, 1) of one ``candidate``; patches are (P, S * S, 3)."""
        chosen = slice(None) if candidate is None else slice(candidate, candidate + 1)
        background = np.array(colour.rgb, dtype=np.float32)
        products = patches.reshape(len(patches), -1) @ self.colour[chosen].T
        products -= (patches @ background) @ self.alpha[chosen].T
        colour_power, cross, alpha_power = self._powers
        norms = colour_power - 2 * cross @ background + (background**2).sum() * alpha_power
        return 2 * products - norms[chosen]

    @cached_property
    def _powers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three parts of p.p: (N,) of colour, (N, 3) of colour with alpha, (N,) of alpha."""
        per_pixel = self.colour.reshape(*self.alpha.shape, 3)
        return (
            (self.colour**2).sum(axis=1),
            np.einsum("ns,nsc->nc", self.alpha, per_pixel),
            (self.alpha**2).sum(axis=1),
        )


def grade_explanation(seen: Explanation, scene: Scene) -> SceneGrade:
    """Compare what was seen with what was asked; ``Grade`` says how strictly."""
    seen_emoji = [thing.emoji for thing in seen.things]
    asked = [thing.emoji for thing in scene.things]
    count = relation = None
    if scene.kind == "one":
        right = seen_emoji == asked
    elif scene.kind == "many":
        right = 2 * seen_emoji.count(asked[0]) > len(seen_emoji)
        count = len(seen_emoji) == scene.count
    else:
        right = set(asked) <= set(seen_emoji)
        relation = seen.layout == scene.kind and seen_emoji == asked
    colour = seen.colour.name == scene.colour.name
    return SceneGrade(scene=scene, explanation=seen, colour=colour, object=right, count=count, relation=relation)


def summarize(grades: Sequence[SceneGrade], num_confusions: int = 10) -> dict[str, Any]:
    """Accuracies with 95% intervals, and the commonest mistakes, as plain data.

    ``colour``, ``object``, ``count``, ``relation`` and ``everything`` hold ``right``, ``of``, ``accuracy`` and the
    Wilson interval ``low`` to ``high``; what no scene asked for has ``of`` 0 and the others None.
    """
    summary: dict[str, Any] = {"pictures": len(grades)}
    for part in ("colour", "object", "count", "relation", "everything"):
        asked = [verdict for verdict in (getattr(grade, part) for grade in grades) if verdict is not None]
        summary[part] = accuracy(sum(asked), len(asked))
    mistakes = Counter(pair for grade in grades for pair in _confusions(grade))
    summary["confusions"] = [
        {"asked": asked, "seen": seen, "times": times} for (asked, seen), times in mistakes.most_common(num_confusions)
    ]
    return summary


def wilson_interval(right: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share, after Wilson (1927): honest near 0 and 1, where the normal one is not."""
    z = 1.959964
    share = right / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def held_out_scenes(world: EmojiWorld, count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """``count`` different scenes whose meanings are never trained on, each with a complete caption."""
    chosen: dict[str, Scene] = {}
    for index in range(20 * count):
        scene = world.sample(seed, index, held_out=True)
        chosen.setdefault(scene.meaning, scene)
        if len(chosen) == count:
            return [(scene, world.caption(scene, seed, complete=True)) for scene in chosen.values()]
    raise InputError(
        f"a world of {len(world.things)} things has too few held-out scenes: {count} were asked, {len(chosen)} found"
    )


def accuracy(right: int, of: int) -> dict[str, Any]:
    """``right`` of ``of`` as a share with its 95% interval, all None for ``of`` 0."""
    if of == 0:
        return {"right": 0, "of": 0, "accuracy": None, "low": None, "high": None}
    low, high = wilson_interval(right, of)
    return {"right": right, "of": of, "accuracy": right / of, "low": low, "high": high}


def format_accuracy(figure: dict[str, Any]) -> str:
    """An ``accuracy`` in percent with its interval, a dash where nothing was asked."""
    if not figure["of"]:
        return "–"
    return f"{figure['accuracy']:.1%} ({figure['low']:.1%}–{figure['high']:.1%})"


def _confusions(grade: SceneGrade) -> list[tuple[str, str]]:
    """(asked, seen) of what is wrong: colours, and things where it is plain which was meant to be which."""
    pairs = []
    if not grade.colour:
        pairs.append((grade.scene.colour.name, grade.explanation.colour.name))
    asked, seen = grade.scene.things, grade.explanation.things
    if not seen:
        pairs.extend((thing.name, "") for thing in asked)
    elif len(asked) == 1 and not grade.object:
        pairs.append((asked[0].name, Counter(thing.name for thing in seen).most_common(1)[0][0]))
    elif grade.explanation.layout == grade.scene.kind and not grade.object:
        pairs.extend((a.name, s.name) for a, s in zip(asked, seen, strict=True) if a.emoji != s.emoji)
    return pairs


def _patches(picture: np.ndarray, places: Sequence[tuple[int, int]], side: int) -> np.ndarray:
    """The squares of ``picture`` at ``places`` (left, top): (P, S * S, 3)."""
    squares = [picture[y : y + side, x : x + side].reshape(side * side, 3) for x, y in places]
    return np.stack(squares) if squares else np.empty((0, side * side, 3), dtype=picture.dtype)


def _reduce(picture: np.ndarray, factor: int) -> np.ndarray:
    """Means of ``factor`` x ``factor`` squares."""
    height, width, channels = picture.shape
    return picture.reshape(height // factor, factor, width // factor, factor, channels).mean(axis=(1, 3))
