"""Shared prefixes: computed once, stored once, and without effect on the result."""

import pytest

from cogview.generation.decode import decode
from cogview.generation.decoding_state import DecodingState, group_by_prefix, worth_sharing_prefix
from cogview.modeling.config import Sampling
from cogview.tokenizers.batching import pad_left
from tests.factories import (
    LONG,
    SHORT,
    VOCABULARY,
    caption_sequence,
    generate_sequence,
    request_for,
)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("min_fraction", [0.0, 2.0])  # one copy per prefix, or one per row
def test_decode_prefills_a_common_prefix_once(transformer, forwards, monkeypatch, min_fraction, int8):
    monkeypatch.setattr("cogview.generation.decoding_state.MIN_SHARED_FRACTION", min_fraction)
    requests = [
        request_for(caption_sequence(seed=seed), seed=7, image=image, sampling=Sampling(top_k=0))
        for seed, image in ((1, 0), (2, 0), (1, 1), (1, 2), (2, 1))
    ]
    batched = decode(transformer, VOCABULARY, requests, int8_cache=int8)
    assert forwards[:2] == [(2, 68), (5, 1)]  # two images, five captions
    for request, result in zip(requests, batched, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [request], int8_cache=int8)
        assert result.ids.tolist() == alone.ids.tolist()
        assert result.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
    assert len({tuple(result.ids.tolist()) for result in batched}) == 5


def test_decoding_state_stores_a_common_prefix_once(transformer, monkeypatch):
    batch = pad_left([caption_sequence(seed=1).truncate(73)] * 8, VOCABULARY.pad)
    sizes = []
    for min_fraction in (0.0, 2.0):
        monkeypatch.setattr("cogview.generation.decoding_state.MIN_SHARED_FRACTION", min_fraction)
        sizes.append(DecodingState(transformer, batch, None).cache.num_bytes)
    assert sizes[0] * 8 * 73 == sizes[1] * (68 + 8 * (73 - 68))


def test_decode_shares_no_prefix_when_text_attention_differs(transformer, forwards):
    """The ids are equal, but the text of one has more weight."""
    sequence = generate_sequence(LONG)
    requests = [
        request_for(sequence, seed=7, sampling=Sampling(top_k=5, text_attention=weight)) for weight in (1.0, 4.0)
    ]
    batched = decode(transformer, VOCABULARY, requests, speculative=1)
    assert forwards[0][0] == 2
    for request, result in zip(requests, batched, strict=True):
        assert result.ids.tolist() == decode(transformer, VOCABULARY, [request], speculative=1)[0].ids.tolist()


def test_group_by_prefix_numbers_prefixes_by_ids_padding_and_keys():
    """The example of the docstring: the first and third rows are equal before their first blank."""
    batch = pad_left([generate_sequence(text) for text in (LONG, SHORT, LONG)], VOCABULARY.pad)
    first_blank = 13  # [ROI1], ten text tokens, [BASE], [BOI1]
    assert group_by_prefix(batch, [0, 0, 0]) == (first_blank, [0, 1, 0])
    assert group_by_prefix(batch, [0, 0, 9]) == (first_blank, [0, 1, 2])


@pytest.mark.parametrize(("num_prefixes", "length", "expected"), [(2, 32, True), (2, 31, False), (4, 32, False)])
def test_worth_sharing_prefix_compares_saved_columns_with_all(num_prefixes, length, expected):
    """Of 4 rows of 78 columns, sharing 2 prefixes of 32 columns saves 64: a fifth of all is 62.4."""
    batch = pad_left([generate_sequence(LONG)] * 4, VOCABULARY.pad)
    assert batch.ids.shape == (4, 78)
    assert worth_sharing_prefix(batch, length, num_prefixes) is expected
