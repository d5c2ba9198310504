"""Fetch a released file: from the first mirror that gives it, in parallel parts, and on from where it stopped.

While a file is under way it is ``NAME.part``, with what is known of it in ``NAME.part.json``. It gets its own name when
it is whole, and its size and SHA-256 are right where they are known.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from cogview import __version__
from cogview.checkpoints.registry import KnownFile
from cogview.errors import InputError

BLOCK = 1 << 18  # bytes read at most at a time
SMALLEST_PART = 1 << 20  # bytes; for less, another connection costs more than it gains
SECONDS_BETWEEN_NOTES = 2.0  # a killed download loses no more than it received in so long
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try of a connection that was cut

_WEB_PAGE = "sent a web page instead of the file (a login, a consent or an error page?)"

Range = tuple[int, int]  # first byte, and the one behind the last


def download(
    file: KnownFile, folder: Path, *, parts: int = 4, waits: Sequence[float] = WAITS, timeout: float = 30.0
) -> Path:
    """Fetch ``file`` into ``folder``, unless it is there already; returns its path.

    ``parts`` connections are open at a time where the server can send parts of a file. A connection that is cut, or
    silent for ``timeout`` seconds, is tried again after each of ``waits``, counted anew whenever something came. Why a
    mirror is given up for the next is said on stderr. Raises InputError where no mirror gives the file, it cannot be
    written, or another process is fetching it; what was received is kept, and the next call goes on from there.
    """
    target = folder / file.name
    try:
        if _is_there(file, target):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        if not file.urls:
            raise InputError(f"{file.name} has no address that a program could fetch it from: {_by_hand(file, target)}")
        with _alone(target):
            if not _is_there(file, target):  # another process may just have finished it
                partial = Partial(target)
                try:
                    _fetch(_Client(parts=parts, waits=waits, timeout=timeout), file, partial)
                finally:
                    partial.close()
                os.replace(partial.path, target)
                partial.clear()
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or target}: {error.strerror or error}; what was received is kept"
        ) from None
    return target


def received(folder: Path, name: str) -> Range | None:
    """(bytes received, bytes in all) of a download that was interrupted; None where there is none."""
    partial = Partial(folder / name)
    return (partial.count, partial.size) if partial.size and partial.count else None


def size_in_words(count: int) -> str:
    """Bytes as 7.9 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


class _Trouble(Exception):
    """What a mirror did wrong, to be read behind its name; ``lasting`` if trying again would not help."""

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


class _Stopped(Exception):
    """Nothing more may be written."""


class Partial:
    """What was received of ``target``. Several threads may write; one process at a time may hold it."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(target.name + ".part")
        self.size: int | None = None  # bytes in all, as the server said
        self.etags: dict[str, str] = {}  # by mirror, where it is a strong one
        self.done: list[Range] = []  # sorted; no two touch
        self._note = target.with_name(target.name + ".part.json")
        self._new_note = target.with_name(target.name + ".part.json.writing")
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()
        with suppress(OSError, ValueError, KeyError, TypeError):  # a note that cannot be used is none
            note = json.loads(self._note.read_text(encoding="utf-8"))
            size, etags = int(note["size"]), dict(note["etags"])
            done = _merged([(int(start), int(end)) for start, end in note["done"]])
            if done and done[0][0] >= 0 and done[-1][1] <= min(size, self.path.stat().st_size):
                self.size, self.etags, self.done = size, etags, done

    @property
    def count(self) -> int:
        """Bytes received."""
        return sum(end - start for start, end in self.done)

    def missing(self) -> list[Range]:
        """The ranges between those that are done."""
        assert self.size is not None
        edges = [0, *(edge for both in self.done for edge in both), self.size]
        return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]

    def write(self, start: int, block: bytes) -> None:
        """Put ``block`` at byte ``start``; raises _Stopped once closed."""
        with self._lock:
            if self._file is None:
                raise _Stopped
            if start == 0 and self.size is None:  # again from the beginning, and perhaps less than before
                self._file.truncate(0)
                self.done = []
            self._file.seek(start)
            rest = memoryview(block)
            while rest:
                rest = rest[self._file.write(rest) :]
            self.done = _merged([*self.done, (start, start + len(block))])

    def open(self) -> None:
        """Before the first ``write``."""
        if self._file is None:  # unbuffered, so that what counts as done has been handed to the system
            self._file = self.path.open("r+b" if self.done else "w+b", buffering=0)

    def save(self) -> None:
        """Note on disk what is done."""
        with self._lock:
            if self._file is None or self.size is None:
                return
            note = {"size": self.size, "etags": self.etags, "done": self.done}
            number = self._file.fileno()
        os.fsync(number)  # or a power cut could leave a note of bytes that are not there
        self._new_note.write_text(json.dumps(note), encoding="utf-8")
        os.replace(self._new_note, self._note)

    def close(self) -> None:
        """Note what is done and refuse anything more; leaves no file where nothing is done."""
        with suppress(OSError):  # the disk may be full, and an older note serves as well
            self.save()
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
        if not self.done or self.size is None:
            self.clear()

    def clear(self) -> None:
        """Forget and remove everything."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            self.size, self.etags, self.done = None, {}, []
        for path in (self.path, self._note, self._new_note):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Offer:
    """What a mirror says about the file it has."""

    url: str
    size: int | None  # bytes
    etag: str  # empty unless it is a strong one
    in_parts: bool  # it answers requests for a part of the file


