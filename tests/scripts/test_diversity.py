"""``scripts/benchmarks/diversity.py``: its values, continuing a result file, and a plot of the repository's result."""

from pathlib import Path

import numpy as np
import pytest

from cogview.emoji.scene import SceneWeights
from cogview.evaluation.manifest import read_result

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "scripts/benchmarks/results/diversity.json"


@pytest.fixture
def diversity(load_script):
    return load_script("benchmarks.diversity")


@pytest.fixture
def measure(diversity, make_tiny_world, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Return a function that runs the script with two prompts of a world of four things: status, stdout, stderr."""
    make_tiny_world(things=4, weights=SceneWeights(pair=0)).save(tmp_path / "world")
    for name, value in (("PROMPTS", ("一只狐狸", "两只狗")), ("PAIR", 0), ("SHOWN", (0, 1)), ("IMAGES", 3)):
        monkeypatch.setattr(diversity, name, value)

    def run(*arguments):
        fixed = [str(tmp_path / "world"), "--result", str(tmp_path / "result.json"), "--model", str(tiny_checkpoint)]
        status = diversity.main([*fixed, "--captions", "4", *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_background_entropy_is_a_fraction_of_that_of_equal_numbers(diversity):
    counts = np.array([[4, 0], [0, 4], [3, 1]])
    assert diversity.background_entropy(counts, np.array([0, 1])) == pytest.approx(1)
    assert diversity.background_entropy(counts, np.array([0, 0])) == pytest.approx(0)
    assert diversity.background_entropy(counts, np.array([[0, 1], [2, 2]])) == pytest.approx([1, 0.811278], rel=1e-5)


@pytest.mark.slow
def test_measure_settings_continues_a_result_and_refuses_another_protocol(diversity, measure, tmp_path, monkeypatch):
    status, out, _ = measure("--setting", "top_k=1", "--sheet", str(tmp_path / "sheet.png"))
    assert (status, len(out), out[2].split(" | ")[0]) == (0, 3, "| top_k_1")
    first = read_result(tmp_path / "result.json").results
    assert first["top_k_1.different"].value == 1  # of three images
    assert first["top_k_1.enough"].value == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    status, out, _ = measure("--setting", "top_k=1", "temperature=1.5,top_k=0")
    assert (status, [line.split(" | ")[0] for line in out[2:]]) == (0, ["| top_k_1", "| temperature_1.5-top_k_0"])
    second = read_result(tmp_path / "result.json").results
    assert second.items() > first.items()
    assert second["temperature_1.5-top_k_0.different"].value > 1
    monkeypatch.setattr(diversity, "SEED", 4)
    status, out, err = measure("--setting", "top_k=2")
    assert (status, out) == (2, [])
    assert err[-1].endswith("was measured otherwise (settings.seed_of_prompts): remove it, or give another --result")
    status, _, err = measure("--setting", "top_k=many")
    assert (status, err[-1]) == (2, "diversity.py: expected a setting such as temperature=0.3,top_k=5, got top_k=many")


def test_plot_result_shows_the_result_of_the_repository(diversity, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert diversity.main(["--result", str(RESULT), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    names = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {"default", "before_0.3"} < set(names)
