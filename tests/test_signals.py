"""Signals that stop work at its next boundary, and workers that outlive them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cogview.signals import GracefulStop, worker_init


@pytest.fixture
def usual_handlers():
    """The usual handlers, whatever the tests were started with."""
    before = [
        (number, signal.signal(number, handler))
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    ]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_graceful_stop_stops_at_the_first_signal_and_interrupts_at_the_second(usual_handlers, capfd, number):
    with GracefulStop("finishing this batch") as stop:
        assert not stop.requested()
        assert stop.number is None
        signal.raise_signal(number)
        assert stop.requested()
        assert stop.number == number
        assert capfd.readouterr().err == "finishing this batch\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_graceful_stop_leaves_an_ignored_signal_ignored(usual_handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with GracefulStop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_graceful_stop_prints_nothing_without_a_message(usual_handlers, capfd):
    with GracefulStop() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.requested()
    assert capfd.readouterr().err == ""


def test_graceful_stop_restores_handlers_after_an_error(usual_handlers):
    with pytest.raises(ZeroDivisionError), GracefulStop():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.multiprocess
def test_worker_init_lets_workers_survive_the_signals_of_their_group():
    """Ctrl-C in a terminal reaches the workers too; the step under way still needs their batches."""
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(
        np.arange(8), batch_size=2, num_workers=1, worker_init_fn=worker_init, prefetch_factor=1
    )
    batches = iter(loader)
    received = [next(batches).tolist()]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(batches._workers[0].pid, number)
    received += [batch.tolist() for batch in batches]
    assert received == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a process with its parent")
def test_worker_init_ends_a_worker_whose_parent_was_killed():
    """A worker that went on would hold its parent's connections to other processes, which then wait for the dead."""
    program = (
        "import os, time\n"
        "from cogview.signals import worker_init\n"
        "read, write = os.pipe()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    worker_init(0)\n"
        "    os.write(write, b'.')\n"
        "    time.sleep(60)\n"
        "os.read(read, 1)\n"
        "print(child, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(number):
    try:
        with Path(f"/proc/{number}/stat").open() as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
