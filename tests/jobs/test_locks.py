"""Processes that share a job: each result is made once, and chunks of dead processes are taken over."""

import errno
import json
import os
import random
import subprocess
import sys
import time

import pytest

import cogview.jobs.locks
from cogview.errors import InputError
from cogview.jobs.journal import DiskFull, JobJournal
from cogview.jobs.locks import JobLocks, run_chunks

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(cogview.jobs.locks.fcntl is None, reason="one process shares no job"),
]

NUM_ITEMS = 200
CHUNKS = [[f"狐狸-{item}" for item in range(first, first + 5)] for first in range(0, NUM_ITEMS, 5)]

# A process of a job: it writes a file for each item and records it in the journal.
WORKER = """
import os, sys, time
from pathlib import Path
from cogview.jobs.locks import JobLocks, run_chunks
from cogview.jobs.journal import JobJournal

folder, resume, seed, chunks = Path(sys.argv[1]), sys.argv[2] == "resume", int(sys.argv[3]), eval(sys.argv[4])
locks = JobLocks(folder / "job.ledger")
journal = JobJournal.open(folder / "job.ledger", {"seed": seed}, locks=locks, resume=resume, inherit_keys=["seed"])
print("open", flush=True)
sys.stdin.readline()

def work(number, names):
    for name in names:
        time.sleep(0.005)
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(f"{name} of seed {journal.header['seed']} in chunk {number}")
        os.replace(temporary, folder / f"{name}.txt")
        journal.record(name, by=os.getpid())

run_chunks(chunks, journal, locks, work)
print(len(journal.done))
"""

# A live process of a job that claims number 3 and does nothing.
HOLDER = """
import sys
from pathlib import Path
from cogview.jobs.locks import JobLocks
locks = JobLocks(Path(sys.argv[1]))
locks.register()
print(locks.try_claim(3), flush=True)
sys.stdin.read()
"""


