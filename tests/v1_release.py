"""Models in the format of the published CogView v1 files, built from seeds."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# How the published text model splits 一只可爱的小猫坐在窗台上 and 一只猫, and the ids of those pieces.
PIECES = {15955: "▁一只", 32637: "可爱的小", 44506: "猫", 3500: "坐在", 44893: "窗", 9388: "台上"}


def golden_release() -> V1Release:
    """Return the model that ``released.npz`` was computed with.

    It has 3 layers, width 64, 4 heads, the whole vocabulary and the published VQ-VAE.
    """
    return V1Release(
        transformer=_transformer_weights(transformer_shapes(num_layers=3, width=64, num_rows=58_240)),
        image_tokenizer=_image_weights(_image_shapes(num_codes=8192, code_width=256, channels=512)),
        text_model=_text_model(50_000, PIECES),
    )


def small_release() -> V1Release:
    """Return a model of 2 MB: 2 layers, width 64, 4 heads, 16 codes and 77 pieces, which make 128 rows."""
    return V1Release(
        transformer=_transformer_weights(transformer_shapes(num_layers=2, width=64, num_rows=128)),
        image_tokenizer=_image_weights(_image_shapes(num_codes=16, code_width=4, channels=64)),
        text_model=_text_model(77, dict(enumerate(PIECES.values(), start=1))),
    )


@dataclass(frozen=True, eq=False)
class V1Release:
    """A model in the published format: float32 tensors under the published names, and the bytes of its text model."""

    transformer: dict[str, Tensor]
    image_tokenizer: dict[str, Tensor]
    text_model: bytes

    def write(
        self,
        folder: Path,
        *,
        half: bool = False,
        shards: int = 1,
        prefix: str = "",
        tracker: str = "50000",
        legacy: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Path]:
        """Write the files of the release into ``folder``.

        Args:
            folder: Existing folder.
            half: Store tensors as float16.
            shards: Number of model-parallel files of the transformer.
            prefix: Text before the name of each tensor.
            tracker: Content of the tracker file, and the folder that it names.
            legacy: Write the layout that torch had before 1.6.
            extra: Entries beside the weights in each file of the transformer.

        Returns:
            Paths by the names of the parameters of `import_v1`.
        """
        dtype = torch.float16 if half else torch.float32
        states = folder / "transformer" / tracker
        states.mkdir(parents=True)
        (folder / "transformer" / "latest_checkpointed_iteration.txt").write_text(f"{tracker}\n")
        for rank in range(shards):
            module = {prefix + name: _shard(name, t, rank, shards).to(dtype) for name, t in self.transformer.items()}
            content = {"module": module, "iteration": 50000, **(extra or {})}
            file = states / f"mp_rank_{rank:02d}_model_states.pt"
            torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        image = {prefix + name: tensor.to(dtype) for name, tensor in self.image_tokenizer.items()}
        torch.save(image, folder / "vqvae.pt", _use_new_zipfile_serialization=not legacy)
        (folder / "text.model").write_bytes(self.text_model)
        return {
            "source": folder / "transformer",
            "image_tokenizer": folder / "vqvae.pt",
            "text_model": folder / "text.model",
        }


def transformer_shapes(num_layers: int, width: int, num_rows: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a published transformer by tensor name; ``num_rows`` is the size of its vocabulary."""
    matrices = {
        "attention.query_key_value": (3 * width, width),
        "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (4 * width, width),
        "mlp.dense_4h_to_h": (width, 4 * width),
    }
    norms = [
        f"layers.{number}.{norm}_layernorm"
        for number in range(num_layers)
        for norm in ("input", "post_attention", "third", "fourth")
    ]
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (num_rows, width),
        "transformer.position_embeddings.weight": (1089, width),
    }
    for number in range(num_layers):
        for name, shape in matrices.items():
            shapes[f"transformer.layers.{number}.{name}.weight"] = shape
            shapes[f"transformer.layers.{number}.{name}.bias"] = shape[:1]
    for norm in (*norms, "final_layernorm"):
        shapes[f"transformer.{norm}.weight"] = shapes[f"transformer.{norm}.bias"] = (width,)
    return shapes


