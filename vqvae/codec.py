"""Protocols of image tokenizers, and images between uint8 pixels and the floats that they take."""

# N images, H height, W width, K number of codes, D width of a code
from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ImageDecoder(Protocol):
    """A model that turns a grid of codes into an image."""

    @property
    def downsampling(self) -> int:
        """Pixels on each side of the square that one code stands for."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Return the (N, 3, H, W) images in [0, 1] of (N, H / downsampling, W / downsampling) int64 codes."""
        ...


class ImageTokenizer(ImageDecoder, Protocol):
    """A model that turns images into codes of a codebook, and codes into images; ``VQVAE`` is one."""

    @property
    def codebook(self) -> Tensor:
        """The (K, D) float32 code vectors, on the device of the model."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return the (N, H / downsampling, W / downsampling) int64 codes of (N, 3, H, W) images in [0, 1]."""
        ...


def codebook_sha256(codebook: Tensor) -> str:
    """Return the SHA-256 of a (K, D) codebook as little-endian float16, equal for any stored precision.

    Two image tokenizers with one hash give codes the same meaning.
    """
    half = codebook.detach().to("cpu", torch.float16).contiguous()
    return hashlib.sha256(half.numpy().astype("<f2").tobytes()).hexdigest()


def to_float(pixels: np.ndarray | Tensor, device: torch.device | None = None) -> Tensor:
    """Return images as float32 (..., 3, H, W) in [0, 1].

    Args:
        pixels: uint8 RGB (..., H, W, 3).
        device: Device of the result; by default that of ``pixels``.
    """
    if isinstance(pixels, np.ndarray) and not pixels.flags.writeable:
        pixels = pixels.copy()  # torch warns about arrays that it could write to by mistake
    moved = torch.as_tensor(pixels).to(device=device).movedim(-1, -3)
    return moved.float() / 255


def to_uint8(images: Tensor) -> np.ndarray:
    """Return images (..., 3, H, W) in [0, 1] as uint8 RGB (..., H, W, 3)."""
    return (images * 255).round().byte().movedim(-3, -1).cpu().numpy()


def reconstruct(model: ImageTokenizer, pixels: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Encode images to codes and decode the codes.

    Args:
        model: The image tokenizer.
        pixels: uint8 RGB (N, H, W, 3).
        batch_size: Images in one forward pass.

    Returns:
        The decoded images in the shape and dtype of ``pixels``.
    """
    device = model.codebook.device
    batches = torch.from_numpy(pixels).split(batch_size)
    return np.concatenate([to_uint8(model.decode(model.encode(to_float(batch, device)))) for batch in batches])
