"""Find weights that are not finite: a single NaN makes every image of a model noise, without an error."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview.errors import InputError


class NonFiniteWeightsError(InputError):
    """An ``InputError`` about a tensor with numbers that are NaN or infinite."""


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite.

    The extremes of a tensor are found at the speed of memory; ``isfinite`` takes 25 times as long on a CPU.

    Args:
        tensor: A tensor of any dtype and shape, on any device.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    extremes = torch.stack(torch.aminmax(tensor))  # NaN if any number is NaN
    return bool(extremes.isfinite().all())


def require_finite(where: str, tensor: Tensor) -> None:
    """Raise an error unless all numbers of a tensor are finite.

    Args:
        where: File and name of the tensor, for the message.
        tensor: The tensor.

    Raises:
        NonFiniteWeightsError: A number is NaN or infinite.
    """
    if not is_finite(tensor):
        count = tensor.numel() - int(tensor.isfinite().sum())
        raise NonFiniteWeightsError(
            f"{where} has {count:,} of {tensor.numel():,} numbers that are NaN or infinite: the file is damaged, or "
            "its training diverged; restore it, or take an earlier checkpoint"
        )


def require_range(where: str, tensor: Tensor, rounded: Tensor) -> None:
    """Raise an error unless a tensor is finite, and also after its conversion to another dtype.

    Args:
        where: File and name of the tensor, for the message.
        tensor: The tensor as it was.
        rounded: The tensor in the new dtype.

    Raises:
        NonFiniteWeightsError: A number is NaN or infinite.
        InputError: A number is beyond the range of the new dtype.
    """
    if not is_finite(rounded):
        require_finite(where, tensor)
        dtype = str(rounded.dtype).removeprefix("torch.")
        raise InputError(f"{where} has numbers beyond the range of {dtype}: choose bfloat16 or float32")


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a tensor on the CPU in another dtype, to be stored.

    Args:
        name: Name of the tensor, for messages.
        tensor: The tensor.
        dtype: The new dtype. Without a change, numbers may be NaN or infinite.

    Raises:
        InputError: A number is not finite in the new dtype.
    """
    result = tensor.detach().to("cpu", dtype).contiguous()
    if dtype != tensor.dtype:
        require_range(name, tensor, result)
    return result
