"""Damaged files of every kind that users give: each is read, or refused in one line.

A failure names the kind and the number of the input; ``python -m tests.fuzz.worker KIND NUMBER`` repeats it. The
damaged files stay in the temporary folder of the test. A run tries a fixed number of each kind, or as many
as ``COGVIEW_FUZZ_SECONDS`` allow for each.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.faults import MEMORY, make_faults
from tests.fuzz.readers import READERS
from tests.fuzz.worker import SOUND, Worker

SECONDS = float(os.environ.get("COGVIEW_FUZZ_SECONDS", "0"))
FIRST = int(os.environ.get("COGVIEW_FUZZ_FIRST", "0"))  # number of the first input


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", READERS)
def test_readers_refuse_damaged_files_in_one_line(kind: str, worker: Worker, tmp_path: Path) -> None:
    """No file makes a reader raise another error than InputError, hang, take much memory or die."""
    reader = READERS[kind]
    reader.make(tmp_path / "seed")
    sound = worker.try_input(kind, SOUND, tmp_path / "seed", tmp_path / "sound")
    assert sound.kind in ("read", "refused"), sound.text
    counts: Counter[str] = Counter()
    failures = []
    begin, number = time.monotonic(), FIRST
    while number - FIRST < reader.minimum or time.monotonic() - begin < SECONDS:
        outcome = worker.try_input(kind, number, tmp_path / "seed", tmp_path / f"case-{number}")
        counts[outcome.kind] += 1
        if outcome.failed:
            failures.append(f"{kind}, input {number} ({outcome.damage}): {outcome.kind}: {outcome.text}")
        number += 1
    print(f"{kind}: {dict(counts)}")
    assert not failures, f"{len(failures)} of {number - FIRST}\n" + "\n".join(failures)
    assert counts["read"] + counts["refused"] >= reader.minimum


@pytest.mark.slow
@pytest.mark.multiprocess
def test_worker_notices_every_kind_of_failure(tmp_path: Path) -> None:
    """The process that dies or hangs is replaced by a new one, and the next input is tried."""
    make_faults(tmp_path / "seed")
    worker = Worker("tests.fuzz.faults", cpu_seconds=1.0, growth=MEMORY // 2)
    try:
        outcomes = [
            worker.try_input("faults", number, tmp_path / "seed", tmp_path / f"{number}") for number in range(7)
        ]
    finally:
        worker.close()
    assert [outcome.kind for outcome in outcomes] == ["read", "refused", "error", "hang", "memory", "death", "read"]
    assert [outcome.failed for outcome in outcomes] == [False, False, True, True, True, True, False]
    assert "KeyError: 'updates'" in outcomes[2].text
    assert outcomes[5].text == "the process ended: SIGBUS"
