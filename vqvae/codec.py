"""Protocols of image tokenizers, and images between uint8 pixels and the floats that they take."""

# N images, H height, W width, K number of codes, D width of a code
from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-3  # by which images may leave [0, 1], as after resizing in 16 bits
MIN_MSE = 1e-10  # of values in [0, 1]: equal images have a PSNR of 100 dB


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


def check_images(images: object) -> None:
    """Check the images that an ``ImageTokenizer`` is given to encode; their shape is checked by its networks.

    Args:
        images: The images.

    Raises:
        TypeError: They are no tensor of floats.
        ValueError: A value is outside [0, 1] by more than ``ROUNDING``, or not finite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(
            f"images must be a tensor (B, 3, H, W) of floats in [0, 1], got {_described(images)}; to_float in "
            "cogview.vqvae.codec converts uint8 pixels, and CogView.encode_images takes images of any form"
        )
    if images.numel():
        smallest, greatest = map(float, torch.aminmax(images.detach()))
        if not (smallest >= -ROUNDING and greatest <= 1 + ROUNDING):  # also of NaN
            raise ValueError(f"images must be in [0, 1], got values from {smallest:.4g} to {greatest:.4g}")


def check_codes(codes: object, num_codes: int) -> None:
    """Check the codes that an ``ImageDecoder`` is given; their range is checked on a CPU only, without a GPU's wait.

    Args:
        codes: The codes.
        num_codes: Size of the codebook.

    Raises:
        TypeError: They are no tensor of integers.
        ValueError: They have another shape, or one is out of range.
    """
    if not isinstance(codes, Tensor) or codes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"codes must be an int64 tensor (B, h, w), got {_described(codes)}")
    if codes.dim() != 3:
        raise ValueError(f"codes must be (batch, height, width), got {tuple(codes.shape)}")
    if codes.device.type == "cpu" and codes.numel():
        smallest, greatest = map(int, torch.aminmax(codes))
        if smallest < 0 or greatest >= num_codes:
            wrong = smallest if smallest < 0 else greatest
            raise ValueError(f"codes must be from 0 to {num_codes - 1}, the last of the codebook, got {wrong}")


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

    Raises:
        TypeError: They are no uint8 array or tensor.
    """
    if not isinstance(pixels, np.ndarray | Tensor) or pixels.dtype not in (np.uint8, torch.uint8):
        raise TypeError(f"pixels must be a uint8 array or tensor (..., H, W, 3), got {_described(pixels)}")
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
    batches = [pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size)]
    return np.concatenate([to_uint8(model.decode(model.encode(to_float(batch, device)))) for batch in batches])


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two images in dB.

    Args:
        image: uint8 of any shape.
        other: uint8 of the same shape.

    Returns:
        At most 100 dB, which is the value of equal images.
    """
    mse = np.square((image.astype(np.float64) - other) / 255).mean()
    return -10 * math.log10(max(mse, MIN_MSE))


def _described(value: object) -> str:
    """Return the type of a value, with the dtype and shape of an array or tensor."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"{kind} of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}".removeprefix("builtins.")
