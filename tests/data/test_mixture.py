"""Mixtures of stores: every row once per epoch of its store, exact shares, and earlier samples that never change."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import lmdb
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from cogview.data.mixture import MixedStore, Mixture
from cogview.data.phases import PHASES_FILE, Phase, append_phase, check_phases, check_same_start, read_phases
from cogview.data.sampling_order import sample_index
from cogview.data.store import NO_TOKEN, StoreHeader, TokenStore
from cogview.data.store_watcher import StoreWatcher
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.errors import InputError
from cogview.tokenizers.vocabulary import Vocabulary

HEADER = StoreHeader(
    fields={"text": 6, "image": 16},
    grid=4,
    num_image_codes=8192,
    num_text_pieces=2000,
    layouts=("generate", "caption"),
    codebook_sha256="c0de" * 16,
    text_sha256="7e47" * 16,
)

# Shares and sizes of one, two and five stores.
ONE = Phase(first_sample=0, names=("动物",), weights=(1.0,), sizes=(10,))
TWO = Phase(first_sample=0, names=("动物", "食物"), weights=(3.0, 1.0), sizes=(10, 7))
FIVE = Phase(first_sample=0, names=tuple("猫狗鸟鱼马"), weights=(0.1, 2.0, 0.7, 1.0, 0.3), sizes=(3, 50, 1, 20, 7))


def grown():
    """Return the phases of a run to which stores are added twice."""
    second = TWO.with_stores(101, {"植物": 30})
    return [TWO, second, second.with_stores(1000, {"天气": 4, "房子": 55})]


def make_store(path, count, header=HEADER, seed=0):
    """Write a store with ``count`` rows, whose first code is the number of the row."""
    rng = np.random.default_rng(seed)
    width = header.fields["text"]
    texts = [rng.integers(0, 2000, rng.integers(0, width + 1)).tolist() for _ in range(count)]
    rows = {name: rng.integers(0, 2000, (count, width)) for name, width in header.fields.items()}
    rows["image"][:, 0] = np.arange(count)
    with StoreWriter(path, header) as writer:
        writer.append({**rows, "text": pad_text(texts, width)})
    return TokenStore(path)


# Which sample reads which row


@pytest.mark.parametrize("seed", [0, 7, 2**63])
@pytest.mark.parametrize("size", [1, 10, 1000])
def test_mixture_of_one_store_follows_sample_index(seed, size):
    samples = np.concatenate([np.arange(3 * size), [10**9, 10**12]])
    stores, rows = Mixture([replace(ONE, sizes=(size,))], seed).locate(samples)
    assert stores.dtype == rows.dtype == np.int64
    assert (stores == 0).all()
    np.testing.assert_array_equal(rows, sample_index(seed, samples, size))


@pytest.mark.parametrize("phases", [[ONE], [TWO], [FIVE], grown()], ids=["one", "two", "five", "grown"])
def test_mixture_reads_every_row_once_in_each_epoch_of_a_store(phases):
    stores, rows = Mixture(phases, seed=5).locate(np.arange(4000))
    for store, size in enumerate(phases[-1].sizes):
        own = rows[stores == store]
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert len(epochs) >= 2
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert len(set(own[len(epochs) * size :])) == len(own) % size  # the epoch under way has none twice


def test_mixture_keeps_earlier_samples_and_epochs_when_a_phase_is_added():
    samples = np.arange(3000)
    short, longer, whole = (Mixture(grown()[:count], seed=3).locate(samples) for count in (1, 2, 3))
    for part in (0, 1):
        np.testing.assert_array_equal(short[part][:101], whole[part][:101])
        np.testing.assert_array_equal(longer[part][:1000], whole[part][:1000])
    assert (whole[0][:101] < 2).all()
    assert (whole[0][101:1000] < 3).all()
    for store in (0, 1):  # known stores give the same rows in the same order, only less often
        without, with_others = short[1][short[0] == store], whole[1][whole[0] == store]
        assert 0 < len(with_others) < len(without)
        np.testing.assert_array_equal(with_others, without[: len(with_others)])


def test_mixture_equals_a_reader_with_counters():
    """Replay the mixture by hand, with counters, one sample after the other."""
    phases, whole = grown(), 2**24
    stores, rows = Mixture(phases, seed=11).locate(np.arange(2000))
    asked = [0] * 5
    orders = {}
    for sample in range(2000):
        phase = next(phase for phase in reversed(phases) if phase.first_sample <= sample)
        if sample == phase.first_sample:
            passed = [0] * len(phase.names)
        for store in range(len(phase.names)):
            share = round(phase.weights[store] / sum(phase.weights[store:]) * whole)
            passed[store] += 1
            if passed[store] * share // whole > (passed[store] - 1) * share // whole:
                break
        assert stores[sample] == store
        orders.setdefault((store, asked[store] // phase.sizes[store]), []).append(int(rows[sample]))
        asked[store] += 1
    for (store, epoch), order in orders.items():
        size = phases[-1].sizes[store]
        assert len(set(order)) == len(order) <= size
        if store == 0:
            assert order == sample_index(11, np.arange(epoch * size, epoch * size + len(order)), size).tolist()


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_mixture_reads_the_same_when_processes_share_a_batch(world_size):
    mixture, batch = Mixture(grown(), seed=1), 12
    share = batch // world_size
    for step in (0, 8, 83, 10**6):  # the second and third have a change of phases within
        samples = np.arange(step * batch, (step + 1) * batch)
        whole = mixture.locate(samples)
        parts = [mixture.locate(samples[rank * share : (rank + 1) * share]) for rank in range(world_size)]
        for part in (0, 1):
            np.testing.assert_array_equal(np.concatenate([own[part] for own in parts]), whole[part])


def test_mixture_locates_a_sample_alone_as_in_a_batch():
    mixture = Mixture(grown(), seed=4)
    samples = np.random.default_rng(0).integers(0, 3000, (5, 40))
    stores, rows = mixture.locate(samples)
    assert stores.shape == rows.shape == samples.shape
    for sample, store, row in zip(samples.flat, stores.flat, rows.flat, strict=True):
        assert tuple(map(int, mixture.locate(int(sample)))) == (store, row)
    assert [part.shape for part in mixture.locate(np.zeros(0, dtype=int))] == [(0,), (0,)]


@pytest.mark.parametrize(
    "shares", [(1, 1), (3, 1), (1, 3), (1, 1, 1), (5, 2, 1, 1), FIVE.weights, (0.001, 1), (1, 0.001), (1,) * 8]
)
def test_mixture_keeps_shares_at_every_sample(shares):
    count = len(shares)
    names = tuple(f"store{number}" for number in range(count))
    phase = Phase(first_sample=0, names=names, weights=shares, sizes=(100,) * count)
    stores, _ = Mixture([phase], seed=0).locate(np.arange(20000))
    for store, share in enumerate(shares):
        had = np.cumsum(stores == store)
        asked = np.arange(1, 20001) * share / sum(shares)
        splits = min(store + 1, count - 1)
        rounding = count * 20000 / 2**25
        assert np.abs(had - asked).max() <= splits + rounding


def test_mixture_interleaves_stores():
    stores, _ = Mixture([TWO], seed=0).locate(np.arange(4000))
    assert (np.sort(stores.reshape(-1, 4), axis=1) == [0, 0, 0, 1]).all()


@pytest.mark.parametrize(("shares", "expected"), [((1.0, 1e12), [1, 1, 1, 0, 1, 0]), ((1e12, 1.0), [1, 0, 0, 0, 1, 0])])
def test_mixture_reads_a_store_when_its_share_is_tiny(shares, expected):
    """A split takes 1 in 2^24 samples at least; a share that came out as 0 would never be read."""
    phase = Phase(first_sample=0, names=("大", "小"), weights=shares, sizes=(5, 5))
    stores, _ = Mixture([phase], seed=0).locate(np.array([0, 1, 2**24 - 2, 2**24 - 1, 2**24, 2**25 - 1]))
    assert stores.tolist() == expected


def test_mixture_orders_stores_of_equal_size_differently():
    phase = Phase(first_sample=0, names=("一", "二", "三"), weights=(1, 1, 1), sizes=(1000, 1000, 1000))
    stores, rows = Mixture([phase], seed=0).locate(np.arange(3000))
    orders = [rows[stores == store] for store in range(3)]
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[first][:990] == orders[second][:990]).sum() < 12  # 1 is to be expected


def test_mixture_rejects_no_phases_and_negative_samples():
    with pytest.raises(ValueError, match="at least one phase"):
        Mixture([], seed=0)
    with pytest.raises(ValueError, match="numbered from 0, got -2"):
        Mixture([ONE], seed=0).locate(np.array([3, -2]))


# Phases


def test_with_stores_gives_rows_of_a_new_store_the_same_probability():
    before = Phase(first_sample=0, names=("动物", "食物"), weights=(0.5, 1.5), sizes=(100, 300))
    after = before.with_stores(800, {"植物": 200, "天气": 400})
    assert after == Phase(
        first_sample=800,
        names=("动物", "食物", "植物", "天气"),
        weights=(0.5, 1.5, 1.0, 2.0),
        sizes=(100, 300, 200, 400),
    )
    stores, _ = Mixture([before, after], seed=0).locate(np.arange(800, 10800))
    np.testing.assert_allclose(np.bincount(stores), [1000, 3000, 2000, 4000], atol=3)


@pytest.mark.parametrize("phase", [ONE, FIVE, *grown()])
def test_phase_json_roundtrip(phase):
    text = phase.to_json()
    assert Phase.from_json(text) == phase
    assert "\n" not in text
    assert phase.names[0] in text  # to be read by people


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("动物", "动物")}, "the store 动物 is given twice: give it once, with the share of both"),
        ({"weights": (1.0, 0.0)}, "the share of 食物 is 0.0, expected a number above 0"),
        ({"weights": (float("nan"), 1.0)}, "the share of 动物 is nan, expected"),
        ({"weights": (float("inf"), 1.0)}, "the share of 动物 is inf, expected"),
        ({"sizes": (10, 0)}, "食物 has no rows: leave it out, or encode some first"),
        ({"names": (), "weights": (), "sizes": ()}, "there are no stores to train on, expected at least one"),
    ],
)
def test_phase_rejects_unusable_stores(change, message):
    with pytest.raises(InputError, match=message):
        replace(TWO, **change)


def test_phase_rejects_inconsistent_lengths_and_negative_starts():
    """Such phases come from a bug of the caller, not from a user's mistake."""
    with pytest.raises(ValueError, match="2 stores have 1 weights and 2 sizes"):
        replace(TWO, weights=(1.0,))
    with pytest.raises(ValueError, match="numbered from 0, got -1"):
        replace(TWO, first_sample=-1)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (replace(TWO, first_sample=0), "begins at sample 0, the one before at 0: expected a later one"),
        (replace(ONE, first_sample=9), "from sample 9 on does not go on with 食物 as it was before"),
        (replace(TWO, first_sample=9, names=("食物", "动物")), "does not go on with 动物 as it was before"),
        (replace(TWO, first_sample=9, sizes=(10, 8)), "does not go on with 食物 as it was before: expected the same"),
    ],
)
def test_check_phases_rejects_a_phase_that_changes_earlier_stores(second, message):
    with pytest.raises(InputError, match=message):
        check_phases([TWO, second])
    with pytest.raises(InputError, match=message):
        Mixture([TWO, second], seed=0)


