"""Read and write safetensors files one tensor at a time, so that no second copy of a model is held.

The files are read by the safetensors library. It can only write tensors that are all in memory, hence this writer.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogview.errors import InputError, reason_of
from cogview.input_files import open_regular

_CODES = {  # dtypes by their names in the format
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _CODES.items()}
_MAX_ELEMENTS = 1 << 48  # of a tensor; the sizes of an empty one may be anything
# Last parts of tensor names in files of earlier versions, and their present names.
RENAMED_TENSORS = {"scale_zero": "scales_and_zeros"}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightsFile:
    """A safetensors file. ``specs`` follows from its header alone.

    ``read`` maps one tensor into memory and closes the file with it, so that pages of converted tensors do not count as
    memory of this process.

    Args:
        path: the file.

    Raises:
        InputError: if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path} is missing")
        self.path = path
        self._kept: safe_open | None = None
        with self._open() as file:
            self._stored_names = {_present_name(name): name for name in file.keys()}  # noqa: SIM118  no mapping
            parts = {name: file.get_slice(stored) for name, stored in self._stored_names.items()}
            for name, part in parts.items():
                if part.get_dtype() not in _CODES:
                    raise InputError(f"{path} holds {name} as {part.get_dtype()}; known: {', '.join(_CODES)}")
                if math.prod(max(size, 1) for size in part.get_shape()) > _MAX_ELEMENTS:
                    raise InputError(f"{path} is damaged: {name} has the shape {part.get_shape()}")
            self.specs = {
                name: TensorSpec(_CODES[part.get_dtype()], tuple(part.get_shape())) for name, part in parts.items()
            }

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(spec.num_bytes for spec in self.specs.values())

    def read(self, name: str, *, keep: bool = False) -> Tensor:
        """Read a tensor, mapped from the file; writing to it copies the page and leaves the file unchanged.

        Args:
            name: name of the tensor.
            keep: share one mapping with all other kept tensors.

        Returns:
            The tensor.
        """
        if keep:
            self._kept = self._kept or self._open()
            kept: Tensor = self._kept.get_tensor(self._stored_names[name])
            return kept
        with self._open() as file:
            tensor: Tensor = file.get_tensor(self._stored_names[name])
        return tensor

    def prefetch(self) -> None:
        """Read the file in the background, so that its pages are in the system's cache when they are touched.

        Touching them one by one waits for the disk in between; asking the system to read ahead helps less.
        """
        # The thread gets the path alone: it must not keep this object, and with it the mapping, alive.
        Thread(target=_read_through, args=(self.path,), daemon=True).start()

    def _open(self) -> safe_open:
        return open_safetensors(self.path)


def open_safetensors(path: Path) -> safe_open:
    """Open a safetensors file; its tensors are mapped into memory when they are read.

    Args:
        path: the file.

    Raises:
        InputError: if the file is missing or damaged.
    """
    open_regular(path).close()
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {' '.join(reason_of(error).split())}") from None


def _read_through(path: Path) -> None:
    """Read a file from its first byte to its last, and forget it."""
    block = bytearray(1 << 24)
    with suppress(OSError), path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


class WeightsWriter:
    """Write a safetensors file of tensors whose specs are known; a context manager.

    The space is reserved at once, so that a full disk shows before the work. Tensors may come in any order, and all of
    them must come.

    Args:
        path: the file.
        specs: dtype and shape of every tensor.

    Raises:
        OSError: if the disk is too small.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        # Large elements first, so that every tensor lies at a multiple of its element size and can be mapped.
        order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
        self._specs, self._offsets, end = dict(specs), {}, 0
        header: dict[str, object] = {}
        for name in order:
            spec = specs[name]
            self._offsets[name] = end
            end += spec.num_bytes
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [self._offsets[name], end],
            }
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        self._first = 8 + len(packed)
        self._file = path.open("wb")
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, self._first + end)
            self._file.write(struct.pack("<Q", len(packed)) + packed)
        except OSError:
            self._file.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor.

        Args:
            name: name of the tensor; each is written once.
            tensor: a tensor of the announced dtype and shape, on any device.

        Raises:
            ValueError: if dtype or shape differ from the specs.
        """
        spec = self._specs[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced was {spec}")
        self._file.seek(self._first + self._offsets.pop(name))
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(raw.numpy().data)

    def __enter__(self) -> WeightsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._offsets:
            raise ValueError(
                f"{len(self._offsets)} tensors were announced and not written: {next(iter(self._offsets))}"
            )


def _present_name(name: str) -> str:
    """Return the present name of a tensor that a file stores as ``name``."""
    head, dot, last = name.rpartition(".")
    return f"{head}{dot}{RENAMED_TENSORS.get(last, last)}"


def describe_mismatch(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str | None:
    """Compare names and shapes of tensors.

    Args:
        wanted: expected shapes by name.
        found: shapes of the file by name.

    Returns:
        The first difference in words, or None if there is none.
    """
    for name, shape in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != shape:
            return f"{name} has the shape {list(found[name])}, expected {list(shape)}"
    return next((f"{name} is unknown" for name in found if name not in wanted), None)
