"""A plain PyTorch GPT with a static cache, in the style of gpt-fast: the peer that a careful user would write.

Its step is one function of fixed shapes, so that ``torch.compile`` fuses it; sampling is inside. Weights are float32,
bfloat16, or int8 with a scale per output in PyTorch's kernel for it (gpt-fast's weight-only quantization).
"""

# B rows, T new positions, S positions in all, D width, H heads, K size of a head, V vocabulary
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogview.kernels.linear import quantize_int8


class WeightOnlyInt8(nn.Module):
    """Linear layer with int8 weights, by PyTorch's kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        values, scale = quantize_int8(linear.weight.detach())
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs in the dtype of ``x``."""
        product = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.weight, self.scale)
        product = product if self.bias is None else product + self.bias
        return product.view(*x.shape[:-1], -1)


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_input, self.mlp_output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, position_T: Tensor, mask_1TS: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the residual stream, and store the new keys and values."""
        batch, length, width = x.shape
        split = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        keys[:, :, position_T], values[:, :, position_T] = k, v
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask_1TS)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_output(F.gelu(self.mlp_input(self.mlp_norm(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2's architecture with a static cache."""

    def __init__(self, num_layers: int, width: int, num_heads: int, vocabulary_size: int, max_positions: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary_size, width), nn.Embedding(max_positions, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary_size, bias=False)
        self.head_size, self.num_heads = width // num_heads, num_heads
        self.caches: list[tuple[Tensor, Tensor]] = []
        self.mask_SS = torch.empty(0)

    def allocate(self, batch: int, length: int) -> None:
        """Allocate the cache."""
        shape, dtype = (batch, self.num_heads, length, self.head_size), self.embedding.weight.dtype
        self.caches = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in self.blocks]
        self.mask_SS = torch.ones(length, length, dtype=torch.bool).tril()

    def forward(self, ids_BT: Tensor, position_T: Tensor) -> Tensor:
        """Return the logits (B, V) of the last position."""
        x = self.embedding(ids_BT) + self.positions(position_T)
        mask_1TS = self.mask_SS[position_T].unsqueeze(0)
        for block, (keys, values) in zip(self.blocks, self.caches, strict=True):
            x = block(x, position_T, mask_1TS, keys, values)
        logits_BV: Tensor = self.head(self.norm(x[:, -1]))
        return logits_BV

    def quantize(self) -> PlainGPT:
        """Replace all linear layers by int8 ones, with bfloat16 activations."""
        self.bfloat16()
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.Linear):
                self.set_submodule(name, WeightOnlyInt8(module))
        return self


def sample(logits_BV: Tensor, temperature: float, top_k: int) -> Tensor:
    """Sample an id of each row, as gpt-fast does: without a wait for the device."""
    logits_BV = logits_BV.float() / temperature
    smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
    probs_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf).softmax(dim=-1)
    return (probs_BV / torch.empty_like(probs_BV).exponential_()).argmax(dim=-1, keepdim=True)


def step(model: PlainGPT, ids_B1: Tensor, position_1: Tensor, temperature: float, top_k: int) -> Tensor:
    """Return the next ids (B, 1)."""
    return sample(model(ids_B1, position_1), temperature, top_k)


compiled_step = torch.compile(step, fullgraph=True, dynamic=False)


@torch.inference_mode()
def generate(
    model: PlainGPT, prompt_BT: Tensor, count: int, temperature: float, top_k: int, *, compiled: bool
) -> Tensor:
    """Return ``count`` sampled ids of each row."""
    batch, length = prompt_BT.shape
    if not model.caches or model.caches[0][0].shape[0] != batch or model.caches[0][0].shape[2] < length + count:
        model.allocate(batch, length + count)
    one_step = compiled_step if compiled else step
    ids_B1 = sample(model(prompt_BT, torch.arange(length)), temperature, top_k)
    found = [ids_B1]
    for position in range(length, length + count - 1):
        ids_B1 = one_step(model, ids_B1, torch.tensor([position]), temperature, top_k).clone()
        found.append(ids_B1)
    return torch.cat(found, dim=1)
