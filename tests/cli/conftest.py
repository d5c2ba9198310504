"""What tests of commands share."""

import json
import re
import shutil

import pytest
from PIL import Image

from cogview.cli.main import main

PLAN = re.compile(r"^[a-z ]+: \d+ at a time of \d+ \(.*\); .* GB of .* GB free\n", re.MULTILINE)


@pytest.fixture
def without_plans():
    """A function that takes the lines about how the work was planned, which know of the memory here, out of a text."""
    return lambda text: PLAN.sub("", text)


@pytest.fixture
def run_command(tiny_checkpoint, tmp_path, monkeypatch, capsys, without_plans):
    """A function that runs a command in an empty folder with the tiny model: (status, lines printed, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        chosen = [] if "--model" in arguments else ["--model", str(tiny_checkpoint)]
        status = main([*arguments, *chosen, "--device", "cpu"])
        printed = capsys.readouterr()
        err = without_plans(printed.err)
        return status, printed.out.split("\n")[:-1], err  # a caption may hold other characters that end lines

    return run


@pytest.fixture(scope="session")
def drawing_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The tiny model as if it had been trained to draw and nothing else, and always with captions."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("drawing") / "drawing")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"tasks": ["generate"], "caption_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def disk_for_two_pictures(monkeypatch):
    """The third picture that is saved finds no space."""
    save, calls = Image.Image.save, []

    def save_until_full(self, *arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return save(self, *arguments, **settings)

    monkeypatch.setattr(Image.Image, "save", save_until_full)


@pytest.fixture
def no_image_is_read(monkeypatch):
    """Reading an image fails the test."""

    def refuse(path):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("cogview.image_io.reading.read_image", refuse)