def _image_shapes(num_codes: int, code_width: int, channels: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "quantize_t.embed": (code_width, num_codes),
        "quantize_t.cluster_size": (num_codes,),
        "quantize_t.embed_avg": (code_width, num_codes),
        "enc_b.blocks.0.weight": (channels, 3, 4, 4),
        "enc_b.blocks.6.weight": (code_width, channels, 1, 1),
        "enc_b.blocks.6.bias": (code_width,),
        "dec.blocks.0.weight": (code_width, channels, 4, 4),  # transposed: inputs first
        "dec.blocks.6.weight": (3, channels, 1, 1),
        "dec.blocks.6.bias": (3,),
    }
    shapes |= {f"{part}.blocks.{n}.weight": (channels, channels, 4, 4) for part in ("enc_b", "dec") for n in (2, 4)}
    return shapes | {f"{part}.blocks.{n}.bias": (channels,) for part in ("enc_b", "dec") for n in (0, 2, 4)}


def _transformer_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the weights that ``released.npz`` was computed with."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("layernorm.weight"):
            weights[name] = 1 + _normal(name, shape, 0.1)
        elif name.endswith("bias"):
            weights[name] = _normal(name, shape, 0.02)
        elif "embeddings" in name:
            weights[name] = _normal(name, shape, 2.0 if "position" in name else 0.5)
        else:
            weights[name] = _normal(name, shape, 2.0 / math.sqrt(shape[1]))
    return weights


def _image_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the weights that ``released.npz`` was computed with."""
    weights = {}
    for name, shape in shapes.items():
        if name.startswith("quantize_t."):
            weights[name] = _normal(name, shape, 0.6)
        elif name.endswith("bias"):
            weights[name] = _normal(name, shape, 0.1)
        else:
            transposed = name.startswith("dec") and shape[-1] > 1
            fan = shape[0] * 4 if transposed else math.prod(shape[1:])
            weights[name] = _normal(name, shape, math.sqrt(2.0 / fan))
    return weights


def _normal(name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Return N(0, std) noise that depends on the published name of the tensor alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"0:{name}".encode()))
    return torch.randn(shape, generator=generator) * std


def _shard(name: str, tensor: Tensor, rank: int, shards: int) -> Tensor:
    """Return the part of a tensor that model-parallel rank ``rank`` of ``shards`` holds."""
    rest = tensor.shape[1:]
    if ".query_key_value." in name:  # its part of the queries, of the keys and of the values
        return tensor.reshape(3, shards, -1, *rest)[:, rank].reshape(-1, *rest).clone()
    if name.startswith("word_embeddings") or ".dense_h_to_4h." in name:
        return tensor.reshape(shards, -1, *rest)[rank].clone()
    if name.endswith((".dense.weight", ".dense_4h_to_h.weight")):
        return tensor.reshape(len(tensor), shards, -1)[:, rank].clone()
    return tensor


def _text_model(size: int, pieces: Mapping[int, str]) -> bytes:
    """Return a SentencePiece model file of ``size`` pieces: ``<unk>``, ``pieces`` by id, and fillers."""
    fields = []
    for index in range(size):
        piece = "<unk>" if index == 0 else pieces.get(index, f"字{index}")
        kind = 2 if index == 0 else 1  # unknown, normal
        fields.append(_field(1, _field(1, piece.encode()) + _field(2, -1.0) + _field(3, kind)))
    trainer, normalizer = _field(3, 1) + _field(4, size), b""  # unigram; text stays as it is
    return b"".join([*fields, _field(2, trainer), _field(3, normalizer)])


def _field(number: int, value: bytes | float | int) -> bytes:
    """Return a field of a protocol buffer with its key."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
