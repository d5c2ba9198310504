"""``cogview edit``, ``cogview vary`` and ``cogview complete --mask``: files, metadata, notes and mistakes."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.cli.main import main
from cogview.image_io.png import read_metadata
from tests.factories import assert_on_sheet

FOX, TURN = "一只狐狸在汽车的左边", "狐狸变成蓝色的狗"
SETTINGS = ("--temperature", "1.1", "--top-k", "60", "--seed", "7")


@pytest.fixture
def run(run_command, edit_checkpoint):
    """Return a function that runs a command with the model for edits: (status, printed files, stderr)."""

    def run(name, *arguments, model=edit_checkpoint):
        status, lines, err = run_command(name, "--model", str(model), *arguments)
        return status, [Path(line) for line in lines], err

    return run


def codes(path):
    return np.array(read_metadata(path)["codes"].split(), dtype=int).reshape(8, 8)


def same_images(files, expected):
    assert len(files) == len(expected)
    for file, image in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(image))
        np.testing.assert_array_equal(codes(file), image.codes)


def save_mask(path, box=(16, 16, 40, 48), size=(64, 64)):
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(path)


def test_edit_writes_what_python_returns(run, save_image, edit_model):
    """With mask, strength and settings of sampling, all of which the metadata name."""
    image = save_image("狐狸.png")
    save_mask("mask.png")
    status, files, err = run("edit", "狐狸.png", TURN, "--mask", "mask.png", "--strength", "0.5", "-n", "2", *SETTINGS)
    assert (status, files) == (0, [Path("outputs", f"狐狸-edit-seed7-{index}.png") for index in (0, 1)])
    settings = {"n": 2, "seed": 7, "temperature": 1.1, "top_k": 60}
    same_images(files, edit_model.edit(image, TURN, mask="mask.png", strength=0.5, **settings))
    texts = read_metadata(files[1])
    assert (texts["task"], texts["source"], texts["mask"], texts["strength"]) == ("edit", "狐狸.png", "mask.png", "0.5")
    assert (texts["prompt"], texts["seed"], texts["index"], texts["temperature"]) == (TURN, "7", "1", "1.1")
    assert texts["mask_codes"].split() == ["00000000"] * 2 + ["00111000"] * 4 + ["00000000"] * 2
    assert err == f"{edit_model.name} on cpu, float32 (no GPU is used), seed 7\nediting 2 images\n"


def test_edit_is_guided_by_image_and_text(run, save_image, edit_model):
    """With a mask, whose outside is kept; the metadata name both scales."""
    image = save_image("a.png")
    scales = ("--image-guidance", "1.5", "--guidance", "3")
    _, files, _ = run("edit", "a.png", TURN, "--mask", "16,16,24,32", *SETTINGS, *scales)
    settings = {"seed": 7, "temperature": 1.1, "top_k": 60, "image_guidance": 1.5, "guidance": 3}
    same_images(files, edit_model.edit(image, TURN, mask="16,16,24,32", **settings))
    texts = read_metadata(files[0])
    assert (texts["image_guidance"], texts["guidance"]) == ("1.5", "3.0")


def test_vary_writes_what_python_returns(run, save_image, edit_model):
    """Four variations of each image by default, and a contact sheet."""
    images = [save_image(f"{number}.png", number) for number in range(2)]
    status, files, err = run("vary", "0.png", "1.png", "--keep", "0.9", "--grid", *SETTINGS)
    assert status == 0
    names = [f"{number}-vary-seed7-{index}.png" for number in range(2) for index in range(4)]
    assert [file.name for file in files] == [*names, "grid-seed7.png"]
    same_images(files[:-1], edit_model.vary(images, keep=0.9, seed=7, temperature=1.1, top_k=60))
    assert_on_sheet(files[-1], files[:-1])
    texts = read_metadata(files[0])
    assert (texts["task"], texts["source"], texts["keep"], texts["prompt"]) == ("vary", "0.png", "0.9", "")
    assert texts.keys().isdisjoint({"strength", "mask", "mask_codes"})
    texts = read_metadata(files[-1])
    assert (texts["task"], texts["source"], texts["keep"], texts["n"]) == ("vary", "0.png\n1.png", "0.9", "4")
    assert err.endswith("varying 8 images\n")


def test_complete_fills_a_mask(run, save_image, edit_model):
    """The codes outside of the mask are those of the image."""
    image = save_image("a.png")
    status, files, err = run("complete", "a.png", "--mask", " 16, 16,24,32 ", "--prompt", FOX, *SETTINGS)
    assert (status, files) == (0, [Path("outputs/a-fill-seed7-0.png")])
    same_images(files, edit_model.fill(image, FOX, mask=(16, 16, 24, 32), seed=7, temperature=1.1, top_k=60))
    texts = read_metadata(files[0])
    assert (texts["task"], texts["source"], texts["mask"]) == ("fill", "a.png", "16,16,24,32")
    assert err.endswith("filling 1 image\n")


def test_results_are_the_same_for_any_batch_size(run, save_image):
    """Images of one command share batches; their masks are fitted as they are."""
    for number, size in enumerate([(64, 64), (128, 128), (64, 64)]):
        save_image(f"{number}.png", number, size=size)
    together = run("edit", "*.png", TURN, "--mask", "0,0,40,40", "-n", "2", *SETTINGS, "-o", "a")
    assert together[0] == 0
    assert [read_metadata(file)["mask_codes"].count("1") for file in together[1]] == [25, 25, 9, 9, 25, 25]
    for size in ("1", "4"):
        arguments = ("--mask", "0,0,40,40", "-n", "2", *SETTINGS, "-o", size, "--max-inference-batch-size", size)
        apart = run("edit", "*.png", TURN, *arguments)
        for file, other in zip(apart[1], together[1], strict=True):
            assert file.name == other.name
            np.testing.assert_array_equal(codes(file), codes(other))


def test_file_with_another_mask_gets_another_name(run, save_image):
    """Unlike an equal one, which is the same image."""
    save_image("a.png")
    arguments = ("edit", "a.png", TURN, *SETTINGS, "--mask")
    names = [run(*arguments, box)[1][0].name for box in ("0,0,8,8", "0,0,8,16", "0,0,8,8")]
    assert names == ["a-edit-seed7-0.png", "a-edit-seed7-0_2.png", "a-edit-seed7-0.png"]


def test_images_that_do_not_fit_the_mask_are_reported_at_the_end(run, save_image):
    """The others are edited, and the status is 1."""
    save_image("a.png")
    save_image("wide.png", size=(96, 64))
    Path("text.png").write_text("no image")
    save_mask("mask.png")
    status, files, err = run("edit", "wide.png", "a.png", "text.png", TURN, "--mask", "mask.png", *SETTINGS)
    assert (status, [file.name for file in files]) == (1, ["a-edit-seed7-0.png"])
    assert err.splitlines()[-2:] == [
        "failed: text.png is no image that can be read; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM",
        "failed: mask: it is 64 x 64 pixels, and wide.png is 96 x 64; expected the same size",
    ]


def test_mask_of_a_photograph_is_fitted_as_the_photograph_is(run, save_image, edit_model):
    """A source of another size and mode."""
    save_image("wide.png", size=(192, 128)).convert("L").save("grey.png")
    save_mask("mask.png", box=(0, 64, 192, 128), size=(192, 128))
    status, files, err = run("complete", "grey.png", "--mask", "mask.png", "--prompt", FOX, *SETTINGS)
    assert status == 0
    assert "note: grey.png: resized from 192 x 128 and cropped to 64 x 64\n" in err
    np.testing.assert_array_equal(codes(files[0])[:4], edit_model.encode_images("grey.png")[:4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "a.png", TURN, "--strength", "0"], "invalid value for '--strength': 0.0 is not in the range 0<x<=1"),
        (["edit", "a.png", TURN, "--strength", "2"], "invalid value for '--strength': 2.0 is not in the range 0<x<=1"),
        (["edit", "a.png", TURN, "--mask", "none.png"], "image none.png does not exist\n"),
        (["edit", "a.png", TURN, "--mask", "text.png"], "text.png is no image that can be read; expected PNG, JPEG"),
        (["edit", "a.png", TURN, "--mask", "."], ". is a folder, expected an image file\n"),
        (["edit", "a.png", TURN, "--mask", ""], "--mask: the name is empty; expected an image, a bool array"),
        (["edit", "a.png", TURN, "--mask", "1,2,3"], "--mask: expected a box x,y,w,h in whole pixels, w and h from"),
        (["edit", "a.png", TURN, "-n", "0"], "invalid value for '-n': 0 is not in the range 1<=x<=100000"),
        (["edit", "a.png", " "], "the instruction is empty; say what to change, for example 把苹果变成绿色\n"),
        (["edit", "a.png", "a.png"], "a.png is a file: write the instruction after the images\n"),
        (["edit", "a.png"], "missing argument 'IMAGE...'; "),
        (
            ["edit", "a.png", "红" * 30],
            "the prompt “红红红红红红红红红红红红红红红红红红红红…” is 30 pieces long, 20 fit",
        ),
        (["vary", "a.png", "--keep", "1.5"], "invalid value for '--keep': 1.5 is not in the range 0<=x<=1"),
        (["vary", "a.png", "--keep", "-0.5"], "invalid value for '--keep': -0.5 is not in the range 0<=x<=1"),
        (["vary", "a.png", "--guidance", "3"], "the task 'vary' has no text that could guide it: guidance must be 1"),
        (["vary"], "missing argument 'IMAGE...'; "),
    ],
)
def test_mistakes_are_reported_in_one_line(run, save_image, no_image_is_read, arguments, message):
    """Before an image is read, without a traceback or an output folder."""
    save_image("a.png")
    Path("text.png").write_text("no image")
    status, files, err = run(*arguments)
    assert (status, files) == (2, [])
    assert err.startswith(f"cogview {arguments[0]}: {message}")
    assert err.count("\n") == 1
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["edit", TURN, "--mask", "small.png"],
            "mask: it is 32 x 32 pixels, and a.png is 64 x 64; expected the same size",
        ),
        (
            ["edit", TURN, "--mask", "black.png"],
            "mask: it is empty, so nothing would change; paint what may change in ",
        ),
        (["edit", TURN, "--mask", "60,0,9,9"], "mask: the box 60,0,9,9 reaches beyond the 64 x 64 pixels of a.png"),
        (["complete", "--prompt", FOX, "--mask", "0,0,64,64"], "mask: it covers the whole image, so nothing would be "),
        (["complete", "--prompt", FOX, "--mask", "white.png"], "mask: it covers the whole image, so nothing would be "),
    ],
)
def test_mask_that_does_not_fit_the_only_image_is_a_mistake(run, save_image, arguments, message):
    """One line after the header, status 2, and no file."""
    save_image("a.png")
    save_mask("small.png", size=(32, 32))
    save_mask("black.png", box=(0, 0, 0, 0))
    save_mask("white.png", box=(0, 0, 64, 64))
    name, *rest = arguments
    status, files, err = run(name, "a.png", *rest)
    assert (status, files) == (2, [])
    assert err.splitlines()[1:] == [err.splitlines()[-1]]
    assert err.splitlines()[-1].startswith(f"cogview {name}: {message}")


@pytest.mark.parametrize(
    ("arguments", "task"),
    [
        (["edit", "a.png", TURN], "'edit'"),
        (["complete", "a.png", "--mask", "0,0,8,8", "--prompt", FOX], "'fill'"),
        (["vary", "a.png"], "'fill', which 'vary' needs"),
    ],
)
def test_weights_without_the_task_are_refused(run, save_image, no_image_is_read, tiny_checkpoint, arguments, task):
    """The line names the tasks of the model."""
    save_image("a.png")
    status, files, err = run(*arguments, model=tiny_checkpoint)
    tasks = "its tasks are: generate, caption, upscale, low_level"
    message = f"cogview {arguments[0]}: {tiny_checkpoint} was not trained for the task {task}; {tasks}\n"
    assert (status, files, err) == (2, [], message)


@pytest.mark.parametrize(
    "arguments",
    [
        ["edit", "a.png", TURN, "--mask", "mask.png", "--strength", "0.7", "-n", "2"],
        ["edit", "a.png", "b.png", TURN, "--grid"],
        ["edit", "a.png", TURN, "--image-guidance", "1.5", "--guidance", "3"],
        ["edit", "a.png", "--", "-" + TURN],
        ["complete", "a.png", "--mask", "0,0,40,8", "--prompt", FOX, "-n", "2", "--grid"],
        ["vary", "a.png", "--keep", "0.1", "-n", "3"],
        ["vary", "a.png", "b.png", "--grid"],
    ],
)
def test_info_prints_the_command_that_makes_an_image_again(run, save_image, capsys, edit_checkpoint, arguments):
    """The command of each file writes its pixels and its metadata, and that of a contact sheet writes the sheet."""
    save_image("a.png")
    save_image("b.png", 1)
    save_mask("mask.png")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    status, files, _ = run(*arguments[:at], *SETTINGS, "-o", "first", *arguments[at:])
    assert status == 0
    for file in files:
        assert main(["info", str(file)]) == 0
        facts = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
        words = shlex.split(facts["command"].strip())[1:]
        model = words.index("--model")
        assert words[model + 1] == edit_checkpoint.name
        words[model + 1] = str(edit_checkpoint)
        words[1:1] = ["-o", "again", "--device", "cpu"]
        assert main(words) == 0
        capsys.readouterr()
        again = Path("again") / file.name
        np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(file)))
        texts, others = read_metadata(again), read_metadata(file)
        texts.pop("log_probability", None)  # rounded otherwise in a batch of another size
        assert texts.items() <= others.items()
