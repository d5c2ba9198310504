"""Speculative decoding gives what sequential decoding gives."""

import copy

import pytest
import torch

from cogview.generation.decode import decode
from cogview.generation.speculative import WindowLimits, uses_cuda_graphs
from cogview.kernels.native import expects_native_kernels
from cogview.modeling.config import GREEDY, Sampling, TransformerConfig
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.transformer import Transformer
from tests.factories import (
    LONG,
    SAMPLING,
    SHORT,
    VOCABULARY,
    caption_sequence,
    codes_of,
    generate_sequence,
    random_transformer,
    request_for,
    upscale_sequence,
)


@pytest.mark.skipif(not expects_native_kernels(torch.device("cpu"), torch.float32), reason="there is no C compiler")
def test_log_probability_has_the_same_bits_in_any_batch_and_window(transformer):
    """Native kernels give each position the same bits, and the sum is rounded once: the files of images are equal."""
    transformer = copy.deepcopy(transformer)
    transformer.prepare_cpu()
    requests = [
        request_for(generate_sequence(LONG), seed=1, sampling=Sampling(top_k=20)),
        request_for(generate_sequence(SHORT), seed=2, sampling=SAMPLING),
        request_for(upscale_sequence(SHORT, seed=1), seed=3, sampling=Sampling(top_k=0, min_p=0.1)),
    ]
    expected = [one.log_probability for one in decode(transformer, VOCABULARY, requests, speculative=1)]
    for max_window in (1, 2, 5, None):
        batched = decode(transformer, VOCABULARY, requests, speculative=max_window)
        alone = [decode(transformer, VOCABULARY, [request], speculative=max_window)[0] for request in requests]
        for results in (batched, alone):
            assert [one.log_probability for one in results] == expected


@pytest.mark.parametrize("min_speedup", [0.0, 2.0])  # keep speculating although few drafts are accepted, or stop
@pytest.mark.parametrize("max_window", [2, 3, 8, 64])
def test_decode_speculatively_equals_sequential_decoding(transformer, monkeypatch, max_window, min_speedup):
    monkeypatch.setattr("cogview.generation.speculative.MIN_SPEEDUP", min_speedup)
    sequences = [
        generate_sequence(LONG),
        generate_sequence(SHORT),
        upscale_sequence(SHORT, seed=1),
        generate_sequence(SHORT, image=[5, None, 9, *[None] * 20, *range(30)]),
        generate_sequence(LONG[:2], image=range(64)),  # no blanks
        upscale_sequence(LONG, seed=3).truncate(
            len(upscale_sequence(LONG)) - 1 - 24
        ),  # five rows of codes: other sequences have text in the same columns
    ]
    samplings = [
        SAMPLING,
        GREEDY,
        Sampling(top_k=0),
        Sampling(text_attention=3.0),
        Sampling(top_k=0, min_p=0.1),
        SAMPLING,
    ]
    requests = [
        request_for(sequence, seed=5, image=number, sampling=sampling)
        for number, (sequence, sampling) in enumerate(zip(sequences, samplings, strict=True))
    ]
    requests.append(
        request_for(
            generate_sequence(LONG), seed=1, sampling=Sampling(guidance=2.0), unconditional=(generate_sequence([]),)
        )
    )
    sequential = decode(transformer, VOCABULARY, requests, speculative=1)
    batched = decode(transformer, VOCABULARY, requests, speculative=max_window)
    for request, expected, result in zip(requests, sequential, batched, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [request], speculative=max_window)
        assert result.ids.tolist() == alone.ids.tolist() == expected.ids.tolist()
        assert result.log_probability == pytest.approx(expected.log_probability, abs=1e-3)
        assert alone.log_probability == pytest.approx(expected.log_probability, abs=1e-3)


@pytest.mark.parametrize("prepared", [False, True])  # modules, or the layers of a CPU
@pytest.mark.parametrize("int8", [False, True])
def test_decode_speculatively_shares_prefixes(transformer, monkeypatch, int8, prepared):
    """Candidates of two prompts keep each prompt once, advance at different speeds, and get the same codes."""
    if prepared:
        transformer = copy.deepcopy(transformer)
        transformer.prepare_cpu()
    requests = [
        request_for(generate_sequence(text), seed=3, image=image, sampling=SAMPLING)
        for text, image in ((LONG, 0), (SHORT, 0), (LONG, 1), (LONG, 2))
    ]
    found, sizes = [], []

    def recorded(*rest, **named):
        sizes.append((cache := KVCache(*rest, **named)).num_bytes)
        return cache

    monkeypatch.setattr("cogview.generation.decoding_state.KVCache", recorded)
    for min_fraction, window in ((2.0, 1), (0.0, 8), (2.0, 64), (0.0, 64)):
        monkeypatch.setattr("cogview.generation.decoding_state.MIN_SHARED_FRACTION", min_fraction)
        results = decode(transformer, VOCABULARY, requests, int8_cache=int8, speculative=window)
        found.append([result.ids.tolist() for result in results])
    assert found[0] == found[1] == found[2] == found[3]
    assert sizes[1] == sizes[3] < sizes[0] == sizes[2]


