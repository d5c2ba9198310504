"""Beam search against all texts, against greedy decoding, and alone against in a batch."""

import numpy as np
import pytest
import torch

from cogview.generation.beam_search import beam_search
from cogview.generation.decode import decode
from cogview.modeling.config import GREEDY
from cogview.tokenizers.layouts import layouts
from tests.factories import (
    SHORT,
    VOCABULARY,
    caption_sequence,
    generate_sequence,
    request_for,
    text_ids_of,
)


def all_texts(model, sequence, length):
    """Return every text of up to ``length`` tokens with its log probability, from full forwards."""
    start = sequence.spans["text"].start
    stop = VOCABULARY.command("[SEP]")
    choices = [*VOCABULARY.text, stop]
    finished, open_texts = {}, {(): 0.0}
    for index in range(start, start + length):
        ids = torch.tensor([[*sequence.ids[:start], *text] for text in open_texts])
        with torch.inference_mode():
            logits = model(ids)[:, index - 1, choices].double()
        longer = {
            (*text, token): total + log_p
            for (text, total), log_ps in zip(open_texts.items(), logits.log_softmax(dim=-1).tolist(), strict=True)
            for token, log_p in zip(choices, log_ps, strict=True)
        }
        finished |= {text: total for text, total in longer.items() if text[-1] == stop}
        open_texts = {text: total for text, total in longer.items() if text[-1] != stop}
    return finished | open_texts


def test_beam_search_finds_the_most_probable_texts_when_beams_suffice(stopping_transformer):
    sequences = [caption_sequence(seed, max_text=2) for seed in (1, 2)]
    found = beam_search(stopping_transformer, VOCABULARY, sequences, beams=60)
    for sequence, texts in zip(sequences, found, strict=True):
        truth = sorted(all_texts(stopping_transformer, sequence, 2).items(), key=lambda item: -item[1])[:8]
        for one, (text, log_p) in zip(texts, truth, strict=False):
            assert one.log_probability == pytest.approx(log_p, abs=1e-3)
            assert text_ids_of(one, sequence)[: len(text)] == list(text)
        assert [one.log_probability for one in texts] == sorted((one.log_probability for one in texts), reverse=True)
        assert len({tuple(text_ids_of(one, sequence)) for one in texts}) == 60


def test_beam_search_is_greedy_decoding_with_one_beam(stopping_transformer):
    sequences = [caption_sequence(seed, max_text=7) for seed in range(5)]
    greedy = decode(
        stopping_transformer, VOCABULARY, [request_for(sequence, seed=0, sampling=GREEDY) for sequence in sequences]
    )
    for (found,), expected in zip(
        beam_search(stopping_transformer, VOCABULARY, sequences, beams=1), greedy, strict=True
    ):
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-3)


def test_beam_search_does_not_depend_on_the_batch(stopping_transformer):
    sequences = [caption_sequence(seed, max_text=6) for seed in range(3)]
    for sequence, batched in zip(
        sequences, beam_search(stopping_transformer, VOCABULARY, sequences, beams=5), strict=True
    ):
        (alone,) = beam_search(stopping_transformer, VOCABULARY, [sequence], beams=5)
        assert [one.ids.tolist() for one in batched] == [one.ids.tolist() for one in alone]


def test_beam_search_raises_value_error_for_unsuitable_sequences(transformer):
    with pytest.raises(ValueError, match="end in blank texts of one length"):
        beam_search(transformer, VOCABULARY, [generate_sequence(SHORT)], beams=2)
    with pytest.raises(ValueError, match="at least one beam, got 0"):
        beam_search(transformer, VOCABULARY, [caption_sequence()], beams=0)
    unstopped = layouts(8, caption_stop=False)["caption"].arrange(VOCABULARY, image=np.arange(64), max_text=6)
    with pytest.raises(ValueError, match="the same stop"):
        beam_search(transformer, VOCABULARY, [caption_sequence(), unstopped], beams=2)
