"""Check the pages of an LMDB file before LMDB maps them into memory.

LMDB trusts its file: a damaged size or page number makes it read behind the end of the mapping, which ends the process
by a signal. New stores have a checksum; datasets of CogView v1 and stores of earlier versions have none.

A file is an array of pages. Pages 0 and 1 are metas, of which the later one counts: it holds the roots of two trees,
that of free pages and the main one, whose leaves may hold roots of named tables. A branch or leaf page has a header of
16 bytes, offsets of its nodes (uint16), free space, and nodes: a header of 8 bytes, a key, and data or the number of a
page.
"""

# P pages of a block, S bytes of a page, N nodes

from __future__ import annotations

from pathlib import Path

import numpy as np

from cogview.errors import InputError

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF = 1, 2  # kinds of pages
_BIG, _TABLE = 1, 2  # kinds of nodes: the data are on pages of their own, or are a table
_HEADER, _NODE = 16, 8  # bytes
_KIND = 10  # place in the header of a page
_FREE_TREE, _MAIN_TREE, _LAST_PAGE, _TRANSACTION = 40, 88, 136, 144  # places in a meta page
_TABLE_BYTES = 48
_TABLE_FLAGS, _TABLE_ROOT = 4, 40  # places in a table
_NO_ROOT = 2**64 - 1
_MAX_DEPTH = 32  # of LMDB's cursors
_BLOCK = 1024  # pages that are checked at a time


class _Damage(Exception):
    """Raised with the reason why the pages cannot be read."""


def check_pages(path: Path) -> None:
    """Check that every page, node and value that a reader can reach lies within the file.

    Branch and leaf pages are read, values on pages of their own are not. A file that LMDB refuses by itself is left to
    it.

    Args:
        path: The file ``data.mdb``.

    Raises:
        InputError: They do not.
    """
    if not path.stat().st_size:
        return
    content = np.memmap(path, dtype=np.uint8, mode="r")
    try:
        _check(content)
    except _Damage as error:
        raise InputError(f"{path} is damaged ({error}): copy it again, or encode the store again") from None


def _check(content: np.ndarray) -> None:
    """Check the trees of the meta page that counts."""
    if len(content) < _TRANSACTION + 8 or not _is_meta(content):
        return
    size = _number(content, _FREE_TREE, 4)
    if size < 512 or size > 1 << 15 or size & (size - 1) or len(content) < 2 * size:
        raise _Damage("its pages have no size")
    metas = [content[:size], content[size : 2 * size]]
    if not _is_meta(metas[1]):
        return
    if _number(metas[1], _FREE_TREE, 4) != size:
        raise _Damage("its pages have two sizes")
    meta = max(metas, key=lambda meta: _number(meta, _TRANSACTION, 8))
    count = _number(meta, _LAST_PAGE, 8) + 1
    if count > len(content) // size:
        return  # the file is cut off, which is noticed when it is open
    pages = content[: count * size].reshape(count, size)
    if _number(meta, _MAIN_TREE + _TABLE_FLAGS, 2) & ~1:
        raise _Damage("its keys have an unknown order")
    _check_tree(pages, _number(meta, _FREE_TREE + _TABLE_ROOT, 8))
    for table in _check_tree(pages, _number(meta, _MAIN_TREE + _TABLE_ROOT, 8)):
        if _number(table, _TABLE_FLAGS, 2) & ~1:
            raise _Damage("the keys of a table have an unknown order")
        _check_tree(pages, _number(table, _TABLE_ROOT, 8))


def _is_meta(page: np.ndarray) -> bool:
    """Return whether a page is a meta of the version of LMDB's format that is known here."""
    return (_number(page, _HEADER, 4), _number(page, _HEADER + 4, 4)) == (_MAGIC, _VERSION)


