"""Read and write the image tokenizer of CogView v1, one ``.pt`` file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cogview.checkpoints.finite import require_finite
from cogview.checkpoints.pickles import StoredTensor, read_pickle, tensors_of
from cogview.checkpoints.safetensors_io import TensorSpec, describe_mismatch
from cogview.checkpoints.sizes import require_float, vqvae_shapes
from cogview.checkpoints.v1_format import unwrapped
from cogview.errors import InputError
from cogview.input_files import open_regular
from cogview.vqvae.model import VQVAEConfig

_AVERAGES = {"quantize_t.cluster_size": "quantizer.ema_cluster_size", "quantize_t.embed_avg": "quantizer.ema_sum"}


def read_v1_vqvae(path: Path) -> tuple[VQVAEConfig, dict[str, Tensor]]:
    """Read an image tokenizer of CogView v1.

    Args:
        path: the ``.pt`` file.

    Returns:
        Its config, and its tensors under our names, including the averages of its training beside the codebook.

    Raises:
        InputError: if the file is not such a tokenizer, is damaged or cut short.
    """
    with open_regular(path) as file:
        tensors = tensors_of(unwrapped(read_pickle(file, str(path))))
        if "word_embeddings.weight" in tensors:
            raise InputError(
                f"{path} is a transformer; expected an image tokenizer such as vqvae_hard_biggerset_011.pt"
            )
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        codebook = shapes.get("quantize_t.embed", ())
        if len(codebook) != 2:
            raise InputError(f"{path} is no image tokenizer of CogView: quantize_t.embed is missing")
        config = _vqvae_config(path, shapes)
        try:
            return config, {_our_vqvae_name(name): _turned(name, _read(name, t)) for name, t in tensors.items()}
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def v1_vqvae_tensors(config: VQVAEConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of an image tokenizer under the names and shapes of CogView v1; the inverse of ``read_v1_vqvae``.

    Averages that a model of ours lacks are filled in as if every code had been chosen once.

    Args:
        config: config of the image tokenizer.
        weights: tensors under our names.

    Raises:
        InputError: if the architecture does not exist in CogView v1.
    """
    if config.architecture != "released":
        raise InputError(f"CogView v1 has no layers for an image tokenizer of the architecture {config.architecture!r}")
    weights = dict(weights)
    codebook = weights["quantizer.codebook"]
    weights.setdefault("quantizer.ema_cluster_size", torch.ones(len(codebook)))
    weights.setdefault("quantizer.ema_sum", codebook)
    theirs = {ours: name for name, ours in _AVERAGES.items()} | {"quantizer.codebook": "quantize_t.embed"}
    tensors = {}
    for ours, tensor in weights.items():
        name = theirs.get(ours) or ours.replace("encoder.", "enc_b.blocks.").replace("decoder.", "dec.blocks.")
        tensors[name] = _turned(name, tensor)
    return tensors


def is_v1_vqvae(path: Path) -> bool:
    """Return whether a ``.pt`` file holds an image tokenizer of CogView v1; raise InputError if it is not readable."""
    with open_regular(path) as file:
        return "quantize_t.embed" in tensors_of(unwrapped(read_pickle(file, str(path))))


def _vqvae_config(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> VQVAEConfig:
    """Return the config of a v1 image tokenizer by its shapes; raise InputError for other networks."""
    width, codes = shapes["quantize_t.embed"]
    channels = tuple((shapes.get(f"enc_b.blocks.{index}.weight") or (1,))[0] for index in (0, 2, 4))
    assert len(channels) == 3
    try:
        config = replace(VQVAEConfig.released(), channels=channels, num_codes=codes, code_width=width)
    except ValueError as error:
        raise InputError(f"{path} is no image tokenizer of CogView: {error}") from None
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in vqvae_shapes(config).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in v1_vqvae_tensors(config, tensors).items()}
    given = {name: shape for name, shape in shapes.items() if name in wanted or name not in _AVERAGES}
    needed = {name: shape for name, shape in wanted.items() if name in given or name not in _AVERAGES}
    if problem := describe_mismatch(needed, given):
        raise InputError(f"{path} is no image tokenizer of CogView: {problem}")
    return config


def _our_vqvae_name(name: str) -> str:
    if name == "quantize_t.embed":
        return "quantizer.codebook"
    return _AVERAGES.get(name) or name.replace("enc_b.blocks.", "encoder.").replace("dec.blocks.", "decoder.")


def _read(name: str, stored: StoredTensor) -> Tensor:
    """Read a tensor; raise InputError unless it holds finite floating-point numbers."""
    require_float(name, TensorSpec(stored.dtype, stored.shape))
    tensor = stored.read()
    require_finite(name, tensor)
    return tensor


def _turned(name: str, tensor: Tensor) -> Tensor:
    """Transpose the codebook: codes are columns in CogView v1 and rows here; return other tensors unchanged."""
    return tensor.T.contiguous() if name in ("quantize_t.embed", "quantize_t.embed_avg") else tensor
