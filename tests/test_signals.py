"""Signals that stop work at its next boundary, and workers that outlive them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cogview.signals import GracefulStop, StoppedBySignal, exit_status_of_signal, terminable, worker_init


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
        with pytest.raises(StoppedBySignal) as caught:
            signal.raise_signal(number)
        assert caught.value.number == number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_graceful_stop_has_a_message_and_a_status_for_each_signal(usual_handlers, capfd, number, status):
    """Nobody who sends SIGTERM can press Ctrl-C."""
    with GracefulStop({signal.SIGINT: "press Ctrl-C again", signal.SIGTERM: "send SIGTERM again"}) as stop:
        signal.raise_signal(number)
    assert stop.number is not None
    assert exit_status_of_signal(stop.number) == status
    assert capfd.readouterr().err == ("press Ctrl-C again\n" if number == signal.SIGINT else "send SIGTERM again\n")


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


PROGRAM = """
import multiprocessing, os, sys
from multiprocessing import forkserver, resource_tracker
import numpy as np
from torch.utils.data import DataLoader
from cogview.signals import worker_init

loader = DataLoader(
    np.arange(10**6),
    num_workers=2,
    worker_init_fn=worker_init,
    multiprocessing_context=sys.argv[1],
)
batches = iter(loader)
next(batches)
helpers = [worker.pid for worker in batches._workers]
if sys.argv[1] == "forkserver":
    helpers += [forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid]
print(*helpers, flush=True)
input()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_worker_init_ends_every_helper_process_of_a_killed_training(method):
    """Workers that went on would hold their parent's connections and memory, under the init process, for ever."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, method], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    helpers = [int(number) for number in parent.stdout.readline().split()]
    assert len(helpers) == (2 if method == "fork" else 4)
    assert all(map(_runs, helpers))
    parent.kill()
    deadline = time.monotonic() + 10
    while any(map(_runs, helpers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.communicate()


def _runs(number):
    try:
        with Path(f"/proc/{number}/stat").open() as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_terminable_turns_sigterm_into_an_interruption(usual_handlers):
    """SIGTERM ended ``cogview generate`` without a message, and left its temporary files."""
    with terminable():
        with pytest.raises(StoppedBySignal) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second one ends the process
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_terminable_leaves_other_handlers(usual_handlers):
    for handler in (signal.SIG_IGN, lambda *_: None):
        signal.signal(signal.SIGTERM, handler)
        with terminable():
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_terminable_lets_a_forked_child_end_by_the_signal(usual_handlers):
    """A pool that ends its workers by SIGTERM must not get an exception out of each."""
    with terminable():
        if (child := os.fork()) == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
