"""The cache in which PyTorch compiles extensions, for those of DeepSpeed that a recipe's ``engine.config`` asks for.

The process that compiles an extension holds a file ``lock`` open beside it. If it is killed, the file stays, and every
later start waits for its removal for ever.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY_EXTENSION = "deepspeed_shm_comm"  # its all-reduce between processes of one machine with CPUs


def extensions_folder() -> Path:
    """Return the folder in which PyTorch caches the extensions of this version of Python, an inner folder for each."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("", False))


def stale_locks() -> list[Path]:
    """Return the lock files in the cache that no process of this machine holds; none where that cannot be found out."""
    locks = sorted(extensions_folder().glob("*/lock"))
    if not locks or not Path("/proc/self/fd").is_dir():
        return []
    held = set[Path]()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # of another user, or closed meanwhile
            held.add(descriptor.readlink())
    return [lock for lock in locks if lock.resolve() not in held]


def remove_stale_locks() -> None:
    """Remove stale locks from the cache, with a line about each on stderr."""
    for lock in stale_locks():
        lock.unlink(missing_ok=True)
        print(
            f"removed {lock}: a compilation that was killed had left it, and DeepSpeed would wait for it for ever",
            file=sys.stderr,
        )
