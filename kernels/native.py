"""Native kernels of a CPU: linear layers and whole layers of the transformer, compiled from ``c/`` at first use.

A step of decoding reads every weight once, so it should take the time of reading them. PyTorch's operations add the
time between them, and a second copy of the weights where MKL wants another order. These kernels read weights in the
order of their files, float32, float16, bfloat16, int8 or int4, and sum in float32 in a fixed order: a row has the same
bits alone and in any batch.

The library is compiled for this processor by the C compiler of the machine ($CC, cc, gcc or clang) and kept in the
cache folder; a digest in the file tells a whole one from a damaged one. Without a compiler, PyTorch's operations run
instead. ``COGVIEW_KERNELS`` forces either.
"""

# M rows of the input, K inputs, N outputs
from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from cogview.kernels.dispatch import ForcedKernelsError, forced_backend

SOURCES = {  # of each library
    "layers": ("vectors.h", "linear.h", "attention.h", "sampling.h", "layers.c"),
    "training": ("vectors.h", "training.c"),  # ``native_training.py``
}
FLAGS = ("-O2", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")
INTERFACE = 5  # of layers.c
COMPILE_SECONDS = 300
CHUNK_ROWS, SCRATCH_WIDTHS = 64, 13  # of layers.c: rows at a time, and floats of each in multiples of the width
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3, torch.float16: 4}
log = logging.getLogger(__name__)


