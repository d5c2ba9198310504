"""The programs in ``examples/`` run and do what they promise."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from cogview.tokenizers.tasks import TASKS

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "examples"
Main = Callable[[Sequence[str]], int]


@pytest.fixture
def load() -> Iterator[Callable[[str], Main]]:
    """Return a function that gives the ``main`` of an example; tasks that it registers are removed afterwards."""
    known = set(TASKS)

    def main_of(name: str) -> Main:
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        main: Main = module.main
        return main

    yield main_of
    for name in set(TASKS) - known:
        del TASKS[name]


def test_generate_images_writes_one_file_per_image(load, tmp_path, capsys):
    assert load("generate_images")(["一个红苹果", "-n", "2", "--seed", "7", "-o", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed7-0.png", "seed7-1.png"]
    assert capsys.readouterr().out.count("64 codes") == 2


def test_caption_folder_prints_a_line_per_image(load, tmp_path, capsys):
    """The embedded model reads back the images that it generated."""
    load("generate_images")(["蓝色背景上的三只狐狸", "-n", "1", "-o", str(tmp_path / "deep")])
    Image.new("RGB", (40, 60), "white").save(tmp_path / "white.jpg")
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    capsys.readouterr()
    assert load("caption_folder")([str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["seed7-0.png", "white.jpg"]
    assert "狐狸" in lines[0]["caption"]


def test_rerank_best_of_n_saves_the_best_in_order(load, tmp_path, capsys):
    assert load("rerank_best_of_n")(["一个红苹果", "-n", "4", "--keep", "2", "-o", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best1.png", "best2.png"]
    scores = [float(line.split("score ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert scores == sorted(scores, reverse=True)


def test_add_task_trains_and_generates(load, tmp_path, capsys):
    assert load("add_task")(["--steps", "2", "-o", str(tmp_path)]) == 0
    assert "of the codes are right" in capsys.readouterr().out
    with Image.open(tmp_path / "mirrored.png") as image:
        assert image.size == (64, 64)


def test_train_on_images_trains_every_part(load, tmp_path, capsys):
    assert load("train_on_images")(["--steps", "2", "-o", str(tmp_path)]) == 0
    assert "天空下的" in capsys.readouterr().out
    with Image.open(tmp_path / "generated.png") as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("generate_images", ["", "-o", "out"], "the prompt is empty"),
        ("generate_images", ["狗", "-n", "0"], "the number of images must be from 1 to 100000, got 0"),
        ("generate_images", ["狗", "-n", "1", "-o", "天空.txt"], "File exists"),
        ("caption_folder", ["nowhere"], "there is no image below nowhere"),
        ("caption_folder", ["."], "天空.png is cut off or damaged"),
        ("rerank_best_of_n", ["狗", "-n", "2", "--keep", "3"], "keep must be from 1 to 2, got 3"),
        ("add_task", ["--steps", "0", "-o", "task"], "steps must be in"),
        ("train_on_images", ["."], "has 1 images NAME.png, expected at least one to train on and one held out"),
        ("train_on_images", ["photos"], "photos/0.png has no captions: expected 0.txt beside it"),
        ("train_on_images", ["gbk"], "is not UTF-8"),
    ],
)
def test_examples_report_mistakes_in_one_line(load, tmp_path, monkeypatch, capsys, name, arguments, message):
    """A reader who tries them on files of their own gets a line and the status 2."""
    monkeypatch.chdir(tmp_path)
    Path("天空.txt").write_text("天空", encoding="utf-8")
    Path("天空.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for folder in ("photos", "gbk"):
        Path(folder).mkdir()
        for number in range(2):
            Image.new("RGB", (80, 70)).save(f"{folder}/{number}.png")
            if folder == "gbk":
                Path(f"{folder}/{number}.txt").write_bytes("红色的山".encode("gbk"))
    with pytest.raises(SystemExit) as left:
        load(name)(arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


def test_train_on_images_trains_on_own_folder(load, tmp_path, capsys):
    """Photographs of any size with a caption each; the output folder is made."""
    for number in range(9):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((70 + number, 90), 20.0 * number).save(path)
        path.with_suffix(".txt").write_text(f"第{number}张照片\n", encoding="utf-8")
    output = tmp_path / "deep" / "output"
    assert load("train_on_images")([str(tmp_path / "photos"), "--steps", "2", "-o", str(output)]) == 0
    assert "第0张照片" in capsys.readouterr().out
