"""The transformer: GPT with two changes that stabilize half precision (CogView, arXiv:2105.13290, section 2.4).

* Sandwich-LN: each branch of a layer has a LayerNorm before it and another on its output, which bounds what the branch
  adds to the residual stream:  x = x + LN3(attention(LN1(x)));  x = x + LN4(mlp(LN2(x))).
* PB-relax: attention scores and LayerNorm inputs are scaled down before the operation that would overflow
  (``kernels/attention.py``, ``kernels/layer_norm.py``).

Positions are learned and absolute, the embedding is tied to the output, GELU is the tanh form, every linear layer and
norm has a bias.
"""

# B batch, T new positions, S positions in all, D width, H heads, K size of a head, V vocabulary (or a slice of it)
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogview.errors import InputError
from cogview.kernels.gelu import bias_gelu, bias_gelu_is_fused
from cogview.kernels.layer_norm import pb_relax_layer_norm, sandwich_layer_norm
from cogview.kernels.linear import can_prepack, linear
from cogview.kernels.native import uses_native_kernels
from cogview.kernels.native_training import attends_natively
from cogview.kernels.window_mask import WindowMask
from cogview.modeling.checkpointing import Checkpointing, run_layer
from cogview.modeling.config import TransformerConfig
from cogview.modeling.kv_cache import AttentionMask, KVCache, attend, choose_form
from cogview.modeling.native_layers import NativeLayers
from cogview.modeling.packed_layers import PackedLayers
from cogview.modeling.packed_rows import PackedRows

INIT_STD = 0.02
# Initialization with sinusoidal positions: amplitude, shortest and longest wavelength in positions, and the standard
# deviation of the token embeddings.
SINUSOID_AMPLITUDE = 0.1
SINUSOID_WAVELENGTHS = (4.0, 1200.0)
SINUSOID_EMBEDDING_STD = 0.05


