"""``CogView``: the same image alone or in any batch, its codes and probability, and what it refuses."""

import copy
import json
import math
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.checkpoints.checkpoint import Model
from cogview.data.builders.prepare import fit_picture
from cogview.errors import InputError
from cogview.generation.sampling import MAX_SEED
from cogview.modeling.config import GREEDY, Sampling
from cogview.pipeline import runner
from cogview.pipeline.cogview import CogView
from cogview.pipeline.ranking_rules import RANKING_RULES
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import Caption

# Of different lengths, so that a batch of them is padded.
PROMPTS = ["狐狸", "一只狐狸在汽车的左边", "蓝色背景上的三只狗"]
TOO_LONG = "蓝色背景上的三只狐狸" * 3


def codes_of(images):
    """Return the codes of images, stacked."""
    return np.stack([image.codes for image in images])


def rows_of(model, images):
    """Each image's whole row of ids, its positions, and where the codes lie."""
    layout = model.config.layouts["generate"]
    for image in images:
        text = model.text_tokenizer.encode(image.prompt)
        row = layout.arrange(model.vocabulary, text=text, image=image.codes)
        yield torch.from_numpy(row.ids)[None], torch.from_numpy(row.positions)[None], row.spans["image"]


def test_generated_image_carries_its_request(tiny_model):
    """Prompt, seed, index, sampling, codes and log-probability come with the image."""
    images = tiny_model.generate(PROMPTS, n=2, seed=7, temperature=0.8, top_p=0.9)
    assert [(p.prompt, p.seed, p.index) for p in images] == [(prompt, 7, i) for prompt in PROMPTS for i in (0, 1)]
    for image in images:
        assert isinstance(image, Image.Image)
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert (image.sampling.temperature, image.sampling.top_k, image.sampling.top_p) == (0.8, 100, 0.9)
        assert (image.codes.shape, image.codes.dtype) == ((8, 8), np.int64)
        assert image.log_probability < 0
        assert image.resize((32, 32)).size == (32, 32)


def test_generated_image_shows_its_codes(tiny_model):
    """The pixels are those that the image tokenizer decodes from the codes."""
    image = tiny_model.generate("狐狸", seed=7)[0]
    decoded = tiny_model.image_tokenizer.decode(torch.from_numpy(image.codes)[None])[0]
    expected = (decoded.permute(1, 2, 0) * 255).round().numpy()
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert np.asarray(image).std() > 0


def test_generate_is_reproducible_by_seed(tiny_model):
    """The generator of torch does not matter."""
    first = tiny_model.generate(PROMPTS, n=2, seed=7)
    torch.manual_seed(99)  # the generator of torch has no say
    again = tiny_model.generate(PROMPTS, n=2, seed=7)
    np.testing.assert_array_equal(codes_of(first), codes_of(again))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]


@pytest.mark.parametrize(("version", "are_equal"), [(1, True), (2, False)])
def test_generate_shares_noise_between_prompts_in_version_1_only(tiny_model, version, are_equal):
    """At a very high temperature the codes depend on the noise alone."""
    images = tiny_model.generate(PROMPTS[:2], seed=7, temperature=1e6, top_k=0, noise_version=version)
    assert np.array_equal(*codes_of(images)) is are_equal


def test_generate_depends_on_seed_index_and_prompt(tiny_model):
    """Each of the three changes the image."""
    codes = codes_of(
        tiny_model.generate("一只狐狸", n=2, seed=7)
        + tiny_model.generate("一只狐狸", seed=8)
        + tiny_model.generate("一只狗", seed=7)
    )
    assert len(np.unique(codes.reshape(4, -1), axis=0)) == 4


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_generate_is_independent_of_batch_size(tiny_model, batch_size):
    """Codes are equal in any batch, log-probabilities nearly so."""
    together = tiny_model.generate(PROMPTS, n=3, seed=7, batch_size=16)
    apart = tiny_model.generate(PROMPTS, n=3, seed=7, batch_size=batch_size)
    np.testing.assert_array_equal(codes_of(together), codes_of(apart))
    np.testing.assert_allclose(
        [image.log_probability for image in together],
        [image.log_probability for image in apart],
        rtol=1e-5,
    )


