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
from cogview.errors import InputError, RetryLaterError, disk_full_reason, reason_of
from cogview.files import file_sha256
from cogview.formatting import format_bytes
from cogview.plain_data import parse_json

MIN_PROGRESS = 1 << 14  # bytes for which retries are counted anew; fewer within a timeout count as silence
MAX_DIGITS = 18  # of a size
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)


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
        InputError: No mirror has the file, or it cannot be written.
        RetryLaterError: A mirror does not answer or breaks off, the disk is full, or another process is downloading the
            file. What was received is kept.
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
        raise RetryLaterError(
            f"another process is downloading {target}: wait for it, or end it, then try again"
        ) from None
    except OSError as error:
        kind = InputError if disk_full_reason(error) is None else RetryLaterError
        raise kind(f"cannot write {error.filename or target}: {error.strerror}; received bytes are kept") from None
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
    etag: str = ""  # a strong one
    modified: str = ""  # Last-Modified

    @property
    def version(self) -> str:
        """The validator that is sent back as If-Range; empty if the mirror has none."""
        return self.etag or self.modified

    def is_version_of(self, other: RemoteFile, *, is_verified: bool) -> bool:
        """Return whether bytes of ``other`` may continue those of this file.

        Args:
            other: The file as a mirror describes it now.
            is_verified: Whether a checksum is compared at the end. Otherwise a mirror has to repeat what it said about
                the version.
        """
        if self.size != other.size or self.url != other.url:
            return self.size == other.size and is_verified
        pairs = ((self.etag, other.etag), (self.modified, other.modified))
        return all(old in ("", new) or (not new and is_verified) for old, new in pairs)


