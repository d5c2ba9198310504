"""The lock of a run folder: who holds it, and what a refused training leaves behind."""

import os

import pytest

from cogview.errors import RetryLaterError
from cogview.training import run_lock
from cogview.training.run_lock import RunLock, is_training


def test_run_lock_excludes_another_training(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "RETRY_SECONDS", 0.0)
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    first.acquire()
    assert is_training(tmp_path / "run")
    with pytest.raises(RetryLaterError, match=f"is trained by another process .process {os.getpid()} on "):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_run_lock_removes_a_folder_that_holds_nothing_else(tmp_path):
    """A training that was refused left a folder with a lock behind."""
    lock = RunLock(tmp_path / "work" / "image-run")
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_run_lock_keeps_what_was_there_before(tmp_path):
    (tmp_path / "empty").mkdir()
    lock = RunLock(tmp_path / "empty")
    lock.acquire()
    lock.release()
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]
    lock.acquire()
    (tmp_path / "empty/recipe.yaml").write_text("{}")
    lock.release()
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["recipe.yaml", "run.lock"]
    assert is_training(tmp_path / "empty") is False


def test_run_lock_is_taken_anew_when_its_file_was_removed_meanwhile(tmp_path, monkeypatch):
    """Of two that wait for a training that is refused, each locked another file."""
    folder, removed = tmp_path / "run", []
    wait = run_lock.try_lock

    def remove_first(file, **settings):
        if not removed:
            removed.append(file)
            (folder / "run.lock").unlink()
        return wait(file, **settings)

    monkeypatch.setattr(run_lock, "try_lock", remove_first)
    lock = RunLock(folder)
    lock.acquire()
    assert removed
    assert is_training(folder)
    lock.release()
