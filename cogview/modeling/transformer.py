"""The transformer: GPT with two things that keep half precision stable (CogView, arXiv:2105.13290, section 2.4).

* Sandwich-LN: each branch of a layer has a LayerNorm before it and another on its output, so that no branch adds more
  to the residual stream than its norm allows:  x = x + LN3(attention(LN1(x)));  x = x + LN4(mlp(LN2(x))).
* PB-relax: attention scores and LayerNorm inputs are scaled down before the operation that would overflow
  (``kernels/attention.py``, ``kernels/layer_norm.py``).

Positions are learned and absolute, the embedding is tied to the output, GELU is the tanh form, everything has biases.
"""

# B batch, T new positions, S positions in all, D width, H heads, K size of a head, V vocabulary (or a slice of it)
from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogview.kernels.attention import attention
from cogview.kernels.gelu import bias_gelu, bias_gelu_is_fused
from cogview.kernels.layer_norm import pb_relax_layer_norm, sandwich_layer_norm
from cogview.kernels.linear import can_prepack, linear
from cogview.modeling.config import TransformerConfig
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.packed_layers import PackedLayers

# What training keeps of a layer for its backward: all, the results of matrix products and attention (the rest of the
# layer is computed again, which is cheap), or its input alone (the whole layer is computed again).
Checkpointing = Literal["none", "selective", "full"]

INIT_STD = 0.02
# Of a model whose positions begin as sinusoids: their amplitude, the range of their wavelengths in positions, and the
# token embeddings beside them.
SINUSOID_AMPLITUDE = 0.1
SINUSOID_WAVELENGTHS = (4.0, 1200.0)
SINUSOID_EMBEDDING_STD = 0.05