def test_decode_speculatively_needs_few_forwards_when_codes_repeat():
    """The first draft of a position is the last code: an image of one colour takes few forward passes."""
    config = TransformerConfig(num_layers=1, width=32, num_heads=4, vocabulary_size=VOCABULARY.padded_size)
    echo = Transformer(config).eval()
    with torch.no_grad():  # layers that add nothing, and ids that are most probable after themselves
        echo.embedding.weight.copy_(echo.embedding.weight.sign())
        for parameter in (echo.positions.weight, *echo.layers.parameters()):
            parameter.zero_()
    request, forward_calls = request_for(generate_sequence(SHORT, image=[9]), seed=1, sampling=GREEDY), []
    hidden = echo.hidden
    echo.hidden = lambda *rest, **named: (forward_calls.append(1), hidden(*rest, **named))[1]
    (expected,) = decode(echo, VOCABULARY, [request], speculative=1)
    assert set(codes_of(expected, request.sequence)) == {9}
    assert len(forward_calls) == 63
    forward_calls.clear()
    (result,) = decode(echo, VOCABULARY, [request], speculative=64)
    assert result.ids.tolist() == expected.ids.tolist()
    assert len(forward_calls) <= 4  # the prompt, then 16 codes, 32, and the rest


@pytest.mark.parametrize(("num_rows", "width"), [(1, 12), (2, 7), (3, 1), (16, 1)])
def test_window_limits_divide_the_columns_among_the_rows(num_rows, width):
    """A window has at most 12 columns, and 14 // 3 are below the minimum of 5."""
    assert WindowLimits(columns=14, min_width=5, max_width=12).width(num_rows) == width


def test_decode_decodes_texts_sequentially(transformer, forwards):
    decode(transformer, VOCABULARY, [request_for(caption_sequence(), seed=1)], speculative=8)
    assert {length for _, length in forwards} == {1, 68}


@pytest.mark.parametrize("speculative", [1, 8])
def test_decode_speculatively_is_the_same_when_cuda_graphs_are_forced(transformer, monkeypatch, speculative):
    """On CUDA the steps are replayed as graphs; on a CPU the same steps run uncaptured on the same buffers."""
    monkeypatch.setattr("cogview.generation.speculative.BUCKET", 32)
    requests = [
        request_for(
            generate_sequence(LONG),
            seed=5,
            sampling=Sampling(guidance=2.0, top_k=9),
            unconditional=(generate_sequence([]),),
        ),
        request_for(generate_sequence(SHORT, image=[5, None, 9, *[None] * 20, *range(30)]), seed=6),
        request_for(upscale_sequence(SHORT, seed=1), seed=7, sampling=Sampling(text_attention=3.0)),
    ]
    monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", "0")
    expected = decode(transformer, VOCABULARY, requests, speculative=1)
    monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", "1")
    found = decode(transformer, VOCABULARY, requests, speculative=speculative)
    for one, other in zip(expected, found, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("COGVIEW_CUDA_GRAPHS", "0", False),
        ("COGVIEW_CUDA_GRAPHS", "1", True),
        ("COGVIEW_STEPS", "eager", False),
        ("COGVIEW_STEPS", "captured", True),
    ],
)
def test_uses_cuda_graphs_reads_both_variables(monkeypatch, variable, value, expected):
    """Scripts that set the variable of earlier versions keep their meaning."""
    monkeypatch.setenv(variable, value)
    assert uses_cuda_graphs(torch.device("cpu")) is expected
    assert uses_cuda_graphs(torch.device("cuda")) is expected


def test_uses_cuda_graphs_prefers_the_new_variable(monkeypatch):
    monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", "0")
    monkeypatch.setenv("COGVIEW_STEPS", "captured")
    assert not uses_cuda_graphs(torch.device("cuda"))


def test_uses_cuda_graphs_only_on_cuda_by_default(monkeypatch):
    for variable in ("COGVIEW_CUDA_GRAPHS", "COGVIEW_STEPS"):
        monkeypatch.delenv(variable, raising=False)
    assert uses_cuda_graphs(torch.device("cuda"))
    assert not uses_cuda_graphs(torch.device("cpu"))


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("COGVIEW_CUDA_GRAPHS", "COGVIEW_CUDA_GRAPHS='compiled' is unknown; known: 0, 1"),
        ("COGVIEW_STEPS", "COGVIEW_STEPS='compiled' is unknown; known: eager, captured"),
    ],
)
def test_uses_cuda_graphs_rejects_other_values(monkeypatch, variable, message):
    monkeypatch.setenv(variable, "compiled")
    with pytest.raises(ValueError, match=message):
        uses_cuda_graphs(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("speculative", [1, 8])
def test_cuda_graphs_give_the_codes_of_eager_steps(monkeypatch, speculative):
    """Captured steps read and write the same tensors as eager ones; an early capture would replay stale values."""
    transformer = random_transformer().to("cuda")
    requests = [request_for(generate_sequence(text), seed=2, image=index) for index, text in enumerate((LONG, SHORT))]
    codes = []
    for graphs in ("0", "1"):
        monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", graphs)
        results = decode(transformer, VOCABULARY, requests, speculative=speculative)
        codes.append([codes_of(result, request.sequence) for result, request in zip(results, requests, strict=True)])
    assert codes[0] == codes[1]
