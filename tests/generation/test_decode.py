"""The decoding loop: rows of any length and task in one batch give what each gives alone, and what no cache gives."""

# T places of a row, V ids to choose from

import numpy as np
import pytest
import torch

from cogview.generation.beam_search import beam_search
from cogview.generation.decode import decode
from cogview.generation.decoding_state import DecodingState
from cogview.generation.requests import DecodingRequest, DecodingStopped
from cogview.generation.sampling import filter_logits, keyed_gumbel, noise_keys
from cogview.generation.scoring import score
from cogview.generation.speculative import uses_cuda_graphs
from cogview.kernels.attention import attention_bias
from cogview.kernels.dispatch import select_backend
from cogview.modeling.config import GREEDY, Sampling, TransformerConfig
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import pad_left
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.vocabulary import TokenKind, Vocabulary

VOCABULARY = Vocabulary(num_image_codes=64, num_text_pieces=37)
TABLE = layouts(8)
SAMPLING = Sampling(temperature=1.2, top_k=20, top_p=0.95)
SHORT, LONG = [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return lively(width=32)


def lively(width: int) -> Transformer:
    """Weights well above those of a fresh model, so that a wrong context draws other ids.

    The embedding is smaller: tied to the output, it would have the model repeat the last id.
    """
    generator = torch.Generator().manual_seed(0)
    config = TransformerConfig(
        num_layers=2, width=width, num_heads=4, vocabulary_size=VOCABULARY.padded_size, max_positions=96
    )
    transformer = Transformer(config).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * noise if parameter.dim() == 2 else parameter + 0.1 * noise)
        transformer.embedding.weight.mul_(0.5)
    return transformer


def draw_row(text, image=None):
    return TABLE["generate"].arrange(VOCABULARY, text=text, **({} if image is None else {"image": image}))


def window_row(text, seed=0):
    """A window of upscaling: its first lines known, and single codes scattered over the rest."""
    generator = np.random.default_rng(seed)
    known = generator.random(64) < 0.3
    known[:16] = True
    image = np.ma.masked_array(generator.integers(0, 64, 64), mask=~known)
    return TABLE["upscale"].arrange(VOCABULARY, text=text, small=generator.integers(0, 64, 16), image=image)


def caption_row(seed=0, max_text=6):
    image = np.random.default_rng(seed).integers(0, 64, 64)
    return TABLE["caption"].arrange(VOCABULARY, image=image, max_text=max_text)


def job_of(row, seed, image=0, sampling=SAMPLING, **rest):
    return DecodingRequest(sequence=row, seed=seed, image=image, sampling=sampling, **rest)


def image_of(filled, row):
    return filled.ids[row.spans["image"]].tolist()


def fill_without_cache(transformer, one):
    """One row by full forwards, a place at a time: the ids, and the log p of each drawn one among the permitted."""
    row, ids, log_p = one.sequence, torch.from_numpy(one.sequence.ids.copy()), {}
    positions = torch.from_numpy(row.positions)
    for place in np.flatnonzero(row.blanks).tolist():
        kind = TokenKind(row.kinds[place])
        permitted = VOCABULARY.permitted(kind)
        with torch.no_grad():
            all_logits = transformer(ids[None, :place], positions[None, :place])[0, -1]
        if kind == TokenKind.TEXT and row.stop is not None:
            permitted = range(permitted.start, VOCABULARY.size)
            commands = torch.arange(VOCABULARY.commands.start, VOCABULARY.size)
            all_logits[commands[commands != row.stop]] = -torch.inf
        logits = all_logits[permitted.start : permitted.stop]
        span = next(span for span in row.spans.values() if span.start <= place < span.stop)
        key = [torch.tensor([value]) for value in (one.seed, one.image, place - span.start)]
        scores = filter_logits(logits[None], one.sampling) + keyed_gumbel(noise_keys(*key), permitted)
        chosen = int(scores.argmax())
        ids[place] = permitted[chosen]
        log_p[place] = logits.double().log_softmax(dim=-1)[chosen].item()
        if permitted[chosen] == row.stop:
            break
    return ids.tolist(), log_p


