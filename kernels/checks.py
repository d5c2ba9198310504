"""Checks of what operations are given: one line that names the argument, what came, and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def check_matches(name: str, tensor: Tensor, other_name: str, other: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless ``tensor`` has this shape, and dtype and device of ``other``."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} must be {other.dtype} on {other.device} as {other_name} is, got {tensor.dtype} on {tensor.device}"
        )


def check_int64(name: str, tensor: Tensor, device: torch.device, shape: tuple[int, ...], most: int) -> None:
    """ValueError unless ``tensor`` is int64, of this shape and device, and on a CPU from 0 to ``most``.

    On a GPU to look at the numbers would wait for the device: there the caller answers for them.
    """
    if tensor.shape != shape or tensor.dtype != torch.int64 or tensor.device != device:
        raise ValueError(
            f"{name} must be int64 {shape} on {device}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    if tensor.device.type == "cpu" and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) <= most:
        raise ValueError(f"{name} must be from 0 to {most}, got {tensor.tolist()}")
