"""Checksums of the blocks of a token store, by which damage is located before LMDB maps a page."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview.data.store_checksum import CHECKSUM_FILE, DATA_FILE, check_sum
from cogview.errors import InputError
from cogview.files import write_json
from cogview.plain_data import read_json

BLOCKS_FILE = "data.blocks.json"
SMALLEST_BLOCK = 1 << 16  # bytes
MAX_BLOCKS = 4096  # so that the file stays small
DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class DamagedBlock:
    """A block of a store whose bytes differ from its checksum.

    Attributes:
        number: Number of the block, from 0.
        first: First byte.
        end: Byte after the last one.
        rows: First and last row that may be in it, by proportion: rows are written in order.
    """

    number: int
    first: int
    end: int
    rows: tuple[int, int]


def write_blocks(path: Path, rows: int) -> None:
    """Write the checksums of the blocks of the finished store at ``path``.

    Args:
        path: Folder of the store.
        rows: Its number of rows.
    """
    size = (path / DATA_FILE).stat().st_size
    block = SMALLEST_BLOCK
    while size > block * MAX_BLOCKS:
        block *= 2
    digests = list(_digests(path / DATA_FILE, block))
    write_json(path / BLOCKS_FILE, {"size": size, "rows": rows, "block": block, "blake2b": digests}, indent=None)


def damaged_blocks(path: Path) -> tuple[list[DamagedBlock], int]:
    """Compare the blocks of a store with their checksums; no page is mapped.

    Args:
        path: Folder of the store.

    Returns:
        The damaged blocks, and the number of all blocks: 0 for a store of an earlier version, which is compared with
        the checksum of the whole file.

    Raises:
        InputError: There is no store, its list of blocks cannot be read, or a store without one is damaged.
    """
    data, listed = path / DATA_FILE, path / BLOCKS_FILE
    if not data.is_file():
        raise InputError(f"{path} is not a token store: it has no {DATA_FILE}")
    if not listed.is_file():
        check_sum(path)
        return [], 0
    size, rows, block, expected = _read_blocks(listed)
    found = list(_digests(data, block))
    found += [""] * (len(expected) - len(found))
    damaged = [
        DamagedBlock(
            number=number,
            first=number * block,
            end=min(size, (number + 1) * block),
            rows=(number * block * rows // size, min(rows - 1, (number + 1) * block * rows // size)),
        )
        for number, (wanted, digest) in enumerate(zip(expected, found, strict=False))
        if wanted != digest
    ]
    if not damaged and (path / CHECKSUM_FILE).is_file():
        check_sum(path)
    return damaged, len(expected)


def _read_blocks(listed: Path) -> tuple[int, int, int, list[str]]:
    """Return size, rows, bytes of a block and checksums; raise InputError if they are not those of a store."""
    found: Any = read_json(listed)
    with suppress(AttributeError, KeyError, TypeError, ValueError):  # another form
        size, rows, block = (int(found[key]) for key in ("size", "rows", "block"))
        digests = list(map(str, found["blake2b"]))
        if size > 0 and rows >= 0 and block >= SMALLEST_BLOCK and len(digests) == -(-size // block):
            return size, rows, block, digests
    raise InputError(f"{listed} is damaged: remove it, and {listed.parent} is compared with {CHECKSUM_FILE} alone")


def _digests(data: Path, block: int) -> Iterator[str]:
    """Yield the checksum of each block of a file."""
    with data.open("rb") as file:
        while content := file.read(block):
            yield hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()
