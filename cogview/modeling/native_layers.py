"""A transformer up to its final norm in one call of the native kernels, for generation on a CPU.

The computation is that of the modules, which are the specification (``transformer.py``), with float32 activations
whatever the dtype of the weights. Weights are used where they are: nothing is copied but biases and norms that are not
float32.
"""

# B batch, T new positions, S positions in all, D width, V output ids
from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogview.kernels.native import (
    FORMATS,
    NativeLinear,
    describe_linear,
    linear_described,
    load_library,
    num_threads,
    uses_native_kernels,
)
from cogview.kernels.window_mask import WindowMask
from cogview.modeling.config import LAYER_PARTS
from cogview.modeling.kv_cache import KVCache

if TYPE_CHECKING:
    from cogview.modeling.transformer import Transformer


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    """In the order of ``LAYER_PARTS``."""

    _fields_ = (
        ("attention_norm", _Norm),
        ("query_key_value", NativeLinear),
        ("output", NativeLinear),
        ("attention_output_norm", _Norm),
        ("mlp_norm", _Norm),
        ("mlp_input", NativeLinear),
        ("mlp_output", NativeLinear),
        ("mlp_output_norm", _Norm),
    )


class _Store(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_long) for name in ("row_stride", "head_stride", "scale_row_stride", "scale_head_stride")),
        *((name, ctypes.c_long) for name in ("layer_bytes", "scale_layer_bytes")),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("format", "scale_format", "heads", "head_size")),
        *((name, ctypes.c_long) for name in ("num_keys", "prefix_length", "queries")),
        *((name, ctypes.c_void_p) for name in ("prefix_rows", "write_positions", "bias")),
        *((name, ctypes.c_long) for name in ("bias_row_stride", "bias_query_stride", "window", "num_pivots")),
        *((name, ctypes.c_void_p) for name in ("pivots", "pivot_bias")),
    )


