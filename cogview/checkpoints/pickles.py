"""Read PyTorch files without executing anything, and write them.

A ``.pt`` file is a pickle, and a pickle may call any function. The reader here knows a short list of names and builds
inert objects for them; a file that names anything else is refused before anything has run. ``torch.load`` with
``weights_only=True`` does not serve: it reads whole tensors, and neither tensors in a tar nor the globals of old
optimizers. Here a :class:`StoredTensor` points to its bytes, so that the shapes of 8 GB are known in milliseconds and a
conversion holds one tensor at a time. Both layouts are read: the zip archive (torch 1.6 and later) and the older one,
alone or inside a tar.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import struct
import types
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cogview.errors import InputError, reason_of
from cogview.formatting import printable
from cogview.pickle_limits import MAX_BYTES, bounded_pickle

MAX_RANK = 16
MAX_SIZE = 1 << 48  # elements of a dimension

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file older than the zip layout
_DTYPES = {
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Double": torch.float64,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
# Parts of random states and old optimizers. They are not needed: an inert object replaces them.
_IGNORED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("collections", "defaultdict"),
    ("collections", "Counter"),
    ("builtins", "dict"),  # default of a defaultdict
    ("__builtin__", "dict"),
    ("torch", "device"),
}


@dataclass(eq=False)
class _Storage:
    """Numbers that tensors of a file share. ``offset`` is known once the file has been read to its end."""

    dtype: torch.dtype
    key: str
    offset: int = -1
    size: int = -1  # bytes that the file has for it
    crc: int | None = None  # of a zip archive; None once it was found right, and for files without checksums


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is still in its file."""

    file: IO[bytes]
    storage: _Storage
    start: int  # elements of the storage before the first
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored numbers."""
        return self.storage.dtype

    @property
    def has_checksum(self) -> bool:
        """Whether the file has a checksum of the numbers that they are still to be compared with."""
        return self.storage.crc is not None

    @property
    def num_bytes(self) -> int:
        """Size in memory, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the tensor.

        Returns:
            A contiguous tensor in new memory.

        Raises:
            InputError: if the file ends before the tensor does.
        """
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        self.check_bounds()
        size, first = span * self.dtype.itemsize, self.start * self.dtype.itemsize
        self._check_storage(size)
        raw = torch.empty(size, dtype=torch.uint8)
        self.file.seek(self.storage.offset + first)
        if self.file.readinto(raw.numpy().data) != size:  # type: ignore[attr-defined]
            raise InputError("the file is cut short: it ends inside a tensor")
        if self.storage.crc is not None and size == self.storage.size:
            self._compare(zlib.crc32(raw.numpy().data))
        return raw.view(self.dtype).as_strided(self.shape, self.stride).contiguous()

    def check_bounds(self) -> None:
        """Raise InputError if the shape has more elements than the storage, or reaches beyond it."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        if 0 not in self.shape and (self.start + max(span, math.prod(self.shape))) * self.dtype.itemsize > (
            self.storage.size
        ):
            raise InputError("the file is damaged: a tensor reaches beyond its numbers")

    def _check_storage(self, size: int) -> None:
        """Compare the checksum of a storage of which the tensor is a part."""
        if self.storage.crc is None or size == self.storage.size:
            return
        crc, left = 0, self.storage.size
        self.file.seek(self.storage.offset)
        while left and (block := self.file.read(min(left, 1 << 24))):
            crc, left = zlib.crc32(block, crc), left - len(block)
        self._compare(crc)

    def _compare(self, crc: int) -> None:
        """Raise InputError if ``crc`` is not the checksum of the storage."""
        if crc != self.storage.crc:
            raise InputError(f"the file is damaged: the numbers of {printable(self.storage.key)} differ from their CRC")
        self.storage.crc = None


def read_pickle(file: IO[bytes], where: str) -> Any:
    """Read a file of ``torch.save``, with :class:`StoredTensor` for tensors.

    Args:
        file: the open file; it must stay open as long as its tensors are read.
        where: name of the file for messages.

    Returns:
        The content.

    Raises:
        InputError: if the file is cut short, is not PyTorch's, or names anything that could run code.
    """
    try:
        if zipfile.is_zipfile(file):
            return _read_zip(file)
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            raise InputError("the file is cut short: a zip archive without its end")
        file.seek(0)
        return _read_legacy(file)
    except _ForbiddenGlobal as error:
        raise InputError(
            f"{where} asks for {printable(str(error))}, which no checkpoint needs and which could run code: the file "
            "is refused"
        ) from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:  # a damaged pickle may fail in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a place in the file that cannot be
            raise
        reason = printable(" ".join(reason_of(error).split()))[:100]
        raise InputError(f"{where} is no PyTorch file, or is cut short or damaged ({reason})") from None


