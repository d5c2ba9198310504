"""The nine windows of upscaling."""

import numpy as np
import pytest

from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.windows import upscale_steps, upscale_windows

SMALL = Vocabulary(num_image_codes=64, num_text_pieces=300)
RED_APPLE = [7, 21, 4]  # any pieces
GRIDS = [4, 8, 12, 16, 20, 32]


def codes(side, num_codes):
    """Return side * side different codes."""
    return np.arange(side * side) * 37 % num_codes


def generate(grid: int, windows) -> np.ndarray:
    """Return which window generates each of the 2G x 2G codes; the sequence of every window is arranged for it."""
    canvas = np.ma.masked_all((2 * grid, 2 * grid), dtype=np.int64)
    layout = layouts(grid)["upscale"]
    small = codes(grid, 64).reshape(grid, grid)
    for window in windows:
        row = layout.arrange(SMALL, text=RED_APPLE, small=small[window.source], image=canvas[window.target])
        row = row.truncate(row.spans["image"].start + window.lines * grid)
        generated = np.where(row.blanks, 3 * window.row + window.column, row.ids)[row.spans["image"]]
        assert row.blanks.any()
        canvas[window.target] = generated.reshape(window.lines, grid)
    assert not np.ma.getmaskarray(canvas).any(), "codes that no window generates"
    return np.asarray(canvas)


def test_upscale_windows_equal_cogview_v1():
    assert [(w.row, w.column, w.lines) for w in upscale_windows(32)] == [
        *((0, 0, 18), (0, 1, 30), (0, 2, 30), (1, 1, 30), (1, 0, 30), (1, 2, 30), (2, 0, 32), (2, 1, 32), (2, 2, 32))
    ]
    last = upscale_windows(32)[-1]
    assert last.source == (slice(16, 32), slice(16, 32))
    assert last.target == (slice(32, 64), slice(32, 64))
    assert [w.lines for w in upscale_windows(8)] == [5, 8, 8, 8, 8, 8, 8, 8, 8]  # 4.5 and 7.5, rounded up
    assert [w.lines for w in upscale_windows(16)] == [9, 15, 15, 15, 15, 15, 16, 16, 16]


@pytest.mark.parametrize("grid", GRIDS)
def test_upscale_windows_generate_every_code_once(grid):
    generated_by = generate(grid, upscale_windows(grid))
    assert generated_by.shape == (2 * grid, 2 * grid)
    assert set(generated_by.flat) == set(range(9))
    first = grid // 2 + -(-grid // 16)
    assert (generated_by == 0).nonzero()[0].max() == first - 1  # the first window stops there
    assert (generated_by == 0).sum() == first * grid


@pytest.mark.parametrize("grid", GRIDS)
def test_window_source_covers_its_target(grid):
    for window in upscale_windows(grid):
        (rows, columns), (target_rows, target_columns) = window.source, window.target
        assert (2 * rows.start, 2 * columns.start) == (target_rows.start, target_columns.start)
        assert (2 * columns.stop, 2 * (rows.stop - rows.start)) == (target_columns.stop, grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_of_one_step_are_independent(grid):
    """Neither contains a code that the other generates."""
    windows = upscale_windows(grid)
    generated_by = generate(grid, windows)
    steps = upscale_steps(grid)
    assert [window for step in steps for window in step] == windows
    assert [[(window.row, window.column) for window in step] for step in steps if len(step) > 1] == [
        [(0, 2), (1, 1)],
        [(1, 0), (1, 2)],
    ]
    for one, other in (step for step in steps if len(step) > 1):
        assert 3 * one.row + one.column not in generated_by[other.target]
        assert 3 * other.row + other.column not in generated_by[one.target]
        index = windows.index(one)
        swapped = [*windows[:index], other, one, *windows[index + 2 :]]
        assert (generate(grid, swapped) == generated_by).all()


@pytest.mark.parametrize("grid", [0, 1, 6, 9, 10])
def test_upscale_windows_refuse_a_grid_whose_quarters_are_no_codes(grid):
    with pytest.raises(ValueError, match=f"windows need a multiple of 4 codes on a side, got a grid of {grid}"):
        upscale_windows(grid)
