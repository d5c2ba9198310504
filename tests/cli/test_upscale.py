"""``cogview upscale``: images of twice the side, their names and metadata, and unreadable images."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.image_io.png import read_metadata, save_png

FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"


@pytest.fixture
def upscale(run_command):
    """Return a function that runs the command: (status, printed files, stderr)."""

    def run(*arguments):
        status, lines, err = run_command("upscale", *arguments)
        return status, [Path(line) for line in lines], err

    return run


def codes(path):
    return np.array(read_metadata(path)["codes"].split(), dtype=int)


def test_upscale_doubles_the_side_of_an_image(upscale, save_image, tiny_model):
    image = save_image("fotos/狐狸?.png")
    settings = ("--temperature", "0.7", "--top-k", "50", "--top-p", "0.9", "--guidance", "2", "--text-attention", "1.5")
    status, files, err = upscale("fotos/狐狸?.png", "--prompt", FOX, "--seed", "7", "-o", "大", *settings)
    assert (status, files) == (0, [Path("大/狐狸-up-seed7.png")])
    [expected] = tiny_model.upscale(
        [image], FOX, seed=7, temperature=0.7, top_k=50, top_p=0.9, guidance=2.0, text_attention=1.5
    )
    assert np.asarray(Image.open(files[0])).shape == (128, 128, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), np.asarray(expected))
    np.testing.assert_array_equal(codes(files[0]), expected.codes.flat)
    texts = read_metadata(files[0])
    assert (texts["prompt"], texts["seed"], texts["task"], texts["source"]) == (FOX, "7", "upscale", "狐狸?.png")
    assert (texts["temperature"], texts["top_k"], texts["top_p"]) == ("0.7", "50", "0.9")
    assert (texts["guidance"], texts["text_attention"]) == ("2.0", "1.5")
    assert err == f"{tiny_model.name} on cpu, float32 (no GPU is used), seed 7\nupscaling 1 image\n"


def test_upscale_low_level_starts_from_half_the_side(upscale, save_image, tiny_model):
    image = save_image("a.png", size=(32, 32))
    _, [file], err = upscale("a.png", "--prompt", FOX, "--seed", "7", "--low-level")
    [expected] = tiny_model.upscale([image], FOX, seed=7, low_level=True)
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(expected))
    assert expected.size == (64, 64)
    assert "note:" not in err  # 32 x 32 is the size of its input


def test_upscale_gives_equal_images_for_any_batch(upscale, save_image, tiny_model):
    images = [save_image(f"{number}.png", number, size=(32, 32)) for number in range(3)]
    Path("1.png").write_text("no image")
    arguments = ("0.png", "1.png", "2.png", "--prompt", FOX, "--seed", "7", "--low-level")
    _, together, _ = upscale(*arguments, "-o", "a")
    _, apart, _ = upscale(*arguments, "-o", "b", "--max-inference-batch-size", "1")
    for files in (together, apart):
        assert [file.name for file in files] == ["0-up-seed7.png", "2-up-seed7.png"]
        for file, image in zip(files, (images[0], images[2]), strict=True):
            [alone] = tiny_model.upscale([image], FOX, seed=7, low_level=True)
            np.testing.assert_array_equal(codes(file), alone.codes.flat)


def test_upscale_reads_texts_and_images_from_a_file(upscale, save_image):
    for name in ("a/x.png", "b/x.png", "y.png"):
        save_image(name, len(name), size=(32, 32))
    lines = [f"{FOX}\ta/x.png", f" {DOG} \tb/x.png ", "no image here", f"{FOX}\ty.png\ta/x.png", f"{DOG * 3}\ty.png"]
    Path("input.txt").write_text("\n".join(lines), encoding="utf-8")
    status, files, err = upscale("--input", "input.txt", "--seed", "7", "--low-level")
    assert status == 1
    assert files == [Path("outputs/x-up-seed7.png"), Path("outputs/x-up-seed7_2.png")]
    assert [read_metadata(file)["prompt"] for file in files] == [FOX, DOG]
    assert [line for line in err.splitlines() if line.startswith("skipped: ")] == [
        "skipped: “no image here” comes with 0 images; expected TEXT<TAB>IMAGE",
        f"skipped: “{FOX}” comes with 2 images; expected TEXT<TAB>IMAGE",
        "skipped: the prompt “蓝色背景上的三只狗蓝色背景上的三只狗蓝色…” is 27 pieces long, 20 fit; shorten it",
    ]


def test_upscale_overwrites_equal_images(upscale, save_image):
    save_image("a.png", size=(32, 32))
    arguments = ("a.png", "--prompt", FOX, "--seed", "7", "--low-level")
    assert upscale(*arguments)[1] == upscale(*arguments)[1] == [Path("outputs/a-up-seed7.png")]
    assert os.listdir("outputs") == ["a-up-seed7.png"]


def test_upscale_reports_unreadable_images_at_the_end(upscale, save_image):
    save_image("fotos/a.png", size=(90, 60))
    Path("fotos/text.png").write_text("no image")
    status, files, err = upscale("none.png", "fotos", "--prompt", FOX, "--seed", "7", "--low-level")
    assert (status, files) == (1, [Path("outputs/a-up-seed7.png")])
    assert err.splitlines()[2:] == [
        "note: fotos/a.png: resized from 90 x 60 and cropped to 32 x 32",
        "failed: image none.png does not exist",
        "failed: fotos/text.png is no image that can be read; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM",
    ]


def test_upscale_fails_when_no_image_can_be_read(upscale):
    status, files, err = upscale("none.png", "--prompt", FOX)
    assert (status, files) == (2, [])
    assert err.splitlines()[-1] == "cogview upscale: image none.png does not exist"
    assert "failed" not in err


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "the prompt is empty; describe an image, for example 一个红苹果"),
        (DOG * 3, "the prompt “蓝色背景上的三只狗蓝色背景上的三只狗蓝色…” is 27 pieces long, 20 fit; shorten it"),
    ],
)
def test_upscale_skips_a_prompt_that_cannot_be_used(upscale, save_image, no_image_is_read, prompt, message):
    save_image("a.png")
    status, files, err = upscale("a.png", "--prompt", prompt)
    assert (status, files) == (2, [])
    assert err.splitlines()[1:] == [f"skipped: {message}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "image a.png holds no prompt, only images of cogview do: give --prompt TEXT"),
        (["--prompt", FOX, "--input", "blank.txt"], "--input holds texts and images: give either --input or --prompt "),
        (
            ["--prompt", FOX, "--max-inference-batch-size", "0"],
            "invalid value for '--max-inference-batch-size': \"0\" is not auto or a whole number from 1 on",
        ),
        (["--prompt", FOX, "--seed", "-1"], "the seed must be from 0 to 9223372036854775807, got -1"),
        (
            ["--prompt", FOX, "--temperature", "0"],
            "invalid value for '--temperature': 0.0 is not in the range x>0; see cogview upscale --help",
        ),
        (["--prompt", FOX, "--top-k", "-1"], "invalid value for '--top-k': -1 is not in the range x>=0"),
        (["--prompt", FOX, "--top-p", "2"], "invalid value for '--top-p': 2.0 is not in the range 0<x<=1"),
        (["--prompt", FOX, "--guidance", "-1"], "invalid value for '--guidance': -1.0 is not in the range x>=0"),
        (
            ["--prompt", FOX, "--text-attention", "0"],
            "invalid value for '--text-attention': 0.0 is not in the range x>0",
        ),
        (["--prompt", FOX, "-o", "blank.txt"], "the output folder blank.txt cannot be written: it is a file"),
        (["--prompt", FOX, "--model", "cogview-bse"], 'checkpoint "cogview-bse" is unknown; known: '),
    ],
)
def test_upscale_reports_mistakes_in_one_line(upscale, save_image, no_image_is_read, arguments, message):
    save_image("a.png")
    Path("blank.txt").write_text("\n")
    status, files, err = upscale("a.png", *arguments)
    assert (status, files) == (2, [])
    assert err.startswith(f"cogview upscale: {message}")
    assert err.count("\n") == 1


def test_upscale_takes_the_prompts_of_generated_images(upscale, save_image, tiny_model):
    """The command asked for a prompt that stood in the file."""
    save_image("photo.png")
    for name, prompt in (("fox.png", FOX), ("dogs.png", DOG)):
        [image] = tiny_model.generate(prompt, seed=3)
        save_png(Path(name), image, image.metadata("tiny"))
    status, files, err = upscale("fox.png", "photo.png", "dogs.png", "--low-level", "--seed", "7")
    assert (status, [read_metadata(file)["prompt"] for file in files]) == (1, [FOX, DOG]), err
    assert err.endswith("failed: image photo.png holds no prompt, only images of cogview do: give --prompt TEXT\n")


@pytest.mark.parametrize(("flags", "task"), [([], "upscale"), (["--low-level"], "low_level")])
def test_upscale_rejects_a_model_without_the_task(
    upscale, save_image, generation_checkpoint, no_image_is_read, flags, task
):
    save_image("a.png")
    status, files, err = upscale("a.png", "--prompt", FOX, "--model", str(generation_checkpoint), *flags)
    assert (status, files) == (2, [])
    assert err == (
        f"cogview upscale: {generation_checkpoint} was not trained for the task '{task}'; its tasks are: generate\n"
    )


def test_upscale_refuses_to_make_an_image_smaller(upscale, save_image):
    """A photo of 512 x 512 pixels became a mosaic of 128 x 128 with status 0."""
    save_image("photo.jpg", size=(512, 600))
    save_image("same.png", size=(128, 300))
    status, files, err = upscale("photo.jpg", "same.png", "--prompt", FOX, "--seed", "7")
    assert (status, files) == (1, [Path("outputs/same-up-seed7.png")])
    assert err.splitlines()[-1] == (
        "failed: image photo.jpg: 512 x 600 pixels are more than the 128 x 128 of an upscaled image; "
        "upscale it in tiles (cogview upscale --tiles) or scale it down to 64 x 64 first"
    )


def test_upscale_tiles_doubles_the_sides_of_a_large_image(upscale, save_image, tiny_model):
    image = save_image("wide.png", size=(70, 40))
    save_image("a.png", size=(32, 32))
    flags = ("--tiles", "--low-level", "--prompt", FOX, "--seed", "7", "--max-inference-batch-size", "2")
    status, files, err = upscale("wide.png", "a.png", *flags)
    assert (status, files) == (0, [Path("outputs/wide-up-seed7.png"), Path("outputs/a-up-seed7.png")])
    expected = tiny_model.upscale(image, FOX, seed=7, low_level=True, tiles=True)
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), np.asarray(expected))
    texts = read_metadata(files[0])
    assert (texts["task"], texts["tiles"], texts["source"]) == ("low_level", "3 x 2", "wide.png")
    assert err.endswith("upscaling 6 tiles\nupscaling 1 tile\n")


def test_upscale_tiles_notes_a_prompt_once(upscale, save_image):
    save_image("wide.png", size=(40, 32))
    _, _, err = upscale("wide.png", "--tiles", "--low-level", "--prompt", "ａｂｃ汽车", "--seed", "7")
    assert err.count("of its characters are unknown to the model") == 1


def test_upscale_tiles_reports_an_image_of_too_many_tiles_at_the_end(upscale, save_image):
    save_image("a.png", size=(32, 32))
    Image.new("RGB", (1568, 1568)).save("large.png")
    status, files, err = upscale("large.png", "a.png", "--tiles", "--low-level", "--prompt", FOX, "--seed", "7")
    assert (status, len(files)) == (1, 1)
    assert err.splitlines()[-1].startswith("failed: image large.png: 1568 x 1568 pixels are 4225 tiles of 32 x 32, ")