# --- kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8_cache", [False, True])
def test_triton_kernels_draw_the_same_codes(monkeypatch, int8_cache):
    """Through the prefill of padded rows, a beginning that two of them share, and single steps."""
    pytest.importorskip("triton")
    transformer = lively(width=64)  # heads of 16, the smallest that the kernels are for
    image = np.ma.masked_all(64, dtype=np.int64)
    image[:62] = np.arange(62)
    rows = [draw_row(LONG, image), draw_row(LONG, image), draw_row(SHORT, image)]
    jobs = [job_of(row, seed=3, image=index) for index, row in enumerate(rows)]
    drawn = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("COGVIEW_KERNELS", name)
        select_backend.cache_clear()
        drawn.append([filled.ids.tolist() for filled in decode(transformer, VOCABULARY, jobs, int8_cache=int8_cache)])
    select_backend.cache_clear()
    assert drawn[0] == drawn[1]


# --- a row is what it is alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(top_k=1), Sampling(top_k=0)])
def test_prompts_of_different_lengths_in_one_batch(transformer, sampling):
    jobs = [
        job_of(row=draw_row(text), seed=seed, image=image, sampling=sampling)
        for text, seed, image in ((LONG, 7, 0), (SHORT, 7, 1), (LONG[:4], 8, 0))
    ]
    together = decode(transformer, VOCABULARY, jobs)
    for job, filled in zip(jobs, together, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [job])
        assert filled.ids.tolist() == alone.ids.tolist()
        assert filled.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
    assert len({tuple(image_of(filled, job.sequence)) for job, filled in zip(jobs, together, strict=True)}) == 3


def test_different_tasks_in_one_batch(transformer):
    """Blanks of one row stand beside codes, commands and padding of another, and beside blanks for text."""
    rows = [
        draw_row(LONG),
        window_row(SHORT, seed=1),
        window_row(LONG, seed=2),
        draw_row(SHORT, image=[5, None, 9, *[None] * 20, *range(30)]),  # known codes among and behind the blanks
        caption_row(seed=1),
        caption_row(seed=2),
        draw_row(LONG[:2], image=range(64)),  # nothing to do
    ]
    ways = [SAMPLING, GREEDY, Sampling(top_k=0), SAMPLING, Sampling(top_k=0), GREEDY, SAMPLING]
    jobs = [
        job_of(row=row, seed=5, image=number, sampling=way)
        for number, (row, way) in enumerate(zip(rows, ways, strict=True))
    ]
    together = decode(transformer, VOCABULARY, jobs)
    for job, filled in zip(jobs, together, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [job])
        assert filled.ids.tolist() == alone.ids.tolist()
        assert filled.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
        ids, log_p = fill_without_cache(transformer, job)
        assert filled.ids.tolist() == ids
        assert filled.log_probability == pytest.approx(sum(log_p.values()), abs=1e-3)


def test_picture_of_a_seed_is_the_same_in_any_batch(transformer):
    def pictures(keys):
        jobs = [job_of(row=draw_row(LONG), seed=seed, image=image) for seed, image in keys]
        filled = decode(transformer, VOCABULARY, jobs)
        return {key: image_of(row, job.sequence) for key, row, job in zip(keys, filled, jobs, strict=True)}

    all_of_them = pictures([(7, 0), (7, 1), (7, 2), (8, 0), (8, 1)])
    assert pictures([(7, 2)]) == {(7, 2): all_of_them[7, 2]}
    assert pictures([(8, 1), (7, 2), (7, 0)]) == {key: all_of_them[key] for key in ((8, 1), (7, 2), (7, 0))}
    assert len({tuple(picture) for picture in all_of_them.values()}) == 5


# --- the cache changes nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), SAMPLING])
@pytest.mark.parametrize("row", [draw_row(LONG), window_row(LONG)], ids=["generate", "upscale"])
def test_equals_full_forwards_without_a_cache(transformer, row, sampling):
    """Greedy decoding is an argmax loop; sampling adds the noise of (seed, image, place of the code, id)."""
    job = job_of(row=row, seed=11, image=2, sampling=sampling)
    (filled,) = decode(transformer, VOCABULARY, [job])
    ids, log_p = fill_without_cache(transformer, job)
    assert filled.ids.tolist() == ids
    assert filled.log_probability == pytest.approx(sum(log_p.values()), abs=1e-3)


