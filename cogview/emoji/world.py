"""The emoji world: its things and their pictures, and how scenes of them are sampled, drawn and described.

A scene is drawn from its meaning alone (and, where places are free, from a placement seed), so a training set is
never stored: picture i of seed s is a function of the world.
"""

# H, W canvas in pixels, S side of a sprite in pixels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from cogview.config_io import from_mapping, to_mapping
from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.captions import write_caption
from cogview.emoji.scene import COLOURS, COUNTS, EQUAL_WEIGHTS, Cell, Colour, Scene, SceneKind, SceneWeights, cells_of
from cogview.emoji.things import SPRITE_PIXELS, EmojiFiles, EmojiObject, draw_sprites, read_things
from cogview.errors import InputError
from cogview.files import atomic_write, read_json, write_json

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """The ``scenes`` section of a recipe.

    ``things`` is how many of the things, the commonest first, or "all". ``canvas`` is the side of a picture in
    pixels, a multiple of 64. ``jitter`` is how many pixels a sprite may stray from its place, each way and within
    its own cell; at 0 every sprite keeps to the grid of 8-pixel codes, so that it always has the same codes.
    ``sizes`` are the sides of sprites relative to the layout's.
    """

    things: int | Literal["all"] = "all"
    canvas: int = 64
    jitter: int = 0
    sizes: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.things != "all" and (isinstance(self.things, str) or self.things < 2):
            raise ValueError(f'things must be "all" or a number of at least 2, got {self.things!r}')
        if self.canvas < 64 or self.canvas % 64:
            raise ValueError(f"canvas must be a multiple of 64 pixels, got {self.canvas}")
        if not 0 <= self.jitter < self.canvas:
            raise ValueError(f"jitter must be from 0 to {self.canvas - 1} pixels, got {self.jitter}")
        if not self.sizes or not all(0.25 <= size <= 1.25 for size in self.sizes):
            raise ValueError(f"sizes must be numbers from 0.25 to 1.25, got {list(self.sizes)}")


