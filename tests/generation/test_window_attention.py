"""Generation with window attention keeps every equality of dense attention."""

import numpy as np
import pytest
import torch

from cogview.generation.beam_search import beam_search
from cogview.generation.decode import decode
from cogview.generation.scoring import ScoringRequest, token_scores
from cogview.kernels.window_mask import WindowMask
from cogview.modeling.config import GREEDY, AttentionConfig, Sampling
from cogview.modeling.pivots import fixed_pivots
from cogview.tokenizers.batching import pad_right
from tests.factories import (
    LONG,
    SAMPLING,
    SHORT,
    VOCABULARY,
    caption_sequence,
    generate_sequence,
    random_transformer,
    request_for,
    upscale_sequence,
)

WINDOW = AttentionConfig(pattern="window", window=11, pivots=9)


@pytest.fixture(scope="module", params=[False, True], ids=["modules", "layers of a CPU"])
def transformer(request):
    """A random transformer with window attention, as modules and prepared for a CPU."""
    built = random_transformer(attention=WINDOW)
    if request.param:
        built.prepare_cpu()
    return built


def mixed_requests():
    """Return requests of different tasks, lengths and settings, one of them guided."""
    sequences = [
        generate_sequence(LONG),
        generate_sequence(SHORT, image=[5, None, 9, *[None] * 20, *range(30)]),
        upscale_sequence(SHORT, seed=1),
        upscale_sequence(LONG, seed=3).truncate(len(upscale_sequence(LONG)) - 1 - 24),
    ]
    samplings = [SAMPLING, Sampling(text_attention=3.0), GREEDY, SAMPLING]
    requests = [
        request_for(sequence, seed=5, image=number, sampling=sampling)
        for number, (sequence, sampling) in enumerate(zip(sequences, samplings, strict=True))
    ]
    guided = {"sampling": Sampling(guidance=2.0), "unconditional": (generate_sequence([]),)}
    return [*requests, request_for(generate_sequence(LONG), seed=1, **guided)]


@pytest.mark.parametrize("max_window", [1, 3, 64])
def test_decode_with_a_window_gives_a_row_its_codes_in_any_batch(transformer, max_window):
    requests = mixed_requests()
    sequential = decode(transformer, VOCABULARY, requests, speculative=1)
    batched = decode(transformer, VOCABULARY, requests, speculative=max_window)
    for request, expected, result in zip(requests, sequential, batched, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [request], speculative=max_window)
        assert result.ids.tolist() == alone.ids.tolist() == expected.ids.tolist()
        assert result.log_probability == pytest.approx(expected.log_probability, abs=1e-3)
        assert alone.log_probability == pytest.approx(expected.log_probability, abs=1e-3)


def test_decode_with_a_window_differs_from_dense_attention(transformer):
    dense = random_transformer()
    dense.load_state_dict(transformer.state_dict())
    request = request_for(generate_sequence(LONG), seed=5)
    (expected,), (found,) = (decode(one, VOCABULARY, [request]) for one in (dense, transformer))
    assert found.ids.tolist() != expected.ids.tolist()


def test_decode_with_a_window_equals_a_loop_without_a_cache(transformer):
    """Each code is the most probable one of a whole forward pass with the bias of all pairs."""
    sequence = generate_sequence(SHORT, image=[None] * 40 + [0] * 24)
    (result,) = decode(transformer, VOCABULARY, [request_for(sequence, seed=1, sampling=GREEDY)], speculative=1)
    plain = random_transformer()  # dense layers, which take any bias
    ids = torch.from_numpy(sequence.ids.copy())
    pivots = fixed_pivots(WINDOW, pad_right([sequence], VOCABULARY.pad), torch.device("cpu"))
    for index in np.flatnonzero(sequence.blanks).tolist():
        bias = WindowMask.of_sequences(WINDOW.window, pivots, index).to_bias(index, torch.float32)
        with torch.inference_mode():
            hidden = plain.hidden(ids[None, :index], bias_B1TS=bias)[0, -1]
            ids[index] = int(plain.head(hidden, range(64)).argmax())
    assert result.ids.tolist() == ids.tolist()


