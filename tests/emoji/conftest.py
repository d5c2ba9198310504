"""A rich world without fonts: twelve shapes in four colourings, and twelve characters of random strokes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cogview.emoji.attributes import STYLES, scene_tables
from cogview.emoji.characters import CharacterSet
from cogview.emoji.scene import SceneWeights
from cogview.emoji.settings import WorldSettings
from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld

MORE = (
    EmojiObject(emoji="📦", name="包裹", synonyms=("纸箱",)),
    EmojiObject(emoji="🎒", name="书包", synonyms=("背包",)),
    EmojiObject(emoji="🍞", name="面包"),
    EmojiObject(emoji="⌚", name="手表", measures=("块", "个")),
    EmojiObject(emoji="🐔", name="母鸡", synonyms=("鸡",), measures=("只", "个")),
    EmojiObject(emoji="☂️", name="伞", measures=("把", "个")),
)
EVERY_KIND = SceneWeights(one=2, many=3, pair=3, place=2, row=2, inside=2, on_top=2, sign=2, label=2)
EVERYTHING: dict[str, Any] = {
    "styles": ("noto", "twemoji", "fluent-flat", "fluent-3d"),
    "characters": 12,
    "max_count": 6,
    "patterns": 30,
    "weights": EVERY_KIND,
}
TRADITIONAL = {
    "红": "紅",
    "里": "裡",
    "条": "條",
    "纹": "紋",
    "风": "風",
    "边": "邊",
    "只": "隻",
    "鱼": "魚",
}


@pytest.fixture(scope="session")
def make_rich_world(make_tiny_world: Callable[..., EmojiWorld]) -> Callable[..., EmojiWorld]:
    """Return a function that creates a rich world; its settings are those of ``EVERYTHING`` and the given ones."""
    tiny = make_tiny_world()
    turned = tiny.sprites[:, ::-1, :, [2, 0, 1, 3]].copy()
    sprites = np.concatenate([tiny.sprites, turned])
    styled = {
        "twemoji": sprites[..., [1, 2, 0, 3]].copy(),
        "fluent-flat": sprites[:, :, ::-1, [2, 1, 0, 3]].copy(),
        "fluent-3d": np.concatenate([255 - sprites[..., :3], sprites[..., 3:]], axis=-1),
    }
    characters = scene_tables().characters[:12]
    strokes = np.random.default_rng(0).integers(0, 2, (2, len(characters), 8, 8), dtype=np.uint8) * 255
    bitmaps = strokes.repeat(16, axis=2).repeat(16, axis=3)

    def make(**settings: Any) -> EmojiWorld:
        return EmojiWorld(
            WorldSettings(**EVERYTHING | settings),
            (*tiny.candidates, *MORE),
            sprites,
            styled=styled,
            characters=CharacterSet(characters=characters, bitmaps=bitmaps),
            traditional=TRADITIONAL,
        )

    return make


@pytest.fixture(scope="session")
def distinct_world(make_rich_world: Callable[..., EmojiWorld]) -> EmojiWorld:
    """Return a rich world in which every object looks different in every style: discs of random patches."""
    plain = make_rich_world()
    count = len(plain.candidates)
    patches = np.random.default_rng(1).integers(0, 256, (4, count, 4, 4, 3), dtype=np.uint8)
    y, x = np.mgrid[:128, :128] - 63.5
    disc = np.where(np.hypot(x, y) < 60, 255, 0).astype(np.uint8)
    sprites = np.empty((4, count, 128, 128, 4), dtype=np.uint8)
    sprites[..., :3] = patches.repeat(32, axis=2).repeat(32, axis=3)
    sprites[..., 3] = disc
    return EmojiWorld(
        plain.settings,
        plain.candidates,
        sprites[0],
        styled={style.key: sprites[number] for number, style in enumerate(STYLES) if number},
        characters=plain.characters,
        traditional=plain.traditional,
    )
