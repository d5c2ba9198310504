"""Notes on the images that commands read: those that are unlike the images of the training."""

import json
import shutil
from pathlib import Path

import pytest

FOX = "一只狐狸在汽车的左边"
NOTE = ": unlike the images that {name} was trained on: its reconstruction has "


@pytest.fixture(scope="session")
def demanding_checkpoint(tiny_checkpoint, tmp_path_factory):
    """Return a copy of the tiny model whose config has a PSNR that no reconstruction of an unlike image reaches."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("demanding") / "demanding")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["reconstruction_psnr"] = {"p01": 23.04, "p05": 25.0, "median": 30.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["caption", "a.png", "a.png"],
        ["rerank", "a.png", "a.png", "--prompt", FOX],
        ["complete", "a.png", "a.png", "--rows", "7", "--prompt", FOX],
        ["upscale", "a.png", "a.png", "--low-level", "--prompt", FOX],
        ["generate", "--input", "job.jsonl"],
    ],
)
def test_command_notes_once_that_an_image_is_unlike_the_training(
    run_command, save_image, demanding_checkpoint, command
):
    """A photo got a caption as sure as that of a real scene, and nothing said that the model cannot see it."""
    save_image("a.png")
    Path("job.jsonl").write_text(2 * '{"task": "caption", "image": "a.png"}\n', encoding="utf-8")
    status, _, err = run_command(*command, "--model", str(demanding_checkpoint))
    assert status == 0
    [note] = [line for line in err.splitlines() if "unlike" in line]
    assert note.startswith("note: a.png" + NOTE.format(name=demanding_checkpoint))
    assert note.endswith(" dB, 99% of theirs at least 23.0 dB")


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "一只狐狸"),
        ("generate", "--input", "job.txt"),
        ("complete", "a.png", "--rows", "4", "--prompt", "一只狐狸"),
        ("upscale", "a.png", "--prompt", "一只狐狸"),
        ("caption", "a.png"),
    ],
    ids=["generate", "job", "complete", "upscale", "caption"],
)
def test_commands_leave_no_output_folder_when_the_model_is_refused(run_command, save_image, arguments):
    """An empty folder was left, and that of a job held a file of locks."""
    save_image("a.png")
    Path("job.txt").write_text("一只狐狸\n", encoding="utf-8")
    status, _, err = run_command(*arguments, "--model", "no-such-model", "-o", "new/outputs")
    assert status == 2
    assert "no-such-model" in err
    assert not Path("new").exists()
