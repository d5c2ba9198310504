"""Export scenes of the emoji world as pictures with captions, so that they are trained on as any pictures are."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, fields
from pathlib import Path

from cogview.data.store_export import add_picture
from cogview.emoji.characters import CharacterFonts
from cogview.emoji.datasets import SceneDataset
from cogview.emoji.scene import Scene
from cogview.emoji.settings import WorldSettings
from cogview.emoji.things import EmojiFiles
from cogview.emoji.world import EmojiWorld
from cogview.files import atomic_write
from cogview.vqvae.ranges import SEED, check_ranges


@dataclass(frozen=True, kw_only=True)
class SceneRecipe(WorldSettings):
    """The ``scenes`` section of a recipe.

    Args:
        sprites: Folder of pictures named by the code points of emoji, in place of the font.
        exported: Number of training scenes that ``cogview scenes`` samples and writes as pictures with captions to
            ``WORK/scenes.tar``. A scene that is sampled several times is one picture with several captions.
        seed: Seed of the exported scenes.
        style_folder: Folder of such folders for the styles after the first, each named as the style.
        character_fonts: Fonts of the characters of signs; those of Debian by default.

    Raises:
        ValueError: A setting is out of range.
    """

    sprites: Path | None = None
    exported: int = 0
    seed: int = 0
    style_folder: Path | None = None
    character_fonts: CharacterFonts | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sprites is not None and self.styles:
            raise ValueError("sprites are those of a world of one style; give style_folder with styles")
        check_ranges(self, {"exported": "[0, 10000000]", "seed": SEED})

    @property
    def world(self) -> WorldSettings:
        """The settings of the world alone."""
        return WorldSettings(**{setting.name: getattr(self, setting.name) for setting in fields(WorldSettings)})

    def create(self, files: EmojiFiles | None = None) -> EmojiWorld:
        """Return the world.

        Args:
            files: Paths of the files to read; those of Debian by default.

        Raises:
            InputError: A file is missing, or a picture cannot be read.
        """
        return EmojiWorld.create(
            self.world, files, self.sprites, style_folder=self.style_folder, fonts=self.character_fonts
        )


def export_scenes(world: EmojiWorld, settings: SceneRecipe, path: Path) -> tuple[int, int]:
    """Write training scenes as a tar shard in WebDataset's form: ``000000.png`` with captions in ``000000.txt``.

    Scenes of one meaning are one picture, with their distinct captions. Held-out meanings are never written. Equal
    settings give equal files.

    Args:
        world: The world of the scenes.
        settings: Number, seed and frequencies of the scenes.
        path: The archive; an old one is replaced when the new one is complete.

    Returns:
        The numbers of pictures and of captions.
    """
    dataset = SceneDataset(world, settings.seed)
    scenes: dict[str, tuple[Scene, int]] = {}
    captions: dict[str, dict[str, None]] = {}
    for index in range(settings.exported):
        scene = dataset.scene(index)
        scenes.setdefault(scene.meaning, (scene, index))
        captions.setdefault(scene.meaning, {})[world.caption(scene, index)] = None
    with atomic_write(path) as temporary, tarfile.open(temporary, "w") as shard:
        for number, (scene, index) in enumerate(scenes.values()):
            add_picture(shard, f"{number:06d}", world.render(scene, index), captions[scene.meaning])
    return len(scenes), sum(map(len, captions.values()))
