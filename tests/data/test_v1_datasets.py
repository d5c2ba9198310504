"""Datasets of CogView v1: their rows are read unchanged, and no pickle runs code."""

import io
import os
import pickle
import shutil

import lmdb
import numpy as np
import pytest
from torch.utils.data import DataLoader

from cogview.data import v1_import
from cogview.data.store import NO_TOKEN, TokenStore, as_tensors
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.data.v1_datasets import InvalidRow, V1Dataset, open_dataset
from cogview.data.v1_import import import_dataset
from cogview.data.v1_rows import RowUnpickler
from cogview.errors import InputError
from cogview.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary()
MADE_WITH = {
    "num_image_codes": 8192,
    "num_text_pieces": 50000,
    "codebook_sha256": "c0de" * 16,
    "text_sha256": "7e47" * 16,
}
ROI, BASE, TINY, BOI, EOI, PAD, ROI2 = map(
    VOCABULARY.command, ("[ROI1]", "[BASE]", "[TINY]", "[BOI1]", "[EOI1]", "[PAD]", "[ROI2]")
)


def some_rows(count, grid=8, seed=0):
    """Return texts of 0 to 64 pieces (counted from 0), and codes (count, grid * grid)."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 50000, rng.integers(0, 65)) for _ in range(count)]
    return [*texts[:-1], np.arange(0)], rng.integers(0, 8192, (count, grid**2))


def expected_of(texts, codes, width=64):
    return {"text": pad_text([text.tolist() for text in texts], width), "image": codes.astype(np.uint16)}


def assert_same(read, expected):
    assert list(read) == list(expected)
    for name, ids in expected.items():
        assert read[name].dtype == np.uint16
        np.testing.assert_array_equal(read[name], ids)


def sequence(text, codes, size=TINY, padding=0):
    return np.concatenate([[ROI], text + 8192, [size, BOI], codes, [EOI], [PAD] * padding])


def write_lmdb(path, rows, protocol=4, **changes):
    """Write an LMDB of pickled ``rows`` (bytes stay as they are); ``changes`` set other keys, None removes one."""
    values = {b"%d" % n: row if isinstance(row, bytes) else pickle.dumps(row, protocol) for n, row in enumerate(rows)}
    values = {**values, b"length": b"%d" % len(rows), **{key.encode(): value for key, value in changes.items()}}
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            if value is not None:
                transaction.put(key, value)
    return path


def write_bin(path, texts, codes):
    ids = np.full((len(texts), 64 + codes.shape[1]), -1, dtype="<i4")
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text + 8192
    ids[:, 64:] = codes
    ids.tofile(path)
    return path


def open_v1(path, **changes):
    return V1Dataset(path, **{**MADE_WITH, **changes})


# Reading


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "form", ["sequence", "floats", "pair", "square pair", "list of a pair", "plain lists", "numpy scalars"]
)
def test_v1_dataset_reads_every_form_of_row_in_every_pickle_protocol(tmp_path, protocol, form):
    texts, codes = some_rows(6)
    forms = {
        "sequence": lambda text, row: sequence(text, row, padding=3).astype(np.int32),
        "floats": lambda text, row: sequence(np.array(text.tolist()), row),
        "pair": lambda text, row: (text + 8192, row),
        "square pair": lambda text, row: (text + 8192, np.asfortranarray(row.reshape(8, 8).astype(">i2"))),
        "list of a pair": lambda text, row: [(text + 8192).astype(np.uint32), row],
        "plain lists": lambda text, row: ((text + 8192).tolist(), row.reshape(8, 8).tolist()),
        "numpy scalars": lambda text, row: ([np.int64(piece + 8192) for piece in text], list(row.astype(np.uint16))),
    }
    rows = [forms[form](text, row) for text, row in zip(texts, codes, strict=True)]
    store = open_v1(write_lmdb(tmp_path / "data", rows, protocol))
    assert len(store) == 6
    assert (store.header.grid, store.header.fields) == (8, {"text": 64, "image": 64})
    assert_same(store.read(range(6)), expected_of(texts, codes))


@pytest.mark.parametrize(("core", "other"), [(b"numpy.core.", b"numpy._core."), (b"numpy._core.", b"numpy.core.")])
def test_row_unpickler_reads_arrays_of_numpy_1_and_2(core, other):
    """The module of numpy's functions was renamed in 2.0."""
    written = pickle.dumps(np.arange(5), protocol=2).replace(other, core)
    assert core + b"multiarray" in written
    assert RowUnpickler(io.BytesIO(written)).load().ids.tolist() == [0, 1, 2, 3, 4]


