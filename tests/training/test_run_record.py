"""What a run folder tells: where it was started, what it did, and its curves."""

import builtins
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cogview import __version__
from cogview.errors import InputError
from cogview.training.environment import write_environment
from cogview.training.plots import plot_runs, save_run_plots
from cogview.training.run_folder import RunFolder
from cogview.training.run_record import (
    Best,
    common_steps,
    differing,
    find_runs,
    flat,
    names_apart,
    read_run,
)

SETTINGS = {
    "preset": "5m",
    "store": None,
    "training": {"steps": 100, "batch_size": 8, "learning_rate": 1e-3, "tasks": {"generate": 2.0, "caption": 1.0}},
}


def plant(folder: Path, steps: int = 100, **changes) -> Path:
    """A run as training leaves it: a line each 10 steps, of 4 steps a second; judged each 50 steps."""
    run = RunFolder(folder)
    run._writer = False  # no TensorBoard
    run.start({**SETTINGS, "training": {**SETTINGS["training"], **changes}}, resume=True)
    for step in range(10, steps + 1, 10):
        layers = {f"activation_max_layer_{layer:02}": (layer + 1) * step for layer in range(3)}
        figures = {
            "loss": 5 - 0.02 * step,
            "generate_image_loss": 6 - 0.02 * step,
            "caption_text_loss": 3 - 0.02 * step,
            "gradient_norm": 1 + step % 3,
            "learning_rate": 1e-3 / step,
            **({"skipped_steps": 1.0} if step >= 30 else {}),
            "loss_scale": 2.0**16,
            "activation_max_embedding": 0.5,
            **layers,
            "samples_per_second": 32.0,
            "tokens_per_second": 3200.0,
            "data_wait": 0.02,
        }
        run.log(step, figures)
        if step % 50 == 0:
            validation = {"validation_loss": 4.5 + 0.01 * (step - 50), "validation_generate_image_loss": 5.0}
            run.log(step, validation)
            run.record_best(step, validation)
            run.save(step, lambda folder: None, keep=5)
    run.close()
    return folder


def age(folder: Path, seconds: float) -> None:
    for path in (folder / "metrics.jsonl", folder / "recipe.yaml"):
        os.utime(path, (time.time() - seconds, time.time() - seconds))


# What a run has done


def test_what_was_planted_comes_back(tmp_path):
    record = read_run(plant(tmp_path / "红苹果" / "transformer-run"))
    assert (record.name, record.done, record.planned, record.state) == ("红苹果/transformer-run", 100, 100, "finished")
    assert record.settings == SETTINGS
    assert record.training["loss"].steps == tuple(range(10, 101, 10))
    assert record.training["loss"].values == pytest.approx([5 - 0.02 * step for step in range(10, 101, 10)])
    assert record.training["skipped_steps"].steps[0] == 30
    assert record.training["loss"].at(50) == 4.0
    assert record.training["loss"].at(55) is None
    assert list(record.training)[:3] == ["loss", "generate_image_loss", "caption_text_loss"]
    assert {name: (series.steps, series.values) for name, series in record.validation.items()} == {
        "loss": ((50, 100), (4.5, 5.0)),
        "generate_image_loss": ((50, 100), (5.0, 5.0)),
    }
    assert [path.name for path in record.checkpoints] == ["step-00000050", "step-00000100"]
    assert (record.best.step, record.best.validation_loss) == (50, 4.5)
    assert record.seconds == pytest.approx(25)  # 100 steps of 8 rows at 32 rows a second
    assert record.environment is None


def test_lines_cut_short_are_passed_over_and_the_later_of_two_counts(tmp_path):
    folder = plant(tmp_path / "run", steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 1.5}\n\x00\x00\n[1]\n{"loss": 3}\n{"step": 25, "loss": NaN}\n{"step": 30, "lo')
    loss = read_run(folder).training["loss"]
    assert loss.steps == (10, 20, 25)
    assert loss.values == pytest.approx((4.8, 1.5, float("nan")), nan_ok=True)


def test_a_run_is_running_while_it_writes(tmp_path):
    folder = plant(tmp_path / "run", steps=50)
    assert read_run(folder).state == "running"
    age(folder, 400)
    assert read_run(folder).state == "stopped"
    plant(folder, steps=100)
    age(folder, 400)
    assert read_run(folder).state == "finished"


def test_a_slow_run_may_be_quiet_for_longer(tmp_path):
    folder = plant(tmp_path / "run", steps=10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "samples_per_second": 0.4}) + "\n")  # 80 rows took 200 seconds
    age(folder, 400)
    assert read_run(folder).state == "running"
    age(folder, 700)
    assert read_run(folder).state == "stopped"


