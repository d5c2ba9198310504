"""The cache of compiled extensions: stale locks are named and removed."""

import pytest

from cogview.diagnostics.machine import check_extensions
from cogview.training.engines.deepspeed_extensions import remove_stale_locks, stale_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock file beside an extension, in a cache of its own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "async_io" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_remove_stale_locks_removes_the_lock_of_a_killed_compilation(lock, capsys):
    """Every later start would wait for the lock in silence."""
    remove_stale_locks()
    assert not lock.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"removed {lock}: ")


def test_remove_stale_locks_keeps_a_lock_that_a_process_holds(lock, capsys):
    with lock.open():
        assert stale_locks() == []
        remove_stale_locks()
    assert lock.exists()
    assert capsys.readouterr().err == ""


def test_check_extensions_names_a_stale_lock(lock):
    pytest.importorskip("deepspeed")
    (finding,) = check_extensions()
    assert str(finding).startswith(f"note     deepspeed     {lock} was left by a compilation that was killed")