def test_v1_dataset_reads_a_bin_file(tmp_path):
    texts, codes = some_rows(7, grid=32)
    path = write_bin(tmp_path / "data.bin", texts, codes)
    assert path.stat().st_size == 7 * (64 + 1024) * 4
    with open_v1(path) as store:
        assert len(store) == 7
        assert (store.header.grid, store.header.fields) == (32, {"text": 64, "image": 1024})
        wanted = [6, 0, 3, 3]
        expected = expected_of(texts, codes)
        assert_same(store.read(wanted), {name: ids[wanted] for name, ids in expected.items()})
        assert_same(store[2], {name: ids[2] for name, ids in expected.items()})
        assert_same(store.read([]), {name: ids[:0] for name, ids in expected.items()})


def test_v1_dataset_drops_absent_ids_of_a_bin_file(tmp_path):
    """The published reader drops them at any position as well."""
    _, codes = some_rows(1)
    ids = np.full((1, 128), -1, dtype="<i4")
    ids[0, [3, 10, 63]] = [8192, 8193, 58191]
    ids[0, 64:] = codes
    ids.tofile(tmp_path / "data.bin")
    assert open_v1(tmp_path / "data.bin", grid=8)[0]["text"].tolist() == [0, 1, 49999] + [NO_TOKEN] * 61


def test_v1_dataset_follows_text_width(tmp_path):
    texts, codes = [np.arange(n) for n in (0, 20, 70)], some_rows(3)[1]
    pairs = [(text + 8192, row) for text, row in zip(texts, codes, strict=True)]
    path = write_lmdb(tmp_path / "data", pairs)
    assert_same(open_v1(path, text_width=70).read(range(3)), expected_of(texts, codes, 70))
    narrow = open_v1(path, text_width=20)
    assert_same(narrow.read([0, 1]), expected_of(texts[:2], codes[:2], 20))
    with pytest.raises(InvalidRow, match=r"row 2 of .* has a text of 70 pieces, there is room for 20; `cogview import"):
        narrow.read(range(3))
    short = write_bin(tmp_path / "data.bin", texts[:2], codes[:2])
    assert_same(open_v1(short, text_width=20, grid=8).read([0, 1]), expected_of(texts[:2], codes[:2], 20))
    with pytest.raises(InvalidRow, match=r"row 1 of .* has a text of 20 pieces, there is room for 19;"):
        open_v1(short, text_width=19, grid=8).read([0, 1])


def test_v1_dataset_follows_the_sizes_of_the_vocabulary(tmp_path):
    sizes = {"num_image_codes": 40, "num_text_pieces": 300}
    vocabulary = Vocabulary(**sizes)
    commands = [vocabulary.command(name) for name in ("[ROI1]", "[TINY]", "[BOI1]", "[EOI1]")]
    row = np.array([commands[0], 40, 339, *commands[1:3], *[39] * 64, commands[3]])
    read = open_v1(write_lmdb(tmp_path / "data", [row]), **sizes)[0]
    assert read["text"][:3].tolist() == [0, 299, NO_TOKEN]
    assert read["image"].tolist() == [39] * 64


