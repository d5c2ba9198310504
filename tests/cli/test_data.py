"""Commands of ``cogview data``: stores from pictures, what is printed, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import yaml

from cogview.cli.main import main
from cogview.modeling import config


@pytest.fixture
def data(tiny_checkpoint, tmp_path, monkeypatch, capsys, save_image):
    """Return a function that runs ``cogview data`` in a folder with ``pictures``: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        save_image(f"pictures/{number}.png", number)
        Path(f"pictures/{number}.txt").write_text(f"{'红蓝绿黄'[number % 4]}色的狐狸\n", encoding="utf-8")

    def run(name, *arguments):
        if name == "build":
            arguments = ("--model", str(tiny_checkpoint), "--device", "cpu", "--workers", "0", *arguments)
        status = main(["data", name, *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_data_build_writes_stores_for_training(data, tiny_checkpoint, monkeypatch, capsys):
    """The stores of a folder of pictures go into ``cogview train``, and the model draws."""
    assert data("build", "pictures", "-o", "out/store", "--held-out", "0.1") == (
        0,
        ["out/store: 6 rows of 6 pictures", "out/store-held-out: 2 rows of 2 pictures"],
        [],
    )
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 32, 2))
    recipe = {
        "preset": "tiny",
        "max_positions": 96,
        "tokenizers": str(tiny_checkpoint),
        "store": "out/store",
        "validation_store": "out/store-held-out",
        "training": {"steps": 2, "batch_size": 2, "warmup_steps": 1, "tasks": {"generate": 1, "upscale": 1}},
        "run": {"log_every": 1, "save_every": 2, "evaluate_every": 1},
        "precision": "float32",
    }
    Path("tiny.yaml").write_text(yaml.safe_dump({"work": "run", "transformer": recipe}), encoding="utf-8")
    assert main(["train", "tiny.yaml", "--device", "cpu"]) == 0, capsys.readouterr().err
    model = "run/transformer-run/checkpoints/step-00000002"
    assert main(["generate", "红色的狐狸", "--model", model, "--device", "cpu", "--seed", "1"]) == 0
    assert len(list(Path("outputs").glob("*.png"))) == 1


def test_data_build_reports_what_is_left_out(data):
    Path("pictures/1.png").write_bytes(b"nothing")
    Path("pictures/2.txt").unlink()
    status, out, err = data("build", "pictures", "-o", "store", "--held-out", "0")
    assert (status, out) == (1, ["store: 6 rows of 6 pictures"])
    assert err == [
        "left out: 2, the first: pictures/1.png: it is no image that can be read; expected PNG, JPEG, WebP, GIF, BMP, "
        "TIFF or PPM; store-left-out.jsonl has all"
    ]
    lines = Path("store-left-out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["pictures/1.png", "pictures/2.png"]


def test_data_build_takes_several_sources_and_says_what_it_guesses(data, save_image):
    save_image("more/a.png", 9)
    Path("list.csv").write_text("path,text\nmore/a.png,黄色的狗\n", encoding="utf-8")
    status, out, err = data("build", "pictures", "list.csv", "-o", "store", "--held-out", "0", "--fit", "pad")
    assert (status, out) == (0, ["store: 9 rows of 9 pictures"])
    assert err == ['note: list.csv: pictures in "path", captions in "text"']


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "-o", "s"), "the source nothing does not exist; expected a folder, .csv, .tsv"),
        (("pictures/0.png", "-o", "s"), 'pictures/0.png: the suffix ".png" is unknown; expected a folder'),
        (("pictures", "-o", "s", "--held-out", "1"), "1.0 is not in the range 0<=x<1"),
        (("pictures", "-o", "pictures"), "pictures is there already: remove it, or choose another store with -o"),
        (("pictures", "-o", "s", "--model", "none"), "none"),
    ],
)
def test_data_build_refuses_in_one_line(data, arguments, message):
    status, out, err = data("build", *arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert not [name for name in os.listdir(".") if name.startswith("s")]