def test_greedy_is_an_argmax_loop(transformer):
    row = draw_row(SHORT)
    (filled,) = decode(transformer, VOCABULARY, [job_of(row=row, seed=1, sampling=GREEDY)])
    ids = torch.from_numpy(row.ids[: row.spans["image"].start])
    for _ in range(64):
        with torch.inference_mode():
            ids = torch.cat([ids, transformer(ids[None])[0, -1, :64].argmax()[None]])
    assert filled.ids.tolist() == [*ids.tolist(), VOCABULARY.command("[EOI1]")]


def test_log_probability_is_that_of_one_full_forward(transformer):
    """Of the codes among image ids, before temperature and filters."""
    row = draw_row(LONG)
    (filled,) = decode(transformer, VOCABULARY, [job_of(row=row, seed=3)])
    ids, span = torch.from_numpy(filled.ids), row.spans["image"]
    with torch.inference_mode():
        logits = transformer(ids[None])[0, span.start - 1 : span.stop - 1, :64].double()
    expected = logits.log_softmax(dim=-1).gather(1, ids[span, None]).sum().item()
    assert filled.log_probability == pytest.approx(expected, abs=1e-3)
    assert expected < -10


# --- rows that begin alike ----------------------------------------------------------------------------------------


@pytest.fixture
def forwards(transformer, monkeypatch):
    """The shapes of what goes through the layers."""
    shapes, hidden = [], transformer.hidden
    monkeypatch.setattr(
        transformer,
        "hidden",
        lambda ids, *rest, **named: (shapes.append(tuple(ids.shape)), hidden(ids, *rest, **named))[1],
    )
    return shapes


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shared_from", [0.0, 2.0])  # one copy of a beginning, or one for each row
def test_a_beginning_is_read_once(transformer, forwards, monkeypatch, shared_from, int8):
    monkeypatch.setattr("cogview.generation.decoding_state.MIN_SHARED_FRACTION", shared_from)
    jobs = [
        job_of(row=caption_row(seed=seed), seed=7, image=image, sampling=Sampling(top_k=0))
        for seed, image in ((1, 0), (2, 0), (1, 1), (1, 2), (2, 1))
    ]
    together = decode(transformer, VOCABULARY, jobs, int8_cache=int8)
    assert forwards[:2] == [(2, 68), (5, 1)]  # two images, of which five captions are written
    for job, filled in zip(jobs, together, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [job], int8_cache=int8)
        assert filled.ids.tolist() == alone.ids.tolist()
        assert filled.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
    assert len({tuple(filled.ids.tolist()) for filled in together}) == 5


def test_one_copy_of_a_beginning_takes_less(transformer, monkeypatch):
    batch = pad_left([caption_row(seed=1).truncate(73)] * 8, VOCABULARY.pad)
    sizes = []
    for shared_from in (0.0, 2.0):
        monkeypatch.setattr("cogview.generation.decoding_state.MIN_SHARED_FRACTION", shared_from)
        sizes.append(DecodingState(transformer, batch, None).cache.num_bytes)
    assert sizes[0] * 8 * 73 == sizes[1] * (68 + 8 * (73 - 68))


def test_beginnings_that_only_look_alike_are_not_shared(transformer, forwards):
    """The same ids, but text that counts for more."""
    row = draw_row(LONG)
    jobs = [job_of(row=row, seed=7, sampling=Sampling(top_k=5, text_attention=weight)) for weight in (1.0, 4.0)]
    together = decode(transformer, VOCABULARY, jobs, speculative=1)
    assert forwards[0][0] == 2
    for job, filled in zip(jobs, together, strict=True):
        assert filled.ids.tolist() == decode(transformer, VOCABULARY, [job], speculative=1)[0].ids.tolist()