@pytest.mark.multiprocess
@pytest.mark.parametrize("form", ["lmdb", "bin"])
def test_v1_dataset_reads_the_same_in_workers(tmp_path, form):
    texts, codes = some_rows(12)
    if form == "bin":
        store = open_v1(write_bin(tmp_path / "data.bin", texts, codes), grid=8)
    else:
        pairs = [(text + 8192, row) for text, row in zip(texts, codes, strict=True)]
        store = open_v1(write_lmdb(tmp_path / "data", pairs))
    store.read([0])  # open in the parent before the workers start
    loader = DataLoader(store, batch_size=5, collate_fn=as_tensors, num_workers=2, multiprocessing_context="fork")
    np.testing.assert_array_equal(np.concatenate([batch["image"].numpy() for batch in loader]), codes)
    sent = pickle.dumps(store)  # as to workers that are started by spawn
    assert len(sent) < 2000  # a mapped file would travel whole
    assert_same(pickle.loads(sent).read(range(12)), expected_of(texts, codes))


def test_open_dataset_recognizes_the_kind_of_dataset(tmp_path):
    texts, codes = some_rows(3)
    pairs = [(text + 8192, row) for text, row in zip(texts, codes, strict=True)]
    dataset = open_v1(write_lmdb(tmp_path / "data", pairs))
    import_dataset(tmp_path / "store", [dataset])
    large = write_bin(tmp_path / "data.bin", *some_rows(2, grid=32))
    kinds = [type(open_dataset(path, **MADE_WITH)) for path in (tmp_path / "data", tmp_path / "store", large)]
    assert kinds == [V1Dataset, TokenStore, V1Dataset]
    with pytest.raises(InputError, match="is a CogView v1 dataset, not a token store: convert it with `cogview imp"):
        TokenStore(tmp_path / "data")
    with pytest.raises(InputError, match="is a token store already, not a CogView v1 dataset"):
        open_v1(tmp_path / "store")


# Pickles run no code


class Harmful:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (Harmful(os.system, "touch ran"), "posix.system"),
        (Harmful(eval, "open('ran', 'w')"), "(__builtin__|builtins).eval"),
        (Harmful(np.save, "ran", 0), "numpy.save"),
    ],
)
def test_v1_dataset_refuses_pickles_that_run_code(tmp_path, monkeypatch, harm, name, protocol):
    monkeypatch.chdir(tmp_path)
    texts, codes = some_rows(2)
    store = open_v1(write_lmdb("data", [(texts[0] + 8192, codes[0]), (harm, codes[1])], protocol))
    with pytest.raises(InputError, match=f"row 1 of data asks to run {name}, which no row of ids needs: the data"):
        store.read([0, 1])
    with pytest.raises(InputError, match="the dataset is refused"):  # skip_bad does not skip it
        import_dataset(tmp_path / "store", [store], skip_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    pickle.loads(pickle.dumps(harm, protocol))  # or the test would show nothing
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("array", "name"), [(np.array([None, 5]), "O8"), (np.array(["狐狸"]), "U2"), (np.zeros(2, dtype="i4,i4"), "V8")]
)
def test_v1_dataset_rejects_arrays_of_other_types_than_integers(tmp_path, array, name, protocol):
    with pytest.raises(
        InvalidRow, match=rf"row 0 of .* cannot be read: it holds an array of {name}, expected whole num"
    ):
        open_v1(write_lmdb(tmp_path / "data", [(array, np.arange(64))], protocol))


# Invalid rows

