"""Download files by direct address: mirrors in order, with resume, checksum and lock.

An unfinished file is ``NAME.part``, described by ``NAME.part.json``; it gets its name when it is complete and verified.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from cogview import __version__
from cogview.checkpoints.registry import FileEntry
from cogview.errors import InputError, reason_of
from cogview.files import file_sha256
from cogview.formatting import format_bytes
from cogview.plain_data import parse_json


def download(file: FileEntry, folder: Path, *, delays: Sequence[float] = (1, 2, 4, 8), timeout: float = 30) -> Path:
    """Download ``file`` into ``folder`` unless it is there already.

    Args:
        file: Name, mirrors in order of preference, and, where published, size in bytes and SHA-256.
        folder: Created if needed. After a failure it keeps the received bytes, and the next call resumes.
        delays: Seconds before each retry of a broken connection; counted anew when bytes arrive.
        timeout: Seconds of silence after which a connection counts as broken.

    Returns:
        The path of the complete, verified file.

    Raises:
        InputError: No mirror delivers the file, it cannot be written, or another process is downloading it.
    """
    target, lock = folder / file.name, folder / f"{file.name}.lock"
    try:
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if not file.urls:
                raise InputError(f"{file.name} has no direct address: {_manual_instructions(file, target)}")
            with FileLock(lock, timeout=0):
                if not target.is_file():  # another process may have finished it a moment ago
                    _fetch(file, PartialDownload(target), delays, timeout)
            lock.unlink(missing_ok=True)  # only beside a complete file, where nobody has to wait for it
        elif mismatch := _mismatch(file, target):
            raise InputError(f"{target} is not the expected file: {mismatch}; move it away and run the command again")
    except Timeout:
        raise InputError(f"another process is downloading {target}: wait for it, or end it, then try again") from None
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or target}: {error.strerror}; received bytes are kept"
        ) from None
    return target


def received(folder: Path, name: str) -> tuple[int, int] | None:
    """Return (bytes received, size in bytes) of an interrupted download of ``name``, or None if there is none."""
    partial = PartialDownload(folder / name)
    return (partial.received, partial.remote.size) if partial.remote.size else None


class MirrorError(Exception):
    """A failure of one mirror; ``permanent`` if a retry cannot help. The message follows the mirror's host."""

    def __init__(self, reason: str, permanent: bool = True) -> None:
        super().__init__(reason)
        self.permanent = permanent


class RemoteFile(NamedTuple):
    """A file as a mirror describes it."""

    url: str = ""
    size: int | None = None  # bytes
    etag: str = ""  # a strong one, sent back as If-Range


