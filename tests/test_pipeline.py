"""``CogView``: the same picture alone or in any batch, its codes and probability, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import cogview
from cogview.checkpoints.folder import Model
from cogview.errors import InputError
from cogview.pipeline import CogView, Wish
from cogview.sampling import MAX_SEED

# Of different lengths, so that a batch of them is padded.
PROMPTS = ["狐狸", "一只狐狸在汽车的左边", "蓝色背景上的三只狗"]
TOO_LONG = "蓝色背景上的三只狐狸" * 3


def codes_of(pictures):
    return np.stack([picture.codes for picture in pictures])


def rows_of(model, pictures):
    """Each picture's whole row of ids, its positions, and where the codes lie."""
    layout = model.model.config.layouts["generate"]
    for picture in pictures:
        text = model.text_tokenizer.encode(picture.prompt)
        row = layout.arrange(model.vocabulary, text=text, image=picture.codes)
        yield torch.from_numpy(row.ids)[None], torch.from_numpy(row.positions)[None], row.spans["image"]


def test_a_picture_carries_how_it_was_drawn(tiny_model):
    pictures = tiny_model.generate(PROMPTS, n=2, seed=7, temperature=0.8, top_p=0.9)
    assert [(p.prompt, p.seed, p.index) for p in pictures] == [(prompt, 7, i) for prompt in PROMPTS for i in (0, 1)]
    for picture in pictures:
        assert isinstance(picture, Image.Image)
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
        assert (picture.sampling.temperature, picture.sampling.top_k, picture.sampling.top_p) == (0.8, 100, 0.9)
        assert (picture.codes.shape, picture.codes.dtype) == ((8, 8), np.int64)
        assert picture.log_probability < 0
        assert picture.resize((32, 32)).size == (32, 32)


def test_its_pixels_are_its_codes(tiny_model):
    picture = tiny_model.generate("狐狸", seed=7)[0]
    decoded = tiny_model.image_tokenizer.decode(torch.from_numpy(picture.codes)[None])[0]
    expected = (decoded.permute(1, 2, 0) * 255).round().numpy()
    np.testing.assert_array_equal(np.asarray(picture), expected)
    assert np.asarray(picture).std() > 0


def test_the_same_seed_draws_the_same(tiny_model):
    first = tiny_model.generate(PROMPTS, n=2, seed=7)
    torch.manual_seed(99)  # the generator of torch has no say
    again = tiny_model.generate(PROMPTS, n=2, seed=7)
    np.testing.assert_array_equal(codes_of(first), codes_of(again))
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in again]


def test_seed_number_and_prompt_each_make_another_picture(tiny_model):
    codes = codes_of(
        tiny_model.generate("一只狐狸", n=2, seed=7)
        + tiny_model.generate("一只狐狸", seed=8)
        + tiny_model.generate("一只狗", seed=7)
    )
    assert len(np.unique(codes.reshape(4, -1), axis=0)) == 4


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_a_picture_does_not_depend_on_its_batch(tiny_model, batch_size):
    together = tiny_model.generate(PROMPTS, n=3, seed=7, batch_size=16)
    apart = tiny_model.generate(PROMPTS, n=3, seed=7, batch_size=batch_size)
    np.testing.assert_array_equal(codes_of(together), codes_of(apart))
    np.testing.assert_allclose(
        [picture.log_probability for picture in together],
        [picture.log_probability for picture in apart],
        rtol=1e-5,
    )


def test_a_picture_does_not_depend_on_how_many_are_asked_for(tiny_model):
    wanted = tiny_model.generate(PROMPTS[1], n=3, seed=7)[2]
    mixed = [Wish(prompt=PROMPTS[0], seed=1), Wish(prompt=PROMPTS[1], seed=7, index=2)]
    drawn = tiny_model.draw(mixed, tiny_model.sampling())[1]
    np.testing.assert_array_equal(drawn.codes, wanted.codes)


def test_prompts_spelt_alike_draw_alike(tiny_model):
    pictures = tiny_model.generate(["A1,红苹果", "Ａ１，红苹果"], seed=7)
    np.testing.assert_array_equal(pictures[0].codes, pictures[1].codes)


@pytest.mark.parametrize("settings", [{}, {"temperature": 5.0, "top_k": 0}, {"top_k": 0, "top_p": 0.3}])
def test_codes_are_image_codes(tiny_model, settings):
    codes = codes_of(tiny_model.generate(PROMPTS, n=4, seed=3, **settings))
    assert codes.min() >= 0
    assert codes.max() <= 8191
    assert len(np.unique(codes)) > 64


