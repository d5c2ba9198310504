"""Errors of the operating system and of memory, in one line with a remedy."""

import errno
import os
import resource
import subprocess
import sys
import urllib.error

import pytest
import torch

from cogview.cli.failures import explain_error
from cogview.errors import ExitStatus, InputError, RetryLaterError, is_out_of_memory, reason_of

FULL = "the memory is full; finished results are kept; free some, or use less: a smaller --max-inference-batch-size, "


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_explain_error_shows_no_number_of_the_system(number):
    """A user read "[Errno 28] No space left on device"."""
    message, status = explain_error(OSError(number, os.strerror(number), "文件"))
    assert "Errno" not in message
    assert str(number) not in message
    assert status in (ExitStatus.MISTAKE, ExitStatus.RETRY_LATER)


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "the disk is full; finished results are kept; free some space, or choose another folder",
            3,
        ),
        (
            OSError(errno.EFBIG, "File too large"),
            "the limit on the size of a file (ulimit -f) is reached; finished results are kept; raise the limit",
            3,
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.png"),
            "a.png: the permission is denied; change its permissions, or choose another path",
            2,
        ),
        (OSError(errno.EMFILE, "Too many"), "too many files are open; raise the limit with ulimit -n", 3),
        (OSError(errno.EROFS, "Read-only", "out"), "out: the file system is read-only; choose another folder", 2),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 3),
            "xxx: the name is too long for the file system; choose a shorter one",
            2,
        ),
        (OSError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer", 2),
        (OSError("the archive is odd"), "the archive is odd", 2),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), FULL, 3),
        (MemoryError(), FULL, 3),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), FULL, 3),
        (RuntimeError("can't start new thread"), FULL, 3),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), FULL, 3),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), FULL, 3),
        (InputError("a mistake"), "a mistake", 2),
        (RetryLaterError("a lock is held"), "a lock is held", 3),
    ],
)
def test_explain_error_names_the_reason_and_the_remedy(error, message, status):
    assert explain_error(error)[0].startswith(message)
    assert explain_error(error)[1] == status


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), SystemError("a bug"), ImportError("x")])
def test_explain_error_leaves_bugs_to_the_traceback(error):
    assert explain_error(error) is None


@pytest.mark.parametrize("error", [SystemError("error return without exception set"), ImportError("failed to map")])
def test_explain_error_blames_memory_for_broken_libraries_below_a_limit(error, monkeypatch):
    """Below ``ulimit -v`` the interpreter itself fails, with a SystemError, and libraries cannot be loaded."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10**9, 10**9))
    message, status = explain_error(error)
    assert message.startswith("the memory that ulimit allows (1.0 GB) is full; ")
    assert status == ExitStatus.RETRY_LATER


def test_reason_of_finds_the_words_of_the_system():
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert reason_of(urllib.error.URLError(refused)) == "Connection refused"
    assert reason_of(ValueError("odd")) == "odd"
    assert reason_of(ValueError()) == "ValueError"


def test_is_out_of_memory_ignores_other_errors():
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "bound", "message"),
    [
        ("RLIMIT_FSIZE", 100, "the limit on the size of a file (ulimit -f) is reached; "),
        ("RLIMIT_AS", 400 << 20, "the memory that ulimit allows (0.4 GB) is full; "),
    ],
)
def test_generate_reports_a_limit_of_the_process_in_one_line(limit, bound, message, tiny_checkpoint, tmp_path):
    """Both were tracebacks or bare numbers: the second one hits the import of PyTorch.

    PyTorch itself aborts where the limit is reached late in its import, between 500 and 600 MiB here.
    """
    code = f"""
import resource, sys
resource.setrlimit(resource.{limit}, ({bound}, {bound}))
from cogview.cli.main import main
sys.exit(main(["generate", "狐狸", "--model", {str(tiny_checkpoint)!r}, "-o", {str(tmp_path)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], capture_output=True, encoding="utf-8", check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-1].startswith(f"cogview generate: {message}")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
