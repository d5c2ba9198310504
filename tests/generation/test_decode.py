"""The decoding loop: a batch gives what each sequence gives alone, and what full forwards give."""

import numpy as np
import pytest
import torch

from cogview.generation.decode import decode
from cogview.generation.requests import DecodingStopped
from cogview.generation.sampling import filter_logits, keyed_gumbel, noise_keys
from cogview.kernels.attention import attention_bias
from cogview.kernels.dispatch import select_backend
from cogview.modeling.config import GREEDY, Sampling
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.vocabulary import TokenKind
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
    text_ids_of,
    upscale_sequence,
)


def decode_without_cache(transformer, one):
    """Decode a request by full forwards; return the ids, and the log probability of each sampled id by its index."""
    sequence, ids, log_p = one.sequence, torch.from_numpy(one.sequence.ids.copy()), {}
    positions = torch.from_numpy(sequence.positions)
    for index in np.flatnonzero(sequence.blanks).tolist():
        kind = TokenKind(sequence.kinds[index])
        candidates = VOCABULARY.permitted(kind)
        with torch.no_grad():
            all_logits = transformer(ids[None, :index], positions[None, :index])[0, -1]
        if kind == TokenKind.TEXT and sequence.stop is not None:
            candidates = range(candidates.start, VOCABULARY.size)
            commands = torch.arange(VOCABULARY.commands.start, VOCABULARY.size)
            all_logits[commands[commands != sequence.stop]] = -torch.inf
        logits = all_logits[candidates.start : candidates.stop]
        span = next(span for span in sequence.spans.values() if span.start <= index < span.stop)
        key = [torch.tensor([value]) for value in (one.seed, one.image, index - span.start)]
        scores = filter_logits(logits[None], one.sampling) + keyed_gumbel(noise_keys(*key), candidates)
        chosen = int(scores.argmax())
        ids[index] = candidates[chosen]
        log_p[index] = logits.double().log_softmax(dim=-1)[chosen].item()
        if candidates[chosen] == sequence.stop:
            break
    return ids.tolist(), log_p


@pytest.mark.slow
@pytest.mark.parametrize("int8_cache", [False, True])
def test_decode_gives_the_same_codes_with_triton_kernels(monkeypatch, int8_cache):
    """The batch prefills padded sequences, shares a prefix of two of them, and decodes single columns."""
    pytest.importorskip("triton")
    transformer = random_transformer(width=64)  # heads of 16, the smallest that the kernels support
    image = np.ma.masked_all(64, dtype=np.int64)
    image[:62] = np.arange(62)
    sequences = [generate_sequence(LONG, image), generate_sequence(LONG, image), generate_sequence(SHORT, image)]
    requests = [request_for(sequence, seed=3, image=index) for index, sequence in enumerate(sequences)]
    decoded = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("COGVIEW_KERNELS", name)
        select_backend.cache_clear()
        decoded.append(
            [result.ids.tolist() for result in decode(transformer, VOCABULARY, requests, int8_cache=int8_cache)]
        )
    select_backend.cache_clear()
    assert decoded[0] == decoded[1]


# A result does not depend on the batch


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(top_k=1), Sampling(top_k=0)])
def test_decode_does_not_depend_on_the_batch_when_prompts_differ_in_length(transformer, sampling):
    requests = [
        request_for(generate_sequence(text), seed=seed, image=image, sampling=sampling)
        for text, seed, image in ((LONG, 7, 0), (SHORT, 7, 1), (LONG[:4], 8, 0))
    ]
    batched = decode(transformer, VOCABULARY, requests)
    for request, result in zip(requests, batched, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [request])
        assert result.ids.tolist() == alone.ids.tolist()
        assert result.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
    assert (
        len({tuple(codes_of(result, request.sequence)) for request, result in zip(requests, batched, strict=True)}) == 3
    )


