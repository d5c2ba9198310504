"""``cogview eval scenes`` and ``eval gate`` on a model that edits a rich world."""

import json

import pytest
import yaml

from cogview.cli.main import main
from cogview.emoji.evaluation import gate as module
from cogview.emoji.scene import SceneWeights
from cogview.evaluation.manifest import read_result


@pytest.fixture
def recipe(make_tiny_world, tmp_path) -> str:
    """A recipe whose rich world holds the four things that the tiny checkpoint knows, in short captions."""
    weights = SceneWeights(pair=0)
    make_tiny_world(things=4, weights=weights, max_count=6).save(tmp_path / "work" / "world")
    path = tmp_path / "tiny.yaml"
    plain = {"work": str(tmp_path / "work"), "scenes": {"things": 4, "max_count": 6}}
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return str(path)


def test_eval_scenes_grades_the_edits_of_a_rich_world(recipe, edit_checkpoint, tmp_path, capsys):
    words = ["eval", "scenes", recipe, "--model", str(edit_checkpoint), "--device", "cpu", "-n", "4"]
    assert main([*words, "-o", str(tmp_path / "here")]) == 0
    output = capsys.readouterr().out
    assert "| everything right |" in output
    assert "| right edits |" in output
    report = json.loads((tmp_path / "here" / "report.json").read_text(encoding="utf-8"))
    assert report["edits"]["instructions"] == 4
    found = read_result(tmp_path / "here" / "result-scenes.json")
    assert {"generated.style", "edits.generated.everything", "edits.kept_codes"} <= set(found.results)
    assert found.items is not None
    assert len(found.items.ids) == len(found.items.pictures) == 8
    assert all((tmp_path / "here" / name).is_file() for name in found.items.pictures)


def test_gate_measures_edits_and_passes_an_equal_run(recipe, edit_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "MIN_PROMPTS", 8)
    monkeypatch.setattr(module, "CLEAN_SCENES", 8)
    words = ["eval", "gate", str(edit_checkpoint), "--recipe", recipe, "--device", "cpu", "--prompts", "8"]
    assert main([*words, "-o", str(tmp_path / "first.json")]) == 0
    rows = {"colour", "object", "everything", "clean", "captioning", "ranking", "edits", "kept codes"}
    assert rows <= set(read_result(tmp_path / "first.json").results)
    assert main([*words, "--against", str(tmp_path / "first.json")]) == 0
    assert "FELL" not in capsys.readouterr().out


def test_eval_captions_grades_the_parts_of_a_rich_world(recipe, edit_checkpoint, tmp_path, capsys):
    words = ["eval", "captions", recipe, "--model", str(edit_checkpoint), "--device", "cpu", "-n", "4"]
    assert main([*words, "-o", str(tmp_path / "here")]) == 0
    assert "| style (of " in capsys.readouterr().out
    assert "true_scenes.everything" in read_result(tmp_path / "here" / "result-captions.json").results
