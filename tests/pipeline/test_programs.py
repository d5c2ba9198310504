"""Decoding programs: what is pending, how they advance, and that a prompt is tokenized and arranged once."""

from dataclasses import replace

import numpy as np
import pytest

from cogview.checkpoints.checkpoint import Model
from cogview.cli.picture_info import repeat_command
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingResult
from cogview.generation.sampling import noise_stream
from cogview.image_io.a1111 import a1111_parameters, parse_a1111
from cogview.modeling.config import GREEDY, Sampling
from cogview.pipeline.cogview import CogView
from cogview.pipeline.programs import ProgramBuilder
from cogview.pipeline.requests import GenerationRequest
from cogview.tokenizers.layouts import Layout
from cogview.tokenizers.text import TextTokenizer
from tests.factories import input_error

PROMPTS = ["狐狸", "一只狐狸在汽车的左边", "蓝色背景上的三只狗"]
GUIDED = Sampling(guidance=3.0)


@pytest.fixture
def calls(monkeypatch):
    """Count the texts that are tokenized and the sequences that are arranged."""
    counts = {"encode": [], "arrange": []}
    encode, arrange = TextTokenizer.encode, Layout.arrange

    def counted_encode(self, text):
        counts["encode"].append(text)
        return encode(self, text)

    def counted_arrange(self, *given, **values):
        counts["arrange"].append(self.name)
        return arrange(self, *given, **values)

    monkeypatch.setattr(TextTokenizer, "encode", counted_encode)
    monkeypatch.setattr(Layout, "arrange", counted_arrange)
    return counts


@pytest.mark.parametrize("batch_size", [None, 2])
def test_generate_tokenizes_and_arranges_prompt_once(tiny_model, calls, batch_size):
    """Validation, memory planning and decoding share one tokenization and one sequence for all images of a prompt."""
    tiny_model.generate(PROMPTS, n=3, seed=7, batch_size=batch_size)
    assert calls == {"encode": PROMPTS, "arrange": ["generate"] * 3}


def test_guided_generate_arranges_two_sequences_of_prompt(tiny_model, calls):
    """With the text and without it."""
    tiny_model.generate(PROMPTS[0], n=3, seed=7, sampling=GUIDED)
    assert calls == {"encode": PROMPTS[:1], "arrange": ["generate"] * 2}


def test_run_tokenizes_prompt_of_consecutive_requests_once(tiny_model, calls):
    """Requests that bring no piece ids, as those of a job."""
    requests = [GenerationRequest(prompt=prompt, seed=7, index=i) for prompt in PROMPTS for i in range(2)]
    sizes = tiny_model.batch_sizes(requests)
    assert calls["encode"] == PROMPTS
    assert sizes == [6]


def test_single_step_program_ends_after_one_result(tiny_model):
    """Its output is the blank image of the sequence."""
    request = GenerationRequest(prompt=PROMPTS[0], seed=7, index=2, sampling=GREEDY)
    program = ProgramBuilder(tiny_model.context).build(request)
    (step,) = program.pending()
    prompt_ids = tiny_model.text_tokenizer.encode(PROMPTS[0])
    assert (step.seed, step.image, step.unconditional) == (7, noise_stream(2, prompt_ids, version=2), ())
    ids = step.sequence.ids.copy()
    ids[step.sequence.spans["image"]] = np.arange(64)
    program.advance([DecodingResult(ids=ids, log_probability=-2.5)])
    assert program.pending() == []
    np.testing.assert_array_equal(program.output, np.arange(64).reshape(8, 8))
    assert program.log_probability == -2.5


def test_upscale_program_advances_by_windows(tiny_model):
    """Nine windows in seven steps; noise is keyed by the index of a code in the large image."""
    codes = np.arange(64).reshape(8, 8)
    request = GenerationRequest(prompt=PROMPTS[0], seed=7, task="upscale", codes=codes, sampling=GUIDED)
    program = ProgramBuilder(tiny_model.context).build(request)
    counts, keys = [], []
    while steps := program.pending():
        counts.append(len(steps))
        results = []
        for step in steps:
            span = step.sequence.spans["image"]
            blanks = step.sequence.blanks[span]
            keys += step.noise_positions[span][blanks].tolist()
            ids = step.sequence.ids.copy()
            ids[span] = np.where(blanks, step.noise_positions[span] - 64, ids[span])
            results.append(DecodingResult(ids=ids, log_probability=-1.0))
            assert [len(row) for row in step.unconditional] == [len(step.sequence) - 2]
        program.advance(results)
    assert counts == [1, 1, 2, 2, 1, 1, 1]
    assert sorted(keys) == list(range(64, 64 + 256))
    np.testing.assert_array_equal(program.output, np.arange(256).reshape(16, 16))
    assert program.log_probability == -9.0