class PartialDownload:
    """The first bytes of ``target`` and the remote file they belong to, kept on disk."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self._note = target.with_name(target.name + ".part.json")
        self.received, self.remote = 0, RemoteFile()
        with suppress(OSError, ValueError, TypeError):  # without a usable note, the download starts over
            remote = RemoteFile(**parse_json(self._note.read_bytes()))
            if 0 < (count := self.path.stat().st_size) <= (remote.size or 0):
                self.received, self.remote = count, remote

    def append(self, remote: RemoteFile, response: HTTPResponse) -> None:
        """Append the body of ``response``, which belongs to ``remote``, to the received bytes, with a progress bar."""
        from tqdm import tqdm

        self.remote = remote
        self._note.write_text(json.dumps(remote._asdict()), encoding="utf-8")
        bar = tqdm(total=remote.size, initial=self.received, unit="B", unit_scale=1, desc=self.path.stem, disable=None)
        with bar, self.path.open("ab" if self.received else "wb") as file:
            while block := _read(response):
                self.received += file.write(block)
                bar.update(len(block))

    def discard(self) -> None:
        """Remove the received bytes."""
        self.received, self.remote = 0, RemoteFile()
        for path in (self.path, self._note):
            path.unlink(missing_ok=True)


def _fetch(file: FileEntry, partial: PartialDownload, delays: Sequence[float], timeout: float) -> None:
    """Complete ``partial`` from the first mirror that can; raise InputError if none can."""
    reasons: list[str] = []
    for url in file.urls:
        host = urlsplit(url).netloc
        if reasons:
            _notify(f"{file.name}: {reasons[-1]}; trying {host}")
        furthest = failures = 0
        while True:
            try:
                return _fetch_from(url, file, partial, timeout)
            except MirrorError as error:
                failures = 1 if partial.received > furthest else failures + 1
                furthest = max(furthest, partial.received)
                if error.permanent or failures > len(delays):
                    reasons.append(f"{host} {error}")
                    break
                time.sleep(delays[failures - 1])
    remedy = _manual_instructions(file, partial.target)
    if partial.received and partial.remote.size:
        remedy = f"run the command again to resume at {partial.received / partial.remote.size:.0%}, or {remedy}"
    else:
        partial.discard()
    raise InputError(f"{'; '.join(reasons)}: {remedy}")


def _fetch_from(url: str, file: FileEntry, partial: PartialDownload, timeout: float) -> None:
    """Complete and verify ``partial`` over one connection."""
    if partial.remote.size is None:  # a mirror that states no size cannot resume
        partial.discard()
    resumed = partial.received
    if not resumed or resumed != partial.remote.size:
        with _open(url, partial, timeout) as response:
            _receive(response, url, file, partial)
    if mismatch := _mismatch(file, partial.path):
        partial.discard()
        raise MirrorError(f"sent another file than expected: {mismatch}", permanent=not resumed)
    partial.path.replace(partial.target)
    partial.discard()


def _open(url: str, partial: PartialDownload, timeout: float) -> HTTPResponse:
    """Request the bytes that ``partial`` lacks."""
    headers = {"User-Agent": f"cogview/{__version__}"}
    if partial.received:
        headers["Range"] = f"bytes={partial.received}-"
        if partial.remote.etag and partial.remote.url == url:
            headers["If-Range"] = partial.remote.etag
    try:
        response = request.urlopen(request.Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416 and partial.received:  # the mirror's file is shorter than the received bytes
            partial.discard()
            return _open(url, partial, timeout)
        permanent = error.code < 500 and error.code not in (408, 429)
        raise MirrorError(f"answered {error.code} {error.reason}", permanent) from None
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to a malformed address
        raise MirrorError(f"could not be reached: {reason_of(error)}", permanent=False) from None
    if not isinstance(response, HTTPResponse):
        raise MirrorError(f"redirects to {response.url}, which is not http")
    return response


def _receive(response: HTTPResponse, url: str, file: FileEntry, partial: PartialDownload) -> None:
    """Append the body of ``response`` to ``partial``, or start over if it is another file."""
    start, remote = _describe(response, url, file)
    before = partial.remote
    if partial.received:
        changed = before.url == url and before.etag and remote.etag not in ("", before.etag)
        if changed or (start, remote.size) != (partial.received, before.size):
            _notify(f"{file.name} has changed at {urlsplit(url).netloc}, or cannot be resumed there: starting over")
            partial.discard()
        else:
            _notify(f"{file.name}: resuming at {start / (before.size or 1):.0%}")
    if start != partial.received:
        raise MirrorError("sent another range than requested", permanent=False)
    needed, free = (remote.size or 0) - start, shutil.disk_usage(partial.path.parent).free
    if needed > free:
        sizes = f"needs {format_bytes(needed)} more, only {format_bytes(free)} are free"
        raise InputError(f"{file.name} {sizes} in {partial.path.parent}")
    partial.append(remote, response)
    if partial.received < (remote.size or 0):
        raise MirrorError("cut the connection", permanent=False)


def _describe(response: HTTPResponse, url: str, file: FileEntry) -> tuple[int, RemoteFile]:
    """Return the first byte in ``response`` and its file; raise MirrorError if it cannot be ``file``."""
    headers = response.headers
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise MirrorError("sent a web page instead of the file (a login, a consent or an error page?)")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", "")) if response.status == 206 else None
    start, length = (int(match[1]), match[2]) if match else (0, headers.get("Content-Length", ""))
    size = int(length) if length.isdecimal() else file.size
    if file.size not in (None, size):
        raise MirrorError(f"has another file than expected: {size:,} bytes, not {file.size:,}")
    if size is None and file.sha256 is None and headers.get("Transfer-Encoding", "").lower() != "chunked":
        raise MirrorError("does not state the size of the file, so a cut would go unnoticed")
    etag = headers.get("ETag", "")
    return start, RemoteFile(url, size, "" if etag.startswith("W/") else etag)


def _read(response: HTTPResponse) -> bytes:
    """Read a block of up to 256 KiB; empty at the end and after a closed connection."""
    try:
        return response.read1(1 << 18)
    except (OSError, HTTPException) as error:
        raise MirrorError(f"broke off: {reason_of(error)}", permanent=False) from None


def _mismatch(file: FileEntry, path: Path) -> str:
    """Describe how ``path`` differs from the published size or SHA-256; empty if it does not."""
    size = path.stat().st_size
    if not size or file.size not in (None, size):
        return f"it has {size:,} bytes" + (f", not {file.size:,}" if file.size else "")
    if file.sha256 is not None and (found := file_sha256(path)) != file.sha256:
        return f"its SHA-256 is {found[:12]}…, not {file.sha256[:12]}…"
    return ""


def _manual_instructions(file: FileEntry, target: Path) -> str:
    """Explain how to get ``file`` with a browser."""
    return f"get {file.name} by hand from {file.page} and put it at {target}, then run the command again"


def _notify(line: str) -> None:
    """Print ``line`` to stderr."""
    print(line, file=sys.stderr)
