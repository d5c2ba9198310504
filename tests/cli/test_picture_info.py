"""``cogview info IMAGE.png``: what the metadata of a PNG file say, and the command that repeats it."""

import json
import shlex
import shutil
import subprocess
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


@pytest.fixture
def repeat(run_command, info, tiny_checkpoint):
    """Return a function that runs a command with files in ``first``, and what info prints of them; it compares all."""
    folder = Path("tiny")  # named in the metadata by its last part
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["upscale_sampling"] = {**config["sampling"], "temperature": 0.2, "top_k": 3}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def run(*arguments):
        at = arguments.index("--") if "--" in arguments else len(arguments)
        _, lines, _ = run_command(*arguments[:at], "--seed", "7", "-o", "first", "--model", "tiny", *arguments[at:])
        for line in lines:
            file = Path(line.split("\t")[0])
            command = info(file)[1]["command"]
            read = f"cogview() {{ printf '%s\\0' \"$@\"; }}; {command}"
            words = (
                subprocess.run(["bash", "-c", read], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
            )
            at = words.index("--") if "--" in words else len(words)
            status, again, _ = run_command(*words[:at], "-o", "again", *words[at:])
            assert status == 0
            same = [each for each in map(Path, (one.split("\t")[0] for one in again)) if is_equal(each, file)]
            assert same, f"{command} does not repeat {file}"
            shutil.rmtree("again")
        return lines

    return run


def is_equal(first, second):
    """Return whether two files have the same pixels."""
    one, other = (np.asarray(Image.open(each)) for each in (first, second))
    return one.shape == other.shape and bool((one == other).all())


@pytest.mark.skipif(shutil.which("bash") is None, reason="the command is read by bash")
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", FOX, "-n", "2", "--temperature", "0.7", "--min-p", "0.1", "--top-k", "20", "--top-p", "0.9"),
        ("generate", FOX, "--guidance", "2.5", "--text-attention", "1.5", "--noise-version", "1"),
        ("generate", FOX, "--dtype", "int8", "--kv-dtype", "int8"),
        pytest.param(
            ("generate", FOX, FOX, "-n", "2", "--keep", "1", "--upscale", "--grid", "--top-p", "0.8"),
            marks=pytest.mark.slow,
        ),
        ("generate", FOX, "--upscale", "--grid"),
        ("generate", "狐狸\n'狗'", "$(id) 狗", "--grid"),
        ("generate", "--grid", "--", "-狗"),
        ("complete", "a b.png", "--rows", "4", "--prompt", FOX, "-n", "2", "--grid"),
        ("upscale", "a b.png", "--prompt", FOX, "--min-p", "0.2"),
        ("upscale", "a b.png", "--prompt", FOX, "--low-level", "--tiles"),
    ],
)
def test_info_prints_a_command_that_repeats_the_image(repeat, save_image, arguments):
    """The command of an upscaled image set the cool settings of upscaling for the small image too."""
    save_image("a b.png")
    assert repeat(*arguments)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="the command is read by bash")
def test_info_prints_a_command_that_repeats_the_images_of_a_job(repeat, save_image):
    save_image("a.png")
    lines = [
        {"prompt": FOX, "n": 2, "seed": 3, "top_k": 20},
        {"id": "two", "prompt": "狗"},
        {"task": "complete", "image": "a.png", "rows": 4, "prompt": FOX},
        {"task": "upscale", "image": "a.png", "prompt": FOX, "n": 1},
    ]
    Path("job.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert len(repeat("generate", "--input", "job.jsonl", "-n", "2", "--keep", "1", "--grid", "--top-k", "5")) == 5


def test_info_names_no_command_for_what_one_command_cannot_make(run_command, info, save_image):
    """An image that a job had completed and upscaled got a command that makes another."""
    save_image("a.png")
    line = {"task": "complete", "image": "a.png", "rows": 4, "prompt": FOX}
    Path("job.jsonl").write_text(json.dumps(line), encoding="utf-8")
    _, lines, _ = run_command("generate", "--input", "job.jsonl", "--upscale")
    assert [info(line)[1]["command"].strip().split()[0] for line in lines] == ["cogview", "none:"]


@pytest.mark.parametrize("chunk", [{"index": "x"}, {"source_sampling": "[1"}, {"source_sampling": "1"}, {"seed": "x"}])
def test_info_reports_damaged_text_chunks_in_place_of_the_command(info, tmp_path, chunk):
    path = save(tmp_path / "a.png", **{"prompt": "狐狸", "seed": "7", "cogview": "0.2.0", **chunk})
    status, facts, _ = info(path)
    assert status == 0
    assert facts["command"].strip().startswith("none: a text chunk is damaged: ")


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


def test_info_prints_a_command_when_the_prompts_of_a_sheet_are_numbers(info, tmp_path):
    """Text chunks of any program may have the names of ours; a list of numbers was a traceback."""
    path = save(tmp_path / "sheet.png", cogview="1", seed="3", codes_sha256="0", prompt="x", prompts="[1, [2]]")
    status, facts, _ = info(path)
    assert status == 0
    assert facts["command"].split()[:3] == ["cogview", "generate", "1"]
