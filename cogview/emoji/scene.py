"""Scenes of the emoji world: their content, meaning and arrangement, and the held-out split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cogview.emoji.things import EmojiObject

HELD_OUT_ONE_IN = 10
"""One meaning in ten is held out from training, chosen by a hash of the meaning."""

SceneKind = Literal["one", "many", "beside", "above"]
SCENE_KINDS: tuple[SceneKind, ...] = ("one", "many", "beside", "above")
COUNTS = (2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class SceneWeights:
    """Relative frequencies of the kinds of scenes.

    Args:
        one: Scenes of one object.
        many: Scenes of several of one object.
        pair: Scenes of two objects.

    Raises:
        ValueError: A weight is negative, or all are 0.
    """

    one: int = 1
    many: int = 1
    pair: int = 1

    def __post_init__(self) -> None:
        if min(self.one, self.many, self.pair) < 0 or not self.one + self.many + self.pair:
            raise ValueError(f"weights must be 0 or more and one of them above 0, got {self}")


EQUAL_WEIGHTS = SceneWeights()


@dataclass(frozen=True, kw_only=True)
class Colour:
    """A background.

    Args:
        names: Chinese names, the usual one first.
        rgb: RGB bytes.
    """

    names: tuple[str, ...]
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Usual name of the colour."""
        return self.names[0]


COLOURS = (
    Colour(names=("红色",), rgb=(222, 76, 70)),
    Colour(names=("橙色", "橘色"), rgb=(247, 152, 60)),
    Colour(names=("黄色",), rgb=(250, 216, 92)),
    Colour(names=("绿色",), rgb=(108, 186, 104)),
    Colour(names=("青色",), rgb=(92, 200, 196)),
    Colour(names=("蓝色",), rgb=(78, 128, 220)),
    Colour(names=("紫色",), rgb=(150, 102, 204)),
    Colour(names=("粉色", "粉红色"), rgb=(250, 178, 204)),
    Colour(names=("棕色", "褐色"), rgb=(146, 106, 78)),
    Colour(names=("灰色",), rgb=(158, 162, 168)),
    Colour(names=("白色",), rgb=(250, 250, 248)),
    Colour(names=("黑色",), rgb=(42, 44, 50)),
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Content of an image.

    Args:
        colour: The background.
        kind: ``one`` object; ``many``, several of one; ``beside`` and ``above``, two different ones.
        things: The objects; for ``beside`` (left, right), for ``above`` (upper, lower).
        count: Number of objects of the kind ``many``, 2 to 4; 1 for all others.

    Raises:
        ValueError: The objects or the count do not suit the kind.
    """

    colour: Colour
    kind: SceneKind
    things: tuple[EmojiObject, ...]
    count: int = 1

    def __post_init__(self) -> None:
        pair = self.kind in ("beside", "above")
        counts = COUNTS if self.kind == "many" else (1,)
        if self.kind not in SCENE_KINDS or len(self.things) != 1 + pair or self.count not in counts:
            names = "、".join(thing.name for thing in self.things)
            raise ValueError(f"no scene of kind {self.kind!r} holds {self.count} each of {names}; kinds: {SCENE_KINDS}")
        if pair and self.things[0].emoji == self.things[1].emoji:
            raise ValueError(f"the objects of a pair must differ, got {self.things[0].name} twice")

    @property
    def meaning(self) -> str:
        """Colour, arrangement, count and objects as one string, the same in every world and version."""
        return "|".join((self.colour.name, self.kind, str(self.count), *(thing.emoji for thing in self.things)))

    @property
    def held_out(self) -> bool:
        """Whether the scene is for evaluation only, as one meaning in ten is."""
        digest = hashlib.blake2b(self.meaning.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0

    @property
    def shown(self) -> tuple[EmojiObject, ...]:
        """Every object to render, in the order of ``cells_of``: three foxes are (fox, fox, fox)."""
        return self.things * self.count


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Position of one object, in eighths of the canvas.

    Args:
        x: Left edge of the sprite at size 1.
        y: Top edge of the sprite at size 1.
        side: Side of the sprite at size 1.
        area: Left, top, right and bottom of the area in which no other sprite may be.
    """

    x: int
    y: int
    side: int
    area: tuple[int, int, int, int]


LAYOUTS: Mapping[str, tuple[Cell, ...]] = {
    "one": (Cell(x=1, y=1, side=6, area=(0, 0, 8, 8)),),
    "beside": (Cell(x=0, y=2, side=4, area=(0, 0, 4, 8)), Cell(x=4, y=2, side=4, area=(4, 0, 8, 8))),
    "above": (Cell(x=2, y=0, side=4, area=(0, 0, 8, 4)), Cell(x=2, y=4, side=4, area=(0, 4, 8, 8))),
    "three": (
        Cell(x=0, y=0, side=4, area=(0, 0, 4, 4)),
        Cell(x=4, y=0, side=4, area=(4, 0, 8, 4)),
        Cell(x=2, y=4, side=4, area=(0, 4, 8, 8)),
    ),
    "four": (
        Cell(x=0, y=0, side=4, area=(0, 0, 4, 4)),
        Cell(x=4, y=0, side=4, area=(4, 0, 8, 4)),
        Cell(x=0, y=4, side=4, area=(0, 4, 4, 8)),
        Cell(x=4, y=4, side=4, area=(4, 4, 8, 8)),
    ),
}
"""Arrangements of a canvas. Two of one object are beside each other."""


def cells_of(scene: Scene) -> tuple[Cell, ...]:
    """Return the cells of ``scene.shown``, in the same order."""
    if scene.kind == "many":
        return LAYOUTS[{2: "beside", 3: "three", 4: "four"}[scene.count]]
    return LAYOUTS[scene.kind]
