"""What several test files share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cogview.data.emoji.scenes import World, WorldSettings
from cogview.data.emoji.things import Thing


@pytest.fixture(scope="session")
def make_tiny_world() -> Callable[..., World]:
    """A function that makes a world of six drawn shapes under Chinese names; no font is needed."""
    things = (
        Thing(emoji="🍎", name="红苹果", synonyms=("苹果",)),
        Thing(emoji="🦊", name="狐狸", measures=("只", "个")),
        Thing(emoji="🐕", name="狗", synonyms=("小狗",), measures=("只", "条", "个")),
        Thing(emoji="🚗", name="汽车", measures=("辆", "个")),
        Thing(emoji="📖", name="打开的书", measures=("本", "个")),
        Thing(emoji="🐟", name="鱼", measures=("条", "个")),
    )
    sprites = np.stack([_shape(index) for index in range(len(things))])

    def make(**settings: Any) -> World:
        return World(WorldSettings(**settings), things, sprites)

    return make


def _shape(index: int) -> np.ndarray:
    """A drawing that no other index has, RGBA (128, 128, 4)."""
    image = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    if index == 0:
        draw.ellipse((8, 8, 120, 120), fill=(200, 20, 60, 255))
    elif index == 1:
        draw.polygon([(64, 4), (124, 124), (4, 124)], fill=(230, 120, 10, 255))
    elif index == 2:
        draw.rectangle((20, 20, 108, 108), fill=(120, 70, 30, 255), outline=(255, 255, 255, 255), width=14)
    elif index == 3:
        draw.rectangle((4, 44, 124, 84), fill=(20, 60, 200, 255))
        draw.rectangle((44, 4, 84, 124), fill=(20, 60, 200, 255))
    elif index == 4:
        draw.ellipse((8, 8, 120, 120), outline=(20, 140, 60, 255), width=24)
    else:
        draw.polygon([(4, 4), (124, 64), (4, 124)], fill=(250, 250, 120, 255))
        draw.rectangle((90, 90, 124, 124), fill=(10, 10, 10, 255))
    return np.asarray(image)