def test_check_phases_requires_a_first_phase_at_sample_0():
    with pytest.raises(InputError, match="the first phase begins at sample 4, expected 0"):
        check_phases([replace(TWO, first_sample=4)])


# Rows of several stores


@pytest.fixture
def three_stores(tmp_path):
    """Three stores; the second has a narrower text field."""
    narrow = replace(HEADER, fields={"image": 16, "text": 4})  # the order of the fields does not matter
    return [
        make_store(tmp_path / "动物", 50),
        make_store(tmp_path / "食物", 30, narrow, seed=1),
        make_store(tmp_path / "植物", 40, seed=2),
    ]


def assert_same(read, expected):
    assert list(read) == list(expected)
    for name, ids in expected.items():
        assert read[name].dtype == np.uint16
        np.testing.assert_array_equal(read[name], ids)


def read_one_by_one(stores, numbers, rows):
    """Read rows one by one and pad texts to 6."""
    found = [stores[number][int(row)] for number, row in zip(numbers, rows, strict=True)]
    texts = [np.pad(row["text"], (0, 6 - len(row["text"])), constant_values=NO_TOKEN) for row in found]
    return {"text": np.stack(texts), "image": np.stack([row["image"] for row in found])}


def test_mixed_store_reads_rows_in_the_requested_order(three_stores):
    mixed = MixedStore(three_stores)
    assert mixed.header == HEADER
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 3, 100)
    rows = rng.integers(0, 30, 100)
    assert_same(mixed.read(numbers, rows), read_one_by_one(three_stores, numbers, rows))
    again = mixed.read(numbers, rows)
    again["image"][:] = 0  # a copy
    assert_same(mixed.read(numbers, rows), read_one_by_one(three_stores, numbers, rows))
    nothing = mixed.read(np.zeros(0, dtype=int), np.zeros(0, dtype=int))
    assert {name: ids.shape for name, ids in nothing.items()} == {"text": (0, 6), "image": (0, 16)}


