"""LPIPS by AlexNet: the perceptual distance of two images (Zhang et al., 2018, arXiv:1801.03924)."""

# H W pixels, C channels of a layer
from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cogview.errors import InputError
from cogview.evaluation.features import load_weights, read_tensors
from cogview.evaluation.records import NetworkRecord
from cogview.files import file_sha256

MIN_SIDE = 32  # pixels: the last layer of AlexNet has a position
_LAYERS = (1, 4, 7, 9, 11)  # of the features, behind each activation
_CHANNELS = (64, 192, 384, 256, 256)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1], as published


class AlexNetDistance:
    """LPIPS version 0.1.

    Args:
        weights: Weights of AlexNet as torchvision has them, ``alexnet-owt-7be5be79.pth``.
        device: Device of the network.
        heads: Weights of the layers; by default those of the package ``lpips``.

    Raises:
        InputError: The package is missing, or a file has weights of another network.
    """

    def __init__(self, weights: Path, device: torch.device, heads: Path | None = None) -> None:
        heads = heads or _shipped_heads()
        layers = _alexnet()
        tensors = read_tensors(weights)
        inner = {name.removeprefix("features."): each for name, each in tensors.items() if name.startswith("features.")}
        load_weights(layers, inner, weights, "alexnet")
        linear = nn.ModuleDict(
            {f"lin{number}": nn.Conv2d(size, 1, 1, bias=False) for number, size in enumerate(_CHANNELS)}
        )
        load_weights(
            linear, {name.replace(".model.1", ""): each for name, each in read_tensors(heads).items()}, heads, "LPIPS"
        )
        self._layers, self._linear = layers.to(device).eval(), linear.to(device).eval()
        self._device = device
        self._shift, self._scale = (torch.tensor(each, device=device).view(3, 1, 1) for each in (_SHIFT, _SCALE))
        digest = hashlib.sha256(f"{file_sha256(weights)}\n{file_sha256(heads)}\n".encode())
        self.record = NetworkRecord(
            name="lpips-alexnet", sha256=digest.hexdigest(), dimensions=sum(_CHANNELS), label="LPIPS 0.1, AlexNet"
        )

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, other: np.ndarray) -> float:
        """Return the distance of two images, 0 of equal ones.

        Args:
            image: uint8 RGB (H, W, 3), with sides of at least ``MIN_SIDE``.
            other: uint8 of the same shape.

        Raises:
            InputError: They are too small.
        """
        if min(image.shape[:2]) < MIN_SIDE:
            raise InputError(f"LPIPS needs sides of at least {MIN_SIDE} pixels, got {min(image.shape[:2])}")
        pixels = torch.from_numpy(np.stack([image, other])).to(self._device).movedim(3, 1)
        hidden = (pixels.float() / 127.5 - 1 - self._shift) / self._scale
        distance = torch.zeros((), device=self._device)
        for number, layer in enumerate(self._layers):
            hidden = layer(hidden)
            if number in _LAYERS:
                one, two = _unit_length(hidden)
                weighted = self._linear[f"lin{_LAYERS.index(number)}"]((one - two).square()[None])
                distance = distance + weighted.mean()
        return float(distance)


def _unit_length(hidden: Tensor) -> Tensor:
    """Return activations (N, C, H, W) whose vectors of channels have the length 1."""
    return hidden / (hidden.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _alexnet() -> nn.Sequential:
    """Return the convolutions of AlexNet, as torchvision arranges them."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _shipped_heads() -> Path:
    """Return the file of the package ``lpips``, which is not imported: it would need torchvision."""
    found = importlib.util.find_spec("lpips")
    if found is None or found.origin is None:
        raise InputError("the package lpips is missing, whose weights LPIPS needs; install it: pip install lpips")
    return Path(found.origin).parent / "weights" / "v0.1" / "alex.pth"
