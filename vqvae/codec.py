"""Images between uint8 pixels and the numbers that the VQ-VAE reads and writes."""

# N images, H height, W width
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cogview.vqvae.model import VQVAE


def to_float(pixels: np.ndarray | Tensor, device: torch.device | None = None) -> Tensor:
    """Return images as float32 (..., 3, H, W) in [0, 1].

    Args:
        pixels: uint8 RGB (..., H, W, 3).
        device: Where the result shall be; by default where ``pixels`` are.
    """
    moved = torch.as_tensor(pixels).to(device=device).movedim(-1, -3)
    return moved.float() / 255


def to_uint8(images: Tensor) -> np.ndarray:
    """Return images (..., 3, H, W) in [0, 1] as uint8 RGB (..., H, W, 3)."""
    return (images * 255).round().byte().movedim(-3, -1).cpu().numpy()


def reconstruct(model: VQVAE, pixels: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Encode images to codes and decode them again.

    Args:
        model: The VQ-VAE.
        pixels: uint8 RGB (N, H, W, 3).
        batch_size: Images that go through the model at once.

    Returns:
        The images that it makes of them, in the form of ``pixels``.
    """
    device = next(model.parameters()).device
    batches = torch.from_numpy(pixels).split(batch_size)
    return np.concatenate([to_uint8(model.decode(model.encode(to_float(batch, device)))) for batch in batches])
