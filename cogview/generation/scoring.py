"""Scoring: the log probability of a given text, for reranking images by captions."""

# B sequences, T columns, D width of the model, N text tokens of all sequences
from __future__ import annotations

from collections.abc import Sequence

import torch

from cogview.generation.token_sampler import log_probability_of
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import pad_right
from cogview.tokenizers.layouts import TokenSequence
from cogview.tokenizers.vocabulary import Vocabulary


@torch.inference_mode()
def score(
    transformer: Transformer, vocabulary: Vocabulary, sequences: Sequence[TokenSequence], name: str = "text"
) -> list[float]:
    """Return log p(text | everything before it) of each sequence, in nats.

    Text tokens compete with each other and with special tokens, but not with image codes, as in the released code of
    CogView v1 (``inverse_prompt_score`` in
    https://github.com/THUDM/CogView/blob/169a0234990d4507ab5ec8e70b15831d8d5b3dd3/generation/sampling.py).

    Args:
        transformer: Model that computes the logits.
        vocabulary: Vocabulary of the ids.
        sequences: Sequences without blanks.
        name: Span of the text in each sequence.

    Returns:
        One sum over the tokens of the text per sequence.
    """
    device = transformer.embedding.weight.device
    batch = pad_right(sequences, vocabulary.pad)
    ids_BT = torch.from_numpy(batch.ids).to(device)
    hidden_BTD = transformer.hidden(ids_BT, torch.from_numpy(batch.positions).to(device))
    candidates = range(vocabulary.text.start, vocabulary.padded_size)
    spans = [sequence.spans[name] for sequence in sequences]
    # One product with the output embedding for all texts: hidden states before each token, sequence after sequence.
    before_ND = torch.cat([hidden_BTD[b, span.start - 1 : span.stop - 1] for b, span in enumerate(spans)])
    chosen_N = torch.cat([ids_BT[b, span] for b, span in enumerate(spans)]) - candidates.start
    log_p_N = log_probability_of(transformer.head(before_ND, candidates), chosen_N).double().cpu()
    lengths = [span.stop - span.start for span in spans]
    return [float(part_N.sum()) for part_N in torch.split(log_p_N, lengths)]
