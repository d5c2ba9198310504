"""``cogview info``: a model in words, without its weights."""

import shutil

import pytest

from cogview.checkpoints.registry import KnownModel
from cogview.cli.main import main


def test_a_folder_in_words(tiny_checkpoint, capsys):
    assert main(["info", str(tiny_checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(":", 1) for line in lines if not line.startswith(" "))
    facts = {key: value.strip() for key, value in facts.items()}
    assert facts["tasks"] == "generate, caption, upscale, low_level"
    assert facts["commands"] == (
        "cogview generate, cogview complete, cogview caption, cogview rerank, cogview upscale, "
        "cogview upscale --low-level"
    )
    assert facts["pictures"] == "64 x 64 pixels from 8 x 8 codes"
    assert facts["longest prompt"] == "20 pieces"
    assert facts["sampling"] == "temperature 0.9, top-k 100, top-p off, guidance off, text attention off"
    assert facts["guidance"] == "possible: 10% of the captions were left out in training"
    assert facts["things"].startswith("4, listed by: ")
    assert "8192 image codes" in facts["vocabulary"]
    files = [line.split()[0] for line in lines if line.startswith(" ")]
    assert files == [
        "README.md",
        "config.json",
        "image/config.json",
        "image/model.safetensors",
        "model.safetensors",
        "text.model",
        "things.json",
    ]


def test_a_model_that_only_draws(drawing_checkpoint, capsys):
    assert main(["info", str(drawing_checkpoint)]) == 0
    facts = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    assert facts["tasks"].strip() == "generate"
    assert facts["commands"].strip() == "cogview generate, cogview complete"
    assert facts["guidance"].strip() == "not possible: no captions were left out in training"


def test_the_parameters_are_those_of_the_model(tiny_checkpoint, tiny_model, capsys):
    main(["info", str(tiny_checkpoint)])
    count = sum(parameter.numel() for parameter in tiny_model.transformer.parameters())
    assert f"2 layers, width 32, 2 heads, {count:,} parameters" in capsys.readouterr().out


def test_weights_are_not_read(tiny_checkpoint, tmp_path, capsys):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert main(["info", str(folder)]) == 0
    assert "model.safetensors (10 bytes)" in capsys.readouterr().out


def test_things_are_listed(tiny_checkpoint, capsys):
    assert main(["info", str(tiny_checkpoint), "--things"]) == 0
    assert capsys.readouterr().out == "🦊\t狐狸\n🐕\t狗\n🍎\t红苹果\t苹果\n🚗\t汽车\t轿车、小汽车\n"


def test_known_models(tiny_checkpoint, monkeypatch, capsys):
    row = KnownModel(embedded="models/tiny", about="draws foxes", licence="Apache-2.0", sha256={})
    monkeypatch.setattr("cogview.checkpoints.registry.known_models", lambda: {"tiny": row})
    monkeypatch.setattr("cogview.checkpoints.registry.find_checkpoint", lambda name: tiny_checkpoint)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "tiny: draws foxes (Apache-2.0)\n"
    assert main(["info", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "draws foxes" in out
    assert "Apache-2.0" in out


def test_mistakes_are_one_line(tiny_checkpoint, tmp_path, capsys):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "open-world")
    (folder / "things.json").unlink()
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["cogview-bse"], 'checkpoint "cogview-bse" is unknown; known: '),
        ([str(tmp_path / "empty")], f"{tmp_path / 'empty'} is no checkpoint folder: config.json is missing"),
        ([str(folder), "--things"], f"{folder} has no things.json: "),
        (["--things"], "--things needs a model: cogview info MODEL --things"),
    ]:
        assert main(["info", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"cogview info: {message}")
        assert err.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["info", "--help"])
    assert exit_.value.code == 0
    assert "--things" in capsys.readouterr().out
