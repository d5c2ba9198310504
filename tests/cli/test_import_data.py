"""``cogview import-data``, and training on datasets of CogView v1."""

import json
import pickle
import shutil

import lmdb
import numpy as np
import pytest
import yaml
from PIL import Image

from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.image_tokenizer import codebook_hash, load_image_tokenizer
from cogview.cli.main import main
from cogview.data.store import TokenStore, text_lengths
from cogview.modeling import config
from cogview.tokenizers.text import TextTokenizer

CAPTIONS = ["红色背景上的一只狐狸在汽车的左边", "蓝色背景上的三只狗在鱼的左边", "绿色背景上的两只苹果在鱼的左边", ""]


@pytest.fixture(scope="session")
def pieces(tiny_checkpoint):
    text_tokenizer = TextTokenizer.load(tiny_checkpoint / "text.model")
    return [text_tokenizer.encode(caption) for caption in CAPTIONS]


def write_bin(path, texts, seed=0):
    """Return rows of 32 x 32 codes."""
    ids = np.full((len(texts), 64 + 1024), -1, dtype="<i4")
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = np.array(text, dtype=int) + 8192
    ids[:, 64:] = np.random.default_rng(seed).integers(0, 8192, (len(texts), 1024))
    ids.tofile(path)
    return ids[:, 64:]


def write_lmdb(path, texts, seed=0):
    codes = np.random.default_rng(seed).integers(0, 8192, (len(texts), 32, 32))
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for number, text in enumerate(texts):
            transaction.put(b"%d" % number, pickle.dumps((np.array(text, dtype=int) + 8192, codes[number]), protocol=2))
        transaction.put(b"length", b"%d" % len(texts))
    return codes.reshape(len(texts), 1024)


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_import_data_writes_a_store(tiny_checkpoint, pieces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    codes = [write_bin("one.bin", pieces), write_lmdb("two", pieces[::-1], seed=1)]
    # A source may follow an option.
    assert main(["import-data", "one.bin", "--model", str(tiny_checkpoint), "-o", "store", "two"]) == 0
    assert capsys.readouterr().out == "store: 8 rows\n"
    store = TokenStore("store")
    config, text_tokenizer = read_config(tiny_checkpoint), TextTokenizer.load(tiny_checkpoint / "text.model")
    store.check_compatible(
        codebook_sha256=codebook_hash(load_image_tokenizer(tiny_checkpoint / "image")),
        num_image_codes=8192,
        num_text_pieces=text_tokenizer.size,
        grid=32,
        layout="generate",
    )
    rows = store.read(range(8))
    assert rows["text"].shape == (8, config.max_text)
    lengths = text_lengths(rows["text"])
    read = [text_tokenizer.decode(text[:length]) for text, length in zip(rows["text"], lengths, strict=True)]
    assert read == CAPTIONS + CAPTIONS[::-1]
    np.testing.assert_array_equal(rows["image"], np.concatenate(codes))


def test_import_data_skip_bad_skips_invalid_rows(tiny_checkpoint, pieces, tmp_path, capsys):
    write_bin(tmp_path / "data.bin", [*pieces, range(21), [500]])
    arguments = ["import-data", str(tmp_path / "data.bin"), "--model", str(tiny_checkpoint), "-o", str(tmp_path / "s")]
    assert main(arguments) == 2
    assert f"row 5 of {tmp_path / 'data.bin'} holds 8692 at 0, expected -1 or 8192…" in one_line(capsys)
    assert main([*arguments, "--skip-bad"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 's'}: 4 rows\n"
    assert f"rows skipped: 2; the first: row 4 of {tmp_path / 'data.bin'} has a text of 21 pieces" in output.err
    assert len(TokenStore(tmp_path / "s")) == 4
    assert main(arguments) == 2
    assert f"{tmp_path / 's'} is already there: remove it" in one_line(capsys)


def test_import_data_rejects_an_incomplete_model(tiny_checkpoint, pieces, tmp_path, capsys):
    write_bin(tmp_path / "data.bin", pieces)
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "text.model").unlink()
    assert main(["import-data", str(tmp_path / "data.bin"), "--model", str(folder), "-o", str(tmp_path / "s")]) == 2
    assert f"the checkpoint {folder} is incomplete: text.model is missing" in one_line(capsys)


def test_import_data_help_lists_every_option(capsys):
    assert main(["import-data", "--help"]) == 0
    assert "--skip-bad" in capsys.readouterr().out


# Training


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path, monkeypatch):
    """Write a recipe with the tokenizers of the tiny checkpoint."""
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 32, 2))
    (tmp_path / "work").mkdir()
    shutil.copytree(tiny_checkpoint / "image", tmp_path / "work" / "image")
    shutil.copyfile(tiny_checkpoint / "text.model", tmp_path / "work" / "text.model")
    transformer = {
        "preset": "tiny",
        "max_positions": 1093,
        "training": {"steps": 2, "batch_size": 2, "warmup_steps": 1, "tasks": {"generate": 1, "caption": 1}},
        "run": {"log_every": 1, "save_every": 2, "evaluate_every": 0},
        "precision": "float32",
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"work": str(tmp_path / "work"), "transformer": transformer}), encoding="utf-8")
    return path