def test_mixed_store_of_one_store_equals_that_store(three_stores):
    rows = np.array([3, 49, 0, 3])
    assert_same(MixedStore(three_stores[:1]).read(np.zeros(4, dtype=int), rows), three_stores[0].read(rows))


def test_mixed_store_pads_the_fields_that_a_store_lacks(tmp_path):
    plain = make_store(tmp_path / "plain", 5)
    large = make_store(tmp_path / "large", 5, replace(HEADER, fields={**HEADER.fields, "large": 64}), seed=1)
    mixed = MixedStore([plain, large])
    assert mixed.fields == {"text": 6, "image": 16, "large": 64}
    rows = mixed.read(np.array([1, 0]), np.array([2, 3]))
    np.testing.assert_array_equal(rows["large"][0], large[2]["large"])
    assert (rows["large"][1] == NO_TOKEN).all()
    np.testing.assert_array_equal(rows["image"], np.stack([large[2]["image"], plain[3]["image"]]))


def test_with_store_keeps_the_numbers_of_earlier_stores(three_stores):
    two = MixedStore(three_stores[:2])
    all_three = two.with_store(three_stores[2])
    numbers, rows = np.array([1, 0, 2]), np.array([5, 6, 7])
    assert_same(all_three.read(numbers, rows), read_one_by_one(three_stores, numbers, rows))
    assert len(two.stores) == 2
    with pytest.raises(IndexError, match="store 2 of a mixture that has the stores 0…1"):
        two.read(numbers, rows)
    with pytest.raises(IndexError, match="store -1 of a mixture"):
        two.read(np.array([-1]), np.array([0]))


