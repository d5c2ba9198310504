"""``cogview download``: the files of a model, from a server in this process."""

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cogview.checkpoints.registry import KnownFile, KnownModel, converted_folder
from cogview.cli.main import main

CONTENTS = {
    "draws.tar": b"weights that draw",
    "describes.tar": b"weights that describe",
    "image.pt": b"codes",
    "text.model": b"pieces",
}


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Two released models, ``draws`` and ``describes``, the bundle ``both``, and one that comes with the package.

    ``server.folder`` has their files, ``server.asked`` the paths that were asked for.
    """
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "server"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.folder, server.asked = folder, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def file(name):
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        return KnownFile(name=name, urls=(url,), page="https://example.org/weights")

    def released(transformer):
        names = {"transformer": transformer, "image_tokenizer": "image.pt", "text_model": "text.model"}
        return KnownModel(about="", licence="", files={role: file(name) for role, name in names.items()})

    rows = {
        "tiny": KnownModel(about="", licence="", embedded="models/tiny"),
        "draws": released("draws.tar"),
        "describes": released("describes.tar"),
        "both": KnownModel(about="", licence="", parts={"generate": "draws", "caption": "describes"}),
    }
    monkeypatch.setattr("cogview.checkpoints.registry.known_models", lambda: rows)
    monkeypatch.setenv("COGVIEW_HOME", str(tmp_path / "home"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def convert_line(model, folder):
    files = f"{folder / model}.tar --image-tokenizer {folder / 'image.pt'} --text-model {folder / 'text.model'}"
    return f"{model} has to be converted once: cogview convert {files}"


def test_the_files_of_a_model_and_how_to_go_on(server, tmp_path, capsys):
    assert main(["download", "draws"]) == 0
    printed = capsys.readouterr()
    folder = tmp_path / "home" / "files"
    paths = [folder / name for name in ("draws.tar", "image.pt", "text.model")]
    assert printed.out.splitlines() == list(map(str, paths))
    assert [path.read_bytes() for path in paths] == [CONTENTS[path.name] for path in paths]
    assert printed.err.splitlines() == [convert_line("draws", folder)]


def test_a_bundle_fetches_shared_files_once(server, tmp_path, capsys):
    folder = tmp_path / "我的模型"
    assert main(["download", "both", "-o", str(folder), "--parts", "2"]) == 0
    printed = capsys.readouterr()
    names = ["draws.tar", "image.pt", "text.model", "describes.tar"]
    assert printed.out.splitlines() == [str(folder / name) for name in names]
    assert set(server.asked) == {f"/{name}" for name in names}
    fetched = len(server.asked)
    assert [line.split(" has to be")[0] for line in printed.err.splitlines()] == ["draws", "describes"]
    assert main(["download", "both", "-o", str(folder)]) == 0
    assert capsys.readouterr().out == printed.out
    assert len(server.asked) == fetched


def test_what_can_be_had_is_fetched_and_the_rest_is_named(server, tmp_path, capsys):
    for name in ("draws.tar", "text.model"):
        (server.folder / name).unlink()
    assert main(["download", "both"]) == 2
    folder = tmp_path / "home" / "files"
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(folder / name) for name in ("image.pt", "describes.tar")]
    first, second, last = printed.err.splitlines()
    for line, name in ((first, "draws.tar"), (second, "text.model")):
        assert line.startswith("cogview download: 127.0.0.1:")
        assert line.endswith(
            f"answered 404 File not found: get {name} by hand from https://example.org/weights and put it at "
            f"{folder / name}, then run the command again"
        )
    assert last == convert_line("describes", folder)


def test_a_model_that_is_converted_is_not_fetched_again(server, tiny_checkpoint, tmp_path, capsys):
    shutil.copytree(tiny_checkpoint, converted_folder("draws"))
    assert main(["download", "draws"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"draws is here already: {converted_folder('draws')}\n")
    assert main(["download", "both"]) == 0
    assert "/draws.tar" not in server.asked
    assert main(["download", "draws", "-o", str(tmp_path / "files")]) == 0  # the files themselves are asked for
    assert (tmp_path / "files" / "draws.tar").read_bytes() == CONTENTS["draws.tar"]


def test_a_model_of_the_package_needs_no_download(server, capsys):
    assert main(["download", "tiny"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "tiny comes with the package: there is nothing to download\n")


def test_mistakes_are_one_line(server, capsys):
    for arguments, message in [
        (["cogview-bse"], 'model "cogview-bse" is unknown; known: tiny, draws, describes, both'),
        (["draws", "--parts", "0"], "--parts must be at least 1, got 0"),
    ]:
        assert main(["download", *arguments]) == 2
        assert capsys.readouterr().err == f"cogview download: {message}\n"
    assert server.asked == []


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["download", "--help"])
    assert exit_.value.code == 0
    assert "--parts COUNT" in capsys.readouterr().out