def test_upscale_program_refuses_request_without_codes(tiny_model):
    """A request that was not built by ``upscale``."""
    request = GenerationRequest(prompt=PROMPTS[0], seed=7, task="upscale", sampling=GREEDY)
    with pytest.raises(ValueError, match="a request of the task 'upscale' needs the codes of an image"):
        ProgramBuilder(tiny_model.context).build(request)


# Guidance of edits


def edit_request(mask=None, **sampling):
    """Return an edit of codes 0 to 63."""
    codes = np.arange(64).reshape(8, 8)
    settings = Sampling(**sampling)
    return GenerationRequest(prompt=PROMPTS[0], seed=7, task="edit", codes=codes, mask=mask, sampling=settings)


def given_of(sequence, vocabulary):
    """Return the number of pieces and the codes of the source that a sequence gives; None for no source."""
    source = sequence.ids[sequence.spans["source"]]
    text = sequence.spans["text"]
    known = None if (source == vocabulary.command("[MASK]")).all() else source.tolist()
    return text.stop - text.start, known


@pytest.mark.parametrize(
    "sampling", [{"guidance": 3.0}, {"image_guidance": 2.0}, {"guidance": 5.0, "image_guidance": 2}]
)
def test_guided_edit_arranges_neither_source_and_both(edit_model, sampling):
    program = ProgramBuilder(edit_model.context).build(edit_request(**sampling))
    (step,) = program.pending()
    pieces = len(edit_model.text_tokenizer.encode(PROMPTS[0]))
    rows = [given_of(row, edit_model.vocabulary) for row in (*step.unconditional, step.sequence)]
    assert rows == [(0, None), (0, list(range(64))), (pieces, list(range(64)))]


def test_plain_edit_arranges_one_sequence(edit_model):
    (step,) = ProgramBuilder(edit_model.context).build(edit_request()).pending()
    assert step.unconditional == ()