class BatchDataset(Dataset):
    """Batches of 10 samples."""

    def __init__(self, store, mixture):
        self.store, self.mixture = store, mixture

    def __getitem__(self, step):
        return self.store.read(*self.mixture.locate(np.arange(10 * step, 10 * step + 10)))


READ_ELSEWHERE = """
import pickle, sys
store, mixture, samples = pickle.load(sys.stdin.buffer)
pickle.dump(store.read(*mixture.locate(samples)), sys.stdout.buffer)
"""


@pytest.mark.multiprocess
def test_mixed_store_reads_the_same_when_unpickled_elsewhere(three_stores):
    """A worker that is started by spawn gets its store this way."""
    phase = Phase(first_sample=0, names=tuple("一二三"), weights=(1, 1, 2), sizes=(50, 30, 40))
    mixed, mixture, samples = MixedStore(three_stores), Mixture([phase], seed=0), np.arange(200)
    expected = mixed.read(*mixture.locate(samples))  # the stores are open in this process
    sent = pickle.dumps((mixed, mixture, samples))
    done = subprocess.run([sys.executable, "-c", READ_ELSEWHERE], input=sent, stdout=subprocess.PIPE, check=True)
    assert_same(pickle.loads(done.stdout), expected)


@pytest.mark.multiprocess
def test_mixed_store_reads_the_same_in_forked_workers(three_stores):
    phase = Phase(first_sample=0, names=tuple("一二三"), weights=(1, 1, 2), sizes=(50, 30, 40))
    batches = BatchDataset(MixedStore(three_stores), Mixture([phase], seed=0))
    expected = [batches[step] for step in range(12)]
    loader = DataLoader(
        batches,
        sampler=range(12),
        batch_size=None,
        collate_fn=lambda batch: batch,
        num_workers=2,
        multiprocessing_context="fork",
    )
    for batch, wanted in zip(loader, expected, strict=True):
        assert_same(batch, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fields": {"text": 8, "image": 16}},
            r"other has texts of up to 8 pieces, .*first of up to 6: encode it with text_width: 6, or begin",
        ),
        ({"codebook_sha256": "beef" * 16}, r"other was made with codebook_sha256 beefbeef.*, but c0dec0de.* is needed"),
        ({"text_sha256": "beef" * 16}, r"other was made with text_sha256 beefbeef.*, but 7e477e47.* is needed"),
        ({"num_text_pieces": 2001}, r"other was made with num_text_pieces 2001, but 2000 is needed"),
        ({"grid": 8, "fields": {"text": 6, "image": 64}}, r"other was made with grid 8, but 4 is needed"),
    ],
)
def test_mixed_store_rejects_stores_with_other_settings(tmp_path, change, message):
    first = make_store(tmp_path / "first", 3)
    other = make_store(tmp_path / "other", 3, replace(HEADER, **change))
    with pytest.raises(InputError, match=message):
        MixedStore([first, other])
    with pytest.raises(InputError, match=message):
        MixedStore([first]).with_store(other)


