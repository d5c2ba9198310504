"""In which numbers weights are held, and how they get there from those of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cogview.checkpoints.safetensors_io import Spec
from cogview.errors import InputError
from cogview.kernels.linear import group_of
from cogview.modeling.quantization import FewBits, is_rounded, parts_of, restore_weight, round_weight

_STORED: dict[torch.dtype, FewBits] = {torch.int8: "int8", torch.uint8: "int4"}


class Weights(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of each."""

    def read(self, name: str, *, keep: bool = False) -> Tensor:
        """One of them. ``keep``: it will be used as it is, and not only read once."""


@dataclass(frozen=True)
class Precision:
    """``dtype`` (None: as they are stored) for all weights but those that ``few_bits`` holds."""

    dtype: torch.dtype | None = None
    few_bits: FewBits | None = None

    def __str__(self) -> str:
        return self.few_bits or str(self.dtype).removeprefix("torch.")


def stored_few_bits(specs: Mapping[str, Spec]) -> FewBits | None:
    """How the projections of a file are held, None if as ordinary numbers."""
    return next(
        (_STORED[spec.dtype] for name, spec in specs.items() if is_rounded(name) and spec.dtype in _STORED), None
    )


def converted_specs(weights: Weights, precision: Precision) -> dict[str, Spec]:
    """What ``convert`` will yield; InputError where the weights cannot be held so."""
    specs: dict[str, Spec] = {}
    for name, sources in _plan(weights, precision):
        spec = weights.specs[name]
        if len(sources) == 2 and precision.few_bits is None:
            inputs = spec.shape[1] * (2 if spec.dtype == torch.uint8 else 1)
            specs[name] = Spec(precision.dtype or torch.float32, (spec.shape[0], inputs))
        elif len(sources) == 2:
            specs |= {source: weights.specs[source] for source in sources}
        elif precision.few_bits == "int8" and is_rounded(name):
            specs[name] = Spec(torch.int8, spec.shape)
            specs[parts_of(name, "int8")[1]] = Spec(torch.bfloat16, spec.shape[:1])
        elif precision.few_bits == "int4" and is_rounded(name):
            outputs, inputs = spec.shape
            try:
                groups = inputs // group_of(inputs)
            except ValueError as error:
                raise InputError(f"{name} cannot be held in int4: {error}") from None
            specs[name] = Spec(torch.uint8, (outputs, inputs // 2))
            specs[parts_of(name, "int4")[1]] = Spec(torch.bfloat16, (groups, outputs, 2))
        else:
            specs[name] = Spec(precision.dtype or spec.dtype, spec.shape)
    return specs


def convert(
    weights: Weights,
    precision: Precision,
    *,
    device: torch.device | str = "cpu",
    keep: bool = False,
    memory: Memory | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """All tensors as ``precision`` holds them, on ``device``, reading one at a time.

    With ``keep``, those that need no conversion may stay in their file, mapped into memory. The others are put into
    ``memory``, if there is some.
    """
    stored, specs = stored_few_bits(weights.specs), converted_specs(weights, precision)
    place = memory.place if memory is not None else lambda tensor: tensor

    def read(name: str) -> Tensor:
        return weights.read(name).to(device)

    for name, sources in _plan(weights, precision):
        spec = weights.specs[name]
        if len(sources) == 2 and precision.few_bits is None:
            assert stored is not None
            restored = restore_weight(read(sources[0]), read(sources[1]), stored)
            yield name, place(restored.to(precision.dtype or torch.float32))
        elif len(sources) == 2 or (precision.dtype in (None, spec.dtype) and not _to_round(name, precision)):
            yield from ((part, weights.read(part, keep=True) if keep else place(read(part))) for part in sources)
        elif _to_round(name, precision):
            assert precision.few_bits is not None
            room = None if memory is None else memory.room(specs[name])
            for part, tensor in round_weight(name, read(name), precision.few_bits, room).items():
                yield part, tensor if part == name else place(tensor)
        else:
            assert precision.dtype is not None
            room = None if memory is None else memory.room(specs[name])
            yield name, cast(read(name), precision.dtype, room)


class Memory:
    """Memory for many tensors that stay, in large blocks.

    With blocks of its own for each, the system's allocator is left with holes between those that stay and those that
    go: a tenth of the weights.
    """

    BLOCK = 1 << 28

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def room(self, spec: Spec) -> Tensor:
        """An uninitialised tensor."""
        size = -(-spec.num_bytes // 64) * 64
        if size > self.BLOCK // 4:
            return torch.empty(spec.shape, dtype=spec.dtype)
        if self._used + size > len(self._block):
            self._block, self._used = torch.empty(self.BLOCK, dtype=torch.uint8), 0
        part = self._block[self._used : self._used + spec.num_bytes]
        self._used += size
        return part.view(spec.dtype).view(spec.shape)

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in here."""
        return self.room(Spec(tensor.dtype, tuple(tensor.shape))).copy_(tensor)


def cast(tensor: Tensor, dtype: torch.dtype, result: Tensor | None = None) -> Tensor:
    """``tensor`` as ``dtype``, in ``result`` if that is given.

    From float16 to bfloat16 by way of float32, which takes a CPU half the time.
    """
    result = torch.empty_like(tensor, dtype=dtype) if result is None else result
    if {tensor.dtype, dtype} != {torch.float16, torch.bfloat16} or tensor.device.type != "cpu":
        return result.copy_(tensor)
    wide = torch.empty(min(tensor.numel(), 1 << 18))
    for part, target in zip(tensor.reshape(-1).split(1 << 18), result.view(-1).split(1 << 18), strict=True):
        target.copy_(wide[: len(part)].copy_(part))
    return result


def _to_round(name: str, precision: Precision) -> bool:
    return precision.few_bits is not None and is_rounded(name)


def _plan(weights: Weights, precision: Precision) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each weight of the model, and the tensors of the file that it comes from."""
    stored = stored_few_bits(weights.specs)
    if stored is not None and precision.few_bits not in (None, stored):
        raise InputError(f"the weights are stored as {stored}, which cannot be turned into {precision.few_bits}")
    for name in weights.specs:
        if stored is None:
            yield name, (name,)
        elif is_rounded(name):
            _, scale = parts = parts_of(name, stored)
            if scale not in weights.specs:
                raise InputError(f"{scale} is missing")
            yield name, parts
        elif not name.endswith(("scale", "scale_zero")):
            yield name, (name,)
