"""Downloads from a local server that cuts, lies, redirects and refuses."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cogview import __version__
from cogview.checkpoints.download import PartialDownload, download, received
from cogview.checkpoints.registry import FileEntry
from cogview.errors import RetryLaterError
from tests.factories import input_error

CONTENT = random.Random(0).randbytes(400_000)
OTHER = CONTENT[:300_000] + random.Random(1).randbytes(100_000)
SUM = hashlib.sha256(CONTENT).hexdigest()
PAGE = "https://example.org/weights"
NAME = "模型.tar"


@dataclass
class Resource:
    """The file at one address of the server, and the misbehaviour there."""

    content: bytes = CONTENT
    ranges: bool = True  # False: always sends the whole file
    status: int = 200  # any other is answered without a body
    headers: dict = field(default_factory=dict)  # additional ones
    claims: int | None = None  # size in the headers, if not that of the content
    ignores_if_range: bool = False
    states_length: bool = True
    chunked: bool = False
    cut_after: int | None = None  # bytes of each answer, ...
    cuts: float = float("inf")  # ... number of answers that are cut
    stalls: bool = False  # goes silent instead of cutting
    delay: float = 0  # seconds before each byte after the first block
    requests: list = field(default_factory=list)  # headers of each request
    sent: int = 0  # bytes of content

    @property
    def ranges_requested(self):
        return [headers["Range"] for headers in self.requests]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        resource = self.server.resources[self.path]
        resource.requests.append(self.headers)
        with suppress(OSError):  # the client went away
            self.answer(resource)

    def answer(self, resource):
        size = resource.claims or len(resource.content)
        start, end, status = 0, size, resource.status
        validators = (resource.headers.get("ETag"), resource.headers.get("Last-Modified"))
        if_range = self.headers["If-Range"] in (None, *validators) or resource.ignores_if_range
        if resource.ranges and self.headers["Range"] and if_range:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            status = (206 if start < size else 416) if status == 200 else status
        self.send_response(status)
        for name, value in resource.headers.items():
            self.send_header(name, value)
        if status not in (200, 206):
            return self.end_headers()
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        if resource.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif resource.states_length:
            self.send_header("Content-Length", str(end - start))
        self.end_headers()
        for at in range(start, min(end, len(resource.content)), 10_000):
            block = resource.content[at : min(at + 10_000, end)]
            if resource.cut_after is not None and at - start >= resource.cut_after and resource.cuts > 0:
                resource.cuts -= 1
                if resource.stalls:
                    self.server.stopped.wait(60)
                return None
            if resource.delay and resource.sent:
                self.server.stopped.wait(resource.delay)
                block = block[:1]
            resource.sent += len(block)  # before the client can have it and look
            self.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n" if resource.chunked else block)
        if resource.chunked:
            self.wfile.write(b"0\r\n\r\n")
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Return a function that puts resources on a server and returns their addresses."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.resources, server.stopped = {}, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def put(*resources):
        urls = []
        for resource in resources:
            path = f"/{len(server.resources)}"
            server.resources[path] = resource
            urls.append(f"http://127.0.0.1:{server.server_port}{path}")
        return tuple(urls)

    yield put
    server.stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


def known(urls, **facts):
    return FileEntry(name=NAME, urls=urls, page=PAGE, **facts)


def error_of(file, folder, **settings):
    return input_error(download, file, folder, **{"delays": (), **settings})


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def warning_of(content):
    """Return the line about a file without a known checksum."""
    found = hashlib.sha256(content).hexdigest()
    return (
        f"warning: no checksum is known for {NAME}: its SHA-256 is {found}; compare it with "
        f"that of another source, such as {PAGE}\n"
    )


LOCK = f"{NAME}.lock"  # stays after a failure: another process may wait for it


def host_of(url):
    return url.split("/")[2]


def test_download_fetches_a_file_over_one_connection(serve, tmp_path):
    resource = Resource()
    path = download(known(serve(resource), size=len(CONTENT), sha256=SUM), tmp_path / "files")
    assert path == tmp_path / "files" / NAME
    assert path.read_bytes() == CONTENT
    assert names_in(path.parent) == [NAME]
    assert resource.ranges_requested == [None]
    assert resource.requests[0]["User-Agent"] == f"cogview/{__version__}"


@pytest.mark.parametrize(
    "resource",
    [Resource(ranges=False), Resource(ranges=False, states_length=False, chunked=True), Resource(CONTENT[:1])],
    ids=["no ranges", "chunked", "one byte"],
)
def test_download_accepts_any_kind_of_response(serve, tmp_path, resource):
    assert download(known(serve(resource)), tmp_path).read_bytes() == resource.content
    assert names_in(tmp_path) == [NAME]


def test_download_requires_a_checksum_when_the_end_is_unknown(serve, tmp_path):
    """Without a length, chunks or a checksum, a cut connection would pass for the end of the file."""
    urls = serve(Resource(ranges=False, states_length=False))
    assert "does not state the size of the file, so a cut would go unnoticed" in error_of(known(urls), tmp_path)
    assert download(known(urls, sha256=SUM), tmp_path).read_bytes() == CONTENT


def test_download_resumes_when_the_connection_is_cut(serve, tmp_path):
    """Retries are counted anew when bytes arrive: one delay is enough for many cuts."""
    resource = Resource(cut_after=90_000, headers={"ETag": '"one"'})
    path = download(known(serve(resource), sha256=SUM), tmp_path, delays=(0,))
    assert path.read_bytes() == CONTENT
    assert resource.sent == len(CONTENT)
    starts = range(90_000, 400_000, 90_000)
    assert resource.ranges_requested == [None, *(f"bytes={start}-" for start in starts)]
    assert [headers["If-Range"] for headers in resource.requests] == [None] + ['"one"'] * len(starts)


@pytest.mark.parametrize("chunked", [False, True])
def test_download_starts_over_when_the_server_cannot_resume(serve, tmp_path, chunked):
    resource = Resource(ranges=False, states_length=not chunked, chunked=chunked, cut_after=350_000, cuts=1)
    assert download(known(serve(resource)), tmp_path, delays=(0,)).read_bytes() == CONTENT
    assert resource.sent == 350_000 + len(CONTENT)


@pytest.mark.parametrize(("ranges", "cut_after"), [(True, 0), (False, 200_000)])
def test_download_gives_up_when_every_connection_is_cut(serve, tmp_path, ranges, cut_after):
    resource = Resource(ranges=ranges, cut_after=cut_after)
    assert "cut the connection" in error_of(known(serve(resource)), tmp_path, delays=(0, 0))
    assert len(resource.requests) == 3
    assert not (tmp_path / NAME).exists()


def test_download_retries_when_the_server_is_silent(serve, tmp_path):
    resource = Resource(cut_after=20_000, cuts=1, stalls=True)
    assert download(known(serve(resource)), tmp_path, delays=(0,), timeout=0.3).read_bytes() == CONTENT
    assert resource.ranges_requested == [None, "bytes=20000-"]


def interrupted(folder, resource, url):
    """Leave 30% of ``resource`` in ``folder``."""
    resource.cut_after = 120_000
    message = error_of(known((url,)), folder)
    resource.cut_after, resource.sent = None, 0
    assert received(folder, NAME) == (120_000, len(resource.content))
    return message


def test_download_resumes_in_the_next_call(serve, tmp_path, capsys):
    resource = Resource()
    (url,) = serve(resource)
    message = interrupted(tmp_path, resource, url)
    assert "cut the connection: run the command again to resume at 30%, or get" in message
    assert names_in(tmp_path) == [LOCK, f"{NAME}.part", f"{NAME}.part.json"]
    assert download(known((url,), sha256=SUM), tmp_path).read_bytes() == CONTENT
    assert resource.sent == 280_000
    assert capsys.readouterr().err == f"{NAME}: resuming at 30%\n"  # and no warning: the checksum is known
    assert names_in(tmp_path) == [NAME]
    assert received(tmp_path, NAME) is None


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_download_resumes_when_the_process_was_stopped(serve, tmp_path, number):
    resource = Resource(cut_after=50_000, stalls=True)
    (url,) = serve(resource)
    code = (
        "import sys, pathlib\nfrom cogview.checkpoints.download import download\n"
        "from cogview.checkpoints.registry import FileEntry\n"
        "file = FileEntry(name=sys.argv[1], urls=(sys.argv[2],), page='')\n"
        "download(file, pathlib.Path(sys.argv[3]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, NAME, url, str(tmp_path)], stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while received(tmp_path, NAME) != (50_000, 400_000):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(timeout=20)  # less than the timeout of the silent connection
    resource.cut_after, resource.sent = None, 0
    assert download(known((url,), sha256=SUM), tmp_path).read_bytes() == CONTENT
    assert resource.sent == 350_000
    assert names_in(tmp_path) == [NAME]


def test_download_finishes_a_complete_part_without_a_request(serve, tmp_path):
    """A process may be killed between the last byte and the renaming."""
    resource = Resource()
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    requests = len(resource.requests)
    assert download(known((url,), sha256=SUM), tmp_path).read_bytes() == CONTENT
    assert len(resource.requests) == requests


def test_download_resumes_at_the_next_mirror(serve, tmp_path):
    first, second = Resource(cut_after=120_000), Resource(headers={"ETag": '"of another server"'})
    assert download(known(serve(first, second), sha256=SUM), tmp_path, delays=()).read_bytes() == CONTENT
    assert second.sent == 280_000


@pytest.mark.parametrize(
    ("resource", "facts", "reason"),
    [
        (Resource(status=404), {}, "answered 404 Not Found"),
        (Resource(status=503), {}, "answered 503 Service Unavailable"),
        (Resource(OTHER), {"sha256": SUM}, "sent another file than expected: its SHA-256 is "),
        (
            Resource(CONTENT[:-1]),
            {"size": len(CONTENT)},
            "has another file than expected: 399,999 bytes, not 400,000",
        ),
        (Resource(claims=500_000, ranges=False), {}, "cut the connection"),
        (
            Resource(b"", ranges=False, states_length=False, chunked=True),
            {},
            "sent another file than expected: it has 0",
        ),
        (Resource(status=302, headers={"Location": "file:///etc/hostname"}), {}, "answered 302 Found - Redirection to"),
        (Resource(status=302, headers={"Location": "ftp://127.0.0.1:1/x"}), {}, "could not be reached: "),
        (Resource(headers={"Content-Type": "text/html; charset=utf-8"}), {}, "sent a web page instead of the file ("),
    ],
)
def test_download_tries_the_next_mirror_when_one_fails(serve, tmp_path, capsys, resource, facts, reason):
    bad, good = serve(resource, Resource())
    host = host_of(bad)
    assert error_of(known((bad,), **facts), tmp_path / "alone", delays=()).startswith(f"{host} {reason}")
    assert not (tmp_path / "alone" / NAME).exists()
    assert capsys.readouterr().err == ""
    assert download(known((bad, good), **facts), tmp_path / "both", delays=()).read_bytes() == CONTENT
    err = capsys.readouterr().err
    assert err.startswith(f"{NAME}: {host} {reason}")
    assert f"; trying {host}\n" in err


def test_download_names_every_mirror_when_all_fail(serve, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        gone = f"127.0.0.1:{closed.server_port}"
    urls = (f"http://{gone}/x", *serve(Resource(status=404)))
    assert error_of(known(urls), tmp_path) == (
        f"{gone} could not be reached: Connection refused; {host_of(urls[1])} answered 404 Not Found: "
        f"get {NAME} by hand from {PAGE} and put it at {tmp_path / NAME}, then run the command again"
    )
    assert names_in(tmp_path) == [LOCK]


def test_download_gives_instructions_when_there_is_no_address(tmp_path):
    folder = tmp_path / "files"
    assert error_of(known(()), folder) == (
        f"{NAME} has no direct address: get {NAME} by hand from {PAGE} and put it at {folder / NAME}, "
        "then run the command again"
    )
    (folder / NAME).write_bytes(CONTENT)  # the folder exists for it
    assert download(known(()), folder) == folder / NAME


def test_download_keeps_the_range_when_redirected(serve, tmp_path):
    target = Resource(cut_after=300_000)
    (url,) = serve(target)
    (moved,) = serve(Resource(status=302, headers={"Location": url}))
    assert download(known((moved,)), tmp_path, delays=(0,)).read_bytes() == CONTENT
    assert target.ranges_requested == [None, "bytes=300000-"]


@pytest.mark.parametrize(
    ("content", "headers", "ranges"),
    [(CONTENT, {"ETag": '"two"'}, True), (CONTENT[:250_000], {}, True), (CONTENT, {"ETag": '"one"'}, False)],
    ids=["another ETag", "another size", "no ranges any more"],
)
def test_download_starts_over_when_the_file_has_changed(serve, tmp_path, capsys, content, headers, ranges):
    resource = Resource(OTHER, headers={"ETag": '"one"'})
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.content, resource.headers, resource.ranges = content, headers, ranges
    assert download(known((url,)), tmp_path).read_bytes() == content
    line = f"{NAME} has changed at {host_of(url)}, or cannot be resumed there: starting over\n"
    assert capsys.readouterr().err == line + warning_of(content)


def test_download_starts_over_when_the_mirror_has_less_than_was_received(serve, tmp_path):
    resource = Resource(OTHER)
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.content = CONTENT[:100_000]
    assert download(known((url,)), tmp_path, delays=()).read_bytes() == CONTENT[:100_000]
    assert resource.ranges_requested[-2:] == ["bytes=120000-", None]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ETag": '"one"'}, {"ETag": '"two"'}),
        ({"ETag": '"one"'}, {}),
        ({"Last-Modified": "Sun, 29 Nov 2026 10:00:00 GMT"}, {"Last-Modified": "Sun, 29 Nov 2026 11:00:00 GMT"}),
        ({"Last-Modified": "Sun, 29 Nov 2026 10:00:00 GMT"}, {}),
    ],
    ids=["another ETag", "no ETag any more", "another date", "no date any more"],
)
def test_download_never_joins_two_versions_of_one_size(serve, tmp_path, before, after):
    """The server answers with the requested range of the new file, and no checksum shows the seam."""
    resource = Resource(OTHER[::-1], headers=before, ignores_if_range=True)
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.content, resource.headers = CONTENT, after
    assert download(known((url,)), tmp_path, delays=(0,)).read_bytes() == CONTENT
    version = before.get("ETag") or before["Last-Modified"]
    assert [headers["If-Range"] for headers in resource.requests[-2:]] == [version, None]


def test_download_never_joins_parts_of_two_mirrors_without_a_checksum(serve, tmp_path):
    first, second = Resource(OTHER[::-1], cut_after=120_000), Resource()
    assert download(known(serve(first, second)), tmp_path, delays=()).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"Content-Range": f"bytes 120000-399999/{'9' * 5000}"}, "sent a part of the file without stating which"),
        ({"Content-Range": "bytes 120000-499999/400000"}, "states sizes that contradict each other"),
        ({"Content-Range": "bytes 120000-399998/400000"}, "states sizes that contradict each other"),
        ({"Content-Range": "octets 1-2"}, "sent a part of the file without stating which"),
        ({"Content-Length": "9" * 5000}, "states a size of 5,000 digits"),
    ],
)
def test_download_refuses_sizes_that_cannot_be(serve, tmp_path, headers, reason):
    """A number of 5,000 digits was a traceback, and a part without a range was taken for the whole file."""
    resource = Resource()
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.headers = headers
    message = error_of(known((url,), sha256=SUM), tmp_path)
    assert message.startswith(f"{host_of(url)} {reason}: run the command again to resume at 30%, or get ")
    assert received(tmp_path, NAME) == (120_000, 400_000)


def test_download_refuses_more_bytes_than_stated(serve, tmp_path):
    """A body in chunks has no length; without a limit it would fill the disk."""
    urls = serve(Resource(CONTENT * 2, ranges=False, states_length=False, chunked=True))
    assert "sent more bytes than it stated" in error_of(known(urls, size=len(CONTENT), sha256=SUM), tmp_path)


@pytest.mark.parametrize("resource", [Resource(stalls=True, cut_after=10_000), Resource(delay=0.05)])
def test_download_ends_and_keeps_what_came_when_a_server_stalls(serve, tmp_path, resource):
    """One server was silent for ever, another sent a byte from time to time: the command never ended."""
    (url,) = serve(resource)
    with pytest.raises(RetryLaterError) as caught:
        download(known((url,), sha256=SUM), tmp_path, delays=(0,), timeout=0.2)
    assert f"{host_of(url)} " in str(caught.value)
    assert ": run the command again to resume at " in str(caught.value)
    count, size = received(tmp_path, NAME)
    assert count >= 10_000
    assert size == len(CONTENT)


@pytest.mark.parametrize(("before", "after"), [('W/"one"', 'W/"two"'), ('"one"', '"one"'), ("", '"one"')])
def test_download_resumes_when_the_etag_promises_no_change(serve, tmp_path, before, after):
    resource = Resource(headers={"ETag": before})
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.headers = {"ETag": after}
    assert download(known((url,), sha256=SUM), tmp_path).read_bytes() == CONTENT
    assert resource.sent == 280_000


def test_download_starts_over_when_the_resumed_file_is_wrong(serve, tmp_path):
    """Without an ETag the checksum alone shows that the received bytes belong to another file of the same size."""
    resource = Resource(OTHER[::-1])
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.content = CONTENT
    assert download(known((url,), sha256=SUM), tmp_path, delays=(0,)).read_bytes() == CONTENT
    assert resource.sent == 280_000 + 400_000


def test_download_discards_wrong_bytes(serve, tmp_path):
    message = error_of(known(serve(Resource(OTHER)), sha256=SUM), tmp_path)
    wrong = hashlib.sha256(OTHER).hexdigest()
    assert f"sent another file than expected: its SHA-256 is {wrong[:12]}…, not {SUM[:12]}…: get" in message
    assert names_in(tmp_path) == [LOCK]


class Misplaced(Resource):
    """Sends another range than the requested one."""

    @property
    def headers(self):
        return {"Content-Range": "bytes 7-280006/400000"} if self.requests and self.requests[-1]["Range"] else {}

    @headers.setter
    def headers(self, value):
        pass


def test_download_refuses_another_range_than_requested(serve, tmp_path):
    resource = Misplaced()
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    assert "sent another range than requested" in error_of(known((url,)), tmp_path)
    assert names_in(tmp_path) == [LOCK]


@pytest.mark.parametrize(
    "note",
    [
        "",
        "[]",
        '{"size": 400000, "etags": {}, "done": [[0, 50000], [60000, 110000]]}',  # of version 0.1: with gaps
        json.dumps({"url": "", "size": 40_000, "etag": ""}),  # fewer bytes than there are
    ],
)
def test_download_starts_over_when_the_note_is_unusable(serve, tmp_path, note):
    (tmp_path / f"{NAME}.part").write_bytes(OTHER[::-1][:100_000])
    (tmp_path / f"{NAME}.part.json").write_text(note)
    assert received(tmp_path, NAME) is None
    assert download(known(serve(Resource())), tmp_path).read_bytes() == CONTENT
    assert names_in(tmp_path) == [NAME]


def test_download_skips_a_complete_file(serve, tmp_path):
    resource = Resource()
    file = known(serve(resource), size=len(CONTENT), sha256=SUM)
    (tmp_path / NAME).write_bytes(CONTENT)
    assert download(file, tmp_path) == tmp_path / NAME
    assert resource.requests == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(CONTENT[:-1], "it has 399,999 bytes, not 400,000"), (OTHER, "its SHA-256 is ")],
)
def test_download_leaves_another_file_of_that_name_alone(serve, tmp_path, content, reason):
    file = known(serve(Resource()), size=len(CONTENT), sha256=SUM)
    (tmp_path / NAME).write_bytes(content)
    message = error_of(file, tmp_path)
    assert message.startswith(f"{tmp_path / NAME} is not the expected file: {reason}")
    assert message.endswith("; move it away and run the command again")
    assert (tmp_path / NAME).read_bytes() == content


def test_download_checks_the_free_space_first(serve, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(300_000))
    assert error_of(known(serve(Resource())), tmp_path) == (
        f"{NAME} needs 400.0 kB more, only 300.0 kB are free in {tmp_path}"
    )
    assert names_in(tmp_path) == [LOCK]


def test_download_keeps_the_received_bytes_when_the_disk_is_full(serve, tmp_path, monkeypatch):
    append = PartialDownload.append

    def append_little(self, remote, response, timeout):
        class Writer:
            """A response whose bytes stop fitting the disk."""

            def __init__(self):
                self.left = 100_000

            def read1(self, count):
                block = response.read1(min(self.left, count))
                self.left -= len(block)
                return block

        append(self, remote, Writer(), timeout)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PartialDownload, "append", append_little)
    first, second = Resource(), Resource()
    urls = serve(first, second)
    assert error_of(known(urls, sha256=SUM), tmp_path) == (
        f"cannot write {tmp_path / NAME}: No space left on device; received bytes are kept"
    )
    assert second.requests == []  # another mirror would not help
    assert received(tmp_path, NAME) == (100_000, 400_000)
    monkeypatch.setattr(PartialDownload, "append", append)
    assert download(known(urls[1:], sha256=SUM), tmp_path).read_bytes() == CONTENT
    assert second.sent == 300_000


def test_download_reports_a_folder_that_cannot_be_created(serve, tmp_path):
    (tmp_path / "files").write_text("a file")
    assert error_of(known(serve(Resource())), tmp_path / "files").startswith(f"cannot write {tmp_path / 'files'}")


def test_download_refuses_when_another_process_downloads_the_file(serve, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    file = known(serve(Resource()))
    with (tmp_path / LOCK).open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert error_of(file, tmp_path) == (
            f"another process is downloading {tmp_path / NAME}: wait for it, or end it, then try again"
        )
    assert download(file, tmp_path).read_bytes() == CONTENT  # the lock file of a killed process is no obstacle
    assert names_in(tmp_path) == [NAME]
