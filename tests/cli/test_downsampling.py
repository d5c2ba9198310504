"""Image tokenizers of other strides and grids, from the recipe to the commands that use the packaged model."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cogview.checkpoints.checkpoint import read_config
from cogview.cli.main import main
from cogview.data.store import TokenStore
from cogview.modeling import config


@pytest.fixture
def cogview(tmp_path, monkeypatch, capsys, save_image):
    """Return a function that runs a command in a folder with captioned pictures: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 32, 2))
    for number in range(16):
        save_image(f"pictures/{number}.png", number, (40 + number, 40))
        caption = f"{'红蓝绿黄'[number % 4]}色的{'狐狸和狗'[number % 3]}"
        Path(f"pictures/{number}.txt").write_text(caption, encoding="utf-8")

    def run(*arguments):
        status = main([*map(str, arguments), *([] if arguments[0] in WITHOUT_DEVICE else ["--device", "cpu"])])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


WITHOUT_DEVICE = ("train-text", "package", "info")


def write_recipe(side: int, downsampling: int, *, large: bool = True) -> None:
    """Write ``own.yaml``: tiny networks, a few steps, all tasks that the stores allow."""
    channels = {4: [4, 8], 8: [4, 8, 8], 16: [4, 8, 8, 8]}[downsampling]
    grid = side // downsampling
    recipe = {
        "work": "work",
        "text": {"pictures": ["pictures"], "size": 300, "max_piece_length": 1, "held_out": 0},
        "image": {
            "pictures": ["pictures"],
            "side": side,
            "held_out": 0.2,
            "precision": "float32",
            "model": {"downsampling": downsampling, "channels": channels, "num_codes": 16, "code_width": 4},
            "training": {"steps": 2, "batch_size": 4, "warmup_steps": 1},
        },
        "encode": {
            "pictures": ["pictures"],
            "side": side,
            "held_out": 0.2,
            "text_width": 12,
            "batch_size": 8,
            "large": large,
        },
        "transformer": {
            "preset": "tiny",
            "max_positions": grid**2 + 20,
            "precision": "float32",
            "training": {
                "steps": 2,
                "batch_size": 2,
                "warmup_steps": 1,
                "tasks": {"generate": 1, "caption": 1, **({"upscale": 1} if large else {})},
            },
            "run": {"evaluate_every": 2},
        },
        "package": {},
    }
    Path("own.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def test_steps_of_a_recipe_refuse_sides_in_one_line_and_go_on_with_another(cogview):
    """A store that was begun with the wrong side had to be removed by hand."""
    write_recipe(80, 8)
    assert cogview("train-text", "own.yaml")[0] == 0
    assert cogview("train-image", "own.yaml")[0] == 0
    status, out, err = cogview("encode", "own.yaml")
    assert (status, out) == (2, [])
    assert err[-1] == (
        "cogview encode: images of 80 pixels have 10 codes on a side, but the task upscale needs a multiple of 4; the "
        "nearest sides that fit: 64 and 96"
    )
    assert cogview("encode", "own.yaml", "large=false")[0] == 0
    status, out, err = cogview("train", "own.yaml")
    assert (status, out) == (2, [])
    assert "upscale" in err[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("side", "downsampling"), [(48, 4), (64, 16), (96, 8)])
def test_model_of_another_grid_is_trained_packaged_and_used(cogview, side, downsampling):
    """Grids of 12 and 4 codes, and strides of 4 and 16 pixels."""
    write_recipe(side, downsampling)
    for name in ("train-text", "train-image", "encode", "train", "package"):
        status, _, err = cogview(name, "own.yaml")
        assert status == 0, (name, err)
    model, grid = ("--model", "work/model"), side // downsampling
    assert read_config(Path("work/model")).grid == grid

    assert cogview("generate", "红色的狐狸", *model)[0] == 0
    (image,) = Path("outputs").glob("*.png")
    assert Image.open(image).size == (side, side)
    assert cogview("complete", image, "--rows", 2, "--prompt", "狗", "-o", "completed", *model)[0] == 0
    assert [Image.open(path).size for path in Path("completed").glob("*.png")] == [(side, side)]
    assert cogview("upscale", image, "--prompt", "狗", "-o", "large", *model)[0] == 0
    assert [Image.open(path).size for path in Path("large").glob("*.png")] == [(2 * side, 2 * side)]
    assert cogview("caption", image, *model)[0] == 0
    assert cogview("rerank", "--prompt", "狗", image, "pictures/0.png", *model)[0] == 0

    (facts,) = (line for line in cogview("info", "work/model")[1] if line.startswith("images"))
    assert facts.endswith(f"{side} x {side} pixels from {grid} x {grid} codes")
    pixels = [line.split(":")[1].strip() for line in cogview("info", "work/image")[1] if line.startswith("pixels")]
    assert pixels == [f"{downsampling} x {downsampling} per code"]
    assert cogview("data", "build", "pictures", "-o", "again", "--held-out", 0.2, *model)[0] == 0
    assert TokenStore(Path("again")).header == TokenStore(Path("work/store")).header
    assert TokenStore(Path("again")).header.fields == {"text": 12, "image": grid**2, "large": 4 * grid**2}
    found = json.loads(cogview("eval", "image-tokenizer", "work/model", "pictures", "--json")[1][0])
    assert found["side"] == side
    assert cogview("estimate", *model)[0] == 0
