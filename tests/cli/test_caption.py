"""``cogview caption``: lines of JSON, unreadable images, and atomic output files."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from cogview.image_io.reading import EXPECTED
from cogview.pipeline.cogview import CogView


@pytest.fixture
def caption(run_command):
    """Return a function that runs the command: (status, objects of its lines, stderr)."""

    def run(*arguments):
        status, lines, err = run_command("caption", *arguments)
        return status, [json.loads(line) for line in lines], err

    return run


def as_objects(file, captions):
    return [
        {
            "file": file,
            "index": caption.index,
            "caption": caption.text,
            "log_probability": pytest.approx(caption.log_probability, abs=1e-3),
            "seed": caption.seed,
        }
        for caption in captions
    ]


def test_caption_prints_a_caption_of_each_image(caption, save_image, tiny_model):
    images = [save_image(name, number) for number, name in enumerate(("狐狸.png", "b.png", "c.png"))]
    status, found, err = caption("狐狸.png", "b.png", "--seed", "7", "c.png")
    assert status == 0
    expected = tiny_model.caption(images, seed=7)
    assert found == [
        *as_objects("狐狸.png", expected[0]),
        *as_objects("b.png", expected[1]),
        *as_objects("c.png", expected[2]),
    ]
    assert list(found[0]) == ["file", "index", "caption", "log_probability", "seed"]
    assert err == f"{tiny_model.name} on cpu, float32 (no GPU is used), seed 7\n"


def test_caption_prints_chinese_without_escapes(run_command, save_image, monkeypatch, tiny_model):
    save_image("狐狸.png")
    written = tiny_model.caption([Image.open("狐狸.png")], seed=7)[0][0]
    planted = type(written)(text="一只“狐狸”", log_probability=-1.5, num_pieces=4, seed=7, index=0)
    monkeypatch.setattr(CogView, "caption", lambda self, images, **_: [[planted] for _ in images])
    _, lines, _ = run_command("caption", "狐狸.png", "--seed", "7")
    assert lines == ['{"file": "狐狸.png", "index": 0, "caption": "一只“狐狸”", "log_probability": -1.5, "seed": 7}']


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["-n", "3"], {"method": "beam"}),
        (["-n", "3", "--method", "beam"], {"method": "beam"}),
        (["-n", "3", "--method", "sample"], {"method": "sample"}),
        (
            ["-n", "3", "--method", "sample", "--temperature", "0.7", "--top-k", "9", "--top-p", "0.9"],
            {"method": "sample", "temperature": 0.7, "top_k": 9, "top_p": 0.9},
        ),
    ],
)
def test_caption_prints_several_captions_per_image(caption, save_image, tiny_model, arguments, settings):
    image = save_image("a.png")
    _, found, _ = caption("a.png", "--seed", "7", *arguments)
    assert found == as_objects("a.png", tiny_model.caption([image], n=3, seed=7, **settings)[0])


def test_caption_beam_prints_one_caption(caption, save_image, tiny_model):
    image = save_image("a.png")
    _, found, _ = caption("a.png", "--seed", "7", "--method", "beam")
    assert found == as_objects("a.png", tiny_model.caption([image], seed=7, method="beam")[0])


def test_caption_accepts_folders_and_globs(caption, save_image):
    for number, name in enumerate(("fotos/b.png", "fotos/a.jpg", "x1.png", "x2.webp")):
        save_image(name, number)
    Path("fotos/notes.txt").write_text("keine Bilder")
    _, found, _ = caption("x*", "fotos")
    assert [one["file"] for one in found] == ["x1.png", "x2.webp", "fotos/a.jpg", "fotos/b.png"]


def test_caption_gives_equal_captions_for_any_batch_size(caption, save_image):
    for number in range(3):
        save_image(f"{number}.png", number)
    arguments = ("*.png", "--seed", "7", "-n", "2", "--method", "sample")
    _, together, _ = caption(*arguments)
    _, apart, _ = caption(*arguments, "--max-inference-batch-size", "1")
    assert [one["caption"] for one in together] == [one["caption"] for one in apart]


def test_caption_prints_the_random_seed(caption, save_image):
    save_image("a.png")
    _, [one], err = caption("a.png")
    assert f"seed {one['seed']}\n" in err


def test_caption_notes_once_that_an_image_was_resized(caption, save_image, tiny_model):
    image = save_image("a.png", size=(100, 80))
    status, found, err = caption("a.png", "a.png", "--seed", "7")
    assert status == 0
    assert found == 2 * as_objects("a.png", tiny_model.caption([image], seed=7)[0])
    assert err.splitlines()[1:] == ["note: a.png: resized from 100 x 80 and cropped to 64 x 64"]


def test_caption_reports_unreadable_images_at_the_end(caption, save_image):
    save_image("a.png")
    save_image("b.png", 1)
    Path("text.png").write_text("no image")
    Path("empty").mkdir()
    status, found, err = caption(
        "a.png", "text.png", "none.png", "empty", "b.png", "--max-inference-batch-size", "1", "-o", "out.jsonl"
    )
    assert status == 1
    assert [one["file"] for one in found] == ["a.png", "b.png"]
    assert [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()] == found
    printed_lines = err.splitlines()[1:]
    assert len(printed_lines) == 3
    assert printed_lines[0].startswith("failed: the folder empty holds no image: ")  # found before an image is read
    assert printed_lines[1] == f"failed: text.png is no image that can be read; expected {EXPECTED}"
    assert printed_lines[2] == "failed: image none.png does not exist"


def test_caption_fails_when_no_image_can_be_read(caption):
    Path("text.png").write_text("no image")
    for arguments, message in [
        (["none.png"], "image none.png does not exist"),
        (["none.png", "text.png"], "none of 2 images can be read; the first: image none.png does not exist"),
    ]:
        status, found, err = caption(*arguments, "-o", "out.jsonl")
        assert (status, found) == (2, [])
        assert err.splitlines()[1:] == [f"cogview caption: {message}"]
        assert os.listdir() == ["text.png"]


def test_caption_output_also_writes_the_lines_to_a_file(run_command, save_image):
    save_image("a.png")
    Path("out").mkdir()
    Path("out/captions.jsonl").write_text("of yesterday")
    _, lines, _ = run_command("caption", "a.png", "-n", "2", "-o", "out/captions.jsonl")
    assert Path("out/captions.jsonl").read_bytes().decode() == "".join(f"{line}\n" for line in lines)
    assert os.listdir("out") == ["captions.jsonl"]


def test_caption_keeps_the_old_output_file_after_an_interruption(caption, save_image, monkeypatch):
    for number in range(3):
        save_image(f"{number}.png", number)
    Path("captions.jsonl").write_text("of yesterday")
    write, calls = CogView.caption, []

    def interrupted(self, images, **settings):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(self, images, **settings)

    monkeypatch.setattr(CogView, "caption", interrupted)
    status, found, err = caption("*.png", "--max-inference-batch-size", "1", "-o", "captions.jsonl")
    assert status == 130
    assert calls == [0, 1, 1, 1]  # settings are checked without an image
    assert [one["file"] for one in found] == ["0.png", "1.png"]
    assert err.endswith("cogview caption: interrupted; finished results are kept\n")
    assert Path("captions.jsonl").read_text() == "of yesterday"
    assert sorted(os.listdir()) == ["0.png", "1.png", "2.png", "captions.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "invalid value for '-n': 0 is not in the range 1<=x<=100000"),
        (
            ["--max-inference-batch-size", "0"],
            "invalid value for '--max-inference-batch-size': \"0\" is not auto or a whole number from 1 on",
        ),
        (["--seed", "-1"], "the seed must be from 0 to 9223372036854775807, got -1"),
        (
            ["-n", "2", "--method", "greedy"],
            "greedy captions are always the same: 2 were asked for, use sample ",
        ),
        (["--temperature", "0.5"], "temperature can be set for sampled captions alone: use the method sample"),
        (["-n", "2", "--top-k", "5"], "--top-k can be set for sampled captions alone: use the method sample"),
        (
            ["--method", "sample", "--temperature", "0"],
            "invalid value for '--temperature': 0.0 is not in the range x>0; see cogview caption --help",
        ),
        (["--method", "sample", "--top-p", "2"], "invalid value for '--top-p': 2.0 is not in the range 0<x<=1"),
        (["--model", "cogview-bse"], 'checkpoint "cogview-bse" is unknown; known: '),
        (["--dtype", "int7"], "invalid value for '--dtype': 'int7' is not one of 'auto', "),
        (["-o", "folder"], "the output folder is a folder; expected the name of a file"),
        (["-o", "a.png"], "the lines would replace a.png, which is named like an image; choose another name"),
        (["-o", ""], "invalid value for '-o' / '--output': the name is empty; expected a file or folder"),
        (["-o", "a.png/captions.jsonl"], "the output folder a.png cannot be written: "),
    ],
)
def test_caption_reports_mistakes_in_one_line(caption, save_image, no_image_is_read, arguments, message):
    save_image("a.png")
    Path("folder").mkdir()
    status, found, err = caption("a.png", *arguments)
    assert (status, found) == (2, [])
    assert err.startswith(f"cogview caption: {message}")
    assert err.count("\n") == 1
    assert sorted(os.listdir()) == ["a.png", "folder"]


def test_caption_reports_missing_images_in_one_line(caption):
    Path("empty").mkdir()
    for argument, message in [
        ("empty", "the folder empty holds no image: "),
        ("*.jpg", 'the pattern "*.jpg" matches no file'),
    ]:
        status, found, err = caption(argument)
        assert (status, found) == (2, [])
        assert err.startswith(f"cogview caption: {message}")
        assert err.count("\n") == 1


def test_caption_rejects_a_model_without_the_task(caption, save_image, generation_checkpoint, no_image_is_read):
    save_image("a.png")
    status, found, err = caption("a.png", "--model", str(generation_checkpoint))
    assert (status, found) == (2, [])
    assert err == (
        f"cogview caption: {generation_checkpoint} was not trained for the task 'caption'; its tasks are: generate\n"
    )
