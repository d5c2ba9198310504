"""What a kind of input is: valid files, and the function that reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Reader:
    """One kind of input.

    Attributes:
        make: Writes valid files into a folder: a folder for each variant.
        read: Reads the files of a variant.
        allowed: Errors that the reader documents beside ``InputError``.
        minimum: Number of inputs to try in any case.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    allowed: tuple[type[Exception], ...] = field(default=())
    minimum: int = 20
