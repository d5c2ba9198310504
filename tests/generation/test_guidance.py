"""Chains of guidance: which rows are computed, how their logits are combined, and that the batch changes nothing."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cogview.generation.decode import decode
from cogview.generation.guidance import necessary_rows
from cogview.generation.sampling import keyed_gumbel, noise_keys
from cogview.modeling.config import Sampling
from tests.factories import (
    LONG,
    SHORT,
    TABLE,
    VOCABULARY,
    caption_sequence,
    codes_of,
    generate_sequence,
    request_for,
    text_ids_of,
    upscale_sequence,
)

ALL = Sampling(top_k=0)


def edit_sequence(text, source=1, known=40):
    """Return an edit of a random image, None for no source; the first ``known`` codes of the result are given."""
    codes = np.ma.masked_all(64, dtype=np.int64)
    if source is not None:
        codes = np.random.default_rng(source).integers(0, 64, 64)
    return TABLE["edit"].arrange(VOCABULARY, text=text, source=codes, image=[3] * known)


def edit_chain(text=LONG, source=1, known=40):
    """Return the sequences with neither source nor text, with the source alone, and with both."""
    return (*(edit_sequence([], given, known) for given in (None, source)), edit_sequence(text, source, known))


def edit_request(image_guidance, guidance, *, seed=4, image=0, text=LONG, source=1, known=40, **sampling):
    """Return an edit with guidance by its source and by its text."""
    *unconditional, sequence = edit_chain(text, source, known)
    settings = replace(ALL, image_guidance=image_guidance, guidance=guidance, **sampling)
    return request_for(sequence, seed=seed, image=image, sampling=settings, unconditional=tuple(unconditional))


def mixed_requests():
    """Return requests of several tasks and lengths, with chains of one, two and three rows."""
    return [
        edit_request(2.0, 5.0),
        edit_request(1.0, 3.0, seed=5, text=SHORT, source=2, top_k=9),
        request_for(upscale_sequence(SHORT), seed=1),
        edit_request(2.0, 5.0, seed=6, known=7, text=SHORT),
        edit_request(1.0, 0.0, seed=7, text_attention=3.0),
        request_for(
            generate_sequence(LONG), seed=2, sampling=Sampling(guidance=2.0), unconditional=(generate_sequence([]),)
        ),
        edit_request(1.5, 1.0, seed=8, text_attention=2.0),
        request_for(generate_sequence(LONG), seed=3),
    ]


def assert_same(result, expected):
    """Assert that two results have the same ids, and nearly the same log-probability."""
    assert result.ids.tolist() == expected.ids.tolist()
    assert result.log_probability == pytest.approx(expected.log_probability, abs=1e-3)


@pytest.mark.parametrize(
    ("scales", "rows", "kept"),
    [
        ((), [0], ()),
        ((1.0,), [1], ()),
        ((0.0,), [0], ()),
        ((3.0,), [0, 1], (3.0,)),
        ((0.0, 0.0), [0], ()),
        ((1.0, 0.0), [1], ()),
        ((1.0, 1.0), [2], ()),
        ((2.0, 0.0), [0, 1], (2.0,)),
        ((1.0, 2.0), [1, 2], (2.0,)),
        ((2.0, 2.0), [0, 2], (2.0,)),
        ((2.0, 1.0), [0, 1, 2], (2.0, 1.0)),
        ((0.0, 1.0), [0, 1, 2], (0.0, 1.0)),
        ((2.0, 5.0), [0, 1, 2], (2.0, 5.0)),
        ((1.0, 1.0, 1.0, 0.0), [3], ()),
    ],
)
def test_necessary_rows_drop_what_cancels(scales, rows, kept):
    assert necessary_rows(scales) == (rows, kept)
    logits = np.random.default_rng(0).normal(size=len(scales) + 1)  # one candidate of each row
    parts = [logits[0], *(scale * part for scale, part in zip(scales, np.diff(logits), strict=True))]
    left = [logits[rows[0]], *(scale * part for scale, part in zip(kept, np.diff(logits[rows]), strict=True))]
    assert sum(left) == pytest.approx(sum(parts))


@pytest.mark.parametrize("speculative", [1, 8])
@pytest.mark.parametrize(("scales", "row"), [((0.0, 0.0), 0), ((1.0, 0.0), 1), ((1.0, 1.0), 2)])
def test_pure_modes_are_exact_and_need_one_row(transformer, forwards, scales, row, speculative):
    """No source and no text, the source alone, or both: the bits of a request that is not guided."""
    request = edit_request(*scales)
    chain = [*request.unconditional, request.sequence]
    (result,) = decode(transformer, VOCABULARY, [request], speculative=speculative)
    assert {count for count, _ in forwards} == {1}
    (plain,) = decode(transformer, VOCABULARY, [request_for(chain[row], seed=4, sampling=ALL)], speculative=speculative)
    assert codes_of(result, request.sequence) == codes_of(plain, chain[row])
    assert result.log_probability == plain.log_probability
    given = ~request.sequence.blanks
    np.testing.assert_array_equal(result.ids[given], request.sequence.ids[given])


def test_pure_modes_differ(transformer):
    """A source and a text count, so that the equalities above compare something."""
    requests = [edit_request(*scales) for scales in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))]
    results = decode(transformer, VOCABULARY, requests)
    assert len({tuple(codes_of(result, requests[0].sequence)) for result in results}) == 3


def test_source_alone_has_no_text_to_attend_to(transformer):
    """With guidance 0 the text is left out, and with it the weight of the attention to it."""
    plain, weighted = decode(
        transformer, VOCABULARY, [edit_request(1.0, 0.0), edit_request(1.0, 0.0, text_attention=5.0)]
    )
    assert_same(weighted, plain)


@pytest.mark.parametrize(("image_guidance", "guidance"), [(1.5, 4.0), (0.0, 1.0), (3.0, 1.0), (2.0, 2.0), (1.0, 3.0)])
def test_decode_combines_logits_of_three_rows(transformer, image_guidance, guidance):
    """u + I (s - u) + S (c - s), from full forward passes over each of the three sequences."""
    request = edit_request(image_guidance, guidance)
    chain = [*request.unconditional, request.sequence]
    ids = [torch.from_numpy(sequence.ids.copy()) for sequence in chain]
    apart, log_p = [len(ids[-1]) - len(row) for row in ids], 0.0
    for index in np.flatnonzero(request.sequence.blanks).tolist():
        with torch.inference_mode():
            forwards = [
                transformer(row[None, : index - before], torch.from_numpy(one.positions[None, : index - before]))
                for row, before, one in zip(ids, apart, chain, strict=True)
            ]
        u, s, c = (logits[0, -1, :64] for logits in forwards)
        key = [torch.tensor([value]) for value in (request.seed, 0, index - request.sequence.spans["image"].start)]
        noise = keyed_gumbel(noise_keys(*key), range(64))
        chosen = int((u + image_guidance * (s - u) + guidance * (c - s) + noise).argmax())
        for row, before in zip(ids, apart, strict=True):
            row[index - before] = chosen
        log_p += c.double().log_softmax(dim=-1)[chosen].item()
    (result,) = decode(transformer, VOCABULARY, [request])
    assert result.ids.tolist() == ids[-1].tolist()
    assert result.log_probability == pytest.approx(log_p, abs=1e-3)


def test_chain_without_a_row_equals_a_shorter_chain(transformer):
    """Scale 1 of the source leaves the guidance by the text, equal scales that by both, bit for bit."""
    neither, alone, full = edit_chain()
    for request, other in ((edit_request(1.0, 3.0), alone), (edit_request(3.0, 3.0), neither)):
        short = request_for(full, seed=4, sampling=replace(ALL, guidance=3.0), unconditional=(other,))
        (result,), (expected,) = (decode(transformer, VOCABULARY, [one]) for one in (request, short))
        assert result.ids.tolist() == expected.ids.tolist()
        assert result.log_probability == expected.log_probability


@pytest.mark.parametrize("int8_cache", [False, True])
def test_chains_do_not_depend_on_the_batch(transformer, int8_cache):
    requests = [*mixed_requests(), request_for(caption_sequence(), seed=2)]
    batched = decode(transformer, VOCABULARY, requests, int8_cache=int8_cache)
    for request, result in zip(requests, batched, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [request], int8_cache=int8_cache)
        assert_same(result, alone)


@pytest.mark.parametrize("prepared", [False, True])  # modules, or the layers of a CPU
@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("cuda_graphs", ["0", "1"])
def test_chains_are_the_same_with_speculation(transformer, monkeypatch, cuda_graphs, int8_cache, prepared):
    monkeypatch.setattr("cogview.generation.speculative.MIN_SPEEDUP", 0.0)
    monkeypatch.setattr("cogview.generation.speculative.BUCKET", 32)
    if prepared:
        transformer = copy.deepcopy(transformer)
        transformer.prepare_cpu()
    requests = mixed_requests()
    monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", "0")
    expected = decode(transformer, VOCABULARY, requests, speculative=1, int8_cache=int8_cache)
    monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", cuda_graphs)
    results = decode(transformer, VOCABULARY, requests, speculative=8, int8_cache=int8_cache)
    for result, one in zip(results, expected, strict=True):
        assert_same(result, one)


@pytest.mark.parametrize("speculative", [1, 8])
def test_variants_of_an_edit_share_the_prefixes_of_its_rows(transformer, forwards, monkeypatch, speculative):
    """Three variants of one edit have nine rows and three prefixes."""
    requests = [edit_request(2.0, 5.0, image=number, known=0) for number in range(3)]
    together = decode(transformer, VOCABULARY, requests, speculative=speculative)
    assert forwards[0][0] == 3
    assert {rows for rows, _ in forwards[1:]} == {9}
    monkeypatch.setattr("cogview.generation.decoding_state.MIN_SHARED_FRACTION", math.inf)
    for request, result in zip(requests, together, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [request], speculative=speculative)
        assert_same(result, alone)


def test_chains_of_texts_have_finite_logits(transformer):
    """Commands are no candidates of a text: their logits are -inf in every row, and so in the combination."""
    rows = tuple(caption_sequence(seed) for seed in range(3))
    sampling = replace(ALL, image_guidance=2.0, guidance=3.0)
    request = request_for(rows[2], seed=1, sampling=sampling, unconditional=rows[:2])
    (result,) = decode(transformer, VOCABULARY, [request])
    permitted = {*VOCABULARY.text, VOCABULARY.command("[SEP]"), VOCABULARY.pad}
    assert set(text_ids_of(result, rows[2])) <= permitted
    assert math.isfinite(result.log_probability)


def test_partial_sequences_are_those_of_the_request(transformer):
    """Progress shows the source and the text of the request, although the row that is computed has no text."""
    request, seen = edit_request(1.0, 0.0), []
    (result,) = decode(transformer, VOCABULARY, [request], lambda progress: seen.append(progress.sequences()[0]))
    given = ~request.sequence.blanks
    for ids in seen:
        np.testing.assert_array_equal(ids[given], request.sequence.ids[given])
    assert [int((ids == VOCABULARY.pad).sum()) for ids in seen] == list(range(23, -1, -1))
    np.testing.assert_array_equal(seen[-1], result.ids)


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({"guidance": 2.0}, 0, "guidance needs the sequence without its text as well"),
        ({"image_guidance": 2.0}, 0, "image_guidance needs the sequences without its text and with neither"),
        ({"image_guidance": 2.0}, 1, "image_guidance needs the sequences without its text and with neither"),
        ({}, 3, "a request has at most two unconditional sequences, got 3"),
    ],
)
def test_decode_raises_value_error_for_a_chain_of_another_length(transformer, settings, rows, message):
    neither, alone, full = edit_chain()
    unconditional = (neither, neither, alone)[3 - rows :]
    request = request_for(full, seed=1, sampling=Sampling(**settings), unconditional=unconditional)
    with pytest.raises(ValueError, match=message):
        decode(transformer, VOCABULARY, [request])