def test_decode_does_not_depend_on_the_batch_when_tasks_differ(transformer):
    """In the columns of blanks, other sequences have codes, special tokens, padding or blank texts."""
    sequences = [
        generate_sequence(LONG),
        upscale_sequence(SHORT, seed=1),
        upscale_sequence(LONG, seed=2),
        generate_sequence(
            SHORT, image=[5, None, 9, *[None] * 20, *range(30)]
        ),  # known codes among and after the blanks
        caption_sequence(seed=1),
        caption_sequence(seed=2),
        generate_sequence(LONG[:2], image=range(64)),  # no blanks
    ]
    samplings = [SAMPLING, GREEDY, Sampling(top_k=0), SAMPLING, Sampling(top_k=0), GREEDY, SAMPLING]
    requests = [
        request_for(sequence, seed=5, image=number, sampling=sampling)
        for number, (sequence, sampling) in enumerate(zip(sequences, samplings, strict=True))
    ]
    batched = decode(transformer, VOCABULARY, requests)
    for request, result in zip(requests, batched, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [request])
        assert result.ids.tolist() == alone.ids.tolist()
        assert result.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
        ids, log_p = decode_without_cache(transformer, request)
        assert result.ids.tolist() == ids
        assert result.log_probability == pytest.approx(sum(log_p.values()), abs=1e-3)


def test_decode_gives_an_image_of_a_seed_in_any_batch(transformer):
    def images(keys):
        requests = [request_for(generate_sequence(LONG), seed=seed, image=image) for seed, image in keys]
        result = decode(transformer, VOCABULARY, requests)
        return {
            key: codes_of(sequence, request.sequence)
            for key, sequence, request in zip(keys, result, requests, strict=True)
        }

    expected = images([(7, 0), (7, 1), (7, 2), (8, 0), (8, 1)])
    assert images([(7, 2)]) == {(7, 2): expected[7, 2]}
    assert images([(8, 1), (7, 2), (7, 0)]) == {key: expected[key] for key in ((8, 1), (7, 2), (7, 0))}
    assert len({tuple(image) for image in expected.values()}) == 5


# The cache changes nothing


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), SAMPLING])
@pytest.mark.parametrize("sequence", [generate_sequence(LONG), upscale_sequence(LONG)], ids=["generate", "upscale"])
def test_decode_equals_full_forwards_without_a_cache(transformer, sequence, sampling):
    """Greedy decoding is an argmax loop; sampling adds the noise of (seed, image, index of the code, id)."""
    request = request_for(sequence, seed=11, image=2, sampling=sampling)
    (result,) = decode(transformer, VOCABULARY, [request])
    ids, log_p = decode_without_cache(transformer, request)
    assert result.ids.tolist() == ids
    assert result.log_probability == pytest.approx(sum(log_p.values()), abs=1e-3)


def test_decode_is_an_argmax_loop_when_greedy(transformer):
    sequence = generate_sequence(SHORT)
    (result,) = decode(transformer, VOCABULARY, [request_for(sequence, seed=1, sampling=GREEDY)])
    ids = torch.from_numpy(sequence.ids[: sequence.spans["image"].start])
    for _ in range(64):
        with torch.inference_mode():
            ids = torch.cat([ids, transformer(ids[None])[0, -1, :64].argmax()[None]])
    assert result.ids.tolist() == [*ids.tolist(), VOCABULARY.command("[EOI1]")]


def test_decode_log_probability_equals_one_full_forward(transformer):
    """It is that of the codes among all image codes, before temperature and filters."""
    sequence = generate_sequence(LONG)
    (result,) = decode(transformer, VOCABULARY, [request_for(sequence, seed=3)])
    ids, span = torch.from_numpy(result.ids), sequence.spans["image"]
    with torch.inference_mode():
        logits = transformer(ids[None])[0, span.start - 1 : span.stop - 1, :64].double()
    expected = logits.log_softmax(dim=-1).gather(1, ids[span, None]).sum().item()
    assert result.log_probability == pytest.approx(expected, abs=1e-3)
    assert expected < -10


