"""Unpickle rows of CogView v1 datasets without running code.

numpy's own functions are never called: a malicious pickle could make them treat numbers as addresses. The stand-ins
below only assemble numbers.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np


class _Dtype:
    """Stand-in for ``numpy.dtype``: numbers of up to 8 bytes."""

    def __init__(self, name: str, *_: object) -> None:
        if not re.fullmatch("[iu][1248]|f[248]", name):
            raise pickle.UnpicklingError(f"it holds an array of {name}, expected whole numbers")
        self.numpy = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.numpy = self.numpy.newbyteorder(">")


class _Array:
    """Stand-in for ``numpy.ndarray``; ``ids`` is the array once the pickle has filled it."""

    def __init__(self, *_: object) -> None:
        self.ids: np.ndarray = np.zeros(0, dtype=np.int64)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        self.fill(content, dtype, shape, "F" if is_fortran else "C")

    def fill(self, content: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> None:
        self.ids = np.frombuffer(content, dtype.numpy).reshape(shape, order=order)


def _array_of_buffer(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.fill(content, dtype, shape, order)
    return array


def _scalar(dtype: _Dtype, content: Any) -> int | float:
    number: int | float = np.frombuffer(content, dtype.numpy)[0].item()
    return number


def _bytes_of_text(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")


# Globals in the pickles of numpy 1 and 2, protocols 0 to 5, and their stand-ins.
_SAFE_GLOBALS: Final[dict[tuple[str, str], Callable[..., object]]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _bytes_of_text,  # bytes, up to protocol 2
    ("__builtin__", "bytes"): lambda: b"",  # empty ones
    **{
        (f"numpy.{core}.{name}", function): stand_in
        for core in ("core", "_core")
        for name, function, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_of_buffer),
        )
    },
}


_MAX_IDS = 1 << 16  # of a row of a table, which has 64


class RowUnpickler(pickle.Unpickler):
    """Unpickle a row: arrays of numbers, numpy scalars and Python's built-in values.

    Arrays become objects whose ``ids`` is the numpy array.

    Raises:
        ForbiddenGlobal: if the pickle names anything else; nothing is run.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a global of the pickle.

        Args:
            module: its module.
            name: its name.

        Raises:
            ForbiddenGlobal: if there is no stand-in.
        """
        if (module, name) not in _SAFE_GLOBALS:
            raise ForbiddenGlobal(f"asks to run {module}.{name}, which no row of ids needs")
        return _SAFE_GLOBALS[module, name]


class ForbiddenGlobal(pickle.UnpicklingError):
    """A pickle names a global that no row of ids needs."""


def numbers_of(value: object) -> np.ndarray:
    """Return whole numbers as a flat int64 array; raise ValueError for anything else."""
    if not isinstance(value, (_Array, list, tuple)):
        raise ValueError(f"holds {type(value).__name__} where an array of ids is expected")
    if isinstance(value, (list, tuple)) and value and all(isinstance(row, (list, tuple)) for row in value):
        value = [number for row in value for number in row[:_MAX_IDS]]  # a table
    if isinstance(value, (list, tuple)) and any(isinstance(number, (list, tuple, _Array)) for number in value):
        raise ValueError("holds a list of other things than ids")  # before numpy multiplies lists of lists
    ids = (value.ids if isinstance(value, _Array) else np.asarray(value)).ravel()
    if ids.dtype.kind == "f":  # numpy makes an empty array, and one joined to it, an array of floats
        if (broken := ~((np.floor(ids) == ids) & (np.abs(ids) < 2**53))).any():
            raise ValueError(f"holds {ids[broken.argmax()]}, expected whole numbers")
    elif ids.dtype.kind not in "iu":
        raise ValueError("holds a list of other things than ids")
    return ids.astype(np.int64)
