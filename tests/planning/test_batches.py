"""How much is done at a time: even parts that fit, and the same results where a device runs out."""

import logging
import random

import pytest
import torch

from cogview.errors import InputError
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
    """A function that says how many bytes work may take from now on."""

    def say(count: float) -> None:
        monkeypatch.setattr(BatchPlanner, "free", lambda self: count)

    say(32)
    return say


def double(items):
    return [2 * item for item in items]


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("count", "ceiling", "sizes"),
    [
        (1, None, [1]),
        (32, None, [32]),
        (33, None, [17, 16]),  # and not 32 + 1
        (100, None, [25] * 4),
        (33, 10, [9, 8, 8, 8]),
        (5, 1, [1] * 5),
    ],
)
def test_parts_are_even_and_fit(count, ceiling, sizes):
    assert BatchPlanner(CPU, ceiling).chunks(range(count), len, "drawing") == sizes


@pytest.mark.usefixtures("free")
def test_results_come_in_order():
    done = []

    def work(items):
        done.append(len(items))
        return double(items)

    assert list(BatchPlanner(CPU).run(range(33), len, work, "drawing")) == double(range(33))
    assert done == [17, 16]
    assert list(BatchPlanner(CPU).run([], len, work, "drawing")) == []


@pytest.mark.usefixtures("free")
def test_later_items_may_be_larger_than_the_first():
    done = []

    def work(items):
        done.append(sum(items))
        return double(items)

    items = [1] * 32 + [8] * 32
    assert list(BatchPlanner(CPU).run(items, sum, work, "scoring")) == double(items)
    assert max(done) <= 32


@pytest.mark.parametrize("seed", range(20))
def test_a_device_that_runs_out_gives_the_same_results(seed, free):
    """At random parts, as if somebody else had taken the memory; what is done is never done again."""
    chance, finished = random.Random(seed), []

    def work(items):
        free(chance.randint(1, 32))
        if len(items) > 1 and chance.random() < 0.5:
            raise chance.choice(FAILURES)
        finished.extend(items)
        return double(items)

    assert list(BatchPlanner(CPU).run(range(100), len, work, "drawing")) == double(range(100))
    assert finished == list(range(100))


@pytest.mark.usefixtures("free")
def test_what_failed_is_done_again_in_halves(caplog):
    sizes = []

    def work(items):
        sizes.append(len(items))
        if len(items) > 8:
            raise FAILURES[0]
        return double(items)

    planner = BatchPlanner(CPU)
    assert list(planner.run(range(32), len, work, "drawing")) == double(range(32))
    assert sizes == [32, 16, *[8] * 4]
    assert [record.message for record in caplog.records] == [
        "drawing: out of memory with 32 at a time; going on with less",
        "drawing: out of memory with 16 at a time; going on with less",
    ]
    assert planner.chunks(range(32), len, "decoding pixels") == [32]  # another kind of work did not fail


def test_run_keeps_part_whole_when_given_free_bytes(free):
    """A part that was planned as a whole stays one, although earlier stages have taken some of the memory by then."""
    planner, sizes = BatchPlanner(CPU), []

    def work(items):
        sizes.append(len(items))
        return double(items)

    done = []
    for part, free_bytes in planner.split(range(33), len, "drawing"):
        free(8)
        done += planner.run(part, len, work, "drawing", free_bytes=free_bytes)
    assert done == double(range(33))
    assert sizes == [17, 16]


@pytest.mark.usefixtures("free")
def test_split_plans_again_when_later_items_are_larger():
    """Items of 8 bytes after items of 1 make smaller parts."""
    parts = [part for part, _ in BatchPlanner(CPU).split([1] * 32 + [8] * 32, sum, "scoring")]
    assert [item for part in parts for item in part] == [1] * 32 + [8] * 32
    assert max(map(sum, parts)) <= 32


@pytest.mark.usefixtures("free")
def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def work(items):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(BatchPlanner(CPU).run(range(3), len, work, "drawing"))


def test_nothing_fits(free):
    free(2e9)
    asked = []

    def remedies(missing):
        asked.append(missing)
        return ["--dtype int8"]

    with pytest.raises(InputError) as caught:
        BatchPlanner(CPU, None, remedies).chunks([3e9], sum, "drawing")
    assert str(caught.value) == (
        "drawing: one at a time takes 3.00 GB and cpu has 2.00 GB free; what would help: --dtype int8 or closing other "
        "programs"
    )
    assert asked == [1e9]


def test_one_at_a_time_runs_out(free):
    free(2e9)

    def work(items):
        raise FAILURES[1]

    with pytest.raises(InputError) as caught:
        list(BatchPlanner(CPU).run([1e9], sum, work, "scoring"))
    assert str(caught.value) == (
        "scoring: cpu ran out of memory with one at a time, which takes 1.00 GB of 2.00 GB free; what would help: "
        "closing other programs"
    )


def test_a_ceiling_below_one():
    with pytest.raises(InputError, match="the batch size must be at least 1, got 0"):
        BatchPlanner(CPU, 0)


def test_a_plan_is_told_once(free, caplog):
    caplog.set_level(logging.INFO, logger="cogview.planning.batches")
    free(32e9)
    planner = BatchPlanner(CPU)
    for _ in range(2):
        planner.chunks([1e9] * 33, sum, "drawing")
    assert [record.message for record in caplog.records] == [
        "drawing: 17 at a time of 33 (memory); 17.00 GB of 32.00 GB free"
    ]


def test_some_memory_stays_free(monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda device: 10**10)
    assert BatchPlanner(CPU).free() == 10**10 * (1 - planning.BATCH_MARGIN)
    monkeypatch.setattr(planning, "available_memory", lambda device: 10**8)
    assert BatchPlanner(CPU).free() == 10**8 - planning.MIN_FREE_BYTES["cpu"]
