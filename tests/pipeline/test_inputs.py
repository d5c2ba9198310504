"""Arguments of the Python API: every usual form means the same, and anything else is refused in one line."""

import io
import math
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview import InputError, Sampling
from cogview.generation.requests import DecodingStopped
from cogview.pipeline.inputs import list_adapters, list_images, load_image, option_text
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import Caption, GeneratedImage, Score


@pytest.fixture
def photo(save_image, tmp_path):
    """Return an image of the model's size, and the file that holds it."""
    return save_image(tmp_path / "照片.png"), tmp_path / "照片.png"


def forms(image, path):
    """Return one image in every form, by name."""
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, dtype=np.uint8)])
    return {
        "text": str(path),
        "path": path,
        "pil": image,
        "uint8 array": pixels,
        "rgba array": opaque,
        "float array": pixels / 255,
        "array of another layout": np.asfortranarray(pixels)[::1],
        "uint8 tensor": tensor,
        "float tensor": tensor / 255,
        "bfloat16 tensor": (tensor / 255).double(),
        "tensor of a graph": (tensor / 255).requires_grad_(),
        "non-contiguous tensor": (tensor / 255).transpose(1, 2).contiguous().transpose(1, 2),
    }


def test_open_image_gives_equal_pixels_for_every_form(photo):
    image, path = photo
    for name, form in forms(image, path).items():
        np.testing.assert_array_equal(np.asarray(load_image(form).convert("RGB")), np.asarray(image), err_msg=name)


@pytest.mark.parametrize("shape", [(64, 48), (64, 48, 1)])
def test_open_image_takes_greys(shape):
    greys = np.arange(64 * 48, dtype=np.int64).astype(np.uint8).reshape(shape)
    assert load_image(greys).mode == "L"
    assert load_image(greys).size == (48, 64)
    tensor = torch.from_numpy(greys.reshape(1, 64, 48))
    np.testing.assert_array_equal(np.asarray(load_image(tensor)), greys.reshape(64, 48))


def test_open_image_turns_by_exif_as_files_are(tmp_path):
    """A photograph of a phone, opened by the user: the same image as by its path."""
    image = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.int64).astype(np.uint8).reshape(60, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(load_image(Image.open(tmp_path / "turned.png"))), np.asarray(load_image(tmp_path / "turned.png"))
    )
    assert load_image(Image.open(tmp_path / "turned.png")).size == (60, 40)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 8, 8), 255.0), r"floats in \[0, 1\], got 255 to 255; divide by 255, or convert to uint8"),
        (torch.full((3, 8, 8), -1.0), r"floats in \[0, 1\], got -1 to -1; for values from -1 to 1 use \(x \+ 1\) / 2"),
        (torch.full((3, 8, 8), math.nan), r"floats in \[0, 1\], got nan to nan"),
        (np.full((8, 8, 3), np.inf), r"floats in \[0, 1\], got inf to inf"),
        (torch.zeros(8, 8, 3), r"a tensor \(3, H, W\) .*got a float32 tensor \(8, 8, 3\); .*use permute\(2, 0, 1\)"),
        (np.zeros((3, 8, 8), np.uint8), r"an array \(H, W, 3\) .*got a uint8 array \(3, 8, 8\); .*use transpose"),
        (torch.zeros(8, 8), r"a tensor \(3, H, W\) .*got a float32 tensor \(8, 8\)"),
        (torch.zeros(4, 8, 8), r"got a float32 tensor \(4, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"got an int64 tensor \(3, 8, 8\); convert values from 0 to 255 to"),
        (np.zeros((8, 8, 3), np.int32), r"got an int32 array \(8, 8, 3\); convert values from 0 to 255 to uint8"),
        (np.zeros((8, 8), bool), r"got a bool array \(8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), "the image has no pixels"),
        (torch.zeros(2, 3, 8, 8), "a batch stands alone, not in a list"),
        (Path("missing.png"), "image missing.png does not exist"),
        (b"\x89PNG", r"got bytes; open them with PIL.Image.open\(io.BytesIO\(data\)\)"),
        (None, r"must be a path, a PIL image, an array \(H, W, 3\) or a tensor \(3, H, W\), got None"),
    ],
)
def test_open_image_refuses(image, message):
    """Values, axes, types: never misread, always with what came."""
    with pytest.raises(InputError, match=message):
        load_image(image)


def test_open_image_refuses_pil_image_that_cannot_be_read(tmp_path):
    """PIL reads pixels late: of a file that is cut off, or closed by now."""
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    with pytest.raises(InputError, match="the image is a PIL image that cannot be read: "):
        load_image(Image.open(io.BytesIO(whole.getvalue()[:500])))
    with Image.open(whole) as closed:
        pass
    with pytest.raises(InputError, match="the image is a PIL image that cannot be read: "):
        load_image(closed)


