"""``cogview download``: the files of a model, from a server in this process."""

import functools
import hashlib
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.registry import FileEntry, ModelEntry, converted_folder, is_converted, resolve_bundle
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.cli.main import main

CONTENTS = {
    "painter.tar": b"weights that generate",
    "captioner.tar": b"weights that describe",
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
    """Register two v1 models, ``painter`` and ``captioner``, the bundle ``both``, and an embedded model.

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
    server.handle_error = lambda *_: None  # a client may hang up after the start of a file
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def file(name):
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        return FileEntry(name=name, urls=(url,), page="https://example.org/weights")

    def released(transformer, task):
        names = {"transformer": transformer, "image_tokenizer": "image.pt", "text_model": "text.model"}
        return ModelEntry(about="", licence="", tasks=(task,), files={role: file(name) for role, name in names.items()})

    rows = {
        "tiny": ModelEntry(about="", licence="", embedded="models/tiny"),
        "painter": released("painter.tar", "generate"),
        "captioner": released("captioner.tar", "caption"),
        "both": ModelEntry(about="", licence="", parts={"generate": "painter", "caption": "captioner"}),
    }
    monkeypatch.setattr("cogview.checkpoints.registry.load_registry", lambda: rows)
    monkeypatch.setenv("COGVIEW_HOME", str(tmp_path / "home"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def lines_of(err):
    """Return the lines of stderr without those about checksums that the registry lacks."""
    return [line for line in err.splitlines() if not line.startswith("warning: no checksum is known for ")]


def convert_line(model, folder):
    files = f"{folder / model}.tar --image-tokenizer {folder / 'image.pt'} --text-model {folder / 'text.model'}"
    return f"{model} has to be converted once: cogview convert {files}"


def test_download_prints_the_files_and_the_next_command(server, tmp_path, capsys):
    assert main(["download", "painter", "--no-convert"]) == 0
    printed = capsys.readouterr()
    folder = tmp_path / "home" / "files"
    paths = [folder / name for name in ("painter.tar", "image.pt", "text.model")]
    assert printed.out.splitlines() == list(map(str, paths))
    assert [path.read_bytes() for path in paths] == [CONTENTS[path.name] for path in paths]
    assert lines_of(printed.err) == [convert_line("painter", folder)]
    found = hashlib.sha256(CONTENTS["painter.tar"]).hexdigest()
    assert printed.err.splitlines()[0] == (
        f"warning: no checksum is known for painter.tar: its SHA-256 is {found}; compare it with that of another "
        "source, such as https://example.org/weights"
    )


def test_download_fetches_shared_files_of_a_bundle_once(server, tmp_path, capsys):
    folder = tmp_path / "我的模型"
    assert main(["download", "both", "-o", str(folder), "--parts", "2"]) == 0
    printed = capsys.readouterr()
    names = ["painter.tar", "image.pt", "text.model", "captioner.tar"]
    assert printed.out.splitlines() == [str(folder / name) for name in names]
    assert set(server.asked) == {f"/{name}" for name in names}
    fetched = len(server.asked)
    assert [line.split(" has to be")[0] for line in lines_of(printed.err)] == ["painter", "captioner"]
    assert main(["download", "both", "-o", str(folder)]) == 0
    assert capsys.readouterr().out == printed.out
    assert len(server.asked) == fetched


def test_download_reports_files_that_cannot_be_fetched(server, tmp_path, capsys):
    for name in ("painter.tar", "text.model"):
        (server.folder / name).unlink()
    assert main(["download", "both"]) == 2
    folder = tmp_path / "home" / "files"
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(folder / name) for name in ("image.pt", "captioner.tar")]
    first, second = lines_of(printed.err)  # no line about a conversion
    for line, name in ((first, "painter.tar"), (second, "text.model")):
        assert line.startswith("cogview download: 127.0.0.1:")
        assert line.endswith(
            f"answered 404 File not found: get {name} by hand from https://example.org/weights and put it at "
            f"{folder / name}, then run the command again"
        )


def test_download_ends_with_status_3_when_the_server_does_not_answer(server, capsys, monkeypatch):
    """A script cannot distinguish a wrong name from a network that is down."""
    monkeypatch.setattr("cogview.checkpoints.download.time.sleep", lambda seconds: None)
    server.server_close()
    assert main(["download", "painter"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert all(" could not be reached: Connection re" in line for line in lines)
    retries = [line for line in lines if "trying again in" in line]
    assert [line.rpartition("; ")[2] for line in retries] == [
        f"trying again in {delay} s" for delay in (1, 2, 4, 8)
    ] * 3
    assert len(lines) - len(retries) == 3


def test_download_skips_a_converted_model(server, tiny_checkpoint, tmp_path, capsys):
    shutil.copytree(tiny_checkpoint, converted_folder("painter"))
    assert main(["download", "painter"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"painter is converted already: {converted_folder('painter')}\n")
    assert main(["download", "both", "--no-convert"]) == 0
    assert "/painter.tar" not in server.asked
    assert main(["download", "painter", "-o", str(tmp_path / "files")]) == 0  # -o asks for the files themselves
    assert (tmp_path / "files" / "painter.tar").read_bytes() == CONTENTS["painter.tar"]


@pytest.fixture
def real_files(server, small_release, tmp_path):
    """Serve the files of a v1 model, the same for both rows."""
    files = small_release.write(tmp_path / "release", half=True)
    for name in ("painter.tar", "captioner.tar"):
        with tarfile.open(server.folder / name, "w") as archive:
            archive.add(files["source"], name.removesuffix(".tar"))
    shutil.copyfile(files["image_tokenizer"], server.folder / "image.pt")
    shutil.copyfile(files["text_model"], server.folder / "text.model")


def test_download_converts_the_fetched_files(server, real_files, capsys):
    assert main(["download", "both"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 4
    folders = {name: converted_folder(name) for name in ("painter", "captioner")}
    assert lines_of(printed.err) == [f"{name} is converted: {folder}" for name, folder in folders.items()]
    assert read_config(folders["painter"]).tasks == ("generate",)
    assert read_config(folders["captioner"]).tasks == ("caption",)
    specs = WeightsFile(folders["painter"] / "model.safetensors").specs
    assert {spec.dtype for spec in specs.values()} == {torch.float16}  # as they were stored
    asked = len(server.asked)
    assert main(["download", "both"]) == 0
    assert len(server.asked) == asked
    assert resolve_bundle("both") == {"generate": folders["painter"], "caption": folders["captioner"]}


def test_download_converts_existing_files(server, real_files, capsys):
    assert main(["download", "painter", "--no-convert"]) == 0
    assert not is_converted("painter")
    assert main(["download", "painter"]) == 0
    assert is_converted("painter")


def test_download_keeps_files_that_cannot_be_converted(server, real_files, tmp_path, capsys):
    (server.folder / "painter.tar").write_bytes(CONTENTS["painter.tar"])
    assert main(["download", "both"]) == 2
    failed, done = lines_of(capsys.readouterr().err)
    path = tmp_path / "home" / "files" / "painter.tar"
    assert failed.startswith(f"cogview download: painter could not be converted: {path} is no tar archive")
    assert done == f"captioner is converted: {converted_folder('captioner')}"
    assert path.read_bytes() == CONTENTS["painter.tar"]
    assert not converted_folder("painter").exists()


def test_download_skips_the_embedded_model(server, capsys):
    assert main(["download", "tiny"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "tiny comes with the package: there is nothing to download\n")


def test_download_reports_mistakes_in_one_line(server, capsys):
    for arguments, message in [
        (["cogview-bse"], 'model "cogview-bse" is unknown; known: tiny, painter, captioner, both'),
    ]:
        assert main(["download", *arguments]) == 2
        assert capsys.readouterr().err == f"cogview download: {message}\n"
    assert server.asked == []


def test_download_help_lists_every_option(capsys):
    assert main(["download", "--help"]) == 0
    assert "--no-convert" in capsys.readouterr().out
