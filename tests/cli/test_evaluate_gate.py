"""``cogview eval gate``: equal runs pass, planted losses fail with their rows, and bad input is one line."""

import json

import pytest
import yaml

from cogview.cli.main import main
from cogview.config_io import to_mapping
from cogview.emoji.evaluation import gate as module
from cogview.emoji.scene import SceneWeights
from cogview.evaluation.manifest import Manifest, ResultItems, read_result, write_result


@pytest.fixture
def gate(make_tiny_world, tiny_checkpoint, tmp_path, monkeypatch):
    """A function that runs the gate on the tiny checkpoint in a world of its four things."""
    # The captions of pairs are longer than the tiny checkpoint reads.
    make_tiny_world(things=4, weights=SceneWeights(pair=0)).save(tmp_path / "work" / "world")
    monkeypatch.setattr(module, "MIN_PROMPTS", 10)
    monkeypatch.setattr(module, "CLEAN_SCENES", 20)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({"work": str(tmp_path / "work"), "scenes": {"things": 4}}), encoding="utf-8")

    def run(*options) -> int:
        words = ["eval", "gate", str(tiny_checkpoint), "--recipe", str(recipe), "--device", "cpu", "--prompts", "10"]
        return main([*words, *map(str, options)])

    return run


def test_gate_passes_an_equal_run_and_names_the_row_of_a_planted_loss(gate, tmp_path, capsys, monkeypatch):
    assert gate("-o", tmp_path / "first.json") == 0
    assert "nothing to compare with" in capsys.readouterr().err
    before = read_result(tmp_path / "first.json")
    assert before.manifest.measure == "gate"
    assert before.manifest.prompts.count == 10
    assert {"colour", "object", "everything", "clean", "different images", "captioning", "ranking"} <= set(
        before.results
    )

    assert gate("--against", tmp_path / "first.json", "-o", tmp_path / "second.json") == 0
    output = capsys.readouterr()
    assert "same captions and seeds" in output.err
    assert "FELL" not in output.out
    assert read_result(tmp_path / "second.json").items == before.items
    assert (
        gate("--against", tmp_path / "first.json", "--seed", "1", "--prompts", "11", "-o", tmp_path / "third.json") < 2
    )
    assert "other captions or seeds" in capsys.readouterr().err
    limits = [
        read_result(tmp_path / f"{name}.json").manifest.settings[module.CLEAN_LIMIT] for name in ("first", "third")
    ]
    assert limits[0] == limits[1] > 0

    generate = module.generate_images

    def collapsed(model, captions, seed, *rest):
        """Return the first image of a prompt for all of its images."""
        first: dict[str, object] = {}
        images = generate(model, captions, seed, *rest)
        return [first.setdefault(caption, image) for caption, image in zip(captions, images, strict=True)]

    monkeypatch.setattr(module, "generate_images", collapsed)
    assert gate("--against", tmp_path / "first.json") == 1
    output = capsys.readouterr()
    assert "FELL  different images:" in output.out
    assert "failed: lower than before: different images" in output.err

    first = (tmp_path / "first.json").read_bytes()  # a fall that replaced it would pass from then on
    assert gate("--against", tmp_path / "first.json", "-o", tmp_path / "first.json") == 2
    assert "first.json is the earlier result, which a worse one would replace" in capsys.readouterr().err
    assert (tmp_path / "first.json").read_bytes() == first


def test_gate_that_is_interrupted_says_that_no_result_was_written(gate, tmp_path, capsys, monkeypatch):
    """Nothing is kept of a measurement that is written at its end."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_gate", interrupted)
    assert gate("-o", tmp_path / "result.json") == 130
    assert capsys.readouterr().err == "cogview eval: interrupted; no result was written\n"
    assert not (tmp_path / "result.json").exists()


def test_gate_refuses_bad_input_in_one_line(gate, tmp_path, capsys, monkeypatch):
    """And before the model is loaded, which takes longest."""

    def loaded(*_, **settings):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("cogview.pipeline.cogview.CogView.from_pretrained", loaded)
    (tmp_path / "other.json").write_text(json.dumps({"format": "x"}), encoding="utf-8")
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"work": str(tmp_path)}), encoding="utf-8")
    (tmp_path / "bytes.json").write_bytes(bytes(range(256)))
    write_result(tmp_path / "scenes.json", Manifest(measure="scenes"), {})
    edited = (tmp_path / "scenes.json").read_text(encoding="utf-8").replace('"scenes"', '"gate"')
    (tmp_path / "edited.json").write_text(edited, encoding="utf-8")
    for options, message in (
        (("--against", tmp_path / "none.json"), "none.json"),
        (("--against", tmp_path), str(tmp_path)),
        (("--against", tmp_path / "bytes.json"), "bytes.json"),
        (("--against", tmp_path / "other.json"), "not a result"),
        (("--against", tmp_path / "edited.json"), "was changed after it was written"),
        (("--against", tmp_path / "scenes.json"), "measure scenes, expected gate"),
        (("--recipe", tmp_path / "plain.yaml"), "no section scenes"),
        (("--prompts", "3"), "at least 10 prompts, got 3"),
        (("-o", tmp_path), "is a folder; expected the name of a file"),
    ):
        assert gate(*options) == 2, options
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Usage")]
        assert message in line


def test_gate_refuses_a_result_of_another_world_in_one_line(gate, make_tiny_world, tmp_path, capsys):
    world = make_tiny_world(things=4)  # with pairs, unlike the one of the recipe
    settings = {"world": to_mapping(world.settings), "images of open prompts": 8, module.CLEAN_LIMIT: 1.0}
    manifest = Manifest(measure="gate", settings=settings)
    write_result(tmp_path / "pairs.json", manifest, {}, ResultItems(ids=[], values={}))
    assert gate("--against", tmp_path / "pairs.json") == 2
    assert "has world.weights.pair 1, expected 0: give the --recipe of its world" in capsys.readouterr().err