def test_list_images_distinguishes_one_from_many(photo):
    """A batch is many; one of an iterator too."""
    image, path = photo
    pixels = np.asarray(image)
    for one in forms(image, path).values():
        assert list_images(one) == ([one], True) or isinstance(one, np.ndarray | torch.Tensor)
        assert list_images(one)[1]
    for many in (
        [path],
        (image, path),
        np.stack([pixels]),
        torch.zeros(1, 3, 8, 8),
        iter([image]),
        [],
        np.array([str(path)]),
    ):
        assert not list_images(many)[1]
    assert [item.shape for item in list_images(torch.zeros(2, 3, 8, 8))[0]] == [(3, 8, 8)] * 2


@pytest.mark.parametrize("images", [None, 5, {"a": 1}, {"a.png"}, b"a", [1.0], ["a.png", None], object()])
def test_list_images_refuses_what_is_no_image(images):
    with pytest.raises(InputError, match=r"^images(\[\d\])? must be a path, a PIL image, .*got "):
        list_images(images)


# Methods: one image has one result, a list has a list


def test_caption_takes_one_image_or_many(tiny_model, photo):
    image, path = photo
    expected = tiny_model.caption([image], seed=7)
    assert isinstance(expected[0][0], Caption)
    assert tiny_model.caption(image, seed=7) == expected[0]
    assert tiny_model.caption(str(path), seed=7) == expected[0]
    assert tiny_model.caption([path, np.asarray(image)], seed=7, batch_size=1) == expected * 2
    assert tiny_model.caption(np.asarray(image)[None], seed=7) == expected
    assert len(tiny_model.caption(path, n=2)) == 2  # by beams, as the command does
    assert tiny_model.caption([]) == []


def test_score_takes_one_image_or_many(tiny_model, photo):
    image, path = photo
    expected = tiny_model.score([image], "狐狸")
    assert isinstance(expected[0], Score)
    assert tiny_model.score(path, "狐狸") == expected[0]
    assert tiny_model.score([path, image], ["狐狸", "狗"])[0].num_pieces == 2


def test_upscale_takes_one_image_or_many(tiny_model, photo):
    image, path = photo
    one = tiny_model.upscale(str(path), "狐狸", seed=7)  # a str has a method "index", which is no number of an image
    (same,) = tiny_model.upscale([image], "狐狸", seed=7)
    assert isinstance(one, GeneratedImage)
    np.testing.assert_array_equal(one.codes, same.codes)


def test_complete_takes_one_image_or_many(tiny_model, photo):
    """The list is flat in both cases, since an image may have several completions."""
    image, path = photo
    one, many = (
        tiny_model.complete(path, "狐狸", rows=4, n=2, seed=7),
        tiny_model.complete([image], "狐狸", rows=4, n=2, seed=7),
    )
    assert [each.index for each in one] == [0, 1]
    np.testing.assert_array_equal([each.codes for each in one], [each.codes for each in many])


def test_encode_and_decode_images_take_one_or_many(tiny_model, photo):
    image, path = photo
    codes = tiny_model.encode_images(path)
    np.testing.assert_array_equal(tiny_model.encode_images([image])[0], codes)
    pixels = tiny_model.decode_images(codes)
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    for form in (codes[None], torch.from_numpy(codes)[None], codes.astype(np.int32)[None], codes[None].tolist()):
        np.testing.assert_array_equal(tiny_model.decode_images(form)[0], pixels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[8192]], "codes must be from 0 to 8191, the codes of the codebook, got 8192"),
        ([[-1]], "codes must be from 0 to 8191, .*got -1"),
        ([[0.5]], "codes must be an array of integers from 0 to 8191, got a list"),
        (np.zeros(8, int), r"codes must be \(B, G, G\) or \(G, G\), got an int64 array \(8,\)"),
        (None, "codes must be an array of integers from 0 to 8191, got None"),
    ],
)
def test_decode_images_refuses_codes(tiny_model, codes, message):
    with pytest.raises(InputError, match=message):
        tiny_model.decode_images(codes)


def test_texts_default_to_prompts_of_generated_images(tiny_model):
    """A generated image knows what it shows; another image does not."""
    images = tiny_model.generate(["狐狸", "狗"], seed=7)
    assert tiny_model.score(images) == tiny_model.score(images, ["狐狸", "狗"])
    assert tiny_model.upscale(images[0], seed=7).prompt == "狐狸"
    assert tiny_model.complete(images[1], rows=7, seed=7)[0].prompt == "狗"
    with pytest.raises(InputError, match=r"images\[1\] was not generated here and has no prompt: give its text"):
        tiny_model.score([images[0], Image.new("RGB", (64, 64))])