@pytest.mark.parametrize("int8", [False, True])
def test_decode_with_a_window_shares_prefixes(transformer, monkeypatch, int8):
    """Rows that share a prefix, some of them far ahead, get the codes of rows with copies of it."""
    given = [5, 9, 7] * 10  # the prefix is longer than the window, and has pivots
    requests = [
        request_for(generate_sequence(text, image=given), seed=3, image=image)
        for text, image in ((LONG, 0), (SHORT, 0), (LONG, 1), (LONG, 2))
    ]
    found = []
    for min_fraction, window in ((2.0, 1), (0.0, 1), (0.0, 8), (2.0, 64), (0.0, 64)):
        monkeypatch.setattr("cogview.generation.decoding_state.MIN_SHARED_FRACTION", min_fraction)
        results = decode(transformer, VOCABULARY, requests, int8_cache=int8, speculative=window)
        found.append([result.ids.tolist() for result in results])
    assert found[1:] == found[:1] * 4


@pytest.mark.parametrize("speculative", [1, 8])
def test_decode_with_a_window_is_the_same_when_cuda_graphs_are_forced(transformer, monkeypatch, speculative):
    monkeypatch.setattr("cogview.generation.speculative.BUCKET", 32)
    requests = mixed_requests()
    monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", "0")
    expected = decode(transformer, VOCABULARY, requests, speculative=1)
    monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", "1")
    found = decode(transformer, VOCABULARY, requests, speculative=speculative)
    assert [one.ids.tolist() for one in found] == [one.ids.tolist() for one in expected]


def test_token_scores_with_a_window_equal_the_log_probabilities_of_decoding(transformer):
    """Scoring is one pass over the sequence without a cache, decoding one pass for each code."""
    sampling = Sampling(top_k=0)
    sequences = [generate_sequence(LONG), generate_sequence(SHORT)]
    requests = [request_for(sequence, seed=2, sampling=sampling) for sequence in sequences]
    results = decode(transformer, VOCABULARY, requests, speculative=1)
    codes = [result.ids[sequence.spans["image"]] for result, sequence in zip(results, sequences, strict=True)]
    whole = [generate_sequence(text, image=image) for text, image in zip((LONG, SHORT), codes, strict=True)]
    scored = [ScoringRequest.of_span(sequence, "image") for sequence in whole]
    for result, scores in zip(results, token_scores(transformer, VOCABULARY, scored, VOCABULARY.image), strict=True):
        assert scores.sum() == pytest.approx(result.log_probability, abs=2e-3)


def test_beam_search_with_a_window_gives_a_row_its_beams_in_any_batch(transformer):
    sequences = [caption_sequence(seed=seed) for seed in (1, 2)]
    together = beam_search(transformer, VOCABULARY, sequences, beams=3)
    for sequence, beams in zip(sequences, together, strict=True):
        (alone,) = beam_search(transformer, VOCABULARY, [sequence], beams=3)
        assert [beam.ids.tolist() for beam in beams] == [beam.ids.tolist() for beam in alone]


def test_decode_with_a_window_as_long_as_the_sequence_equals_dense_attention():
    dense = random_transformer()
    wide = random_transformer(attention=AttentionConfig(pattern="window", window=96, pivots=1))
    every = random_transformer(attention=AttentionConfig(pattern="window", window=5, pivots=64))  # all are pivots
    expected = decode(dense, VOCABULARY, mixed_requests())
    for transformer in (wide, every):
        found = decode(transformer, VOCABULARY, mixed_requests())
        assert [one.ids.tolist() for one in found] == [one.ids.tolist() for one in expected]


def test_decode_with_a_window_reads_few_keys(monkeypatch):
    """A step reads the window, the sampled codes, and the tokens outside of images, not the whole cache."""
    transformer, read = random_transformer(attention=AttentionConfig(pattern="window", window=9, pivots=6)), set()
    selected = WindowMask.select_keys

    def recorded(mask, num_keys, dtype):
        keys = selected(mask, num_keys, dtype)
        read.add(num_keys if keys is None else keys.indices_BA.shape[1])
        return keys

    monkeypatch.setattr(WindowMask, "select_keys", recorded)
    decode(transformer, VOCABULARY, [request_for(generate_sequence(SHORT), seed=1)], speculative=1)
    assert max(read) == 9 + 6 + 4  # [ROI1], one piece, [BASE], [BOI1]