def test_mixed_store_rejects_fields_of_other_widths(tmp_path):
    first, other = (
        make_store(tmp_path / name, 3, replace(HEADER, fields={**HEADER.fields, "large": width}))
        for name, width in (("first", 64), ("other", 4))
    )
    with pytest.raises(InputError, match=r'field "large" is 4 wide in .*other, but 64 in .*first: encode both alike'):
        MixedStore([first, other])
    with pytest.raises(InputError, match=r'field "large" is 4 wide in .*other, but 64 in another store: encode both'):
        MixedStore([make_store(tmp_path / "plain", 3), first, other])


def test_mixed_store_rejects_no_stores():
    with pytest.raises(InputError, match="there are no stores to train on"):
        MixedStore([])


def test_check_sizes_allows_a_store_to_grow_but_not_to_shrink(three_stores):
    mixed = MixedStore(three_stores)
    phase = Phase(first_sample=0, names=("动物", "食物", "植物"), weights=(1, 1, 1), sizes=(40, 30, 40))
    mixed.check_sizes(phase)
    with pytest.raises(InputError, match="植物 has 40 rows, the run began to read 41: bring them back, or begin"):
        mixed.check_sizes(replace(phase, sizes=(40, 30, 41)))


# The watched folder


def write_v1_dataset(path, texts):
    """Write a v1 dataset of whole sequences: ``texts`` (piece ids), each with 8 times 8 codes."""
    vocabulary = Vocabulary(num_image_codes=8192, num_text_pieces=2000)
    begin, base, begin_image, end_image = map(vocabulary.command, ("[ROI1]", "[TINY]", "[BOI1]", "[EOI1]"))
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        for row, text in enumerate(texts):
            pieces = [vocabulary.text.start + piece for piece in text]
            ids = np.array([begin, *pieces, base, begin_image, *range(64), end_image])
            transaction.put(b"%d" % row, pickle.dumps(ids))
        transaction.put(b"length", b"%d" % len(texts))


def found(watch, known=()):
    return [(store.path.name, len(store)) for store in watch.new_stores([str(name) for name in known])]


