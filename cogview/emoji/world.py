"""The emoji world: its objects and sprites; sampling, rendering and captions of scenes.

An image is rendered from the meaning of its scene and, with free positions, from a placement seed. A training set is
therefore never stored: image i of seed s is a function of the world.
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
from cogview.emoji.things import SPRITE_PIXELS, EmojiFiles, EmojiObject, draw_sprites, read_sprites, read_things
from cogview.errors import InputError
from cogview.files import atomic_write, write_json
from cogview.input_files import read_arrays
from cogview.plain_data import read_json

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """The ``scenes`` section of a recipe.

    Args:
        things: Number of objects, the commonest first, or "all".
        canvas: Side of an image in pixels, a multiple of 64.
        jitter: Maximum offset of a sprite from the middle of its position in pixels, in each direction and within its
            cell. At 0 every sprite starts at an eighth of the canvas: where a code is no larger, it has the same codes.
        sizes: Sides of sprites relative to those of the layout.
        weights: Frequencies of the kinds of scenes.

    Raises:
        ValueError: A setting is out of range.
    """

    things: int | Literal["all"] = "all"
    canvas: int = 64
    jitter: int = 0
    sizes: tuple[float, ...] = (1.0,)
    weights: SceneWeights = EQUAL_WEIGHTS

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
    """Objects with their sprites, from which scenes are sampled, rendered and described.

    ``things`` are the first of the candidates, in the number that the settings require. Scenes hold only these; a
    grader searches for every candidate.

    Args:
        settings: Settings of the world.
        candidates: All objects with a sprite.
        sprites: uint8 (len(candidates), 128, 128, 4), RGBA with straight alpha.
        colours: Backgrounds.

    Raises:
        ValueError: The sprites have another shape or dtype.
        InputError: The settings require more objects than there are candidates.
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
                f"{len(candidates)} objects need uint8 sprites ({len(candidates)}, {SPRITE_PIXELS}, "
                f"{SPRITE_PIXELS}, 4), got {sprites.dtype} {sprites.shape}"
            )
        num_things = len(candidates) if settings.things == "all" else settings.things
        if num_things > len(candidates):
            raise InputError(f"a world of {num_things} objects was requested, but only {len(candidates)} are known")
        self.settings = settings
        self.candidates = tuple(candidates)
        self.sprites = sprites
        self.things = self.candidates[:num_things]
        self.colours = tuple(colours)
        self._scaled: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    @staticmethod
    def create(settings: WorldSettings, files: EmojiFiles | None = None, sprites: Path | None = None) -> EmojiWorld:
        """Return a world of the emoji of the font, or of another style.

        Args:
            settings: Settings of the world.
            files: Paths of the files to read; those of Debian by default.
            sprites: Folder of pictures named by code points, in place of the font: see ``read_sprites``.

        Raises:
            InputError: A file is missing, or a picture cannot be read.
        """
        files = files or EmojiFiles()
        if sprites is None:
            candidates = read_things(files)
            return EmojiWorld(settings, candidates, draw_sprites(candidates, files.font))
        return EmojiWorld(settings, *read_sprites(read_things(files, with_font=False), sprites))

    def sample_scene(self, seed: int, index: int, held_out: bool = False, weights: SceneWeights | None = None) -> Scene:
        """Return a scene, as a function of the arguments alone.

        Args:
            seed: Seed of the scenes.
            index: Index of the scene, from 0.
            held_out: Whether the scene is held out or one to train on.
            weights: Frequencies of the kinds of scenes; those of the world if None.
        """
        weights = weights or self.settings.weights
        random = KeyedRandom("scene", seed, index, held_out)
        while True:
            scene = self._sample_any(random, weights)
            if scene.held_out == held_out:
                return scene

    def _sample_any(self, random: KeyedRandom, weights: SceneWeights) -> Scene:
        """A scene that may be held out or not."""
        colour = random.pick(self.colours)
        first = random.randbelow(len(self.things))
        kind_index = random.randbelow(weights.one + weights.many + weights.pair)
        if kind_index < weights.one:
            return Scene(colour=colour, kind="one", things=(self.things[first],))
        if kind_index < weights.one + weights.many:
            return Scene(colour=colour, kind="many", things=(self.things[first],), count=random.pick(COUNTS))
        second = random.randbelow(len(self.things) - 1)
        second += second >= first  # any object but the first
        kind: SceneKind = "beside" if random.randbelow(2) else "above"
        return Scene(colour=colour, kind=kind, things=(self.things[first], self.things[second]))

    def render(self, scene: Scene, placement_seed: int = 0, scale: float = 1) -> np.ndarray:
        """Return the image of a scene.

        Args:
            scene: The scene.
            placement_seed: Seed of sizes and positions, where these are free.
            scale: Scale of the canvas; all scales show the same arrangement.

        Returns:
            uint8 RGB (H, W, 3).
        """
        canvas = round(self.settings.canvas * scale)
        image = np.empty((canvas, canvas, 3), dtype=np.uint8)
        image[:] = scene.colour.rgb
        random = KeyedRandom("placement", placement_seed, scene.meaning)
        for thing, cell in zip(scene.shown, cells_of(scene), strict=True):
            x, y, side = (round(length * scale) for length in self._place(cell, random))
            colour, keep = self.scaled_sprite(thing, side)
            patch = image[y : y + side, x : x + side]
            patch[:] = (colour + keep * patch + 0.5).astype(np.uint8)
        return image

    def caption(self, scene: Scene, seed: int = 0, complete: bool = False) -> str:
        """Return a Chinese caption of a scene.

        Args:
            scene: The scene.
            seed: Seed of the wording.
            complete: Always name the background, which one caption in ten omits otherwise.
        """
        return write_caption(scene, KeyedRandom("caption", seed, scene.meaning), complete=complete)

    def _place(self, cell: Cell, random: KeyedRandom) -> tuple[int, int, int]:
        """Left, top and side in pixels of a sprite in its cell, on the grid at jitter 0 and size 1."""
        side = self._side(cell, random.pick(self.settings.sizes))
        jitter = self.settings.jitter
        dx, dy = (random.randbelow(2 * jitter + 1) - jitter for _ in range(2))
        x, y = self._shifted(cell, side, dx, dy)
        return x, y, side

    def sides_in(self, cell: Cell) -> list[int]:
        """Return every side in pixels that a sprite can have in a cell."""
        return sorted({self._side(cell, scale) for scale in self.settings.sizes})

    def positions_in(self, cell: Cell, side: int) -> list[tuple[int, int]]:
        """Return every position (left, top) in pixels that a sprite of ``side`` pixels can have in a cell.

        Args:
            cell: The cell.
            side: Side of the sprite in pixels.
        """
        jitter = self.settings.jitter
        corners = [self._shifted(cell, side, offset, offset) for offset in range(-jitter, jitter + 1)]
        lefts, tops = (sorted(set(values)) for values in zip(*corners, strict=True))  # left and top are independent
        return [(left, top) for left in lefts for top in tops]

    def _side(self, cell: Cell, scale: float) -> int:
        left, top, right, bottom = cell.area
        eighth = self.settings.canvas // 8
        return min(round(cell.side * eighth * scale), (right - left) * eighth, (bottom - top) * eighth)

    def _shifted(self, cell: Cell, side: int, dx: int, dy: int) -> tuple[int, int]:
        """Left and top of a sprite with an offset (dx, dy) from the middle of its cell, clamped to its area."""
        eighth = self.settings.canvas // 8
        left, top, right, bottom = (edge * eighth for edge in cell.area)
        margin = (cell.side * eighth - side) // 2
        x, y = cell.x * eighth + margin + dx, cell.y * eighth + margin + dy
        return min(max(x, left), right - side), min(max(y, top), bottom - side)

    def scaled_sprite(self, thing: EmojiObject, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sprite of an object at a size, so that its image is ``colour + keep * background``.

        Args:
            thing: The object.
            side: Side of the sprite in pixels.

        Returns:
            ``colour``, float32 (S, S, 3) in [0, 255], premultiplied by the alpha; and ``keep``, float32 (S, S, 1) in
            [0, 1], one minus the alpha.
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
        """Write world.json and sprites.npz, each atomically; loading them does not need the font."""
        folder.mkdir(parents=True, exist_ok=True)
        description = _Description(
            format_version=FORMAT_VERSION, settings=self.settings, colours=self.colours, candidates=self.candidates
        )
        with atomic_write(folder / "sprites.npz") as path, path.open("wb") as file:
            np.savez_compressed(file, sprites=self.sprites)
        # Written last: a folder with world.json is complete.
        write_json(folder / "world.json", to_mapping(description), indent=1)

    @staticmethod
    def load(folder: Path) -> EmojiWorld:
        """Return the world of a folder.

        Raises:
            InputError: A file is missing, or its format version is unknown.
        """
        for name in ("world.json", "sprites.npz"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} holds no world: {name} is missing; make it with: cogview scenes RECIPE")
        plain = read_json(folder / "world.json")
        if not isinstance(plain, dict):
            raise InputError(
                f"{folder}/world.json holds no world: expected an object; make it again with: cogview scenes"
            )
        if plain.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{folder}/world.json has format version {plain.get('format_version')}, expected {FORMAT_VERSION}; "
                f"make the world again with: cogview scenes RECIPE"
            )
        description = from_mapping(_Description, plain, f"{folder}/world.json")
        arrays = read_arrays(folder / "sprites.npz")
        if "sprites" not in arrays:
            raise InputError(f"{folder}/sprites.npz holds no sprites; make the world again with: cogview scenes RECIPE")
        try:
            return EmojiWorld(description.settings, description.candidates, arrays["sprites"], description.colours)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{folder} is damaged: {error}; make it again with: cogview scenes RECIPE") from None


@dataclass(frozen=True, kw_only=True)
class _Description:
    """Content of world.json."""

    format_version: int
    settings: WorldSettings
    colours: tuple[Colour, ...]
    candidates: tuple[EmojiObject, ...]
