"""Plots of runs: panels, legends, and runs with odd metrics."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.errors import InputError
from cogview.training.plots import plot_runs, save_run_plots
from cogview.training.run_folder import RunFolder
from cogview.training.run_record import read_run
from tests.training.factories import write_run


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_plot_runs_draws_one_or_two_runs(tmp_path, count):
    pytest.importorskip("matplotlib")
    records = [read_run(write_run(tmp_path / f"红苹果$_{number}", steps=50 * number)) for number in (1, 2)][:count]
    path = tmp_path / "pictures" / "curves.png"
    plot_runs(records, path)
    with Image.open(path) as image:
        assert image.width == 1200
        assert 700 < image.height < 1600
    assert colours(path) > 100


def test_plot_runs_labels_panels_and_legend(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: drawn.append(self))
    plot_runs([read_run(write_run(tmp_path / name)) for name in ("_a", "$b$")], tmp_path / "curves.png")
    panels = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    names = [f"{tmp_path.name}/{name}" for name in ("_a", "$b$")]
    assert [title for title in panels if title] == [
        *("loss", "generate image loss", "caption text loss", "learning rate", "gradient norm (x: steps skipped)"),
        *("loss scale", "tokens/s", "time spent waiting for data"),
        *(f"largest activation: {name}" for name in names),
    ]
    training, validation, best = panels["loss"].lines[:3]
    assert training.get_ydata() == pytest.approx([5 - 0.02 * step for step in range(10, 101, 10)])
    assert validation.get_xydata().tolist() == [[50, 4.5], [100, 5]]
    assert best.get_xydata().tolist() == [[50, 4.5]]
    assert panels["gradient norm (x: steps skipped)"].lines[1].get_xdata() == [30]
    (cells,) = panels[f"largest activation: {names[1]}"].collections
    assert cells.get_array()[:, -1].tolist() == [0.5, 100, 200, 300]
    texts = drawn[0].legends[0].get_texts()
    state = "finished at step 100 of 100"
    assert [text.get_text() for text in texts] == [*(f"{n}, {state}" for n in names), "training", "validation", "best"]
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_plot_runs_draws_odd_metrics_without_warnings(tmp_path):
    """A single point, values that are not finite, a metric that only one run has, and Chinese names."""
    pytest.importorskip("matplotlib")
    whole = write_run(tmp_path / "狐狸")
    short = tmp_path / "_苹果"
    RunFolder(short).start({}, resume=False)
    line = {"step": 7, "loss": float("nan"), "gradient_norm": float("inf"), "activation_max_layer_00": float("inf")}
    (short / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for folders in ([short], [short, whole]):
        plot_runs([read_run(folder) for folder in folders], tmp_path / "curves.png")
        assert colours(tmp_path / "curves.png") > 10


def test_loss_panels_show_the_psnr_of_an_image_run(tmp_path):
    """Besides the loss, validation metrics are shown, without their number of images, which is constant."""
    pytest.importorskip("matplotlib")
    from cogview.training.plots import _loss_panels

    RunFolder(tmp_path).start({}, resume=False)
    lines = [
        {"step": 10, "loss": 1.0, "psnr": 20.0, "alive": 0.5},
        {"step": 10, "held_out_psnr": 19.0, "held_out_codes_used": 0.5, "held_out_images": 8},
        {"step": 20, "held_out_psnr": 20.0, "held_out_codes_used": 0.6, "held_out_images": 8},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [title for title, _ in _loss_panels([read_run(tmp_path)])] == ["loss", "psnr", "codes used"]


def test_plot_runs_refuses_other_endings(tmp_path):
    with pytest.raises(InputError, match=r"curves.txt is not the name of an image: expected a name that ends in .png"):
        plot_runs([read_run(write_run(tmp_path / "run", steps=10))], tmp_path / "curves.txt")


def test_save_run_plots_prints_one_line_without_matplotlib(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", steps=10)
    real = builtins.__import__

    def absent(name, *arguments, **named):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", absent)
        save_run_plots(folder)
    message = "no curves.png: curves need matplotlib, which is missing: pip install 'cogview[train]' brings it\n"
    assert capsys.readouterr().err == message
    assert not (folder / "curves.png").exists()
    pytest.importorskip("matplotlib")
    save_run_plots(folder)
    assert capsys.readouterr().err == ""
    assert (folder / "curves.png").is_file()
