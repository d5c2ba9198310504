"""Batches of almost equal size that fit in memory, and equal results after out-of-memory errors."""

import logging
import random

import pytest
import torch

from cogview.errors import InputError, RetryLaterError
from cogview.planning import batches as planning
from cogview.planning.batches import BatchPlanner

CPU = torch.device("cpu")
FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"),
    MemoryError(),
]


@pytest.fixture
def free(monkeypatch):
    """A function that sets the bytes that a batch may take."""

    def set_free(count: float) -> None:
        monkeypatch.setattr(BatchPlanner, "free", lambda self: count)

    set_free(32)
    return set_free


def double(items):
    return [2 * item for item in items]


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("count", "max_batch_size", "sizes"),
    [
        (1, None, [1]),
        (32, None, [32]),
        (33, None, [17, 16]),  # and not 32 + 1
        (100, None, [25] * 4),
        (33, 10, [9, 8, 8, 8]),
        (5, 1, [1] * 5),
    ],
)
def test_chunks_have_almost_equal_sizes_that_fit(count, max_batch_size, sizes):
    assert BatchPlanner(CPU, max_batch_size).chunks(range(count), len, "generating") == sizes


@pytest.mark.usefixtures("free")
def test_run_yields_results_in_order():
    done = []

    def work(items):
        done.append(len(items))
        return double(items)

    assert list(BatchPlanner(CPU).run(range(33), len, work, "generating")) == double(range(33))
    assert done == [17, 16]
    assert list(BatchPlanner(CPU).run([], len, work, "generating")) == []


@pytest.mark.usefixtures("free")
def test_run_plans_again_when_later_items_are_larger():
    done = []

    def work(items):
        done.append(sum(items))
        return double(items)

    items = [1] * 32 + [8] * 32
    assert list(BatchPlanner(CPU).run(items, sum, work, "scoring")) == double(items)
    assert max(done) <= 32


@pytest.mark.parametrize("seed", range(20))
def test_run_yields_same_results_when_device_runs_out_of_memory(seed, free):
    """Batches fail at random, as if another program had taken the memory; no finished batch is repeated."""
    chance, finished = random.Random(seed), []

    def work(items):
        free(chance.randint(1, 32))
        if len(items) > 1 and chance.random() < 0.5:
            raise chance.choice(FAILURES)
        finished.extend(items)
        return double(items)

    assert list(BatchPlanner(CPU).run(range(100), len, work, "generating")) == double(range(100))
    assert finished == list(range(100))


@pytest.mark.usefixtures("free")
def test_run_halves_batch_after_out_of_memory(caplog):
    sizes = []

    def work(items):
        sizes.append(len(items))
        if len(items) > 8:
            raise FAILURES[0]
        return double(items)

    planner = BatchPlanner(CPU)
    assert list(planner.run(range(32), len, work, "generating")) == double(range(32))
    assert sizes == [32, 16, *[8] * 4]
    assert [record.message for record in caplog.records] == [
        "generating: out of memory with 32 at a time; continuing with smaller batches",
        "generating: out of memory with 16 at a time; continuing with smaller batches",
    ]
    assert planner.chunks(range(32), len, "decoding pixels") == [32]  # another kind of work


def test_run_does_not_split_batch_when_given_free_bytes(free):
    """A batch is not split again, although earlier stages have taken some of the memory by then."""
    planner, sizes = BatchPlanner(CPU), []

    def work(items):
        sizes.append(len(items))
        return double(items)

    done = []
    for batch, free_bytes in planner.split(range(33), len, "generating"):
        free(8)
        done += planner.run(batch, len, work, "generating", free_bytes=free_bytes)
    assert done == double(range(33))
    assert sizes == [17, 16]


@pytest.mark.usefixtures("free")
def test_split_plans_again_when_later_items_are_larger():
    """Items of 8 bytes after items of 1 byte need smaller batches."""
    batches = [batch for batch, _ in BatchPlanner(CPU).split([1] * 32 + [8] * 32, sum, "scoring")]
    assert [item for batch in batches for item in batch] == [1] * 32 + [8] * 32
    assert max(map(sum, batches)) <= 32


@pytest.mark.usefixtures("free")
def test_run_raises_other_errors():
    def work(items):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(BatchPlanner(CPU).run(range(3), len, work, "generating"))


def test_chunks_raise_when_one_item_does_not_fit(free):
    free(2e9)
    requested = []

    def suggestions(missing):
        requested.append(missing)
        return ["--dtype int8"]

    with pytest.raises(RetryLaterError) as caught:
        BatchPlanner(CPU, None, suggestions).chunks([3e9], sum, "generating")
    assert str(caught.value) == (
        "generating: one at a time takes 3.00 GB and cpu has 2.00 GB free; suggestions: --dtype int8 or "
        "close other programs"
    )
    assert requested == [1e9]


def test_run_raises_when_one_item_runs_out_of_memory(free):
    free(2e9)

    def work(items):
        raise FAILURES[1]

    with pytest.raises(RetryLaterError) as caught:
        list(BatchPlanner(CPU).run([1e9], sum, work, "scoring"))
    assert str(caught.value) == (
        "scoring: cpu ran out of memory with one at a time, which takes 1.00 GB of 2.00 GB free; suggestions: "
        "close other programs"
    )


def test_batch_planner_rejects_batch_size_below_1():
    with pytest.raises(InputError, match="the batch size must be at least 1, got 0"):
        BatchPlanner(CPU, 0)


def test_batches_are_logged_once_when_work_starts(free, caplog):
    caplog.set_level(logging.INFO, logger="cogview.planning.batches")
    free(32e9)
    planner = BatchPlanner(CPU)
    planner.chunks([1e9] * 33, sum, "generating")
    assert not caplog.records  # a question announces no work
    for _ in range(2):
        assert list(planner.run([1e9] * 33, sum, lambda items: items, "generating")) == [1e9] * 33
    assert [record.message for record in caplog.records] == [
        "generating: 17 at a time of 33 (memory); 17.00 GB of 32.00 GB free"
    ]


def test_free_leaves_margin(monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda device: 10**10)
    assert BatchPlanner(CPU).free() == 10**10 * (1 - planning.BATCH_MARGIN)
    monkeypatch.setattr(planning, "available_memory", lambda device: 10**8)
    assert BatchPlanner(CPU).free() == 10**8 - planning.MIN_FREE_BYTES["cpu"]