def _check_tree(pages: np.ndarray, root: int) -> list[np.ndarray]:
    """Check all pages of the tree below page ``root``; return the tables in its leaves."""
    if root == _NO_ROOT:
        return []
    level, tables = np.array([root], dtype=np.uint64), []
    for _ in range(_MAX_DEPTH):
        if len(level) > len(pages) or ((level < 2) | (level >= len(pages))).any():
            raise _Damage("a page is not there")
        numbers = level.astype(np.int64)
        kind = _number(pages[numbers[0]], _KIND, 2)
        if kind not in (_BRANCH, _LEAF):
            raise _Damage(f"page {numbers[0]} is of the unknown kind {kind}")
        below: list[np.ndarray] = []
        for first in range(0, len(numbers), _BLOCK):
            nodes = _Nodes(np.asarray(pages[numbers[first : first + _BLOCK]]), kind)
            if kind == _BRANCH:
                below.append(nodes.words(nodes.start_N, 6))
            else:
                tables += nodes.check_values(len(pages))
        if kind == _LEAF:
            return tables
        level = np.concatenate(below)
    raise _Damage("its pages point to each other")


class _Nodes:
    """The N nodes of a block of pages of one kind, whose headers and keys are checked."""

    def __init__(self, pages_PS: np.ndarray, kind: int) -> None:
        self._pages_PS, self._size = pages_PS, pages_PS.shape[1]
        self._page_N = np.arange(len(pages_PS))
        kinds, lower, upper = (self.words(np.full(len(pages_PS), at), 2).astype(np.int64) for at in (_KIND, 12, 14))
        if (kinds != kind).any() or (lower < _HEADER).any() or (lower > upper).any() or (upper > self._size).any():
            raise _Damage("the header of a page is wrong")
        counts = (lower - _HEADER) // 2
        if kind == _BRANCH and (counts < 1).any():
            raise _Damage("a branch is empty")
        self._page_N = np.repeat(self._page_N, counts)
        number_N = np.arange(len(self._page_N)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.start_N = self.words(_HEADER + 2 * number_N, 2).astype(np.int64)
        if (self.start_N < np.repeat(upper, counts)).any() or (self.start_N + _NODE > self._size).any():
            raise _Damage("a node lies outside its page")
        self._key_end_N = self.start_N + _NODE + self.words(self.start_N + 6, 2).astype(np.int64)
        if (self._key_end_N > self._size).any():
            raise _Damage("a key reaches beyond its page")

    def check_values(self, num_pages: int) -> list[np.ndarray]:
        """Check the values of the nodes of leaves in a file of ``num_pages``; return those that are tables."""
        kind_N = self.words(self.start_N + 4, 2)
        length_N = self.words(self.start_N, 4).astype(np.int64)
        big = kind_N == _BIG
        if not np.isin(kind_N, (0, _BIG, _TABLE)).all():
            raise _Damage("a node is of an unknown kind")
        if (self._key_end_N + np.where(big, 8, length_N) > self._size).any():
            raise _Damage("a value reaches beyond its page")
        first_N = self.words(np.where(big, self._key_end_N, 0), 8)[big]
        taken_N = (_HEADER + length_N[big] + self._size - 1) // self._size
        if ((first_N < 2) | (first_N >= num_pages)).any() or (first_N.astype(np.int64) + taken_N > num_pages).any():
            raise _Damage("a value reaches beyond the file")
        tables = np.flatnonzero(kind_N == _TABLE)
        if (length_N[tables] != _TABLE_BYTES).any():
            raise _Damage("a table has another size")
        ends = self._key_end_N[tables]
        return [self._pages_PS[self._page_N[n], at : at + _TABLE_BYTES] for n, at in zip(tables, ends, strict=True)]

    def words(self, at_N: np.ndarray, num_bytes: int) -> np.ndarray:
        """Return the little-endian number at an offset in the page of each node: (N,) uint64."""
        number_N = np.zeros(len(at_N), dtype=np.uint64)
        for n in range(num_bytes):
            number_N |= self._pages_PS[self._page_N, at_N + n].astype(np.uint64) << np.uint64(8 * n)
        return number_N


def _number(content: np.ndarray, at: int, num_bytes: int) -> int:
    """Return the little-endian number at a place."""
    return int.from_bytes(content[at : at + num_bytes].tobytes(), "little")