def write_pickle(content: Any, path: Path) -> None:
    """Write a file by ``torch.save``.

    Args:
        content: the object to write.
        path: the file.

    Raises:
        OSError: if the file is not writable.
    """
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch reports a consequence, the context holds the cause
            raise error.__context__ from None
        raise


def tensors_of(content: Any) -> dict[str, StoredTensor]:
    """Return the tensors of a mapping by name, without the prefix ``module.`` of wrappers; skip other values."""
    if not isinstance(content, dict):
        return {}
    found = {str(name): value for name, value in content.items() if isinstance(value, StoredTensor)}
    while found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return found


class _ForbiddenGlobal(Exception):
    """Raised with the name of a global that a pickle must not use."""


class _IgnoredObject(dict[Any, Any]):
    """Placeholder for an object that is not needed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Build unread tensors, plain containers and inert objects; refuse every other global."""

    def __init__(self, file: IO[bytes], data: IO[bytes]) -> None:
        super().__init__(bounded_pickle(file), encoding="utf-8")
        self.data = data
        self.storages: dict[str, _Storage] = {}
        self.tensors: list[StoredTensor] = []

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name.removesuffix("Storage") in _DTYPES:
            return _DTYPES[name.removesuffix("Storage")]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in _IGNORED:
            return _IgnoredObject
        known = {
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch", "Size"): tuple,
            ("collections", "OrderedDict"): OrderedDict,
            ("argparse", "Namespace"): types.SimpleNamespace,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
        }
        if (module, name) not in known:
            raise _ForbiddenGlobal(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, (str, int)):
            raise pickle.UnpicklingError("an unknown kind of reference")
        return self.storages.setdefault(str(key), _Storage(dtype, str(key)))

    def _tensor(self, storage: _Storage, start: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        if len(shape) != len(stride) or len(shape) > MAX_RANK:
            raise pickle.UnpicklingError(f"no tensor has {len(shape)} sizes and {len(stride)} strides")
        numbers = [start, *shape, *stride]
        if not all(type(number) is int and 0 <= number < MAX_SIZE for number in numbers):
            raise pickle.UnpicklingError("a size or stride of a tensor is no number from 0 on that fits in memory")
        tensor = StoredTensor(self.data, storage, start, tuple(shape), tuple(stride))
        self.tensors.append(tensor)
        return tensor

    def check_tensors(self) -> None:
        """Raise InputError if a tensor is larger than its storage, whose place in the file is known by now."""
        for tensor in self.tensors:
            tensor.check_bounds()


def _read_zip(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        main = next((name for name in entries if name.endswith("data.pkl")), None)
        if main is None:
            raise InputError("it is a zip archive, but none that PyTorch wrote (data.pkl is missing)")
        if entries[main].compress_type != zipfile.ZIP_STORED or entries[main].file_size > file.seek(0, 2):
            raise InputError("the file is damaged: data.pkl is packed or larger than the file")
        with archive.open(main) as stream:  # which compares the CRC at the end
            content_of_main = stream.read(MAX_BYTES + 1)
        unpickler = _Unpickler(io.BytesIO(content_of_main), file)
        content = unpickler.load()
    for storage in unpickler.storages.values():
        entry = entries.get(f"{main.removesuffix('.pkl')}/{storage.key}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"the file is damaged: the numbers of {storage.key} are missing or packed")
        file.seek(entry.header_offset + 26)  # the local header has its own lengths of name and extra field
        name, extra = struct.unpack("<HH", file.read(4))
        storage.offset, storage.size = entry.header_offset + 30 + name + extra, entry.file_size
        storage.crc = entry.CRC
        if storage.offset + storage.size > file.seek(0, 2):
            raise InputError(f"the file is damaged: the numbers of {storage.key} reach beyond its end")
    unpickler.check_tensors()
    return content


def _read_legacy(file: IO[bytes]) -> Any:
    magic, version, _system = (_Unpickler(file, file).load() for _ in range(3))
    if magic != _LEGACY_MAGIC or version != 1001:
        raise pickle.UnpicklingError("it has none of PyTorch's marks")
    unpickler = _Unpickler(file, file)
    content = unpickler.load()
    keys = _Unpickler(file, file).load()
    first = file.tell()
    end = file.seek(0, 2)
    for key in keys:
        storage = unpickler.storages[str(key)]
        file.seek(first)
        storage.size = struct.unpack("<Q", file.read(8))[0] * storage.dtype.itemsize
        storage.offset = first + 8
        first = storage.offset + storage.size
        if first > end:
            raise InputError("the file is cut short")
    unpickler.check_tensors()
    return content
