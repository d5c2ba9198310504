"""Arrange a row of a token store in the layout of a task."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from cogview.tokenizers.layouts import Layout, TokenSequence
from cogview.tokenizers.tasks import Task, TextElement
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.windows import Window, upscale_windows


def arrange_row(
    task: Task, layout: Layout, vocabulary: Vocabulary, text: np.ndarray, row: Mapping[str, np.ndarray], window: int
) -> TokenSequence:
    """Return the sequence of one row.

    Args:
        task: The task.
        layout: Its layout at the grid of the model.
        vocabulary: The ids of the model.
        text: Text tokens without padding.
        row: The other fields of the row.
        window: Index of the window, for windowed tasks.

    Raises:
        ValueError: The values do not fit the layout.
    """
    values: dict[str, Any] = {}
    for name, content in task.contents.items():
        if isinstance(content, TextElement):
            values[name] = text
            continue
        codes = row[content.field]
        if task.windowed:  # the field holds the whole image
            whole, side = codes.reshape(round(len(codes) ** 0.5), -1), content.side(layout.grid)
            chosen = _windows(layout.grid)[window]
            top, left = (part.start for part in (chosen.source if len(whole) == layout.grid else chosen.target))
            codes = whole[top : top + side, left : left + side]
        values[name] = codes
    return layout.arrange(vocabulary, **values)


@functools.cache
def _windows(grid: int) -> list[Window]:
    return upscale_windows(grid)
