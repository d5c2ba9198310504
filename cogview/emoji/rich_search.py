"""Search for the content of images of rich worlds: the best objects and signs of each arrangement on a background.

The search minimizes the squared error between an image and a composition of a background, sprites and characters.
"""

# H, W canvas in pixels, S side of a sprite in pixels, N sprites (of every style), P positions, B backgrounds
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cogview.emoji.attributes import BOARDS, PATTERNS, STYLES, TYPEFACES, Board, Pattern, Sign, Style, Typeface
from cogview.emoji.backgrounds import background
from cogview.emoji.characters import paste_border
from cogview.emoji.grader import patches_of
from cogview.emoji.scene import RICH_LAYOUTS, TILES, Cell, Colour
from cogview.emoji.sprite_bank import SpriteBank
from cogview.emoji.things import EmojiObject
from cogview.emoji.world import EmojiWorld

_MAX_BACKGROUNDS = 6  # with which the whole image is explained ...
_MIN_VOTES = 0.25  # ... each with at least this fraction of the winner's votes
_COLOUR_SCALE = 30.0  # RGB distance at which a pixel's vote for a background has fallen to exp(-1/2)
_MIN_GAIN = 18.0  # squared bytes per value that each object lowers the error by at least
_MAX_FITS = 4  # arrangements on each background that are compared in full
_OUTER = 8  # objects that are tried with another one inside

_GRIDS = ("one", "beside", "above", "three", "four", "five", "six", "row", "on")
# Arrangements of which one cell is occupied, by its number.
_PARTS: Mapping[tuple[str, int], str] = {
    ("beside", 0): "left",
    ("beside", 1): "right",
    ("above", 0): "top",
    ("above", 1): "bottom",
}


@dataclass(frozen=True, kw_only=True)
class Shade:
    """A background.

    Args:
        colour: The colour.
        pattern: The pattern; None if it is plain.
        pixels: float32 RGB (H, W, 3) in [0, 255].
    """

    colour: Colour
    pattern: Pattern | None
    pixels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Fit:
    """An arrangement with the best objects and characters.

    Args:
        gain: How much it lowers the squared error of the background alone.
        minimum: How much it should at least, by the number and size of its parts.
        layout: A key of ``RICH_LAYOUTS``, or "empty".
        cells: The occupied cells.
        gains: Gains (N,) of every sprite in each of the cells, with the others as they are.
        sprites: Index of the sprite in each of the cells.
        sign: The sign.
    """

    gain: float
    minimum: float
    layout: str
    cells: tuple[Cell, ...] = ()
    gains: tuple[np.ndarray, ...] = ()
    sprites: tuple[int, ...] = ()
    sign: Sign | None = None

    @property
    def score(self) -> float:
        """The gain beyond the minimum."""
        return self.gain - self.minimum


_EMPTY = Fit(gain=0.0, minimum=0.0, layout="empty")


@dataclass(frozen=True, kw_only=True)
class _SignFit:
    """A sign that explains a part of an image.

    Args:
        kind: ``sign`` or ``label``.
        tiles: The cells of its characters.
        sign: The sign.
        area: The pixels that it covers, bool (H, W).
        error: Sum of their squared differences.
    """

    kind: str
    tiles: tuple[Cell, ...]
    sign: Sign
    area: np.ndarray
    error: float


