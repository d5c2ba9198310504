"""Variables of the environment that launchers and users set: ranks, numbers, choices and folders.

Every function reads a variable when it is called, and raises ``InputError`` for a value that cannot be used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from cogview.errors import InputError
from cogview.formatting import shorten

MAX_SHOWN = 40  # characters of a value in a message
_MAX_DIGITS = 9  # of a rank, a port or a number of threads
STARTED = time.time()  # of this process, nearly: commands import this module first


def number_variable(name: str, default: int) -> int:
    """Return a variable of a launcher as a whole number of at least 0.

    Args:
        name: Name of the variable, such as LOCAL_RANK.
        default: Its value where it is not set.

    Raises:
        InputError: The variable is something else.
    """
    given = os.environ.get(name)
    if given is None:
        return default
    if not _is_whole(given):
        raise InputError(f"{name} is {shorten(given, MAX_SHOWN)!r}, expected a whole number; start with torchrun")
    return int(given)


def rank_and_world_size() -> tuple[int, int]:
    """Return RANK and WORLD_SIZE, by default 0 and 1.

    Raises:
        InputError: They are not whole numbers with 0 <= RANK < WORLD_SIZE.
    """
    rank, size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (_is_whole(rank) and _is_whole(size) and int(rank) < int(size)):
        rank, size = shorten(rank, MAX_SHOWN), shorten(size, MAX_SHOWN)
        raise InputError(f'RANK "{rank}" and WORLD_SIZE "{size}" must be whole numbers, RANK from 0 to WORLD_SIZE - 1')
    return int(rank), int(size)


def is_of_this_launch(moment: float) -> bool:
    """Return whether something happened since a launcher started this process among others.

    Args:
        moment: Seconds since the epoch, such as the modification time of a file.

    Raises:
        InputError: RANK or WORLD_SIZE is wrong.
    """
    return rank_and_world_size()[1] > 1 and moment >= STARTED


def is_first_process() -> bool:
    """Return whether this process prints the notes and the progress of all processes that were started together."""
    return number_variable("RANK", 0) == 0


def threads_variable() -> int | None:
    """Return OMP_NUM_THREADS, of the outer level if it is a list; None where it is not set.

    Raises:
        InputError: It is not a positive number, or a list of them.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None:
        return None
    levels = [level.strip() for level in given.split(",")]
    if not all(_is_whole(level) and int(level) for level in levels):
        raise InputError(
            f"OMP_NUM_THREADS is {shorten(given, MAX_SHOWN)!r}, expected a number of threads from 1; unset it for all "
            "processors"
        )
    return int(levels[0])


def choice_variable(name: str, choices: Sequence[str]) -> str | None:
    """Return a variable with few values, None where it is not set.

    Args:
        name: Name of the variable.
        choices: The values that it may have.

    Raises:
        InputError: It has another value.
    """
    given = os.environ.get(name)
    if given is not None and given not in choices:
        raise InputError(f"{name}={shorten(given, MAX_SHOWN)!r} is unknown; known: {', '.join(choices)}")
    return given


def folder_variable(name: str) -> Path | None:
    """Return the folder that a variable names, None where it is not set or empty.

    Args:
        name: Name of the variable; the value may start with ``~`` or ``~user``.

    Raises:
        InputError: The user has no home folder here.
    """
    given = os.environ.get(name)
    if not given:
        return None
    try:
        return Path(given).expanduser()
    except RuntimeError:
        shown = shorten(given, MAX_SHOWN)
        raise InputError(f"{name} is {shown!r}: there is no such home folder; set it to an absolute path") from None


def _is_whole(text: str) -> bool:
    """Return whether ``text`` is a whole number of a size that a rank, a port or a number of threads can have."""
    return text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS
