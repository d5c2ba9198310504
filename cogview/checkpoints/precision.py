"""Convert the tensors of a file to the precision that a model computes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cogview.checkpoints.finite import is_finite, require_finite, require_range
from cogview.checkpoints.safetensors_io import TensorSpec
from cogview.checkpoints.sizes import require_float
from cogview.device import Quantization
from cogview.errors import InputError
from cogview.kernels.linear import group_of
from cogview.modeling.quantization import (
    dequantize_weight,
    is_quantized,
    quantize_weight,
    quantized_names,
)

_STORED: dict[torch.dtype, Quantization] = {torch.int8: "int8", torch.uint8: "int4"}


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each tensor."""

    def read(self, name: str, *, keep: bool = False) -> Tensor:
        """Read one tensor.

        Args:
            name: name of the tensor.
            keep: the tensor will be used as it is, and not only read once.

        Returns:
            The tensor.
        """


@dataclass(frozen=True)
class Precision:
    """Dtype of all weights (None: as stored) but those that ``quantization`` covers.

    With ``keep_halves``, matrices that are stored in 16 bits remain in them.
    """

    dtype: torch.dtype | None = None
    quantization: Quantization | None = None
    keep_halves: bool = False

    def __str__(self) -> str:
        return self.quantization or str(self.dtype).removeprefix("torch.")

    def dtype_of(self, spec: TensorSpec) -> torch.dtype:
        """Return the dtype of a stored tensor that is not quantized."""
        keep = self.keep_halves and len(spec.shape) > 1 and spec.dtype in (torch.float16, torch.bfloat16)
        return spec.dtype if keep or self.dtype is None else self.dtype


def stored_quantization(specs: Mapping[str, TensorSpec]) -> Quantization | None:
    """Return the quantization of a file's projections, or None if they are not quantized."""
    return next(
        (_STORED[spec.dtype] for name, spec in specs.items() if is_quantized(name) and spec.dtype in _STORED), None
    )


def stored_matrix_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype | None:
    """Return the dtype of a file's embedding, which its projections share unless they are quantized."""
    return specs["embedding.weight"].dtype if "embedding.weight" in specs else None


def converted_specs(weights: TensorSource, precision: Precision) -> dict[str, TensorSpec]:
    """Return the specs of the tensors that ``convert`` will yield.

    Args:
        weights: the source.
        precision: the target precision.

    Raises:
        InputError: if the weights cannot be held in that precision.
    """
    specs: dict[str, TensorSpec] = {}
    for name, sources in _conversion_plan(weights, precision):
        _check_stored(weights, sources)
        spec = weights.specs[name]
        if len(sources) == 2 and precision.quantization is None:
            inputs = spec.shape[1] * (2 if spec.dtype == torch.uint8 else 1)
            specs[name] = TensorSpec(precision.dtype or torch.float32, (spec.shape[0], inputs))
        elif len(sources) == 2:
            specs |= {source: weights.specs[source] for source in sources}
        elif precision.quantization == "int8" and is_quantized(name):
            specs[name] = TensorSpec(torch.int8, spec.shape)
            specs[quantized_names(name, "int8")[1]] = TensorSpec(torch.bfloat16, spec.shape[:1])
        elif precision.quantization == "int4" and is_quantized(name):
            outputs, inputs = spec.shape
            try:
                groups = inputs // group_of(inputs)
            except ValueError as error:
                raise InputError(f"{weights.path}: {name} cannot be held in int4: {error}") from None
            specs[name] = TensorSpec(torch.uint8, (outputs, inputs // 2))
            specs[quantized_names(name, "int4")[1]] = TensorSpec(torch.bfloat16, (groups, outputs, 2))
        else:
            specs[name] = TensorSpec(precision.dtype_of(spec), spec.shape)
    return specs


def convert(
    weights: TensorSource,
    precision: Precision,
    *,
    device: torch.device | str = "cpu",
    keep: bool = False,
    memory: TensorArena | None = None,
    allow_nonfinite: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Convert all tensors, reading one at a time.

    Args:
        weights: the source.
        precision: the target precision.
        device: device of the results.
        keep: leave tensors that need no conversion in their file, mapped into memory.
        memory: arena for the other tensors; None allocates each by itself.
        allow_nonfinite: do not check that all numbers are finite.

    Yields:
        Names and tensors of the converted model.

    Raises:
        InputError: if the weights cannot be held in that precision, or a number is not finite.
    """
    stored, specs = stored_quantization(weights.specs), converted_specs(weights, precision)
    store = memory.copy_in if memory is not None else lambda tensor: tensor

    def read(name: str) -> Tensor:
        return weights.read(name).to(device)

    def converted(name: str, sources: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        spec = weights.specs[name]
        if len(sources) == 2 and precision.quantization is None:
            assert stored is not None
            restored = dequantize_weight(read(sources[0]), read(sources[1]), stored)
            yield name, store(restored.to(precision.dtype or torch.float32))
        elif len(sources) == 2 or (precision.dtype_of(spec) == spec.dtype and not _to_quantize(name, precision)):
            yield from ((part, weights.read(part, keep=True) if keep else store(read(part))) for part in sources)
        elif _to_quantize(name, precision):
            assert precision.quantization is not None
            room = None if memory is None else memory.allocate(specs[name])
            for part, tensor in quantize_weight(name, read(name), precision.quantization, room).items():
                yield part, tensor if part == name else store(tensor)
        else:
            assert precision.dtype is not None
            room = None if memory is None else memory.allocate(specs[name])
            yield name, cast(read(name), precision.dtype, room)

    for name, sources in _conversion_plan(weights, precision):
        for part, tensor in converted(name, sources):
            if not allow_nonfinite and not is_finite(tensor):  # also after rounding; scales are NaN where weights are
                for source in sources:
                    require_finite(f"{weights.path}: {source}", weights.read(source))
                require_range(f"{weights.path}: {name}", weights.read(name), tensor)
            yield part, tensor


class TensorArena:
    """Memory for many long-lived tensors, in large blocks.

    With an allocation for each, the system's allocator leaves holes between tensors that stay and tensors that go: a
    tenth of the weights. Each tensor has a storage that ends where it ends, not the whole block: pickling, copying and
    ``torch.save`` write storages whole.
    """

    BLOCK = 1 << 28

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def allocate(self, spec: TensorSpec) -> Tensor:
        """Return an uninitialised tensor."""
        size = -(-spec.num_bytes // 64) * 64
        if size > self.BLOCK // 4 or not size:
            return torch.empty(spec.shape, dtype=spec.dtype)
        if self._used + size > len(self._block):
            self._block, self._used = torch.empty(self.BLOCK, dtype=torch.uint8), 0
        start, self._used = self._used, self._used + size
        part = torch.frombuffer(
            self._block.numpy(), dtype=spec.dtype, count=spec.num_bytes // spec.dtype.itemsize, offset=start
        )
        return part.view(spec.shape)

    def copy_in(self, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor`` in the arena."""
        return self.allocate(TensorSpec(tensor.dtype, tuple(tensor.shape))).copy_(tensor)


def cast(tensor: Tensor, dtype: torch.dtype, result: Tensor | None = None) -> Tensor:
    """Return a tensor in another dtype. float16 goes to bfloat16 by way of float32, which takes a CPU half the time.

    Args:
        tensor: the tensor.
        dtype: the new dtype.
        result: tensor to write to; None allocates one.
    """
    result = torch.empty_like(tensor, dtype=dtype) if result is None else result
    if {tensor.dtype, dtype} != {torch.float16, torch.bfloat16} or tensor.device.type != "cpu":
        return result.copy_(tensor)
    wide = torch.empty(min(tensor.numel(), 1 << 18))
    for part, target in zip(tensor.reshape(-1).split(1 << 18), result.view(-1).split(1 << 18), strict=True):
        target.copy_(wide[: len(part)].copy_(part))
    return result


def _to_quantize(name: str, precision: Precision) -> bool:
    return precision.quantization is not None and is_quantized(name)


def _check_stored(weights: TensorSource, sources: tuple[str, ...]) -> None:
    """Raise InputError unless the tensors of a weight hold floats, or quantized values and their scales."""
    spec = weights.specs[sources[0]]
    if len(sources) == 1:
        require_float(f"{weights.path}: {sources[0]}", spec)
        return
    stored = stored_quantization(weights.specs)
    scale = weights.specs[sources[1]]
    require_float(f"{weights.path}: {sources[1]}", scale)
    if _STORED.get(spec.dtype) != stored or len(spec.shape) != 2:
        raise InputError(f"{weights.path}: {sources[0]} is not stored as {stored}, as other weights are")
    shape: tuple[int, ...] = spec.shape[:1]
    if stored == "int4":
        try:
            shape = (2 * spec.shape[1] // group_of(2 * spec.shape[1]), spec.shape[0], 2)
        except ValueError as error:
            raise InputError(f"{weights.path}: {sources[0]} cannot be held in int4: {error}") from None
    if scale.shape != shape:
        raise InputError(f"{weights.path}: {sources[1]} has the shape {list(scale.shape)}, expected {list(shape)}")


def _conversion_plan(weights: TensorSource, precision: Precision) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each weight of the model and the names of the file's tensors that it is made of."""
    stored = stored_quantization(weights.specs)
    if stored is not None and precision.quantization not in (None, stored):
        raise InputError(
            f"{weights.path}: the weights are stored as {stored}, which cannot be turned into {precision.quantization}"
        )
    for name in weights.specs:
        if stored is None:
            yield name, (name,)
        elif is_quantized(name):
            _, scale = parts = quantized_names(name, stored)
            if scale in weights.specs:
                yield name, parts
            elif weights.specs[name].dtype in _STORED:
                raise InputError(f"{weights.path}: {scale} is missing")
            else:  # with adapters added, in float32 and without a scale
                yield name, (name,)
        elif not name.endswith(("scale", "scales_and_zeros")):
            yield name, (name,)
