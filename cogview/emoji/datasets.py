"""Scenes of the emoji world as an ``ImageDataset``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cogview.config_io import to_mapping
from cogview.data.builders.encode import EncodeSettings
from cogview.data.image_dataset import ImageExample, NamedRegion
from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.edits import EditSampler
from cogview.emoji.instructions import write_instruction
from cogview.emoji.scene import TILES, Cell, Scene, SceneWeights, cells_of
from cogview.emoji.world import EmojiWorld
from cogview.vqvae.ranges import COUNT, SEED, check_ranges

TEXT_SEED = 0  # of the captions that the text tokenizer is trained on
HELD_OUT_SEED = 1  # of the held-out scenes that the VQ-VAE is evaluated on


class SceneDataset:
    """Endless scenes of one split of the emoji world; scene ``i`` is a function of (``seed``, ``i``).

    Args:
        world: The objects and their sprites.
        seed: Seed of the scenes.
        held_out: Yield the held-out scenes; otherwise those to train on.
        weights: Frequencies of the kinds of scenes; those of the world if None.
    """

    is_shuffled = True

    def __init__(
        self, world: EmojiWorld, seed: int, *, held_out: bool = False, weights: SceneWeights | None = None
    ) -> None:
        self.world = world
        self.seed = seed
        self.held_out = held_out
        self.weights = weights or world.settings.weights

    @property
    def side(self) -> int:
        """Side of the canvas in pixels."""
        return self.world.settings.canvas

    @property
    def names(self) -> Sequence[str]:
        """Every name of every object, and the characters of signs."""
        names = [name for thing in self.world.things for name in thing.names]
        characters = self.world.characters
        return names if characters is None else list(dict.fromkeys([*names, *characters.characters]))

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Settings of the world and of the scenes."""
        settings = to_mapping(self.world.settings)
        del settings["weights"]  # of the scenes below
        return {
            "scenes": settings,
            "shares": to_mapping(self.weights),  # the name in stores that earlier versions have begun
            "seed": self.seed,
            "held_out": self.held_out,
        }

    def __len__(self) -> int:
        """Number of scenes, which is without a practical limit."""
        return sys.maxsize

    def __getitem__(self, index: int) -> ImageExample:
        """Return scene ``index`` as an example with one caption."""
        scene = self.scene(index)
        return ImageExample(
            identity=f"{self.seed}/{index}/{self.held_out}",
            captions=(self.world.caption(scene, index),),
            render=partial(self.world.render, scene, index),
            regions=named_regions(scene),
        )

    def scene(self, index: int) -> Scene:
        """Return scene ``index``."""
        return self.world.sample_scene(self.seed, index, self.held_out, self.weights)


class EditDataset(SceneDataset):
    """Endless edits of one split of the emoji world; edit ``i`` is a function of (``seed``, ``i``).

    Args:
        world: The objects and their sprites.
        seed: Seed of the edits.
        held_out: Yield the held-out edits; otherwise those to train on.
        weights: Frequencies of the kinds of scenes; those of the world if None.
    """

    def __init__(
        self, world: EmojiWorld, seed: int, *, held_out: bool = False, weights: SceneWeights | None = None
    ) -> None:
        super().__init__(world, seed, held_out=held_out, weights=weights)
        self.sampler = EditSampler(world, self.weights)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Settings of the world and of the edits."""
        return {**super().provenance, "edits": list(self.sampler.kinds)}

    def __getitem__(self, index: int) -> ImageExample:
        """Return edit ``index`` as an example with its instruction."""
        edit = self.sampler.sample(self.seed, index, self.held_out)
        random = KeyedRandom("instruction", self.seed, index, self.held_out)
        rates = self.world.settings.caption_rates
        in_traditional = self.world.traditional and random.chance(rates.traditional)
        instruction = write_instruction(edit, random, self.world.traditional if in_traditional else None)
        scene = edit.result
        return ImageExample(
            identity=f"edit/{self.seed}/{index}/{self.held_out}",
            captions=(self.world.caption(scene, index),),
            render=partial(self.world.render, scene, index),
            regions=named_regions(scene),
            instruction=instruction,
            render_source=partial(self.world.render, edit.source, index),
        )


@dataclass(frozen=True, kw_only=True)
class SceneEncodeSettings(EncodeSettings):
    """The ``encode`` section of a recipe.

    Args:
        rows: Number of training scenes.
        held_out_rows: Number of held-out scenes.
        weights: Frequencies of the kinds of training scenes; those of the world if None, as of the held-out scenes.
        seed: Seed of the scenes.
        source: Encode edits in place of scenes, with their sources and instructions.

    Raises:
        ValueError: A number is out of range.
    """

    rows: int
    held_out_rows: int = 2048
    weights: SceneWeights | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"rows": "[1, 1000000000000]", "held_out_rows": COUNT, "seed": SEED})

    def dataset(self, world: EmojiWorld, *, held_out: bool) -> SceneDataset:
        """Return the scenes to encode for one split.

        Args:
            world: The emoji world.
            held_out: Whether to take the held-out scenes.
        """
        kind = EditDataset if self.source else SceneDataset
        return kind(world, self.seed, held_out=held_out, weights=None if held_out else self.weights)


def named_regions(scene: Scene) -> tuple[NamedRegion, ...]:
    """Return where the objects and the characters of a scene are, with their names.

    Args:
        scene: The scene.
    """
    objects = tuple(_region(thing.names, cell) for thing, cell in zip(scene.shown, cells_of(scene), strict=True))
    if scene.sign is None:
        return objects
    text = scene.sign.text
    cells = TILES[scene.kind, len(text)]
    return (*objects, *(_region((character,), cell) for character, cell in zip(text, cells, strict=True)))


def _region(names: tuple[str, ...], cell: Cell) -> NamedRegion:
    """The area of a cell, which is in eighths of the canvas."""
    left, top, right, bottom = (edge / 8 for edge in cell.area)
    return NamedRegion(names=names, box=(left, top, right, bottom))
