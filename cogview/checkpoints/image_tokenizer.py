"""Read and write the folder of an image tokenizer: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cogview.checkpoints.finite import require_finite, rounded
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.checkpoints.sizes import check_vqvae_sizes
from cogview.config_io import from_mapping, to_mapping
from cogview.errors import InputError
from cogview.files import atomic_write, write_json
from cogview.input_files import missing_file
from cogview.plain_data import read_json
from cogview.vqvae.codec import codebook_sha256
from cogview.vqvae.model import VQVAE, VQVAEConfig
from cogview.vqvae.quantizer import RENAMED_AVERAGES

CODEBOOK = "quantizer.codebook"


def codebook_hash(model: VQVAE) -> str:
    """Return ``codebook_sha256`` of the codebook of ``model``."""
    return codebook_sha256(model.codebook)


def save_image_tokenizer(folder: Path, model: VQVAE, dtype: torch.dtype = torch.float32) -> None:
    """Write an image tokenizer.

    Args:
        folder: the folder; it may exist.
        model: the VQ-VAE.
        dtype: dtype of the weights; the codebook stays float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: rounded(name, tensor, torch.float32 if name == CODEBOOK else dtype)
        for name, tensor in model.state_dict().items()
    }
    write_weights(folder / "model.safetensors", weights)
    write_json(folder / "config.json", to_mapping(model.config))


def write_weights(file: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file with the usual permissions of a new file.

    An existing file is replaced, not overwritten: a model may still have it mapped into memory.

    Args:
        file: path of the file.
        weights: contiguous tensors by name.
    """
    with atomic_write(file) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(weights, temporary)
        temporary.chmod(mode)


def read_image_config(folder: Path) -> VQVAEConfig:
    """Read the config of an image tokenizer's folder, and compare it with the header of the weights.

    Raises:
        InputError: if a file is missing or damaged, or the weights are not those that the config describes.
    """
    config_file = folder / "config.json"
    for file in (config_file, folder / "model.safetensors"):
        if not file.is_file():
            raise InputError(f"{folder} is no image tokenizer: {missing_file(folder, file.name)}")
    config = from_mapping(VQVAEConfig, read_json(config_file), where=str(config_file))
    weights = WeightsFile(folder / "model.safetensors")
    check_vqvae_sizes(weights.path, {_present_name(name): spec for name, spec in weights.specs.items()}, config)
    return config


def read_image_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an image tokenizer's folder, in the order of the file.

    Raises:
        InputError: if a number is NaN or infinite.
    """
    path = folder / "model.safetensors"
    weights = {_present_name(name): tensor for name, tensor in load_file(path).items()}
    for name, tensor in weights.items():
        require_finite(f"{path}: {name}", tensor)
    return weights


def load_image_tokenizer(folder: Path) -> VQVAE:
    """Load a folder written by ``save_image_tokenizer`` as float32 on the CPU, in evaluation mode.

    An imported tokenizer carries the averages of its training as well, so that training can continue.

    Raises:
        InputError: if a file is missing, damaged or does not match the config, or a weight is not finite.
    """
    model = VQVAE(read_image_config(folder))
    weights = read_image_weights(folder)
    for name in RENAMED_AVERAGES.values():
        if (average := weights.pop(f"quantizer.{name}", None)) is not None:
            model.quantizer.get_buffer(name).copy_(average)
    model.load_state_dict(weights)
    return model.eval()


def _present_name(name: str) -> str:
    """Return the present name of a stored tensor; averages had others before."""
    module, _, last = name.rpartition(".")
    return f"quantizer.{RENAMED_AVERAGES.get(last, last)}" if module == "quantizer" else name