def test_run_is_independent_of_other_requests(tiny_model):
    """Image 2 of a prompt is the same without images 0 and 1."""
    wanted = tiny_model.generate(PROMPTS[1], n=3, seed=7)[2]
    mixed = [GenerationRequest(prompt=PROMPTS[0], seed=1), GenerationRequest(prompt=PROMPTS[1], seed=7, index=2)]
    generated = list(tiny_model.run(mixed))[1]
    np.testing.assert_array_equal(generated.codes, wanted.codes)


def test_generate_normalizes_width_of_characters(tiny_model):
    """Full-width and half-width spellings of a prompt give one image."""
    images = tiny_model.generate(["A1,红苹果", "Ａ１，红苹果"], seed=7)
    np.testing.assert_array_equal(images[0].codes, images[1].codes)


@pytest.mark.parametrize("settings", [{}, {"temperature": 5.0, "top_k": 0}, {"top_k": 0, "top_p": 0.3}])
def test_generate_samples_image_codes_only(tiny_model, settings):
    """No piece or command is sampled, whatever the settings."""
    codes = codes_of(tiny_model.generate(PROMPTS, n=4, seed=3, **settings))
    assert codes.min() >= 0
    assert codes.max() <= 8191
    assert len(np.unique(codes)) > 64


def test_log_probability_equals_full_forward(tiny_model):
    """The filters of sampling do not change it."""
    images = tiny_model.generate(PROMPTS, n=2, seed=7, temperature=0.5, top_k=10)  # filters must not change it
    for image, (ids, positions, span) in zip(images, rows_of(tiny_model, images), strict=True):
        with torch.inference_mode():
            logits = tiny_model.transformer(ids, positions)[0, span.start - 1 : span.stop - 1, :8192]
        chosen = logits.double().log_softmax(dim=-1).gather(1, ids[0, span, None])
        assert image.log_probability == pytest.approx(float(chosen.sum()), rel=1e-6)


def test_greedy_codes_equal_full_forward(tiny_model):
    """With top-k 1 every code is the most probable of a forward pass over all that precedes it."""
    images = tiny_model.generate(PROMPTS, seed=7, top_k=1)
    for ids, positions, image in rows_of(tiny_model, images):
        with torch.inference_mode():
            logits = tiny_model.transformer(ids, positions)[0, image.start - 1 : image.stop - 1, :8192]
        torch.testing.assert_close(logits.argmax(dim=-1), ids[0, image])


def test_sampling_defaults_to_settings_of_model(tiny_model):
    """Settings that are not given come from the config."""
    own = tiny_model.config.sampling
    assert tiny_model.sampling() == own
    assert tiny_model.sampling(top_k=0) == replace(own, top_k=0)
    assert tiny_model.generate("狐狸", seed=1)[0].sampling == own


def test_generate_chooses_seed_when_none_is_given(tiny_model):
    """The image carries the seed, with which it can be generated again."""
    chosen = tiny_model.generate("狐狸")[0]
    again = tiny_model.generate("狐狸", seed=chosen.seed)[0]
    np.testing.assert_array_equal(chosen.codes, again.codes)
    assert tiny_model.generate("狐狸", seed=MAX_SEED)[0].seed == MAX_SEED