def test_rerank_orders_images_of_any_form(tiny_model, save_image, tmp_path):
    """The items are returned as they were given, as ``sorted`` does."""
    for number in range(3):
        save_image(tmp_path / f"{number}.png", number)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    scores = [score.log_probability for score in tiny_model.score(paths, "狐狸")]
    assert tiny_model.rerank(paths, "狐狸") == [paths[index] for index in np.argsort(scores)[::-1]]
    generated = tiny_model.generate("狐狸", n=3, seed=7)
    ranked = tiny_model.rerank(generated)
    assert [image.score for image in ranked] == tiny_model.score(ranked)


def test_edited_image_is_encoded_anew(tiny_model):
    """Codes of the original would caption what is no longer there."""
    image = tiny_model.generate("狐狸", seed=7)[0]
    assert not image.is_edited
    image.paste("white", (0, 0, 64, 32))
    assert image.is_edited
    np.testing.assert_array_equal(tiny_model.encode_images(image), tiny_model.encode_images(np.asarray(image)))


def test_image_of_another_model_is_encoded_anew(tiny_model):
    """Codes mean nothing in another codebook, although the grid is the same."""
    image = tiny_model.generate("狐狸", seed=7)[0]
    assert image.codebook_sha256 == tiny_model.config.codebook_sha256 != ""
    image.codebook_sha256 = "0" * 64
    np.testing.assert_array_equal(tiny_model.encode_images(image), tiny_model.encode_images(np.asarray(image)))
    assert (tiny_model.encode_images(image) != image.codes).any()


# Seeds, prompts and numbers


def test_seed_is_one_for_all_or_one_for_each(tiny_model):
    prompts = ["狐狸", "狗"]
    images = tiny_model.generate(prompts, n=2, seed=[7, 8])
    assert [image.seed for image in images] == [7, 7, 8, 8]
    np.testing.assert_array_equal(images[3].codes, tiny_model.generate("狗", n=2, seed=8)[1].codes)
    assert [image.seed for image in tiny_model.generate(prompts, seed=np.int32(5))] == [5, 5]
    assert [image.seed for image in tiny_model.generate(prompts, seed=torch.tensor([3, 4]))] == [3, 4]
    assert [image.seed for image in tiny_model.complete(images[:2], "狗", rows=7, seed=(1, 2))] == [1, 2]


GENERATE_FAULTS = [
    ({"prompts": None}, "prompts must be a text or a list of texts, got None"),
    ({"prompts": 5}, "prompts must be a text or a list of texts, got 5"),
    ({"prompts": ["狗", None]}, r"prompts\[1\] must be a text, got None"),
    ({"prompts": b"dog"}, "prompts must be a text or a list of texts, got bytes"),
    ({"prompts": {"狗": 1}}, "prompts must be a text or a list of texts, got a dict"),
    ({"seed": [7, 8]}, "1 prompts need one seed or 1, got 2"),
    ({"seed": torch.Generator()}, r"got a torch.Generator: pass generator.initial_seed\(\)"),
    ({"seed": "7"}, "the seed must be a whole number from 0 to 9223372036854775807, got the text '7'"),
    ({"seed": 7.0}, "the seed must be a whole number .*got 7.0"),
    ({"seed": True}, "the seed must be a whole number .*got True"),
    ({"seed": [2**63]}, r"seed\[0\] must be from 0 to"),
    ({"n": 2.0}, "the number of images must be a whole number from 1 to 100000, got 2.0"),
    ({"n": "2"}, "the number of images must be a whole number .*got the text '2'"),
    ({"n": 2, "keep": 0}, "keep must be from 1 to 2, got 0"),
    ({"batch_size": "auto"}, "the batch size must be a whole number at least 1, got the text 'auto'"),
    ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ({"top_k": 5.5}, "top_k must be a whole number, got 5.5"),
    ({"sampling": {"top_k": 5}}, "sampling must be a Sampling, got a dict"),
    ({"callback": 5}, "callback must be a function of a GenerationProgress, got 5"),
]