class Transformer(nn.Module):
    """The transformer: token ids to logits.

    Generation and training call ``hidden``, which stops before the output embedding, and ``head``, which computes the
    logits of a range of ids.

    Attributes:
        config: Shape and initialization.
        cpu_layers: Layers as native kernels or with prepacked weights, once ``prepare_cpu`` was called on a CPU.
        checkpointing: Activation checkpointing of training.
        packs_rows: Whether ``hidden`` packs rows whose lengths it gets.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocabulary_size, config.width)
        self.positions = Embedding(config.max_positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.cpu_layers: NativeLayers | PackedLayers | None = None
        self.checkpointing: Checkpointing = "none"
        self.packs_rows = True
        if not self.embedding.weight.is_meta:
            self.apply(self._initialize)
            if config.sinusoidal_positions:
                self._initialize_sinusoids()

    def _initialize(self, module: nn.Module) -> None:
        """Draw weights from N(0, 0.02), branch output projections from N(0, 0.02 / sqrt(2 layers)); zero the biases."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Layer):  # apply() visits children first
            for norm in (module.attention_output_norm, module.mlp_output_norm):
                nn.init.constant_(norm.weight, self.config.branch_norm_init)
            for projection in (module.attention.output, module.mlp.output):
                nn.init.normal_(projection.weight, std=INIT_STD / math.sqrt(2 * self.config.num_layers))

    @torch.no_grad()
    def _initialize_sinusoids(self) -> None:
        """Set positions to sines and cosines with geometric wavelengths (arXiv:1706.03762, section 3.5)."""
        nn.init.normal_(self.embedding.weight, std=SINUSOID_EMBEDDING_STD)
        shortest, longest = SINUSOID_WAVELENGTHS
        wavelengths = shortest * (longest / shortest) ** torch.linspace(0, 1, self.config.width // 2)
        angles = 2 * math.pi * torch.arange(self.config.max_positions).unsqueeze(1) / wavelengths
        sinusoids = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        self.positions.weight[:, : sinusoids.shape[1]] = SINUSOID_AMPLITUDE * sinusoids

    def forward(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Return the logits of the next id at every position.

        Args:
            ids_BT: Ids, int64, from 0 to V - 1.
            positions_BT: Indices of the learned positions, int64; counted from 0 by default.

        Returns:
            Logits (B, T, V) over the padded vocabulary, float32.

        Raises:
            InputError: The ids or positions are no int64 tensor (B, T), or out of range (checked on a CPU, where it
                costs no wait).

        Examples:
            >>> ids = torch.tensor([model.text_tokenizer.encode("一个红苹果")]) + model.vocabulary.text.start
            >>> model.transformer(ids).shape[:2] == ids.shape
            True
        """
        config = self.config
        _check_indices(ids_BT, "ids", config.vocabulary_size)
        if positions_BT is not None:
            _check_indices(positions_BT, "positions", config.max_positions)
        elif ids_BT.shape[1] > config.max_positions:
            raise InputError(
                f"{ids_BT.shape[1]} ids are too many: the transformer has {config.max_positions} positions"
            )
        return self.head(self.hidden(ids_BT, positions_BT))

    def hidden(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        *,
        bias_B1TS: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
        window: WindowMask | None = None,
        outputs_M: Tensor | None = None,
    ) -> Tensor:
        """Return the normalized output of the last layer.

        Args:
            ids_BT: Ids of the new positions, int64.
            positions_BT: Indices of the learned positions, int64; by default counted from the cache's length, or 0.
            bias_B1TS: Bias that is added to the attention scores of the S positions so far, -inf where a query may not
                attend (``attention_bias`` in ``kernels/attention.py``); None for causal attention.
            cache: Keys and values of the past; the new positions are appended to it.
            lengths: Positions of each row without padding on its right, in ascending order, for causal attention
                without a cache: the layers then compute no padding, where ``packs_rows``.
            window: Mask of window attention, instead of the bias. A model with window attention needs it as soon as
                there are more positions than its window has.
            outputs_M: Indices of the wanted outputs in the B * T positions, ascending, int64, for training: the last
                layer computes nothing else behind its attention. None for all.

        Returns:
            Hidden states (B, T, D), arbitrary in padding; with ``outputs_M`` (M, D).

        Raises:
            InputError: The mask does not suit the model's pattern of attention.
        """
        past = cache.length if cache is not None else 0
        if positions_BT is None:
            positions_BT = torch.arange(past, past + ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        num_keys = past + ids_BT.shape[1]
        self._check_window(window, num_keys)
        if window is not None and window.is_causal(num_keys) and cache is None:
            window = None
        autocast = torch.is_autocast_enabled(ids_BT.device.type)
        cpu_layers = None if autocast else self._usable_cpu_layers()
        packed: PackedRows | None = None
        if lengths is not None and self.packs_rows and window is None and cpu_layers is None:
            pad = not attends_natively(self.embedding.weight, self.config.num_heads, lengths[-1])
            packed = PackedRows.of(lengths, ids_BT.shape[1], ids_BT.device, pad=pad)
            ids_BT, positions_BT = packed.pack(ids_BT), packed.pack(positions_BT)
            outputs_M = None if outputs_M is None else packed.locate(outputs_M)
        if isinstance(cpu_layers, NativeLayers):
            native_BTD = cpu_layers(ids_BT, positions_BT, bias_B1TS if window is None else window, cache)
            if cache is not None:
                cache.advance(ids_BT.shape[1])
            return native_BTD if outputs_M is None else _select(native_BTD, outputs_M)[0]
        # The residual stream of autocast is float32, whatever the dtype of the weights.
        dtype = torch.float32 if autocast else self.dtype
        x_BTD = self.dropout(self.embedding(ids_BT).to(dtype) + self.positions(positions_BT).to(dtype))
        mask: AttentionMask = bias_B1TS
        if window is not None:
            mask = choose_form(window, num_keys, x_BTD.dtype, cache)
        if cpu_layers is not None:
            x_BTD = cpu_layers(x_BTD, mask, cache)
        else:
            for number, layer in enumerate(self.layers):
                wanted = outputs_M if number == len(self.layers) - 1 else None
                x_BTD = run_layer(layer, self.checkpointing, x_BTD, packed or mask, cache, number, wanted)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        if cpu_layers is not None:
            x_BTD = _select(x_BTD, outputs_M)
        normalized_BTD: Tensor = self.final_norm(x_BTD)
        if outputs_M is not None:
            return normalized_BTD[0]
        return normalized_BTD if packed is None else packed.unpack(normalized_BTD)

    def _check_window(self, window: WindowMask | None, num_keys: int) -> None:
        """Raise InputError unless the mask suits the model's pattern of attention."""
        attention = self.config.attention
        if window is not None and window.window != (attention.window or None):
            raise InputError(f"the mask has a window of {window.window} positions, the model one of {attention.window}")
        if window is None and not attention.is_dense and num_keys > attention.window:
            raise InputError(
                f"{num_keys} positions exceed the window of {attention.window}: give the pivots "
                "(Transformer.hidden, window=WindowMask(...))"
            )

    def head(self, hidden: Tensor, ids: range | None = None) -> Tensor:
        """Return logits of hidden states.

        Args:
            hidden: Hidden states (..., D).
            ids: Ids whose logits are computed, V of them; None for the whole padded vocabulary.

        Returns:
            Logits (..., V), float32.
        """
        weight = self.embedding.weight
        if ids is not None:
            if (cpu_layers := self._usable_cpu_layers()) is not None:
                return cpu_layers.head(hidden, weight, ids)
            weight = weight[ids.start : ids.stop]
        return linear(hidden.to(self.dtype), weight, None).float()

    def prepare_cpu(self) -> None:
        """Prepare generation on a CPU: with the native kernels, or else with weights in MKL's packed order.

        Packed weights are a second copy, made at first use, of float32 weights alone. On other devices, and with
        neither, nothing changes. Training uses the modules.
        """
        device = self.embedding.weight.device
        if uses_native_kernels(device, self.dtype):
            self.cpu_layers = NativeLayers(self)
        elif can_prepack(device, self.dtype) and not self.is_quantized:
            self.cpu_layers = PackedLayers(self)

    def _usable_cpu_layers(self) -> NativeLayers | PackedLayers | None:
        """Return the layers prepared for a CPU, or None if gradients are needed or the weights were moved or cast."""
        if self.cpu_layers is None or not self.cpu_layers.accepts(self.embedding.weight.device, self.dtype):
            return None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return None
        return self.cpu_layers

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the norms, in which the modules compute; matrices may be smaller."""
        return self.final_norm.weight.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether the projections are int8 or int4."""
        return not isinstance(self.layers[0].get_submodule("mlp.input"), nn.Linear)

    def prepack_bytes(self, *output_ids: range) -> int:
        """Return the bytes of the packed weights that do not exist yet; 0 where none are needed.

        Args:
            *output_ids: Ranges of ids that ``head`` will be called with.
        """
        return 0 if self.cpu_layers is None else self.cpu_layers.prepack_bytes(*output_ids)


def _check_indices(indices: Tensor, name: str, count: int) -> None:
    """Raise InputError unless ``indices`` are an integer tensor (B, T) with values below ``count``."""
    if not isinstance(indices, Tensor):
        raise InputError(f"{name} must be an int64 tensor (B, T), got {type(indices).__name__}")
    if indices.dtype not in (torch.int64, torch.int32) or indices.dim() != 2:
        raise InputError(f"{name} must be an int64 tensor (B, T), got {indices.dtype} {tuple(indices.shape)}")
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        smallest, greatest = map(int, torch.aminmax(indices))
        if smallest < 0 or greatest >= count:
            wrong = smallest if smallest < 0 else greatest
            raise InputError(f"{name} must be from 0 to {count - 1}, got {wrong}")


class Layer(nn.Module):
    """One Sandwich-LN layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width)
        self.attention = Attention(config)
        self.attention_output_norm = LayerNorm(config.width)
        self.mlp_norm = LayerNorm(config.width)
        self.mlp = MLP(config)
        self.mlp_output_norm = LayerNorm(config.width)

    def forward(
        self,
        x_BTD: Tensor,
        mask: AttentionMask | PackedRows,
        cache: KVCache | None,
        number: int,
        outputs_M: Tensor | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer, whose index in the cache is ``number``.

        Args:
            x_BTD: Residual stream (B, T, D).
            mask: Bias of the attention scores (B, 1, T, S), None for causal attention, a form of window attention, or
                where packed rows are.
            cache: KV cache, or None.
            number: Index of the layer in the cache.
            outputs_M: Indices of the positions to return, int64, which gives (1, M, D); None for all.
        """
        attended = self.attention(self.attention_norm(x_BTD, product_dtype(x_BTD)), mask, cache, number, outputs_M)
        x_BTD = _select(x_BTD, outputs_M)
        norm, mlp_norm = self.attention_output_norm, self.mlp_norm
        x_BTD, normed = sandwich_layer_norm(x_BTD, attended, norm.weight, norm.bias, mlp_norm.weight, mlp_norm.bias)
        norm = self.mlp_output_norm
        return sandwich_layer_norm(x_BTD, self.mlp(normed), norm.weight, norm.bias)[0]


class Attention(nn.Module):
    """Causal multi-head attention; q, k and v come from one projection, stacked in thirds."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = Linear(config.width, 3 * config.width)
        self.output = Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        mask: AttentionMask | PackedRows,
        cache: KVCache | None,
        number: int,
        outputs_M: Tensor | None = None,
    ) -> Tensor:
        """Return the attention branch (B, T, D) of the layer ``number``.

        Args:
            x_BTD: Normalized input (B, T, D).
            mask: Bias of the attention scores (B, 1, T, S), None for causal attention, a form of window attention, or
                where packed rows are.
            cache: KV cache, or None.
            number: Index of the layer in the cache.
            outputs_M: Indices of the positions to return, int64, which gives (1, M, D); None for all.
        """
        batch, length, width = x_BTD.shape
        qkv_BTE = self.query_key_value(x_BTD)
        if isinstance(mask, PackedRows):
            mixed_BTD = mask.attend(qkv_BTE, self.num_heads)
        else:
            split = qkv_BTE.view(batch, length, 3, self.num_heads, width // self.num_heads)
            mixed_BHTK = attend(number, split.permute(2, 0, 3, 1, 4), mask, cache)
            mixed_BTD = mixed_BHTK.transpose(1, 2).reshape(batch, length, width)
        branch_BTD: Tensor = self.dropout(self.output(_select(mixed_BTD, outputs_M)))
        return branch_BTD


def _select(x_BTD: Tensor, outputs_M: Tensor | None) -> Tensor:
    """Return the chosen positions as one row (1, M, D), or all of them (B, T, D) for None."""
    return x_BTD if outputs_M is None else x_BTD.flatten(0, 1).index_select(0, outputs_M).unsqueeze(0)


class MLP(nn.Module):
    """Two projections around a tanh-form GELU; the inner width is 4 D."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input = Linear(config.width, 4 * config.width)
        self.output = Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP branch, in the shape of ``x``."""
        branch: Tensor = self.dropout(self.output(self._inner(x)))
        return branch

    def _inner(self, x: Tensor) -> Tensor:
        """Return the activations (..., 4 D); a fused kernel adds the bias, which the product then leaves out."""
        if isinstance(self.input, Linear) and bias_gelu_is_fused(
            x, self.input.out_features
        ):  # quantized layers are no ``Linear``
            return bias_gelu(F.linear(x, self.input.weight), self.input.bias)
        return F.gelu(self.input(x), approximate="tanh")


class Embedding(nn.Embedding):
    """Embedding that is not initialized on the meta device, where random numbers import torch._dynamo, a second."""

    def reset_parameters(self) -> None:
        """Initialize the weight, unless it is a shape alone."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """Linear layer x W^T + b (``kernels/linear.py``)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., N) in the dtype of ``x`` (..., K)."""
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """PB-relax LayerNorm with weight and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the normalized ``x``, in its dtype or, where that saves a conversion, in ``dtype``."""
        return pb_relax_layer_norm(x, self.weight, self.bias, dtype=dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a product with ``x`` is computed."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
