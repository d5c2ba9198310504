"""Bytes of decoding, beam search and scoring against the tensors that are alive at the peak."""

import numpy as np
import pytest
import torch

from cogview.generation.beam_search import beam_search
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingRequest
from cogview.generation.scoring import ScoringRequest, score
from cogview.modeling.config import Sampling
from cogview.modeling.transformer import Transformer
from cogview.planning.batch_memory import beam_search_bytes, decode_bytes, score_bytes
from cogview.planning.model_memory import workspace_bytes
from tests.planning.factories import PeakMemory, sequence_of, small_config, small_estimate


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("task", "different", "known", "sampling", "num_codes", "int8_cache"),
    [
        ("generate", 16, None, Sampling(top_k=5), 300, False),  # the peak is in the layers
        ("generate", 16, None, Sampling(top_k=0), 8192, False),  # the peak is in sampling
        pytest.param("generate", 16, None, Sampling(top_k=0, top_p=0.9), 8192, False, marks=pytest.mark.slow),
        pytest.param("generate", 16, None, Sampling(top_k=5, guidance=3), 8192, False, marks=pytest.mark.slow),
        ("generate", 16, None, Sampling(top_k=0, guidance=3, image_guidance=2), 8192, False),  # three rows each
        ("generate", 16, None, Sampling(top_k=5, text_attention=2), 300, False),
        ("generate", 16, None, Sampling(), 300, True),
        ("generate", 1, None, Sampling(), 300, False),  # one prefix for all, cached once
        ("generate", 14, None, Sampling(), 300, False),  # prefixes are computed once and copied
        ("generate", 16, np.s_[:4], Sampling(), 300, False),  # the upper half is known
        ("upscale", 16, np.s_[:, :4], Sampling(), 300, False),  # the left one: known columns lie between blanks
        ("caption", 16, None, Sampling(), 300, False),
        ("caption", 16, None, Sampling(), 300, True),
        ("caption", 8, None, Sampling(), 300, False),
        ("caption", 4, None, Sampling(), 300, True),
    ],
)
def test_decode_bytes_predict_peak(task, different, known, sampling, num_codes, int8_cache, dtype):
    config, rows = small_config(num_codes), 16
    transformer = Transformer(config.transformer).eval().to(getattr(torch, dtype))
    arranged = [sequence_of(config, task, number % different, known=known) for number in range(rows)]
    chain = 1 + (sampling.image_guidance != 1)
    requests = [
        DecodingRequest(sequence=row, seed=0, image=index, sampling=sampling, unconditional=(row,) * chain)
        for index, row in enumerate(arranged)
    ]
    with PeakMemory(transformer.parameters()) as memory:
        decode(transformer, config.vocabulary, requests, int8_cache=int8_cache)
    settings = {"dtype": dtype, "device_type": "cpu", "int8_cache": int8_cache}
    predicted = decode_bytes(config.transformer, config.vocabulary, requests, **settings)
    workspace = workspace_bytes(config.transformer, dtype, "cpu")  # may be freed at the peak of the layers
    assert 0.95 * memory.peak <= predicted <= 1.1 * memory.peak + workspace


@pytest.mark.usefixtures("plain_cpu")
def test_decode_bytes_predict_peak_of_speculative_decoding():
    config, rows = small_config(8192), 4
    transformer = Transformer(config.transformer).eval()
    requests = [
        DecodingRequest(sequence=sequence_of(config, "generate"), seed=0, image=index, sampling=Sampling())
        for index in range(rows)
    ]
    with PeakMemory(transformer.parameters()) as memory:
        decode(transformer, config.vocabulary, requests, speculative=16)
    settings = {"dtype": "float32", "device_type": "cpu"}
    predicted = decode_bytes(config.transformer, config.vocabulary, requests, max_window=16, **settings)
    assert 0.95 * memory.peak <= predicted <= 1.1 * memory.peak
    assert predicted > 2 * decode_bytes(config.transformer, config.vocabulary, requests, **settings)


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("images", "beams"), [(3, 4), (1, 8)])
def test_beam_search_bytes_predict_peak(images, beams, dtype):
    config = small_config()
    transformer = Transformer(config.transformer).eval().to(getattr(torch, dtype))
    rows = [sequence_of(config, "caption", number) for number in range(images)]
    with PeakMemory(transformer.parameters()) as memory:
        beam_search(transformer, config.vocabulary, rows, beams)
    predicted = beam_search_bytes(config.transformer, config.vocabulary, rows, beams, dtype=dtype, device_type="cpu")
    assert 0.95 * memory.peak <= predicted <= 1.1 * memory.peak + workspace_bytes(config.transformer, dtype, "cpu")


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_score_bytes_predict_peak(dtype):
    config, rows = small_config(), 3
    transformer = Transformer(config.transformer).eval().to(getattr(torch, dtype))
    row = config.layouts["score"].arrange(config.vocabulary, image=[0] * 64, text=[0] * 20)
    with PeakMemory(transformer.parameters()) as memory:
        score(transformer, config.vocabulary, [row] * rows)
    found = small_estimate(config, task="score", rows=rows, dtype=dtype)
    assert found.workspace + rows * max(found.activations, found.logits) == pytest.approx(memory.peak, rel=0.1)
    predicted = score_bytes(
        config.transformer,
        range(config.vocabulary.text.start, config.vocabulary.padded_size),
        [ScoringRequest.of_span(row, "text")] * rows,
        dtype=dtype,
        device_type="cpu",
    )
    assert predicted == pytest.approx(memory.peak, rel=0.12)
