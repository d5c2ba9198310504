"""``scripts/super_resolution.py``: a text and an image in, an image of twice the side out."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.image_io.png import read_metadata

FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"
LOW_LEVEL = ("--generation-task", "low-level super-resolution")


@pytest.fixture
def run_upscale(run_script):
    """Return a function that runs the script: (status, files, stderr)."""

    def run(*arguments, script="super_resolution"):
        status, lines, err = run_script(script, *arguments)
        return status, [Path(line) for line in lines], err

    return run


@pytest.mark.parametrize("script", ["super_resolution", "generate_samples"])
@pytest.mark.parametrize(("task", "side"), [("super-resolution", 64), ("low-level super-resolution", 32)])
def test_super_resolution_accepts_the_command_line_of_v1(
    run_upscale, v1_flags, save_image, tiny_model, script, task, side
):
    """The flags are those of its scripts/super_resolution.sh and low_level_super_resolution.sh."""
    image = save_image("狐狸.png", size=(side, side))
    Path("input.txt").write_text(f"{FOX}\t狐狸.png\n", encoding="utf-8")
    options = ("--generation-task", task, "--input-source", "input.txt", "--output-path", "samples_sr")
    status, files, err = run_upscale(*v1_flags, *options, script=script)
    assert (status, files) == (0, [Path("samples_sr/狐狸-up-seed1234.png")])
    settings = {"seed": 1234, "temperature": 1.0, "top_k": 200, "top_p": 1.0}
    [expected] = tiny_model.upscale([image], FOX, low_level=side == 32, **settings)
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), np.asarray(expected))
    assert expected.size == (2 * side, 2 * side)
    assert ": resized" not in err


def test_super_resolution_names_folders_by_ids_and_skips_invalid_lines(run_upscale, save_image):
    save_image("a.png", size=(32, 32))
    lines = [f"0017\t{FOX}\ta.png", f"../up\t{DOG}\ta.png", f"3\t{FOX}", "no id", f"4\t{DOG * 3}\ta.png"]
    Path("input.txt").write_text("\n".join(lines), encoding="utf-8")
    status, files, err = run_upscale(*LOW_LEVEL, "--input-source", "input.txt", "--with-id")
    assert status == 1
    assert files == [Path("samples", folder, "a-up-seed1234.png") for folder in ("0017", "up")]
    assert [read_metadata(file)["prompt"] for file in files] == [FOX, DOG]
    assert [line for line in err.splitlines() if line.startswith("skipped: ")] == [
        "skipped: the line “no id” has no id; expected ID<TAB> before the query",
        f"skipped: “{FOX}” comes with 0 images; expected TEXT<TAB>IMAGE",
        "skipped: the prompt “蓝色背景上的三只狗蓝色背景上的三只狗蓝色…” is 27 pieces long, 20 fit; shorten it",
    ]


def test_super_resolution_reports_unreadable_images_at_the_end(run_upscale, save_image):
    save_image("a.png", size=(32, 32))
    Path("input.txt").write_text(f"{FOX}\tnone.png\n{FOX}\ta.png\n", encoding="utf-8")
    status, files, err = run_upscale(*LOW_LEVEL, "--input-source", "input.txt")
    assert (status, files) == (1, [Path("samples/a-up-seed1234.png")])
    assert err.endswith("failed: image none.png does not exist\n")


def test_super_resolution_asks_for_texts_and_images(run_upscale, save_image, monkeypatch):
    save_image("a.png", size=(32, 32))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{FOX}\tnone.png\n{DOG}\ta.png\nstop\n"))
    status, files, err = run_upscale(*LOW_LEVEL)
    assert (status, files) == (0, [Path("samples/a-up-seed1234.png")])
    assert "Which text and image? TEXT<TAB>IMAGE (“stop” ends)" in err
    assert "skipped: image none.png does not exist\n" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--generation-task", "text2image"],
            "--generation-task text2image is unknown; known: super-resolution, low-level super-resolution\n",
        ),
        (["--input-source", "none.txt"], "cannot read none.txt: No such file or directory"),
        (["--top_p", "2"], "--top_p must be in (0, 1], got 2.0"),
        (["--load", "cogview-bse"], 'checkpoint "cogview-bse" is unknown; known: '),
    ],
)
def test_super_resolution_reports_mistakes_in_one_line(run_upscale, arguments, message):
    status, files, err = run_upscale(*arguments)
    assert (status, files) == (2, [])
    assert err.startswith(f"super_resolution.py: {message}")
    assert err.count("\n") == 1
