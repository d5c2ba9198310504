"""The environment that each start of a run records."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cogview import __version__
from cogview.training.environment import write_environment
from cogview.training.run_record import read_run
from tests.training.factories import write_run


def start(folder: Path, **changes) -> dict:
    """Write the environment of a start and return its line."""
    facts = {"recipe_path": None, "world_size": 2, "engine": "torch", "device": "cpu", "resumed_from": None, **changes}
    write_environment(folder, **facts)
    return json.loads((folder / "environment.jsonl").read_text().splitlines()[-1])


def test_write_environment_appends_a_line_for_each_start(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=50)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "cogview", "train", "红 苹果.yaml"])
    first = start(folder)
    with (folder / "environment.jsonl").open("a") as file:
        file.write('{"time": "2')  # a line that was cut short
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
def test_write_environment_records_the_commit_of_a_recipe(tmp_path, monkeypatch):
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
    (recipes / "notes.txt").write_text("untracked")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))  # as git hooks set it
    assert found()["dirty"] is False
    recipe.write_text("work: elsewhere\n")
    assert found() == {"root": str(recipes.resolve()), "commit": commit, "dirty": True}
    assert start(tmp_path / "run", recipe_path=recipes / "notes.txt")["recipe_git"]["dirty"] is True

    # The checkout of the package is recorded once; a package below another checkout has no commit.
    monkeypatch.setattr("cogview.training.environment.PACKAGE_FILE", recipe)
    line = start(tmp_path / "run", recipe_path=recipe)
    assert (line["git"]["commit"], line["recipe_git"]) == (commit, None)
    monkeypatch.setattr("cogview.training.environment.PACKAGE_FILE", recipes / "notes.txt")
    line = start(tmp_path / "run", recipe_path=recipe)
    assert (line["git"], line["recipe_git"]["commit"]) == (None, commit)


def test_write_environment_survives_facts_that_fail(tmp_path, monkeypatch, capsys):
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


def test_read_run_keeps_environments_of_earlier_versions(tmp_path):
    """Facts are neither required nor renamed: a line of an earlier version is returned as it is."""
    folder = write_run(tmp_path / "run", steps=10)
    line = {"time": "2025-01-01T00:00:00+00:00", "command": "cogview train a.yaml", "engine": "torch", "world_size": 1}
    (folder / "environment.jsonl").write_text(json.dumps(line) + "\n")
    assert dict(read_run(folder).environment) == line
    start(folder)
    assert [len(environment) > len(line) for environment in read_run(folder).environments] == [False, True]
