"""``cogview complete``: the upper rows of an image are kept, the others are generated."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.image_io.png import read_metadata
from tests.factories import assert_on_sheet

FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"


@pytest.fixture
def complete(run_command):
    """Return a function that runs the command: (status, printed files, stderr)."""

    def run(*arguments):
        status, lines, err = run_command("complete", *arguments)
        return status, [Path(line) for line in lines], err

    return run


def codes(path):
    return np.array(read_metadata(path)["codes"].split(), dtype=int).reshape(8, 8)


def test_complete_keeps_the_upper_rows(complete, save_image, tiny_model):
    image = save_image("狐狸.png")
    settings = ("--temperature", "0.7", "--top-k", "50", "--top-p", "0.9", "--guidance", "2", "--text-attention", "1.5")
    status, files, err = complete("狐狸.png", "--rows", "5", "--prompt", FOX, "-n", "2", "--seed", "7", *settings)
    assert status == 0
    assert files == [Path("outputs", f"狐狸-rows5-seed7-{index}.png") for index in (0, 1)]
    expected = tiny_model.complete(
        [image], FOX, rows=5, n=2, seed=7, temperature=0.7, top_k=50, top_p=0.9, guidance=2.0, text_attention=1.5
    )
    for file, image in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(image))
        np.testing.assert_array_equal(codes(file)[:5], tiny_model.encode_images([image])[0, :5])
    assert (codes(files[0])[5:] != codes(files[1])[5:]).any()
    texts = read_metadata(files[1])
    assert (texts["prompt"], texts["seed"], texts["index"]) == (FOX, "7", "1")
    assert (texts["task"], texts["source"], texts["rows"]) == ("complete", "狐狸.png", "5")
    assert (texts["temperature"], texts["guidance"], texts["text_attention"]) == ("0.7", "2.0", "1.5")
    assert err == f"{tiny_model.name} on cpu, float32 (no GPU is used), seed 7\ngenerating 2 images\n"


def test_complete_equals_generate_when_no_rows_are_kept(complete, save_image, tiny_model):
    save_image("a.png")
    _, [file], _ = complete("a.png", "--rows", "0", "--prompt", FOX, "--seed", "7")
    np.testing.assert_array_equal(codes(file), tiny_model.generate(FOX, seed=7)[0].codes)


def test_complete_gives_equal_images_for_any_batch_size(complete, save_image):
    for number in range(3):
        save_image(f"{number}.png", number)
    arguments = ("*.png", "--rows", "6", "--prompt", DOG, "-n", "2", "--seed", "7", "--grid")
    _, together, _ = complete(*arguments, "-o", "a")
    assert [file.name for file in together] == [
        *(f"{number}-rows6-seed7-{index}.png" for number in range(3) for index in range(2)),
        "grid-seed7.png",
    ]
    assert_on_sheet(together[-1], together[:-1])
    texts = read_metadata(together[-1])
    assert (texts["task"], texts["source"], texts["n"]) == ("complete", "0.png\n1.png\n2.png", "2")
    for size in ("1", "3"):
        _, apart, _ = complete(*arguments, "-o", size, "--max-inference-batch-size", size)
        assert [file.name for file in apart] == [file.name for file in together]
        for file, other in zip(apart[:-1], together[:-1], strict=True):
            np.testing.assert_array_equal(codes(file), codes(other))


def test_complete_reports_unreadable_images_at_the_end(complete, save_image):
    save_image("a.png", size=(64, 80))
    Path("text.png").write_text("no image")
    status, files, err = complete("text.png", "a.png", "--rows", "7", "--prompt", FOX, "--seed", "7")
    assert (status, files) == (1, [Path("outputs/a-rows7-seed7-0.png")])
    assert err.splitlines()[2:] == [
        "note: a.png: cropped from 64 x 80 to 64 x 64",
        "failed: text.png is no image that can be read; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM",
    ]


def test_complete_fails_when_no_image_can_be_read(complete):
    status, files, err = complete("none.png", "--rows", "7", "--prompt", FOX, "--grid")
    assert (status, files) == (2, [])
    assert err.splitlines()[-1] == "cogview complete: image none.png does not exist"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "the prompt is empty; describe an image, for example 一个红苹果"),
        (DOG * 3, "the prompt “蓝色背景上的三只狗蓝色背景上的三只狗蓝色…” is 27 pieces long, 20 fit; shorten it"),
    ],
)
def test_complete_skips_a_prompt_that_cannot_be_used(complete, save_image, no_image_is_read, prompt, message):
    save_image("a.png")
    status, files, err = complete("a.png", "--rows", "7", "--prompt", prompt)
    assert (status, files) == (2, [])
    assert err.splitlines()[1:] == [f"skipped: {message}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "invalid value for '-n': 0 is not in the range 1<=x<=100000"),
        (
            ["--max-inference-batch-size", "0"],
            "invalid value for '--max-inference-batch-size': \"0\" is not auto or a whole number from 1 on",
        ),
        (["--seed", "-1"], "the seed must be from 0 to 9223372036854775807, got -1"),
        (["--top-p", "2"], "invalid value for '--top-p': 2.0 is not in the range 0<x<=1"),
        (["--guidance", "-1"], "invalid value for '--guidance': -1.0 is not in the range x>=0"),
        (["--text-attention", "0"], "invalid value for '--text-attention': 0.0 is not in the range x>0"),
        (["-o", "a.png"], "the output folder a.png cannot be written: it is a file"),
        (["--model", "cogview-bse"], 'checkpoint "cogview-bse" is unknown; known: '),
    ],
)
def test_complete_reports_mistakes_in_one_line(complete, save_image, no_image_is_read, arguments, message):
    save_image("a.png")
    status, files, err = complete("a.png", "--rows", "4", "--prompt", FOX, *arguments)
    assert (status, files) == (2, [])
    assert err.startswith(f"cogview complete: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("rows", ["-1", "8"])
def test_complete_rejects_rows_out_of_range(complete, save_image, no_image_is_read, rows):
    save_image("a.png")
    status, files, err = complete("a.png", "--rows", rows, "--prompt", FOX)
    assert (status, files) == (2, [])
    assert err.endswith(f"cogview complete: the rows to keep must be from 0 to 7, got {rows}\n")
    assert err.count("\n") == 1


def test_complete_requires_prompt(complete):
    status, _, err = complete("a.png", "--rows", "4")
    assert status == 2
    assert err.startswith("cogview complete: missing option '--prompt'; ")


@pytest.mark.parametrize("given", [[], ["--rows", "4", "--mask", "0,0,8,8"]])
def test_complete_requires_either_rows_or_mask(complete, given):
    message = "cogview complete: give either --rows COUNT, the rows to keep, or --mask, the part to generate\n"
    assert complete("a.png", "--prompt", FOX, *given) == (2, [], message)


def test_complete_rejects_guidance_when_the_model_had_no_caption_dropout(
    complete, save_image, generation_checkpoint, no_image_is_read
):
    save_image("a.png")
    arguments = ("a.png", "--rows", "4", "--prompt", FOX, "--guidance", "2", "--model", str(generation_checkpoint))
    status, files, err = complete(*arguments)
    assert (status, files) == (2, [])
    assert err.startswith(f"cogview complete: {generation_checkpoint} was trained without caption dropout, so it ")
    assert err.count("\n") == 1
