"""The decoding loop: sample the blanks of token sequences, whatever task they belong to.

Sequences of different lengths and tasks share a batch. Each is cut after its last blank and padded on the left, so that
all end at the same column. The columns before the first blank are prefilled in one forward pass; the others are decoded
from left to right. ``beam_search`` finds the most probable texts instead, and ``score`` evaluates a given text.
"""

# J requests, B rows of a batch: one per request, then the others of guided ones (``BatchRows``). T columns
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from cogview.generation.decoding_state import DecodingState, text_attention_bias
from cogview.generation.guidance import arrange_rows
from cogview.generation.requests import DecodingCallback, DecodingRequest, DecodingResult, notify, restore_blanks
from cogview.generation.speculative import decode_speculatively, uses_cuda_graphs, window_limits
from cogview.generation.token_sampler import TokenSampler
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import pad_left
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary


@torch.inference_mode()
def decode(
    transformer: Transformer,
    vocabulary: Vocabulary,
    requests: Sequence[DecodingRequest],
    callback: DecodingCallback | None = None,
    *,
    int8_cache: bool = False,
    speculative: int | None = None,
) -> list[DecodingResult]:
    """Sample every blank of every request; a result does not depend on the other requests.

    A text ends at its stop token. All rows are in memory at once: plan the batch size first.

    Args:
        transformer: Model that computes the logits.
        vocabulary: Vocabulary of the ids.
        requests: One or more requests.
        callback: Function that is called after every decoded column; it may return False to stop.
        int8_cache: Store keys and values in int8.
        speculative: Maximal number of image codes per row that one forward pass verifies; 1 disables speculative
            decoding, None chooses by device and batch size. The result is the same (``speculative.py``). Texts are
            always decoded token by token.

    Returns:
        One result per request, in their order.

    Raises:
        DecodingStopped: The callback returned False.
        ValueError: There are no requests, or a guided request has no matching unconditional sequences.
    """
    rows = arrange_rows(requests)
    batch = pad_left([sequence.until_last_blank() for sequence in rows.sequences], vocabulary.pad)
    device = transformer.embedding.weight.device
    only_images = bool(batch.blanks.any()) and bool((batch.kinds[batch.blanks] == TokenKind.IMAGE).all())
    limits = window_limits(device, transformer.cpu_layers, speculative)
    in_windows = only_images and (limits.width(len(batch.ids)) > 1 or uses_cuda_graphs(device))
    bias_BT = text_attention_bias(batch, rows.text_attention)
    state = DecodingState(transformer, batch, bias_BT, int8=int8_cache)
    sampler = TokenSampler(transformer, vocabulary, requests, batch, rows)

    def partial_sequences(next_J: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the ids of each request, decoded up to the column ``next_J`` of the batch."""
        undecoded_JT = batch.blanks[: len(requests)] & (np.arange(batch.ids.shape[1]) >= next_J[:, None])
        ids_JT = np.where(undecoded_JT, vocabulary.pad, state.ids_BT[: len(requests)].cpu().numpy())
        return [restore_blanks(request.sequence, ids) for request, ids in zip(requests, ids_JT, strict=True)]

    if in_windows:
        decode_speculatively(state, sampler, limits, callback, partial_sequences)
    else:
        _decode_sequentially(state, sampler, callback, partial_sequences)
    decoded = partial_sequences(np.full(len(requests), batch.ids.shape[1]))
    return [
        DecodingResult(ids=ids, log_probability=log_probability)
        for ids, log_probability in zip(decoded, sampler.log_probabilities(), strict=True)
    ]


def _decode_sequentially(
    state: DecodingState,
    sampler: TokenSampler,
    callback: DecodingCallback | None,
    partial_sequences: Callable[[NDArray[np.int64]], list[NDArray[np.int64]]],
) -> None:
    """Decode one column at a time."""
    requests = sampler.requests
    open_JT = sampler.batch.blanks[: len(requests)].copy()  # still to be sampled
    columns = np.flatnonzero(open_JT.any(axis=0))
    has_texts = any(request.sequence.stop is not None for request in requests)
    for done, column in enumerate(columns.tolist(), start=1):
        if has_texts and not open_JT[:, column:].any():  # every text has ended
            break
        hidden_BD = state.forward_to(column)
        for group in sampler.groups_at(column, open_JT[:, column]):
            ids_R = group.sample(hidden_BD, sampler.keys_JT[:, column], sampler.log_probability_JT[:, column])
            group.write_tokens(state.ids_BT, column, ids_R)
            if group.stop is not None:
                ended = group.members[(ids_R == group.stop).cpu().numpy()]
                open_JT[ended] &= np.arange(open_JT.shape[1]) <= column
        if callback is not None:
            notify(callback, done, len(columns), partial(partial_sequences, np.full(len(requests), column + 1)))
