"""Weights of a checkpoint with adapters added, read one tensor at a time.

One rule holds for every format: weights that are stored quantized are restored to float32, the changes of all adapters
are summed in float32 and added once, and the sum is converted to the wanted precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cogview.checkpoints.adapter import Adapter
from cogview.checkpoints.adapter_choice import AdapterChoice
from cogview.checkpoints.precision import TensorSource, stored_quantization
from cogview.checkpoints.safetensors_io import TensorSpec
from cogview.errors import InputError
from cogview.modeling.config import ModelConfig
from cogview.modeling.lora import embedding_with_rows, merged_weight
from cogview.modeling.quantization import dequantize_weight, quantized_names

EMBEDDING = "embedding.weight"


def open_adapters(choices: Sequence[AdapterChoice], config: ModelConfig, name: str) -> list[Adapter]:
    """Open the adapters of a model and check that they belong to it; those at scale 0 are checked and left out.

    Args:
        choices: The adapters and their scales.
        config: Config of the model.
        name: Name or folder of the model.

    Returns:
        The adapters with an effect.

    Raises:
        InputError: An adapter is missing, damaged, or belongs to another model.
    """
    adapters = [Adapter(choice.name, scale=choice.scale) for choice in choices]
    for adapter in adapters:
        adapter.check_model(config, name)
    return [adapter for adapter in adapters if adapter.scale]


class AdaptedWeights:
    """The weights of a file with adapters added: W + the sum of scale * B A (LoRA, arXiv:2106.09685).

    Changed weights are float32; all others are those of the file.

    Args:
        source: The file.
        adapters: Adapters that were checked against the model.
        sign: 1 to add them, -1 to remove them.

    Attributes:
        specs: Dtype and shape of each tensor.

    Raises:
        InputError: Embeddings of words should be removed, whose former values no adapter holds.
    """

    def __init__(self, source: TensorSource, adapters: Sequence[Adapter], sign: int = 1) -> None:
        self._source, self._sign = source, sign
        self._stored = stored_quantization(source.specs)
        self._adapters: dict[str, list[Adapter]] = {}
        for adapter in adapters:
            for projection in adapter.projections:
                self._adapters.setdefault(f"{projection}.weight", []).append(adapter)
        self._learners = [adapter for adapter in adapters if adapter.token_ids]
        if sign < 0 and self._learners:
            raise InputError(
                f"the adapter {self._learners[0].folder} cannot be removed: it has learnt embeddings of words, and "
                "does not hold the former ones; take the model that it was merged into"
            )
        self.specs = dict(source.specs)
        if self._learners:
            self.specs[EMBEDDING] = TensorSpec(torch.float32, self.specs[EMBEDDING].shape)
        for name in self._adapters:
            self.specs[name] = TensorSpec(torch.float32, self._shape(name))
            if self._stored is not None:
                self.specs.pop(quantized_names(name, self._stored)[1], None)

    @property
    def path(self) -> Path:
        """The file, for messages."""
        return self._source.path

    def read(self, name: str, *, keep: bool = False) -> Tensor:
        """Return a tensor; one that the adapters change is float32, in memory of its own."""
        if name == EMBEDDING and self._learners:
            return embedding_with_rows(self._source.read(name), [adapter.row_change() for adapter in self._learners])
        adapters = self._adapters.get(name)
        if adapters is None:
            return self._source.read(name, keep=keep)
        weight = self._source.read(name)
        if self._stored is not None:
            scale = self._source.read(quantized_names(name, self._stored)[1])
            weight = dequantize_weight(weight, scale, self._stored)
        projection = name.removesuffix(".weight")
        return merged_weight(weight, [adapter.change(projection, self._sign) for adapter in adapters])

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.specs[name].shape
        return (shape[0], 2 * shape[1]) if self._stored == "int4" else shape
