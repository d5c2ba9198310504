"""Characters on signs: read from fonts, and rendered as tiles of a board.

Two fonts are read, at the paths where Debian installs them or at given ones. Both have the SIL Open Font License 1.1,
which allows pictures of their characters in any work; a saved world holds the bitmaps of its characters.
"""

# F typefaces, C characters, S side of a tile in pixels
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cogview.emoji.attributes import TYPEFACES, Board, Sign, Typeface
from cogview.emoji.scene import Cell
from cogview.errors import InputError, reason_of

TILE_PIXELS = 128
"""Side of a stored character."""

_GLYPH_SHARE = 0.875  # of a tile; at 32 pixels a character has 28
_BORDER = 16  # borders of signs are this fraction of the canvas
_BORDER_SHADE = 0.62
_PACKAGES = {"hei": "fonts-noto-cjk", "kai": "fonts-lxgw-wenkai"}


@dataclass(frozen=True, kw_only=True)
class CharacterFonts:
    """Paths of the fonts of characters; the defaults are those of Debian.

    Args:
        hei: Noto Sans CJK, bold.
        kai: LXGW WenKai, bold.
    """

    hei: Path = Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Bold.ttc")
    kai: Path = Path("/usr/share/fonts/truetype/lxgw-wenkai/LXGWWenKai-Bold.ttf")

    def check(self) -> None:
        """Check that both files exist.

        Raises:
            InputError: A file is missing; the message names its Debian package.
        """
        for key, package in _PACKAGES.items():
            if not getattr(self, key).is_file():
                raise InputError(f"{getattr(self, key)} is missing; on Debian or Ubuntu: apt install {package}")


@dataclass(frozen=True, kw_only=True, eq=False)
class CharacterSet:
    """Characters of signs with their bitmaps.

    Args:
        characters: The C characters.
        bitmaps: uint8 (F, C, 128, 128), the share of ink in each pixel of a tile, in [0, 255]; by ``TYPEFACES``.

    Raises:
        ValueError: The bitmaps have another shape or dtype.
    """

    characters: str
    bitmaps: np.ndarray

    def __post_init__(self) -> None:
        expected = (len(TYPEFACES), len(self.characters), TILE_PIXELS, TILE_PIXELS)
        if self.bitmaps.shape != expected or self.bitmaps.dtype != np.uint8:
            raise ValueError(
                f"{len(self.characters)} characters need uint8 bitmaps {expected}, "
                f"got {self.bitmaps.dtype} {self.bitmaps.shape}"
            )

    @cached_property
    def _scaled(self) -> dict[tuple[str, str, int], np.ndarray]:
        return {}

    def ink(self, character: str, typeface: Typeface, side: int) -> np.ndarray:
        """Return the share of ink of a character: float32 (S, S, 1) in [0, 1].

        Args:
            character: The character.
            typeface: The kind of font.
            side: Side of the tile in pixels.
        """
        key = (character, typeface.key, side)
        if key not in self._scaled:
            from PIL import Image

            bitmap = self.bitmaps[TYPEFACES.index(typeface), self.characters.index(character)]
            scaled = Image.fromarray(bitmap).resize((side, side), Image.Resampling.LANCZOS)
            self._scaled[key] = np.asarray(scaled, dtype=np.float32)[:, :, None] / 255
        return self._scaled[key]

    def tile(self, character: str, typeface: Typeface, board: Board, side: int) -> np.ndarray:
        """Return the tile of a character on a board: uint8 (S, S, 3).

        Args:
            character: The character.
            typeface: The kind of font.
            board: The colours.
            side: Side of the tile in pixels.
        """
        ink = self.ink(character, typeface, side)
        colours = np.array(board.rgb, np.float32) * (1 - ink) + np.array(board.ink, np.float32) * ink
        tile: np.ndarray = (colours + 0.5).astype(np.uint8)
        return tile

    def paste(self, image: np.ndarray, sign: Sign, tiles: Sequence[Cell], *, border: bool) -> None:
        """Paste a sign into an image, in place.

        Args:
            image: uint8 RGB (H, H, 3).
            sign: The sign.
            tiles: The cells of its characters.
            border: Frame the board where the canvas has room.
        """
        canvas = len(image)
        if border:
            paste_border(image, sign.board, tiles)
        for character, cell in zip(sign.text, tiles, strict=True):
            x, y, side = (round(length * canvas / 8) for length in (cell.x, cell.y, cell.side))
            image[y : y + side, x : x + side] = self.tile(character, sign.typeface, sign.board, side)


def paste_border(image: np.ndarray, board: Board, tiles: Sequence[Cell]) -> None:
    """Paste the frame of a board around its tiles, in place; the tiles are left in the colour of the frame.

    Args:
        image: uint8 RGB (H, H, 3).
        board: The colours.
        tiles: The cells of the characters.
    """
    canvas = len(image)
    border = canvas // _BORDER
    left, top = (round(edge * canvas / 8) for edge in tiles[0].area[:2])
    right, bottom = (round(edge * canvas / 8) for edge in tiles[-1].area[2:])
    shade = tuple(round(value * _BORDER_SHADE) for value in board.rgb)
    image[max(top - border, 0) : bottom + border, max(left - border, 0) : right + border] = shade


def draw_characters(characters: str, fonts: CharacterFonts) -> CharacterSet:
    """Return characters with their bitmaps.

    Args:
        characters: The characters.
        fonts: Paths of the fonts.

    Raises:
        InputError: A font is missing, cannot be read, or lacks a character.
    """
    fonts.check()
    bitmaps = np.zeros((len(TYPEFACES), len(characters), TILE_PIXELS, TILE_PIXELS), dtype=np.uint8)
    for index, typeface in enumerate(TYPEFACES):
        path: Path = getattr(fonts, typeface.key)
        for number, character in enumerate(characters):
            bitmaps[index, number] = _draw(character, path)
    return CharacterSet(characters=characters, bitmaps=bitmaps)


def _draw(character: str, path: Path) -> np.ndarray:
    """The bitmap of a character, with its visible part in the middle."""
    from PIL import Image, ImageDraw, ImageFont

    size = round(TILE_PIXELS * _GLYPH_SHARE)
    try:
        # The third face of the collection Noto Sans CJK has the simplified forms.
        face = ImageFont.truetype(str(path), size, index=2 if path.suffix == ".ttc" else 0)
    except OSError as error:
        raise InputError(f"{path} cannot be read as a font: {reason_of(error)}") from error
    left, top, right, bottom = face.getbbox(character)
    canvas = Image.new("L", (TILE_PIXELS, TILE_PIXELS), 0)
    corner = ((TILE_PIXELS - right - left) / 2, (TILE_PIXELS - bottom - top) / 2)
    ImageDraw.Draw(canvas).text(corner, character, font=face, fill=255)
    bitmap = np.asarray(canvas)
    if not bitmap.any():
        raise InputError(f"{path} has no picture of the character {character}")
    return bitmap
