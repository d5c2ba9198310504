"""Compare the sizes that configs state with the headers of weight files, before anything is built or allocated."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from cogview.checkpoints.safetensors_io import TensorSpec, describe_mismatch
from cogview.errors import InputError
from cogview.modeling.config import TransformerConfig
from cogview.vqvae.model import VQVAE, VQVAEConfig
from cogview.vqvae.quantizer import RENAMED_AVERAGES

# Tensor and axis that show a size of a config.
_TRANSFORMER_SIZES = {
    "vocabulary_size": ("embedding.weight", 0),
    "width": ("embedding.weight", 1),
    "max_positions": ("positions.weight", 0),
}
_VQVAE_SIZES = {"num_codes": ("quantizer.codebook", 0), "code_width": ("quantizer.codebook", 1)}
_AVERAGES = tuple(f"quantizer.{name}" for name in RENAMED_AVERAGES.values())  # only training needs them


def check_transformer_sizes(path: Path, specs: Mapping[str, TensorSpec], config: TransformerConfig) -> None:
    """Compare the config of a transformer with the header of its weights.

    Args:
        path: The file of the weights, for messages.
        specs: Tensors of the file, as floating-point weights (``converted_specs``).
        config: The config.

    Raises:
        InputError: A size differs, a tensor is missing, or one is unknown.
    """
    shapes = {name: spec.shape for name, spec in specs.items()}
    layers = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    if config.num_layers != layers:
        raise _mismatch(path, f"num_layers is {config.num_layers}, the file holds {layers} layers")
    _check_fields(path, shapes, config, _TRANSFORMER_SIZES)
    if problem := describe_mismatch(config.tensor_shapes, shapes):
        raise _mismatch(path, problem)


def check_vqvae_sizes(path: Path, specs: Mapping[str, TensorSpec], config: VQVAEConfig) -> None:
    """Compare the config of a VQ-VAE with the header of its weights, which may hold the averages of its training.

    Args:
        path: The file of the weights, for messages.
        specs: Tensors of the file.
        config: The config.

    Raises:
        InputError: A size differs, a tensor is missing, is unknown or holds no floating-point numbers.
    """
    shapes = {name: spec.shape for name, spec in specs.items()}
    _check_fields(path, shapes, config, _VQVAE_SIZES)
    wanted = vqvae_shapes(config)
    if problem := describe_mismatch({n: s for n, s in wanted.items() if n in shapes or n not in _AVERAGES}, shapes):
        raise _mismatch(path, problem)
    for name, spec in specs.items():
        require_float(f"{path}: {name}", spec)


@functools.cache
def vqvae_shapes(config: VQVAEConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a VQ-VAE by its name, the averages of its training included.

    Args:
        config: The config, whose limits bound the time.
    """
    with torch.device("meta"):  # no memory and no random numbers
        model = VQVAE(config)
    buffers = {f"quantizer.{name}": buffer for name, buffer in model.quantizer.named_buffers()}
    return {name: tuple(tensor.shape) for name, tensor in (dict(model.state_dict()) | buffers).items()}


def require_float(where: str, spec: TensorSpec) -> None:
    """Raise InputError unless a tensor that is described by ``where`` holds floating-point numbers."""
    if not spec.dtype.is_floating_point:
        stored = str(spec.dtype).removeprefix("torch.")
        raise InputError(f"{where} is stored as {stored}, expected floating-point numbers; restore the file")


def _check_fields(
    path: Path, shapes: Mapping[str, tuple[int, ...]], config: object, sizes: Mapping[str, tuple[str, int]]
) -> None:
    """Raise InputError for the first size of a config that a tensor contradicts."""
    for field, (name, axis) in sizes.items():
        shape = shapes.get(name, ())
        if len(shape) > axis and shape[axis] != getattr(config, field):
            raise _mismatch(path, f"{field} is {getattr(config, field)}, {name} has the shape {list(shape)}")


def _mismatch(path: Path, problem: str) -> InputError:
    return InputError(f"{path} does not hold the weights that config.json describes: {problem}")