def test_callback_is_called_after_every_line(tiny_model, monkeypatch):
    """With the requests of the batch, and their codes masked from the line on that is next."""
    monkeypatch.setattr(tiny_model, "speculative", 1)  # guessed codes come several at a time
    shown = []

    def on_progress(progress):
        assert [request.prompt for request in progress.requests] == PROMPTS[len(shown) // 8 * 2 :][:2]
        shown.append((progress.done, progress.total, progress.num_new))
        for codes in progress.codes():
            assert codes.shape == (8, 8)
            lines = progress.done // 8
            assert not codes.mask[:lines].any()
            assert codes.mask[lines:].all()

    images = list(tiny_model.generate_iter(PROMPTS, seed=7, batch_size=2, callback=on_progress))
    assert shown == [(8 * n, 64, 16) for n in range(1, 9)] + [(8 * n, 64, 8) for n in range(1, 9)]
    assert len(images) == 3


def test_progress_codes_equal_final_codes(tiny_model, monkeypatch):
    """Half-way, the codes so far are the first half of those of the image."""
    monkeypatch.setattr(tiny_model, "speculative", 1)
    halves = []

    def on_progress(progress):
        if progress.done == 32:
            halves.extend(progress.codes())

    images = list(
        tiny_model.run([GenerationRequest(prompt=prompt, seed=7) for prompt in PROMPTS], callback=on_progress)
    )
    np.testing.assert_array_equal(np.stack(halves)[:, :4], codes_of(images)[:, :4])
    np.testing.assert_array_equal(codes_of(images), codes_of(tiny_model.generate(PROMPTS, seed=7)))


def test_callback_stops_generation_when_it_returns_false(tiny_model, monkeypatch):
    """Finished images are returned, and no more are generated."""
    monkeypatch.setattr(tiny_model, "speculative", 1)
    calls = []

    def on_progress(progress):
        calls.append(progress.done)
        return len(calls) < 10  # in the second batch

    finished = list(tiny_model.generate_iter(PROMPTS, seed=7, batch_size=2, callback=on_progress))
    np.testing.assert_array_equal(codes_of(finished), codes_of(tiny_model.generate(PROMPTS, seed=7)[:2]))
    assert calls == [8, 16, 24, 32, 40, 48, 56, 64, 8, 16]


def test_generate_iter_yields_before_interruption(tiny_model):
    """Batches that were finished before Ctrl-C have been yielded."""
    calls = 0

    def interrupt(progress):
        nonlocal calls
        calls += 1
        if calls == 12:  # in the second batch
            raise KeyboardInterrupt

    finished = []
    images = tiny_model.generate_iter(PROMPTS, seed=7, batch_size=2, callback=interrupt)
    with pytest.raises(KeyboardInterrupt):
        finished.extend(images)
    np.testing.assert_array_equal(codes_of(finished), codes_of(tiny_model.generate(PROMPTS, seed=7)[:2]))


def test_generate_works_in_bfloat16(tiny_checkpoint):
    """Weights are bfloat16, codes are codes."""
    model = CogView.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert model.transformer.embedding.weight.dtype == torch.bfloat16
    assert codes_of(model.generate(PROMPTS, seed=7)).max() <= 8191


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("", "the prompt is empty; describe an image"),
        (" \u3000\n", "the prompt is empty"),
        (TOO_LONG, "the prompt “蓝色背景上的三只狐狸蓝色背景上的三只狐狸…” is 30 pieces long, 20 fit; shorten it"),
        ("\udcbb\udca8", "holds bytes that are not UTF-8"),
    ],
)
def test_generate_refuses_prompt(tiny_model, prompt, problem):
    """An empty, overlong or undecodable prompt is refused with the reason that prompt_problem gives."""
    assert problem in tiny_model.prompt_problem(prompt)
    with pytest.raises(InputError) as caught:
        tiny_model.generate(["狐狸", prompt], seed=7)
    assert str(caught.value) == tiny_model.prompt_problem(prompt)


def test_prompt_problem_is_none_when_prompt_fits(tiny_model):
    """A prompt of unknown characters is usable, with a warning."""
    assert tiny_model.prompt_problem("狐狸") is None
    assert tiny_model.prompt_problem("蓝色背景上的三只狐狸" * 2) is None  # 20 pieces
    assert tiny_model.prompt_warning("狐狸") is None
    warning = tiny_model.prompt_warning("龘狐狸")
    assert warning == "“龘狐狸”: 33% of its characters are unknown to the model"


def test_prompt_warning_names_things_when_prompt_has_none(tiny_model):
    """A model without a grammar knows its names alone, and suggests no thing that merely shares a character."""
    things = f"such as 狐狸、狗、红苹果; all of them: cogview info {tiny_model.name} --things"
    expected = f"“两只狸子”: it names none of the things that the model was trained on, {things}"
    assert tiny_model.prompt_warning("两只狸子") == expected