class NativeLinear(ctypes.Structure):
    """``Linear`` of ``c/linear.h``."""

    _fields_ = (
        ("format", ctypes.c_long),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
        ("group", ctypes.c_long),
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class CompileError(Exception):
    """Raised when the native kernels cannot be compiled or loaded; the message says why."""


def uses_native_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether native kernels run for a model of ``dtype`` on ``device``.

    Args:
        device: Device of the model.
        dtype: Dtype of its vectors, float32 or bfloat16; for other models kernels do not exist. Its matrices may have
            any format of ``FORMATS``.

    Raises:
        ForcedKernelsError: ``COGVIEW_KERNELS=native``, but they cannot be compiled.
    """
    return _decide(device, dtype, os.environ.get("COGVIEW_KERNELS"))


@functools.cache
def _decide(device: torch.device, dtype: torch.dtype, forced: str | None) -> bool:
    """Return the decision for a value of ``COGVIEW_KERNELS``: each step of decoding asks for it."""
    if not _may_run(device, dtype):
        return False
    try:
        load_library()
    except CompileError as error:
        if forced_backend(device.type) is not None:
            raise ForcedKernelsError(
                f"COGVIEW_KERNELS=native, but {error}; unset it to run PyTorch's operations instead"
            ) from None
        _note_once(f"native kernels are missing, so each step takes longer: {error}")
        return False
    return True


def expects_native_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Return what ``uses_native_kernels`` will return, without compiling: whether there is a compiler.

    Args:
        device: Device of the model.
        dtype: Dtype of its activations and of weights that are not quantized.
    """
    if not _may_run(device, dtype):
        return False
    if "layers" in _loaded:
        return _loaded["layers"][0] is not None
    with suppress(CompileError):
        return bool(find_compiler())
    return False


def _may_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels are meant for this device and dtype, and no others are forced."""
    meant = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return meant and forced_backend(device.type) in (None, "native")


@functools.cache
def _note_once(message: str) -> None:
    log.warning("%s", message)


def load_library(name: str = "layers") -> ctypes.CDLL:
    """Return a library of the native kernels, compiled if the cache folder has none for this processor.

    Args:
        name: A key of ``SOURCES``.

    Raises:
        CompileError: There is no compiler, or it fails.
    """
    if name not in _loaded:
        try:
            _loaded[name] = _open(compiled_library(name)), ""
        except CompileError as error:
            _loaded[name] = None, str(error)
    library, problem = _loaded[name]
    if library is None:
        raise CompileError(problem)
    return library


_loaded: dict[str, tuple[ctypes.CDLL | None, str]] = {}  # libraries by name, or None and the reason


def compiled_library(library: str = "layers") -> Path:
    """Return the file of the compiled kernels, made if it does not exist yet.

    Its name has a hash of the sources, the compiler and the processor, so that another version compiles anew. Where the
    cache folder cannot be written, the file is temporary.

    Args:
        library: A key of ``SOURCES``.

    Raises:
        CompileError: There is no compiler, or it fails.
    """
    compiler = find_compiler()
    source = sources_folder() / SOURCES[library][-1]
    name = f"{library}-{_fingerprint(compiler, library)}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = folder.expanduser() / "cogview" / "native"
        if _is_sealed(folder / name):
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together compile once
            if not _is_sealed(folder / name):
                _compile(compiler, source, folder / name)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        log.warning("%s cannot be written (%s): the native kernels are compiled for this run alone", folder, error)
        folder = Path(_temporary_folder().name)
        if not _is_sealed(folder / name):
            _compile(compiler, source, folder / name)
    return folder / name


def find_compiler() -> tuple[str, ...]:
    """Return the C compiler: the path of its program, then the options that ``CC`` adds.

    Raises:
        CompileError: There is none, or ``CC`` names no program.
    """
    if given := os.environ.get("CC", "").strip():
        if (path := shutil.which(given)) is not None:  # it may have spaces
            return (path,)
        with suppress(ValueError):  # an open quotation mark
            program, *options = shlex.split(given)
            if (path := shutil.which(program)) is not None:
                return path, *options
        raise CompileError(f"CC is {given!r}, which names no program; set it to a C compiler, or unset it")
    for name in ("cc", "gcc", "clang"):
        if (path := shutil.which(name)) is not None:
            return (path,)
    raise CompileError("there is no C compiler (on Debian: apt install gcc)")


def _seal(path: Path) -> None:
    """Append a digest to a library, which the loader of the system ignores."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def _is_sealed(path: Path) -> bool:
    """Return whether ``path`` is a whole library that was compiled here: a damaged one would end the process."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    size = hashlib.sha256().digest_size
    return len(content) > size and hashlib.sha256(content[:-size]).digest() == content[-size:]


def sources_folder() -> Path:
    """Return the folder of the C sources."""
    return Path(__file__).resolve().parent / "c"


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="cogview-native-")


def _fingerprint(compiler: Sequence[str], library: str) -> str:
    """Return a hash of everything that the compiled library depends on."""
    path = Path(compiler[0]).resolve()
    stat = path.stat()
    options = (*compiler[1:], *FLAGS)
    parts = [repr(options), str(path), str(stat.st_size), str(stat.st_mtime_ns), _processor()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in SOURCES[library]:
        digest.update((sources_folder() / source).read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Return the architecture and the instructions of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    kept = dict(line.split(":", 1) for line in lines if line.startswith(("flags", "Features", "model name")))
    return platform.machine() + "".join(sorted(kept.values()))


def _compile(compiler: Sequence[str], source: Path, path: Path) -> None:
    """Compile ``source`` to the library ``path``, which appears when it is complete.

    The library is linked without OpenMP: it uses the one that PyTorch has loaded, so that both share their threads.
    """
    started = time.monotonic()
    log.warning("compiling native kernels for this processor, once")
    with tempfile.TemporaryDirectory(prefix="cogview-native-", dir=path.parent) as scratch:
        objects, library = Path(scratch) / "kernels.o", Path(scratch) / path.name
        _run([*compiler, *FLAGS, "-c", str(source), "-o", str(objects)])
        _run([*compiler, "-shared", str(objects), "-o", str(library), "-lm"])
        _seal(library)
        library.replace(path)
    log.info("compiled %s in %.1f s", path, time.monotonic() - started)


def _run(command: Sequence[str]) -> None:
    """Run the compiler; raise CompileError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"the compiler failed: {error}") from None
    if done.returncode:
        written = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        lines = [line for line in written if "error" in line] or written
        raise CompileError(f"the compiler {command[0]} failed: {lines[0].strip()}")


def _open(path: Path) -> ctypes.CDLL:
    """Load the library; raise CompileError if it cannot run here."""
    try:
        library = ctypes.CDLL(str(path))
        if path.name.startswith("training-"):
            library.cogview_training_interface()
            return library
        if library.cogview_interface() != INTERFACE:
            raise CompileError(f"{path} is of another version")
    except (OSError, AttributeError) as error:
        raise CompileError(f"{path} cannot be loaded: {error}") from None
    library.cogview_scratch.restype = ctypes.c_long
    library.cogview_scratch.argtypes = [ctypes.c_long] * 4
    library.cogview_layers.restype, library.cogview_linear.restype = ctypes.c_int, None
    library.cogview_layers.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.cogview_linear.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
    ]
    library.cogview_sample.restype = None
    library.cogview_sample.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long),
        *(ctypes.c_float, ctypes.c_long, ctypes.c_float),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    ]
    return library