def test_guided_edit_keeps_codes_outside_the_mask_in_every_row(edit_model):
    """Without the source too, whose codes are [MASK], the result holds them."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:4, 3:] = True
    request = edit_request(mask, image_guidance=2.0, guidance=5.0)
    (step,) = ProgramBuilder(edit_model.context).build(request).pending()
    for row in (*step.unconditional, step.sequence):
        image = row.ids[row.spans["image"]].reshape(8, 8)
        np.testing.assert_array_equal(image[~mask], request.codes[~mask])
        np.testing.assert_array_equal(row.blanks[row.spans["image"]].reshape(8, 8), mask)
    assert [given_of(row, edit_model.vocabulary)[1] for row in step.unconditional] == [None, list(range(64))]
    (image,) = edit_model.run([request])
    np.testing.assert_array_equal(image.codes[~mask], request.codes[~mask])


def test_guided_edits_are_the_same_in_a_mixed_batch(edit_model):
    requests = [
        edit_request(image_guidance=1.5, guidance=4.0),
        GenerationRequest(prompt=PROMPTS[1], seed=7, sampling=GUIDED),
        GenerationRequest(task="caption", seed=7, codes=np.arange(64).reshape(8, 8), sampling=GREEDY),
        edit_request(),
        edit_request(image_guidance=0.0, guidance=0.0),
    ]
    together = list(edit_model.run(requests))
    alone = [next(edit_model.run([request])) for request in requests]
    for image, other in zip(together, alone, strict=True):
        assert getattr(image, "text", None) == getattr(other, "text", None)
        np.testing.assert_array_equal(getattr(image, "codes", 0), getattr(other, "codes", 0))
    guided, plain, neither = (together[index].codes.tolist() for index in (0, 3, 4))
    assert guided != plain != neither != guided


def test_guidance_is_left_out_of_the_settings_of_a_task_without_it(edit_model):
    """A model that recommends guidance captions without it, and generates without guidance by a source."""
    config = replace(edit_model.config, sampling=Sampling(guidance=2.0, image_guidance=1.5))
    scales = {task: config.sampling_of(task) for task in ("generate", "edit", "caption", "vary")}
    found = {task: (sampling.guidance, sampling.image_guidance) for task, sampling in scales.items()}
    assert found == {"generate": (2, 1), "edit": (2, 1.5), "caption": (1, 1), "vary": (1, 1)}


@pytest.mark.parametrize(
    ("changes", "request_changes", "message"),
    [
        ({"source_dropout": 0.0}, {}, "without source dropout, so a source cannot guide it: image_guidance must be 1"),
        ({"caption_dropout": 0.0}, {}, "without caption dropout, so it cannot be guided: image_guidance must be 1"),
        (
            {},
            {"task": "generate", "codes": None},
            "the task 'generate' has no source that could guide it: image_guidance must be 1, got 2",
        ),
    ],
)
def test_image_guidance_is_refused(edit_model, changes, request_changes, message):
    parts = vars(edit_model.model) | {"config": replace(edit_model.config, **changes)}
    model = CogView(Model(**parts), edit_model.placement, "editor")
    request = replace(edit_request(image_guidance=2.0), **request_changes)
    assert message in input_error(model.run, [request])


# Negative prompts


def test_negative_prompt_stands_in_place_of_the_empty_text(tiny_model):
    prompt, negative = (tuple(tiny_model.text_tokenizer.encode(text)) for text in PROMPTS[:2])
    settings = {"seed": 7, "sampling": GUIDED}
    (given,) = tiny_model.generate(PROMPTS[0], negative=PROMPTS[1], **settings)
    request = GenerationRequest(
        prompt=PROMPTS[0], prompt_ids=prompt, negative=PROMPTS[1], negative_ids=negative, **settings
    )
    (step,) = ProgramBuilder(tiny_model.context).build(request).pending()
    (away,) = step.unconditional
    assert (away.ids[away.spans["text"]] - tiny_model.vocabulary.text.start).tolist() == list(negative)
    (result,) = decode(tiny_model.transformer, tiny_model.vocabulary, [step])
    assert result.ids[step.sequence.spans["image"]].tolist() == given.codes.ravel().tolist()
    (plain,) = tiny_model.generate(PROMPTS[0], **settings)
    assert given.codes.tolist() != plain.codes.tolist()


def test_negative_prompt_equal_to_the_prompt_leaves_no_guidance(tiny_model):
    """c + S (c - c) is c, with the same noise."""
    (given,) = tiny_model.generate(PROMPTS[0], negative=PROMPTS[0], seed=7, sampling=GUIDED)
    (plain,) = tiny_model.generate(PROMPTS[0], seed=7, sampling=replace(GUIDED, guidance=1.0))
    np.testing.assert_array_equal(given.codes, plain.codes)
    assert (given.negative, plain.negative) == (PROMPTS[0], "")


def test_negative_prompts_are_the_same_alone_and_in_a_batch(tiny_model):
    """Consecutive requests that differ in the negative prompt alone are arranged anew."""
    requests = [
        GenerationRequest(prompt=PROMPTS[0], seed=7, sampling=GUIDED, negative=negative)
        for negative in ("", PROMPTS[1], PROMPTS[2], "")
    ]
    together = [image.codes.tolist() for image in tiny_model.run(requests)]
    assert together == [next(tiny_model.run([request])).codes.tolist() for request in requests]
    assert together[0] == together[3]
    assert len({str(codes) for codes in together}) == 3


def test_negative_prompt_is_in_the_metadata_of_its_image(tiny_model):
    (image,) = tiny_model.generate(PROMPTS[0], negative=PROMPTS[1], seed=7, sampling=GUIDED)
    texts = image.metadata("tiny")
    assert texts["negative"] == PROMPTS[1]
    assert parse_a1111(a1111_parameters(texts, (64, 64)))["negative prompt"] == PROMPTS[1]
    assert f"--negative '{PROMPTS[1]}'" in repeat_command(texts)
    assert "negative" not in tiny_model.generate(PROMPTS[0], seed=7, sampling=GUIDED)[0].metadata("tiny")


@pytest.mark.parametrize(
    ("negative", "settings", "message"),
    [
        ("狗", {}, "a negative prompt has no effect without guidance: set guidance to another value than 1"),
        (" ", {"guidance": 2.0}, "the prompt is empty"),
        (7, {"guidance": 2.0}, "the prompt must be a text, got 7"),
        ("狗" * 30, {"guidance": 2.0}, "30 pieces long, 20 fit"),
    ],
)
def test_negative_prompt_is_refused(tiny_model, negative, settings, message):
    assert message in input_error(tiny_model.generate, PROMPTS[0], negative=negative, **settings)


def test_negative_prompt_needs_caption_dropout_and_the_task_generate(edit_model):
    message = input_error(edit_model.run, [replace(edit_request(guidance=2.0), negative="狗")])
    assert message == "a negative prompt means nothing for the task 'edit'; it belongs to: generate"
    parts = vars(edit_model.model) | {"config": replace(edit_model.config, caption_dropout=0.0)}
    model = CogView(Model(**parts), edit_model.placement, "plain")
    message = "plain was trained without caption dropout, so it cannot be guided and takes no negative prompt"
    assert input_error(model.generate, PROMPTS[0], negative="狗") == message
