"""The layers of a transformer as a plain run of operations, for a CPU that generates.

A small model takes a good part of its time for each code to go through modules and their attributes. Here everything
is looked up once; what is computed is what the modules compute, and ``transformer.py`` is the specification.
"""

# B batch, T new positions, N = B T, S positions in all, D width, H heads, K size of a head
from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Size, Tensor, nn
from torch.nn import functional as F

from cogview.kernels.attention import attention
from cogview.kernels.layer_norm import pb_relax_layer_norm
from cogview.kernels.linear import linear_prepacked, prepack
from cogview.modeling.config import LAYER_PARTS
from cogview.modeling.kv_cache import KVCache

if TYPE_CHECKING:
    from cogview.modeling.transformer import Transformer


class PrepackedWeight:
    """A weight in the order that a CPU multiplies fastest, made at its first use and anew when it has changed."""

    def __init__(self) -> None:
        self._made_of: tuple[int, int] | None = None
        self._packed: Tensor | None = None

    def __reduce__(self) -> tuple[type[PrepackedWeight], tuple[()]]:
        """A copy makes its own: what MKL packs can be neither copied nor stored."""
        return PrepackedWeight, ()

    @property
    def is_made(self) -> bool:
        """Whether it takes memory yet."""
        return self._packed is not None

    def of(self, weight_NK: Tensor) -> Tensor:
        """``pack(weight_NK)``."""
        version = 0 if weight_NK.is_inference() else weight_NK._version  # tensors of inference mode count none
        now = (weight_NK.data_ptr(), version)
        if self._packed is None or now != self._made_of:
            self._made_of, self._packed = now, prepack(weight_NK)
        return self._packed


Projection: TypeAlias = tuple[dict[str, Tensor], PrepackedWeight]


class PackedLayers:
    """The layers of ``transformer``, whose weights may change, in value or altogether."""

    def __init__(self, transformer: Transformer) -> None:
        self.num_heads, self.width = transformer.config.num_heads, transformer.config.width
        self.layers: list[tuple[Any, ...]] = []  # for each norm and projection its parameters by name, in their order
        self.packed: list[PrepackedWeight] = []
        self.output_weights: dict[range, PrepackedWeight] = {}  # rows of the embedding that ids were told by
        for layer in transformer.layers:
            parts: list[Any] = []
            for part in map(layer.get_submodule, LAYER_PARTS):
                if isinstance(part, nn.Linear):
                    self.packed.append(PrepackedWeight())
                    parts.append((part._parameters, self.packed[-1]))
                else:
                    parts.append(part._parameters)
            self.layers.append(tuple(parts))

    def prepack_bytes(self, *told: range) -> int:
        """What the copies will take that are not made yet; ``told`` are the ids that ``head`` will be asked for."""
        width = self.width
        projections = 0 if self.packed[-1].is_made else 12 * width**2 * len(self.layers)  # all are made, or none
        return 4 * (projections + width * sum(len(ids) for ids in told if ids not in self.output_weights))

    def head(self, hidden: Tensor, weight_VD: Tensor, ids: range) -> Tensor:
        """Logits (..., V) by the rows ``ids`` of the embedding, which are ``weight_VD``."""
        return linear_prepacked(
            hidden, self.output_weights.setdefault(ids, PrepackedWeight()).of(weight_VD), weight_VD, None
        )

    def __call__(self, x_BTD: Tensor, bias_B1TS: Tensor | None, cache: KVCache | None) -> Tensor:
        """What ``Transformer.hidden`` has before its last norm: the layers' output, (B, T, D)."""
        shape, x_ND = x_BTD.shape, x_BTD.reshape(-1, self.width)
        # In functions of their own, what attention and MLP have in between is freed when they are done.
        for number, (norm1, to_qkv, to_out, norm2, norm3, to_inner, from_inner, norm4) in enumerate(self.layers):
            mixed_ND = self._attended(number, _normalize(x_ND, norm1), shape, to_qkv, to_out, bias_B1TS, cache)
            x_ND = x_ND + _normalize(mixed_ND, norm2)
            del mixed_ND
            x_ND = x_ND + _normalize(_expanded(_normalize(x_ND, norm3), to_inner, from_inner), norm4)
        return x_ND.view(shape)

    def _attended(
        self,
        number: int,
        x_ND: Tensor,
        shape: Size,
        to_qkv: Projection,
        to_out: Projection,
        bias_B1TS: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        batch, length, width = shape
        qkv_NE = _project(x_ND, to_qkv)
        qkv_3BHTK = qkv_NE.view(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            mixed_BHTK = cache.attend(number, qkv_3BHTK[0], qkv_3BHTK[1:], bias_B1TS)
        else:
            mixed_BHTK = attention(qkv_3BHTK[0], qkv_3BHTK[1], qkv_3BHTK[2], bias_B1TS)
        return _project(mixed_BHTK.transpose(1, 2).reshape(-1, width), to_out)


def _expanded(x_ND: Tensor, to_inner: Projection, from_inner: Projection) -> Tensor:
    return _project(F.gelu(_project(x_ND, to_inner), approximate="tanh"), from_inner)


def _project(x_ND: Tensor, linear: Projection) -> Tensor:
    parameters, packed = linear
    weight = parameters["weight"]
    return linear_prepacked(x_ND, packed.of(weight), weight, parameters["bias"])


def _normalize(x_ND: Tensor, norm: dict[str, Tensor]) -> Tensor:
    return pb_relax_layer_norm(x_ND, norm["weight"], norm["bias"])
