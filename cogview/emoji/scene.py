"""Scenes of the emoji world: their content, meaning and arrangement, and the held-out split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cogview.emoji.attributes import STYLES, Pattern, Sign, Style
from cogview.emoji.things import EmojiObject

HELD_OUT_ONE_IN = 10
"""One meaning in ten is held out from training, chosen by a hash of the meaning."""

SceneKind = Literal[
    "one", "many", "beside", "above", "left", "right", "top", "bottom", "row", "inside", "on", "sign", "label"
]
NUM_THINGS: Mapping[SceneKind, int] = {
    "one": 1,
    "many": 1,
    "beside": 2,
    "above": 2,
    "left": 1,
    "right": 1,
    "top": 1,
    "bottom": 1,
    "row": 3,
    "inside": 2,
    "on": 2,
    "sign": 0,
    "label": 1,
}
"""Kinds of scenes, and how many different objects they have."""

PLAIN_KINDS: tuple[SceneKind, ...] = ("one", "many", "beside", "above")
"""Kinds of the scenes of a plain world."""

PLACES: tuple[SceneKind, ...] = ("left", "right", "top", "bottom")
"""Kinds of scenes of one object at a side of the image."""

COUNTS = (2, 3, 4)
MAX_COUNT = 6


@dataclass(frozen=True, kw_only=True)
class SceneWeights:
    """Relative frequencies of the kinds of scenes.

    Args:
        one: Scenes of one object.
        many: Scenes of several of one object.
        pair: Scenes of two objects, beside or above each other.
        place: Scenes of one object at a side of the image.
        row: Scenes of three objects in a row.
        inside: Scenes of an object inside of another.
        on_top: Scenes of an object on top of another.
        sign: Scenes of a sign with characters.
        label: Scenes of an object with a sign below.

    Raises:
        ValueError: A weight is negative, or all are 0.
    """

    one: int = 1
    many: int = 1
    pair: int = 1
    place: int = field(default=0, metadata={"omit_default": True})
    row: int = field(default=0, metadata={"omit_default": True})
    inside: int = field(default=0, metadata={"omit_default": True})
    on_top: int = field(default=0, metadata={"omit_default": True})
    sign: int = field(default=0, metadata={"omit_default": True})
    label: int = field(default=0, metadata={"omit_default": True})

    def __post_init__(self) -> None:
        if min(self.by_name.values()) < 0 or not sum(self.by_name.values()):
            raise ValueError(f"weights must be 0 or more and one of them above 0, got {self}")

    @property
    def by_name(self) -> dict[str, int]:
        """The weights by name."""
        return dict(vars(self))

    @property
    def has_new_kinds(self) -> bool:
        """Whether there are scenes of kinds that a plain world does not have."""
        return self.one + self.many + self.pair < sum(self.by_name.values())


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
        kind: ``one`` object; ``many``, several of one; ``beside`` and ``above``, two different ones; ``left``,
            ``right``, ``top`` and ``bottom``, one at that side; ``row``, three; ``inside`` and ``on``, a small one in
            or on a large one; ``sign``, none; ``label``, one with a sign below.
        things: The objects; for ``beside`` and ``row`` from left to right, for ``above`` and ``on`` (upper, lower),
            for ``inside`` (outer, inner).
        count: Number of objects of the kind ``many``, 2 to 6; 1 for all others.
        style: Hand of the sprites, in a world of several.
        pattern: Pattern of the background; None if it is plain.
        sign: The sign of the kinds ``sign`` and ``label``.

    Raises:
        ValueError: The objects, the count or the sign do not suit the kind.
    """

    colour: Colour
    kind: SceneKind
    things: tuple[EmojiObject, ...]
    count: int = 1
    style: Style = STYLES[0]
    pattern: Pattern | None = None
    sign: Sign | None = None

    def __post_init__(self) -> None:
        counts = range(2, MAX_COUNT + 1) if self.kind == "many" else (1,)
        if len(self.things) != NUM_THINGS.get(self.kind) or self.count not in counts:
            names = "、".join(thing.name for thing in self.things)
            kinds = tuple(NUM_THINGS)
            raise ValueError(f"no scene of kind {self.kind!r} holds {self.count} each of {names}; kinds: {kinds}")
        emoji = [thing.emoji for thing in self.things]
        if len(set(emoji)) < len(emoji):
            twice = next(thing.name for thing in self.things if emoji.count(thing.emoji) > 1)
            raise ValueError(f"the objects of a pair must differ, got {twice} twice")
        if self.kind in ("sign", "label") and self.sign is None:
            raise ValueError(f"a scene of kind {self.kind} needs a sign")
        if self.kind not in ("sign", "label") and self.sign is not None:
            raise ValueError(f"a scene of kind {self.kind} has no sign, got {self.sign.text}")

    @property
    def meaning(self) -> str:
        """Every attribute and object as one string, the same in every world and version."""
        return "|".join((self._content, *(() if self.style == STYLES[0] else (self.style.key,))))

    @property
    def _content(self) -> str:
        """The meaning without the style."""
        background = self.colour.name + (self.pattern.key if self.pattern else "")
        parts = [background, self.kind, str(self.count), *(thing.emoji for thing in self.things)]
        if self.sign is not None:
            parts += [self.sign.text, self.sign.board.name, self.sign.typeface.key]
        return "|".join(parts)

    @property
    def held_out(self) -> bool:
        """Whether the scene is for evaluation only.

        Held out are one content in ten, in every style; every scene of a held-out pair of an object and a style; and
        every scene of a held-out pair of characters.
        """
        if _is_held_out(self._content):
            return True
        if self.sign is not None and is_text_held_out(self.sign.text):
            return True
        return any(is_style_held_out(thing, self.style) for thing in self.things)

    @property
    def is_plain(self) -> bool:
        """Whether a plain world has such scenes."""
        return (
            self.kind in PLAIN_KINDS
            and (self.count == 1 or self.count in COUNTS)
            and self.style == STYLES[0]
            and self.pattern is None
        )

    @property
    def shown(self) -> tuple[EmojiObject, ...]:
        """Every object to render, in the order of ``cells_of``: three foxes are (fox, fox, fox)."""
        return self.things * self.count


