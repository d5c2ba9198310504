"""Random numbers as a function of a key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


class KeyedRandom:
    """Random integers from a hash of a key, equal on every machine and with every version of every library.

    Args:
        key: Values whose strings, joined by ``/``, are the key.
    """

    def __init__(self, *key: object) -> None:
        self._key = "/".join(map(str, key)).encode()
        self._block = 0
        self._words: list[int] = []

    def randbelow(self, end: int) -> int:
        """Return an integer in [0, ``end``); the bias of the remainder is below ``end`` / 2**64."""
        if not self._words:
            digest = hashlib.blake2b(self._key, salt=self._block.to_bytes(16, "big")).digest()
            self._words = [int.from_bytes(digest[i : i + 8], "big") for i in range(0, 64, 8)]
            self._block += 1
        return self._words.pop() % end

    def pick(self, items: Sequence[_Item]) -> _Item:
        """Return one of ``items``, all equally likely."""
        return items[self.randbelow(len(items))]

    def chance(self, percent: int) -> bool:
        """Return True with a probability of ``percent`` / 100."""
        return self.randbelow(100) < percent
