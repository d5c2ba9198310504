"""The state of a trainer in a checkpoint: ``trainer.safetensors`` and ``trainer.json`` beside the model.

``trainer.safetensors`` holds Adam's moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, ``trainer.json`` the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogview.checkpoints.finite import require_finite
from cogview.checkpoints.image_tokenizer import write_weights
from cogview.checkpoints.safetensors_io import describe_mismatch, open_safetensors
from cogview.errors import InputError, is_out_of_memory, reason_of
from cogview.files import write_json
from cogview.formatting import shorten
from cogview.plain_data import read_json
from cogview.training.distributed import DistributedContext
from cogview.training.engines.base import ADAM_MOMENTS, TrainingState

MOMENTS_FILE, STATE_FILE = "trainer.safetensors", "trainer.json"
_NUMBERS = ("updates", "loss_scale", "good_steps", "skipped_steps")  # of the state


class StateMismatchError(InputError):
    """Raised for the state of another architecture, or of another image tokenizer: it is sound, but does not fit."""


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """Reading and writing of an adapter, where only an adapter is trained.

    Attributes:
        write: Writes the adapter's weights, by parameter names, into a folder.
        read: Reads them from a checkpoint.
    """

    write: Callable[[Path, Mapping[str, Tensor]], None]
    read: Callable[[Path], Mapping[str, Tensor]]


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file whose names start with a prefix; each is read when it is accessed."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        """Open a file.

        Args:
            path: The safetensors file.
            prefix: Start of the stored names, which the keys of this mapping omit.

        Raises:
            InputError: The file is missing or damaged.
        """
        self.path = path
        self.prefix = prefix
        self._file: Any = open_safetensors(path)
        self._names = [name for name in self._file.keys() if name.startswith(prefix)]  # noqa: SIM118 it is no dict

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self.prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes by name, without reading the tensors."""
        return {name.removeprefix(self.prefix): tuple(self._file.get_slice(name).get_shape()) for name in self._names}


def check_stored(tensors: Mapping[str, Tensor], context: DistributedContext) -> None:
    """Check that stored tensors are finite; each process reads its share of them.

    Args:
        tensors: Tensors by name. Those in memory were checked when they were read.
        context: The processes that train together.

    Raises:
        NonFiniteWeightsError: A number is NaN or infinite. The step after it would have no finite loss.
    """
    if isinstance(tensors, StoredTensors):
        for name in list(tensors)[context.rank :: context.size]:
            require_finite(f"{tensors.path}: {tensors.prefix}{name}", tensors[name])


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return shapes by name; stored tensors are not read for it."""
    if isinstance(tensors, StoredTensors):
        return tensors.shapes()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter; in ZeRO stage 3 the local tensor is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def write_state(folder: Path, state: TrainingState, *, engine: str, num_processes: int, skipped_steps: int) -> None:
    """Write the moments and numbers of ``state`` into a checkpoint folder.

    Args:
        folder: The checkpoint.
        state: The engine's state; its weights belong to the model and are not written.
        engine: Name of the engine, for information.
        num_processes: Number of processes, for information.
        skipped_steps: Steps skipped so far.
    """
    moments = {f"{moment}.{name}": value for moment, values in state.moments.items() for name, value in values.items()}
    write_weights(folder / MOMENTS_FILE, moments)
    content = {
        "engine": engine,
        "processes": num_processes,
        "updates": state.updates,
        "loss_scale": state.loss_scale,
        "good_steps": state.good_steps,
        "skipped_steps": skipped_steps,
    }
    write_json(folder / STATE_FILE, content)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the numbers of ``trainer.json``.

    Raises:
        InputError: The folder holds a model without the state of a training, or a number is missing.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} holds a model but no state of a training to go on with ({STATE_FILE} is missing): begin from "
            f"its weights with --init-from {folder}"
        )
    content = read_json(path)
    for name in _NUMBERS:
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
            raise InputError(f"{path} is damaged: {name} must be a number from 0 on, got {value}")
    return dict(content)


def stored_state(
    folder: Path, numbers: Mapping[str, Any], weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> TrainingState:
    """Return the state in a checkpoint, whose tensors are read on access.

    Args:
        folder: The checkpoint.
        numbers: Its numbers, from ``read_state``.
        weights: Its trained weights by name, stored or in memory.
        expected: Shapes of the trained parameters.

    Raises:
        StateMismatchError: Shapes differ from ``expected``.
        InputError: The moments are missing or damaged.
    """
    moments = {moment: StoredTensors(folder / MOMENTS_FILE, f"{moment}.") for moment in ADAM_MOMENTS}
    for stored in (weights, *(values for values in moments.values() if len(values))):
        if problem := describe_mismatch(expected, shapes_of(stored)):
            raise StateMismatchError(problem)
    return TrainingState(
        weights=weights,
        moments=moments if all(map(len, moments.values())) else {},
        updates=numbers["updates"],
        loss_scale=numbers["loss_scale"],
        good_steps=numbers["good_steps"],
    )


def read_pickled_state(path: Path) -> dict[str, Any]:
    """Return a state that ``torch.save`` has written: tensors and numbers, in mappings and lists.

    Args:
        path: The file.

    Raises:
        InputError: The file is damaged, or a tensor has numbers that are NaN or infinite.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path} is damaged: {shorten(' '.join(reason_of(error).split()), 100)}") from None
    _check_finite(f"{path}: ", "", state)
    return state


def _check_finite(file: str, name: str, value: Any) -> None:
    """Raise NonFiniteWeightsError for the first tensor in nested mappings and lists that is not finite."""
    if isinstance(value, Tensor):
        require_finite(file + name, value)
    elif isinstance(value, (Mapping, list)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_finite(file, f"{name}.{key}" if name else str(key), inner)
