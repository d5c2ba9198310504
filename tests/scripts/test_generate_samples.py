"""``scripts/generate_samples.py``: the flags of CogView v1 give the images of ``cogview generate``."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.cli.main import main as cogview
from cogview.image_io.png import read_metadata

SCRIPTS = Path(__file__).parents[2] / "scripts"
FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"


@pytest.fixture
def samples(run_script):
    """Return a function that runs the script beside an ``input.txt`` of two prompts: (status, files, stderr)."""
    Path("input.txt").write_text(f"{FOX}\n\n{DOG}\n", encoding="utf-8")

    def run(*arguments):
        status, lines, err = run_script("generate_samples", *arguments)
        return status, [Path(line) for line in lines], err

    return run


def test_generate_samples_equals_cogview_generate(samples, tiny_checkpoint, capsys):
    status, files, _ = samples(
        *("--input-source", "input.txt", "--output-path", "out", "--batch-size", "3", "--seed", "7"),
        *("--temperature", "1.2", "--top_k", "50", "--top_p", "0.8", "--max-inference-batch-size", "2"),
    )
    assert status == 0
    assert files == [Path("out", prompt, f"{index}.png") for prompt in (FOX, DOG) for index in range(3)]
    settings = ["--seed", "7", "--temperature", "1.2", "--top-k", "50", "--top-p", "0.8", "--device", "cpu"]
    assert cogview(["generate", "--input", "input.txt", "-n", "3", "--model", str(tiny_checkpoint), *settings]) == 0
    ours = [Path(line) for line in capsys.readouterr().out.splitlines()]
    for file, own in zip(files, ours, strict=True):
        assert read_metadata(file)["codes"] == read_metadata(own)["codes"]
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(own)))


def test_generate_samples_accepts_the_command_line_of_v1(samples, v1_flags):
    """The flags are those of its scripts/text2image.sh, where the seed is 1234 and top-p 0 disables."""
    status, files, err = samples(
        *v1_flags[:-1],
        *("--generation-task", "text2image", "--input-source", "./input.txt", "--output-path", "samples_text2image"),
        *("--batch-size", "4", "--max-inference-batch-size", "4"),
    )
    assert status == 0
    assert len(files) == 8
    texts = read_metadata(files[0])
    assert (texts["seed"], texts["temperature"], texts["top_k"], texts["top_p"]) == ("1234", "1.0", "200", "1.0")
    assert "note: not needed, and ignored: --deepspeed (DeepSpeed is for training); --model-parallel-size (one" in err
    assert "(a checkpoint folder holds the model's shape)" in err
    assert "note: pretrained/vqvae/vqvae_hard_biggerset_011.pt is ignored: " in err


def test_generate_samples_accepts_the_image_tokenizer_of_the_model_without_a_note(samples, tiny_checkpoint):
    _, _, err = samples("--input-source", "input.txt", "--img-tokenizer-path", str(tiny_checkpoint / "image"))
    assert "ignored" not in err


def test_generate_samples_rejects_weights_of_v1_that_are_not_converted(samples, tmp_path):
    """The flags are those of CogView v1: its folder by --load, and its image tokenizer, without a further note."""
    folder = tmp_path / "pretrained" / "cogview-base"
    folder.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("142000")
    status, files, err = samples(
        *("--input-source", "input.txt", "--load", str(folder)),
        *("--img-tokenizer-path", "pretrained/vqvae/vqvae_hard_biggerset_011.pt"),
    )
    assert (status, files) == (2, [])
    assert err == (
        f"generate_samples.py: {folder} is a released checkpoint, which has to be converted once: cogview convert "
        f"{folder} --image-tokenizer vqvae_hard_biggerset_011.pt --text-model cog-pretrain.model\n"
    )


def test_generate_samples_names_folders_by_ids(samples):
    lines = [f"0017\t{FOX}", f"../up\t{DOG}", f"0017\t{FOX}", "no id here"]
    Path("input.txt").write_text("\n".join(lines), encoding="utf-8")
    status, files, err = samples("--input-source", "input.txt", "--with-id", "--batch-size", "2")
    assert status == 1
    assert [file.as_posix() for file in files] == [
        f"samples/{name}.png" for name in ("0017/0", "0017/1", "up/0", "up/1", "0017/2", "0017/3")
    ]
    assert "skipped: the line “no id here” has no id; expected ID<TAB> before the query\n" in err
    assert [read_metadata(file)["prompt"] for file in files] == [FOX, FOX, DOG, DOG, FOX, FOX]
    assert len({read_metadata(file)["codes"] for file in files}) == 6


def test_generate_samples_debug_writes_a_concatenated_image_per_prompt(samples):
    _, files, _ = samples("--input-source", "input.txt", "--debug", "--batch-size", "3", "--seed", "7")
    sheets = [file for file in files if file.name == "concat.png"]
    assert sheets == [Path("samples", prompt, "concat.png") for prompt in (FOX, DOG)]
    sheet = np.asarray(Image.open(sheets[1]))
    assert sheet.shape == (68 + 4, 3 * 68 + 4, 3)
    np.testing.assert_array_equal(sheet[4:68, 4 + 68 : 68 + 68], np.asarray(Image.open(f"samples/{DOG}/1.png")))
    assert read_metadata(sheets[1])["prompt"] == DOG


def test_generate_samples_asks_for_prompts(samples, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{FOX}\n{DOG}\nstop\n狐狸\n"))
    status, files, err = samples("--batch-size", "1", "--debug")
    assert status == 0
    assert [file.as_posix() for file in files] == [
        f"samples/{prompt}/{name}.png" for prompt in (FOX, DOG) for name in ("0", "concat")
    ]
    assert "What shall I generate? (“stop” ends)" in err


def test_generate_samples_skips_prompts_that_cannot_be_used(samples):
    Path("input.txt").write_text(f"{DOG * 3}\n{FOX}\n", encoding="utf-8")
    status, files, err = samples("--input-source", "input.txt", "--batch-size", "1", "--debug")
    assert status == 1
    assert files == [Path("samples", FOX, name) for name in ("0.png", "concat.png")]
    assert "is 27 pieces long, 20 fit; shorten it" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--generation-task", "text2video"],
            "--generation-task text2video is unknown; known: text2image, image2text, super-resolution, low-level "
            "super-resolution, post-selection\n",
        ),
        (["--with-id"], "--with-id needs a file of lines that start with ID<TAB>: give it with --input-source"),
        (["--batch-size", "0"], "invalid value for '--batch-size': 0 is not in the range 1<=x<=100000"),
        (
            ["--max-inference-batch-size", "0"],
            "invalid value for '--max-inference-batch-size': \"0\" is not auto or a whole number from 1 on",
        ),
        (["--input-source", "none.txt"], "cannot read none.txt: No such file or directory"),
        (
            ["--input-source", "input.txt", "--output-path", "input.txt"],
            "the output folder input.txt cannot be written",
        ),
        (["--input-source", "input.txt", "--load", "cogview-bse"], 'checkpoint "cogview-bse" is unknown'),
    ],
)
def test_generate_samples_reports_mistakes_in_one_line(samples, arguments, message):
    status, files, err = samples(*arguments)
    assert (status, files) == (2, [])
    assert err.startswith(f"generate_samples.py: {message}")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["generate_samples.py", "caption_images.py", "super_resolution.py", "rerank.py"])
def test_generate_samples_runs_as_a_file(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    command = [sys.executable, str(SCRIPTS / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for flag in (
        "--input-source",
        "--output-path",
        "--with-id",
        "--debug",
        "--top_k",
        "--img-tokenizer-path",
        "--load",
    ):
        assert flag in done.stdout
