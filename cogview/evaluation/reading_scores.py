"""How well text in pictures was read: edit distances, and shares of characters and words."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cogview.evaluation.text_metrics import longest_common, normalize_text, split_characters


@dataclass(frozen=True, kw_only=True)
class ReadingScore:
    """Comparison of a text that was read with the expected one, both without punctuation and white space.

    Attributes:
        right_characters: Expected characters that were read in their order (longest common subsequence).
        characters: Expected characters.
        right_words: Expected words that the text holds, each as often as it is expected.
        words: Expected words: parts between white space or punctuation, which in Chinese are phrases.
        similarity: 1 - edit distance / length of the longer text, in [0, 1] (1 - N.E.D. of ICDAR 2019).
        exact: Whether nothing differs.
    """

    right_characters: int
    characters: int
    right_words: int
    words: int
    similarity: float
    exact: bool


def compare_reading(read: str, expected: str) -> ReadingScore:
    """Compare a text that was read with the expected one.

    Args:
        read: What was read; it may be empty.
        expected: The text that the picture should show, with at least one letter or digit.
    """
    found, wanted = split_characters(read), split_characters(expected)
    joined, words = "".join(found), Counter(normalize_text(expected).split())
    distance = edit_distance(found, wanted)
    return ReadingScore(
        right_characters=longest_common(found, wanted),
        characters=len(wanted),
        right_words=sum(min(count, joined.count(word)) for word, count in words.items()),
        words=sum(words.values()),
        similarity=1 - distance / max(len(found), len(wanted), 1),
        exact=found == wanted,
    )


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and replacements."""
    row = list(range(len(second) + 1))
    for count, token in enumerate(first, start=1):
        before, row[0] = row[0], count  # before: the value up and to the left
        for index, other in enumerate(second, start=1):
            above = row[index]
            row[index] = min(above + 1, row[index - 1] + 1, before + (token != other))
            before = above
    return row[-1]


def is_chinese(text: str) -> bool:
    """Return whether a text has a Chinese character."""
    return any(unicodedata.name(letter, "").startswith("CJK UNIFIED") for letter in text)
