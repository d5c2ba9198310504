"""Token stores: rows are read as they were written, in any kind of process, and an interruption loses none."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import lmdb
import numpy as np
import pytest
from torch.utils.data import DataLoader

from cogview.data import store_checksum, store_writer
from cogview.data.sampling_order import sample_index
from cogview.data.store import NO_TOKEN, StoreHeader, TokenStore, as_tensors, text_lengths
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.errors import InputError, RetryLaterError
from cogview.files import file_sha256

HEADER = StoreHeader(
    fields={"text": 6, "image": 16},
    grid=4,
    num_image_codes=8192,
    num_text_pieces=2000,
    layouts=("generate",),
    codebook_sha256="c0de" * 16,
    text_sha256="7e47" * 16,
    provenance={"world": "表情", "seeds": [1, 2]},
)


def some_rows(count, seed=0):
    """Return ``count`` rows with texts of 0 to 6 pieces."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 2000, rng.integers(0, 7)).tolist() for _ in range(count)]
    return {"text": pad_text(texts, 6), "image": rng.integers(0, 8192, (count, 16)).astype(np.uint16)}


def assert_same(read, expected):
    assert list(read) == list(expected)
    for name, ids in expected.items():
        assert read[name].dtype == np.uint16
        np.testing.assert_array_equal(read[name], ids)


def without_checksum(path):
    """Return a store as earlier versions wrote it."""
    (path / "data.sha256").unlink()
    return path


@pytest.fixture
def written(tmp_path):
    rows = some_rows(500)
    with StoreWriter(tmp_path / "store", HEADER) as writer:
        writer.append(rows)
    return tmp_path / "store", rows


def test_token_store_reads_what_was_written(written):
    path, rows = written
    store = TokenStore(path)
    assert len(store) == 500
    assert store.header == HEADER
    assert_same(store.read(np.arange(500)), rows)
    wanted = [499, 0, 7, 7]  # any order, twice the same
    assert_same(store.read(wanted), {name: ids[wanted] for name, ids in rows.items()})
    assert_same(store[123], {name: ids[123] for name, ids in rows.items()})
    assert_same(store.read([]), {name: ids[:0] for name, ids in rows.items()})


def test_token_store_layout_on_disk_equals_its_documentation(written):
    path, rows = written
    with lmdb.open(str(path), readonly=True, max_dbs=1) as environment:
        table = environment.open_db(b"rows", create=False)
        with environment.begin() as transaction:
            header, count = transaction.get(b"header"), transaction.get(b"count")
            value = transaction.get(bytes([0, 0, 0, 0, 0, 0, 1, 44]), db=table)
    assert count == b"500"
    assert json.loads(header)["provenance"] == {"world": "表情", "seeds": [1, 2]}
    assert value == np.concatenate([rows["text"][300], rows["image"][300]]).astype("<u2").tobytes()


def test_token_store_read_returns_copies(written):
    path, rows = written
    store = TokenStore(path)
    store.read([3])["image"][:] = 0
    assert_same(store.read([3]), {name: ids[[3]] for name, ids in rows.items()})


def test_pad_text_fills_with_no_token():
    text = pad_text([[5, 6], [], [1, 2, 3]], 3)
    assert text.tolist() == [[5, 6, NO_TOKEN], [NO_TOKEN] * 3, [1, 2, 3]]
    assert text_lengths(text).tolist() == [2, 0, 3]
    with pytest.raises(InputError, match=r"text 1 has 4 pieces, the store has room for 3: widen"):
        pad_text([[], [1, 2, 3, 4]], 3)


def test_store_writer_enlarges_its_map(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "ROWS_PER_TRANSACTION", 300)
    rows = some_rows(5000)
    with StoreWriter(tmp_path / "store", HEADER, map_size=2**15) as writer:  # 32 KiB for 220 kB of ids
        for start in range(0, 5000, 1000):
            writer.append({name: ids[start : start + 1000] for name, ids in rows.items()})
    assert (tmp_path / "store" / "data.mdb").stat().st_size > 2**15
    assert_same(TokenStore(tmp_path / "store").read(np.arange(5000)), rows)


