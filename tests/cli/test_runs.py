"""``cogview runs``: the table of runs, their differences, and mistakes."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cogview.cli.main import main


def plant(folder: Path, *, steps: int = 40, start: float = 5.0, environment: dict | None = None, **training) -> Path:
    """Write a run folder as training does: metrics every 10 steps, validation every 20, 32 rows of 8 per second."""
    (folder / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
    settings = {"preset": "5m", "training": {"steps": 40, "batch_size": 8, "learning_rate": 1e-3, **training}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    lines = []
    for step in range(10, steps + 1, 10):
        loss = start - step / 10
        speed = {"samples_per_second": 32.0, "tokens_per_second": 3200.0, "mfu": 0.25}
        lines.append({"step": step, "loss": loss, "generate_image_loss": loss + 1, **speed})
        if step % 20 == 0:
            lines.append({"step": step, "held_out_loss": loss + 0.5, "held_out_generate_image_loss": loss + 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    best = {"step": 20, "held_out_loss": start - 1.5}
    (folder / "checkpoints" / "best.json").write_text(json.dumps(best) + "\n", encoding="utf-8")
    if environment is not None:
        (folder / "environment.jsonl").write_text(json.dumps(environment) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Write two runs into the folder ``runs`` of an empty current folder."""
    monkeypatch.chdir(tmp_path)
    plant(Path("runs/红苹果/transformer-run"), environment={"time": "1", "versions": {"torch": "2.6"}, "git": None})
    environment = {"time": "2", "versions": {"torch": "2.7"}, "git": None}
    plant(Path("runs/b/transformer-run"), steps=20, start=6.0, learning_rate=5e-4, environment=environment)
    return tmp_path


def words(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_runs_prints_a_table(runs, capsys):
    assert main(["runs"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [words(line) for line in out.splitlines()]
    assert rows == [
        ["run", "step", "loss", "validation (best at step)", "speed", "MFU", "hours", "state"],
        [rows[1][0], "20/40", "4.0000", "4.5000 (4.5000 at 20)", "3,200 tokens/s", "25.0%", "0.00", "running"],
        [rows[2][0], "40/40", "1.0000", "1.5000 (3.5000 at 20)", "3,200 tokens/s", "25.0%", "0.00", "finished"],
    ]
    assert [row[0] for row in rows[1:]] == ["runs/b/transformer-run", "runs/红苹果/transformer-run"]
    # Chinese characters are two columns wide on a terminal, and two bytes in this encoding.
    first, second = (line.encode("gb18030") for line in out.splitlines()[1:])
    assert first.index(b"20/40") == second.index(b"40/40")


def test_runs_accepts_folders_around_options(runs, capsys):
    for arguments in (["runs/b", "--json", "runs/红苹果"], ["--json", "runs/b", "runs/红苹果"]):
        assert main(["runs", *arguments]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert [row["name"] for row in listed] == ["b/transformer-run", "红苹果/transformer-run"]


def test_runs_json_prints_every_value(runs, capsys):
    with (runs / "runs" / "b" / "transformer-run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": NaN}\n')
    assert main(["runs", "runs/b", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert row["folder"] == "runs/b/transformer-run"
    assert (row["state"], row["steps_done"], row["steps_planned"], row["starts"]) == ("running", 30, 40, 1)
    assert row["training"]["loss"] is None  # JSON has no NaN
    assert row["validation"] == {"loss": 4.5, "generate_image_loss": 5.5}
    assert row["best"] == {"step": 20, "validation_loss": 4.5}
    assert row["checkpoints"] == ["runs/b/transformer-run/checkpoints/step-00000020"]
    assert row["settings"]["training"]["learning_rate"] == 5e-4
    assert row["environment"]["versions"] == {"torch": "2.7"}
    assert row["hours"] == pytest.approx(5 / 3600)


def test_runs_compare_prints_the_differences(runs, capsys):
    assert main(["runs", "runs/b", "runs/红苹果", "--compare"]) == 0
    blocks = [[words(line) for line in block.splitlines()] for block in capsys.readouterr().out.split("\n\n")]
    names = ["b/transformer-run", "红苹果/transformer-run"]
    assert blocks[1:] == [
        [["settings that differ", *names], ["training.learning_rate", "0.0005", "0.001"]],
        [["environments that differ", *names], ["versions.torch", "2.7", "2.6"]],
        [["loss at step", *names], ["10", "5.0000", "4.0000"], ["20", "4.0000", "3.0000"]],
        [["validation loss at step", *names], ["20", "4.5000", "3.5000"]],
        [["losses at the last common step", *names], ["generate_image_loss (20)", "5.0000", "4.0000"]],
        [["on validation rows", *names], ["generate_image_loss (20)", "5.5000", "4.5000"]],
    ]
    assert main(["runs", "runs/b", "runs/红苹果", "--compare", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"training.learning_rate": [5e-4, 1e-3]}
    assert found["environment"] == {"versions.torch": ["2.7", "2.6"]}
    assert found["loss"] == {"10": [5.0, 4.0], "20": [4.0, 3.0]}
    assert len(found["runs"]) == 2


def test_runs_compare_reports_runs_without_differences(tmp_path, capsys):
    folders = [str(plant(tmp_path / name)) for name in ("a", "b")]
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    assert main(["runs", *folders, "--compare"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\n\ntheir settings are equal\n\ntheir losses have no step in common\n")


def test_runs_plot_writes_a_figure(runs, capsys):
    pytest.importorskip("matplotlib")
    assert main(["runs", "--plot", "curves.png"]) == 0
    out, err = capsys.readouterr()
    assert err == "curves: curves.png\n"
    assert len(out.splitlines()) == 3
    with Image.open("curves.png") as image:
        assert image.width == 1200
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_runs_reports_a_folder_without_runs(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", f"no runs in {tmp_path}\n")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr() == ("[]\n", f'{{"info": "no runs in {tmp_path}"}}\n')


def test_runs_reports_unreadable_runs_at_the_end(runs, capsys):
    (runs / "runs" / "b" / "transformer-run" / "recipe.yaml").write_text("- a list\n")
    assert main(["runs"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.startswith("cogview runs: runs/b/transformer-run/recipe.yaml is no recipe")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing does not exist: expected the folder of a run, or one with runs below it"),
        (["runs/b", "--compare"], "--compare needs two runs or more, one was found in runs/b"),
        (["runs", "--plot", "curves.doc"], "curves.doc is not the name of an image: expected a name that ends in .png"),
    ],
)
def test_runs_reports_mistakes_in_one_line(runs, arguments, message, capsys):
    assert main(["runs", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cogview runs: {message}")
    assert err.count("\n") == 1


def test_runs_requires_a_folder_when_the_default_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    err = capsys.readouterr().err
    assert err == "cogview runs: there is no folder runs here: name the folders of runs, cogview runs FOLDER …\n"


def test_runs_help_lists_every_option(capsys):
    assert main(["runs", "--help"]) == 0
    assert "--compare" in capsys.readouterr().out


def test_runs_prints_the_recent_speed(tmp_path, capsys):
    folder = plant(tmp_path)
    paces = [1.0] * 30 + [50.0] * 9 + [2.0]
    lines = [{"step": step, "samples_per_second": pace} for step, pace in enumerate(paces, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["runs", str(folder)]) == 0
    row = words(capsys.readouterr().out.splitlines()[1])
    assert row[1:] == ["40/40", "-", "-", "50 samples/s", "-", "0.07", "finished"]
