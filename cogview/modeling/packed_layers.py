"""The layers of a transformer without module overhead and with prepacked weights, for generation on a CPU.

A small model spends a considerable part of the time of each code in module calls and attribute lookups. Here everything
is looked up once. The computation is that of the modules; ``transformer.py`` is the specification.
"""

# B batch, T new positions, N = B T, S positions in all, D width, E = 3 D, H heads, K size of a head, V output ids
from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from cogview.kernels.layer_norm import pb_relax_layer_norm
from cogview.kernels.linear import can_prepack, linear_prepacked, prepack
from cogview.modeling.config import LAYER_PARTS
from cogview.modeling.kv_cache import AttentionMask, KVCache, attend

if TYPE_CHECKING:
    from cogview.modeling.transformer import Transformer


class PrepackedWeight:
    """A weight in MKL's packed order, packed at first use and again after a change.

    A copy packs anew: packed weights can be neither copied nor stored.
    """

    def __init__(self) -> None:
        self._version: tuple[int, int] | None = None
        self._packed: Tensor | None = None

    def __reduce__(self) -> tuple[type[PrepackedWeight], tuple[()]]:
        return PrepackedWeight, ()

    @property
    def is_made(self) -> bool:
        """Whether the packed weight exists and takes memory."""
        return self._packed is not None

    def of(self, weight_NK: Tensor) -> Tensor:
        """Return the packed form of ``weight_NK``, which must be the same parameter in every call."""
        count = 0 if weight_NK.is_inference() else weight_NK._version  # inference tensors have no version counter
        version = (weight_NK.data_ptr(), count)
        if self._packed is None or version != self._version:
            self._version, self._packed = version, prepack(weight_NK)
        return self._packed


Projection: TypeAlias = tuple[dict[str, Tensor], PrepackedWeight]


class PackedLayers:
    """Layers and output embedding of a transformer, whose weights may be changed or replaced later.

    Attributes:
        packed: Prepacked weights of all projections.
        output_weights: Prepacked rows of the embedding, by the range of ids.
    """

    def __init__(self, transformer: Transformer) -> None:
        self.num_heads, self.width = transformer.config.num_heads, transformer.config.width
        self.layers: list[tuple[Any, ...]] = []  # parameters of each norm and projection, in the order of LAYER_PARTS
        self.packed: list[PrepackedWeight] = []
        self.output_weights: dict[range, PrepackedWeight] = {}
        for layer in transformer.layers:
            parts: list[Any] = []
            for part in map(layer.get_submodule, LAYER_PARTS):
                if isinstance(part, nn.Linear):
                    self.packed.append(PrepackedWeight())
                    parts.append((part._parameters, self.packed[-1]))
                else:
                    parts.append(part._parameters)
            self.layers.append(tuple(parts))

    def accepts(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether MKL has a packed order for a model of ``dtype`` on ``device``."""
        return can_prepack(device, dtype)

    def prepack_bytes(self, *output_ids: range) -> int:
        """Return the bytes of the packed weights that do not exist yet.

        Args:
            *output_ids: Ranges of ids whose logits will be computed.
        """
        width = self.width
        projections = 0 if self.packed[-1].is_made else 12 * width**2 * len(self.layers)  # all are packed, or none
        return 4 * (projections + width * sum(len(ids) for ids in output_ids if ids not in self.output_weights))

    def head(self, hidden: Tensor, weight_VD: Tensor, ids: range) -> Tensor:
        """Return logits (..., V) of ``ids``.

        Args:
            hidden: Hidden states (..., D).
            weight_VD: The whole embedding.
            ids: Ids whose logits are computed.
        """
        weight_VD = weight_VD[ids.start : ids.stop]
        packed = self.output_weights.setdefault(ids, PrepackedWeight())
        return linear_prepacked(hidden, packed.of(weight_VD), weight_VD, None)

    def __call__(self, x_BTD: Tensor, mask: AttentionMask, cache: KVCache | None) -> Tensor:
        """Return the output (B, T, D) of the last layer, before the final norm."""
        shape, x_ND = x_BTD.shape, x_BTD.reshape(-1, self.width)
        # Attention and MLP are separate functions so that their intermediate tensors are freed early.
        for number, (norm1, to_qkv, to_out, norm2, norm3, to_inner, from_inner, norm4) in enumerate(self.layers):
            attended_ND = self._attention(number, _normalize(x_ND, norm1), shape, to_qkv, to_out, mask, cache)
            x_ND = x_ND + _normalize(attended_ND, norm2)
            del attended_ND
            x_ND = x_ND + _normalize(_mlp(_normalize(x_ND, norm3), to_inner, from_inner), norm4)
        return x_ND.view(shape)

    def _attention(
        self,
        number: int,
        x_ND: Tensor,
        shape: Size,
        to_qkv: Projection,
        to_out: Projection,
        mask: AttentionMask,
        cache: KVCache | None,
    ) -> Tensor:
        """Return the attention branch (N, D) of a layer."""
        batch, length, width = shape
        qkv_NE = _project(x_ND, to_qkv)
        qkv_3BHTK = qkv_NE.view(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed_BHTK = attend(number, qkv_3BHTK, mask, cache)
        return _project(mixed_BHTK.transpose(1, 2).reshape(-1, width), to_out)


def _mlp(x_ND: Tensor, to_inner: Projection, from_inner: Projection) -> Tensor:
    """Return the MLP branch (N, D) of a layer."""
    return _project(F.gelu(_project(x_ND, to_inner), approximate="tanh"), from_inner)


def _project(x_ND: Tensor, linear: Projection) -> Tensor:
    """Apply a linear layer with its prepacked weight."""
    parameters, packed = linear
    weight = parameters["weight"]
    return linear_prepacked(x_ND, packed.of(weight), weight, parameters["bias"])


def _normalize(x_ND: Tensor, norm: dict[str, Tensor]) -> Tensor:
    """Apply a PB-relax LayerNorm."""
    return pb_relax_layer_norm(x_ND, norm["weight"], norm["bias"])