class SceneSearch:
    """Search in the images of one world; scaled sprites are kept, so one search should see many images.

    Args:
        world: The world of the images.
    """

    def __init__(self, world: EmojiWorld) -> None:
        self.world = world
        self.styles = tuple(style for style in STYLES if style.key in world.settings.styles) or STYLES[:1]
        self._banks: dict[tuple[int, str], SpriteBank] = {}

    def sprite_of(self, index: int) -> tuple[Style, EmojiObject]:
        """Return the style and the object of a sprite.

        Args:
            index: Index of the sprite.
        """
        style, thing = divmod(index, len(self.world.candidates))
        return self.styles[style], self.world.candidates[thing]

    @cached_property
    def shades(self) -> tuple[Shade, ...]:
        """Every background of the world."""
        canvas, patterns = self.world.settings.canvas, PATTERNS if self.world.settings.patterns else ()
        return tuple(
            Shade(
                colour=colour,
                pattern=pattern,
                pixels=background(colour, pattern, canvas).astype(np.float32),
            )
            for colour in self.world.colours
            for pattern in (None, *patterns)
        )

    def fits(self, pixels: np.ndarray) -> list[tuple[int, list[Fit]]]:
        """Return the arrangements that explain an image best, on each probable background.

        Args:
            pixels: float32 RGB (H, W, 3) in [0, 255].

        Returns:
            Indices of ``shades``, each with its best arrangements, the best first.
        """
        likely = self._likely_shades(pixels)
        signs = self._signs(pixels)
        found = []
        for index, gains in zip(likely, self._cell_gains(pixels, likely), strict=True):
            fits = self._fits(pixels - self.shades[index].pixels, index, gains, signs)
            found.append((index, sorted(fits, key=lambda fit: -fit.score)[:_MAX_FITS]))
        return found

    def _likely_shades(self, pixels: np.ndarray) -> list[int]:
        """Backgrounds near to the colours of most pixels, the most probable first."""
        distances = np.stack([np.square(pixels - shade.pixels).sum(axis=-1) for shade in self.shades])
        votes = np.exp(-0.5 * distances / _COLOUR_SCALE**2).sum(axis=(1, 2))
        order = np.argsort(-votes)[:_MAX_BACKGROUNDS]
        return [int(index) for index in order if votes[index] >= _MIN_VOTES * votes[order[0]]]

    def _minimum(self, cell: Cell) -> float:
        """Smallest gain with which a cell counts as occupied."""
        return _MIN_GAIN * 3 * self._side(cell) ** 2

    def _side(self, cell: Cell) -> int:
        return cell.side * self.world.settings.canvas // 8

    def _corner(self, cell: Cell) -> tuple[int, int]:
        eighth = self.world.settings.canvas // 8
        return cell.x * eighth, cell.y * eighth

    def _bank(self, cell: Cell) -> SpriteBank:
        """Every sprite at the size of a cell."""
        key = (cell.side, cell.align)
        if key not in self._banks:
            side = self._side(cell)
            scaled = [
                self.world.scaled_sprite(thing, side, style, cell.align)
                for style in self.styles
                for thing in self.world.candidates
            ]
            # A pattern repeats with every eighth of the canvas, so that each cell has the same background.
            self._banks[key] = SpriteBank(
                colour=np.stack([colour for colour, _ in scaled]),
                alpha=np.stack([1 - keep for _, keep in scaled]),
                backgrounds=np.stack([shade.pixels[:side, :side] for shade in self.shades]),
            )
        return self._banks[key]

    def _fits(
        self, residual: np.ndarray, shade: int, gains: Mapping[Cell, np.ndarray], signs: Sequence[_SignFit]
    ) -> Iterator[Fit]:
        """Yield the best explanation of each arrangement on a background."""
        yield _EMPTY
        best = {cell: int(found.argmax()) for cell, found in gains.items()}
        for name in _GRIDS:
            yield self._grid(name, RICH_LAYOUTS[name], gains, best)
        yield self._inside(residual, shade, gains[RICH_LAYOUTS["one"][0]])
        above = self._grid("label", RICH_LAYOUTS["label"], gains, best)
        for sign in signs:
            gain = float(np.square(residual[sign.area]).sum()) - sign.error
            minimum = sum(self._minimum(cell) for cell in sign.tiles)
            other = above if sign.kind == "label" else _EMPTY
            yield replace(
                other,
                gain=gain + other.gain,
                minimum=minimum + other.minimum,
                layout=sign.kind,
                sign=sign.sign,
            )

    def _cell_gains(self, pixels: np.ndarray, shades: Sequence[int]) -> list[dict[Cell, np.ndarray]]:
        """Gains (N,) of every sprite in every cell on each background: how much it lowers the squared error there."""
        by_bank: dict[tuple[int, str], dict[Cell, None]] = {}
        for name in _GRIDS:
            for cell in RICH_LAYOUTS[name]:
                by_bank.setdefault((cell.side, cell.align), {})[cell] = None
        gains: list[dict[Cell, np.ndarray]] = [{} for _ in shades]
        for cells in map(list, by_bank.values()):
            corners, side = [self._corner(cell) for cell in cells], self._side(cells[0])
            patches = [patches_of(pixels - self.shades[shade].pixels, corners, side) for shade in shades]
            found = self._bank(cells[0]).gains(np.concatenate(patches), np.repeat(shades, len(cells)))
            for row, part in zip(gains, np.split(found, len(shades)), strict=True):
                row |= zip(cells, part, strict=True)
        return gains

    def _grid(
        self, name: str, cells: Sequence[Cell], gains: Mapping[Cell, np.ndarray], best: Mapping[Cell, int]
    ) -> Fit:
        """The explanation by the best sprites of the occupied cells of an arrangement."""
        occupied = [
            (number, cell) for number, cell in enumerate(cells) if gains[cell][best[cell]] > self._minimum(cell)
        ]
        if name == "on" and len(occupied) < len(cells):  # a sprite without another one is that of "top" or "bottom"
            return _EMPTY
        kept = tuple(cell for _, cell in occupied)
        layout = _PARTS.get((name, occupied[0][0]), name) if len(occupied) == 1 else name
        return Fit(
            gain=sum(float(gains[cell][best[cell]]) for cell in kept),
            minimum=sum(self._minimum(cell) for cell in kept),
            layout=layout if occupied or name == "label" else "empty",
            cells=kept,
            gains=tuple(gains[cell] for cell in kept),
            sprites=tuple(best[cell] for cell in kept),
        )

    def _inside(self, residual: np.ndarray, shade: int, gains: np.ndarray) -> Fit:
        """The explanation by a sprite inside of another."""
        outer, inner = RICH_LAYOUTS["inside"]
        side, (x, y), (left, top) = self._side(inner), self._corner(inner), self._corner(outer)
        area = slice(y - top, y - top + side), slice(x - left, x - left + side)
        bank, small = self._bank(outer), self._bank(inner)
        patch = residual[y : y + side, x : x + side]
        behind = self.shades[shade].pixels[:side, :side]
        # The middle of the outer object is hidden, so that its other parts decide which are tried.
        outside = gains - bank.crop(*area).gains(patch.reshape(1, -1, 3), [shade])[0]
        tried = np.argsort(-outside)[:_OUTER]
        colour, alpha = (
            part[tried].reshape(len(tried), bank.side, bank.side, -1)[:, area[0], area[1]] for part in bank.parts
        )
        change = colour - alpha * behind
        squares = (len(tried), side * side, 3)
        inner_gains = small.gains_on((patch - change).reshape(squares), (behind + change).reshape(squares))
        totals = gains[tried] + inner_gains.max(axis=1)
        number = int(totals.argmax())
        gain, sprite, best = float(totals[number]), int(tried[number]), int(inner_gains[number].argmax())
        return Fit(
            gain=gain,
            minimum=self._minimum(outer) + self._minimum(inner),
            layout="inside",
            cells=(outer, inner),
            gains=(outside, inner_gains[number]),
            sprites=(sprite, best),
        )

    def _signs(self, pixels: np.ndarray) -> list[_SignFit]:
        """The best characters of each arrangement of a sign, for each board and typeface."""
        found: list[_SignFit] = []
        if self.world.characters is None:
            return found
        known = self.world.characters.characters
        for (kind, _), tiles in TILES.items():
            side = self._side(tiles[0])
            patches = patches_of(pixels, [self._corner(cell) for cell in tiles], side).reshape(len(tiles), -1)
            power = float(np.square(patches).sum())
            for (board, typeface), bank in self._tiles.items():
                errors = self._tile_powers[board, typeface] - 2 * patches @ bank.T
                text = "".join(known[number] for number in errors.argmin(axis=1))
                area, border_error = self._surroundings(pixels, board, tiles, border=kind == "sign")
                found.append(
                    _SignFit(
                        kind=kind,
                        tiles=tiles,
                        sign=Sign(text=text, board=board, typeface=typeface),
                        area=area,
                        error=power + float(errors.min(axis=1).sum()) + border_error,
                    )
                )
        return found

    @cached_property
    def _tiles(self) -> dict[tuple[Board, Typeface], np.ndarray]:
        """Tiles of all characters by board and typeface: float32 (C, S * S * 3)."""
        assert self.world.characters is not None
        known, side = self.world.characters, self._side(TILES["sign", 1][0])
        return {
            (board, typeface): np.stack(
                [known.tile(one, typeface, board, side).reshape(-1) for one in known.characters]
            ).astype(np.float32)
            for board in BOARDS
            for typeface in TYPEFACES
        }

    @cached_property
    def _tile_powers(self) -> dict[tuple[Board, Typeface], np.ndarray]:
        return {key: np.square(bank).sum(axis=1) for key, bank in self._tiles.items()}

    def _surroundings(
        self, pixels: np.ndarray, board: Board, tiles: Sequence[Cell], *, border: bool
    ) -> tuple[np.ndarray, float]:
        """The pixels that a sign covers, bool (H, W), and the squared error of its frame."""
        framed = np.full(pixels.shape, -1, dtype=np.float32)
        if border:
            paste_border(framed, board, tiles)
        covered = framed[:, :, 0] >= 0
        for cell in tiles:
            (x, y), side = self._corner(cell), self._side(cell)
            framed[y : y + side, x : x + side] = pixels[y : y + side, x : x + side]
            covered[y : y + side, x : x + side] = True
        return covered, float(np.square(pixels - framed)[covered].sum())
