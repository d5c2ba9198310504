"""Errors with a message for the user, and the exit statuses that stand for them."""

from __future__ import annotations

import errno
import re
from enum import IntEnum

from cogview.formatting import printable, shorten_middle

MAX_MESSAGE = 2000  # characters


class ExitStatus(IntEnum):
    """Exit statuses of the commands; after a signal it is 128 + its number, such as 130 after Ctrl-C."""

    DONE = 0
    PARTLY_DONE = 1  # some inputs were skipped or failed, the others are done
    MISTAKE = 2  # the command line or all of the input cannot be used
    RETRY_LATER = 3  # the same command can succeed later: disk or memory was full, a lock held, a server silent

    @classmethod
    def of(cls, done: int, failed: int) -> ExitStatus:
        """Return the status of a command on several inputs.

        Args:
            done: Number of results that were made.
            failed: Number of inputs that were skipped or failed.

        Returns:
            ``DONE`` if nothing failed, ``PARTLY_DONE`` if there are results as well, else ``MISTAKE``.
        """
        if not failed:
            return cls.DONE
        return cls.PARTLY_DONE if done else cls.MISTAKE


class InputError(ValueError):
    """A value that the user gave cannot be used.

    The message is one line: the value, what was expected, the remedy. Commands print it and exit with status 2.
    Callers of the library catch it as a ``ValueError``. Any other exception is a bug of the toolkit.

    Args:
        message: The message. Control characters in it, of names in archives or answers of servers, become escapes, and
            the middle of a message of more than ``MAX_MESSAGE`` characters is left out: a value may be a whole file.
    """

    def __init__(self, message: str = "") -> None:
        escaped = "\n".join(map(printable, shorten_middle(message, MAX_MESSAGE).split("\n")))
        super().__init__(shorten_middle(escaped, MAX_MESSAGE))


class RetryLaterError(InputError):
    """An ``InputError`` that may pass: disk or memory is full, another process holds a lock, a server is silent.

    The message is one line: what is missing, what was kept, the remedy. Commands print it and exit with status 3.
    """


class ReportedByPeer(InputError):
    """An ``InputError`` that another process of the same run reports: this one exits with status 2, silently."""


_ERRNO = re.compile(r"\[Errno -?\d+\] ")
_DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of a file (ulimit -f) is reached",
}
# Of PyTorch's allocators, of libraries of CUDA, and of threads that get no stack. All are plain RuntimeErrors.
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "can't start new thread", "Cannot allocate", "ALLOC_FAILED")


def disk_full_reason(error: OSError) -> str | None:
    """Return the reason in words if ``error`` is about missing space on a disk; None for any other error."""
    return _DISK_FULL.get(error.errno or 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` reports that the host or a device is out of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_reported = isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)
    return is_reported or isinstance(error, MemoryError)


def reason_of(error: BaseException) -> str:
    """Return the reason in words, without the number of the operating system and the path that ``str`` adds."""
    inner = getattr(error, "reason", None)  # of urllib
    if isinstance(inner, BaseException):
        return reason_of(inner)
    # Libraries that wrap an error keep its number in the text.
    return getattr(error, "strerror", None) or _ERRNO.sub("", str(error)) or type(error).__name__