def is_style_held_out(thing: EmojiObject, style: Style) -> bool:
    """Return whether no training scene shows an object in a style, as for one pair in ten; never in the first style.

    Args:
        thing: The object.
        style: The style.
    """
    return style != STYLES[0] and _is_held_out(f"{thing.emoji}|{style.key}")


def is_text_held_out(text: str) -> bool:
    """Return whether no training scene has a text, as for one pair of characters in ten; never for a single one.

    Args:
        text: The characters of a sign.
    """
    return len(text) > 1 and _is_held_out(f"sign|{text}")


def _is_held_out(key: str) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Position of one object, in eighths of the canvas.

    Args:
        x: Left edge of the sprite at size 1.
        y: Top edge of the sprite at size 1.
        side: Side of the sprite at size 1.
        area: Left, top, right and bottom of the area in which no other sprite may be.
        align: Edge of the cell that the visible part of a sprite touches; none by default.
    """

    x: int
    y: int
    side: int
    area: tuple[int, int, int, int]
    align: Literal["", "top", "bottom"] = ""


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
"""Arrangements of a plain world. Two of one object are beside each other."""


def _small(x: int, y: int) -> Cell:
    """A cell of a quarter of the canvas, of the side of ``five``, ``six``, ``row`` and ``inside``."""
    return Cell(x=x, y=y, side=2, area=(x, y, x + 2, y + 2))


RICH_LAYOUTS: Mapping[str, tuple[Cell, ...]] = {
    **LAYOUTS,
    "left": LAYOUTS["beside"][:1],
    "right": LAYOUTS["beside"][1:],
    "top": LAYOUTS["above"][:1],
    "bottom": LAYOUTS["above"][1:],
    "five": (_small(1, 1), _small(5, 1), _small(3, 3), _small(1, 5), _small(5, 5)),
    "six": (_small(0, 1), _small(3, 1), _small(6, 1), _small(0, 5), _small(3, 5), _small(6, 5)),
    "row": (_small(0, 3), _small(3, 3), _small(6, 3)),
    "inside": (LAYOUTS["one"][0], _small(3, 3)),
    "on": (
        Cell(x=3, y=2, side=2, area=(0, 0, 8, 4), align="bottom"),
        Cell(x=2, y=4, side=4, area=(0, 4, 8, 8), align="top"),
    ),
    "sign": (),
    "label": LAYOUTS["above"][:1],
}
"""Arrangements of a rich world: three in a row leave room for small sprites only."""

TILES: Mapping[tuple[str, int], tuple[Cell, ...]] = {
    ("sign", 1): (Cell(x=2, y=2, side=4, area=(2, 2, 6, 6)),),
    ("sign", 2): (Cell(x=0, y=2, side=4, area=(0, 2, 4, 6)), Cell(x=4, y=2, side=4, area=(4, 2, 8, 6))),
    ("label", 1): (Cell(x=2, y=4, side=4, area=(2, 4, 6, 8)),),
    ("label", 2): (Cell(x=0, y=4, side=4, area=(0, 4, 4, 8)), Cell(x=4, y=4, side=4, area=(4, 4, 8, 8))),
}
"""Places of characters, by kind of scene and number of characters. A character has the same codes in each."""

_COUNT_LAYOUTS = {2: "beside", 3: "three", 4: "four", 5: "five", 6: "six"}


def layout_of(scene: Scene) -> str:
    """Return the key in ``RICH_LAYOUTS`` of the arrangement of a scene."""
    return _COUNT_LAYOUTS[scene.count] if scene.kind == "many" else scene.kind


def cells_of(scene: Scene) -> tuple[Cell, ...]:
    """Return the cells of ``scene.shown``, in the same order."""
    return RICH_LAYOUTS[layout_of(scene)]
