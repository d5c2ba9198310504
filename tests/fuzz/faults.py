"""A reader with every kind of failure, for the test of the process that notices them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from cogview.errors import InputError
from tests.fuzz.reader import Reader

MEMORY = 60 << 20  # bytes


def make_faults(folder: Path) -> None:
    """Write a file for each fault."""
    for name in ("0-sound", "1-refused", "2-error", "3-hang", "4-memory", "5-death"):
        (folder / name).mkdir(parents=True)
        (folder / name / name).touch()


def commit_fault(folder: Path) -> None:
    """Do what the name of the file says."""
    name = next((path.name for path in folder.iterdir()), "")
    if name == "1-refused":
        raise InputError("refused")
    if name == "2-error":
        raise KeyError("updates")
    while name == "3-hang":
        pass
    if name == "4-memory":
        bytearray(b"1") * MEMORY
    if name == "5-death":
        os.kill(os.getpid(), signal.SIGBUS)


READERS = {"faults": Reader(make_faults, commit_fault)}