# --- keys and values in int8 --------------------------------------------------------------------------------------


def test_rounded_keys_and_values_hardly_change_what_is_probable(transformer):
    job = job_of(row=draw_row(LONG), seed=7, sampling=GREEDY)
    exact, rounded = (decode(transformer, VOCABULARY, [job], int8_cache=int8)[0] for int8 in (False, True))
    # The first code is told from the prompt alone: the same in both unless rounding is wrong.
    first = job.sequence.spans["image"].start
    assert exact.ids[first] == rounded.ids[first]
    assert exact.log_probability != rounded.log_probability
    assert rounded.log_probability == pytest.approx(exact.log_probability, rel=0.1)


# --- guesses change nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pays", [0.0, 2.0])  # go on guessing though it does not pay, or give it up
@pytest.mark.parametrize("most", [2, 3, 8, 64])
def test_parallel_drawing_is_drawing_one_by_one(transformer, monkeypatch, most, pays):
    monkeypatch.setattr("cogview.generation.speculative.MIN_SPEEDUP", pays)
    rows = [
        draw_row(LONG),
        draw_row(SHORT),
        window_row(SHORT, seed=1),
        draw_row(SHORT, image=[5, None, 9, *[None] * 20, *range(30)]),
        draw_row(LONG[:2], image=range(64)),  # nothing to do
        window_row(LONG, seed=3).truncate(
            len(window_row(LONG)) - 1 - 24
        ),  # five lines: others have text beside its codes
    ]
    ways = [SAMPLING, GREEDY, Sampling(top_k=0), Sampling(text_attention=3.0), SAMPLING, SAMPLING]
    jobs = [
        job_of(row=row, seed=5, image=number, sampling=way)
        for number, (row, way) in enumerate(zip(rows, ways, strict=True))
    ]
    jobs.append(job_of(row=draw_row(LONG), seed=1, sampling=Sampling(guidance=2.0), unconditional=draw_row([])))
    one_by_one = decode(transformer, VOCABULARY, jobs, speculative=1)
    together = decode(transformer, VOCABULARY, jobs, speculative=most)
    for job, expected, filled in zip(jobs, one_by_one, together, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [job], speculative=most)
        assert filled.ids.tolist() == alone.ids.tolist() == expected.ids.tolist()
        assert filled.log_probability == pytest.approx(expected.log_probability, abs=1e-3)
        assert alone.log_probability == pytest.approx(expected.log_probability, abs=1e-3)


def test_codes_that_repeat_are_guessed_right():
    """The first guess for a place is the last code: a picture of one colour takes few forwards."""
    config = TransformerConfig(num_layers=1, width=32, num_heads=4, vocabulary_size=VOCABULARY.padded_size)
    echo = Transformer(config).eval()
    with torch.no_grad():  # layers that add nothing, and ids that are likest to themselves
        echo.embedding.weight.copy_(echo.embedding.weight.sign())
        for parameter in (echo.positions.weight, *echo.layers.parameters()):
            parameter.zero_()
    job, count = job_of(row=draw_row(SHORT, image=[9]), seed=1, sampling=GREEDY), []
    hidden = echo.hidden
    echo.hidden = lambda *rest, **named: (count.append(1), hidden(*rest, **named))[1]
    (expected,) = decode(echo, VOCABULARY, [job], speculative=1)
    assert set(image_of(expected, job.sequence)) == {9}
    assert len(count) == 63
    count.clear()
    (filled,) = decode(echo, VOCABULARY, [job], speculative=64)
    assert filled.ids.tolist() == expected.ids.tolist()
    assert len(count) <= 4  # the prompt; 16 codes, 32, and what is left


@pytest.mark.parametrize("parallel", [1, 8])
def test_who_watches_sees_what_is_drawn_and_nothing_else(transformer, parallel):
    job = job_of(row=draw_row(SHORT), seed=5)
    (filled,) = decode(transformer, VOCABULARY, [job], speculative=1)
    start, seen = job.sequence.spans["image"].start, []

    def look(moment):
        seen.append(moment.done)
        assert moment.total == 64
        (ids,) = moment.sequences()
        assert ids.tolist()[: start + moment.done] == filled.ids.tolist()[: start + moment.done]
        assert (ids[start + moment.done : start + 64] == VOCABULARY.pad).all()

    decode(transformer, VOCABULARY, [job], look, speculative=parallel)
    assert seen == sorted(set(seen))
    assert seen[-1] == 64