class PartialDownload:
    """The first bytes of ``target`` and the remote file they belong to, kept on disk."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self._note = target.with_name(target.name + ".part.json")
        self.received, self.remote = 0, RemoteFile()
        with suppress(OSError, ValueError, TypeError):  # without a usable note, the download starts over
            remote = RemoteFile(**parse_json(self._note.read_bytes()))
            if not all(isinstance(text, str) for text in (remote.url, remote.etag, remote.modified)):
                raise TypeError
            if 0 < (count := self.path.stat().st_size) <= (remote.size or 0):
                self.received, self.remote = count, remote

    def append(self, remote: RemoteFile, response: HTTPResponse, timeout: float) -> None:
        """Append the body of a response to the received bytes, with a progress bar.

        Args:
            remote: The file that the body belongs to.
            response: The response.
            timeout: Seconds in which at least ``MIN_PROGRESS`` bytes must arrive.

        Raises:
            MirrorError: The body is longer than stated, breaks off, or is too slow to ever end.
        """
        from tqdm import tqdm

        self.remote = remote
        self._note.write_text(json.dumps(remote._asdict()), encoding="utf-8")
        bar = tqdm(total=remote.size, initial=self.received, unit="B", unit_scale=1, desc=self.path.stem, disable=None)
        with bar, self.path.open("ab" if self.received else "wb") as file:
            since, before = time.monotonic(), self.received
            while block := _read(response):
                if remote.size is not None and self.received + len(block) > remote.size:
                    raise MirrorError("sent more bytes than it stated")
                self.received += file.write(block)
                bar.update(len(block))
                if self.received - before >= MIN_PROGRESS:
                    since, before = time.monotonic(), self.received
                elif time.monotonic() - since > timeout:
                    raise MirrorError(f"sent only {self.received - before:,} bytes in {timeout:g} s", permanent=False)

    def discard(self) -> None:
        """Remove the received bytes."""
        self.received, self.remote = 0, RemoteFile()
        for path in (self.path, self._note):
            path.unlink(missing_ok=True)


def _fetch(file: FileEntry, partial: PartialDownload, delays: Sequence[float], timeout: float) -> None:
    """Complete ``partial`` from the first mirror that can; raise InputError if none can."""
    reasons: list[str] = []
    may_pass = False
    for url in file.urls:
        host = urlsplit(url).netloc
        if reasons:
            _notify(f"{file.name}: {reasons[-1]}; trying {host}")
        furthest = failures = 0
        while True:
            try:
                return _fetch_from(url, file, partial, timeout)
            except MirrorError as error:
                failures = 1 if partial.received >= furthest + MIN_PROGRESS else failures + 1
                furthest = max(furthest, partial.received)
                if error.permanent or failures > len(delays):
                    reasons.append(f"{host} {error}")
                    may_pass = may_pass or not error.permanent
                    break
                _notify(f"{file.name}: {host} {error}; trying again in {delays[failures - 1]:g} s")
                time.sleep(delays[failures - 1])
    remedy = _manual_instructions(file, partial.target)
    if partial.received and partial.remote.size:
        remedy = f"run the command again to resume at {partial.received / partial.remote.size:.0%}, or {remedy}"
    else:
        partial.discard()
    kind = RetryLaterError if may_pass else InputError
    raise kind(f"{'; '.join(reasons)}: {remedy}")


def _fetch_from(url: str, file: FileEntry, partial: PartialDownload, timeout: float) -> None:
    """Complete and verify ``partial`` over one connection."""
    is_foreign = partial.remote.url != url and file.sha256 is None  # nothing would show that two versions were joined
    if partial.remote.size is None or is_foreign:  # a mirror that states no size cannot resume
        partial.discard()
    resumed = partial.received
    if not resumed or resumed != partial.remote.size:
        with _open(url, partial, timeout) as response:
            _receive(response, url, file, partial, timeout)
    if mismatch := _mismatch(file, partial.path):
        partial.discard()
        raise MirrorError(f"sent another file than expected: {mismatch}", permanent=not resumed)
    if file.sha256 is None:
        found = file_sha256(partial.path)
        _notify(
            f"warning: no checksum is known for {file.name}: its SHA-256 is {found}; compare it with that of another "
            f"source, such as {file.page}"
        )
    partial.path.replace(partial.target)
    partial.discard()


def _open(url: str, partial: PartialDownload, timeout: float) -> HTTPResponse:
    """Request the bytes that ``partial`` lacks."""
    headers = {"User-Agent": f"cogview/{__version__}"}
    if partial.received:
        headers["Range"] = f"bytes={partial.received}-"
        if partial.remote.version and partial.remote.url == url:
            headers["If-Range"] = partial.remote.version
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


def _receive(response: HTTPResponse, url: str, file: FileEntry, partial: PartialDownload, timeout: float) -> None:
    """Append the body of ``response`` to ``partial``, or start over if it is another file."""
    start, remote = _describe(response, url, file)
    before = partial.remote
    if partial.received:
        if start != partial.received or not before.is_version_of(remote, is_verified=file.sha256 is not None):
            _notify(f"{file.name} has changed at {urlsplit(url).netloc}, or cannot be resumed there: starting over")
            partial.discard()
        else:
            _notify(f"{file.name}: resuming at {start / (before.size or 1):.0%}")
    if start != partial.received:
        raise MirrorError("sent another range than requested", permanent=False)
    needed, free = (remote.size or 0) - start, shutil.disk_usage(partial.path.parent).free
    if needed > free:
        sizes = f"needs {format_bytes(needed)} more, only {format_bytes(free)} are free"
        raise RetryLaterError(f"{file.name} {sizes} in {partial.path.parent}")
    partial.append(remote, response, timeout)
    if partial.received < (remote.size or 0):
        raise MirrorError("cut the connection", permanent=False)


def _describe(response: HTTPResponse, url: str, file: FileEntry) -> tuple[int, RemoteFile]:
    """Return the first byte in ``response`` and its file; raise MirrorError if it cannot be ``file``."""
    headers = response.headers
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise MirrorError("sent a web page instead of the file (a login, a consent or an error page?)")
    length, start = headers.get("Content-Length", ""), 0
    if length.isdecimal() and len(length) > MAX_DIGITS:
        raise MirrorError(f"states a size of {len(length):,} digits")
    size = int(length) if length.isdecimal() else file.size
    if response.status == 206:
        match = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if match is None:
            raise MirrorError("sent a part of the file without stating which")
        start, last, size = map(int, match.groups())
        if not start <= last < size or length not in ("", str(last + 1 - start)):
            raise MirrorError("states sizes that contradict each other")
    if file.size not in (None, size):
        raise MirrorError(f"has another file than expected: {size:,} bytes, not {file.size:,}")
    if size is None and file.sha256 is None and headers.get("Transfer-Encoding", "").lower() != "chunked":
        raise MirrorError("does not state the size of the file, so a cut would go unnoticed")
    etag = headers.get("ETag", "")
    return start, RemoteFile(url, size, "" if etag.startswith("W/") else etag, headers.get("Last-Modified", ""))


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