@pytest.mark.parametrize(("settings", "message"), GENERATE_FAULTS)
def test_generate_refuses_wrong_type(tiny_model, settings, message):
    """One line with what came and what was expected, never an inner error of Python."""
    with pytest.raises(InputError, match=message):
        tiny_model.generate(**{"prompts": "狐狸", **settings})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"seed": None}, "the seed must be a whole number"),
        ({"seed": 1, "prompt": None}, "the prompt must be a text, got None"),
        ({"seed": 1, "prompt": ""}, "the prompt is empty"),
        ({"seed": 1, "sampling": {"top_k": 2}}, "sampling must be a Sampling, got a dict"),
        ({"seed": 1, "task": "draw"}, "was not trained for the task 'draw'"),
        ({"seed": 1, "task": "caption"}, "layout 'caption'"),
        ({"seed": 1, "task": "upscale", "prompt": "狗"}, "the task 'upscale' needs the codes of an image"),
        ({"seed": 1, "task": "caption", "codes": np.zeros((3, 3), int)}, "layout 'caption'"),
        ({"seed": 1, "prompt": "狗", "codes": np.zeros((8, 8), int)}, "gives all codes, so that none are left to gen"),
        ({"seed": 1, "task": "caption", "codes": np.full((8, 8), 9000)}, r"requests\[0\].codes must be from 0 to 8191"),
    ],
)
def test_run_refuses_request(tiny_model, request_, message):
    with pytest.raises(InputError, match=message):
        list(tiny_model.run([GenerationRequest(**request_)]))


def test_run_refuses_what_is_no_request(tiny_model):
    with pytest.raises(InputError, match=r"requests must be a list of GenerationRequest, got a cogview\.GenerationReq"):
        tiny_model.run(GenerationRequest(prompt="狗", seed=1))
    with pytest.raises(InputError, match=r"requests\[0\] must be a GenerationRequest, got the text '狗'"):
        tiny_model.run(["狗"])


# Callbacks


@pytest.mark.parametrize(
    ("call", "last_call", "num_finished"),
    [
        (lambda model, images, **settings: model.score(images, "狗", **settings), 2, 2),
        (lambda model, images, **settings: model.caption(images, n=2, seed=7, **settings), 2, 2),
        (lambda model, images, **settings: model.caption(images, seed=7, **settings), 4, 1),  # three calls an image
    ],
    ids=["score", "beams", "greedy"],
)
def test_callback_stops_and_keeps_what_is_finished(tiny_model, photo, monkeypatch, call, last_call, num_finished):
    """The images up to there have their results."""
    monkeypatch.setattr(tiny_model, "speculative", 1)
    image, _ = photo
    calls = []

    def on_progress(progress):
        calls.append((progress.done, progress.total, progress.num_new))
        assert progress.codes()[0].shape == (8, 8)
        return len(calls) < last_call

    found = call(tiny_model, [image] * 3, batch_size=1, callback=on_progress)
    assert found == call(tiny_model, [image] * 3, batch_size=1)[:num_finished]
    assert len(calls) == last_call


def test_callback_that_stops_before_the_only_result_raises(tiny_model, photo):
    """There is nothing to return, and a ranking needs all scores."""
    image, _ = photo
    for call in (tiny_model.upscale, tiny_model.caption):
        texts = ["狗"] if call == tiny_model.upscale else []
        with pytest.raises(DecodingStopped, match="the callback returned False before the image was finished"):
            call(image, *texts, callback=lambda progress: False)
    with pytest.raises(DecodingStopped, match="the callback stopped after 1 of 2 images: none are ranked"):
        tiny_model.rerank([image, image], "狗", callback=lambda progress: False)


# Results


def test_generated_image_survives_pickle_and_deepcopy(tiny_model):
    """All that it carries goes to another process."""
    image = tiny_model.generate("狐狸", seed=7)[0]
    image.score = tiny_model.score(image)
    for other in (pickle.loads(pickle.dumps(image)), deepcopy(image)):
        assert (other.prompt, other.seed, other.index, other.sampling) == ("狐狸", 7, 0, image.sampling)
        assert (other.score, other.log_probability) == (image.score, image.log_probability)
        np.testing.assert_array_equal(other.codes, image.codes)
        assert other.tobytes() == image.tobytes()
        assert not other.is_edited


def test_repr_is_informative(tiny_model):
    assert repr(tiny_model.generate("狐狸", seed=7)[0]) == "<GeneratedImage 64 x 64 “狐狸” seed=7 index=0>"
    assert repr(tiny_model).startswith(f"<CogView {tiny_model.name}, 0.3 million parameters, 64 x 64 pixels, tasks gen")
    assert repr(tiny_model).endswith(", cpu, float32>")
    assert "codes" not in repr(GenerationRequest(prompt="狗", seed=1, codes=np.zeros((8, 8), int)))


