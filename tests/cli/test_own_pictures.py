"""A recipe of one's own pictures: every command from a folder to an image, and what the commands refuse."""

import json
from pathlib import Path

import pytest
import yaml

from cogview.checkpoints.checkpoint import read_config
from cogview.cli.main import main
from cogview.data.builders.picture_index import divide, read_index
from cogview.data.store import NO_TOKEN, TokenStore
from cogview.modeling import config


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, save_image):
    """Return a function that runs a command on a recipe in a folder with ``pictures``: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 32, 2))
    for number in range(16):
        save_image(f"pictures/{number}.png", number, (40 + number, 40))
        caption = f"{'红蓝绿黄'[number % 4]}色的{'狐狸和狗'[number % 3]}"
        Path(f"pictures/{number}.txt").write_text(caption, encoding="utf-8")
    recipe = {
        "work": "work",
        "text": {"pictures": ["pictures"], "size": 300, "max_piece_length": 1, "held_out": 0},
        "image": {
            "pictures": ["pictures"],
            "side": 64,
            "fit": "pad",
            "held_out": 0.2,
            "precision": "float32",
            "model": {"channels": [4, 8, 8], "encoder_blocks": [0, 0, 1], "num_codes": 16, "code_width": 4},
            "training": {"steps": 2, "batch_size": 4, "warmup_steps": 1},
        },
        "encode": {
            "pictures": ["pictures"],
            "side": 64,
            "fit": "pad",
            "held_out": 0.2,
            "text_width": 12,
            "batch_size": 8,
        },
        "transformer": {
            "preset": "tiny",
            "max_positions": 96,
            "precision": "float32",
            "sampling": {"top_k": 7},
            "training": {"steps": 2, "batch_size": 2, "warmup_steps": 1},
            "run": {"evaluate_every": 2},
        },
        "package": {},
    }

    def command(name, *overrides, **sections):
        Path("own.yaml").write_text(yaml.safe_dump({**recipe, **sections}), encoding="utf-8")
        device = [] if name in ("train-text", "package") else ["--device", "cpu"]
        status = main([name, "own.yaml", *device, *overrides])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return command


@pytest.mark.slow
def test_recipe_of_pictures_ends_in_a_model_that_generates(run, capsys):
    """From a folder of pictures to an image by commands alone, without the emoji world and its reports."""
    for name in ("train-text", "train-image", "encode", "train"):
        status, out, err = run(name)
        assert status == 0, err
    index = divide(read_index(Path("work/pictures.jsonl"), {"pictures": ["pictures"], "table": TABLE}), 0.2)
    assert len(TokenStore(Path("work/store"))) == len(index.training)
    assert len(TokenStore(Path("work/held-out-store"))) == len(index.held_out)  # both steps hold out the same pictures
    status, out, err = run("package")
    assert (status, out) == (0, ["work/model"])
    card = Path("work/model/README.md").read_text(encoding="utf-8")
    assert "| image tokenizer, psnr | " in card
    assert "| transformer, loss | " in card
    saved = read_config(Path("work/model"))
    assert (saved.sampling.top_k, saved.fit) == (7, "pad")
    assert not Path("work/model/grammar.json").exists()
    assert main(["generate", "红色的狐狸", "--model", "work/model", "--device", "cpu"]) == 0
    assert len(list(Path("outputs").glob("*.png"))) == 1

    capsys.readouterr()
    status, out, err = run("encode")
    assert (status, len(err)) == (2, 1)
    assert "work/store is there already: remove it, or choose another folder with --work" in err[0]


TABLE = {"folder": None, "image_column": None, "caption_columns": [], "boxes_column": None}


def test_encode_of_pictures_reports_what_is_left_out(run):
    for name in ("train-text", "train-image"):
        assert run(name)[0] == 0
    Path("pictures/0.txt").unlink()
    status, out, err = run("encode")
    assert (status, len(out)) == (1, 2)
    assert "left out: 1, listed in work/store-left-out.jsonl" in err
    assert out[1].startswith("work/held-out-store: ")


def test_encode_of_a_table_with_boxes_feeds_the_losses_of_names(run, capsys):
    boxes = json.dumps([{"text": "狐狸", "box": [0, 0, 30, 40]}], ensure_ascii=False).replace('"', '""')
    lines = [f'pictures/{number}.png,红色的狐狸,"{boxes}"' for number in range(16)]
    Path("list.csv").write_text("\n".join(["image,caption,boxes", *lines]), encoding="utf-8")
    encode = {"pictures": ["list.csv"], "table": {"boxes_column": "boxes"}, "held_out": 0.2, "text_width": 12}
    for name in ("train-text", "train-image", "encode"):
        status, _, err = run(name, encode=encode)
        assert status == 0, err
    named = TokenStore(Path("work/store"))[0]["named"]
    assert 0 < (named != NO_TOKEN).sum() < 64
    status, _, err = run("train", "training.name_loss_weight=0.5", "training.tasks={generate: 1}", encode=encode)
    assert status == 0, err
    metrics = [
        json.loads(line) for line in Path("work/transformer-run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert any(line.get("generate_name_loss", 0) > 0 for line in metrics)


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        ({"pictures": []}, "section encode of own.yaml: pictures must name at least one source"),
        ({"pictures": ["pictures"], "named": True}, "named needs a column of boxes, table: {boxes_column: NAME}"),
        ({"pictures": ["pictures"], "rows": 9}, '"rows" is unknown'),
        ({"pictures": ["pictures"]}, "there is no image tokenizer at work/image; make it with: cogview train-image"),
    ],
)
def test_encode_of_pictures_refuses_in_one_line(run, encode, message):
    """A side that no transformer takes was refused by ``cogview train`` only, after hours of encoding."""
    status, out, err = run("encode", encode=encode)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]


def test_package_of_pictures_needs_a_checkpoint(run):
    status, out, err = run("package")
    assert (status, out, len(err)) == (2, [], 1)
    assert "work/transformer-run holds no checkpoint; train with: cogview train own.yaml" in err[0]
