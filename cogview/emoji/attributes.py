"""Attributes that scenes may have beside their objects: styles, background patterns, and signs with characters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cogview.plain_data import read_yaml

MAX_CHARACTERS = 2
"""Characters of a sign, at most."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """A set of sprites of one hand.

    Args:
        key: Name in recipes.
        names: Chinese names, the usual one first.
    """

    key: str
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Usual name of the style."""
        return self.names[0]


STYLES = (
    Style(key="noto", names=("表情",)),
    Style(key="twemoji", names=("贴纸",)),
    Style(key="fluent-flat", names=("扁平",)),
    Style(key="fluent-3d", names=("立体",)),
)
"""Known styles; the first is that of the font."""


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A pattern of the background, in a lighter or darker shade of its colour.

    Args:
        key: Name in the program.
        names: Chinese names, the usual one first.
    """

    key: str
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Usual name of the pattern."""
        return self.names[0]


PATTERNS = (Pattern(key="stripes", names=("条纹",)), Pattern(key="dots", names=("圆点", "波点")))


@dataclass(frozen=True, kw_only=True)
class Typeface:
    """A kind of font that characters are written in.

    Args:
        key: Name in the program.
        name: Chinese name.
    """

    key: str
    name: str


TYPEFACES = (Typeface(key="hei", name="黑体"), Typeface(key="kai", name="楷体"))


@dataclass(frozen=True, kw_only=True)
class Board:
    """The colours of a sign.

    Args:
        name: Chinese name of the colour of the board.
        rgb: RGB bytes of the board.
        ink: RGB bytes of the characters.
    """

    name: str
    rgb: tuple[int, int, int]
    ink: tuple[int, int, int]


BOARDS = (
    Board(name="红色", rgb=(192, 36, 44), ink=(255, 236, 170)),
    Board(name="黄色", rgb=(252, 204, 52), ink=(44, 36, 28)),
    Board(name="绿色", rgb=(36, 120, 70), ink=(252, 252, 248)),
    Board(name="蓝色", rgb=(36, 76, 168), ink=(252, 252, 248)),
    Board(name="白色", rgb=(250, 250, 246), ink=(30, 30, 36)),
)


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A board with one or two characters.

    Args:
        text: The characters.
        board: The colours.
        typeface: The kind of font.

    Raises:
        ValueError: The text is empty or too long.
    """

    text: str
    board: Board
    typeface: Typeface

    def __post_init__(self) -> None:
        if not 1 <= len(self.text) <= MAX_CHARACTERS:
            raise ValueError(f"a sign has 1 to {MAX_CHARACTERS} characters, got {self.text!r}")


@dataclass(frozen=True, kw_only=True)
class SceneTables:
    """Content of ``scenes.yaml``.

    Args:
        containers: Emoji of objects that another one can be inside of, without variation selectors.
        characters: Characters of signs, the most useful ones first.
        words: Words of two of these characters.
        traditional: Traditional characters of simplified ones that have several, or that Unihan lists otherwise.
        traditional_words: Words whose traditional form is not that of their characters, each before that form.
    """

    containers: frozenset[str]
    characters: str
    words: tuple[str, ...]
    traditional: dict[str, str]
    traditional_words: dict[str, str]


@cache
def scene_tables() -> SceneTables:
    """Return the tables of ``scenes.yaml``, which is read once."""
    plain = read_yaml(Path(__file__).with_name("scenes.yaml"))
    return SceneTables(
        containers=frozenset(plain["containers"].split()),
        characters="".join(plain["characters"].split()),
        words=tuple(plain["words"].split()),
        traditional={pair[0]: pair[1] for pair in plain["traditional"].split()},
        traditional_words=plain["traditional_words"],
    )