WRITE_AND_DIE = """
import os, signal, sys
import numpy as np
from cogview.data.store import StoreHeader
from cogview.data.store_writer import StoreWriter

path, header = sys.argv[1:]
with np.load(f"{path}.npz") as rows, StoreWriter(path, StoreHeader.from_json(header)) as writer:
    writer.append({name: rows[name][:200] for name in rows})
    with writer._environment.begin(write=True) as transaction:
        transaction.put(b"count", b"300")  # never committed
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.multiprocess
def test_store_writer_resumes_after_the_last_commit_when_killed(tmp_path):
    path, rows = tmp_path / "store", some_rows(500)
    np.savez(f"{path}.npz", **rows)
    done = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, path, HEADER.to_json()], check=False)
    assert done.returncode == -signal.SIGKILL
    with TokenStore(path) as store:
        assert_same(store.read(np.arange(len(store))), {name: ids[:200] for name, ids in rows.items()})
    with StoreWriter(path, HEADER, resume=True) as writer:
        assert writer.count == 200
        writer.append({name: ids[writer.count :] for name, ids in rows.items()})
        assert writer.count == 500
    assert_same(TokenStore(path).read(np.arange(500)), rows)


def test_store_writer_keeps_committed_rows_when_the_disk_is_full(tmp_path, monkeypatch):
    """What a full disk refuses, LMDB calls an error of input and output; the rows before it are whole."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(store_writer, "ROWS_PER_TRANSACTION", 100)
    writer = StoreWriter(tmp_path / "store", HEADER)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(
            RetryLaterError, match=r"rows could not be written to .* kept; make room, or raise a limit on files"
        ) as caught:
            writer.append(some_rows(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()
    assert writer.count > 0
    assert f" {writer.count} rows are kept" in str(caught.value)
    with StoreWriter(tmp_path / "store", HEADER, resume=True) as again:
        again.append(some_rows(5))
    store = TokenStore(tmp_path / "store")
    assert len(store) == writer.count + 5
    expected = some_rows(5000)
    assert_same(store.read(range(writer.count)), {name: ids[: writer.count] for name, ids in expected.items()})


WRITE_TOO = """
import sys
from cogview.data.store import StoreHeader
from cogview.data.store_writer import StoreWriter

StoreWriter(sys.argv[1], StoreHeader.from_json(sys.argv[2]), resume=True)
"""


@pytest.mark.multiprocess
def test_store_writer_refuses_a_second_process(tmp_path):
    """Both counted their own rows, and the later one wrote over those of the other."""
    rows = some_rows(9)
    with StoreWriter(tmp_path / "store", HEADER) as writer:
        writer.append(rows)
        command = [sys.executable, "-c", WRITE_TOO, tmp_path / "store", HEADER.to_json()]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.stderr.rstrip().endswith(
            f"RetryLaterError: the store {tmp_path}/store is being written by another process: wait until it ends"
        )
        writer.append(rows)
    with StoreWriter(tmp_path / "store", HEADER, resume=True) as writer:
        assert writer.count == 18


def test_store_writer_leaves_no_file_of_locks(tmp_path):
    """LMDB maps its file of locks: on a full disk, a write to it ended the command by a signal (bus error)."""
    with StoreWriter(tmp_path / "store", HEADER) as writer:
        writer.append(some_rows(3))
        assert [path.name for path in writer.path.iterdir()] == ["data.mdb"]


def test_store_writer_starts_when_there_is_nothing_to_resume(tmp_path):
    with StoreWriter(tmp_path / "store", HEADER, resume=True) as writer:
        assert writer.count == 0
    store = TokenStore(tmp_path / "store")
    assert len(store) == 0
    assert store.header == HEADER


def test_store_writer_refuses_to_resume_with_other_settings(written):
    path, rows = written
    other = replace(HEADER, codebook_sha256="beef" * 16)
    with pytest.raises(InputError, match=r"started with codebook_sha256 c0dec0dec0dec0de…, now it is beef.*remove"):
        StoreWriter(path, other, resume=True)
    with StoreWriter(path, replace(HEADER, layouts=("generate",)), resume=True) as writer:  # equal is not "other"
        assert writer.count == 500
    assert_same(TokenStore(path).read(np.arange(500)), rows)


def test_store_writer_refuses_an_existing_store(written):
    with pytest.raises(InputError, match="already holds a store: remove it, or resume"):
        StoreWriter(written[0], HEADER)


def test_store_holds_every_code_of_16_bits(tmp_path):
    """Only texts are filled up with the last number."""
    ids = np.arange(65520, 65536).reshape(1, 16)
    with StoreWriter(tmp_path / "store", replace(HEADER, num_image_codes=65536)) as writer:
        writer.append({"text": np.zeros((1, 6), int), "image": ids})
    assert np.array_equal(TokenStore(tmp_path / "store").read(np.array([0]))["image"], ids)


def test_store_writer_reports_a_path_that_is_a_file(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(InputError, match="cannot write a store to"):
        StoreWriter(tmp_path / "store", HEADER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, r"have the fields \['text'\], the store has \['image', 'text'\]"),
        ({"image": np.zeros((2, 15), int)}, r'"image" has shape \(2, 15\), expected \(2, 16\)'),
        ({"image": np.zeros((3, 16), int)}, r'"image" has shape \(3, 16\), expected \(2, 16\)'),
        ({"image": np.zeros((2, 16))}, r'"image" holds float64, expected integers'),
        ({"image": np.full((2, 16), 8192)}, r'"image" holds 8192, expected ids in 0…8191'),
        ({"image": np.full((2, 16), NO_TOKEN)}, r'"image" holds 65535, expected ids in 0…8191'),
        ({"image": np.full((2, 16), -1)}, r'"image" holds -1, expected'),
        ({"text": np.full((2, 6), 2000)}, r'"text" holds 2000, expected ids in 0…1999'),
        ({"text": np.array([[1, NO_TOKEN, 1, 1, 1, 1]] * 2)}, r"padding comes last"),
    ],
)
def test_store_writer_writes_no_row_when_one_does_not_fit(tmp_path, change, message):
    rows = {"text": np.zeros((2, 6), int), "image": np.zeros((2, 16), int), **change}
    with StoreWriter(tmp_path / "store", HEADER) as writer:
        with pytest.raises(InputError, match=message):
            writer.append({name: ids for name, ids in rows.items() if ids is not None})
        assert writer.count == 0


@pytest.mark.parametrize("index", [500, -1, 10**12])
def test_token_store_rejects_row_numbers_out_of_range(written, index):
    with pytest.raises(IndexError, match=rf"row {index} of .*store, which has the rows 0…499"):
        TokenStore(written[0]).read([0, index])


def test_token_store_iterates_like_a_list(written):
    path, rows = written
    assert [row["image"][0] for row in TokenStore(path)] == rows["image"][:, 0].tolist()


def test_token_store_names_a_process_that_still_writes(written):
    """It was called damaged (MDB_MAP_RESIZED), with the advice to copy it again."""
    path, _ = written
    with TokenStore(path) as store:
        program = (
            "import lmdb, sys\n"
            "with lmdb.open(sys.argv[1], map_size=2**30) as environment, environment.begin(write=True) as writing:\n"
            "    for number in range(40):\n"
            "        writing.put(b'%d' % number, bytes(2**20))"
        )
        subprocess.run([sys.executable, "-c", program, str(path)], check=True)
        with pytest.raises(RetryLaterError, match="while another process writes to it: wait for its end"):
            store.read([0])


def test_token_store_names_the_command_when_it_is_missing(tmp_path):
    with pytest.raises(
        InputError, match=r"there is no token store at .*nowhere: make one with `cogview encode RECIPE`"
    ):
        TokenStore(tmp_path / "nowhere")


def test_token_store_rejects_other_files_and_databases(tmp_path):
    with pytest.raises(InputError, match=r"is not a token store: it has no data.mdb"):
        TokenStore(tmp_path)
    with lmdb.open(str(tmp_path / "other")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", b"something else")
    with pytest.raises(InputError, match="is an LMDB, but not a token store: it has no header"):
        TokenStore(tmp_path / "other")
    with pytest.raises(InputError, match="is an LMDB, but not a token store"):
        StoreWriter(tmp_path / "other", HEADER, resume=True)
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "data.mdb").write_bytes(b"noise" * 4000)
    with pytest.raises(InputError, match="cannot be opened as a token store"):
        TokenStore(tmp_path / "noise")


def test_token_store_rejects_a_truncated_file(written):
    """Half a copied file used to end the process with SIGBUS."""
    data = without_checksum(written[0]) / "data.mdb"
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(InputError, match=r"is cut off, it has .* bytes: copy it again"):
        TokenStore(written[0])


def test_token_store_reports_damage_when_rows_are_missing(written):
    path = without_checksum(written[0])
    with lmdb.open(str(path), max_dbs=1) as environment, environment.begin(write=True) as transaction:
        table = environment.open_db(b"rows", txn=transaction)
        transaction.put((5).to_bytes(8, "big"), b"short", db=table)
    with pytest.raises(InputError, match="is damaged, rows are missing or too short"):
        TokenStore(path).read([4, 5])
    with lmdb.open(str(path), max_dbs=1) as environment, environment.begin(write=True) as transaction:
        transaction.delete((7).to_bytes(8, "big"), db=environment.open_db(b"rows", txn=transaction))
    with pytest.raises(InputError, match="is damaged, it states 500 rows and has 499: copy it again"):
        TokenStore(path)


@pytest.mark.parametrize(("field", "wrong", "expected"), [("image", 8192, 8191), ("text", 2000, 1999)])
def test_token_store_refuses_ids_beyond_the_header(written, field, wrong, expected):
    """A code above the header's limit went to the embedding as a piece of text."""
    path = without_checksum(written[0])
    row = {name: ids[0].copy() for name, ids in written[1].items()}
    row[field][0] = wrong
    with lmdb.open(str(path), max_dbs=1) as environment, environment.begin(write=True) as transaction:
        packed = np.concatenate([row["text"], row["image"]]).astype("<u2").tobytes()
        transaction.put((3).to_bytes(8, "big"), packed, db=environment.open_db(b"rows", txn=transaction))
    store = TokenStore(path)
    store.read([2, 4])
    with pytest.raises(InputError, match=f'is damaged, field "{field}" holds {wrong}, expected ids in 0…{expected}'):
        store.read([2, 3])


def test_token_store_notices_damage_before_lmdb_maps_a_page(written):
    """Some damaged pages ended the process by a signal."""
    path, rows = written
    assert (
        subprocess.run(["sha256sum", "-c", "data.sha256"], cwd=path, check=False, capture_output=True).returncode == 0
    )
    content = bytearray((path / "data.mdb").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "data.mdb").write_bytes(content)
    for opened in (TokenStore, lambda path: StoreWriter(path, HEADER, resume=True)):
        with pytest.raises(
            InputError, match=r"is damaged or was changed: the SHA-256 of data\.mdb is .*: copy it again"
        ):
            opened(path)
    content[len(content) // 2] ^= 1
    (path / "data.mdb").write_bytes(content)
    assert_same(TokenStore(path).read(np.arange(500)), rows)


def test_token_store_hashes_a_large_file_only_when_it_has_changed(written, monkeypatch):
    """A store of a hundred gigabytes opens at once; after a copy it is hashed once."""
    path, _ = written
    monkeypatch.setattr(store_checksum, "ALWAYS_HASHED", 0)
    hashed = []
    monkeypatch.setattr(store_checksum, "file_sha256", lambda data: hashed.append(data) or file_sha256(data))
    shutil.copytree(path, path.with_name("copy"), copy_function=shutil.copyfile)
    for folder, expected in ((path, 0), (path.with_name("copy"), 1), (path.with_name("copy"), 1)):
        with TokenStore(folder):
            assert len(hashed) == expected


def test_store_writer_removes_the_checksum_while_it_writes(tmp_path):
    """After a kill, a checksum of fewer rows would refuse the store."""
    with StoreWriter(tmp_path / "store", HEADER) as writer:
        writer.append(some_rows(3))
    with StoreWriter(tmp_path / "store", HEADER, resume=True) as writer:
        assert not (tmp_path / "store" / "data.sha256").exists()
        writer.append(some_rows(2))
    assert len(TokenStore(tmp_path / "store")) == 5
    assert (tmp_path / "store" / "data.sha256").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "it has format 3, this version reads up to 2: update cogview"),
        ({"format_version": None}, "it has format None"),
        ({"format_version": -1}, "it has format -1"),
        ({"colour": "red"}, '"colour" is unknown'),
        ({"grid": None}, "its header, grid: expected a whole number, got nothing"),
        ({"grid": -8}, "the code grid must be 1 or more"),
        ({"fields": {"image": 10**12}}, "a row needs fields of width 1 or more, 1048576 in all"),
        ({"fields": [1]}, "its header, fields: expected settings"),
        ({"layouts": 3}, "its header, layouts: expected a list of texts, got 3"),
        ({"codebook_sha256": ["a"]}, "its header, codebook_sha256: expected text"),
        ({"num_image_codes": 0}, "num_image_codes must be in 1…65536"),
        ({"rows_per_value": 0}, "rows_per_value must be in 1…65535"),
    ],
)
def test_token_store_rejects_unreadable_headers(written, change, message):
    path = without_checksum(written[0])
    with lmdb.open(str(path), max_dbs=1) as environment, environment.begin(write=True) as transaction:
        header = json.loads(transaction.get(b"header"))
        transaction.put(b"header", json.dumps({**header, **change}).encode())
    with pytest.raises(InputError, match=message):
        TokenStore(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": {}}, "a row needs fields of width 1 or more"),
        ({"fields": {"text": 0}}, "a row needs fields of width 1 or more"),
        ({"grid": 0}, "the code grid must be 1 or more"),
        ({"grid": 8}, 'a grid of 8 has 64 codes, "image" is 16 wide'),
        ({"num_image_codes": 65537}, "num_image_codes must be in 1…65536 to fit 16 bits, got 65537"),
        ({"num_text_pieces": 65536}, "num_text_pieces must be in 1…65535 to fit 16 bits, got 65536"),
    ],
)
def test_store_header_rejects_invalid_values(change, message):
    with pytest.raises(ValueError, match=message):
        replace(HEADER, **change)