def test_a_run_that_has_just_begun(tmp_path):
    RunFolder(tmp_path / "run").start({}, resume=False)
    record = read_run(tmp_path / "run")
    assert (record.done, record.planned, record.state, record.seconds) == (0, None, "running", None)
    assert (record.training, record.checkpoints, record.best) == ({}, (), None)
    with pytest.raises(InputError, match=r"no metrics yet in .*run$"):
        plot_runs([record], tmp_path / "curves.png")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is no run: expected recipe.yaml and metrics.jsonl"):
        read_run(tmp_path)
    with pytest.raises(InputError, match=r"nothing, which does not exist, is no run"):
        read_run(tmp_path / "nothing")


def test_runs_are_found_at_and_below_folders(tmp_path):
    names = ["b/image-run", "b/transformer-run", "a"]
    for name in names:
        RunFolder(tmp_path / name).start({}, resume=False)
    (tmp_path / "b" / ".aside").mkdir()
    (tmp_path / "b" / "around").symlink_to(tmp_path)
    expected = [tmp_path / name for name in ("a", "b/image-run", "b/transformer-run")]
    assert find_runs([tmp_path]) == expected
    assert find_runs([tmp_path / "b" / "transformer-run", tmp_path]) == [expected[2], *expected[:2]]
    assert find_runs([]) == []
    with pytest.raises(InputError, match="missing does not exist: expected the folder of a run, or one with runs"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(InputError, match=r"recipe.yaml is a file: expected the folder"):
        find_runs([tmp_path / "a" / "recipe.yaml"])


# How runs differ


def test_settings_that_differ_are_found_by_key():
    one = {"training": {"steps": 100, "tasks": {"generate": 1.0}, "betas": [0.9, 0.95]}, "store": None, "engine": {}}
    other = {"training": {"steps": 200, "tasks": {"generate": 1.0, "caption": 2.0}, "betas": [0.9, 0.95]}, "engine": {}}
    assert flat(one)["training.tasks.generate"] == 1.0
    assert differing([flat(one), flat(other)]) == ["training.steps", "store", "training.tasks.caption"]
    assert differing([flat(one), flat(one)]) == []


def test_common_steps_end_with_the_last_and_are_even(tmp_path):
    one = read_run(plant(tmp_path / "one")).training["loss"]
    other = read_run(plant(tmp_path / "other", steps=80)).training["loss"]
    assert common_steps([one, other], 100) == list(range(10, 81, 10))
    assert common_steps([one, other], 4) == [20, 40, 60, 80]
    assert common_steps([one, other], 1) == [80]
    assert common_steps([one, None], 4) == []
    assert common_steps([], 4) == []


def test_names_are_as_long_as_it_takes(tmp_path):
    folders = ["a/x/run", "b/x/run", "b/y/run"]
    records = [read_run(plant(tmp_path / name, steps=10)) for name in folders]
    assert names_apart(records[1:]) == ["x/run", "y/run"]
    assert names_apart(records) == folders


# Curves


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.parametrize("count", [1, 2])
def test_curves_are_drawn(tmp_path, count):
    pytest.importorskip("matplotlib")
    records = [read_run(plant(tmp_path / f"红苹果$_{number}", steps=50 * number)) for number in (1, 2)][:count]
    path = tmp_path / "pictures" / "curves.png"
    plot_runs(records, path)
    with Image.open(path) as image:
        assert image.width == 1200
        assert 700 < image.height < 1600
    assert colours(path) > 100


def test_panels_and_legend_say_what_was_planted(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: drawn.append(self))
    plot_runs([read_run(plant(tmp_path / name)) for name in ("_a", "$b$")], tmp_path / "curves.png")
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


@pytest.mark.filterwarnings("error")
def test_odd_figures_are_drawn_without_a_word(tmp_path):
    """A single point, numbers that are not finite, a run that lacks what the other has; and no missing character."""
    pytest.importorskip("matplotlib")
    whole = plant(tmp_path / "狐狸")
    short = tmp_path / "_苹果"
    RunFolder(short).start({}, resume=False)
    line = {"step": 7, "loss": float("nan"), "gradient_norm": float("inf"), "activation_max_layer_00": float("inf")}
    (short / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for folders in ([short], [short, whole]):
        plot_runs([read_run(folder) for folder in folders], tmp_path / "curves.png")
        assert colours(tmp_path / "curves.png") > 10


def test_read_run_knows_former_metric_names(tmp_path):
    """Earlier versions wrote ``held_out_`` where ``validation_`` is written now, in metrics and in best.json."""
    run = RunFolder(tmp_path)
    run.start({"training": {"steps": 100}}, resume=False)
    former = [{"step": 50, "held_out_loss": 4.5, "held_out_generate_image_loss": 5.0}]
    present = [{"step": 100, "validation_loss": 4.0, "validation_generate_image_loss": 4.75}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in former + present))
    (tmp_path / "checkpoints" / "best.json").write_text('{"step": 50, "held_out_loss": 4.5}\n')
    record = read_run(tmp_path)
    assert record.training == {}
    assert {name: series.values for name, series in record.validation.items()} == {
        "loss": (4.5, 4.0),
        "generate_image_loss": (5.0, 4.75),
    }
    assert record.best == run.best() == Best(50, 4.5)
    assert not run.record_best(75, {"validation_loss": 4.6})
    assert run.record_best(100, {"validation_loss": 4.0})
    assert run.best() == Best(100, 4.0)


def test_an_image_run_shows_its_psnr(tmp_path):
    """Beside the loss what was judged on held-out scenes, but for their number, which stays the same."""
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


def test_only_pictures_are_drawn(tmp_path):
    with pytest.raises(InputError, match=r"curves.txt is not the name of an image: expected a name that ends in .png"):
        plot_runs([read_run(plant(tmp_path / "run", steps=10))], tmp_path / "curves.txt")


def test_without_matplotlib_training_ends_with_one_line(tmp_path, monkeypatch, capsys):
    folder = plant(tmp_path / "run", steps=10)
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


# Where a run was started


def start(folder: Path, **changes) -> dict:
    """The line that a start of the run in ``folder`` leaves."""
    facts = {"recipe_path": None, "world_size": 2, "engine": "torch", "device": "cpu", "resumed_from": None, **changes}
    write_environment(folder, **facts)
    return json.loads((folder / "environment.jsonl").read_text().splitlines()[-1])


def test_each_start_leaves_a_line(tmp_path, monkeypatch):
    folder = plant(tmp_path / "run", steps=50)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "cogview", "train", "红 苹果.yaml"])
    first = start(folder)
    with (folder / "environment.jsonl").open("a") as file:
        file.write('{"time": "2')  # a start that was cut short
    last = start(folder, resumed_from=read_run(folder).checkpoints[-1])
    record = read_run(folder)
    assert [dict(line) for line in record.environments] == [first, last]
    assert (first["resumed_from"], last["resumed_from"]) == (None, "step-00000050")
    assert last["command"] == "python3 -m cogview train '红 苹果.yaml'"
    assert (last["world_size"], last["engine"], last["device"]) == (2, "torch", "cpu")
    assert last["versions"]["cogview"] == __version__
    assert last["versions"]["torch"].split("+")[0].count(".") == 2
    assert last["cpu_threads"] >= 1
    assert all(last[name] for name in ("time", "platform", "hostname", "device_names"))


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is missing")
def test_the_commit_of_a_recipe_and_whether_it_was_changed(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    recipes = tmp_path / "配方"
    recipes.mkdir()
    recipe = recipes / "红苹果.yaml"
    recipe.write_text("work: runs\n")
    (tmp_path / "run").mkdir()

    def found() -> dict | None:
        return start(tmp_path / "run", recipe_path=recipe)["recipe_git"]

    assert found() is None  # no checkout
    git(recipes, "init", "-q")
    assert found() is None  # no commit
    git(recipes, "add", ".")
    git(recipes, "commit", "-q", "-m", "one")
    commit = git(recipes, "rev-parse", "HEAD")
    assert found() == {"root": str(recipes.resolve()), "commit": commit, "dirty": False}
    (recipes / "notes.txt").write_text("not of the repository")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))  # as in a hook
    assert found()["dirty"] is False
    recipe.write_text("work: elsewhere\n")
    assert found() == {"root": str(recipes.resolve()), "commit": commit, "dirty": True}
    assert start(tmp_path / "run", recipe_path=recipes / "notes.txt")["recipe_git"]["dirty"] is True

    # A package in the same checkout is not told twice; one that lies in somebody else's has no commit.
    monkeypatch.setattr("cogview.training.environment.PACKAGE_FILE", recipe)
    line = start(tmp_path / "run", recipe_path=recipe)
    assert (line["git"]["commit"], line["recipe_git"]) == (commit, None)
    monkeypatch.setattr("cogview.training.environment.PACKAGE_FILE", recipes / "notes.txt")
    line = start(tmp_path / "run", recipe_path=recipe)
    assert (line["git"], line["recipe_git"]["commit"]) == (None, commit)


def test_nothing_that_fails_stops_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    monkeypatch.setattr("socket.gethostname", lambda: 1 / 0)
    monkeypatch.setattr("cogview.training.environment._device_names", lambda device: 1 / 0)
    found = start(tmp_path, recipe_path=tmp_path / "missing.yaml")
    assert [found[name] for name in ("git", "recipe_git", "hostname", "device_names")] == [None] * 4
    assert found["recipe"] == str(tmp_path / "missing.yaml")
    write_environment(
        tmp_path / "missing", recipe_path=None, world_size=1, engine="torch", device="cpu", resumed_from=None
    )
    err = capsys.readouterr().err
    assert (
        err
        == f"warning: {tmp_path / 'missing' / 'environment.jsonl'} could not be written: No such file or directory\n"
    )


def test_settings_are_read_as_recipes_are(tmp_path):
    folder = plant(tmp_path / "run", steps=10)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(["红苹果"], allow_unicode=True), encoding="utf-8")
    with pytest.raises(InputError, match=r"recipe.yaml is no recipe"):
        read_run(folder)
