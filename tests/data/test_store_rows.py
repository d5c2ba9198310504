"""Long rows share values: read as they were written, after any appends, and in hardly more than their bytes."""

from dataclasses import replace

import numpy as np
import pytest

from cogview.data.store import FORMAT_VERSION, StoreHeader, TokenStore
from cogview.data.store_copy import copy_rows
from cogview.data.store_rows import best_rows_per_value
from cogview.data.store_writer import StoreWriter
from cogview.errors import InputError

HEADER = StoreHeader(
    fields={"text": 64, "image": 1024},
    grid=32,
    num_image_codes=8192,
    num_text_pieces=500,
    layouts=("generate", "caption"),
    codebook_sha256="c",
    text_sha256="t",
)


def some_rows(count):
    generator = np.random.default_rng(0)
    return {name: generator.integers(0, 500, (count, width)).astype(np.uint16) for name, width in HEADER.fields.items()}


def assert_rows(store, rows, wanted):
    found = store.read(wanted)
    assert all(np.array_equal(found[name], rows[name][wanted]) for name in rows)


@pytest.mark.parametrize("steps", [[200], [1, 14, 1, 15, 16, 153], [7] * 28 + [4]], ids=str)
def test_token_store_reads_long_rows_however_they_were_appended(tmp_path, steps):
    rows, start = some_rows(200), 0
    for step in steps:
        with StoreWriter(tmp_path / "store", HEADER, resume=True) as writer:
            writer.append({name: ids[start : start + step] for name, ids in rows.items()})
        start += step
    store = TokenStore(tmp_path / "store")
    assert (len(store), store.header) == (200, replace(HEADER, rows_per_value=15))
    assert_rows(store, rows, np.arange(200))
    assert_rows(store, rows, [199, 0, 14, 15, 15])


def test_store_of_long_rows_takes_hardly_more_than_their_bytes(tmp_path):
    """A row of 2,176 bytes took 4,096."""
    with StoreWriter(tmp_path / "store", HEADER) as writer:
        writer.append(some_rows(2000))
    assert (tmp_path / "store" / "data.mdb").stat().st_size < 1.03 * 2000 * 2176


def test_store_of_long_rows_of_an_earlier_version_is_read_continued_and_copied(tmp_path, monkeypatch):
    rows = some_rows(40)
    monkeypatch.setattr("cogview.data.store_writer.best_rows_per_value", lambda size: 1)
    with StoreWriter(tmp_path / "store", HEADER) as writer:
        writer.append({name: ids[:20] for name, ids in rows.items()})
    monkeypatch.undo()
    assert '"format_version": 1' in TokenStore(tmp_path / "store").header.to_json()
    with StoreWriter(tmp_path / "store", HEADER, resume=True) as writer:
        writer.append({name: ids[20:] for name, ids in rows.items()})
    copy_rows([tmp_path / "store"], tmp_path / "copy")
    for name, per_value in (("store", 1), ("copy", 15)):
        store = TokenStore(tmp_path / name)
        assert store.header.rows_per_value == per_value
        assert_rows(store, rows, np.arange(40))
    assert f'"format_version": {FORMAT_VERSION}' in TokenStore(tmp_path / "copy").header.to_json()


def test_token_store_reports_values_that_are_cut(tmp_path):
    import lmdb

    with StoreWriter(tmp_path / "store", HEADER) as writer:
        writer.append(some_rows(30))
    for name in ("data.sha256", "data.blocks.json"):
        (tmp_path / "store" / name).unlink()
    with lmdb.open(str(tmp_path / "store"), max_dbs=1) as environment, environment.begin(write=True) as transaction:
        table = environment.open_db(b"rows", txn=transaction)
        key = (1).to_bytes(8, "big")
        transaction.put(key, transaction.get(key, db=table)[:-1], db=table)
    store = TokenStore(tmp_path / "store")
    store.read(range(29))
    with pytest.raises(InputError, match="rows are missing or too short"):
        store.read([29])


@pytest.mark.parametrize("size", [2, 176, 736, 1340, 1342, 2176, 4096, 10_368, 40_000, 2_000_000])
def test_best_rows_per_value_wastes_little(size):
    count = best_rows_per_value(size)
    pages = -(-(count * size + 16) // 4096)
    assert count >= 1
    if size <= 16_000 and count > 1:
        assert count * size > 0.85 * pages * 4096