def num_threads() -> int:
    """Return the number of threads of a call: those of PyTorch, but no more than there are processors."""
    return min(torch.get_num_threads(), _num_processors())


@functools.cache
def _num_processors() -> int:
    """Return the number of processors; asking the system takes as long as a small product."""
    return os.cpu_count() or 1


def describe_linear(weight: Tensor, scales: Tensor | None, bias_N: Tensor | None) -> NativeLinear:
    """Return the description of a linear layer for the library; the tensors must outlive it.

    Args:
        weight: float32, float16, bfloat16 or int8 (N, K), or packed int4 (N, K / 2), contiguous.
        scales: bfloat16 scales (N,) of int8, or scales and zero points (G, N, 2) of int4.
        bias_N: float32 bias, or None.
    """
    outputs, inputs = weight.shape
    if weight.dtype == torch.uint8:
        inputs *= 2
    group = inputs // len(scales) if weight.dtype == torch.uint8 and scales is not None else 0
    for tensor in (weight, scales, bias_N):
        assert tensor is None or tensor.is_contiguous()
    return NativeLinear(
        format=FORMATS[weight.dtype],
        inputs=inputs,
        outputs=outputs,
        group=group,
        weight=weight.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        bias=None if bias_N is None else bias_N.data_ptr(),
    )


def linear_native(x: Tensor, weight: Tensor, scales: Tensor | None = None, bias_N: Tensor | None = None) -> Tensor:
    """Compute x W^T + b with float32 inputs and sums; a row has the same bits in any batch.

    Args:
        x: Inputs (..., K), float32.
        weight: Weight in float32, float16, bfloat16 or int8 (N, K), or packed int4 (N, K / 2) uint8.
        scales: Scales of int8 and int4 (``quantize_int8``, ``quantize_int4``).
        bias_N: Bias, float32; None for no bias.

    Returns:
        Outputs (..., N), float32.
    """
    return linear_described(describe_linear(weight, scales, bias_N), x)


def linear_described(described: NativeLinear, x: Tensor) -> Tensor:
    """Compute ``linear_native`` with a description of the layer, whose tensors still exist.

    Args:
        described: What ``describe_linear`` returned.
        x: Inputs (..., K), float32.

    Returns:
        Outputs (..., N), float32.
    """
    rows_MK = x.reshape(-1, described.inputs).contiguous()
    product_MN = rows_MK.new_empty(len(rows_MK), described.outputs)
    split = torch.empty_like(rows_MK) if described.format == FORMATS[torch.uint8] else None
    load_library().cogview_linear(
        ctypes.byref(described),
        rows_MK.data_ptr(),
        len(rows_MK),
        product_MN.data_ptr(),
        None if split is None else split.data_ptr(),
        num_threads(),
    )
    return product_MN.view(*x.shape[:-1], -1)


def sample_native(
    logits_BV: Tensor,
    keys_B: Tensor,
    mixed_ids_V: Tensor,
    scored_BV: Tensor | None = None,
    *,
    temperature: float,
    top_k: int,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    """Sample one id per row: argmax of the filtered logits plus Gumbel noise (``generation/sampling.py``).

    Args:
        logits_BV: Logits, float32.
        keys_B: Noise keys, int64.
        mixed_ids_V: Hashes of the ids, int64.
        scored_BV: Logits of the log probabilities, float32; None for ``logits_BV``.
        temperature: Divisor of the logits.
        top_k: Number of largest logits to keep, and ties with the smallest of them; 0 for all.
        min_p: Fraction of the largest probability to keep; 0 for all.

    Returns:
        Indices (B,) int64, and their log softmax (B,) float32, before temperature and filters; the same bits in any
        batch.
    """
    rows, count = logits_BV.shape
    logits_BV, keys_B = logits_BV.contiguous(), keys_B.contiguous()
    scored_BV = logits_BV if scored_BV is None else scored_BV.contiguous()
    chosen_B, log_p_B, threads = torch.empty(rows, dtype=torch.int64), torch.empty(rows), num_threads()
    scratch = torch.empty(2 * count * threads)
    load_library().cogview_sample(
        *(logits_BV.data_ptr(), scored_BV.data_ptr(), rows, count),
        *(temperature, top_k, math.log(min_p) if min_p else -math.inf, keys_B.data_ptr(), mixed_ids_V.data_ptr()),
        *(chosen_B.data_ptr(), log_p_B.data_ptr(), scratch.data_ptr(), threads),
    )
    return chosen_B, log_p_B
