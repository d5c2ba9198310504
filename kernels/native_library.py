"""Compilation of the native kernels by the C compiler of the machine, at first use, into the cache folder.

The compiler is $CC, cc, gcc or clang. A digest in the file tells a whole library from a damaged one.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SOURCES = {  # of each library
    "layers": ("vectors.h", "linear.h", "attention.h", "sampling.h", "layers.c"),
    "training": ("vectors.h", "training.c"),  # ``native_training.py``
}
FLAGS = ("-O2", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")
COMPILE_SECONDS = 300
log = logging.getLogger(__name__)


class CompileError(Exception):
    """Raised when the native kernels cannot be compiled or loaded; the message says why."""


def compiled_library(library: str = "layers") -> Path:
    """Return the file of the compiled kernels, made if it does not exist yet.

    Its name has a hash of the sources, the compiler and the processor, so that another version compiles anew. Where the
    cache folder cannot be written or is full, the file is temporary.

    Args:
        library: A key of ``SOURCES``.

    Raises:
        CompileError: There is no compiler, or it fails.
    """
    compiler = find_compiler()
    source = sources_folder() / SOURCES[library][-1]
    name = f"{library}-{_fingerprint(compiler, library)}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = folder.expanduser() / "cogview" / "native"
        if _is_sealed(folder / name):
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together compile once
            if not _is_sealed(folder / name):
                _keep(_temporary_library(compiler, source, name), folder / name)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        log.warning("%s cannot be written (%s): the native kernels are compiled for this run alone", folder, error)
        return _temporary_library(compiler, source, name)
    return folder / name


def _temporary_library(compiler: Sequence[str], source: Path, name: str) -> Path:
    """Return the library in a temporary folder, compiled if it is not there; raise CompileError if that fails."""
    try:
        path = Path(temporary_folder().name) / name
        if not _is_sealed(path):
            _compile(compiler, source, path)
    except OSError as error:
        raise CompileError(f"there is no room for temporary files: {error}") from None
    return path


def _keep(path: Path, kept: Path) -> None:
    """Move a library to the file ``kept`` of the cache folder, which appears when it is complete."""
    scratch = kept.with_suffix(".writing")
    try:
        shutil.copyfile(path, scratch)
        scratch.replace(kept)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    path.unlink()


def find_compiler() -> tuple[str, ...]:
    """Return the C compiler: the path of its program, then the options that ``CC`` adds.

    Raises:
        CompileError: There is none, or ``CC`` names no program.
    """
    if given := os.environ.get("CC", "").strip():
        if (path := shutil.which(given)) is not None:  # it may have spaces
            return (path,)
        with suppress(ValueError):  # an open quotation mark
            program, *options = shlex.split(given)
            if (path := shutil.which(program)) is not None:
                return path, *options
        raise CompileError(f"CC is {given!r}, which names no program; set it to a C compiler, or unset it")
    for name in ("cc", "gcc", "clang"):
        if (path := shutil.which(name)) is not None:
            return (path,)
    raise CompileError("there is no C compiler (on Debian: apt install gcc)")


def _seal(path: Path) -> None:
    """Append a digest to a library, which the loader of the system ignores."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def _is_sealed(path: Path) -> bool:
    """Return whether ``path`` is a whole library that was compiled here: a damaged one would end the process."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    size = hashlib.sha256().digest_size
    return len(content) > size and hashlib.sha256(content[:-size]).digest() == content[-size:]


def sources_folder() -> Path:
    """Return the folder of the C sources."""
    return Path(__file__).resolve().parent / "c"


@functools.cache
def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="cogview-native-")


def _fingerprint(compiler: Sequence[str], library: str) -> str:
    """Return a hash of everything that the compiled library depends on."""
    path = Path(compiler[0]).resolve()
    stat = path.stat()
    options = (*compiler[1:], *FLAGS)
    parts = [repr(options), str(path), str(stat.st_size), str(stat.st_mtime_ns), _processor()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in SOURCES[library]:
        digest.update((sources_folder() / source).read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Return the architecture and the instructions of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    kept = dict(line.split(":", 1) for line in lines if line.startswith(("flags", "Features", "model name")))
    return platform.machine() + "".join(sorted(kept.values()))


def _compile(compiler: Sequence[str], source: Path, path: Path) -> None:
    """Compile ``source`` to the library ``path``, which appears when it is complete.

    The library is linked without OpenMP: it uses the one that PyTorch has loaded, so that both share their threads.
    """
    started = time.monotonic()
    log.warning("compiling native kernels for this processor, once")
    with tempfile.TemporaryDirectory(prefix="cogview-native-", dir=path.parent) as scratch:
        objects, library = Path(scratch) / "kernels.o", Path(scratch) / path.name
        _run([*compiler, *FLAGS, "-c", str(source), "-o", str(objects)])
        _run([*compiler, "-shared", str(objects), "-o", str(library), "-lm"])
        _seal(library)
        library.replace(path)
    log.info("compiled %s in %.1f s", path, time.monotonic() - started)


def _run(command: Sequence[str]) -> None:
    """Run the compiler; raise CompileError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"the compiler failed: {error}") from None
    if done.returncode:
        written = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        lines = [line for line in written if "error" in line] or written
        raise CompileError(f"the compiler {command[0]} failed: {lines[0].strip()}")
