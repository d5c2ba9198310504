"""Generate with the algorithm of CogView v1 on our weights, as a baseline of benchmarks.

The algorithm caches the input of every layer instead of keys and values. Each step appends the new position, normalizes
and projects all positions to queries, keys and values again, attends from the new position, and multiplies by the whole
embedding. Logits of other ids than the candidates are then masked, and one of the top k is sampled. A prompt is
processed once, and its memory is repeated for the images of a batch.

Attention, norms and projections are ours, which are no slower than those of v1, so that only the algorithm differs.
"""

# B rows of a batch, T new positions, S positions so far, D width of the model, V vocabulary
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cogview.generation.sampling import keep_top_k
from cogview.kernels.attention import attention
from cogview.modeling.config import Sampling
from cogview.modeling.transformer import Layer, Transformer
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary


@torch.inference_mode()
def generate(
    transformer: Transformer,
    vocabulary: Vocabulary,
    sequence: TokenSequence,
    count: int,
    sampling: Sampling,
    generator: torch.Generator,
    on_column: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Fill the blanks of ``sequence`` in ``count`` samples: int64 (count, T); temperature and top-k apply."""
    device = transformer.embedding.weight.device
    ids_BT = torch.from_numpy(sequence.ids).to(device).unsqueeze(0)
    positions_T = torch.from_numpy(sequence.positions).to(device)
    memory = empty_memory(transformer)
    columns = np.flatnonzero(sequence.blanks).tolist()
    for done, column in enumerate(columns, start=1):
        new = slice(memory[0].shape[1], column)
        logits_BV, memory = forward(transformer, memory, ids_BT[:, new], positions_T[new])
        if done == 1:
            ids_BT, logits_BV = ids_BT.repeat(count, 1), logits_BV.repeat(count, 1)
            memory = [inputs_BSD.repeat(count, 1, 1) for inputs_BSD in memory]
        candidates = vocabulary.permitted(TokenKind(sequence.kinds[column]))
        ids_BT[:, column] = sample(logits_BV, candidates, sampling, generator)
        if on_column is not None:
            on_column(done, len(columns))
    return ids_BT.cpu().numpy()


def empty_memory(transformer: Transformer) -> list[Tensor]:
    """Return the memory of one row without positions."""
    weight = transformer.embedding.weight
    return [weight.new_empty(1, 0, transformer.config.width) for _ in transformer.layers]


@torch.inference_mode()
def forward(
    transformer: Transformer, memory: list[Tensor], ids_BT: Tensor, positions_T: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Compute the float32 logits (B, V) after the last of ``ids_BT``, and the memory with the new positions.

    ``memory`` holds the inputs (B, S, D) of each layer.
    """
    x_BTD = transformer.embedding(ids_BT) + transformer.positions(positions_T)
    longer = []
    for layer, past_BSD in zip(transformer.layers, memory, strict=True):
        assert isinstance(layer, Layer)
        inputs_BSD = torch.cat([past_BSD, x_BTD], dim=1)
        longer.append(inputs_BSD)
        part = layer.attention
        split = part.query_key_value(layer.attention_norm(inputs_BSD))
        q_BHSK, k_BHSK, v_BHSK = split.view(*inputs_BSD.shape[:2], 3, part.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed_BHTK = attention(q_BHSK[:, :, -x_BTD.shape[1] :], k_BHSK, v_BHSK)
        x_BTD = x_BTD + layer.attention_output_norm(part.output(mixed_BHTK.transpose(1, 2).reshape(x_BTD.shape)))
        x_BTD = x_BTD + layer.mlp_output_norm(layer.mlp(layer.mlp_norm(x_BTD)))
    return transformer.head(transformer.final_norm(x_BTD[:, -1])), longer


@torch.inference_mode()
def sample(logits_BV: Tensor, candidates: range, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Sample one candidate id (B,) for each row."""
    logits_BV = logits_BV / sampling.temperature
    logits_BV[:, : candidates.start] = -torch.inf
    logits_BV[:, candidates.stop :] = -torch.inf
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator).squeeze(1)