TEXT, CODES = np.array([8192, 9000]), np.arange(64)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ((TEXT, np.arange(64) + 8129), "holds 8192 in its codes, expected 0…8191;"),
        ((TEXT, CODES - 1), "holds -1 in its codes, expected 0…8191;"),
        ((TEXT - 8192, CODES), "holds 0 in its text, expected 8192…58191;"),
        ((np.array([58192]), CODES), "holds 58192 in its text, expected 8192…58191;"),
        ((TEXT, CODES.astype(np.uint64) + 2**63), "holds .* in its codes, expected 0…8191;"),
        ((TEXT, CODES[:63]), "has 63 codes, expected 64 or 256 or 1024 or 4096;"),
        ((TEXT, np.arange(256)), "has 256 codes, expected 64 as in the first row;"),
        (("一只狐狸", CODES), "holds str where an array of ids is expected;"),
        (([8192, 1.5], CODES), "holds 1.5, expected whole numbers;"),
        (([np.inf], CODES), "holds inf, expected whole numbers;"),
        ((["狐狸"], CODES), "holds a list of other things than ids;"),
        ({"text": TEXT}, "holds dict where an array of ids is expected;"),
        (
            np.concatenate([sequence(TEXT - 8192, CODES), [ROI2], CODES]),
            r"of 135 ids is no sequence \[ROI1\] text \[BASE\] \[BOI1\] codes \[EOI1\];",
        ),
        (sequence(TEXT - 8192, CODES, size=BASE), "of 70 ids is no sequence"),
        (sequence(TEXT - 8192, CODES)[1:], "of 69 ids is no sequence"),
        (sequence(TEXT - 8192, CODES)[:-1], "of 69 ids is no sequence"),
        (np.full(9, PAD), "of 0 ids is no sequence"),
        (
            pickle.dumps((TEXT, CODES))[:-40],
            "cannot be read: its pickle is damaged: expected 512 bytes",
        ),
        (b"noise", "(is no pickled row of ids|cannot be read)"),
        (b"", "cannot be read: its pickle is damaged: pickle exhausted before seeing STOP;"),
    ],
)
def test_v1_dataset_names_the_row_and_the_reason_when_it_is_invalid(tmp_path, row, reason):
    store = open_v1(write_lmdb(tmp_path / "data", [(TEXT, CODES), row]))
    assert store.read([0])["text"][0, :3].tolist() == [0, 808, NO_TOKEN]
    with pytest.raises(InvalidRow, match=f"row 1 of .*data {reason}"):
        store.read([0, 1])


def test_v1_dataset_reports_a_missing_row(tmp_path):
    store = open_v1(write_lmdb(tmp_path / "data", [(TEXT, CODES)], length=b"2"))
    with pytest.raises(InvalidRow, match=r"row 1 of .* is missing; "):
        store.read([1])
    with pytest.raises(IndexError, match=r"row 2 of .*, which has the rows 0…1"):
        store.read([2])


@pytest.mark.parametrize(
    ("dtype", "row", "message"),
    [
        (">i4", 0, "holds 2097152 at 0, expected -1 or 8192…58191 there"),
        ("<i8", 0, "holds 0 at 1, expected -1 or 8192…58191 there"),
        ("<i4", 1, "holds 8192 at 70, expected 0…8191 there"),
    ],
)
def test_v1_dataset_reports_invalid_ids_of_a_bin_file(tmp_path, dtype, row, message):
    ids = np.zeros((2, 128), dtype=np.int64)
    ids[:, :64] = 8192
    ids[1, 70] = 8192
    ids.astype(dtype).tofile(tmp_path / "data.bin")
    store = open_v1(tmp_path / "data.bin", grid=8)
    with pytest.raises(InvalidRow, match=rf"row {row} of .*data.bin {message} \(all as little-endian int32\); "):
        store.read([0, 1])


def test_v1_dataset_rejects_other_paths(tmp_path):
    (tmp_path / "cut.bin").write_bytes(b"\0" * 5000)
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "data.npy").write_bytes(b"\0")
    nothing = "there is no CogView v1 dataset at .*: expected an LMDB folder or a .bin file"
    for path, message in [
        (tmp_path / "nowhere", nothing),
        (tmp_path / "nowhere.bin", nothing),
        (tmp_path / "data.npy", nothing),
        (tmp_path, nothing),
        (tmp_path / "cut.bin", r"has 5000 bytes, expected a multiple of 4352 \(64 text ids and 1024 codes a row"),
        (tmp_path / "empty.bin", "has no rows"),
        (write_lmdb(tmp_path / "none", []), "has no rows"),
        (write_lmdb(tmp_path / "other", [], length=None, key=b"value"), "is an LMDB, but not a token store: it has no"),
        (write_lmdb(tmp_path / "odd", [], length=b"many"), "has the length b'many', expected a number"),
    ]:
        with pytest.raises(InputError, match=message):
            open_v1(path)


# Conversion to a token store


