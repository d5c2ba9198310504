"""Reading of run folders: metrics, state, former names, and the differences between runs."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from cogview.errors import InputError
from cogview.training.plots import plot_runs
from cogview.training.run_folder import RunFolder
from cogview.training.run_lock import RunLock
from cogview.training.run_record import Best, common_steps, differing, find_runs, flat, names_apart, read_run
from tests.training.factories import RUN_SETTINGS, write_run


def age(folder: Path, seconds: float) -> None:
    """Set back the time of the last change."""
    for path in (folder / "metrics.jsonl", folder / "recipe.yaml"):
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_read_run_returns_what_a_run_has_logged(tmp_path):
    record = read_run(write_run(tmp_path / "红苹果" / "transformer-run"))
    assert (record.name, record.done, record.planned, record.state) == ("红苹果/transformer-run", 100, 100, "finished")
    assert record.settings == RUN_SETTINGS
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


def test_read_run_skips_damaged_lines_and_keeps_the_later_of_two_values(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 1.5}\n\x00\x00\n[1]\n{"loss": 3}\n{"step": 25, "loss": NaN}\n{"step": 30, "lo')
    loss = read_run(folder).training["loss"]
    assert loss.steps == (10, 20, 25)
    assert loss.values == pytest.approx((4.8, 1.5, float("nan")), nan_ok=True)


def test_read_run_takes_a_quiet_run_for_stopped(tmp_path):
    folder = write_run(tmp_path / "run", steps=50)
    assert read_run(folder).state == "running"
    age(folder, 400)
    assert read_run(folder).state == "stopped"
    write_run(folder, steps=100)
    age(folder, 400)
    assert read_run(folder).state == "finished"


def test_read_run_takes_a_killed_run_for_stopped_at_once(tmp_path):
    """The lock of a run is released when its process dies, whatever the age of its files."""
    folder = write_run(tmp_path / "run", steps=50)
    lock = RunLock(folder)
    lock.acquire()
    age(folder, 4000)
    assert read_run(folder).state == "running"
    lock.release()
    age(folder, 0)
    assert read_run(folder).state == "stopped"


def test_read_run_gives_a_slow_run_more_time(tmp_path):
    folder = write_run(tmp_path / "run", steps=10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "samples_per_second": 0.4}) + "\n")  # 80 rows took 200 seconds
    age(folder, 400)
    assert read_run(folder).state == "running"
    age(folder, 700)
    assert read_run(folder).state == "stopped"


def test_read_run_returns_an_empty_record_of_a_new_run(tmp_path):
    RunFolder(tmp_path / "run").start({}, resume=False)
    record = read_run(tmp_path / "run")
    assert (record.done, record.planned, record.state, record.seconds) == (0, None, "running", None)
    assert (record.training, record.checkpoints, record.best) == ({}, (), None)
    with pytest.raises(InputError, match=r"no metrics yet in .*run$"):
        plot_runs([record], tmp_path / "curves.png")


def test_read_run_refuses_other_folders(tmp_path):
    with pytest.raises(InputError, match=r"is no run: expected recipe.yaml and metrics.jsonl"):
        read_run(tmp_path)
    with pytest.raises(InputError, match=r"nothing, which does not exist, is no run"):
        read_run(tmp_path / "nothing")


def test_find_runs_looks_at_and_below_folders(tmp_path):
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


def test_differing_returns_keys_of_flat_settings():
    one = {"training": {"steps": 100, "tasks": {"generate": 1.0}, "betas": [0.9, 0.95]}, "store": None, "engine": {}}
    other = {"training": {"steps": 200, "tasks": {"generate": 1.0, "caption": 2.0}, "betas": [0.9, 0.95]}, "engine": {}}
    assert flat(one)["training.tasks.generate"] == 1.0
    assert differing([flat(one), flat(other)]) == ["training.steps", "store", "training.tasks.caption"]
    assert differing([flat(one), flat(one)]) == []


def test_common_steps_are_evenly_spaced_and_end_with_the_last(tmp_path):
    one = read_run(write_run(tmp_path / "one")).training["loss"]
    other = read_run(write_run(tmp_path / "other", steps=80)).training["loss"]
    assert common_steps([one, other], 100) == list(range(10, 81, 10))
    assert common_steps([one, other], 4) == [20, 40, 60, 80]
    assert common_steps([one, other], 1) == [80]
    assert common_steps([one, None], 4) == []
    assert common_steps([], 4) == []


def test_names_apart_are_as_long_as_needed(tmp_path):
    folders = ["a/x/run", "b/x/run", "b/y/run"]
    records = [read_run(write_run(tmp_path / name, steps=10)) for name in folders]
    assert names_apart(records[1:]) == ["x/run", "y/run"]
    assert names_apart(records) == folders


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


def test_read_run_refuses_a_damaged_recipe(tmp_path):
    folder = write_run(tmp_path / "run", steps=10)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(["红苹果"], allow_unicode=True), encoding="utf-8")
    with pytest.raises(InputError, match=r"recipe.yaml is no recipe"):
        read_run(folder)


@pytest.mark.parametrize(
    "content",
    [
        '{"step": "../x", "validation_loss": 1.0}',
        '{"step": 50, "validation_loss": null}',
        '{"step": [], "validation_loss": 1.0}',
        '{"step": -1, "validation_loss": 1.0}',
        '{"step": 50, "validation_loss": 1' + "0" * 400 + "}",
    ],
)
def test_read_run_ignores_a_best_step_that_is_damaged(tmp_path, content):
    """Values of other types in best.json were a TypeError or ValueError in `cogview runs` and in training."""
    run = write_run(tmp_path / "run", steps=50)
    (run / "checkpoints" / "best.json").write_text(content)
    assert read_run(run).best is None


def test_read_run_ignores_numbers_that_no_float_holds(tmp_path):
    run = write_run(tmp_path / "run", steps=20)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": 1' + "0" * 400 + '}\n{"step": 1' + "0" * 400 + ', "loss": 1.0}\n')
    (run / "recipe.yaml").write_text("training: {steps: .inf, batch_size: .nan}\n")
    record = read_run(run)
    assert record.training["loss"].steps == (10, 20)
    assert record.planned is None
    assert record.seconds is None
