"""Downloads from a server in this process that cuts, lies, redirects and refuses."""

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
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cogview import __version__
from cogview.checkpoints import download as module
from cogview.checkpoints.download import Partial, download, received, size_in_words
from cogview.checkpoints.registry import KnownFile
from cogview.errors import InputError

CONTENT = random.Random(0).randbytes(400_000)
OTHER = CONTENT[:300_000] + random.Random(1).randbytes(100_000)
SUM = hashlib.sha256(CONTENT).hexdigest()
PAGE = "https://example.org/weights"
NAME = "模型.tar"


@dataclass
class Resource:
    """What the server has at one address, and how it misbehaves there."""

    content: bytes = CONTENT
    ranges: bool = True  # False: sends the whole file whatever was asked for
    status: int = 200  # anything else is answered at once
    headers: dict = field(default_factory=dict)  # sent as well
    claims: int | None = None  # bytes that the file is said to have
    says_length: bool = True
    chunked: bool = False
    cut_after: int | None = None  # bytes of each answer, ...
    cuts: float = float("inf")  # ... for so many answers
    stalls: bool = False  # goes silent instead of cutting
    at_a_time: float = float("inf")  # answers 503 to more connections than this
    asked: list = field(default_factory=list)  # Range of each request
    seen: list = field(default_factory=list)  # headers of each request
    sent: int = 0  # bytes of content
    open: int = 0  # connections


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        resource = self.server.resources[self.path]
        with self.server.lock:
            resource.asked.append(self.headers["Range"])
            resource.seen.append(self.headers)
            resource.open += 1
            refused = resource.open > resource.at_a_time
        try:
            self.answer(resource, refused)
        except OSError:
            pass  # the client went away
        finally:
            with self.server.lock:
                resource.open -= 1

    def answer(self, resource, refused):
        size = resource.claims or len(resource.content)
        start, end, status = 0, size, resource.status
        if refused:
            status = 503
        elif resource.ranges and self.headers["Range"]:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last) + 1, size), 206 if status == 200 else status
        self.send_response(status)
        for name, value in resource.headers.items():
            self.send_header(name, value)
        if status not in (200, 206):
            return self.end_headers()
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        if resource.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif resource.says_length:
            self.send_header("Content-Length", str(end - start))
        self.end_headers()
        for at in range(start, min(end, len(resource.content)), 10_000):
            block = resource.content[at : min(at + 10_000, end)]
            if resource.cut_after is not None and at - start >= resource.cut_after and resource.cuts > 0:
                resource.cuts -= 1
                if resource.stalls:
                    self.server.stopped.wait(60)
                return None
            with self.server.lock:  # first, for once it is written the client may be done, and look
                resource.sent += len(block)
            self.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n" if resource.chunked else block)
        if resource.chunked:
            self.wfile.write(b"0\r\n\r\n")
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """A function that puts resources on the server; returns their addresses."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(module, "SMALLEST_PART", 10_000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.resources, server.lock, server.stopped = {}, threading.Lock(), threading.Event()
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
    return KnownFile(name=NAME, urls=urls, page=PAGE, **facts)


def error_of(file, folder, **settings):
    with pytest.raises(InputError) as caught:
        download(file, folder, **{"waits": (), **settings})
    message = str(caught.value)
    assert "\n" not in message
    return message


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_several_parts_at_a_time_make_one_file(serve, tmp_path):
    resource = Resource()
    path = download(known(serve(resource), size=len(CONTENT), sha256=SUM), tmp_path / "files", parts=4)
    assert path == tmp_path / "files" / NAME
    assert path.read_bytes() == CONTENT
    assert names_in(path.parent) == [NAME]
    assert sorted(resource.asked[1:]) == [
        "bytes=0-99999",
        "bytes=100000-199999",
        "bytes=200000-299999",
        "bytes=300000-399999",
    ]
    assert {headers["User-Agent"] for headers in resource.seen} == {f"cogview/{__version__}"}


@pytest.mark.parametrize("size", [1, 511, 512, 9_999, 30_001])
def test_files_of_any_size_in_any_number_of_parts(serve, tmp_path, size):
    urls = serve(Resource(CONTENT[:size]))
    for parts in (1, 3):
        path = download(known(urls), tmp_path / str(parts), parts=parts)
        assert path.read_bytes() == CONTENT[:size]


@pytest.mark.parametrize(
    "resource",
    [Resource(ranges=False), Resource(ranges=False, says_length=False, chunked=True)],
    ids=["with a length", "chunked"],
)
def test_a_server_that_ignores_ranges_sends_one_stream(serve, tmp_path, resource):
    assert download(known(serve(resource)), tmp_path).read_bytes() == CONTENT
    assert resource.asked == ["bytes=0-511", None]
    assert names_in(tmp_path) == [NAME]


def test_a_file_without_an_end_is_taken_only_if_its_sum_is_known(serve, tmp_path):
    urls = serve(Resource(ranges=False, says_length=False))
    assert "does not say how long the file is, so that a cut would go unnoticed" in error_of(known(urls), tmp_path)
    assert download(known(urls, sha256=SUM), tmp_path).read_bytes() == CONTENT


def test_a_cut_connection_goes_on_where_it_stopped(serve, tmp_path):
    resource = Resource(cut_after=30_000)  # of 100,000, so that each part needs four connections
    path = download(known(serve(resource), sha256=SUM), tmp_path, waits=(0,))
    assert path.read_bytes() == CONTENT
    assert resource.sent == len(CONTENT) + 512
    assert "bytes=130000-199999" in resource.asked


def test_a_stream_that_cannot_go_on_begins_again(serve, tmp_path):
    resource = Resource(ranges=False, cut_after=350_000, cuts=1)
    assert download(known(serve(resource)), tmp_path, waits=(0,)).read_bytes() == CONTENT
    again = Resource(ranges=False, says_length=False, chunked=True, cut_after=350_000, cuts=1)
    assert download(known(serve(again)), tmp_path / "again", waits=(0,)).read_bytes() == CONTENT


@pytest.mark.parametrize(("ranges", "cut_after"), [(True, 0), (False, 200_000)])
def test_a_connection_that_is_always_cut_is_given_up(serve, tmp_path, ranges, cut_after):
    resource = Resource(ranges=ranges, cut_after=cut_after)
    assert "cut the connection" in error_of(known(serve(resource)), tmp_path, parts=1, waits=(0, 0))
    assert len(resource.asked) == 1 + 3  # the question, and three tries
    assert not (tmp_path / NAME).exists()


def test_a_server_that_is_silent_is_asked_again(serve, tmp_path):
    resource = Resource(cut_after=20_000, cuts=1, stalls=True)
    path = download(known(serve(resource)), tmp_path, parts=1, waits=(0,), timeout=0.3)
    assert path.read_bytes() == CONTENT
    assert "bytes=20000-399999" in resource.asked


def test_a_second_call_fetches_only_what_is_missing(serve, tmp_path, capsys):
    resource = Resource(cut_after=30_000)
    file = known(serve(resource), sha256=SUM)
    message = error_of(file, tmp_path)
    assert "cut the connection: run the command again to go on from 30%, or get" in message
    assert received(tmp_path, NAME) == (120_000, 400_000)
    assert names_in(tmp_path) == [f"{NAME}.part", f"{NAME}.part.json"]
    resource.cut_after, resource.sent = None, 0
    assert download(file, tmp_path).read_bytes() == CONTENT
    assert resource.sent == 280_000 + 512
    assert capsys.readouterr().err == f"{NAME}: going on from 30%\n"
    assert names_in(tmp_path) == [NAME]
    assert received(tmp_path, NAME) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_a_download_that_was_stopped_goes_on(serve, tmp_path, number):
    resource = Resource(cut_after=50_000, stalls=True)
    (url,) = serve(resource)
    code = (
        "import sys, pathlib\nfrom cogview.checkpoints import download\n"
        "from cogview.checkpoints.registry import KnownFile\n"
        "download.SECONDS_BETWEEN_NOTES, download.SMALLEST_PART = 0, 10_000\n"
        "file = KnownFile(name=sys.argv[1], urls=(sys.argv[2],), page='')\n"
        "download.download(file, pathlib.Path(sys.argv[3]), parts=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, NAME, url, str(tmp_path)], stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while received(tmp_path, NAME) != (100_000, 400_000):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(timeout=20)  # although the server is silent, and a connection may be so for 30 seconds
    resource.cut_after, resource.sent = None, 0
    assert download(known((url,), sha256=SUM), tmp_path).read_bytes() == CONTENT
    assert resource.sent == 300_000 + 512
    assert names_in(tmp_path) == [NAME]


def test_another_mirror_goes_on_with_what_the_first_gave(serve, tmp_path):
    first, second = Resource(cut_after=30_000), Resource()
    path = download(known(serve(first, second), sha256=SUM), tmp_path, waits=())
    assert path.read_bytes() == CONTENT
    assert second.sent == 280_000 + 512


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
        (Resource(claims=500_000), {}, "cut the connection"),
        (Resource(claims=500_000, ranges=False), {}, "cut the connection"),
        (Resource(b"", ranges=False, says_length=False, chunked=True), {}, "sent another file than expected: it is em"),
        (Resource(headers={"Content-Encoding": "gzip"}), {}, "sent the file compressed, which was not asked for"),
        (Resource(status=302, headers={"Location": "file:///etc/hostname"}), {}, "answered 302 Found - Redirection to"),
        (
            Resource(status=302, headers={"Location": "ftp://127.0.0.1/x"}),
            {},
            "could not be reached: unknown url type: ftp",
        ),
        (Resource(headers={"Content-Type": "text/html; charset=utf-8"}), {}, "sent a web page instead of the file ("),
        (Resource(b"\n<!DOCTYPE html><title>login</title>"), {}, "sent a web page instead of the file ("),
    ],
)
def test_a_mirror_that_fails_makes_room_for_the_next(serve, tmp_path, capsys, resource, facts, reason):
    bad, good = serve(resource, Resource())
    host = bad.split("/")[2]
    assert error_of(known((bad,), **facts), tmp_path / "alone").startswith(f"{host} {reason}")
    assert not (tmp_path / "alone" / NAME).exists()
    assert capsys.readouterr().err == ""
    path = download(known((bad, good), **facts), tmp_path / "both", waits=())
    assert path.read_bytes() == CONTENT
    err = capsys.readouterr().err
    assert err.startswith(f"{NAME}: {host} {reason}")
    assert f"; trying {host}\n" in err


def test_nobody_at_the_address(serve, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        gone = f"127.0.0.1:{closed.server_port}"
    urls = (f"http://{gone}/x", *serve(Resource(status=404)))
    message = error_of(known(urls), tmp_path)
    assert message == (
        f"{gone} could not be reached: Connection refused; {urls[1].split('/')[2]} answered 404 Not Found: "
        f"get {NAME} by hand from {PAGE} and put it at {tmp_path / NAME}, then run the command again"
    )
    assert names_in(tmp_path) == []


def test_a_web_page_in_place_of_the_file_is_explained(serve, tmp_path):
    (url,) = serve(Resource(b"<html>please log in</html>"))
    assert error_of(known((url,)), tmp_path) == (
        f"{url.split('/')[2]} sent a web page instead of the file (a login, a consent or an error page?): "
        f"get {NAME} by hand from {PAGE} and put it at {tmp_path / NAME}, then run the command again"
    )


def test_a_file_without_address_is_fetched_by_hand(tmp_path):
    folder = tmp_path / "files"
    assert error_of(known(()), folder) == (
        f"{NAME} has no address that a program could fetch it from: get {NAME} by hand from {PAGE} and put it at "
        f"{folder / NAME}, then run the command again"
    )
    (folder / NAME).write_bytes(CONTENT)  # the folder is there for it
    assert download(known(()), folder) == folder / NAME


def test_a_redirect_is_followed_with_the_range(serve, tmp_path):
    target = Resource()
    (url,) = serve(target)
    (moved,) = serve(Resource(status=302, headers={"Location": url}))
    assert download(known((moved,)), tmp_path).read_bytes() == CONTENT
    assert "bytes=300000-399999" in target.asked


def test_a_server_with_few_connections_is_served_by_fewer_threads(serve, tmp_path):
    resource = Resource(at_a_time=2)
    assert download(known(serve(resource), sha256=SUM), tmp_path, parts=8, waits=(0.05,) * 20).read_bytes() == CONTENT


def interrupted(folder, resource, url):
    """Leave a third of ``resource`` in ``folder``."""
    resource.cut_after = 30_000
    error_of(known((url,)), folder)
    resource.cut_after = None
    assert received(folder, NAME) == (120_000, len(resource.content))


def test_a_file_that_changed_at_the_mirror_is_begun_anew(serve, tmp_path, capsys):
    resource = Resource(OTHER, headers={"ETag": '"one"'})
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.content, resource.headers = CONTENT, {"ETag": '"two"'}
    assert download(known((url,)), tmp_path).read_bytes() == CONTENT
    assert capsys.readouterr().err == f"{NAME} has changed at {url.split('/')[2]}: beginning anew\n"


def test_a_file_of_another_size_is_begun_anew(serve, tmp_path, capsys):
    resource = Resource(OTHER)
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.content = CONTENT[:250_000]
    assert download(known((url,)), tmp_path).read_bytes() == CONTENT[:250_000]
    host = url.split("/")[2]
    assert capsys.readouterr().err == f"{NAME} has another size at {host} than what is here of it: beginning anew\n"


@pytest.mark.parametrize(("before", "after"), [('W/"one"', 'W/"two"'), ('"one"', '"one"'), ('"one"', "")])
def test_tags_that_promise_nothing_do_not_throw_anything_away(serve, tmp_path, before, after):
    resource = Resource(headers={"ETag": before})
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.sent, resource.headers = 0, {"ETag": after}
    assert download(known((url,), sha256=SUM), tmp_path).read_bytes() == CONTENT
    assert resource.sent == 280_000 + 512


def test_what_does_not_fit_the_rest_is_fetched_again(serve, tmp_path, capsys):
    resource = Resource(OTHER[::-1])
    (url,) = serve(resource)
    interrupted(tmp_path, resource, url)
    resource.content = CONTENT
    assert download(known((url,), sha256=SUM), tmp_path).read_bytes() == CONTENT
    assert "what was there from before does not fit what came now (its SHA-256 is " in capsys.readouterr().err


def test_wrong_bytes_are_not_kept(serve, tmp_path):
    message = error_of(known(serve(Resource(OTHER)), sha256=SUM), tmp_path)
    wrong = hashlib.sha256(OTHER).hexdigest()
    assert f"sent another file than expected: its SHA-256 is {wrong[:12]}…, not {SUM[:12]}…: get" in message
    assert names_in(tmp_path) == []


class Fickle(Resource):
    """Answers the first question with a part, and every later one with the whole file."""

    @property
    def ranges(self):
        return len(self.asked) == 1

    @ranges.setter
    def ranges(self, value):
        pass


def test_a_whole_file_in_place_of_a_part_does_no_harm(serve, tmp_path):
    resource = Fickle()
    assert "sent something else than the part that was asked for" in error_of(known(serve(resource)), tmp_path)
    assert names_in(tmp_path) == []


def test_a_stream_of_another_length_than_promised_does_no_harm(serve, tmp_path, monkeypatch):
    resource = Resource(ranges=False)
    ask = module._Client.ask

    def ask_and_change(*arguments):
        offer = ask(*arguments)
        resource.content = CONTENT * 2
        return offer

    monkeypatch.setattr(module._Client, "ask", ask_and_change)
    assert "sent something else than it first had" in error_of(known(serve(resource)), tmp_path)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "note",
    [
        "",
        "[]",
        '{"size": 400000}',
        json.dumps({"size": 400_000, "etags": {}, "done": [[0, 400_000]]}),  # more than the file has
        json.dumps({"size": 400_000, "etags": {}, "done": [[-5, 10]]}),
    ],
)
def test_a_note_that_cannot_be_is_no_note(serve, tmp_path, note):
    (tmp_path / f"{NAME}.part").write_bytes(OTHER[::-1][:100_000])
    (tmp_path / f"{NAME}.part.json").write_text(note)
    assert received(tmp_path, NAME) is None
    assert download(known(serve(Resource())), tmp_path).read_bytes() == CONTENT
    assert names_in(tmp_path) == [NAME]


def test_a_file_that_is_there_is_not_fetched_again(serve, tmp_path):
    resource = Resource()
    file = known(serve(resource), size=len(CONTENT), sha256=SUM)
    (tmp_path / NAME).write_bytes(CONTENT)
    assert download(file, tmp_path) == tmp_path / NAME
    assert resource.asked == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(CONTENT[:-1], "it has 399,999 bytes, not 400,000"), (OTHER, "its SHA-256 is ")],
)
def test_another_file_of_that_name_is_left_alone(serve, tmp_path, content, reason):
    file = known(serve(Resource()), size=len(CONTENT), sha256=SUM)
    (tmp_path / NAME).write_bytes(content)
    message = error_of(file, tmp_path)
    assert message.startswith(f"{tmp_path / NAME} is not the file that is expected: {reason}")
    assert message.endswith("; move it away and run the command again")
    assert (tmp_path / NAME).read_bytes() == content


def test_a_disk_without_room_is_noticed_before_anything_is_sent(serve, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(300_000))
    resource = Resource()
    assert error_of(known(serve(resource)), tmp_path) == (
        f"{NAME} needs 400.0 kB more in {tmp_path}, where 300.0 kB are free"
    )
    assert resource.sent == 512
    assert names_in(tmp_path) == []


def test_a_disk_that_runs_full_keeps_what_was_received(serve, tmp_path, monkeypatch):
    write = Partial.write

    def write_little(self, start, block):
        if self.count >= 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, start, block)

    monkeypatch.setattr(Partial, "write", write_little)
    another, later = Resource(), Resource()
    urls = serve(Resource(), another, later)
    assert error_of(known(urls[:2], sha256=SUM), tmp_path) == (
        f"cannot write {tmp_path / NAME}: No space left on device; what was received is kept"
    )
    assert another.asked == []  # it would not help
    kept, _ = received(tmp_path, NAME)
    assert kept >= 100_000
    monkeypatch.setattr(Partial, "write", write)
    assert download(known(urls[2:], sha256=SUM), tmp_path).read_bytes() == CONTENT
    assert later.sent == len(CONTENT) - kept + 512


def test_a_folder_that_cannot_be_made(serve, tmp_path):
    (tmp_path / "files").write_text("no folder")
    message = error_of(known(serve(Resource())), tmp_path / "files")
    assert message.startswith(f"cannot write {tmp_path / 'files'}")


def test_two_processes_do_not_fetch_the_same_file(serve, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    file = known(serve(Resource()))
    lock = tmp_path / f"{NAME}.lock"
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert error_of(file, tmp_path) == (
            f"another process is fetching {tmp_path / NAME}; wait for it, or end it, and run the command again"
        )
    assert download(file, tmp_path).read_bytes() == CONTENT  # the file of a killed process locks nobody out
    assert names_in(tmp_path) == [NAME]


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1_021_864, "1.0 MB"), (7_857_699_840, "7.9 GB")]
)
def test_sizes_in_words(count, words):
    assert size_in_words(count) == words
