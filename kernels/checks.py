"""Checks of arguments: one line that names the argument, the value and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def check_matches(name: str, tensor: Tensor, other_name: str, other: Tensor, shape: tuple[int, ...]) -> None:
    """Check shape, dtype and device of an argument.

    Args:
        name: Name of the argument.
        tensor: Its value.
        other_name: Name of the argument that it must match.
        other: Tensor whose dtype and device are expected.
        shape: Expected shape.

    Raises:
        ValueError: The shape, dtype or device differs.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} must be {other.dtype} on {other.device} as {other_name} is, got {tensor.dtype} on {tensor.device}"
        )


def check_int64(name: str, tensor: Tensor, device: torch.device, shape: tuple[int, ...], largest: int) -> None:
    """Check an int64 argument.

    On a GPU the values are not checked, which would synchronize with the device: the caller is responsible.

    Args:
        name: Name of the argument.
        tensor: Its value.
        device: Expected device.
        shape: Expected shape.
        largest: Largest allowed value; the smallest is 0.

    Raises:
        ValueError: The dtype, shape, device or a value differs.
    """
    if tensor.shape != shape or tensor.dtype != torch.int64 or tensor.device != device:
        raise ValueError(
            f"{name} must be int64 {shape} on {device}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    if tensor.device.type == "cpu" and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) <= largest:
        raise ValueError(f"{name} must be from 0 to {largest}, got {tensor.tolist()}")
