"""``scripts/benchmarks/gate_faults.py``: planted faults, the table of runs made by hand, and runs that continue."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cogview.cli.evaluate_gate import GATE_FILE
from cogview.cli.main import main as cogview
from cogview.emoji.evaluation import gate as gate_module
from cogview.emoji.scene import SceneWeights
from cogview.errors import InputError
from cogview.evaluation.manifest import Manifest, read_result

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
MANIFEST = Manifest(measure="gate-faults", settings={"prompts": 500})


@pytest.fixture
def gate_faults(load_script, monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_script("gate_faults")


def test_scale_group_multiplies_the_first_group_alone(gate_faults):
    weights = {"a": torch.ones(2, 128), "b": torch.ones(2, 128)}
    gate_faults.scale_group(weights, matrices=("a",), factor=3.0)
    assert weights["a"].tolist() == [[3.0] * 64 + [1.0] * 64] * 2
    assert (weights["b"] == 1).all()


def test_swap_norms_exchanges_weights_and_biases(gate_faults):
    weights = {
        f"{name}.{part}": torch.full((2,), value)
        for name, value in (("a", 1.0), ("b", 2.0))
        for part in ("weight", "bias")
    }
    gate_faults.swap_norms(weights, pairs=[("a", "b")])
    assert {name: weight[0].item() for name, weight in weights.items()} == {
        "a.weight": 2.0,
        "a.bias": 2.0,
        "b.weight": 1.0,
        "b.bias": 1.0,
    }


def test_shared_first_noise_shares_the_first_code_of_a_prompt_alone(gate_faults, tiny_model):
    def codes():
        return np.stack([image.codes.reshape(-1) for image in tiny_model.generate(["狐狸"] * 8, seed=list(range(8)))])

    with gate_faults.shared_first_noise():
        shared = codes()
    free = codes()
    assert len(np.unique(shared[:, 0])) == 1 < len(np.unique(free[:, 0]))
    assert len(np.unique(shared[:, 1])) > 1


def test_write_runs_makes_the_table_that_is_counted_by_hand(gate_faults, tmp_path):
    path = tmp_path / "runs.json"
    runs = {
        "unchanged 1": {"everything": 1.0, "fell.everything": 0.0, "ranking": 0.9, "fell.ranking": 0.0},
        "unchanged 2": {"everything": 0.9, "fell.everything": 0.0, "ranking": 0.5, "fell.ranking": 1.0},
        "scale 1": {"everything": 0.6, "fell.everything": 1.0, "clean": 0.2, "fell.clean": 1.0},
        "scale 2": {"everything": 0.8, "fell.everything": 1.0, "clean": 0.2, "fell.clean": 0.0},
    }
    gate_faults.write_runs(path, MANIFEST, runs)
    result = read_result(path)
    assert {name: (value.value, value.n) for name, value in result.results.items() if "everything" not in name} == {
        "unchanged.noticed": (0.5, 2),
        "unchanged.ranking": (0.7, 2),
        "unchanged.fell.ranking": (0.5, 2),
        "scale.noticed": (1.0, 2),
        "scale.clean": (0.2, 2),
        "scale.fell.clean": (0.5, 2),
    }
    lines = gate_faults.format_table(result).splitlines()
    assert lines[2] == "| none | 95.0% | 50% (9.5%–90.5%) | 2 | ranking 1 |"
    assert lines[3].split(" | ")[1:] == ["70.0%", "100% (34.2%–100.0%)", "2", "everything 2, clean 1 |"]
    assert len(lines) == 4
    gate_faults.write_runs(path, MANIFEST, {**runs, "scale 3": {"ranking": 0.1, "fell.ranking": 1.0}})
    *_, line = gate_faults.format_table(read_result(path)).splitlines()
    assert line == "Everything right, with the fault of scale: measured in 2 of 3 runs."


def test_read_runs_returns_what_was_written_and_refuses_another_manifest(gate_faults, tmp_path):
    path = tmp_path / "runs.json"
    assert gate_faults.read_runs(path, MANIFEST) == {}
    runs = {"unchanged 1": {"everything": 1.0, "fell.everything": 0.0}, "scale 1": {"everything": 0.5}}
    gate_faults.write_runs(path, MANIFEST, runs)
    read = gate_faults.read_runs(path, MANIFEST)
    assert read["unchanged 1"] == runs["unchanged 1"]
    assert read["scale 1"] == {"everything": 0.5, "fell.everything": None}
    gate_faults.write_runs(path, MANIFEST, read)
    assert gate_faults.read_runs(path, MANIFEST) == read
    with pytest.raises(InputError, match=r"runs that differ in settings\.prompts"):
        gate_faults.read_runs(path, Manifest(measure="gate-faults", settings={"prompts": 60}))


def test_main_continues_the_runs_of_a_file_and_stops_a_fault_early(
    gate_faults, make_tiny_world, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    # The captions of pairs are longer than the tiny checkpoint reads.
    make_tiny_world(things=4, weights=SceneWeights(pair=0)).save(tmp_path / "work" / "world")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({"work": str(tmp_path / "work"), "scenes": {"things": 4}}), encoding="utf-8")
    monkeypatch.setattr(gate_module, "MIN_PROMPTS", 10)
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_checkpoint.iterdir():
        (model / path.name).symlink_to(path)
    words = ["--recipe", str(recipe), "--prompts", "10"]

    measured = []

    def constant(clean):
        """Return a function that measures a group of rows and returns constant ones."""

        def measure(group, *arguments):
            measured.append(group)
            rows = measure_group(group, *arguments)
            return {name: dict.fromkeys(row, clean if name == "clean" else 1.0) for name, row in rows.items()}

        return measure

    measure_group = gate_module.measure_group
    monkeypatch.setattr(gate_module, "CLEAN_SCENES", 10)
    monkeypatch.setattr(gate_module, "measure_group", constant(1.0))
    assert cogview(["eval", "gate", str(model), "--device", "cpu", *words, "-o", str(model / GATE_FILE)]) == 0
    monkeypatch.setattr(gate_faults, "measure_group", constant(0.0))
    measured.clear()
    file = tmp_path / "runs.json"
    run = [str(file), "--model", str(model), *words, "--fault", "unchanged", "temperature"]
    capsys.readouterr()
    assert gate_faults.main([*run, "--runs", "1"]) == 0
    output = capsys.readouterr()
    assert "fell: clean" in output.err
    assert [line.split(" | ")[3] for line in output.out.splitlines()[2:]] == ["1", "1"]
    assert len(measured) == 6  # the first run of a fault is whole
    assert gate_faults.main([*run, "--runs", "2"]) == 0
    assert "unchanged 1:" not in capsys.readouterr().err
    assert measured[6:] == ["images", "diversity", "captions", "images"]
    assert gate_faults.main([str(file), "--read"]) == 0
    assert "temperature 2" in capsys.readouterr().out
    assert gate_faults.main([*run, "--prompts", "11"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