class _Client:
    """HTTP, with what went wrong as _Trouble; ``parts``, ``waits`` and ``timeout`` as ``download`` takes them."""

    def __init__(self, *, parts: int, waits: Sequence[float], timeout: float) -> None:
        self.parts = parts
        self.waits = waits
        self._timeout = timeout
        # Not build_opener: that one also opens file: and ftp: addresses, to which a mirror could redirect.
        self._opener = request.OpenerDirector()
        for handler in (
            request.ProxyHandler,
            request.UnknownHandler,
            request.HTTPHandler,
            request.HTTPSHandler,
            request.HTTPDefaultErrorHandler,
            request.HTTPRedirectHandler,
            request.HTTPErrorProcessor,
        ):
            self._opener.add_handler(handler())
        self._opener.addheaders = [("User-Agent", f"cogview/{__version__}")]

    def ask(self, file: KnownFile, url: str) -> _Offer:
        """What the mirror ``url`` has, by asking for the first bytes, as not every server answers HEAD."""
        with self._answer(url, {"Range": "bytes=0-511"}) as answer:
            if _read(answer, 512).lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html")):
                raise _Trouble(_WEB_PAGE)
            part = _content_range(answer)
            in_parts = part is not None and part[0] == 0
            size = part[1] if part else _whole_size(answer)
            etag = answer.headers.get("ETag", "")
            chunked = "chunked" in answer.headers.get("Transfer-Encoding", "").lower()  # the end has a mark
        if size is None:
            size = file.size
            if not (chunked or file.size or file.sha256):
                raise _Trouble("does not say how long the file is, so that a cut would go unnoticed")
        elif file.size is not None and size != file.size:
            raise _Trouble(f"has another file than expected: {size:,} bytes, not {file.size:,}")
        return _Offer(url, size, "" if etag.startswith("W/") else etag, in_parts)

    def blocks(self, offer: _Offer, start: int, end: int | None) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end``; the whole file, from 0, where the mirror does not send parts."""
        headers = {}
        if offer.in_parts:
            assert end is not None
            headers["Range"] = f"bytes={start}-{end - 1}"
            if offer.etag:
                headers["If-Range"] = offer.etag
        with self._answer(offer.url, headers) as answer:
            if offer.in_parts and _content_range(answer) != (start, offer.size):
                raise _Trouble("sent something else than the part that was asked for")
            if not offer.in_parts and _whole_size(answer) not in (None, offer.size):
                raise _Trouble("sent something else than it first had")
            while end is None or start < end:
                block = _read(answer, BLOCK if end is None else min(BLOCK, end - start))
                if not block:
                    if end is None:
                        return
                    raise _Trouble("cut the connection", lasting=False)
                yield block
                start += len(block)

    @contextmanager
    def _answer(self, url: str, headers: dict[str, str]) -> Iterator[HTTPResponse]:
        try:
            answer = self._opener.open(request.Request(url, headers=headers), timeout=self._timeout)
        except HTTPError as error:
            error.close()
            lasting = error.code < 500 and error.code not in (408, 429)
            raise _Trouble(f"answered {error.code} {error.reason}", lasting) from None
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a redirect to no address at all
            raise _Trouble(f"could not be reached: {_reason(error)}", lasting=False) from None
        with answer:
            if answer.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
                raise _Trouble(_WEB_PAGE)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise _Trouble("sent the file compressed, which was not asked for")
            yield answer


def _fetch(client: _Client, file: KnownFile, partial: Partial) -> None:
    """Fill ``partial`` from the first mirror that can; InputError where none can."""
    reasons = []
    for number, url in enumerate(file.urls, 1):
        try:
            _fetch_from(client, file, url, partial)
        except _Trouble as trouble:
            reasons.append(f"{urlsplit(url).netloc} {trouble}")
            if number < len(file.urls):
                _say(f"{file.name}: {reasons[-1]}; trying {urlsplit(file.urls[number]).netloc}")
        else:
            return
    target = partial.path.with_name(file.name)
    if partial.count and partial.size:
        remedy = f"run the command again to go on from {partial.count / partial.size:.0%}, or {_by_hand(file, target)}"
    else:
        remedy = _by_hand(file, target)
    raise InputError(f"{'; '.join(reasons)}: {remedy}")


def _fetch_from(client: _Client, file: KnownFile, url: str, partial: Partial) -> None:
    """Fill ``partial`` from one mirror, going on with what is there unless it belongs to another file."""
    offer = client.ask(file, url)
    known_etag = partial.etags.get(url)
    if partial.done and partial.size != offer.size:
        _say(f"{file.name} has another size at {urlsplit(url).netloc} than what is here of it: beginning anew")
        partial.clear()
    elif partial.done and known_etag and offer.etag and known_etag != offer.etag:
        _say(f"{file.name} has changed at {urlsplit(url).netloc}: beginning anew")
        partial.clear()
    while True:
        resumed = bool(partial.done)
        partial.size = offer.size
        if offer.etag:
            partial.etags[url] = offer.etag
        _receive(client, file, offer, partial)
        wrong = _mistake(file, partial.path) if partial.count else "it is empty"
        if not wrong:
            return
        partial.clear()
        if not resumed:
            raise _Trouble(f"sent another file than expected: {wrong}")
        _say(f"{file.name}: what was there from before does not fit what came now ({wrong}): beginning anew")


def _receive(client: _Client, file: KnownFile, offer: _Offer, partial: Partial) -> None:
    """Fetch what is missing, in threads, and note now and then how far they are."""
    from tqdm import tqdm

    partial.open()
    pieces: list[tuple[int, int | None]] = [(0, None)]
    if offer.size is not None:
        folder = partial.path.parent
        needed, free = offer.size - partial.count, shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{file.name} needs {size_in_words(needed)} more in {folder}, where {size_in_words(free)} are free"
            )
        if partial.done:
            _say(f"{file.name}: going on from {partial.count / offer.size:.0%}")
        missing = _pieces(partial.missing(), client.parts)
        pieces = [*missing] if offer.in_parts or not missing else [(0, offer.size)]
    work: queue.SimpleQueue[tuple[int, int | None]] = queue.SimpleQueue()
    for piece in pieces:
        work.put(piece)
    errors: list[Exception] = []
    stop = threading.Event()

    def run() -> None:
        start, end = 0, None
        try:
            while not stop.is_set():
                start, end = work.get_nowait()
                for at, block in _blocks(client, offer, start, end, stop):
                    partial.write(at, block)
                    start = at + len(block)
        except (queue.Empty, _Stopped):
            pass
        except _Trouble as trouble:
            errors.append(trouble)
            if offer.in_parts:  # perhaps this was one connection too many, and another thread can do its work
                work.put((start, end))
        except Exception as error:
            errors.append(error)
            stop.set()

    # Daemons, so that neither Ctrl-C nor a full disk has to wait for a server that is silent.
    threads = [threading.Thread(target=run, daemon=True) for _ in pieces[: client.parts]]
    with tqdm(
        total=offer.size, initial=partial.count, unit="B", unit_scale=True, desc=file.name, disable=None, leave=False
    ) as bar:
        try:
            for thread in threads:
                thread.start()
            noted = time.monotonic()
            while any(thread.is_alive() for thread in threads) and not stop.is_set():
                for thread in threads:
                    thread.join(0.1)
                bar.update(partial.count - bar.n)
                if time.monotonic() - noted > SECONDS_BETWEEN_NOTES:
                    partial.save()
                    noted = time.monotonic()
        finally:
            stop.set()
    if errors and (offer.size is None or partial.missing()):
        if offer.size is None:  # nobody knows where to go on
            partial.clear()
        raise next((error for error in errors if not isinstance(error, _Trouble)), errors[-1])
    partial.size = partial.count


def _blocks(
    client: _Client, offer: _Offer, start: int, end: int | None, stop: threading.Event
) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) from ``start`` to ``end``; a connection that is cut is opened again, as ``download`` says."""
    position = furthest = start
    tries = 0
    while True:
        try:
            for block in client.blocks(offer, position, end):
                yield position, block
                position += len(block)
            return
        except _Trouble as trouble:
            if position > furthest:
                furthest, tries = position, 0
            if trouble.lasting or tries == len(client.waits) or stop.wait(client.waits[tries]):
                raise
        tries += 1
        if not offer.in_parts:
            position = start


