"""``scripts/caption_images.py``: paths in, sampled captions out, with the flags of CogView v1."""

import io
import json
import sys
from pathlib import Path

import pytest

TASK = ("--generation-task", "image2text")


@pytest.fixture
def run_captions(run_script):
    """Return a function that runs the script: (status, objects of its lines, stderr)."""

    def run(*arguments, script="caption_images"):
        status, lines, err = run_script(script, *arguments)
        return status, [json.loads(line) for line in lines], err

    return run


@pytest.mark.parametrize("script", ["caption_images", "generate_samples"])
def test_caption_images_accepts_the_command_line_of_v1(run_captions, v1_flags, save_image, tiny_model, script):
    """The flags are those of its scripts/image2text.sh, with a file of paths."""
    images = [save_image("狐狸.png"), save_image("b.png", 1)]
    Path("input.txt").write_text("狐狸.png\n\nb.png\n", encoding="utf-8")
    options = ("--input-source", "input.txt", "--output-path", "samples_image2text", "--batch-size", "8")
    status, found, err = run_captions(*v1_flags, *TASK, *options, script=script)
    assert status == 0
    expected = tiny_model.caption(images, method="sample", n=8, seed=1234, temperature=1.0, top_k=200, top_p=1.0)
    assert [(one["file"], one["index"], one["caption"]) for one in found] == [
        (file, caption.index, caption.text)
        for file, captions in zip(("狐狸.png", "b.png"), expected, strict=True)
        for caption in captions
    ]
    written = Path("samples_image2text/captions.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in written[:-1]] == found
    assert "note: not needed, and ignored: --deepspeed (DeepSpeed is for training); --model-parallel-size (one" in err
    assert "(a checkpoint folder holds the model's shape)" in err
    assert f"{tiny_model.name} on cpu, float32 (no GPU is used), seed 1234\n" in err


def test_caption_images_prints_ids_first(run_captions, save_image):
    save_image("a.png")
    Path("input.txt").write_text("0017\ta.png\na.png\n", encoding="utf-8")
    status, [found], err = run_captions("--input-source", "input.txt", "--with-id", "--batch-size", "1")
    assert status == 1
    assert list(found.items())[:2] == [("id", "0017"), ("file", "a.png")]
    assert "skipped: the line “a.png” has no id; expected ID<TAB> before the query\n" in err


def test_caption_images_reports_unreadable_images_at_the_end(run_captions, save_image):
    save_image("a.png")
    Path("input.txt").write_text("none.png\na.png\n", encoding="utf-8")
    status, found, err = run_captions("--input-source", "input.txt", "--batch-size", "2")
    assert (status, [one["file"] for one in found]) == (1, ["a.png", "a.png"])
    assert err.endswith("failed: image none.png does not exist\n")


def test_caption_images_fails_when_no_image_can_be_read(run_captions):
    Path("input.txt").write_text("none.png\n")
    status, found, err = run_captions("--input-source", "input.txt")
    assert (status, found) == (2, [])
    assert err.endswith("caption_images.py: image none.png does not exist\n")
    assert not Path("samples").exists()


def test_caption_images_asks_for_images(run_captions, save_image, monkeypatch):
    save_image("a.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO("none.png\na.png\nstop\nb.png\n"))
    status, found, err = run_captions("--batch-size", "1")
    assert (status, [one["file"] for one in found]) == (0, ["a.png"])
    assert "Which image shall I caption? (“stop” ends)" in err
    assert "skipped: image none.png does not exist\n" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generation-task", "text2image"], "--generation-task text2image is unknown; known: image2text\n"),
        (["--input-source", "none.txt"], "cannot read none.txt: No such file or directory"),
        (["--input-source", "blank.txt"], "blank.txt is empty: expected a query per line"),
        (["--batch-size", "0"], "invalid value for '--batch-size': 0 is not in the range 1<=x<=100000"),
        (
            ["--max-inference-batch-size", "0"],
            "invalid value for '--max-inference-batch-size': \"0\" is not auto or a whole number from 1 on",
        ),
        (["--seed", "-1"], "the seed must be from 0 to 9223372036854775807, got -1"),
        (["--temperature", "0"], "temperature must be above 0, got 0.0; for greedy decoding use --top_k 1"),
        (["--output-path", "blank.txt"], "the output folder blank.txt cannot be written: it is a file"),
        (["--load", "cogview-bse"], 'checkpoint "cogview-bse" is unknown; known: '),
    ],
)
def test_caption_images_reports_mistakes_in_one_line(run_captions, arguments, message):
    Path("blank.txt").write_text("\n")
    status, found, err = run_captions(*arguments)
    assert (status, found) == (2, [])
    assert err.startswith(f"caption_images.py: {message}")
    assert err.count("\n") == 1
