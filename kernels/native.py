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
import functools
import logging
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from cogview.kernels.dispatch import ForcedKernelsError, forced_backend
from cogview.kernels.native_library import CompileError, compiled_library, find_compiler, temporary_folder

INTERFACE = 5  # of layers.c
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


def uses_native_kernels(device: torch.device, dtype: torch.dtype, library: str = "layers") -> bool:
    """Return whether native kernels run for a model of ``dtype`` on ``device``.

    Args:
        device: Device of the model.
        dtype: Dtype of its vectors, float32 or bfloat16; for other models kernels do not exist. Its matrices may have
            any format of ``FORMATS``.
        library: A key of ``SOURCES``, which is compiled.

    Raises:
        ForcedKernelsError: ``COGVIEW_KERNELS=native``, but they cannot be compiled.
    """
    return _decide(device, dtype, os.environ.get("COGVIEW_KERNELS"), library)


@functools.cache
def _decide(device: torch.device, dtype: torch.dtype, forced: str | None, library: str) -> bool:
    """Return the decision for a value of ``COGVIEW_KERNELS``: each step of decoding asks for it."""
    if not _may_run(device, dtype):
        return False
    try:
        load_library(library)
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
            _loaded[name] = _open_library(name), ""
        except CompileError as error:
            _loaded[name] = None, str(error)
    library, problem = _loaded[name]
    if library is None:
        raise CompileError(problem)
    return library


_loaded: dict[str, tuple[ctypes.CDLL | None, str]] = {}  # libraries by name, or None and the reason


def _open_library(name: str) -> ctypes.CDLL:
    """Compile and load a library; one whose folder forbids programs (``noexec``) is loaded from a temporary folder."""
    path = compiled_library(name)
    try:
        return _open(path)
    except CompileError as error:
        copy = Path(temporary_folder().name) / path.name
        if path == copy:
            raise
        try:
            shutil.copyfile(path, copy)
        except OSError:
            raise error from None
        library = _open(copy)
        log.warning("%s; a temporary copy is loaded instead: set XDG_CACHE_HOME to another folder", error)
        return library


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
        reason = str(error).removeprefix(f"{path}: ")
        raise CompileError(f"{path} cannot be loaded: {reason}") from None
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
