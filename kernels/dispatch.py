"""Which implementation of an operation runs: decided here, but for the linear layers (``linear.py``).

``reference`` is the specification, ``torch`` PyTorch's own fused operations where these are equal in meaning, and
``triton`` our kernels. ``COGVIEW_KERNELS`` forces one of them; what was chosen is logged once for each operation.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch

BACKENDS = ("reference", "torch", "triton")
log = logging.getLogger(__name__)


class ForcedKernelsError(ValueError):
    """``COGVIEW_KERNELS`` asks for what there is not."""


@functools.cache
def select_backend(
    operation: str, device_type: str, available: Sequence[str] = BACKENDS, default: str | None = None
) -> str:
    """One of ``known`` for an ``operation``, named as in the log, on tensors of ``device_type``.

    Without ``COGVIEW_KERNELS`` it is ``usual``, by default PyTorch's form if there is one, and else the reference.
    Where the one that is forced does not exist for the operation, the usual one runs. ForcedKernelsError for a name
    that is unknown, and for Triton where it cannot run.
    """
    default = default or ("torch" if "torch" in available else "reference")
    forced = os.environ.get("COGVIEW_KERNELS")
    if not forced:
        _log_once("%s on %s: %s", operation, device_type, default)
        return default
    if forced not in BACKENDS:
        raise ForcedKernelsError(f"COGVIEW_KERNELS={forced!r} is unknown; known: {', '.join(BACKENDS)}")
    if forced not in available:
        _log_once("%s on %s: %s (there is no %s)", operation, device_type, default, forced)
        return default
    if forced == "triton":
        _check_triton(device_type)
    _log_once("%s on %s: %s (forced)", operation, device_type, forced)
    return forced


def _log_once(message: str, *words: str) -> None:
    if not torch.compiler.is_compiling():  # which would not go past it
        log.info(message, *words)


def _check_triton(device_type: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ForcedKernelsError("COGVIEW_KERNELS=triton, but triton is not installed: pip install triton (on Linux)")
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ForcedKernelsError(
            "COGVIEW_KERNELS=triton needs a GPU; TRITON_INTERPRET=1 interprets kernels on a CPU, slowly"
        )