def test_from_pretrained_takes_objects_of_torch(tiny_checkpoint):
    """A device and a dtype are given as texts or as torch has them."""
    from cogview import CogView

    model = CogView.from_pretrained(tiny_checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert model.placement.dtype == torch.bfloat16
    faults = (
        ({"name": None}, "name must be a text, got None"),
        ({"device": 5.0}, "device must be a text, got 5.0"),
        ({"adapter": 5}, "adapter must be a text, got 5"),
        ({"adapter": ["style", None]}, "adapter must be a text, got None"),
        ({"adapter": {"style": "half"}}, "the scale of an adapter must be a number, got the text 'half'"),
        ({"adapter": {"style": 10**400}}, "the scale of an adapter must be from -100 to 100, got inf for style"),
        ({"kv_dtype": None}, "kv_dtype must be a text, got None"),
    )
    for wrong, message in faults:
        with pytest.raises(InputError, match=message):
            CogView.from_pretrained(**wrong)


def test_option_text_strips_the_module_of_a_dtype_alone():
    """A model or an adapter in a folder torch.something lost a part of its name."""
    assert option_text(torch.bfloat16, "dtype", torch.dtype) == "bfloat16"
    assert option_text("torch.fox", "name") == "torch.fox"
    assert option_text(Path("torch.fox/a"), "name", os.PathLike) == "torch.fox/a"
    assert list_adapters("torch.style:0.5")[0].name == "torch.style"


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        (None, []),
        ("style:0.5", [("style", 0.5)]),
        (Path("runs/style:7"), [("runs/style:7", 1.0)]),
        (["style:0.5", Path("other")], [("style", 0.5), ("other", 1.0)]),
        ({"step:7": 0.5, Path("other"): 2}, [("step:7", 0.5), ("other", 2.0)]),
    ],
)
def test_list_adapters_takes_texts_paths_lists_and_mappings(adapters, expected):
    """A scale stands behind a text alone: a path and a key of a mapping are names as they are."""
    assert [(choice.name, choice.scale) for choice in list_adapters(adapters)] == expected


def test_cogview_says_how_a_model_is_opened():
    """The constructor takes what a checkpoint holds."""
    from cogview import CogView

    with pytest.raises(
        InputError, match=r"CogView.from_pretrained\(name\) opens a model, got the text 'cogview-emoji'"
    ):
        CogView("cogview-emoji")


def test_unknown_task_is_refused(tiny_model):
    for call in (
        tiny_model.image_size,
        tiny_model.transformer_for,
        lambda task: tiny_model.encode_images([], task=task),
        lambda task: tiny_model.sampling(task=task),
    ):
        with pytest.raises(InputError, match="the task 'draw' is unknown; known: generate, complete"):
            call("draw")


def test_sampling_refuses_values_of_another_type():
    assert Sampling(top_k=3, temperature=np.float32(0.5), guidance=2).top_k == 3
    for settings, message in (
        ({"top_k": "5"}, "top_k must be a whole number, got '5'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_p": True}, "top_p must be a number, got True"),
    ):
        with pytest.raises(InputError, match=message):
            Sampling(**settings)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_generates(tiny_checkpoint):
    """OpenMP's threads of the parent are missing in the child, which waited for them for ever."""
    program = f"""
import os, signal, torch
torch.set_num_threads(2)
from cogview import CogView
model = CogView.from_pretrained({str(tiny_checkpoint)!r}, device="cpu")
image = model.image_tokenizer.decode(torch.zeros(8, 32, 32, dtype=torch.int64))  # large enough for both threads
if not (child := os.fork()):
    signal.alarm(20)
    again = model.image_tokenizer.decode(torch.zeros(8, 32, 32, dtype=torch.int64))
    os._exit(not torch.allclose(again, image, atol=1e-5))
raise SystemExit(os.waitpid(child, 0)[1])
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False, timeout=120).returncode == 0


def test_upscale_warns_about_an_image_that_becomes_smaller(tiny_model, save_image, tmp_path, caplog):
    """A command for "twice the side" that returns less is said, not found out."""
    save_image(tmp_path / "照片.png", size=(512, 400))
    assert tiny_model.upscale(tmp_path / "照片.png", "狗", seed=7).size == (128, 128)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "images[0]: resized from 512 x 400 and cropped to 64 x 64, the model's size; the upscaled image is 128 x 128"
    ]
    caplog.clear()
    with caplog.at_level("INFO", logger="cogview.pipeline"):
        tiny_model.caption(tmp_path / "照片.png")
    assert "images[0]: resized from 512 x 400 and cropped to 64 x 64" in caplog.messages
