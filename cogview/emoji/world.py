"""The emoji world: its objects and sprites; sampling, rendering and captions of scenes.

An image is rendered from the meaning of its scene and, with free positions, from a placement seed. A training set is
therefore never stored: image i of seed s is a function of the world.
"""

# H, W canvas in pixels, S side of a sprite in pixels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from cogview.config_io import from_mapping, to_mapping
from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.attributes import STYLES, Style, scene_tables
from cogview.emoji.backgrounds import background
from cogview.emoji.captions import write_caption
from cogview.emoji.characters import CharacterFonts, CharacterSet, draw_characters
from cogview.emoji.rich_captions import RichWriter
from cogview.emoji.sampling import SceneSampler
from cogview.emoji.scene import COLOURS, COUNTS, TILES, Cell, Colour, Scene, SceneKind, SceneWeights, cells_of
from cogview.emoji.settings import WorldSettings
from cogview.emoji.things import SPRITE_PIXELS, EmojiFiles, EmojiObject, draw_sprites, read_sprites, read_things
from cogview.emoji.traditional import traditional_characters
from cogview.errors import InputError
from cogview.files import atomic_write, write_json
from cogview.input_files import read_arrays
from cogview.plain_data import read_json

FORMAT_VERSION = 1
_VISIBLE = 48  # alpha from which a pixel counts as part of the object
RICH_FORMAT_VERSION = 2  # of worlds with styles or characters, which earlier versions cannot read


