"""Stores of edits from a table: a picture before and after, and the instruction."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.cli.main import main
from cogview.data.builders.encode import EncodeSettings, encode_dataset
from cogview.data.image_dataset import ImageExample
from cogview.data.store import NO_TOKEN, TokenStore
from cogview.modeling import config
from cogview.tokenizers.text import TextTokenizer

INSTRUCTIONS = ("把背景换成蓝色", "加一只狗", "去掉狗")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write six pairs of pictures of one colour, and a table of them; return a function that builds its store."""
    monkeypatch.chdir(tmp_path)
    lines = ["after,before,text"]
    for number in range(6):
        for name, level in (("before", 10 * number), ("after", 255 - 10 * number)):
            Path(name).mkdir(exist_ok=True)
            Image.new("RGB", (64, 64), (level, 90, 200)).save(f"{name}/{number}.png")
        lines.append(f"after/{number}.png,before/{number}.png,{INSTRUCTIONS[number % 3]}")
    Path("pairs.csv").write_text("\n".join(lines), encoding="utf-8")

    def build(checkpoint: Path, *options: str, source: str = "pairs.csv") -> int:
        columns = ["--image-column", "after", "--source-column", "before", "--held-out", "0", "--workers", "0"]
        return main(
            ["data", "build", source, "-o", "store", "--model", str(checkpoint), "--device", "cpu", *columns, *options]
        )

    return build


def test_build_writes_codes_of_the_source_beside_the_picture(table, tiny_checkpoint, capsys):
    """Captions are instructions, so the store feeds edits alone; no source counts as a picture without a caption."""
    assert table(tiny_checkpoint) == 0, capsys.readouterr().err
    store = TokenStore(Path("store"))
    assert store.header.fields == {"text": read_config(tiny_checkpoint).max_text, "image": 64, "source": 64} | {
        name: width for name, width in store.header.fields.items() if name in ("large", "small")
    }
    assert store.header.layouts == ("edit",)
    text_tokenizer = TextTokenizer.load(tiny_checkpoint / "text.model")
    image_tokenizer = load_image_tokenizer(tiny_checkpoint / "image")
    assert len(store) == 6
    for number in range(6):
        row = store[number]
        text = text_tokenizer.decode(row["text"][row["text"] != NO_TOKEN].tolist())
        assert text == INSTRUCTIONS[number % 3]
        for field, level in (("source", 10 * number), ("image", 255 - 10 * number)):
            pixels = torch.tensor([level, 90, 200]).float().div(255).view(1, 3, 1, 1).expand(1, 3, 64, 64)
            assert row[field].tolist() == image_tokenizer.encode(pixels).flatten().tolist()


def test_build_keeps_pictures_of_one_result_and_several_sources(table, tiny_checkpoint, capsys):
    """They are no copies of each other; a pair that occurs twice is."""
    rows = [
        "after/0.png,before/0.png,加一只狗",
        "after/0.png,before/1.png,加一只狗",
        "after/0.png,before/0.png,加一只狗",
    ]
    Path("pairs.csv").write_text("\n".join(["after,before,text", *rows]), encoding="utf-8")
    table(tiny_checkpoint)
    assert len(TokenStore(Path("store"))) == 2
    reasons = [json.loads(line)["reason"] for line in Path("store-left-out.jsonl").read_text("utf-8").splitlines()]
    assert "a copy of after/0.png, with no other caption" in reasons


def test_build_reports_sources_that_cannot_be_used(table, tiny_checkpoint):
    Image.new("RGB", (5, 5)).save("before/0.png")
    Path("before/1.png").unlink()
    content = Path("pairs.csv").read_text("utf-8").replace("before/2.png", "")
    Path("pairs.csv").write_text(content, encoding="utf-8")
    assert table(tiny_checkpoint) == 1
    reasons = [json.loads(line)["reason"] for line in Path("store-left-out.jsonl").read_text("utf-8").splitlines()]
    assert "its source 0.png is 5 x 5 pixels, expected at least 16 on a side" in reasons
    assert any("before/1.png" in reason for reason in reasons)
    assert 'the column "before" names no picture' in reasons
    assert len(TokenStore(Path("store"))) == 3


def test_build_refuses_a_source_column_of_what_is_no_table(table, tiny_checkpoint, capsys):
    assert table(tiny_checkpoint, source="after") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the column before of pictures before an edit needs a table, got after; expected .csv" in line


class Pairs:
    """Images of two greys, each from a source by an instruction."""

    side, names, is_shuffled, provenance = 64, (), True, {}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> ImageExample:
        def grey(level: int):
            return lambda scale: np.full((64, 64, 3), level, dtype=np.uint8)

        edit = {"instruction": INSTRUCTIONS[index % 3], "render_source": grey(20 * index)}
        return ImageExample(identity=str(index), captions=("一只狗",), render=grey(255 - 20 * index), **edit)


def test_train_runs_a_recipe_of_edit_and_fill(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    """From a store to a checkpoint whose config has the rates of what was left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 32, 2))
    text_tokenizer = TextTokenizer.load(tiny_checkpoint / "text.model")
    settings = EncodeSettings(text_width=16, source=True)
    encode_dataset(Path("store"), Pairs(), text_tokenizer, load_image_tokenizer(tiny_checkpoint / "image"), settings)
    training = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "tasks": {"edit": 2, "fill": 1, "generate": 1}}
    section = {
        "preset": "tiny",
        "max_positions": 96,
        "precision": "float32",
        "tokenizers": str(tiny_checkpoint),
        "store": "store",
        "validation_store": "store",
        "training": {**training, "source_dropout": 0.25, "fill_masks": {"box": 1, "side": 1}},
        "run": {"evaluate_every": 3, "log_every": 1},
    }
    Path("edit.yaml").write_text(yaml.safe_dump({"work": "work", "transformer": section}), encoding="utf-8")
    assert main(["train", "edit.yaml", "--device", "cpu"]) == 0, capsys.readouterr().err
    saved = read_config(Path("work/transformer-run/checkpoints/step-00000003"))
    assert (saved.tasks, saved.source_dropout) == (("edit", "fill", "generate"), 0.25)
    lines = [json.loads(line) for line in Path("work/transformer-run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert any("validation_edit_image_loss" in line and "validation_fill_image_loss" in line for line in lines)
    capsys.readouterr()
    assert main(["train", "edit.yaml", "--device", "cpu", "training.fill_masks={blob: 1}", "--work", "other"]) == 2
    assert "fill_masks: the kind 'blob' is unknown; known: box, random, side, all" in capsys.readouterr().err


def test_source_dropout_is_kept_only_for_models_that_edit(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    """A model without the task has nothing to leave out, whatever the default of the setting."""
    assert read_config(tiny_checkpoint).source_dropout == 0.0
    content = json.loads((tiny_checkpoint / "config.json").read_text("utf-8"))
    assert "source_dropout" not in content
