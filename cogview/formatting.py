"""Numbers and columns as text: sizes, durations, counts, shortened text, aligned columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Container, Iterable, Sequence

COLUMN_GAP = "  "
MAX_LISTED = 8  # entries of a list that a message shows
MAX_ENTRY = 80  # characters of each

_CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")  # general categories of Unicode
_JOINERS = "\u200c\u200d"  # of the category Cf: they join emoji and letters, and nothing else


def format_bytes(count: int) -> str:
    """Return a number of bytes in the largest decimal unit that it reaches, such as ``7.9 GB`` or ``3 bytes``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def format_gigabytes(count: float, decimals: int = 1) -> str:
    """Return a number of bytes in GB, so that adjacent numbers are easy to compare.

    Args:
        count: bytes.
        decimals: digits after the point.
    """
    return f"{count / 1e9:.{decimals}f} GB"


def format_duration(seconds: float) -> str:
    """Return a duration of up to hours with three digits, such as ``1.25 s`` or ``14 min``."""
    if seconds >= 36000:
        return f"{seconds / 3600:,.0f} h"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1000 * seconds:.3g} ms" if seconds >= 0.001 else "< 1 ms"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    Args:
        count: the number.
        noun: the noun in the singular; it gets an s unless ``count`` is 1.
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")


def shorten(text: str, limit: int, keep: int | None = None) -> str:
    """Return ``text``, or its first characters and an ellipsis where it is longer than ``limit``.

    Args:
        text: The text to show.
        limit: Characters up to which it is shown whole.
        keep: Characters that are left of a longer text; None keeps ``limit``.
    """
    return text if len(text) <= limit else text[: limit if keep is None else keep] + "…"


def shorten_middle(text: str, limit: int) -> str:
    """Return ``text``, or its beginning and its end around an ellipsis where it is longer than ``limit`` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[1 - (limit - limit // 2) :]}"


def format_list(
    entries: Iterable[object], max_listed: int = MAX_LISTED, joint: str = ", ", max_entry: int = MAX_ENTRY
) -> str:
    """Return a list for a message: its first entries, and the number of the others.

    Args:
        entries: The entries.
        max_listed: Entries that are shown.
        joint: Text between two entries.
        max_entry: Characters of an entry that are shown.

    Returns:
        Text such as ``a, b and 7 more``.
    """
    listed = [shorten(str(entry), max_entry) for entry in entries]
    more = f" and {len(listed) - max_listed} more" if len(listed) > max_listed else ""
    return joint.join(listed[:max_listed]) + more


def printable(text: str) -> str:
    """Return ``text`` with escapes for control characters, line breaks and characters that change the direction.

    A terminal obeys control characters: text from files and servers could move its cursor or change its title.
    """
    if text.isprintable():
        return text
    return "".join(
        repr(character)[1:-1]
        if unicodedata.category(character) in _CONTROL and character not in _JOINERS
        else character
        for character in text
    )


def display_width(text: str) -> int:
    """Return the columns of a terminal that ``text`` takes: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def aligned_columns(rows: Sequence[Sequence[str]], left: Container[int]) -> list[str]:
    """Return a line for each of ``rows``, with its cells in columns.

    Args:
        rows: The cells; all rows have the same number.
        left: Indices of the columns that are aligned to the left; numbers go to the right.

    Returns:
        The lines, without spaces at their ends.
    """
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - display_width(cell))
            cells.append(cell + space if index in left else space + cell)
        lines.append(COLUMN_GAP.join(cells).rstrip())
    return lines