class EmojiWorld:
    """Objects with their sprites, from which scenes are sampled, rendered and described.

    ``things`` are the first of the candidates, in the number that the settings require. Scenes hold only these; a
    grader searches for every candidate.

    Args:
        settings: Settings of the world.
        candidates: All objects with a sprite.
        sprites: uint8 (len(candidates), 128, 128, 4), RGBA with straight alpha.
        colours: Backgrounds.
        styled: Sprites of the further styles by their keys, each as ``sprites``.
        characters: Characters of signs.
        traditional: Traditional characters by simplified ones, for captions.

    Raises:
        ValueError: The sprites have another shape or dtype, or a style or character has no pictures.
        InputError: The settings require more objects than there are candidates.
    """

    def __init__(
        self,
        settings: WorldSettings,
        candidates: Sequence[EmojiObject],
        sprites: np.ndarray,
        colours: Sequence[Colour] = COLOURS,
        *,
        styled: Mapping[str, np.ndarray] | None = None,
        characters: CharacterSet | None = None,
        traditional: Mapping[str, str] | None = None,
    ) -> None:
        self.styled = dict(styled or {})
        for array in (sprites, *self.styled.values()):
            if array.shape != (len(candidates), SPRITE_PIXELS, SPRITE_PIXELS, 4) or array.dtype != np.uint8:
                raise ValueError(
                    f"{len(candidates)} objects need uint8 sprites ({len(candidates)}, {SPRITE_PIXELS}, "
                    f"{SPRITE_PIXELS}, 4), got {array.dtype} {array.shape}"
                )
        if missing := set(settings.styles[1:]) - set(self.styled):
            raise ValueError(f"the styles {sorted(missing)} have no sprites")
        known_characters = characters.characters if characters else ""
        if len(known_characters) < settings.characters:
            raise ValueError(f"{settings.characters} characters need bitmaps, got {len(known_characters)}")
        num_things = len(candidates) if settings.things == "all" else settings.things
        if num_things > len(candidates):
            raise InputError(f"a world of {num_things} objects was requested, but only {len(candidates)} are known")
        self.settings = settings
        self.candidates = tuple(candidates)
        self.sprites = sprites
        self.things = self.candidates[:num_things]
        self.colours = tuple(colours)
        self.characters = characters
        self.traditional = dict(traditional or {})
        self._scaled: dict[tuple[str, int, str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._samplers: dict[SceneWeights, SceneSampler] = {}

    @staticmethod
    def create(
        settings: WorldSettings,
        files: EmojiFiles | None = None,
        sprites: Path | None = None,
        *,
        style_folder: Path | None = None,
        fonts: CharacterFonts | None = None,
    ) -> EmojiWorld:
        """Return a world of the emoji of the font, or of another style.

        A world of several styles has the objects of the settings as its only candidates.

        Args:
            settings: Settings of the world.
            files: Paths of the files to read; those of Debian by default.
            sprites: Folder of pictures named by code points, in place of the font: see ``read_sprites``.
            style_folder: Folder with such a folder for each style after the first, named by its key.
            fonts: Fonts of the characters of signs; those of Debian by default.

        Raises:
            InputError: A file is missing, a picture cannot be read, or a style lacks an object.
        """
        files = files or EmojiFiles()
        if sprites is None:
            candidates = read_things(files)
            if settings.styles and settings.things != "all":
                candidates = candidates[: settings.things]
            drawn = draw_sprites(candidates, files.font)
        else:
            candidates, drawn = read_sprites(read_things(files, with_font=False), sprites)
        if not settings.is_rich:
            return EmojiWorld(settings, candidates, drawn)
        characters = None
        if settings.characters:
            known = scene_tables().characters
            if settings.characters > len(known):
                raise InputError(f"{settings.characters} characters were requested, but only {len(known)} are known")
            characters = draw_characters(known[: settings.characters], fonts or CharacterFonts())
        rates = settings.caption_rates
        return EmojiWorld(
            settings,
            candidates,
            drawn,
            styled={key: _read_style(key, candidates, style_folder) for key in settings.styles[1:]},
            characters=characters,
            traditional=traditional_characters() if rates.traditional else None,
        )

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
        is_rich = self.settings.is_rich or weights.has_new_kinds
        while True:
            scene = self.sampler(weights).sample(random) if is_rich else self._sample_any(random, weights)
            if scene.held_out == held_out:
                return scene

    def sampler(self, weights: SceneWeights | None = None) -> SceneSampler:
        """Return the sampler of the scenes of a rich world.

        Args:
            weights: Frequencies of the kinds of scenes; those of the world if None.

        Raises:
            InputError: No object is a container, and the weights require one.
        """
        weights = weights or self.settings.weights
        if weights not in self._samplers:
            characters = self.characters.characters if self.characters else ""
            if (weights.sign or weights.label) and not characters:
                raise InputError("scenes with a sign need characters; this world has none")
            self._samplers[weights] = SceneSampler(self.settings, self.things, self.colours, characters, weights)
        return self._samplers[weights]

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
        image = background(scene.colour, scene.pattern, canvas)
        random = KeyedRandom("placement", placement_seed, scene.meaning)
        for thing, cell in zip(scene.shown, cells_of(scene), strict=True):
            x, y, side = (round(length * scale) for length in self._place(cell, random))
            colour, keep = self.scaled_sprite(thing, side, scene.style, cell.align)
            patch = image[y : y + side, x : x + side]
            patch[:] = (colour + keep * patch + 0.5).astype(np.uint8)
        if scene.sign is not None:
            if self.characters is None or not set(scene.sign.text) <= set(self.characters.characters):
                raise InputError(f"this world has no pictures of the characters {scene.sign.text}")
            tiles = TILES[scene.kind, len(scene.sign.text)]
            self.characters.paste(image, scene.sign, tiles, border=scene.kind == "sign")
        return image

    def caption(self, scene: Scene, seed: int = 0, complete: bool = False, *, wording: Scene | None = None) -> str:
        """Return a Chinese caption of a scene.

        Args:
            scene: The scene.
            seed: Seed of the wording.
            complete: Always name the background, which one caption in ten omits otherwise; in a rich world, name
                every attribute.
            wording: Scene whose wording is used; that of the scene itself if None.
        """
        random = KeyedRandom("caption", seed, (wording or scene).meaning)
        if self.settings.is_rich or not scene.is_plain:
            return self._writer.write(scene, random, complete=complete)
        return write_caption(scene, random, complete=complete)

    @cached_property
    def _writer(self) -> RichWriter:
        return RichWriter(self.settings.caption_rates, self.traditional, names_styles=len(self.settings.styles) > 1)

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

    def scaled_sprite(
        self, thing: EmojiObject, side: int, style: Style = STYLES[0], align: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the sprite of an object at a size, so that its image is ``colour + keep * background``.

        Args:
            thing: The object.
            side: Side of the sprite in pixels.
            style: The style.
            align: "top" or "bottom" to move the visible part to that edge.

        Returns:
            ``colour``, float32 (S, S, 3) in [0, 255], premultiplied by the alpha; and ``keep``, float32 (S, S, 1) in
            [0, 1], one minus the alpha.
        """
        key = (thing.emoji, side, style.key, align)
        if key not in self._scaled:
            from PIL import Image

            sprites = self.styled.get(style.key, self.sprites)
            aligned = _align(sprites[self.candidate_index[thing.emoji]], align)
            # Pillow multiplies by the alpha before it resizes: hidden colours do not bleed into the border.
            resized = Image.fromarray(aligned).resize((side, side), Image.Resampling.LANCZOS)
            scaled = np.asarray(resized, dtype=np.float32)
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
            format_version=RICH_FORMAT_VERSION if self.settings.is_rich else FORMAT_VERSION,
            settings=self.settings,
            colours=self.colours,
            candidates=self.candidates,
            characters=self.characters.characters if self.characters else "",
            traditional=self.traditional,
        )
        arrays = {"sprites": self.sprites, **self.styled}
        if self.characters:
            arrays["characters"] = self.characters.bitmaps
        with atomic_write(folder / "sprites.npz") as path, path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
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
        if plain.get("format_version") not in (FORMAT_VERSION, RICH_FORMAT_VERSION):
            raise InputError(
                f"{folder}/world.json has format version {plain.get('format_version')}, expected {FORMAT_VERSION} or "
                f"{RICH_FORMAT_VERSION}; "
                f"make the world again with: cogview scenes RECIPE"
            )
        description = from_mapping(_Description, plain, f"{folder}/world.json")
        arrays = read_arrays(folder / "sprites.npz")
        if "sprites" not in arrays:
            raise InputError(f"{folder}/sprites.npz holds no sprites; make the world again with: cogview scenes RECIPE")
        characters = None
        try:
            if "characters" in arrays:
                characters = CharacterSet(characters=description.characters, bitmaps=arrays.pop("characters"))
            return EmojiWorld(
                description.settings,
                description.candidates,
                arrays.pop("sprites"),
                description.colours,
                styled=arrays,
                characters=characters,
                traditional=description.traditional,
            )
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
    characters: str = field(default="", metadata={"omit_default": True})
    traditional: dict[str, str] = field(default_factory=dict, metadata={"omit_default": True})


def _read_style(key: str, candidates: Sequence[EmojiObject], folder: Path | None) -> np.ndarray:
    """The sprites of a style for all candidates: uint8 (len(candidates), 128, 128, 4)."""
    if folder is None:
        raise InputError(
            f"the style {key} needs sprites; give style_folder, which holds a folder {key} of pictures that "
            f"scripts/emoji_sprites.py writes"
        )
    found, sprites = read_sprites(candidates, folder / key)
    if len(found) < len(candidates):
        missing = next(thing for thing in candidates if thing not in found)
        raise InputError(
            f"{folder / key} lacks {len(candidates) - len(found)} of {len(candidates)} objects, such as "
            f"{missing.emoji} {missing.name}"
        )
    return sprites


def _align(sprite: np.ndarray, align: str) -> np.ndarray:
    """A sprite with its visible part moved to an edge: uint8 (128, 128, 4)."""
    visible = np.flatnonzero((sprite[:, :, 3] > _VISIBLE).any(axis=1))
    if not align or not len(visible):
        return sprite
    moved = np.zeros_like(sprite)
    if align == "top":
        moved[: len(sprite) - visible[0]] = sprite[visible[0] :]
    else:
        moved[len(sprite) - 1 - visible[-1] :] = sprite[: visible[-1] + 1]
    return moved
