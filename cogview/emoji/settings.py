"""Settings of a rich world: styles, characters, patterns and captions beyond those of a plain one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cogview.emoji.attributes import STYLES
from cogview.emoji.scene import COUNTS, EQUAL_WEIGHTS, MAX_COUNT, SceneWeights

StyleKey = Literal["noto", "twemoji", "fluent-flat", "fluent-3d"]


@dataclass(frozen=True, kw_only=True)
class CaptionRates:
    """Percentages of the captions of a rich world with some property.

    Args:
        open_colour: The background is left open, and so is the colour of a sign.
        open_style: The style is left open; that of the first style is left open in most of the others as well.
        open_place: The places of two or three objects are left open.
        open_typeface: The kind of font is left open.
        traditional: Traditional characters.

    Raises:
        ValueError: A percentage is out of range.
    """

    open_colour: int = 20
    open_style: int = 40
    open_place: int = 10
    open_typeface: int = 60
    traditional: int = 10

    def __post_init__(self) -> None:
        for name, percent in vars(self).items():
            if not 0 <= percent <= 100:
                raise ValueError(f"{name} must be from 0 to 100 percent, got {percent}")


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """The ``scenes`` section of a recipe.

    A world is plain if it leaves ``styles``, ``characters``, ``max_count``, ``patterns`` and ``captions`` out, and has
    no weights of new kinds of scenes. Its scenes, captions and images are those of earlier versions.

    Args:
        things: Number of objects, the commonest first, or "all".
        canvas: Side of an image in pixels, a multiple of 64.
        jitter: Maximum offset of a sprite from the middle of its position in pixels, in each direction and within its
            cell. At 0 every sprite starts at an eighth of the canvas: where a code is no larger, it has the same codes.
        sizes: Sides of sprites relative to those of the layout.
        weights: Frequencies of the kinds of scenes.
        styles: Styles of the scenes, which are equally frequent; one unnamed style if empty.
        characters: Number of characters that signs may have, the most useful ones first.
        max_count: Maximum number of equal objects.
        patterns: Percentage of the scenes with a pattern in the background.
        captions: Percentages of the captions with some property; None for the captions of a plain world.

    Raises:
        ValueError: A setting is out of range.
    """

    things: int | Literal["all"] = "all"
    canvas: int = 64
    jitter: int = 0
    sizes: tuple[float, ...] = (1.0,)
    weights: SceneWeights = EQUAL_WEIGHTS
    styles: tuple[StyleKey, ...] = field(default=(), metadata={"omit_default": True})
    characters: int = field(default=0, metadata={"omit_default": True})
    max_count: int = field(default=COUNTS[-1], metadata={"omit_default": True})
    patterns: int = field(default=0, metadata={"omit_default": True})
    captions: CaptionRates | None = field(default=None, metadata={"omit_default": True})

    def __post_init__(self) -> None:
        if self.things != "all" and (isinstance(self.things, str) or self.things < 2):
            raise ValueError(f'things must be "all" or a number of at least 2, got {self.things!r}')
        if self.canvas < 64 or self.canvas % 64:
            raise ValueError(f"canvas must be a multiple of 64 pixels, got {self.canvas}")
        if not 0 <= self.jitter < self.canvas:
            raise ValueError(f"jitter must be from 0 to {self.canvas - 1} pixels, got {self.jitter}")
        if not self.sizes or not all(0.25 <= size <= 1.25 for size in self.sizes):
            raise ValueError(f"sizes must be numbers from 0.25 to 1.25, got {list(self.sizes)}")
        self._check_rich()

    def _check_rich(self) -> None:
        if self.styles and (self.styles[0] != STYLES[0].key or len(set(self.styles)) < len(self.styles)):
            raise ValueError(f"styles must begin with {STYLES[0].key} and differ, got {list(self.styles)}")
        if self.characters < 0 or self.characters == 1:
            raise ValueError(f"characters must be 0 or a number of at least 2, got {self.characters}")
        if not COUNTS[-1] <= self.max_count <= MAX_COUNT:
            raise ValueError(f"max_count must be from {COUNTS[-1]} to {MAX_COUNT}, got {self.max_count}")
        if not 0 <= self.patterns <= 100:
            raise ValueError(f"patterns must be from 0 to 100 percent, got {self.patterns}")
        if (self.weights.sign or self.weights.label) and not self.characters:
            raise ValueError("scenes with a sign need characters: give their number, or leave their weights out")
        if self.is_rich and (self.jitter or self.sizes != (1.0,)):
            raise ValueError(
                "a world of styles, characters, patterns, counts above 4 or new kinds of scenes needs jitter 0 and "
                f"sizes [1.0], got jitter {self.jitter} and sizes {list(self.sizes)}"
            )

    @property
    def is_rich(self) -> bool:
        """Whether the world has more than the scenes and captions of a plain one."""
        more = self.styles or self.characters or self.patterns or self.captions or self.weights.has_new_kinds
        return bool(more) or self.max_count != COUNTS[-1]

    @property
    def caption_rates(self) -> CaptionRates:
        """The percentages of the captions of a rich world."""
        return self.captions or CaptionRates()