def test_log_probability_is_that_of_a_full_forward(tiny_model):
    pictures = tiny_model.generate(PROMPTS, n=2, seed=7, temperature=0.5, top_k=10)  # filters must not change it
    for picture, (ids, positions, image) in zip(pictures, rows_of(tiny_model, pictures), strict=True):
        with torch.inference_mode():
            logits = tiny_model.transformer(ids, positions)[0, image.start - 1 : image.stop - 1, :8192]
        chosen = logits.double().log_softmax(dim=-1).gather(1, ids[0, image, None])
        assert picture.log_probability == pytest.approx(float(chosen.sum()), rel=1e-6)


def test_cached_decoding_is_a_full_forward(tiny_model):
    """With top-k 1 every code is the likeliest of a forward over all that comes before it."""
    pictures = tiny_model.generate(PROMPTS, seed=7, top_k=1)
    for ids, positions, image in rows_of(tiny_model, pictures):
        with torch.inference_mode():
            logits = tiny_model.transformer(ids, positions)[0, image.start - 1 : image.stop - 1, :8192]
        torch.testing.assert_close(logits.argmax(dim=-1), ids[0, image])


def test_settings_not_given_are_the_models_own(tiny_model):
    own = tiny_model.model.config.sampling
    assert tiny_model.sampling() == own
    assert tiny_model.sampling(top_k=0) == replace(own, top_k=0)
    assert tiny_model.generate("狐狸", seed=1)[0].sampling == own


def test_a_seed_is_chosen_and_told(tiny_model):
    chosen = tiny_model.generate("狐狸")[0]
    again = tiny_model.generate("狐狸", seed=chosen.seed)[0]
    np.testing.assert_array_equal(chosen.codes, again.codes)
    assert tiny_model.generate("狐狸", seed=MAX_SEED)[0].seed == MAX_SEED


def test_every_code_is_counted(tiny_model):
    counts = []
    list(tiny_model.iterate(PROMPTS, seed=7, batch_size=2, on_code=lambda done, total: counts.append((done, total))))
    assert counts == [(done, 64) for done in range(1, 65)] * 2


def test_pictures_before_an_interruption_are_had(tiny_model):
    calls = 0

    def interrupt(done, total):
        nonlocal calls
        calls += 1
        if calls == 100:  # in the second batch
            raise KeyboardInterrupt

    had = []
    drawing = tiny_model.iterate(PROMPTS, seed=7, batch_size=2, on_code=interrupt)
    with pytest.raises(KeyboardInterrupt):
        had.extend(drawing)
    np.testing.assert_array_equal(codes_of(had), codes_of(tiny_model.generate(PROMPTS, seed=7)[:2]))


def test_half_precision_draws(tiny_checkpoint):
    model = CogView.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert model.transformer.embedding.weight.dtype == torch.bfloat16
    assert codes_of(model.generate(PROMPTS, seed=7)).max() <= 8191


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("", "the prompt is empty; say what to draw"),
        (" \u3000\n", "the prompt is empty"),
        (TOO_LONG, "the prompt “蓝色背景上的三只狐狸蓝色背景上的三只狐狸…” is 30 pieces long, 20 fit; shorten it"),
        ("\udcbb\udca8", "holds bytes that are not UTF-8"),
    ],
)
def test_prompts_that_cannot_be_drawn(tiny_model, prompt, problem):
    assert problem in tiny_model.problem_with(prompt)
    with pytest.raises(InputError) as caught:
        tiny_model.generate(["狐狸", prompt], seed=7)
    assert str(caught.value) == tiny_model.problem_with(prompt)


def test_prompts_that_can_be_drawn(tiny_model):
    assert tiny_model.problem_with("狐狸") is None
    assert tiny_model.problem_with("蓝色背景上的三只狐狸" * 2) is None  # 20 pieces
    assert tiny_model.warning_about("狐狸") is None
    assert (
        tiny_model.warning_about("龘")
        == "100% of the prompt “龘” is spelt in bytes: the model hardly knows its characters"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "number of pictures must be at least 1, got 0"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be from 0 to 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed must be from 0 to"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_settings_that_cannot_be(tiny_model, settings, message):
    with pytest.raises(InputError, match=message):
        tiny_model.generate("狐狸", **settings)


def test_a_model_that_was_not_trained_to_draw(tiny_model):
    parts = vars(tiny_model.model) | {"config": replace(tiny_model.model.config, tasks=("caption",))}
    model = CogView(Model(**parts), tiny_model.placement, "teller")
    with pytest.raises(InputError, match="teller was not trained to draw; its tasks are: caption"):
        model.generate("狐狸", seed=7)


def test_models_and_devices_that_are_not_there(tiny_checkpoint, tmp_path):
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


def test_it_is_imported_from_the_top():
    assert cogview.CogView is CogView
    with pytest.raises(AttributeError, match="no attribute 'CogVlew'"):
        _ = cogview.CogVlew
