"""The nine overlapping windows in which ``G x G`` codes are upscaled to ``2G x 2G``."""

# G codes on a side of an image
from __future__ import annotations

from dataclasses import dataclass

NUM_WINDOWS = 9
WINDOW_MULTIPLE = 4  # of codes on a side of an image that is upscaled


@dataclass(frozen=True, kw_only=True)
class Window:
    """One step of upscaling: a G x G window of the larger image, at multiples of half a window.

    Codes of the window that are known already are given. The others of its first ``lines`` lines are generated, in
    raster order.

    Attributes:
        row: 0, 1 or 2 from above.
        column: 0, 1 or 2 from the left.
        lines: Lines of the window that are complete after it, 1 to G.
        grid: G.
    """

    row: int
    column: int
    lines: int
    grid: int

    @property
    def source(self) -> tuple[slice, slice]:
        """Crop (G/2, G/2) of the G x G codes that conditions the window."""
        side = self.grid // 2
        top, left = self.row * side // 2, self.column * side // 2
        return slice(top, top + side), slice(left, left + side)

    @property
    def target(self) -> tuple[slice, slice]:
        """Part (lines, G) of the 2G x 2G codes that is complete after this window."""
        rows, columns = self.area
        return slice(rows.start, rows.start + self.lines), columns

    @property
    def area(self) -> tuple[slice, slice]:
        """Part (G, G) of the 2G x 2G codes that the window covers."""
        top, left = self.row * self.grid // 2, self.column * self.grid // 2
        return slice(top, top + self.grid), slice(left, left + self.grid)


def upscale_windows(grid: int) -> list[Window]:
    """Return the nine windows that upscale ``grid`` x ``grid`` codes, in the order of CogView v1.

    A window stops short of its last line where a later window sees further down: after 18 and 30 of 32 lines, and in
    proportion for other grids. On a grid of 8, for example, the first window generates 5 lines, the others 8.

    Args:
        grid: Codes on a side of the image that is upscaled, a multiple of 4: a window reads half of them, and starts at
            multiples of a quarter.

    Returns:
        Windows in the order in which they are generated.

    Raises:
        ValueError: If the grid is no multiple of 4.
    """
    if grid < 1 or grid % WINDOW_MULTIPLE:
        raise ValueError(f"windows need a multiple of {WINDOW_MULTIPLE} codes on a side, got a grid of {grid}")
    first, middle, last = grid // 2 + -(-grid // 16), grid - grid // 16, grid
    order = (
        *((0, 0, first), (0, 1, middle), (0, 2, middle)),
        *((1, 1, middle), (1, 0, middle), (1, 2, middle)),
        *((2, 0, last), (2, 1, last), (2, 2, last)),
    )
    return [Window(row=row, column=column, lines=lines, grid=grid) for row, column, lines in order]


def upscale_steps(grid: int) -> list[list[Window]]:
    """Return ``upscale_windows``, grouped by those that can be generated in one batch.

    Neither of the windows (0, 2) and (1, 1) contains a code that the other generates, nor of (1, 0) and (1, 2).

    Args:
        grid: Codes on a side of the image that is upscaled.

    Returns:
        Seven groups of one or two windows.

    Raises:
        ValueError: If the grid is no multiple of 4.
    """
    windows = upscale_windows(grid)
    return [*([window] for window in windows[:2]), windows[2:4], windows[4:6], *([window] for window in windows[6:])]