class Transformer(nn.Module):
    """Ids in, logits out.

    ``transformer(ids)`` gives float32 logits (B, T, V) over the padded vocabulary. ``hidden`` stops before the
    output embedding and ``head`` multiplies by the rows that are wanted: all that generation and training need.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.packed_layers: PackedLayers | None = None
        self.checkpointing: Checkpointing = "none"
        self.apply(self._initialize)
        if config.sinusoidal_positions:
            self._begin_with_sinusoids()

    def _initialize(self, module: nn.Module) -> None:
        """N(0, 0.02); output projections of a branch N(0, 0.02 / sqrt(2 layers)); biases 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Layer):  # apply() comes here after the children
            for norm in (module.attention_output_norm, module.mlp_output_norm):
                nn.init.constant_(norm.weight, self.config.branch_norm_init)
            for projection in (module.attention.output, module.mlp.output):
                nn.init.normal_(projection.weight, std=INIT_STD / math.sqrt(2 * self.config.num_layers))

    @torch.no_grad()
    def _begin_with_sinusoids(self) -> None:
        """Positions as sines and cosines of wavelengths in geometric order (arXiv:1706.03762, section 3.5)."""
        nn.init.normal_(self.embedding.weight, std=SINUSOID_EMBEDDING_STD)
        shortest, longest = SINUSOID_WAVELENGTHS
        wavelengths = shortest * (longest / shortest) ** torch.linspace(0, 1, self.config.width // 2)
        angles = 2 * math.pi * torch.arange(self.config.max_positions).unsqueeze(1) / wavelengths
        sinusoids = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        self.positions.weight[:, : sinusoids.shape[1]] = SINUSOID_AMPLITUDE * sinusoids

    def forward(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Float32 logits (B, T, V) of the id that follows each of ``ids_BT`` (int64)."""
        return self.head(self.hidden(ids_BT, positions_BT))

    def hidden(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        *,
        bias_B1TS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The normalised output of the last layer, (B, T, D).

        ``positions_BT`` (default: counted from 0, or from the cache's length) index the learned positions.
        ``bias_B1TS`` is added to the attention scores of the S positions so far, and says where each of the new ones
        may look (``kernels/attention.py``); without it they look at all before them. With a ``cache`` the ids continue
        what it holds, and are stored in it.
        """
        past = cache.length if cache is not None else 0
        if positions_BT is None:
            positions_BT = torch.arange(past, past + ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        autocast = torch.is_autocast_enabled(ids_BT.device.type)
        if autocast:  # the residual stream is float32, whatever the weights are
            x_BTD = self.dropout(self.embedding(ids_BT).float() + self.positions(positions_BT).float())
        else:
            x_BTD = self.dropout(self.embedding(ids_BT) + self.positions(positions_BT))
        if (
            self.packed_layers is not None
            and not autocast
            and not torch.is_grad_enabled()
            and can_prepack(self.embedding.weight)
        ):
            x_BTD = self.packed_layers(x_BTD, bias_B1TS, cache)
        else:
            for number, layer in enumerate(self.layers):
                if self.checkpointing == "none" or not torch.is_grad_enabled():
                    x_BTD = layer(x_BTD, bias_B1TS, cache, number)
                else:
                    x_BTD = self._recomputed(layer, x_BTD, bias_B1TS, cache, number)
        if cache is not None:
            cache.advance(ids_BT.shape[1])
        return self.final_norm(x_BTD)

    def _recomputed(
        self, layer: nn.Module, x_BTD: Tensor, bias_B1TS: Tensor | None, cache: KVCache | None, number: int
    ) -> Tensor:
        """What ``layer`` makes of ``x_BTD``, of which the backward gets no more than ``checkpointing`` says."""
        if self.checkpointing == "full":
            return checkpoint(layer, x_BTD, bias_B1TS, cache, number, use_reentrant=False)
        return checkpoint(
            *(layer, x_BTD, bias_B1TS, cache, number),
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(_keep_products),
        )

    def head(self, hidden: Tensor, ids: range | None = None) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., D), for all ids or for a range of them."""
        weight = self.embedding.weight if ids is None else self.embedding.weight[ids.start : ids.stop]
        if self.packed_layers is None or ids is None or torch.is_grad_enabled() or not can_prepack(weight):
            return F.linear(hidden, weight).float()
        return self.packed_layers.head(hidden, weight, ids)

    def prepack(self) -> None:
        """Prepare to generate on a CPU in float32: keep a second copy of all that is multiplied, in MKL's order.

        Elsewhere, and without MKL, there is nothing to prepare. Gradients, and so training, use the weights themselves.
        """
        if can_prepack(self.embedding.weight):
            self.packed_layers = PackedLayers(self)

    def prepack_bytes(self, *told: range) -> int:
        """What that will take and does not yet; ``told`` are the ids that ``head`` will be asked for."""
        return 0 if self.packed_layers is None else self.packed_layers.prepack_bytes(*told)


def _keep_products(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """Of ``selective`` checkpointing: the results of products and of fused attention are kept, all else is not."""
    name = str(operation)
    kept = any(word in name for word in _PRODUCTS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# mm and addmm, linear where a device has it as one operation, baddbmm of attention's reference, and the fused forms.
_PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.linear.", "mkldnn", "scaled_dot_product")


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

    def forward(self, x_BTD: Tensor, bias_B1TS: Tensor | None, cache: KVCache | None, number: int) -> Tensor:
        """Same shape as ``x_BTD``; ``number`` is this layer's place in the cache."""
        attended = self.attention(self.attention_norm(x_BTD), bias_B1TS, cache, number)
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

    def forward(self, x_BTD: Tensor, bias_B1TS: Tensor | None, cache: KVCache | None, number: int) -> Tensor:
        """(B, T, D)."""
        batch, length, width = x_BTD.shape
        split = self.query_key_value(x_BTD).view(batch, length, 3, self.num_heads, width // self.num_heads)
        qkv_3BHTK = split.permute(2, 0, 3, 1, 4)
        if cache is not None:
            mixed_BHTK = cache.attend(number, qkv_3BHTK[0], qkv_3BHTK[1:], bias_B1TS)
        else:
            mixed_BHTK = attention(qkv_3BHTK[0], qkv_3BHTK[1], qkv_3BHTK[2], bias_B1TS)
        return self.dropout(self.output(mixed_BHTK.transpose(1, 2).reshape(batch, length, width)))


class MLP(nn.Module):
    """Two projections around a tanh-form GELU, four times as wide inside."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input = Linear(config.width, 4 * config.width)
        self.output = Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        return self.dropout(self.output(self._expanded(x)))

    def _expanded(self, x: Tensor) -> Tensor:
        """(..., 4 D); where a kernel adds the bias and bends at one go, the product comes without it."""
        if isinstance(self.input, Linear) and bias_gelu_is_fused(x.device):  # rounded weights have a product of theirs
            return bias_gelu(F.linear(x, self.input.weight), self.input.bias)
        return F.gelu(self.input(x), approximate="tanh")


class Linear(nn.Linear):
    """x W^T + b by ``kernels/linear.py``."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) in the dtype of ``x`` (..., K)."""
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """PB-relax LayerNorm with weight and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        return pb_relax_layer_norm(x, self.weight, self.bias)