class _Embedding(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("format", ctypes.c_long),
        ("rows", ctypes.c_long),
        ("indices", ctypes.c_void_p),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("final_norm", _Norm),
        ("tokens", _Embedding),
        ("positions", _Embedding),
        ("num_layers", ctypes.c_long),
        ("width", ctypes.c_long),
        ("attention", _Attention),
        ("cache", _Store),
        ("prefix", _Store),
        ("batch", ctypes.c_long),
        ("x", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


class NativeLayers:
    """All parts of a transformer, whose weights may be changed or replaced later."""

    def __init__(self, transformer: Transformer) -> None:
        self.config = transformer.config
        self._modules = [layer.get_submodule(part) for layer in transformer.layers for part in LAYER_PARTS]
        self._modules += [transformer.final_norm, transformer.embedding, transformer.positions]
        self._forget()

    def _forget(self) -> None:
        """Forget the addresses of all weights."""
        self._tensors: list[Mapping[str, Tensor | None]] = []
        self._described: _DescribedLayers | None = None
        self._heads: dict[range, tuple[int, torch.dtype, NativeLinear]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "_modules": self._modules}  # addresses can be neither copied nor stored

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def accepts(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether the kernels run for a model of ``dtype`` on ``device``."""
        return uses_native_kernels(device, dtype)

    def prepack_bytes(self, *output_ids: range) -> int:
        """Return 0: no weight is copied.

        Args:
            *output_ids: Ranges of ids whose logits will be computed.
        """
        return 0

    def head(self, hidden: Tensor, weight_VD: Tensor, ids: range) -> Tensor:
        """Return logits (..., V) of ``ids``.

        Args:
            hidden: Hidden states (..., D).
            weight_VD: The whole embedding.
            ids: Ids whose logits are computed.
        """
        address, dtype, described = self._heads.get(ids, (0, None, None))
        if described is None or address != weight_VD.data_ptr() or dtype != weight_VD.dtype:
            described = describe_linear(weight_VD.detach()[ids.start : ids.stop], None, None)
            self._heads[ids] = (weight_VD.data_ptr(), weight_VD.dtype, described)
        return linear_described(described, hidden.float())

    def __call__(
        self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor | WindowMask | None, cache: KVCache | None
    ) -> Tensor:
        """Return the normalized output (B, T, D) of the last layer, in float32.

        Args:
            ids_BT: Ids of the new positions.
            positions_BT: Indices of the learned positions.
            mask: Bias (B, 1, T, S) of the attention scores, None for causal attention, or the mask of window
                attention, whose queries are at the positions that the cache is given.
            cache: KV cache, or None.

        Raises:
            ValueError: The positions do not fit into the cache.
            IndexError: An id or a position has no embedding.
        """
        (batch, queries), width = ids_BT.shape, self.config.width
        # Kept during the call: another thread may describe them again.
        continues = cache is not None and cache.length > 0  # a later step of a generation
        described = self._described if continues and self._described else self._describe_layers()
        result_BTD = torch.empty(batch, queries, width)
        kept: list[Tensor] = [ids_BT.long().contiguous(), positions_BT.long().contiguous()]
        call = _Call.from_buffer_copy(described.call)
        call.tokens.indices, call.positions.indices = kept[0].data_ptr(), kept[1].data_ptr()
        call.batch, call.x = batch, result_BTD.data_ptr()
        attention = call.attention
        attention.heads, attention.head_size, attention.queries = self.config.num_heads, self.config.head_size, queries
        if cache is None:
            shape = (1, 2, batch, self.config.num_heads, queries, self.config.head_size)
            keys_values = torch.empty(shape)
            kept.append(keys_values)
            attention.num_keys = queries
            call.cache = _store_of(keys_values, None)
            call.cache.layer_bytes = 0  # one layer after the other uses it
        else:
            self._describe_cache(call, cache, batch, queries, kept)
        bias_B1TS = mask
        if isinstance(mask, WindowMask):
            bias_B1TS = None if mask.key_bias_BS is None else mask.key_bias_BS[:, None, None, :]
            _describe_window(attention, mask, batch, kept)
        if isinstance(bias_B1TS, Tensor):
            bias = bias_B1TS.float().contiguous()
            kept.append(bias)
            attention.bias = bias.data_ptr()
            attention.bias_row_stride = 0 if bias.shape[0] == 1 else bias.stride(0)
            attention.bias_query_stride = 0 if bias.shape[2] == 1 else bias.stride(2)
        threads, library = num_threads(), load_library()
        scratch = torch.empty(library.cogview_scratch(width, batch * queries, attention.num_keys, threads))
        call.scratch = scratch.data_ptr()
        if problem := library.cogview_layers(ctypes.addressof(call), threads):
            name, rows = (("ids", call.tokens.rows), ("positions", call.positions.rows))[problem - 1]
            raise IndexError(f"{name} must be from 0 to {rows - 1}")
        return result_BTD

    def _describe_cache(self, call: _Call, cache: KVCache, batch: int, queries: int, kept: list[Tensor]) -> None:
        """Describe the store of keys and values, and the positions that are written."""
        end = cache.length + queries
        if end > cache.max_length:
            raise ValueError(f"the cache holds {cache.max_length} positions, {end} are needed")
        attention = call.attention
        attention.num_keys = end
        if cache.prefix is not None and end <= cache.prefix.max_length:
            cache = cache.prefix
        if batch > (rows := cache.keys_values.shape[2]):
            raise ValueError(f"the cache holds {rows} rows, {batch} are needed")
        attention.format = FORMATS[cache.keys_values.dtype]
        call.cache = _store_of_cache(cache)
        if cache.scales is not None:
            attention.scale_format = FORMATS[cache.scales.dtype]
        if cache.write_positions_BT is not None:
            positions = cache.write_positions_BT.contiguous() - (cache.prefix.max_length if cache.prefix else 0)
            smallest, greatest = map(int, positions.aminmax())
            if smallest < 0 or greatest >= (room := cache.keys_values.shape[4]):
                raise ValueError(f"positions must be from 0 to {room - 1}, got {smallest} to {greatest}")
            kept.append(positions)
            attention.write_positions = positions.data_ptr()
        prefix = cache.prefix
        if prefix is None:
            return
        if cache.length < prefix.max_length:
            raise ValueError(f"{queries} positions from {cache.length} on cross the end of the shared prefix")
        attention.prefix_length = prefix.max_length
        assert cache.prefix_rows_B is not None
        attention.prefix_rows = cache.prefix_rows_B.data_ptr()
        call.prefix = _store_of_cache(prefix)

    def _describe_layers(self) -> _DescribedLayers:
        """Return the description of the layers, made again if a weight was changed or replaced.

        It is checked at the start of a generation alone: with small models that takes a noticeable part of a step.
        """
        if not self._tensors:
            self._tensors = [each for module in self._modules for each in (module._parameters, module._buffers) if each]
        tensors = [tensor for named in self._tensors for tensor in named.values() if tensor is not None]
        versions = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        described = self._described
        if described is None or versions != described.versions:
            copies: list[Tensor] = []
            *parts, final_norm = [_describe_module(module, copies) for module in self._modules[:-2]]
            size = len(LAYER_PARTS)
            layers = [_Layer(*parts[first : first + size]) for first in range(0, len(parts), size)]
            weights = [tensor.detach() for tensor in tensors]
            array = (_Layer * len(layers))(*layers)
            call = _Call(
                layers=ctypes.addressof(array),
                num_layers=len(layers),
                width=self.config.width,
                final_norm=final_norm,
                tokens=_describe_embedding(self._modules[-2], copies),
                positions=_describe_embedding(self._modules[-1], copies),
            )
            described = _DescribedLayers(versions=versions, weights=weights, layers=array, copies=copies, call=call)
            self._described = described
        return described


@dataclass(frozen=True, kw_only=True, eq=False)
class _DescribedLayers:
    """Addresses of all weights, with what they point to.

    Attributes:
        versions: Address and version of each tensor when it was described.
        weights: The tensors, so that the addresses stay valid until the next description.
        layers: What the library reads.
        copies: Vectors in float32, and contiguous copies of weights that are not.
        call: The arguments of a call that do not change from step to step.
    """

    versions: list[tuple[int, int]]
    weights: list[Tensor]
    layers: ctypes.Array[_Layer]
    copies: list[Tensor]
    call: _Call


def _describe_module(module: nn.Module, copies: list[Tensor]) -> _Norm | NativeLinear:
    """Describe a norm or a linear layer; tensors that are made for it are added to ``copies``."""
    tensors = {**module._parameters, **module._buffers}
    weight, bias_N = _given(tensors["weight"]).detach(), _in_float32(tensors["bias"], copies)
    if weight.dim() == 1:
        return _Norm(_in_float32(weight, copies).data_ptr(), bias_N.data_ptr())
    if not weight.is_contiguous():
        weight = weight.contiguous()
        copies.append(weight)
    return describe_linear(weight, tensors.get("scale", tensors.get("scales_and_zeros")), bias_N)


def _describe_embedding(module: nn.Module, copies: list[Tensor]) -> _Embedding:
    """Describe an embedding without its indices; a contiguous copy is added to ``copies``."""
    weight = _given(module._parameters["weight"]).detach().contiguous()
    copies.append(weight)
    return _Embedding(weight=weight.data_ptr(), format=FORMATS[weight.dtype], rows=len(weight))


def _in_float32(tensor: Tensor | None, copies: list[Tensor]) -> Tensor:
    """Return a vector in float32."""
    copies.append(_given(tensor).detach().float().contiguous())
    return copies[-1]


def _given(tensor: Tensor | None) -> Tensor:
    """Return a tensor that every module has."""
    assert tensor is not None
    return tensor


def _describe_window(attention: _Attention, mask: WindowMask, batch: int, kept: list[Tensor]) -> None:
    """Describe window attention; tensors that are made for it are added to ``kept``."""
    pivots_BN = mask.pivots.positions_BN.expand(batch, -1).contiguous()
    bias_BN = mask.pivots.bias_BN.float().expand(batch, -1).contiguous()
    kept += [pivots_BN, bias_BN]
    attention.window, attention.num_pivots = mask.window, pivots_BN.shape[1]
    attention.pivots, attention.pivot_bias = pivots_BN.data_ptr(), bias_BN.data_ptr()


def _store_of_cache(cache: KVCache) -> _Store:
    """Describe the keys and values of a cache, once: they stay where they are."""
    if not isinstance(cache.native_store, _Store):
        cache.native_store = _store_of(cache.keys_values, cache.scales)
    return cache.native_store


def _store_of(keys_values: Tensor, scales: Tensor | None) -> _Store:
    """Describe the keys and values (L, 2, B, H, S, K) of all layers, and their scales."""
    keys, values = keys_values[0]
    store = _Store(
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        row_stride=keys.stride(0),
        head_stride=keys.stride(1),
        layer_bytes=keys_values.stride(0) * keys_values.element_size(),
    )
    if scales is not None:
        key_scales, value_scales = scales[0]
        store.key_scales, store.value_scales = key_scales.data_ptr(), value_scales.data_ptr()
        store.scale_row_stride, store.scale_head_stride = key_scales.stride(0), key_scales.stride(1)
        store.scale_layer_bytes = scales.stride(0) * scales.element_size()
    return store
