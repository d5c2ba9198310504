"""``cogview info IMAGE.png``: what the metadata of a PNG file say, and the command that repeats it."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cogview.cli.main import main

FOX = "一只狐狸在汽车的左边"


@pytest.fixture
def info(capsys):
    """Return a function that runs the command: (status, facts by name, stderr)."""

    def run(path):
        status = main(["info", str(path)])
        printed = capsys.readouterr()
        return status, dict(line.split(": ", 1) for line in printed.out.splitlines()), printed.err

    return run


def save(path, **texts):
    """Write a PNG file with these text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_itxt(key, text)
    Image.new("RGB", (8, 4)).save(path, pnginfo=chunks)
    return path


def test_info_prints_the_later_settings_of_an_image_that_is_older_than_these(info, tmp_path):
    """With the defaults of today the command would generate another image."""
    path = save(tmp_path / "a.png", prompt="狐狸", seed="7", cogview="0.2.0", temperature="0.3", top_k="5", top_p="1.0")
    words = shlex.split(info(path)[1]["command"])
    assert (words[words.index("--min-p") + 1], words[words.index("--noise-version") + 1]) == ("0.0", "1")


def test_info_prints_a_command_that_repeats_the_image(run_command, info, tiny_checkpoint):
    _, lines, _ = run_command(
        "generate", FOX, "-n", "2", "--seed", "7", "--temperature", "0.7", "--min-p", "0.1", "-o", "first"
    )
    status, facts, _ = info(lines[1])
    facts = {key: value.strip() for key, value in facts.items()}
    assert status == 0
    assert (facts["prompt"], facts["seed"], facts["index"], facts["temperature"]) == (FOX, "7", "1", "0.7")
    assert facts["size"] == "64 x 64 pixels"
    assert facts["model"].startswith("tiny (")
    program, *words = shlex.split(facts["command"])
    assert (program, words[-2:]) == ("cogview", ["--model", "tiny"])
    _, again, _ = run_command(*words[:-2], "-o", "again")
    np.testing.assert_array_equal(np.asarray(Image.open(again[1])), np.asarray(Image.open(lines[1])))


@pytest.mark.parametrize(
    ("texts", "command"),
    [
        ({"task": "upscale", "source": "a b.png"}, "upscale 'a b.png' --prompt 狐狸 --seed 7"),
        ({"task": "upscale", "source": "狐狸-seed7-2.png", "index": "2"}, "generate 狐狸 -n 3 --upscale --seed 7"),
        ({"task": "complete", "source": "a.png", "rows": "4"}, "complete a.png --rows 4 --prompt 狐狸 -n 1 --seed 7"),
        ({"codes_sha256": "0", "prompt": "狐狸\n狗"}, "generate 狐狸 狗 --grid --seed 7"),
    ],
)
def test_info_names_the_command_of_each_task(info, tmp_path, texts, command):
    path = save(tmp_path / "a.png", **{"prompt": "狐狸", "seed": "7", "cogview": "0.2.0", **texts})
    assert shlex.split(info(path)[1]["command"]) == ["cogview", *shlex.split(command)]


def test_info_reads_images_of_other_programs(info, tmp_path):
    path = save(tmp_path / "a.png", parameters="a \x1b[31mcat\nNegative prompt: dog\nSteps: 20, CFG scale: 7, Seed: 12")
    status, facts, _ = info(path)
    assert status == 0
    assert {key: value.strip() for key, value in facts.items()} | {"image": "", "file": ""} == {
        "image": "",
        "size": "8 x 4 pixels",
        "made by": "another program, with A1111's metadata",
        "prompt": "a \\x1b[31mcat",  # not obeyed by the terminal
        "negative prompt": "dog",
        "steps": "20",
        "cfg scale": "7",
        "seed": "12",
        "file": "",
    }


def test_info_refuses_a_damaged_png_in_one_line(info, tmp_path):
    path = save(tmp_path / "a.png", prompt="狐狸" * 50)
    content = bytearray(path.read_bytes())
    content[60] ^= 255  # inside the text chunk, which has a checksum
    path.write_bytes(content)
    status, facts, err = info(path)
    assert (status, facts) == (2, {})
    assert err.startswith(f"cogview info: {path} is cut off or damaged: ")
    assert err.count("\n") == 1
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert info(path)[0] == 2
    assert Path(path).exists()