def test_store_watcher_finds_new_stores_in_order_of_name(tmp_path, capsys):
    watch = StoreWatcher(tmp_path, HEADER, ["generate"])
    assert found(watch) == []
    make_store(tmp_path / "b", 3)
    make_store(tmp_path / "a", 4, replace(HEADER, fields={"text": 2, "image": 16}))
    make_store(tmp_path / ".c", 5)
    (tmp_path / "d").mkdir()
    (tmp_path / "e").write_text("no folder")
    assert found(watch) == [("a", 4), ("b", 3)]
    assert found(watch) == [("a", 4), ("b", 3)]  # until they are known
    assert found(watch, [tmp_path / "a"]) == [("b", 3)]
    assert found(watch, [tmp_path / "a", tmp_path / "b"]) == []
    (tmp_path / ".c").rename(tmp_path / "c")
    (make_store(tmp_path / ".ready", 6).path / "data.mdb").rename(tmp_path / "d" / "data.mdb")
    assert found(watch, [tmp_path / "a", tmp_path / "b"]) == [("c", 5), ("d", 6)]
    assert capsys.readouterr() == ("", "")


def test_store_watcher_recognizes_a_store_by_any_of_its_paths(tmp_path, monkeypatch):
    make_store(tmp_path / "elsewhere", 3)
    (tmp_path / "new").mkdir()
    for name in ("link", "second"):
        (tmp_path / "new" / name).symlink_to(tmp_path / "elsewhere")
    watch = StoreWatcher(tmp_path / "new", HEADER)
    assert found(watch) == [("link", 3)]  # and not twice
    monkeypatch.chdir(tmp_path)
    assert found(watch, ["elsewhere"]) == []