def test_decode_changes_probabilities_little_when_the_cache_is_int8(transformer):
    request = request_for(generate_sequence(LONG), seed=7, sampling=GREEDY)
    exact, quantized = (decode(transformer, VOCABULARY, [request], int8_cache=int8)[0] for int8 in (False, True))
    # The first code is calls from the prompt alone: the same in both unless rounding is wrong.
    first = request.sequence.spans["image"].start
    assert exact.ids[first] == quantized.ids[first]
    assert exact.log_probability != quantized.log_probability
    assert quantized.log_probability == pytest.approx(exact.log_probability, rel=0.1)


# Blanks and given ids


def test_decode_samples_only_ids_of_the_kind_of_a_blank(transformer):
    """The unrestricted argmax of the model would be of another kind."""
    unstopped = layouts(8, caption_stop=False)["caption"].arrange(VOCABULARY, image=np.arange(64), max_text=6)
    sequences = [generate_sequence(LONG), unstopped]
    requests = [request_for(sequence, seed=1, sampling=Sampling(top_k=0)) for sequence in sequences]
    for result, sequence in zip(decode(transformer, VOCABULARY, requests), sequences, strict=True):
        candidates = VOCABULARY.permitted(TokenKind(sequence.kinds[sequence.blanks][0]))
        assert sequence.blanks.sum() == (64 if sequence is sequences[0] else 6)
        assert all(token in candidates for token in result.ids[sequence.blanks])
        assert len(set(result.ids[sequence.blanks].tolist())) > 3
        with torch.inference_mode():
            free_choice = transformer(torch.from_numpy(result.ids)[None])[0].argmax(dim=-1).numpy()[:-1]
        assert not all(token in candidates for token in free_choice[sequence.blanks[1:]])


def test_decode_keeps_given_ids(transformer):
    for sequence in (upscale_sequence(LONG), generate_sequence(SHORT, image=[None, 5, None, *range(50)])):
        before = sequence.ids.copy()
        (result,) = decode(transformer, VOCABULARY, [request_for(sequence, seed=1)])
        assert (result.ids[~sequence.blanks] == sequence.ids[~sequence.blanks]).all()
        assert (result.ids[sequence.blanks] != VOCABULARY.pad).all()
        assert (sequence.ids == before).all()  # the sequence of the request is not changed


def test_decode_depends_on_known_codes(transformer):
    images = [
        decode(transformer, VOCABULARY, [request_for(generate_sequence(SHORT, image=[code] * 8), seed=1)])[0].ids[-57:]
        for code in (0, 1)
    ]
    assert not np.array_equal(*images)


def test_decode_returns_the_ids_when_there_are_no_blanks(transformer):
    sequence = generate_sequence(LONG, image=range(64))
    (result,) = decode(transformer, VOCABULARY, [request_for(sequence, seed=1)])
    assert result.ids.tolist() == sequence.ids.tolist()
    assert result.ids is not sequence.ids
    assert result.log_probability == 0


def test_decode_gives_the_same_codes_when_the_sequence_is_truncated(transformer):
    """Upscaling cuts a window after its last row of codes."""
    sequence = upscale_sequence(LONG)
    end = sequence.spans["image"].stop - 16
    requests = [request_for(sequence.truncate(end), seed=1), request_for(sequence, seed=1)]
    cut, whole = decode(transformer, VOCABULARY, requests)
    assert cut.ids.tolist() == whole.ids[:end].tolist()


def test_decode_keys_noise_by_noise_positions(transformer):
    """Windows of one image use the position of a code in the whole image."""
    sequence = generate_sequence(SHORT)
    default = np.zeros(len(sequence), dtype=np.int64)
    default[sequence.spans["image"]] = np.arange(64)
    first, same, other = decode(
        transformer,
        VOCABULARY,
        [
            request_for(sequence, seed=1),
            request_for(sequence, seed=1, noise_positions=default),
            request_for(sequence, seed=1, noise_positions=default + 64),
        ],
    )
    assert first.ids.tolist() == same.ids.tolist()
    assert first.ids.tolist() != other.ids.tolist()


