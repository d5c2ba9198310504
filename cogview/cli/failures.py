"""Errors of the operating system, of memory and of PyTorch, explained in one line with a remedy.

The module is imported before memory may be short, so that it needs little of it to explain that.
"""

from __future__ import annotations

import errno
import sys

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

from cogview.errors import ExitStatus, InputError, RetryLaterError, disk_full_reason, is_out_of_memory, reason_of
from cogview.formatting import format_gigabytes

# What the system says by its number, and what the user can do.
_MISTAKES = {
    errno.ENOENT: ("there is no such file or folder", "check its name"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path"),
    errno.EISDIR: ("it is a folder", "give the name of a file"),
    errno.EEXIST: ("it exists already", "remove it, or choose another name"),
    errno.EACCES: ("the permission is denied", "change its permissions, or choose another path"),
    errno.EPERM: ("the permission is denied", "change its permissions, or choose another path"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "choose a shorter one"),
    errno.ELOOP: ("its links lead in a circle", "choose another path"),
    errno.EIO: ("the disk or the network reports an error", "check it, or choose another folder"),
}
_PASSING = {
    errno.EMFILE: ("too many files are open", "raise the limit with ulimit -n"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
    errno.EAGAIN: ("no further process or thread can be started", "close other programs, or raise ulimit -u"),
}


def explain_error(error: BaseException) -> tuple[str, ExitStatus] | None:
    """Return the line and the exit status for an error that a user can mend.

    Args:
        error: Any exception.

    Returns:
        The line: what failed, and the remedy; None for a bug of the toolkit.
    """
    if isinstance(error, InputError):
        return str(error), ExitStatus.RETRY_LATER if isinstance(error, RetryLaterError) else ExitStatus.MISTAKE
    if _is_about_memory(error):
        return _explain_memory(), ExitStatus.RETRY_LATER
    if isinstance(error, OSError):
        return _explain_system(error)
    dispatch = sys.modules.get("cogview.kernels.dispatch")  # imported with PyTorch
    if dispatch is not None and isinstance(error, dispatch.ForcedKernelsError):
        return str(error), ExitStatus.MISTAKE
    return None


def _explain_system(error: OSError) -> tuple[str, ExitStatus]:
    """Return the line and the status for an error of the operating system."""
    number = error.errno or 0
    if (full := disk_full_reason(error)) is not None:
        remedy = "raise the limit" if number == errno.EFBIG else "free some space, or choose another folder"
        return f"{full}; finished results are kept; {remedy}", ExitStatus.RETRY_LATER
    status = ExitStatus.RETRY_LATER if number in _PASSING else ExitStatus.MISTAKE
    known = _PASSING.get(number) or _MISTAKES.get(number)
    where = "" if error.filename is None else f"{error.filename}: "
    return where + (f"{known[0]}; {known[1]}" if known else reason_of(error)), status


def _explain_memory() -> str:
    """Return the line for exhausted memory."""
    advice = "use less: a smaller --max-inference-batch-size, --dtype or --model"
    if (limit := _memory_limit()) is not None:
        allowed = format_gigabytes(limit)
        return f"the memory that ulimit allows ({allowed}) is full; finished results are kept; raise it, or {advice}"
    return f"the memory is full; finished results are kept; free some, or {advice}"


def _is_about_memory(error: BaseException) -> bool:
    """Return whether an error has its cause in exhausted memory.

    Below a limit of the address space, the interpreter fails with a SystemError, and libraries cannot be loaded.
    """
    if is_out_of_memory(error):
        return True
    return isinstance(error, SystemError | ImportError) and _memory_limit() is not None


def _memory_limit() -> int | None:
    """Return the bytes that ``ulimit -v`` or ``ulimit -d`` allows this process; None for no limit."""
    if resource is None:
        return None
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=None)
