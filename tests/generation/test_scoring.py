"""Scores against sums over full forwards."""

import numpy as np
import pytest
import torch

from cogview.generation.scoring import score
from tests.factories import (
    LONG,
    SHORT,
    TABLE,
    VOCABULARY,
)


def test_score_sums_log_probabilities_over_the_text(transformer):
    """The expected value comes from full forwards, token by token, among text ids and special tokens."""
    texts = (SHORT, LONG, LONG[:3])
    sequences = [
        TABLE["score"].arrange(VOCABULARY, image=np.random.default_rng(n).integers(0, 64, 64), text=text)
        for n, text in enumerate(texts)
    ]
    first = VOCABULARY.text.start
    for sequence, text, total in zip(sequences, texts, score(transformer, VOCABULARY, sequences), strict=True):
        start, expected = sequence.spans["text"].start, 0.0
        for number, piece in enumerate(text):
            with torch.inference_mode():
                logits = transformer(torch.from_numpy(sequence.ids[None, : start + number]))[0, -1, first:].double()
            expected += logits.log_softmax(dim=-1)[piece].item()
        assert total == pytest.approx(expected, abs=1e-3)