def test_decode_works_in_bfloat16(transformer):
    model = Transformer(transformer.config).to(torch.bfloat16).eval()
    (result,) = decode(model, VOCABULARY, [request_for(generate_sequence(LONG), seed=1)])
    assert np.isfinite(result.log_probability)


def test_decode_raises_value_error_without_requests(transformer):
    with pytest.raises(ValueError, match="a batch needs at least one"):
        decode(transformer, VOCABULARY, [])


# Callbacks


def test_decode_calls_back_after_every_column(transformer):
    calls = []
    sequence = generate_sequence(SHORT, image=[1] * 60)
    decode(
        transformer,
        VOCABULARY,
        [request_for(sequence, seed=1)],
        lambda progress: calls.append((progress.done, progress.total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("speculative", [1, 8])
def test_decode_callback_sees_decoded_ids_and_no_others(transformer, speculative):
    request = request_for(generate_sequence(SHORT), seed=5)
    (result,) = decode(transformer, VOCABULARY, [request], speculative=1)
    start, seen = request.sequence.spans["image"].start, []

    def check(progress):
        seen.append(progress.done)
        assert progress.total == 64
        (ids,) = progress.sequences()
        assert ids.tolist()[: start + progress.done] == result.ids.tolist()[: start + progress.done]
        assert (ids[start + progress.done : start + 64] == VOCABULARY.pad).all()

    decode(transformer, VOCABULARY, [request], check, speculative=speculative)
    assert seen == sorted(set(seen))
    assert seen[-1] == 64


@pytest.mark.parametrize("speculative", [1, 8])
def test_decode_raises_decoding_stopped_when_the_callback_returns_false(transformer, speculative):
    with pytest.raises(DecodingStopped):
        decode(
            transformer,
            VOCABULARY,
            [request_for(generate_sequence(SHORT), seed=5)],
            lambda progress: progress.done < 20,
            speculative=speculative,
        )


# Texts that end


def test_decode_pads_texts_after_the_stop_token(stopping_transformer):
    requests = [
        request_for(caption_sequence(seed, max_text=8), seed=seed, sampling=Sampling(temperature=2.0, top_k=0))
        for seed in range(12)
    ]
    stop = VOCABULARY.command("[SEP]")
    lengths = []
    for request, result in zip(requests, decode(stopping_transformer, VOCABULARY, requests), strict=True):
        text = text_ids_of(result, request.sequence)
        lengths.append(text.index(stop) if stop in text else len(text))
        assert all(token in VOCABULARY.text for token in text[: lengths[-1]])
        assert text[lengths[-1] + 1 :] == [VOCABULARY.pad] * (7 - lengths[-1])
        ids, log_p = decode_without_cache(stopping_transformer, request)
        assert result.ids.tolist() == ids
        assert result.log_probability == pytest.approx(sum(log_p.values()), abs=1e-3)
    assert len(set(lengths)) > 2


def test_decode_ends_early_when_all_texts_have_stopped(stopping_transformer):
    with torch.no_grad():
        stopping_transformer.embedding.weight[VOCABULARY.command("[SEP]")] *= 40
    seen = []
    sequences = [caption_sequence(seed, max_text=20) for seed in range(3)]
    requests = [request_for(sequence, seed=0, sampling=Sampling(temperature=3.0, top_k=0)) for sequence in sequences]
    result = decode(
        stopping_transformer, VOCABULARY, requests, lambda progress: seen.append((progress.done, progress.total))
    )
    longest = max(
        sum(token != VOCABULARY.pad for token in text_ids_of(*pair)) for pair in zip(result, sequences, strict=True)
    )
    assert seen[-1] == (longest, 20)
    assert longest < 20


# Guidance and text attention


def guided_request(scale, seed=4):
    sequence, unconditional = generate_sequence(LONG, image=[3] * 40), generate_sequence([], image=[3] * 40)
    return request_for(sequence, seed=seed, sampling=Sampling(top_k=0, guidance=scale), unconditional=(unconditional,))


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_decode_combines_conditional_and_unconditional_logits_when_guided(transformer, scale):
    request = guided_request(scale)
    ids, without = (torch.from_numpy(sequence.ids.copy()) for sequence in (request.sequence, *request.unconditional))
    apart = len(ids) - len(without)
    log_p = 0.0
    for index in np.flatnonzero(request.sequence.blanks).tolist():
        with torch.inference_mode():
            c = transformer(ids[None, :index])[0, -1, :64]
            u = transformer(without[None, : index - apart])[0, -1, :64]
        key = [torch.tensor([value]) for value in (request.seed, 0, index - request.sequence.spans["image"].start)]
        chosen = int((u + scale * (c - u) + keyed_gumbel(noise_keys(*key), range(64))).argmax())
        ids[index] = without[index - apart] = chosen
        log_p += c.double().log_softmax(dim=-1)[chosen].item()
    (result,) = decode(transformer, VOCABULARY, [request])
    assert result.ids.tolist() == ids.tolist()
    assert result.log_probability == pytest.approx(log_p, abs=1e-3)


def test_decode_does_not_depend_on_the_batch_when_some_requests_are_guided(transformer):
    requests = [
        guided_request(2.0),
        request_for(upscale_sequence(SHORT), seed=1),
        guided_request(0.5, seed=9),
        request_for(caption_sequence(), seed=2),
        request_for(generate_sequence(LONG), seed=3, sampling=Sampling(text_attention=3.0)),
    ]
    batched = decode(transformer, VOCABULARY, requests)
    for request, result in zip(requests, batched, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [request])
        assert result.ids.tolist() == alone.ids.tolist()
        assert result.log_probability == pytest.approx(alone.log_probability, abs=1e-3)


def test_decode_ignores_the_unconditional_sequence_when_guidance_is_1(transformer):
    plain = request_for(generate_sequence(LONG), seed=4, sampling=Sampling(top_k=0))
    same = request_for(
        generate_sequence(LONG),
        seed=4,
        sampling=Sampling(top_k=0, guidance=1.0),
        unconditional=(generate_sequence([]),),
    )
    first, second = decode(transformer, VOCABULARY, [plain, same])
    assert first.ids.tolist() == second.ids.tolist()


def test_decode_raises_value_error_when_the_unconditional_sequence_does_not_match(transformer):
    guided = Sampling(guidance=2.0)
    with pytest.raises(ValueError, match="guidance needs the sequence without its text as well"):
        decode(transformer, VOCABULARY, [request_for(generate_sequence(LONG), seed=1, sampling=guided)])
    other = generate_sequence([], image=[1] * 5)
    with pytest.raises(ValueError, match="must end in the same blanks"):
        decode(
            transformer,
            VOCABULARY,
            [request_for(generate_sequence(LONG), seed=1, sampling=guided, unconditional=(other,))],
        )


def test_decode_text_attention_equals_repeated_text(transformer):
    """Weight 2 of a text equals attention to two copies of every text token at the same position."""
    sequence = generate_sequence(SHORT, image=[None] * 3 + [0] * 61)
    (weighted,) = decode(
        transformer, VOCABULARY, [request_for(sequence, seed=1, sampling=Sampling(top_k=1, text_attention=2.0))]
    )
    # Full forwards with a bias set by hand; the attention itself is tested with the kernels.
    ids = torch.from_numpy(sequence.ids.copy())
    for index in np.flatnonzero(sequence.blanks).tolist():
        bias = torch.zeros(1, index)
        bias[0, 1] = np.log(2.0)  # after [ROI1]: the only text token
        with torch.inference_mode():
            bias = attention_bias(bias, torch.arange(index)[None])
            hidden = transformer.hidden(ids[None, :index], bias_B1TS=bias)[0, -1]
            ids[index] = int(transformer.head(hidden, range(64)).argmax())
    assert weighted.ids.tolist() == ids.tolist()
