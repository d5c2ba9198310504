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
    scores = [float(line.split("= ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
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