def test_check_compatible_names_both_values_and_the_remedy(written):
    store = TokenStore(written[0])
    store.check_compatible()
    store.check_compatible(
        codebook_sha256="c0de" * 16,
        text_sha256="7e47" * 16,
        num_image_codes=8192,
        num_text_pieces=2000,
        grid=4,
        layout="generate",
    )
    with pytest.raises(InputError, match=r"with codebook_sha256 c0dec0de.*, but beefbeef.* needed here: encode"):
        store.check_compatible(codebook_sha256="beef" * 16)
    with pytest.raises(InputError, match=r"num_text_pieces 2000, but 50000 is needed here"):
        store.check_compatible(num_text_pieces=50000)
    with pytest.raises(InputError, match=r'feeds generate, but "caption" is needed here'):
        store.check_compatible(layout="caption")


def test_token_store_can_be_opened_several_times(written, tmp_path):
    path, rows = written
    (tmp_path / "link").symlink_to(path)
    stores = [
        TokenStore(path),
        TokenStore(str(path)),
        TokenStore(tmp_path / "link"),
        pickle.loads(pickle.dumps(TokenStore(path))),
    ]
    stores[0].close()
    for store in stores:  # the closed one opens again
        assert_same(store.read([42]), {name: ids[[42]] for name, ids in rows.items()})
    for store in stores:
        store.close()
    with StoreWriter(path, HEADER, resume=True) as writer:  # LMDB would refuse were the file still open
        assert writer.count == 500


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker")  # more than the machine has cores
@pytest.mark.multiprocess
@pytest.mark.parametrize(("method", "num_workers"), [("fork", 8), ("spawn", 2)])  # a spawned worker imports torch
def test_token_store_reads_the_same_in_workers(written, method, num_workers):
    path, _ = written
    store = TokenStore(path)
    other = TokenStore(path)
    store.read([0])  # open in the parent before the workers start: a forked child must not use that file
    sampler = sample_index(3, np.arange(400).reshape(40, 10), len(store)).tolist()
    expected = [as_tensors(store.read(indices)) for indices in sampler]
    loader = DataLoader(
        store, batch_sampler=sampler, collate_fn=as_tensors, num_workers=num_workers, multiprocessing_context=method
    )
    batches = list(loader)
    assert len(batches) == 40
    for batch, wanted in zip(batches, expected, strict=True):
        assert all((batch[name] == wanted[name]).all() for name in ("text", "image"))
    assert_same(other.read([5]), store.read([5]))  # the parent's file is still its own


def test_store_writer_accepts_empty_name_fields_and_refuses_other_ids(tmp_path):
    """Codes that show no named object, or whose names the caption lacks, have no piece; pieces exceed image codes."""
    header = replace(HEADER, fields={"named": 16}, num_image_codes=20)
    named = np.full((1, 16), NO_TOKEN)
    named[0, 5:7] = 1999
    with StoreWriter(tmp_path, header) as writer:
        writer.append({"named": named})
        with pytest.raises(InputError, match=r'"named" holds 2000, expected ids in 0…1999'):
            writer.append({"named": named + (named == 1999)})
    assert TokenStore(tmp_path)[0]["named"].tolist() == named[0].tolist()