def test_generate_logs_the_warning_about_a_prompt_once(tiny_model, caplog):
    tiny_model.generate(["狐狸", "龘狐狸", "龘狐狸"], seed=7)
    tiny_model.generate("龘狐狸", n=2, seed=8)
    assert [record.getMessage() for record in caplog.records if record.name == "cogview.pipeline.prompt_checks"] == [
        tiny_model.prompt_warning("龘狐狸")
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "number of images must be from 1 to 100000, got 0"),
        ({"n": 10**20}, "number of images must be from 1 to 100000, got 1"),
        ({"temperature": math.inf}, "temperature must be finite, got inf"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be from 0 to 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed must be from 0 to"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_generate_refuses_setting(tiny_model, settings, message):
    """The message has the value and the range."""
    with pytest.raises(InputError, match=message):
        tiny_model.generate("狐狸", **settings)


def test_generate_refuses_untrained_task(tiny_model):
    """The message lists the tasks of the model."""
    parts = vars(tiny_model.model) | {"config": replace(tiny_model.config, tasks=("caption",))}
    model = CogView(Model(**parts), tiny_model.placement, "captioner")
    with pytest.raises(InputError, match="captioner was not trained for the task 'generate'; its tasks are: caption"):
        model.generate("狐狸", seed=7)


def test_from_pretrained_refuses_unknown_names(tiny_checkpoint, tmp_path):
    """Of a model, a device or a dtype."""
    with pytest.raises(
        InputError, match=r'checkpoint "cogview-bse" is unknown; known: .*the path of a checkpoint folder'
    ):
        CogView.from_pretrained("cogview-bse")
    with pytest.raises(InputError, match=r"is no checkpoint folder: config.json is missing"):
        CogView.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="device 'tpu5' is unknown"):
        CogView.from_pretrained(tiny_checkpoint, device="tpu5")
    with pytest.raises(InputError, match="dtype 'int3' is unknown; known: auto, float32"):
        CogView.from_pretrained(tiny_checkpoint, dtype="int3")


# Completion