def _pieces(missing: Sequence[Range], parts: int) -> list[Range]:
    """``missing`` in pieces of about one of ``parts`` of it each."""
    step = max(-(-sum(end - start for start, end in missing) // parts), SMALLEST_PART)
    return [(at, min(at + step, end)) for start, end in missing for at in range(start, end, step)]


def _merged(ranges: Sequence[Range]) -> list[Range]:
    """The same bytes in as few ranges as can be, sorted."""
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _is_there(file: KnownFile, target: Path) -> bool:
    """Whether ``target`` is the whole file; InputError where something else has that name."""
    if not target.is_file():
        return False
    if mistake := _mistake(file, target):
        raise InputError(
            f"{target} is not the file that is expected: {mistake}; move it away and run the command again"
        )
    return True


def _mistake(file: KnownFile, path: Path) -> str:
    """How ``path`` differs from what is known of ``file``; empty if it does not."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"it has {size:,} bytes, not {file.size:,}"
    if file.sha256 is not None:
        from cogview.checkpoints.checkpoint import file_sha256  # brings torch

        if (found := file_sha256(path)) != file.sha256:
            return f"its SHA-256 is {found[:12]}…, not {file.sha256[:12]}…"
    return ""


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep other processes from fetching ``target``; the system lets go of the lock even where this one is killed."""
    path = target.with_name(target.name + ".lock")
    while True:
        lock = path.open("ab")
        try:
            _lock(lock)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                break
        except (BlockingIOError, PermissionError):
            lock.close()
            raise InputError(
                f"another process is fetching {target}; wait for it, or end it, and run the command again"
            ) from None
        except FileNotFoundError:
            pass
        lock.close()  # whoever held it has just removed it
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps files that are open
            path.unlink()
        lock.close()


def _lock(file: IO[bytes]) -> None:
    """BlockingIOError or PermissionError where another process has locked ``file``."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise
    except OSError:  # some network file systems have no locks
        pass


def _read(answer: HTTPResponse, count: int) -> bytes:
    """What has come, up to ``count`` bytes; empty at the end, or where the connection was closed."""
    try:
        return answer.read1(count)
    except (OSError, HTTPException) as error:
        raise _Trouble(f"broke off: {_reason(error)}", lasting=False) from None


def _content_range(answer: HTTPResponse) -> tuple[int, int] | None:
    """(first byte, bytes of the whole file) of an answer with a part; None for any other."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", "").strip())
    return (int(match[1]), int(match[2])) if match and answer.status == 206 else None


def _whole_size(answer: HTTPResponse) -> int | None:
    """Bytes of an answer with the whole file, where it says so."""
    length = answer.headers.get("Content-Length", "")
    return int(length) if answer.status == 200 and length.isdecimal() else None


def _reason(error: Exception) -> str:
    """A network error in a few words."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    return str(getattr(error, "strerror", None) or getattr(error, "reason", None) or error) or type(error).__name__


def _by_hand(file: KnownFile, target: Path) -> str:
    return f"get {file.name} by hand from {file.page} and put it at {target}, then run the command again"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
