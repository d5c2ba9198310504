"""Find the known names in a prompt, and similar names for a prompt without any."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

# Words of any prompt, which do not identify an object.
_GRAMMAR = re.compile(
    r"背景|[红橙橘黄绿青蓝紫粉棕褐灰白黑]色|[左右上下][边面方]|[一二两三四五六七八九十\d]+[个只头匹条朵棵辆架艘本把杯座块份碗]?"
    r"|[的是有在上下，。、！？,.!?\s]"
)


def find_names(text: str, names: Iterable[str]) -> list[str]:
    """Return the ``names`` that occur in ``text``, in order; of several at one index, the longest.

    Args:
        text: The text to search.
        names: The names to find.
    """
    longest_first = sorted({name for name in names if name}, key=len, reverse=True)
    if not longest_first:
        return []
    return re.findall("|".join(map(re.escape, longest_first)), text)


def nearest_names(text: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Return up to ``n`` of ``names`` by their similarity to ``text``, without names that share nothing with it.

    Args:
        text: The text.
        names: The names to compare.
        n: Maximum number of names.
    """
    words = [word for word in _GRAMMAR.split(text) if word]
    scored: list[tuple[float, int, str]] = []
    for name in dict.fromkeys(names):
        score = max((SequenceMatcher(None, word, name).ratio() for word in words), default=0.0)
        if score > 0:
            scored.append((-score, len(scored), name))  # equal scores keep their order, the commonest first
    return [name for _, _, name in sorted(scored)[:n]]