def test_import_dataset_joins_datasets_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(v1_import, "_ROWS_AT_A_TIME", 5)
    first, second = some_rows(12, seed=1), some_rows(7, seed=2)
    pairs = [(text + 8192, row) for text, row in zip(*first, strict=True)]
    sources = [
        open_v1(write_lmdb(tmp_path / "one", pairs)),
        open_v1(write_bin(tmp_path / "two.bin", *second), grid=8),
    ]
    made = import_dataset(tmp_path / "made" / "store", sources)
    assert (made.rows, made.skipped) == (19, 0)
    store = TokenStore(tmp_path / "made" / "store")
    assert_same(store.read(range(19)), expected_of([*first[0], *second[0]], np.concatenate([first[1], second[1]])))
    assert store.header.provenance == {"released": ["one", "two.bin"], "rows": [12, 7]}
    assert store.header.layouts == ("generate", "caption")
    store.check_compatible(**MADE_WITH, grid=8)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["store"]


@pytest.mark.parametrize("bad", [(), (0, 6, 13)])
def test_import_dataset_resumes_when_interrupted(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(v1_import, "_ROWS_AT_A_TIME", 4)
    texts, codes = some_rows(20)
    pairs = [(text + 8192, row) for text, row in zip(texts, codes, strict=True)]
    for number in bad:
        pairs[number] = ("没有编码", codes[number])
    source = open_v1(write_lmdb(tmp_path / "data", pairs))
    kept = [number for number in range(20) if number not in bad]
    expected = expected_of([texts[number] for number in kept], codes[kept])
    append, calls = StoreWriter.append, []

    def interrupted(self, rows):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(append(self, rows))

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_dataset(tmp_path / "store", [source], skip_bad=True)
    assert not (tmp_path / "store").exists()
    written = []
    monkeypatch.setattr(StoreWriter, "append", lambda self, rows: written.append(append(self, rows)))
    made = import_dataset(tmp_path / "store", [source], skip_bad=True)
    assert (made.rows, made.skipped) == (20 - len(bad), len(bad))
    assert len(written) == 2  # of five: three were there
    assert_same(TokenStore(tmp_path / "store").read(range(made.rows)), expected)


def test_import_dataset_stops_at_an_invalid_row_or_skips_it(tmp_path):
    texts, codes = some_rows(3)
    pairs = [(text + 8192, row) for text, row in zip(texts, codes, strict=True)]
    source = open_v1(write_lmdb(tmp_path / "data", [(texts[0], codes[0]), *pairs]))
    with pytest.raises(InvalidRow, match=r"row 0 of .* in its text, expected 8192…58191"):
        import_dataset(tmp_path / "store", [source])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing was made, nothing is kept
    made = import_dataset(tmp_path / "store", [source], skip_bad=True)
    assert (made.rows, made.skipped) == (3, 1)
    assert made.first_error.endswith(", expected 8192…58191")  # without the remedy
    assert_same(TokenStore(tmp_path / "store").read(range(3)), expected_of(texts, codes))


def test_import_dataset_reports_mistakes(tmp_path):
    texts, codes = some_rows(2)
    pairs = [(text + 8192, row) for text, row in zip(texts, codes, strict=True)]
    small = open_v1(write_lmdb(tmp_path / "small", pairs))
    large = open_v1(write_bin(tmp_path / "large.bin", *some_rows(2, grid=32)))
    with pytest.raises(InputError, match=r"large.bin has 32 x 32 codes a row, .*small has 8 x 8: import them into st"):
        import_dataset(tmp_path / "store", [small, large])
    wrong = open_v1(write_bin(tmp_path / "wrong.bin", texts, codes), grid=8)
    shutil.copyfile(write_bin(tmp_path / "w", [texts[0] - 60000] * 2, codes), tmp_path / "wrong.bin")
    with pytest.raises(InputError, match=r"none of the 2 rows can be used; the first: row 0 of .*wrong.bin holds "):
        import_dataset(tmp_path / "store", [wrong], skip_bad=True)
    (tmp_path / "store").mkdir()
    with pytest.raises(InputError, match="store is already there: remove it, or choose another name"):
        import_dataset(tmp_path / "store", [small])
