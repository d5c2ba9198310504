"""The cache of compiled extensions: stale locks are removed, and a compilation is announced."""

import pytest
import torch

from cogview.diagnostics.machine import check_extensions
from cogview.training.engines.deepspeed_extensions import CPU_EXTENSION, prepare_extensions, stale_locks

CPU = torch.device("cpu")


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock file beside an extension, in a cache of its own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / CPU_EXTENSION).mkdir()
    path = tmp_path / CPU_EXTENSION / "lock"
    path.touch()
    return path


def test_prepare_extensions_removes_the_lock_of_a_killed_compilation(lock, capsys):
    """Every later start would wait for the lock in silence."""
    prepare_extensions(CPU)
    assert not lock.exists()
    removed, compiles = capsys.readouterr().err.splitlines()
    assert removed.startswith(f"removed {lock}: ")
    assert compiles == f"DeepSpeed compiles {CPU_EXTENSION} in {lock.parent} once; this takes minutes"


def test_prepare_extensions_keeps_a_lock_that_a_process_holds(lock, capsys):
    with lock.open():
        assert stale_locks() == []
        prepare_extensions(torch.device("cuda"))
    assert lock.exists()
    assert capsys.readouterr().err == ""


def test_prepare_extensions_prints_nothing_when_the_extension_is_compiled(lock, capsys):
    lock.rename(lock.with_name(f"{CPU_EXTENSION}.so"))
    prepare_extensions(CPU)
    assert capsys.readouterr().err == ""


def test_check_extensions_names_a_stale_lock(lock):
    pytest.importorskip("deepspeed")
    (finding,) = check_extensions()
    assert str(finding).startswith(f"note     deepspeed     {lock} was left by a compilation that was killed")
