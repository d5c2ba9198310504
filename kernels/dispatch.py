"""Dispatch: which implementation of an operation runs, except for the linear layers (``linear.py``).

``reference`` is the specification, ``torch`` PyTorch's fused operations where they are equal in meaning, ``triton``
the kernels of this package for GPUs, and ``native`` those for CPUs, which compute whole layers (``native.py``).
``COGVIEW_KERNELS`` forces one of them. Each choice is logged once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch

BACKENDS = ("reference", "torch", "triton", "native")
log = logging.getLogger(__name__)


class ForcedKernelsError(ValueError):
    """Raised when ``COGVIEW_KERNELS`` has an unknown value, or asks for Triton where it cannot run."""


@functools.cache
def select_backend(
    operation: str, device_type: str, available: Sequence[str] = BACKENDS[:3], default: str | None = None
) -> str:
    """Select the implementation of an operation.

    A forced implementation that the operation lacks is ignored, and the default runs.

    Args:
        operation: Name of the operation in the log.
        device_type: Device type of its tensors, such as ``"cuda"``.
        available: Implementations that exist.
        default: Implementation without ``COGVIEW_KERNELS``; None for PyTorch's if it exists, else the reference.

    Returns:
        One of ``available``.

    Raises:
        ForcedKernelsError: ``COGVIEW_KERNELS`` has an unknown value, or asks for Triton where it cannot run.
    """
    default = default or ("torch" if "torch" in available else "reference")
    forced = forced_backend(device_type)
    if forced is None:
        _log_once("%s on %s: %s", operation, device_type, default)
        return default
    if forced not in available:
        _log_once("%s on %s: %s (there is no %s)", operation, device_type, default, forced)
        return default
    _log_once("%s on %s: %s (forced)", operation, device_type, forced)
    return forced


def forced_backend(device_type: str) -> str | None:
    """Return the implementation that ``COGVIEW_KERNELS`` asks for, or None.

    Args:
        device_type: Device type of the tensors, such as ``"cuda"``.

    Raises:
        ForcedKernelsError: The variable has an unknown value, or asks for Triton where it cannot run.
    """
    forced = os.environ.get("COGVIEW_KERNELS")
    if not forced:
        return None
    if forced not in BACKENDS:
        raise ForcedKernelsError(f"COGVIEW_KERNELS={forced!r} is unknown; known: {', '.join(BACKENDS)}")
    if forced == "triton":
        _check_triton(device_type)
    return forced


def _log_once(message: str, *words: str) -> None:
    """Log a choice; the cache of ``select_backend`` makes it once per operation."""
    if not torch.compiler.is_compiling():  # logging would break the graph
        log.info(message, *words)


def _check_triton(device_type: str) -> None:
    """Raise ForcedKernelsError if Triton cannot run."""
    if importlib.util.find_spec("triton") is None:
        raise ForcedKernelsError("COGVIEW_KERNELS=triton, but triton is not installed: pip install triton (on Linux)")
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ForcedKernelsError(
            "COGVIEW_KERNELS=triton needs a GPU; TRITON_INTERPRET=1 interprets kernels on a CPU, slowly"
        )