def test_store_watcher_skips_incomplete_stores_until_they_are_whole(tmp_path, capsys):
    watch = StoreWatcher(tmp_path, HEADER)
    make_store(tmp_path / "empty", 0)
    whole = (make_store(tmp_path / ".whole", 60).path / "data.mdb").read_bytes()
    (tmp_path / "copied").mkdir()
    copy = tmp_path / "copied" / "data.mdb"
    for length in (0, 100, 4096, len(whole) // 2):
        copy.write_bytes(whole[:length])
        assert found(watch) == []
    copy.write_bytes(whole)
    with StoreWriter(tmp_path / "empty", HEADER, resume=True) as writer:
        writer.append({"text": pad_text([[1]], 6), "image": np.zeros((1, 16), dtype=int)})
    assert found(watch) == [("copied", 60), ("empty", 1)]
    assert capsys.readouterr().err == ""


WRITE_SLOWLY = """
import sys
import numpy as np
from cogview.data.store import StoreHeader
from cogview.data.store_writer import StoreWriter, pad_text

path, header = sys.argv[1:]
with StoreWriter(path, StoreHeader.from_json(header), resume=True) as writer:
    writer.append({"text": pad_text([[1], [2]], 6), "image": np.zeros((2, 16), dtype=int)})
    print("written", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform == "win32", reason="needs the locks of POSIX")
@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_store_watcher_skips_a_store_while_it_is_written(tmp_path, ends):
    """Its rows can be read at any time, but not all are there yet."""
    watch = StoreWatcher(tmp_path, HEADER)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_SLOWLY, tmp_path / "store", HEADER.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"written\n"
        assert found(watch) == []
        assert found(watch) == []
        if ends == "killed":
            process.kill()
        else:
            process.stdin.write(b"\n")
    assert found(watch) == [("store", 2)]
    with StoreWriter(tmp_path / "store", HEADER, resume=True) as writer:  # nothing of ours is in its way
        assert writer.count == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_sha256": "beef" * 16}, "was made with codebook_sha256 beefbeef"),
        ({"text_sha256": "beef" * 16}, "was made with text_sha256 beefbeef"),
        ({"grid": 8, "fields": {"text": 6, "image": 64}}, "was made with grid 8, but 4 is needed"),
        ({"fields": {"image": 16, "text": 7}}, "has texts of up to 7 pieces, the run of up to 6"),
        ({"fields": {"image": 16, "text": 6, "large": 64}}, "has the fields image, large, text, but the run has image"),
        ({"layouts": ("generate",)}, 'feeds generate, but "caption" is needed here'),
    ],
)
def test_store_watcher_reports_an_incompatible_store_once(tmp_path, capsys, change, message):
    watch = StoreWatcher(tmp_path, HEADER, ["generate", "caption"])
    make_store(tmp_path / "fits", 3)
    make_store(tmp_path / "other", 3, replace(HEADER, **change))
    for _ in range(3):
        assert found(watch) == [("fits", 3)]
    (tmp_path / "other").rename(tmp_path / ".other")
    make_store(tmp_path / "other", 3)  # too late
    assert found(watch) == [("fits", 3)]
    assert StoreWatcher(tmp_path, HEADER).new_stores([])[-1].path.name == "other"  # in time for the next run
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"a new store does not fit and is skipped: {tmp_path / 'other'} {message}")


def test_store_watcher_finds_v1_datasets(tmp_path, capsys):
    header = replace(HEADER, fields={"text": 64, "image": 64}, grid=8)
    watch = StoreWatcher(tmp_path, header, ["generate"])
    write_v1_dataset(tmp_path / "released", [[5, 6], []])
    write_v1_dataset(tmp_path / "wrong", [[3000], [3000]])  # of a larger text model
    assert found(watch) == [("released", 2)]
    assert found(watch) == [("released", 2)]
    assert capsys.readouterr().err.count("a new store does not fit and is skipped: row 0 of") == 1


def test_store_watcher_reports_a_missing_folder(tmp_path, capsys):
    """Without the folder a run does not start; a run that has started goes on without it."""
    with pytest.raises(InputError, match=r"no folder .*new to look for new stores in: make it, or watch none"):
        StoreWatcher(tmp_path / "new", HEADER)
    (tmp_path / "new").mkdir()
    watch = StoreWatcher(tmp_path / "new", HEADER)
    (tmp_path / "new").rename(tmp_path / "away")
    assert found(watch) == found(watch) == []  # no reason to end a run
    err = capsys.readouterr().err
    assert err == f"no new stores: {tmp_path / 'new'} is no longer readable (No such file or directory)\n"
    (tmp_path / "away").rename(tmp_path / "new")
    make_store(tmp_path / "new" / "a", 1)
    assert found(watch) == [("a", 1)]


# The ledger


@pytest.fixture
def ledger(tmp_path):
    for phase in grown():
        append_phase(tmp_path / PHASES_FILE, phase)
    return tmp_path / PHASES_FILE


def test_append_phase_roundtrips_through_read_phases(tmp_path, ledger):
    assert read_phases(tmp_path / "nothing") == []
    assert read_phases(ledger) == grown()
    assert [path.name for path in tmp_path.iterdir()] == [PHASES_FILE]
    first = json.loads(ledger.read_text(encoding="utf-8").splitlines()[0])
    assert first == {
        "first_sample": 0,
        "stores": [{"name": "动物", "share": 3.0, "size": 10}, {"name": "食物", "share": 1.0, "size": 7}],
    }


def test_append_phase_keeps_names_of_any_characters(tmp_path):
    names = ('新"行"\n二', "a\u2028b", os.fsdecode(b"\xff\xfe"), "\\")
    phase = Phase(first_sample=0, names=names, weights=(1 / 3, 1e-9, 2, 1), sizes=(1, 2, 3, 4))
    append_phase(tmp_path / PHASES_FILE, phase)
    assert read_phases(tmp_path / PHASES_FILE) == [phase]


def test_append_phase_overwrites_a_truncated_last_line(ledger):
    *_, last = grown()
    content = ledger.read_bytes()
    whole = len(content) - len(last.to_json().encode()) - 1
    for end in range(whole, len(content) - 1):
        ledger.write_bytes(content[:end])
        assert read_phases(ledger) == grown()[:2], end
    append_phase(ledger, last)
    assert ledger.read_bytes() == content
    ledger.write_bytes(content[:-1])  # whole but for its end, as an editor may leave it
    assert read_phases(ledger) == grown()
    further = last.with_stores(5000, {"山": 8})
    append_phase(ledger, further)
    assert read_phases(ledger) == [*grown(), further]


APPEND_AND_DIE = """
import os, signal, sys
from pathlib import Path
from cogview.data.phases import append_phase, read_phases

ledger = Path(sys.argv[1])
moment = sys.argv[2]
setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
append_phase(ledger, read_phases(ledger)[-1].with_stores(9000, {"海": 6}))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_append_phase_loses_nothing_when_killed(ledger, moment):
    done = subprocess.run([sys.executable, "-c", APPEND_AND_DIE, ledger, moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_phases(ledger) == grown()
    further = grown()[-1].with_stores(9500, {"湖": 6})
    append_phase(ledger, further)
    assert read_phases(ledger) == [*grown(), further]
    assert [path.name for path in ledger.parent.iterdir()] == [PHASES_FILE]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 of .*stores.jsonl cannot be used: it is no JSON; bring back the file as the run wrote it, or"),
        ("[1]", "line 2 of .* cannot be used: it is no phase of a run; bring"),
        ('{"first_sample": 5}', "it is no phase of a run"),
        ('{"first_sample": "5", "stores": []}', "it is no phase of a run"),
        ('{"first_sample": 5, "stores": [{"name": "a", "share": true, "size": 1}]}', "it is no phase of a run"),
        ('{"first_sample": 5, "stores": [{"name": "a", "share": -1, "size": 1}]}', "the share of a is -1, expected a"),
        (ONE.to_json(), "begins at sample 0, the one before at 0: expected a later one"),
        (replace(ONE, first_sample=9).to_json(), "does not go on with 食物 as it was before"),
    ],
)
def test_read_phases_reports_a_damaged_ledger(ledger, line, message):
    lines = ledger.read_text(encoding="utf-8").splitlines(keepends=True)
    ledger.write_text("".join([lines[0], line + "\n", *lines[2:]]), encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_phases(ledger)
    assert "\n" not in str(error.value)


def test_append_phase_refuses_a_phase_in_the_past(ledger):
    content = ledger.read_bytes()
    with pytest.raises(InputError, match="begins at sample 700, the one before at 1000"):
        append_phase(ledger, grown()[-1].with_stores(700, {"山": 8}))
    assert ledger.read_bytes() == content


def test_check_same_start_accepts_equal_shares_and_grown_stores():
    check_same_start([], TWO)
    check_same_start(grown(), TWO)
    check_same_start(grown(), replace(TWO, weights=(6.0, 2.0)))  # only how they compare counts
    check_same_start(grown(), replace(TWO, sizes=(10, 70)))  # a store may grow


def test_check_same_start_accepts_shares_that_grow_with_sizes():
    began = replace(TWO, weights=(10.0, 7.0))
    check_same_start([began], replace(TWO, weights=(10.0, 70.0), sizes=(10, 70)))
    with pytest.raises(InputError, match=r"a share of 0\.588235 of all samples for 动物, now it is 0.125: resume with"):
        check_same_start([began], replace(TWO, weights=(10.0, 70.0)))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            replace(TWO, names=("动物", "植物")),
            "the run began with 食物 as store 2, now it is 植物: resume with the stores",
        ),
        (replace(TWO, names=("食物", "动物")), "the run began with 动物 as store 1, now it is 食物"),
        (ONE, "the run began with 食物 too, which is not given now: resume"),
        (
            TWO.with_stores(0, {"植物": 3}),
            "the run began without 植物: resume .*; a watched folder can bring new stores",
        ),
        (replace(TWO, sizes=(9, 7)), "动物 has 9 rows, the run began to read 10: bring them back"),
        (
            replace(TWO, weights=(1.0, 1.0)),
            "a share of 0.75 of all samples for 动物, now it is 0.5: resume with the shares",
        ),
    ],
)
def test_check_same_start_rejects_other_stores_or_shares(now, message):
    with pytest.raises(InputError, match=message):
        check_same_start(grown(), now)


def test_read_phases_refuses_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "stores.jsonl").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*stores\.jsonl: it is a folder"):
        read_phases(tmp_path / "stores.jsonl")