class EmojiWorld:
    """The things that may appear, their pictures, and how scenes of them are drawn and described.

    ``candidates`` are all the things whose pictures are known, ``sprites`` those pictures: uint8
    (len(candidates), 128, 128, 4), RGBA with straight alpha. ``things`` are the first of the candidates, as many
    as the settings ask for; scenes hold only these, but a grader looks for every candidate.
    """

    def __init__(
        self,
        settings: WorldSettings,
        candidates: Sequence[EmojiObject],
        sprites: np.ndarray,
        colours: Sequence[Colour] = COLOURS,
    ) -> None:
        if sprites.shape != (len(candidates), SPRITE_PIXELS, SPRITE_PIXELS, 4) or sprites.dtype != np.uint8:
            raise ValueError(
                f"{len(candidates)} things need uint8 sprites ({len(candidates)}, {SPRITE_PIXELS}, "
                f"{SPRITE_PIXELS}, 4), got {sprites.dtype} {sprites.shape}"
            )
        num_things = len(candidates) if settings.things == "all" else settings.things
        if num_things > len(candidates):
            raise InputError(f"a world of {num_things} things is asked for, but only {len(candidates)} are known")
        self.settings = settings
        self.candidates = tuple(candidates)
        self.sprites = sprites
        self.things = self.candidates[:num_things]
        self.colours = tuple(colours)
        self._scaled: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    @staticmethod
    def create(settings: WorldSettings, files: EmojiFiles | None = None) -> EmojiWorld:
        """A world of the font's emoji; a missing file is an InputError naming the package that brings it."""
        files = files or EmojiFiles()
        candidates = read_things(files)
        return EmojiWorld(settings, candidates, draw_sprites(candidates, files.font))

    def sample(self, seed: int, index: int, held_out: bool = False, shares: SceneWeights = EQUAL_WEIGHTS) -> Scene:
        """Scene ``index`` of ``seed``, with ``Scene.held_out`` as asked: a function of its arguments alone."""
        draws = KeyedRandom("scene", seed, index, held_out)
        while True:
            scene = self._draw_scene(draws, shares)
            if scene.held_out == held_out:
                return scene

    def _draw_scene(self, draws: KeyedRandom, shares: SceneWeights) -> Scene:
        colour = draws.pick(self.colours)
        first = draws.randbelow(len(self.things))
        lot = draws.randbelow(shares.one + shares.many + shares.pair)
        if lot < shares.one:
            return Scene(colour=colour, kind="one", things=(self.things[first],))
        if lot < shares.one + shares.many:
            return Scene(colour=colour, kind="many", things=(self.things[first],), count=draws.pick(COUNTS))
        second = draws.randbelow(len(self.things) - 1)
        second += second >= first  # any thing but the first
        kind: SceneKind = "beside" if draws.randbelow(2) else "above"
        return Scene(colour=colour, kind=kind, things=(self.things[first], self.things[second]))

    def render(self, scene: Scene, placement_seed: int = 0, scale: float = 1) -> np.ndarray:
        """The picture: uint8 (H, W, 3), RGB. ``placement_seed`` matters only where sizes or places are free.

        ``scale`` draws the same scene, with everything in the same place, at so many times the side.
        """
        canvas = round(self.settings.canvas * scale)
        image = np.empty((canvas, canvas, 3), dtype=np.uint8)
        image[:] = scene.colour.rgb
        draws = KeyedRandom("placement", placement_seed, scene.meaning)
        for thing, cell in zip(scene.shown, cells_of(scene), strict=True):
            x, y, side = (round(length * scale) for length in self._place(cell, draws))
            colour, keep = self.scaled_sprite(thing, side)
            patch = image[y : y + side, x : x + side]
            patch[:] = (colour + keep * patch + 0.5).astype(np.uint8)
        return image

    def caption(self, scene: Scene, seed: int = 0, complete: bool = False) -> str:
        """A Chinese sentence for ``scene``, one of many by ``seed``; ``complete`` leaves nothing unsaid.

        Without ``complete``, one caption in ten says nothing about the background.
        """
        return write_caption(scene, KeyedRandom("caption", seed, scene.meaning), complete=complete)

    def _place(self, cell: Cell, draws: KeyedRandom) -> tuple[int, int, int]:
        """Left, top and side in pixels of a sprite in its cell; the grid place at jitter 0 and size 1."""
        side = self._side(cell, draws.pick(self.settings.sizes))
        jitter = self.settings.jitter
        dx, dy = (draws.randbelow(2 * jitter + 1) - jitter for _ in range(2))
        x, y = self._shifted(cell, side, dx, dy)
        return x, y, side

    def sides_in(self, cell: Cell) -> list[int]:
        """Every side in pixels a sprite can have in ``cell``."""
        return sorted({self._side(cell, scale) for scale in self.settings.sizes})

    def places_in(self, cell: Cell, side: int) -> list[tuple[int, int]]:
        """Every (left, top) in pixels where a sprite of ``side`` can stand in ``cell``."""
        jitter = self.settings.jitter
        corners = [self._shifted(cell, side, stray, stray) for stray in range(-jitter, jitter + 1)]
        lefts, tops = (sorted(set(values)) for values in zip(*corners, strict=True))  # left and top are independent
        return [(left, top) for left in lefts for top in tops]

    def _side(self, cell: Cell, scale: float) -> int:
        left, top, right, bottom = cell.area
        eighth = self.settings.canvas // 8
        return min(round(cell.side * eighth * scale), (right - left) * eighth, (bottom - top) * eighth)

    def _shifted(self, cell: Cell, side: int, dx: int, dy: int) -> tuple[int, int]:
        """Left and top of a sprite that strays by (dx, dy) from the middle of its place, kept inside its area."""
        eighth = self.settings.canvas // 8
        left, top, right, bottom = (edge * eighth for edge in cell.area)
        margin = (cell.side * eighth - side) // 2
        x, y = cell.x * eighth + margin + dx, cell.y * eighth + margin + dy
        return min(max(x, left), right - side), min(max(y, top), bottom - side)

    def scaled_sprite(self, thing: EmojiObject, side: int) -> tuple[np.ndarray, np.ndarray]:
        """``thing`` at ``side`` pixels: (colour, keep), both float32.

        ``colour`` (S, S, 3) in [0, 255] is already multiplied by the alpha, ``keep`` (S, S, 1) in [0, 1] is how
        much of the background stays, so the picture is ``colour + keep * background``.
        """
        key = (thing.emoji, side)
        if key not in self._scaled:
            from PIL import Image

            sprite = Image.fromarray(self.sprites[self.candidate_index[thing.emoji]])
            # Pillow multiplies by the alpha before it resizes: hidden colours do not bleed into the border.
            scaled = np.asarray(sprite.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float32)
            alpha = scaled[:, :, 3:] / 255
            self._scaled[key] = scaled[:, :, :3] * alpha, 1 - alpha
        return self._scaled[key]

    @cached_property
    def candidate_index(self) -> dict[str, int]:
        """Index in ``candidates`` and ``sprites``, by emoji."""
        return {thing.emoji: index for index, thing in enumerate(self.candidates)}

    def save(self, folder: Path) -> None:
        """Write world.json and sprites.npz; each file is whole or absent, and neither needs the font again."""
        folder.mkdir(parents=True, exist_ok=True)
        description = _Description(
            format_version=FORMAT_VERSION, settings=self.settings, colours=self.colours, candidates=self.candidates
        )
        with atomic_write(folder / "sprites.npz", per_process=True) as path, path.open("wb") as file:
            np.savez_compressed(file, sprites=self.sprites)
        # Last: a folder with world.json is complete.
        write_json(folder / "world.json", to_mapping(description), indent=1, per_process=True)

    @staticmethod
    def load(folder: Path) -> EmojiWorld:
        """The world that ``save`` wrote."""
        for name in ("world.json", "sprites.npz"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} holds no world: {name} is missing; make it with: cogview scenes RECIPE")
        plain = read_json(folder / "world.json")
        if plain.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{folder}/world.json has format version {plain.get('format_version')}, expected {FORMAT_VERSION}; "
                f"make the world again with: cogview scenes RECIPE"
            )
        description = from_mapping(_Description, plain, f"{folder}/world.json")
        with np.load(folder / "sprites.npz", allow_pickle=False) as arrays:
            sprites = arrays["sprites"]
        return EmojiWorld(description.settings, description.candidates, sprites, description.colours)


@dataclass(frozen=True, kw_only=True)
class _Description:
    """What world.json holds."""

    format_version: int
    settings: WorldSettings
    colours: tuple[Colour, ...]
    candidates: tuple[EmojiObject, ...]
