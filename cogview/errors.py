"""The one error that stands for a user's mistake."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what came, what was expected, the remedy. Commands print it and exit with
    status 2; whoever calls the library catches it as a ``ValueError``. Any other exception is a bug of ours.
    """


class ReportedByPeer(InputError):
    """A mistake that another process of the same run tells: this one stops with status 2 and says nothing."""