@pytest.mark.parametrize("parallel", [1, 8])
def test_who_watches_may_stop(transformer, parallel):
    with pytest.raises(DecodingStopped):
        decode(
            transformer,
            VOCABULARY,
            [job_of(row=draw_row(SHORT), seed=5)],
            lambda moment: moment.done < 20,
            speculative=parallel,
        )


def test_texts_are_not_guessed(transformer, forwards):
    decode(transformer, VOCABULARY, [job_of(row=caption_row(), seed=1)], speculative=8)
    assert {length for _, length in forwards} == {1, 68}


@pytest.mark.parametrize("parallel", [1, 8])
def test_steps_to_be_captured_are_the_same_steps(transformer, monkeypatch, parallel):
    """On CUDA each is replayed as a graph; here they are run as they are, from the same buffers."""
    monkeypatch.setattr("cogview.generation.speculative.BUCKET", 32)
    jobs = [
        job_of(row=draw_row(LONG), seed=5, sampling=Sampling(guidance=2.0, top_k=9), unconditional=draw_row([])),
        job_of(row=draw_row(SHORT, image=[5, None, 9, *[None] * 20, *range(30)]), seed=6),
        job_of(row=window_row(SHORT, seed=1), seed=7, sampling=Sampling(text_attention=3.0)),
    ]
    monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", "0")
    expected = decode(transformer, VOCABULARY, jobs, speculative=1)
    monkeypatch.setenv("COGVIEW_CUDA_GRAPHS", "1")
    found = decode(transformer, VOCABULARY, jobs, speculative=parallel)
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


# --- blanks and what is given -------------------------------------------------------------------------------------


def test_blanks_take_only_the_ids_of_their_kind(transformer):
    """Even if the model would rather say something else."""
    endless = layouts(8, caption_stop=False)["caption"].arrange(VOCABULARY, image=np.arange(64), max_text=6)
    rows = [draw_row(LONG), endless]
    jobs = [job_of(row=row, seed=1, sampling=Sampling(top_k=0)) for row in rows]
    for filled, row in zip(decode(transformer, VOCABULARY, jobs), rows, strict=True):
        permitted = VOCABULARY.permitted(TokenKind(row.kinds[row.blanks][0]))
        assert row.blanks.sum() == (64 if row is rows[0] else 6)
        assert all(token in permitted for token in filled.ids[row.blanks])
        assert len(set(filled.ids[row.blanks].tolist())) > 3
        with torch.inference_mode():
            free_choice = transformer(torch.from_numpy(filled.ids)[None])[0].argmax(dim=-1).numpy()[:-1]
        assert not all(token in permitted for token in free_choice[row.blanks[1:]])


def test_what_is_given_is_kept(transformer):
    for row in (window_row(LONG), draw_row(SHORT, image=[None, 5, None, *range(50)])):
        before = row.ids.copy()
        (filled,) = decode(transformer, VOCABULARY, [job_of(row=row, seed=1)])
        assert (filled.ids[~row.blanks] == row.ids[~row.blanks]).all()
        assert (filled.ids[row.blanks] != VOCABULARY.pad).all()
        assert (row.ids == before).all()  # the job's own row stays as it was


def test_known_codes_steer_what_follows(transformer):
    pictures = [
        decode(transformer, VOCABULARY, [job_of(row=draw_row(SHORT, image=[code] * 8), seed=1)])[0].ids[-57:]
        for code in (0, 1)
    ]
    assert not np.array_equal(*pictures)


def test_row_without_blanks_comes_back_unchanged(transformer):
    row = draw_row(LONG, image=range(64))
    (filled,) = decode(transformer, VOCABULARY, [job_of(row=row, seed=1)])
    assert filled.ids.tolist() == row.ids.tolist()
    assert filled.ids is not row.ids
    assert filled.log_probability == 0


