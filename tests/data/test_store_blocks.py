"""Checksums of blocks: which of many is damaged, and what is said of a list that cannot be used."""

import json
import os

import numpy as np
import pytest

from cogview.data.store import StoreHeader, TokenStore
from cogview.data.store_blocks import BLOCKS_FILE, SMALLEST_BLOCK, damaged_blocks
from cogview.data.store_writer import StoreWriter
from cogview.errors import InputError


@pytest.fixture
def store(tmp_path):
    """Return a store of 4,000 rows, which has several blocks."""
    header = StoreHeader(
        fields={"text": 24, "image": 64},
        grid=8,
        num_image_codes=100,
        num_text_pieces=100,
        layouts=("generate",),
        codebook_sha256="a",
        text_sha256="b",
    )
    generator = np.random.default_rng(0)
    with StoreWriter(tmp_path / "store", header) as writer:
        writer.append({name: generator.integers(0, 100, (4000, width)) for name, width in header.fields.items()})
    return tmp_path / "store"


def test_damaged_blocks_locates_each_flipped_byte(store):
    data = store / "data.mdb"
    content = data.read_bytes()
    _, count = damaged_blocks(store)
    assert count == -(-len(content) // SMALLEST_BLOCK) > 5
    for position in (0, len(content) // 3, len(content) - 1):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        data.write_bytes(flipped)
        ((block,), _) = damaged_blocks(store)
        assert block.first <= position < block.end
        assert 0 <= block.rows[0] <= block.rows[1] < 4000
    data.write_bytes(content)
    assert damaged_blocks(store) == ([], count)


def test_damaged_blocks_names_what_is_missing_when_a_store_is_cut(store):
    size = (store / "data.mdb").stat().st_size
    os.truncate(store / "data.mdb", size - SMALLEST_BLOCK - 1)
    damaged, count = damaged_blocks(store)
    assert [block.number for block in damaged] in ([count - 2, count - 1], [count - 3, count - 2, count - 1])


@pytest.mark.parametrize("content", [[], {}, {"size": 0, "rows": 1, "block": 65536, "blake2b": []}, {"size": "x"}])
def test_damaged_blocks_refuses_a_list_of_another_form(store, content):
    (store / BLOCKS_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"data\.blocks\.json is damaged: remove it, and .*store is compared with"):
        damaged_blocks(store)


def test_store_writer_removes_old_checksums_before_it_writes(store):
    """A list of blocks that outlived a kill called a whole store damaged."""
    header = TokenStore(store).header
    with StoreWriter(store, header, resume=True) as writer:
        assert not (store / BLOCKS_FILE).exists()
        writer.append({name: np.ones((10, width), dtype=int) for name, width in header.fields.items()})
    assert damaged_blocks(store)[0] == []
    assert json.loads((store / BLOCKS_FILE).read_text())["rows"] == 4010
