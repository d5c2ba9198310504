"""Ctrl-C and SIGTERM: finish the work under way, and keep data loader workers alive until then."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedBySignal(KeyboardInterrupt):
    """Raised by the second signal within a ``GracefulStop``, and by SIGTERM within ``terminable``.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_status_of_signal(number: int) -> int:
    """Return the exit status of a command that a signal has stopped: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


class GracefulStop:
    """Within ``with``, the first SIGINT or SIGTERM only requests a stop; a second one raises ``StoppedBySignal``.

    A signal that the process ignores stays ignored: a shell starts programs in the background like that.

    Attributes:
        number: The signal that requested the stop; None before.
    """

    def __init__(self, message: str | Mapping[int, str] | None = None) -> None:
        """Prepare to handle signals.

        Args:
            message: Line for stderr when a stop is requested, or one for each signal; None in processes that print
                nothing. A stream with a method ``as_line`` puts it into the form of its lines, such as a translation.
        """
        self.number: int | None = None
        as_line: Callable[[str], str] = getattr(sys.stderr, "as_line", str)
        given = message if isinstance(message, Mapping) else {number: message for number in STOP_SIGNALS}
        self._messages = {number: None if text is None else as_line(text) for number, text in given.items()}
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """Return whether a signal has requested a stop."""
        return self.number is not None

    def __enter__(self) -> GracefulStop:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise StoppedBySignal(number)
        self.number = number
        if (message := self._messages[number]) is not None:
            # Not print(): the signal may have come in the middle of one. A progress bar may stand in the line.
            line = message + "\n"
            os.write(2, ("\n" + line if sys.stderr.isatty() else line).encode())


@contextmanager
def terminable() -> Iterator[None]:
    """Within ``with``, SIGTERM raises ``StoppedBySignal``, so that a command ends as it does by Ctrl-C.

    A second SIGTERM ends the process at once, as does one to a forked child. Another handler, or a SIGTERM that is
    ignored, stays; outside the main thread nothing changes.
    """
    number, owner = signal.SIGTERM, os.getpid()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:
            os.kill(os.getpid(), number)
        raise StoppedBySignal(number)

    signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


def worker_init(worker: int) -> None:
    """Initialize a ``DataLoader`` worker: it ignores SIGINT and SIGTERM and ends with the process that started it.

    Ctrl-C reaches the workers too, and the step under way still needs their batches. A worker ends even if its process
    is killed. It would otherwise hold inherited connections, for which other processes would wait, and keep the fork
    server and the resource tracker of ``multiprocessing`` alive.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process as soon as the process that started it by ``multiprocessing`` has ended."""
    parent = multiprocessing.parent_process()  # behind a fork server, another one than os.getppid()
    if parent is not None:
        parent.join()
        os._exit(1)