def test_row_may_end_at_its_last_blank(transformer):
    """Upscaling cuts a window at its last line."""
    row = window_row(LONG)
    end = row.spans["image"].stop - 16
    jobs = [job_of(row=row.truncate(end), seed=1), job_of(row=row, seed=1)]
    cut, whole = decode(transformer, VOCABULARY, jobs)
    assert cut.ids.tolist() == whole.ids[:end].tolist()


def test_every_column_is_told(transformer):
    told = []
    row = draw_row(SHORT, image=[1] * 60)
    decode(transformer, VOCABULARY, [job_of(row=row, seed=1)], lambda moment: told.append((moment.done, moment.total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bfloat16_model_draws(transformer):
    model = Transformer(transformer.config).to(torch.bfloat16).eval()
    (filled,) = decode(model, VOCABULARY, [job_of(row=draw_row(LONG), seed=1)])
    assert np.isfinite(filled.log_probability)


def test_no_rows_is_an_error(transformer):
    with pytest.raises(ValueError, match="a batch needs at least one row"):
        decode(transformer, VOCABULARY, [])


# --- texts that end -----------------------------------------------------------------------------------------------


@pytest.fixture
def talker(transformer) -> Transformer:
    """Ends a text as readily as it goes on: [SEP] has the embedding of two pieces together."""
    talker = Transformer(transformer.config).eval()
    talker.load_state_dict(transformer.state_dict())
    with torch.no_grad():
        pieces = talker.embedding.weight[VOCABULARY.text.start : VOCABULARY.text.start + 2]
        talker.embedding.weight[VOCABULARY.command("[SEP]")] = pieces.sum(dim=0)
    return talker


def text_of(filled, row):
    return filled.ids[row.spans["text"]].tolist()


def test_a_text_ends_at_its_stop(talker):
    jobs = [
        job_of(row=caption_row(seed, max_text=8), seed=seed, sampling=Sampling(temperature=2.0, top_k=0))
        for seed in range(12)
    ]
    stop = VOCABULARY.command("[SEP]")
    lengths = []
    for job, filled in zip(jobs, decode(talker, VOCABULARY, jobs), strict=True):
        text = text_of(filled, job.sequence)
        lengths.append(text.index(stop) if stop in text else len(text))
        assert all(token in VOCABULARY.text for token in text[: lengths[-1]])
        assert text[lengths[-1] + 1 :] == [VOCABULARY.pad] * (7 - lengths[-1])
        ids, log_p = fill_without_cache(talker, job)
        assert filled.ids.tolist() == ids
        assert filled.log_probability == pytest.approx(sum(log_p.values()), abs=1e-3)
    assert len(set(lengths)) > 2


def test_a_batch_of_texts_is_left_when_all_are_over(talker):
    with torch.no_grad():
        talker.embedding.weight[VOCABULARY.command("[SEP]")] *= 40
    seen = []
    rows = [caption_row(seed, max_text=20) for seed in range(3)]
    jobs = [job_of(row=row, seed=0, sampling=Sampling(temperature=3.0, top_k=0)) for row in rows]
    filled = decode(talker, VOCABULARY, jobs, lambda moment: seen.append((moment.done, moment.total)))
    longest = max(sum(token != VOCABULARY.pad for token in text_of(*pair)) for pair in zip(filled, rows, strict=True))
    assert seen[-1] == (longest, 20)
    assert longest < 20


# --- guidance and the weight of the text --------------------------------------------------------------------------


def guided_job(scale, seed=4):
    row, unguided = draw_row(LONG, image=[3] * 40), draw_row([], image=[3] * 40)
    return job_of(row=row, seed=seed, sampling=Sampling(top_k=0, guidance=scale), unconditional=unguided)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_draws_from_the_logits_with_and_without_text(transformer, scale):
    job = guided_job(scale)
    ids, without = (torch.from_numpy(row.ids.copy()) for row in (job.sequence, job.unconditional))
    apart = len(ids) - len(without)
    log_p = 0.0
    for place in np.flatnonzero(job.sequence.blanks).tolist():
        with torch.inference_mode():
            c = transformer(ids[None, :place])[0, -1, :64]
            u = transformer(without[None, : place - apart])[0, -1, :64]
        key = [torch.tensor([value]) for value in (job.seed, 0, place - job.sequence.spans["image"].start)]
        chosen = int((u + scale * (c - u) + keyed_gumbel(noise_keys(*key), range(64))).argmax())
        ids[place] = without[place - apart] = chosen
        log_p += c.double().log_softmax(dim=-1)[chosen].item()
    (filled,) = decode(transformer, VOCABULARY, [job])
    assert filled.ids.tolist() == ids.tolist()
    assert filled.log_probability == pytest.approx(log_p, abs=1e-3)


def test_guided_rows_beside_others(transformer):
    jobs = [
        guided_job(2.0),
        job_of(row=window_row(SHORT), seed=1),
        guided_job(0.5, seed=9),
        job_of(row=caption_row(), seed=2),
        job_of(row=draw_row(LONG), seed=3, sampling=Sampling(text_attention=3.0)),
    ]
    together = decode(transformer, VOCABULARY, jobs)
    for job, filled in zip(jobs, together, strict=True):
        (alone,) = decode(transformer, VOCABULARY, [job])
        assert filled.ids.tolist() == alone.ids.tolist()
        assert filled.log_probability == pytest.approx(alone.log_probability, abs=1e-3)


def test_guidance_of_nothing_is_the_model_itself(transformer):
    plain = job_of(row=draw_row(LONG), seed=4, sampling=Sampling(top_k=0))
    same = job_of(row=draw_row(LONG), seed=4, sampling=Sampling(top_k=0, guidance=1.0), unconditional=draw_row([]))
    first, second = decode(transformer, VOCABULARY, [plain, same])
    assert first.ids.tolist() == second.ids.tolist()


def test_guidance_needs_the_row_without_its_text(transformer):
    guided = Sampling(guidance=2.0)
    with pytest.raises(ValueError, match="guidance needs the sequence without its text as well"):
        decode(transformer, VOCABULARY, [job_of(row=draw_row(LONG), seed=1, sampling=guided)])
    other = draw_row([], image=[1] * 5)
    with pytest.raises(ValueError, match="must end in the same blanks"):
        decode(transformer, VOCABULARY, [job_of(row=draw_row(LONG), seed=1, sampling=guided, unconditional=other)])


def test_text_attention_is_text_said_again(transformer):
    """Weight 2 of a text is what attention would see if every piece stood there twice at the same position."""
    row = draw_row(SHORT, image=[None] * 3 + [0] * 61)
    (weighted,) = decode(
        transformer, VOCABULARY, [job_of(row=row, seed=1, sampling=Sampling(top_k=1, text_attention=2.0))]
    )
    # By full forwards with the bias given by hand; the attention itself is tested with the kernels.
    ids = torch.from_numpy(row.ids.copy())
    for place in np.flatnonzero(row.blanks).tolist():
        bias = torch.zeros(1, place)
        bias[0, 1] = np.log(2.0)  # behind [ROI1], the one piece
        with torch.inference_mode():
            bias = attention_bias(bias, torch.arange(place)[None])
            hidden = transformer.hidden(ids[None, :place], bias_B1TS=bias)[0, -1]
            ids[place] = int(transformer.head(hidden, range(64)).argmax())
    assert weighted.ids.tolist() == ids.tolist()


def test_noise_may_be_keyed_by_other_places(transformer):
    """Windows of one picture key it by where a code lies in the whole picture."""
    row = draw_row(SHORT)
    usual = np.zeros(len(row), dtype=np.int64)
    usual[row.spans["image"]] = np.arange(64)
    first, same, other = decode(
        transformer,
        VOCABULARY,
        [
            job_of(row=row, seed=1),
            job_of(row=row, seed=1, noise_positions=usual),
            job_of(row=row, seed=1, noise_positions=usual + 64),
        ],
    )
    assert first.ids.tolist() == same.ids.tolist()
    assert first.ids.tolist() != other.ids.tolist()


# --- search and score ---------------------------------------------------------------------------------------------


def all_texts(model, row, length):
    """Every text of up to ``length`` pieces for a caption row, with its log p: by full forwards."""
    start = row.spans["text"].start
    stop = VOCABULARY.command("[SEP]")
    choices = [*VOCABULARY.text, stop]
    over, going = {}, {(): 0.0}
    for place in range(start, start + length):
        ids = torch.tensor([[*row.ids[:start], *text] for text in going])
        with torch.inference_mode():
            logits = model(ids)[:, place - 1, choices].double()
        longer = {
            (*text, token): total + log_p
            for (text, total), log_ps in zip(going.items(), logits.log_softmax(dim=-1).tolist(), strict=True)
            for token, log_p in zip(choices, log_ps, strict=True)
        }
        over |= {text: total for text, total in longer.items() if text[-1] == stop}
        going = {text: total for text, total in longer.items() if text[-1] != stop}
    return over | going


def test_enough_beams_find_the_most_probable_texts(talker):
    rows = [caption_row(seed, max_text=2) for seed in (1, 2)]
    found = beam_search(talker, VOCABULARY, rows, beams=60)
    for row, texts in zip(rows, found, strict=True):
        truth = sorted(all_texts(talker, row, 2).items(), key=lambda item: -item[1])[:8]
        for one, (text, log_p) in zip(texts, truth, strict=False):
            assert one.log_probability == pytest.approx(log_p, abs=1e-3)
            assert text_of(one, row)[: len(text)] == list(text)
        assert [one.log_probability for one in texts] == sorted((one.log_probability for one in texts), reverse=True)
        assert len({tuple(text_of(one, row)) for one in texts}) == 60


def test_one_beam_is_greedy(talker):
    rows = [caption_row(seed, max_text=7) for seed in range(5)]
    greedy = decode(talker, VOCABULARY, [job_of(row=row, seed=0, sampling=GREEDY) for row in rows])
    for (found,), expected in zip(beam_search(talker, VOCABULARY, rows, beams=1), greedy, strict=True):
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-3)


def test_a_search_of_a_row_alone_is_that_in_a_batch(talker):
    rows = [caption_row(seed, max_text=6) for seed in range(3)]
    for row, together in zip(rows, beam_search(talker, VOCABULARY, rows, beams=5), strict=True):
        (alone,) = beam_search(talker, VOCABULARY, [row], beams=5)
        assert [one.ids.tolist() for one in together] == [one.ids.tolist() for one in alone]


def test_what_cannot_be_searched(transformer):
    with pytest.raises(ValueError, match="end in blank texts of one length"):
        beam_search(transformer, VOCABULARY, [draw_row(SHORT)], beams=2)
    with pytest.raises(ValueError, match="at least one beam, got 0"):
        beam_search(transformer, VOCABULARY, [caption_row()], beams=0)
    endless = layouts(8, caption_stop=False)["caption"].arrange(VOCABULARY, image=np.arange(64), max_text=6)
    with pytest.raises(ValueError, match="the same stop"):
        beam_search(transformer, VOCABULARY, [caption_row(), endless], beams=2)


def test_scores_are_sums_of_log_p_over_the_text(transformer):
    """By hand: full forwards of one row at a time, piece by piece, among text ids and commands."""
    texts = (SHORT, LONG, LONG[:3])
    rows = [
        TABLE["score"].arrange(VOCABULARY, image=np.random.default_rng(n).integers(0, 64, 64), text=text)
        for n, text in enumerate(texts)
    ]
    first = VOCABULARY.text.start
    for row, text, total in zip(rows, texts, score(transformer, VOCABULARY, rows), strict=True):
        start, expected = row.spans["text"].start, 0.0
        for number, piece in enumerate(text):
            with torch.inference_mode():
                logits = transformer(torch.from_numpy(row.ids[None, : start + number]))[0, -1, first:].double()
            expected += logits.log_softmax(dim=-1)[piece].item()
        assert total == pytest.approx(expected, abs=1e-3)
