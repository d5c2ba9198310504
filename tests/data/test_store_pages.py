"""Pages of LMDB files are checked before LMDB reads them: no damage ends the process by a signal."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pytest

from cogview.data.store import TokenStore
from cogview.data.store_pages import check_pages
from cogview.errors import InputError


def write(path: Path, rows: int, size: int, *, named: bool = False) -> Path:
    """Write an LMDB with values of up to ``size`` bytes and return its file."""
    generator = np.random.default_rng(rows)
    with lmdb.open(str(path), map_size=2**28, max_dbs=2) as environment:
        table = environment.open_db(b"rows") if named else None
        for first in range(0, rows, 500):  # transactions free pages, which the tree of free pages holds
            with environment.begin(write=True) as transaction:
                for number in generator.permutation(np.arange(first, min(first + 500, rows))):
                    value = generator.bytes(int(generator.integers(0, size)))
                    transaction.put(b"%d" % number, value, db=table)
        with environment.begin(write=True) as transaction:
            for number in range(0, rows, 7):
                transaction.delete(b"%d" % number, db=table)
    return path / "data.mdb"


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(0, 1), (1, 10), (3000, 300), (200, 30_000), (2000, 4000)])
def test_check_pages_accepts_what_lmdb_wrote(tmp_path, rows, size, named):
    check_pages(write(tmp_path / "data", rows, size, named=named))


def places(content: bytes) -> dict[str, int]:
    """Return the offsets of numbers in the pages of a store with a leaf of rows, by what is wrong with them."""
    size = 4096
    meta = max(0, 1, key=lambda page: int.from_bytes(content[page * size + 144 :][:8], "little")) * size
    main = int.from_bytes(content[meta + 128 :][:8], "little") * size
    node = main + int.from_bytes(content[main + 16 :][:2], "little")
    return {"root": meta + 128, "kind": main + 10, "lower": main + 12, "node": main + 16, "key": node + 6, "size": node}


@pytest.mark.parametrize(
    ("place", "word", "reason"),
    [
        ("root", 0xFFFF, "a page is not there"),
        ("kind", 0x40, "is of the unknown kind 64"),
        ("lower", 0xFFFE, "the header of a page is wrong"),
        ("node", 0x0003, "a node lies outside its page"),
        ("key", 0xFFF0, "a key reaches beyond its page"),
        ("size", 0xFFF0, "a value reaches beyond its page"),
    ],
)
def test_token_store_without_checksum_refuses_damaged_pages(tmp_path, place, word, reason):
    """LMDB read behind the mapped file, and SIGBUS ended the process; such stores come from earlier versions."""
    path = write(tmp_path / "data", 20, 50)
    content = bytearray(path.read_bytes())
    at = places(bytes(content))[place]
    content[at : at + 2] = word.to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"data\.mdb is damaged \(.*{reason}\): copy it again"):
        TokenStore(tmp_path / "data")


def test_check_pages_refuses_a_value_beyond_the_file(tmp_path):
    with lmdb.open(str(tmp_path / "data")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", bytes(9000))
    path = tmp_path / "data" / "data.mdb"
    content = bytearray(path.read_bytes())
    node = places(bytes(content))["size"]
    content[node : node + 4] = (2**30).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match="a value reaches beyond the file"):
        check_pages(path)


@pytest.mark.parametrize("content", [b"", b"x", bytes(8192), b"x" * 8192])
def test_token_store_refuses_a_file_that_is_no_lmdb(tmp_path, content):
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(InputError):
        TokenStore(tmp_path)
