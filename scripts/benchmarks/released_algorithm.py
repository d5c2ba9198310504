"""How the released CogView v1 draws: a short form of its algorithm on our weights, to compare with.

Of the places it has read it remembers the input of every layer, not their keys and values. Each step puts the new place
behind the memory, normalises and projects the whole of it to queries, keys and values again, has the new place look at
all of it, and multiplies by the whole embedding; of the logits, those of ids that are not permitted are then masked,
the top k kept, and one id drawn from their softmax. A prompt is read once and its memory repeated for its pictures.

Attention, norms and projections are ours, no slower than its own: what differs is the algorithm.
"""

# B rows of a batch, T new places, S places so far, D width of the model, V vocabulary
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
def draw(
    transformer: Transformer,
    vocabulary: Vocabulary,
    row: TokenSequence,
    count: int,
    sampling: Sampling,
    generator: torch.Generator,
    on_column: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Fill the blanks of ``row`` in ``count`` ways: int64 (count, T); of ``sampling``, temperature and top-k count."""
    device = transformer.embedding.weight.device
    ids_BT = torch.from_numpy(row.ids).to(device).unsqueeze(0)
    positions_T = torch.from_numpy(row.positions).to(device)
    memory = no_memory(transformer)
    columns = np.flatnonzero(row.blanks).tolist()
    for done, column in enumerate(columns, start=1):
        new = slice(memory[0].shape[1], column)
        logits_BV, memory = read(transformer, memory, ids_BT[:, new], positions_T[new])
        if done == 1:
            ids_BT, logits_BV = ids_BT.repeat(count, 1), logits_BV.repeat(count, 1)
            memory = [inputs_BSD.repeat(count, 1, 1) for inputs_BSD in memory]
        permitted = vocabulary.permitted(TokenKind(row.kinds[column]))
        ids_BT[:, column] = choose(logits_BV, permitted, sampling, generator)
        if on_column is not None:
            on_column(done, len(columns))
    return ids_BT.cpu().numpy()


def no_memory(transformer: Transformer) -> list[Tensor]:
    """The memory of one row of which nothing has been read."""
    weight = transformer.embedding.weight
    return [weight.new_empty(1, 0, transformer.config.width) for _ in transformer.layers]


@torch.inference_mode()
def read(
    transformer: Transformer, memory: list[Tensor], ids_BT: Tensor, positions_T: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Float32 logits (B, V) of all ids behind the last of ``ids_BT``, and the memory with the new places in it.

    ``memory`` has the inputs (B, S, D) of each layer.
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
def choose(logits_BV: Tensor, permitted: range, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One permitted id (B,) for each row."""
    logits_BV = logits_BV / sampling.temperature
    logits_BV[:, : permitted.start] = -torch.inf
    logits_BV[:, permitted.stop :] = -torch.inf
    if sampling.top_k:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator).squeeze(1)
