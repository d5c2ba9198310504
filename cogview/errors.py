"""Errors with a message for the user, and the exit statuses that stand for them."""

from __future__ import annotations

from enum import IntEnum

from cogview.formatting import printable


class ExitStatus(IntEnum):
    """Exit statuses of the commands; after a signal it is 128 + its number, such as 130 after Ctrl-C."""

    DONE = 0
    PARTLY_DONE = 1  # some inputs were skipped or failed, the others are done
    MISTAKE = 2  # the command line or all of the input cannot be used
    RETRY_LATER = 3  # the same command can succeed later: the disk or the memory was full, or a lock was held


class InputError(ValueError):
    """A value that the user gave cannot be used.

    The message is one line: the value, what was expected, the remedy. Commands print it and exit with status 2.
    Callers of the library catch it as a ``ValueError``. Any other exception is a bug of the toolkit.

    Args:
        message: The message. Control characters in it, of names in archives or answers of servers, become escapes.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


class RetryLaterError(InputError):
    """An ``InputError`` that may pass: space on a disk or memory is missing, or another process holds a lock.

    The message is one line: what is missing, what was kept, the remedy. Commands print it and exit with status 3.
    """


class ReportedByPeer(InputError):
    """An ``InputError`` that another process of the same run reports: this one exits with status 2, silently."""
