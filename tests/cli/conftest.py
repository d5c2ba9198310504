"""Fixtures of the tests of commands."""

import json
import re
import shutil

import pytest
from PIL import Image

from cogview.cli.main import main

PLAN = re.compile(r"^[a-z ]+: \d+ at a time of \d+ \(.*\); .* GB of .* GB free\n", re.MULTILINE)


@pytest.fixture
def without_plans():
    """Return a function that removes the lines about batch sizes, which depend on the free memory, from a text."""
    return lambda text: PLAN.sub("", text)


@pytest.fixture
def run_command(tiny_checkpoint, tmp_path, monkeypatch, capsys, without_plans):
    """Return a function that runs a command in an empty folder: (status, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        chosen = [] if "--model" in arguments else ["--model", str(tiny_checkpoint)]
        name, *rest = arguments
        status = main([name, *chosen, "--device", "cpu", *rest])  # before a --, which ends the options
        printed = capsys.readouterr()
        err = without_plans(printed.err)
        return status, printed.out.split("\n")[:-1], err  # a caption may hold other line separators

    return run


@pytest.fixture(scope="session")
def generation_checkpoint(tiny_checkpoint, tmp_path_factory):
    """Return a copy of the tiny model whose only task is generation, without caption dropout."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("generation") / "generation")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"tasks": ["generate"], "caption_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def disk_for_two_images(monkeypatch):
    """Let the third image that is saved find a full disk."""
    save, calls = Image.Image.save, []

    def save_until_full(self, *arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return save(self, *arguments, **settings)

    monkeypatch.setattr(Image.Image, "save", save_until_full)


@pytest.fixture
def no_image_is_read(monkeypatch):
    """Fail the test when an image is read."""

    def refuse(path):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("cogview.image_io.reading.read_image", refuse)
