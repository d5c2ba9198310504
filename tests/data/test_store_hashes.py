"""Equal rows are counted by hashes on the disk: the counts of a dictionary, in bounded memory."""

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cogview.data import store_hashes
from cogview.data.store_hashes import HashCounter
from cogview.errors import RetryLaterError


@pytest.mark.parametrize("part_rows", [7, 1000])
def test_hash_counter_counts_like_a_dictionary(monkeypatch, part_rows):
    monkeypatch.setattr(store_hashes, "PART_ROWS", part_rows)
    rows = np.random.default_rng(0).integers(0, 30, (500, 1), dtype=np.uint16).repeat(3, axis=1)
    with HashCounter(len(rows)) as counter:
        for start in range(0, len(rows), 64):
            counter.add(rows[start : start + 64])
        distinct, frequent = counter.count(5)
    found = Counter(rows[:, 0].tolist())
    first = {value: rows[:, 0].tolist().index(value) for value in found}
    expected = sorted(((first[value], count) for value, count in found.items()), key=lambda each: (-each[1], each[0]))
    assert (distinct, frequent) == (len(found), expected[:5])


def test_hash_counter_holds_no_row_in_memory(monkeypatch):
    """An object stood in memory for each row: gigabytes for ten million."""
    monkeypatch.setattr(store_hashes, "PART_ROWS", 1000)
    peaks = []
    for count in (2000, 20_000):
        tracemalloc.start()
        try:
            with HashCounter(count) as counter:
                for start in range(0, count, 500):
                    counter.add(np.arange(start, start + 500, dtype=np.uint32).reshape(-1, 1))
                assert counter.count() == (count, [])
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_hash_counter_removes_its_files_and_names_a_full_disk(monkeypatch):
    with HashCounter(10) as counter:
        folder = counter._folder
        counter.add(np.zeros((3, 2), dtype=np.uint16))
        assert folder.is_dir()

        def fail(*arguments, **settings):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "open", fail)
        with pytest.raises(RetryLaterError, match=r"^hashes of rows cannot be written to .*TMPDIR"):
            counter.add(np.zeros((3, 2), dtype=np.uint16))
        monkeypatch.undo()
    assert not folder.exists()