@pytest.mark.slow
def test_import_data_gives_equal_training_from_a_dataset_and_its_import(recipe, pieces, tmp_path, capsys, monkeypatch):
    image = Image.new("RGB", (256, 256))  # the real sample sheet would take longer than the rest of the test
    monkeypatch.setattr(
        "cogview.pipeline.cogview.CogView.generate", lambda self, captions, **_: [image] * len(captions)
    )
    write_bin(tmp_path / "data.bin", pieces * 2)
    write_bin(tmp_path / "held-out.bin", pieces[:1], seed=1)

    def train(store, held_out):
        shutil.rmtree(tmp_path / "work" / "transformer-run", ignore_errors=True)
        stores = [f"store={tmp_path / store}", f"validation_store={tmp_path / held_out}"]
        assert main(["train", str(recipe), *stores, "--device", "cpu"]) == 0
        run = tmp_path / "work" / "transformer-run"
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        checkpoint = run / "checkpoints" / "step-00000002"
        losses = [{name: value for name, value in line.items() if "loss" in name} for line in metrics]
        return checkpoint, losses, (checkpoint / "model.safetensors").read_bytes()

    checkpoint, *direct = train("data.bin", "held-out.bin")
    model = checkpoint.rename(tmp_path / "model")
    for name in ("data", "held-out"):
        source, store = str(tmp_path / f"{name}.bin"), str(tmp_path / name)
        assert main(["import-data", source, "--model", str(model), "-o", store]) == 0
    _, *imported = train("data", "held-out")
    assert len(direct[0]) >= 2
    assert any("validation_generate_image_loss" in line for line in direct[0])
    assert direct == imported


def test_import_data_rejects_incompatible_stores(recipe, tiny_checkpoint, pieces, tmp_path, capsys):
    write_bin(tmp_path / "data.bin", pieces)
    arguments = ["import-data", str(tmp_path / "data.bin"), "--model", str(tiny_checkpoint), "-o", str(tmp_path / "s")]
    assert main(arguments) == 0  # with room for 20 pieces, where a .bin file has 64
    capsys.readouterr()
    assert main(["train", str(recipe), f"store={tmp_path / 's'}", f"validation_store={tmp_path / 'data.bin'}"]) == 2
    assert f"data.bin has texts of up to 64 pieces, {tmp_path / 's'} of up to 20: make both" in one_line(capsys)
    assert main(["train", str(recipe), f"store={tmp_path / 's'}"]) == 2
    assert "store and validation_store belong together: give both, or neither" in one_line(capsys)
