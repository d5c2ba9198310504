"""A small model, its sequences, and a probe of the bytes that tensors take, for the tests of estimates."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogview.modeling.config import ModelConfig, TransformerConfig
from cogview.planning.inference import InferenceEstimate, estimate_inference
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.tasks import trained_tasks
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.vqvae.model import VQVAEConfig

IMAGE = VQVAEConfig(channels=(8, 8, 16), num_codes=300, code_width=4)
SHAPE = TransformerConfig(num_layers=3, width=64, num_heads=4, vocabulary_size=896, max_positions=128)


def small_config(num_codes: int = 300, **settings: Any) -> ModelConfig:
    """Return a model of 8 x 8 codes and texts of up to 20 pieces that is trained for every task."""
    vocabulary = Vocabulary(num_image_codes=num_codes, num_text_pieces=500)
    shape = replace(SHAPE, vocabulary_size=vocabulary.padded_size)
    values = {"transformer": shape, "vocabulary": vocabulary, "grid": 8, "tasks": trained_tasks(), "max_text": 20}
    return ModelConfig(**{**values, **settings})


def small_estimate(config: ModelConfig | None = None, **settings: Any) -> InferenceEstimate:
    """Return the estimate of generating one image, with changes by ``settings``."""
    return estimate_inference(config or small_config(), IMAGE, **{"task": "generate", "rows": 1, **settings})


def sequence_of(
    config: ModelConfig, task: str, number: int = 0, text: int = 20, known: slice | None = None
) -> TokenSequence:
    """Return a sequence whose given part differs from that of other numbers.

    Args:
        config: The model.
        task: generate, caption, upscale or low_level.
        number: Value of all given pieces and codes.
        text: Pieces of the text.
        known: Codes of the blank image that are given.
    """
    numbers = [number] * 64
    values: dict[str, Any] = {"text": [number] * text, "small": numbers[:16], "image": None, "max_text": None}
    if known is not None:
        values["image"] = np.ma.masked_array(np.reshape(numbers, (8, 8)), mask=True)
        values["image"][known] = number
    elif task == "caption":
        values |= {"image": numbers, "max_text": 20}
    names = {"generate": ("text", "image"), "caption": ("image", "max_text")}
    given = {name: values[name] for name in names.get(task, ("text", "small", "image"))}
    return config.layouts[task].arrange(config.vocabulary, **given)


class PeakMemory(TorchDispatchMode):
    """Records the peak of the bytes of tensors that are alive within a ``with`` block.

    Attributes:
        peak: The bytes, without those of the tensors given to the constructor.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.seen: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation, and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known and key not in self.seen:
                    self.seen[key] = weakref.ref(storage, lambda _, key=key, size=size: self._free(key, size))
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        del self.seen[key]
        self.now -= size