def test_complete_keeps_rows_and_generates_others(tiny_model):
    """Kept rows are equal, the others are new, in any batch."""
    images = tiny_model.generate(PROMPTS, seed=7)
    completed = tiny_model.complete(images, PROMPTS, rows=3, n=2, seed=8)
    assert [(p.prompt, p.seed, p.index) for p in completed] == [(prompt, 8, i) for prompt in PROMPTS for i in (0, 1)]
    for number, image in enumerate(completed):
        assert (image.codes[:3] == images[number // 2].codes[:3]).all()
        assert (image.codes[3:] != images[number // 2].codes[3:]).any()
    alone = tiny_model.complete(images[1:2], PROMPTS[1], rows=3, n=2, seed=8, batch_size=1)
    np.testing.assert_array_equal(codes_of(alone), codes_of(completed[2:4]))


def test_complete_equals_generate_when_no_row_is_kept(tiny_model):
    """No code of the image is given then."""
    generated = tiny_model.generate("一只狐狸", n=2, seed=7)
    np.testing.assert_array_equal(
        codes_of(tiny_model.complete([Image.new("RGB", (9, 9))], "一只狐狸", rows=0, n=2, seed=7)), codes_of(generated)
    )


def test_complete_fits_and_encodes_image(tiny_model):
    """A photo is cropped to its middle and encoded."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.asarray(photo)[:, 18:82].copy()).permute(2, 0, 1)[None].float() / 255
    expected = tiny_model.image_tokenizer.encode(pixels)[0].numpy()
    (image,) = tiny_model.complete([photo], "狗", rows=5, seed=1)
    np.testing.assert_array_equal(image.codes[:5], expected[:5])


@pytest.mark.parametrize("rows", [-1, 8, 100])
def test_complete_refuses_rows(tiny_model, rows):
    """At least one row must be left to generate."""
    with pytest.raises(InputError, match=f"rows to keep must be from 0 to 7, got {rows}"):
        tiny_model.complete([Image.new("RGB", (64, 64))], "狗", rows=rows)


# Upscaling

# (row, column, lines) of the nine windows of 8 x 8 codes, written out: at steps of 4, the first up to line 5.
WINDOWS = ((0, 0, 5), (0, 1, 8), (0, 2, 8), (1, 1, 8), (1, 0, 8), (1, 2, 8), (2, 0, 8), (2, 1, 8), (2, 2, 8))


def greedy_upscaling(model, codes, text):
    """The nine windows by full forwards, one code at a time."""
    command, pieces = model.vocabulary.command, model.text_tokenizer.encode(text)
    large = np.full((16, 16), -1)
    for row, column, lines in WINDOWS:
        crop = codes[2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
        window = large[4 * row : 4 * row + 8, 4 * column : 4 * column + 8]  # a view: what is generated stays
        first = [command("[ROI1]"), *(model.vocabulary.text[piece] for piece in pieces)]
        first += [command("[TINY]"), command("[BOI1]"), *crop.flat, command("[EOI1]")]
        second = [command("[ROI2]"), command("[POS0]"), command("[TINY]"), command("[BOI2]")]
        for index in range(8 * lines):
            if window.flat[index] < 0:
                ids = torch.tensor([[*first, *second, *window.flat[:index]]])
                positions = torch.tensor([[*range(len(first)), *range(len(second) + index)]])
                with torch.inference_mode():
                    window.flat[index] = int(model.transformer(ids, positions)[0, -1, :8192].argmax())
    return large


def test_upscale_equals_nine_windows_by_full_forward(tiny_model):
    """Greedy codes are those of nine windows, each code by a full forward pass."""
    (image,) = tiny_model.generate("一只狐狸", seed=7)
    (large,) = tiny_model.upscale([image], "一只狐狸", seed=3, top_k=1)
    assert (large.size, large.codes.shape) == ((128, 128), (16, 16))
    np.testing.assert_array_equal(large.codes, greedy_upscaling(tiny_model, image.codes, "一只狐狸"))


def test_upscale_is_independent_of_batch(tiny_model):
    """Other images in the batch do not matter, the seed does."""
    images = tiny_model.generate(PROMPTS, seed=7)
    together = tiny_model.upscale(images, PROMPTS, seed=3)
    for number, prompt in enumerate(PROMPTS):
        (alone,) = tiny_model.upscale([images[number]], prompt, seed=3, batch_size=1)
        np.testing.assert_array_equal(alone.codes, together[number].codes)
        assert alone.log_probability == pytest.approx(together[number].log_probability, abs=1e-2)
    other = tiny_model.upscale(images[:1], PROMPTS[0], seed=4)
    assert (other[0].codes != together[0].codes).any()


def test_upscale_batches_independent_windows(tiny_model, monkeypatch):
    """Seven decoding batches for nine windows of three images."""
    counts, decode = [], runner.decode
    monkeypatch.setattr(
        runner, "decode", lambda *rest, **named: (counts.append(len(rest[2])), decode(*rest, **named))[1]
    )
    images = tiny_model.generate(PROMPTS, seed=7)
    counts.clear()
    tiny_model.upscale(images, PROMPTS, seed=3)
    assert counts == [3, 3, 6, 6, 3, 3, 3]


def test_run_batches_different_tasks(tiny_model, monkeypatch):
    """Five requests of four tasks share batches, and each gives what it gives alone."""
    small = tiny_model.generate("狐狸", seed=7)[0].codes
    sampling = Sampling(temperature=0.7, top_k=9)
    requests = [
        GenerationRequest(prompt="一只狗", seed=1),
        GenerationRequest(task="caption", seed=1, codes=small, sampling=GREEDY),
        GenerationRequest(prompt="狐狸", seed=2, task="upscale", codes=small),
        GenerationRequest(prompt="一只狗", seed=1, index=1, codes=small[:3], sampling=sampling),
        GenerationRequest(prompt="狐狸", seed=3, task="low_level", codes=small[:4, :4]),
    ]
    counts, decode = [], runner.decode
    monkeypatch.setattr(
        runner, "decode", lambda *rest, **named: (counts.append(len(rest[2])), decode(*rest, **named))[1]
    )
    together = list(tiny_model.run(requests))
    assert counts == [5, 1, 2, 2, 1, 1, 1]
    assert tiny_model.batch_sizes(requests) == [5]
    assert sum(tiny_model.batch_sizes(requests, batch_size=3)) == 5
    for request, made in zip(requests, together, strict=True):
        (alone,) = tiny_model.run([request])
        if isinstance(made, Caption):
            assert made.text == alone.text
        else:
            np.testing.assert_array_equal(made.codes, alone.codes)
            assert made.tobytes() == alone.tobytes()
            assert made.log_probability == pytest.approx(alone.log_probability, abs=1e-2)
    assert together[3].sampling == sampling
    np.testing.assert_array_equal(together[3].codes[:3], small[:3])


@pytest.mark.parametrize("parallel", [1, 5])
def test_speculative_and_int8_cache_are_settings_of_model(tiny_model, monkeypatch, parallel):
    """Drafting codes does not change the result; an int8 cache changes logits slightly."""
    expected = codes_of(tiny_model.generate(PROMPTS, seed=7))
    monkeypatch.setattr(tiny_model, "speculative", parallel)
    np.testing.assert_array_equal(codes_of(tiny_model.generate(PROMPTS, seed=7)), expected)
    monkeypatch.setattr(tiny_model, "int8_cache", True)
    rounded = codes_of(tiny_model.generate(PROMPTS, seed=7))
    assert (rounded == expected).mean() > 0.1  # noise is the same, logits nearly
    np.testing.assert_array_equal(codes_of(tiny_model.generate(PROMPTS, seed=7, batch_size=1)), rounded)


def test_generate_plans_no_wider_window_than_an_image_has_codes(tiny_model, monkeypatch):
    """A window of 99,999,999 codes used to need 6588 GB by the plan, although no pass verifies more than an image."""
    expected = codes_of(tiny_model.generate(PROMPTS, seed=7))
    monkeypatch.setattr(tiny_model, "speculative", 99_999_999)
    np.testing.assert_array_equal(codes_of(tiny_model.generate(PROMPTS, seed=7)), expected)


def test_upscale_low_level_doubles_small_image(tiny_model):
    """From half the side of the model's images to that side."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    (image,) = tiny_model.upscale([image], "狗", seed=3, low_level=True)
    assert (image.size, image.codes.shape) == ((64, 64), (8, 8))


# Captions and scores


def test_caption_is_independent_of_batch(tiny_model):
    """By every method."""
    images = tiny_model.generate(PROMPTS, seed=7)
    for settings in ({}, {"method": "beam", "n": 3}, {"method": "sample", "n": 3, "seed": 5}):
        together = tiny_model.caption(images, **settings)
        for image, captions in zip(images, together, strict=True):
            (alone,) = tiny_model.caption([image], batch_size=1, **settings)
            assert [caption.text for caption in alone] == [caption.text for caption in captions]
            assert [caption.index for caption in captions] == list(range(len(captions)))
    beams = [caption.log_probability for caption in tiny_model.caption(images[:1], method="beam", n=4)[0]]
    assert beams == sorted(beams, reverse=True)


def test_caption_log_probability_equals_full_forward(tiny_model):
    """That of all pieces and the stop, among text ids."""
    image = tiny_model.generate("狐狸", seed=8)[0]
    table, vocabulary = tiny_model.config.layouts, tiny_model.vocabulary
    for caption in tiny_model.caption([image], method="beam", n=3)[0]:
        pieces = tiny_model.text_tokenizer.encode(caption.text)
        if len(pieces) != caption.num_pieces:  # a random model spells what the tokenizer would spell otherwise
            continue
        row = table["caption"].arrange(vocabulary, image=image.codes, text=pieces)
        start = row.spans["text"].start
        with torch.inference_mode():
            logits = tiny_model.transformer(torch.from_numpy(row.ids)[None], torch.from_numpy(row.positions)[None])[0]
        ids = [*vocabulary.text, vocabulary.command("[SEP]")]
        log_p = logits[start - 1 : -1, ids].double().log_softmax(dim=-1)
        targets = [ids.index(token) for token in row.ids[start:].tolist()]
        expected = log_p[range(len(targets)), targets].sum().item()
        assert caption.log_probability == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "number of captions must be from 1 to 100000, got 0"),
        ({"n": 2, "method": "greedy"}, "greedy captions are always the same: 2 were asked for, use sample or beam"),
        ({"method": "best"}, "method 'best' is unknown; known: greedy, sample, beam"),
        ({"top_k": 3}, "top_k can be set for sampled captions alone"),
        ({"method": "sample", "temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_caption_refuses_setting(tiny_model, settings, message):
    """The message has the value and the remedy."""
    with pytest.raises(InputError, match=message):
        tiny_model.caption([Image.new("RGB", (64, 64))], **settings)


@pytest.mark.parametrize("by", RANKING_RULES)
def test_generate_keeps_best_by_score(tiny_model, by):
    """keep returns the images with the best scores, which say by what they ranked."""
    images = tiny_model.generate(PROMPTS[:2], n=6, seed=7)
    kept = tiny_model.generate(PROMPTS[:2], n=6, keep=2, rank_by=by, seed=7)
    for number, prompt in enumerate(PROMPTS[:2]):
        own = images[6 * number : 6 * number + 6]
        scores = [score.log_probability for score in tiny_model.score(own, prompt, by=by)]
        best = sorted(range(6), key=lambda index: -scores[index])[:2]
        assert [image.index for image in kept[2 * number : 2 * number + 2]] == best
        assert kept[2 * number].score.log_probability == pytest.approx(max(scores), abs=1e-3)
        assert kept[2 * number].score.ranked_by == by
        assert kept[2 * number].metadata("tiny")["ranked_by"] == by
    with pytest.raises(InputError, match="keep must be from 1 to 3, got 4"):
        tiny_model.generate("狗", n=3, keep=4)


def test_score_refuses_wrong_number_of_texts(tiny_model):
    """One for all, or one for each."""
    with pytest.raises(InputError, match="2 images need one text or 2, got 3"):
        tiny_model.score([Image.new("RGB", (64, 64))] * 2, ["狗"] * 3)


# Guidance


def test_guidance_requires_caption_dropout(tiny_model):
    """Text attention works with any weights."""
    plain, guided, attentive = (
        tiny_model.generate("一只狐狸", seed=7, **settings)[0].codes
        for settings in ({}, {"guidance": 3.0}, {"text_attention": 4.0})
    )
    assert (plain != guided).any()
    assert (plain != attentive).any()
    parts = vars(tiny_model.model) | {"config": replace(tiny_model.config, caption_dropout=0.0)}
    model = CogView(Model(**parts), tiny_model.placement, "plain")
    with pytest.raises(InputError, match=r"plain was trained without caption dropout.*guidance must be 1, got 2"):
        model.generate("狐狸", seed=7, guidance=2.0)
    assert model.generate("狐狸", seed=7, text_attention=2.0)[0].size == (64, 64)


# Sampling settings


def test_generate_takes_sampling_and_overrides(tiny_model):
    """A keyword replaces a field of the given settings."""
    (image,) = tiny_model.generate("狐狸", seed=7, sampling=Sampling(temperature=0.7, top_k=9), top_k=3)
    assert image.sampling == Sampling(temperature=0.7, top_k=3)
    (expected,) = tiny_model.generate("狐狸", seed=7, temperature=0.7, top_k=3)
    np.testing.assert_array_equal(image.codes, expected.codes)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, **settings: model.generate("狐狸", **settings),
        lambda model, **settings: model.generate_iter("狐狸", **settings),
        lambda model, **settings: model.complete([], "狐狸", rows=1, **settings),
        lambda model, **settings: model.upscale([], "狐狸", **settings),
        lambda model, **settings: model.caption([], method="sample", **settings),
        lambda model, **settings: model.sampling(**settings),
    ],
)
def test_methods_refuse_unknown_setting(tiny_model, call):
    """A misspelt keyword is no setting, and the message has the nearest one."""
    with pytest.raises(TypeError, match="'temprature' is no sampling setting; did you mean 'temperature'"):
        call(tiny_model, temprature=0.5)
    with pytest.raises(InputError, match="top_k must be at least 0"):
        call(tiny_model, top_k=-1)


def test_caption_takes_sampling_when_sampled(tiny_model):
    """Guidance has no meaning for captions."""
    image = tiny_model.generate("狐狸", seed=7)[0]
    settings = Sampling(temperature=0.5, top_k=5)
    first, second = tiny_model.caption([image], method="sample", n=2, seed=3, sampling=settings)[0]
    assert [first.index, second.index] == [0, 1]
    (expected,) = tiny_model.caption([image], method="sample", seed=3, temperature=0.5, top_k=5)[0]
    assert first.text == expected.text
    with pytest.raises(InputError, match="guidance and text_attention cannot be set for captions"):
        tiny_model.caption([image], method="sample", guidance=2)
    with pytest.raises(InputError, match="sampling can be set for sampled captions alone"):
        tiny_model.caption([image], sampling=settings)


@pytest.mark.parametrize("task", ["complete", "upscale", "caption"])
def test_callback_is_called_by_every_method(tiny_model, monkeypatch, task):
    """After every line of codes or so, with the requests of the batch."""
    monkeypatch.setattr(tiny_model, "speculative", 1)
    seen = []
    image = tiny_model.generate("狐狸", seed=7)[0]
    settings = {"seed": 7, "callback": lambda progress: seen.append((progress.requests[0].task, progress.codes()[0]))}
    if task == "complete":
        tiny_model.complete([image], "狐狸", rows=4, **settings)
    elif task == "upscale":
        tiny_model.upscale([image], "狐狸", **settings)
    else:
        tiny_model.caption([image], **settings)
    assert {name for name, _ in seen} == {"generate" if task == "complete" else task}
    assert all(codes.shape == (8, 8) for _, codes in seen)


# Images


def test_fit_image_notes_what_was_done(tiny_model):
    """The size is that which the task is given."""
    photo = Image.new("RGB", (100, 64), "red")
    fitted, note = tiny_model.fit_image(photo)
    assert (fitted.size, note) == ((64, 64), "cropped from 100 x 64 to 64 x 64")
    assert tiny_model.fit_image(photo, task="low_level")[0].size == (32, 32)
    assert tiny_model.fit_image(fitted) == (fitted, None)


def test_fit_image_makes_squares_as_the_training_did(tiny_checkpoint, tmp_path):
    """A model of padded pictures has white added, in every method that takes images."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "padded")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "fit": "pad"}), encoding="utf-8")
    model = CogView.from_pretrained(str(folder), device="cpu")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8))
    padded = Image.fromarray(fit_picture(photo, 64, "pad"))
    fitted, note = model.fit_image(photo)
    assert note == "padded from 100 x 64 to 64 x 64"
    np.testing.assert_array_equal(np.asarray(fitted), np.asarray(padded))
    np.testing.assert_array_equal(model.encode_images([photo]), model.encode_images([padded]))
    assert [each.text for each in model.caption(photo, method="greedy")] == [
        each.text for each in model.caption(padded, method="greedy")
    ]


def test_encode_images_reports_notes(tiny_model):
    """By the index of the image; codes of a generated image need no fitting."""
    notes = []
    images = [Image.new("RGB", (64, 64)), Image.new("RGB", (128, 128)), *tiny_model.generate("狐狸", seed=7)]
    codes = tiny_model.encode_images(images, on_note=lambda index, note: notes.append((index, note)))
    assert notes == [(1, "resized from 128 x 128 to 64 x 64")]
    np.testing.assert_array_equal(codes[2], images[2].codes)
    assert tiny_model.encode_images(images[:1], task="low_level").shape == (1, 4, 4)


# Copies


@pytest.mark.parametrize(
    "copied", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy], ids=["pickle", "deep"]
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_copy_generates_the_same_images(tiny_checkpoint, dtype, copied):
    """With weights of its own, for another process or for an experiment."""
    model = CogView.from_pretrained(tiny_checkpoint, device="cpu", dtype=dtype)
    expected = codes_of(model.generate(PROMPTS[:2], seed=7))
    other = copied(model)
    with torch.no_grad():
        model.transformer.embedding.weight.zero_()
    np.testing.assert_array_equal(codes_of(other.generate(PROMPTS[:2], seed=7)), expected)
    assert other.prompt_checks._model is other.model


def test_pickle_has_the_size_of_the_weights(tiny_checkpoint):
    """Weights share blocks of 256 MB; each once brought its whole block, 24 GB in all."""
    model = CogView.from_pretrained(tiny_checkpoint, device="cpu")
    modules = (model.transformer, model.image_tokenizer)
    weights = sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))
    assert len(pickle.dumps(model)) < 1.1 * weights + 200_000


def test_run_refuses_a_request_of_a_task_that_generates_nothing(tiny_model):
    """It would have been captioned."""
    request = GenerationRequest(task="rerank", prompt="一只狐狸", seed=7, codes=np.zeros((8, 8), dtype=np.int64))
    with pytest.raises(InputError, match="the task 'rerank' generates nothing; call rerank or score"):
        tiny_model.run([request])
