"""Arrange a row of a token store in the layout of a task."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from cogview.data.store import NO_TOKEN, TEXT_FIELD
from cogview.tokenizers.layouts import Layout, TokenSequence
from cogview.tokenizers.tasks import Task, TextElement
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.windows import Window, upscale_windows


def text_of_row(task: Task, row: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the text tokens of one row without padding, uint16: those that the task reads, such as an instruction.

    Args:
        task: The task.
        row: The fields of the row.
    """
    texts = [one for one in task.contents.values() if isinstance(one, TextElement)]
    preferred = next((one.preferred for one in texts if one.preferred in row), TEXT_FIELD)
    text: np.ndarray = row[preferred]
    kept: np.ndarray = text[text != NO_TOKEN]
    return kept


def arrange_row(
    task: Task,
    layout: Layout,
    vocabulary: Vocabulary,
    text: np.ndarray,
    row: Mapping[str, np.ndarray],
    window: int,
    unknown: np.ndarray | None = None,
) -> TokenSequence:
    """Return the sequence of one row.

    Args:
        task: The task.
        layout: Its layout at the grid of the model.
        vocabulary: The ids of the model.
        text: Text tokens without padding.
        row: The other fields of the row.
        window: Index of the window, for windowed tasks.
        unknown: Codes of the given image that are unknown (G * G,), bool, for tasks whose image is ``maskable``. None:
            all in a task that fills, else none.

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
        elif content.maskable and (task.fills or unknown is not None):
            codes = np.ma.masked_array(codes, mask=True if unknown is None else unknown)
        values[name] = codes
    return layout.arrange(vocabulary, **values)


@functools.cache
def _windows(grid: int) -> list[Window]:
    return upscale_windows(grid)
