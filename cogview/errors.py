"""Errors that stand for a mistake of the user."""


class InputError(ValueError):
    """A value that the user gave cannot be used.

    The message is one line: the value, what was expected, the remedy. Commands print it and exit with status 2.
    Callers of the library catch it as a ``ValueError``. Any other exception is a bug of the toolkit.
    """


class ReportedByPeer(InputError):
    """An ``InputError`` that another process of the same run reports: this one exits with status 2, silently."""