def start(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@pytest.fixture
def start_holder(tmp_path):
    """Return a function that starts a process that claims number 3."""
    started = []

    def start_() -> subprocess.Popen:
        process = start(HOLDER, tmp_path / "job.ledger")
        started.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield start_
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def locks(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    locks = JobLocks(tmp_path / "job.ledger")
    yield locks
    locks.close()


@pytest.fixture
def journal(tmp_path, locks):
    journal = JobJournal.open(tmp_path / "job.ledger", {"seed": 7}, locks=locks, resume=False)
    yield journal
    journal.close()


def test_locks_release_the_claim_of_a_dead_process(locks, start_holder):
    assert not locks.has_live_peers()
    holder = start_holder()
    assert locks.has_live_peers()
    assert not locks.try_claim(3)
    assert locks.try_claim(2)
    holder.kill()
    holder.wait()
    assert not locks.has_live_peers()
    assert locks.try_claim(3)


def test_locks_release_a_claim(locks, tmp_path):
    assert locks.try_claim(3)
    refused = start(HOLDER, tmp_path / "job.ledger")
    assert refused.communicate("")[0] == "False\n"
    locks.release(3)
    accepted = start(HOLDER, tmp_path / "job.ledger")
    assert accepted.communicate("")[0] == "True\n"


def test_locks_has_live_peers_changes_nothing(locks, tmp_path):
    code = "import sys; from pathlib import Path; from cogview.jobs.locks import JobLocks\n"
    code += "print(JobLocks(Path(sys.argv[1])).has_live_peers())"

    def others_see_us():
        return start(code, tmp_path / "job.ledger").communicate()[0] == "True\n"

    locks.has_live_peers()
    assert not others_see_us()
    locks.register()
    locks.has_live_peers()
    assert others_see_us()


def test_locks_join_a_job_with_a_live_process(journal, tmp_path):
    journal.record("狐狸")
    joined = start(WORKER, tmp_path, "new", 8, [["狐狸", "狗"]])
    assert joined.communicate("\n") == ("open\n2\n", "")
    assert (tmp_path / "狗.txt").read_text(encoding="utf-8") == "狗 of seed 7 in chunk 0"
    journal.refresh()
    assert list(journal.done) == ["狐狸", "狗"]


def test_locks_refuse_an_old_journal_to_two_processes_that_start_at_once(locks, tmp_path):
    (tmp_path / "job.ledger").write_text('{"cogview_job": 1, "seed": 7}\n')
    other = start(WORKER, tmp_path, "new", 8, [["狐狸"]])  # this process has the locks, but not opened the journal
    assert "exists from an earlier run" in other.communicate()[1]


def test_locks_are_optional_where_unsupported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cogview.jobs.locks, "fcntl", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = tmp_path / "job.ledger"
    locks = JobLocks(path)
    journal = JobJournal.open(path, {}, locks=locks, resume=False)
    assert not locks.has_live_peers()
    assert locks.try_claim(0)
    run_chunks([["狐狸"], ["狗"]], journal, locks, lambda number, names: [journal.record(name) for name in names])
    assert list(journal.done) == ["狐狸", "狗"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} cannot be locked here, so each process does the whole job: start one"
    ]


def test_locks_run_chunks_skips_recorded_results(journal, locks):
    calls = []

    def work(number, names):
        calls.append((number, list(names)))
        for name in names:
            journal.record(name)

    chunks = [["a", "b"], ["c", "d"], ["e"]]
    for name in ("b", "e"):
        journal.record(name)
    run_chunks(chunks, journal, locks, work)
    assert calls == [(0, ["a"]), (1, ["c", "d"])]


def test_locks_run_chunks_releases_unrecorded_results(journal, locks, start_holder):
    calls = []
    run_chunks([[str(number)] for number in range(5)], journal, locks, lambda number, names: calls.append(number))
    assert calls == [0, 1, 2, 3, 4]
    start_holder()  # its claim of 3 succeeds


def test_locks_run_chunks_starts_each_rank_elsewhere(journal, locks, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    calls = []
    run_chunks([[str(number)] for number in range(7)], journal, locks, lambda number, names: calls.append(number))
    assert calls == [4, 5, 6, 0, 1, 2, 3]


@pytest.mark.parametrize(("rank", "size"), [("eins", "2"), ("2", "2"), ("0", "0")])
def test_locks_run_chunks_rejects_a_wrong_rank(journal, locks, monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError) as error:
        run_chunks([["a"]], journal, locks, lambda number, names: None)
    assert str(error.value) == (
        f'RANK "{rank}" and WORLD_SIZE "{size}" must be whole numbers, RANK from 0 to WORLD_SIZE - 1'
    )


def test_locks_run_chunks_stops_between_chunks(journal, locks):
    run_chunks(
        [["a", "b"], ["c"]],
        journal,
        locks,
        lambda number, names: [journal.record(name) for name in names],
        stop=lambda: len(journal.done) > 0,
    )
    assert list(journal.done) == ["a", "b"]


def test_locks_run_chunks_reports_a_full_disk_of_the_work(journal, locks):
    def work(number, names):
        journal.record("a")
        raise OSError(errno.ENOSPC, "No space left on device", "b.png")

    with pytest.raises(DiskFull, match=r"^the disk is full: 1 result is kept; --resume continues when there is space$"):
        run_chunks([["a", "b"]], journal, locks, work)


def test_locks_run_chunks_takes_over_the_chunk_of_a_dead_process(journal, locks, start_holder, monkeypatch):
    holder, calls = start_holder(), []
    monkeypatch.setattr(cogview.jobs.locks, "POLL_SECONDS", 0.01)
    looks = iter(range(100))

    def stop():
        if next(looks) == 10:  # it is waiting by then
            assert calls == [0, 1, 2, 4]
            holder.kill()
            holder.wait()
        return False

    run_chunks([[str(number)] for number in range(5)], journal, locks, lambda number, names: calls.append(number), stop)
    assert calls == [0, 1, 2, 4, 3]


def test_locks_run_chunks_waits_for_other_processes(journal, locks, start_holder, tmp_path, monkeypatch):
    start_holder()
    monkeypatch.setattr(cogview.jobs.locks, "POLL_SECONDS", 0.01)
    looks = iter(range(100))

    def stop():
        if next(looks) == 10:
            with (tmp_path / "job.ledger").open("a") as file:
                file.write('{"id": "3"}\n')
        return False

    def work(number, names):
        assert number != 3
        journal.record(*names)

    run_chunks([[str(number)] for number in range(5)], journal, locks, work, stop)
    assert list(journal.done) == ["0", "1", "2", "4", "3"]


def test_locks_run_chunks_does_not_wait_for_finished_chunks(journal, locks, start_holder, tmp_path, monkeypatch):
    def sleep(seconds):
        raise AssertionError("it waits")

    start_holder()
    monkeypatch.setattr(time, "sleep", sleep)

    def work(number, names):
        with (tmp_path / "job.ledger").open("a") as file:
            file.write('{"id": "3"}\n')

    run_chunks([["0"], ["1"], ["2"], ["3"], ["4"]], journal, locks, work)


def test_locks_make_each_result_once_when_processes_are_killed(tmp_path):
    """Three processes start together and are killed one by one; three others resume, one of which is killed."""
    rng = random.Random(0)
    journal = tmp_path / "job.ledger"

    def start_three(resume):
        processes = [  # each with another seed, as if chosen at random
            start(WORKER, tmp_path, resume, rng.randrange(10**6), CHUNKS, RANK=str(rank), WORLD_SIZE="3")
            for rank in range(3)
        ]
        for process in processes:
            assert process.stdout.readline() == "open\n", process.communicate()
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return processes

    def kill_one(processes, when):
        while journal.read_bytes().count(b"\n") < when:
            assert any(process.poll() is None for process in processes), [p.communicate() for p in processes]
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        process = processes.pop(rng.randrange(len(processes)))
        process.kill()
        process.communicate()

    processes = start_three("new")
    for when in (20, 40, 60):
        kill_one(processes, when)
    seed = json.loads(journal.read_text().splitlines()[0])["seed"]
    processes = start_three("resume")
    kill_one(processes, 100)
    for process in processes:
        assert process.communicate() == (f"{NUM_ITEMS}\n", "")
        assert process.returncode == 0

    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    names = [name for chunk in CHUNKS for name in chunk]
    assert sorted(line["id"] for line in lines) == sorted(names)
    assert {path.name: path.read_text() for path in tmp_path.glob("狐狸-*")} == {
        f"{name}.txt": f"{name} of seed {seed} in chunk {number}"
        for number, chunk in enumerate(CHUNKS)
        for name in chunk
    }
