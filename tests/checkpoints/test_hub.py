"""The Hub, played by a local server: fetching, the cache, offline mode, pushing, and every error in one line."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from cogview import CogView, __version__
from cogview.checkpoints import registry
from cogview.checkpoints.adapter import BaseModelInfo, save_adapter
from cogview.checkpoints.checkpoint import load_model, read_config
from cogview.checkpoints.hub import fetch_adapter, fetch_checkpoint, is_hub_name, push_folder
from cogview.checkpoints.registry import ModelEntry, resolve_checkpoint
from cogview.cli.main import main
from cogview.errors import RetryLaterError
from cogview.modeling.lora import LoraSettings, add_lora
from tests.factories import input_error

NAME = "studio/fox"
TOKEN = "hf_secret"


class FakeHub(ThreadingHTTPServer):
    """The part of the Hub's API that ``huggingface_hub`` uses for models.

    ``repos`` maps a name to its commits by branch, each a mapping of path to content. ``gated`` and ``closed`` are
    names that need a token. ``requests`` lists "METHOD path".
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.private, self.messages, self.blobs, self.requests = {}, {}, {}, {}, []
        self.gated, self.closed, self.broken = set(), set(), False

    def add(self, name, folder, branch="main"):
        """Store the files of ``folder`` as a commit."""
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repos.setdefault(name, {})[branch] = files

    def fetched(self):
        """Return the paths of the files that were sent, sorted."""
        sent = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", request) for request in self.requests)
        return sorted(match[1] for match in sent if match)


def commit_of(files):
    """Return the hash of a commit, made of its content."""
    digest = hashlib.sha1(b"".join(path.encode() + content for path, content in sorted(files.items())))
    return digest.hexdigest()


class Refused(Exception):
    """An answer with an error: status, the Hub's error code, and a message."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path.partition("?")[0].replace("%2F", "/")
        self.server.requests.append(f"{self.command} {path}")
        try:
            if self.server.broken:
                raise Refused(500, "", "the database is away")
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    return method(self, **match.groupdict())
            raise Refused(404, "", "no such address")
        except Refused as refused:
            status, code, message = refused.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.send(json.dumps({"error": message}).encode(), {k: v for k, v in headers.items() if v}, status)

    def send(self, content, headers=None, status=200):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content, status=200):
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"}, status)

    def require_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "", "Invalid username or password.")

    def files_of(self, name, revision):
        """Return the files of a commit, or refuse as the Hub does."""
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.server.repos or (name in self.server.closed and not allowed):
            raise Refused(401, "RepoNotFound", "Repository not found")
        if name in self.server.gated and not allowed:
            raise Refused(403, "GatedRepo", "Access to this model is restricted")
        branches = self.server.repos[name]
        for branch, files in branches.items():
            if revision in (branch, commit_of(files)):
                return files
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def info(self, name, revision="main"):
        files = self.files_of(name, revision)
        siblings = [{"rfilename": path} for path in files]
        self.send_json({"id": name, "modelId": name, "sha": commit_of(files), "siblings": siblings, "tags": []})

    def tree(self, name, revision):
        files = self.files_of(name, revision)
        self.send_json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
        )

    def resolve(self, name, revision, path):
        files = self.files_of(name, revision)
        headers = {"X-Repo-Commit": commit_of(files)}
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        self.send(files[path], headers | {"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"'})

    def create(self):
        self.require_token()
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "somebody-else":
            raise Refused(403, "", "You don't have the rights to create a model under the namespace somebody-else")
        if name in self.server.repos:
            return self.send_json({"url": f"{self.server.endpoint}/{name}", "error": "exists"}, 409)
        self.server.repos[name] = {"main": {}}
        self.server.private[name] = "private" in (wanted.get("visibility"), wanted.get("private") and "private")
        return self.send_json({"url": f"{self.server.endpoint}/{name}"})

    def branch(self, name, revision):
        self.require_token()
        branches = self.server.repos[name]
        if revision in branches:
            raise Refused(409, "", "Reference already exists")
        branches[revision] = dict(branches["main"])
        self.send_json({})

    def validate(self):
        if "nonsense" in json.loads(self.body)["content"]:
            return self.send_json({"errors": [{"message": '"license" must be one of a list'}]}, 400)
        return self.send_json({"warnings": []})

    def preupload(self, name, revision):
        self.require_token()
        modes = {True: "lfs", False: "regular"}
        self.send_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": modes[file["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def lfs_batch(self, name):
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            wanted["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        self.server.blobs[oid] = self.body
        self.send(b"")

    def commit(self, name, revision):
        self.require_token()
        files = self.server.repos[name][revision]
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                self.server.messages[name] = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert key == "lfsFile"
                files[value["path"]] = self.server.blobs[value["oid"]]
        oid = commit_of(files)
        address = f"{self.server.endpoint}/{name}/commit/{oid}"
        self.send_json({"commitUrl": address, "commitOid": oid, "pullRequestUrl": None})

    def log_message(self, *_):
        pass


REPO, REVISION = r"(?P<name>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES = [
    (rf"GET /api/models/{REPO}", Handler.info),
    (rf"GET /api/models/{REPO}/revision/{REVISION}", Handler.info),
    (rf"GET /api/models/{REPO}/tree/{REVISION}", Handler.tree),
    (rf"(GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{REPO}/branch/{REVISION}", Handler.branch),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.lfs_put),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", Handler.commit),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running FakeHub, with an empty cache and no token."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # huggingface_hub reads its environment when it is imported, which other tests may have done.
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A checkpoint folder with a card, its image, a licence, and files that do not belong to the model."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "狐狸模型")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# 狐狸\n![样图](samples.png)\n", encoding="utf-8")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "samples.png").write_bytes(b"png")
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "image" / "old.bin").write_bytes(b"a pickle")
    return folder


MODEL_FILES = [
    "LICENSE",
    "README.md",
    "config.json",
    "image/config.json",
    "image/model.safetensors",
    "model.safetensors",
    "text.model",
    "things.json",
]


def paths_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("studio/fox", True),
        ("THUDM/glm-4.9_b", True),
        ("cogview-emoji", False),
        ("runs/fox/checkpoints", False),
        ("./fox", False),
        ("../fox", False),
        ("/fox", False),
        ("~/fox", False),
        ("狐狸/模型", False),
    ],
)
def test_is_hub_name_requires_owner_and_name(name, expected):
    assert is_hub_name(name) is expected


def test_fetch_checkpoint_fetches_the_files_of_a_model_alone(hub, folder):
    """Neither pickles nor the images of the card are fetched."""
    hub.add(NAME, folder)
    fetched = fetch_checkpoint(NAME)
    assert paths_in(fetched) == hub.fetched() == MODEL_FILES
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert fetched.is_relative_to(constants.HF_HUB_CACHE)


def test_fetch_checkpoint_uses_the_cache_when_nothing_has_changed(hub, folder):
    hub.add(NAME, folder)
    first = fetch_checkpoint(NAME)
    hub.requests.clear()
    assert fetch_checkpoint(NAME) == first
    assert hub.fetched() == []


def test_fetch_checkpoint_opens_the_requested_revision(hub, folder, tmp_path):
    hub.add(NAME, folder)
    (folder / "README.md").write_text("# 新的狐狸", encoding="utf-8")
    hub.add(NAME, folder, branch="next")
    commit = commit_of(hub.repos[NAME]["next"])
    cards = [fetch_checkpoint(NAME, revision=revision) / "README.md" for revision in ("next", commit, "main")]
    assert cards[0] == cards[1] != cards[2]
    assert cards[0].read_text(encoding="utf-8") == "# 新的狐狸"
    elsewhere = fetch_checkpoint(NAME, revision="next", cache_dir=tmp_path / "另一个缓存")
    assert elsewhere.is_relative_to(tmp_path / "另一个缓存")


def test_fetch_checkpoint_reads_the_cache_alone_when_offline(hub, folder, monkeypatch):
    hub.add(NAME, folder)
    online = fetch_checkpoint(NAME)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_checkpoint(NAME) == online
    assert input_error(fetch_checkpoint, "studio/wolf") == (
        f"studio/wolf is not (completely) in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it "
        "and run the command again"
    )
    assert hub.requests == []


def test_fetch_checkpoint_reads_the_cache_when_the_hub_cannot_be_reached(hub, folder, monkeypatch):
    hub.add(NAME, folder)
    online = fetch_checkpoint(NAME)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        endpoint = f"http://127.0.0.1:{closed.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    assert fetch_checkpoint(NAME) == online
    with pytest.raises(RetryLaterError) as raised:
        fetch_checkpoint("studio/wolf")
    message, cache = str(raised.value), constants.HF_HUB_CACHE
    assert "[Errno" not in message
    assert message.startswith(f"studio/wolf is not (completely) in the cache {cache}, and {endpoint} cannot be reached")
    assert message.endswith(": check the network and HF_ENDPOINT")


def test_fetch_checkpoint_reports_an_unknown_repository(hub):
    assert input_error(fetch_checkpoint, "studio/wolf") == (
        f"studio/wolf is neither a local folder nor a model at {hub.endpoint}; if it is private, run hf auth login or "
        "set HF_TOKEN"
    )


def test_fetch_checkpoint_reports_an_unknown_revision(hub, folder):
    hub.add(NAME, folder)
    assert input_error(fetch_checkpoint, NAME, revision="v9") == (
        f"{NAME} has no revision 'v9': expected a branch, a tag or a commit"
    )


def test_fetch_checkpoint_reports_a_gated_repository(hub, folder, monkeypatch):
    hub.add(NAME, folder)
    hub.gated.add(NAME)
    assert input_error(fetch_checkpoint, NAME) == (
        f"{NAME} is gated: request access at {hub.endpoint}/{NAME}, then run hf auth login or set HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert paths_in(fetch_checkpoint(NAME)) == MODEL_FILES


def test_fetch_checkpoint_sends_the_token_of_a_private_repository(hub, folder, monkeypatch):
    hub.add(NAME, folder)
    hub.closed.add(NAME)
    assert "if it is private, run hf auth login or set HF_TOKEN" in input_error(fetch_checkpoint, NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert paths_in(fetch_checkpoint(NAME)) == MODEL_FILES


def test_fetch_checkpoint_reports_a_hub_that_fails(hub):
    hub.broken = True
    message = input_error(fetch_checkpoint, NAME)
    assert f"{hub.endpoint} answered 500 for {NAME}: the database is away" in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": "# BERT"}, "is no CogView checkpoint: it has no config.json"),
        ({"config.json": '{"model_type": "bert"}'}, "is no CogView checkpoint: its config.json has no format_version"),
        ({"config.json": "[]"}, "is no CogView checkpoint: its config.json has no format_version"),
    ],
)
def test_fetch_checkpoint_refuses_another_kind_of_model(hub, tmp_path, files, message):
    """Its weights, which may be large, are not fetched."""
    other = tmp_path / "other"
    other.mkdir()
    for name, content in {**files, "model.safetensors": "many gigabytes"}.items():
        (other / name).write_text(content)
    hub.add(NAME, other)
    assert input_error(fetch_checkpoint, NAME) == f"{NAME} {message}"
    assert "model.safetensors" not in hub.fetched()


def test_fetch_checkpoint_reports_a_malformed_name(hub):
    assert "studio/fo--x" in input_error(fetch_checkpoint, "studio/fo--x")
    assert hub.requests == []


def test_fetch_adapter_fetches_the_files_of_an_adapter_alone(hub, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "cogview.json", "README.md", "training.pt"):
        (adapter / name).write_text("{}")
    hub.add(NAME, adapter)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "cogview.json"]
    assert paths_in(fetch_adapter(NAME)) == names
    hub.add("studio/base", tmp_path / "nothing")
    assert input_error(fetch_adapter, "studio/base") == "studio/base is no LoRA adapter: it has no adapter_config.json"


@pytest.mark.multiprocess
def test_fetch_checkpoint_follows_the_environment_of_huggingface_hub(hub, folder, tmp_path):
    """A separate process reads the variables as users set them."""
    hub.add(NAME, folder)
    hub.closed.add(NAME)
    code = (
        "import sys\nfrom cogview.checkpoints.hub import fetch_checkpoint\n"
        "from cogview.errors import InputError\n"
        "try:\n    print(fetch_checkpoint(sys.argv[1]))\nexcept InputError as error:\n    print(error)\n"
    )

    def fetch(**variables):
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), **variables}
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}
        done = subprocess.run([sys.executable, "-c", code, NAME], env=environment, capture_output=True, text=True)
        return done.stdout.strip()

    assert fetch() == input_error(fetch_checkpoint, NAME)
    fetched = Path(fetch(HF_TOKEN=TOKEN))
    assert fetched.is_relative_to(tmp_path / "home" / "hub")
    assert paths_in(fetched) == MODEL_FILES
    assert Path(fetch(HF_TOKEN=TOKEN, HF_HUB_CACHE=str(tmp_path / "cache"))).is_relative_to(tmp_path / "cache")
    hub.requests.clear()
    assert fetch(HF_HUB_OFFLINE="1") == str(fetched)
    assert hub.requests == []


def test_push_folder_creates_the_repository_and_uploads_the_files(hub, folder, monkeypatch):
    """A pushed folder is fetched unchanged, its card included; the card's images are pushed as well."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = push_folder(folder, NAME)
    files = hub.repos[NAME]["main"]
    assert address == f"{hub.endpoint}/{NAME}/commit/{commit_of(files)}"
    assert sorted(files) == sorted([*MODEL_FILES, "samples.png"])
    assert all(content == (folder / path).read_bytes() for path, content in files.items())
    assert hub.private[NAME] is False
    assert hub.messages[NAME] == f"Upload 狐狸模型 with cogview {__version__}"
    fetched = fetch_checkpoint(NAME)
    assert all((fetched / path).read_bytes() == (folder / path).read_bytes() for path in MODEL_FILES)


def test_push_folder_updates_a_branch_of_a_private_repository(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_folder(folder, NAME, private=True)
    assert hub.private[NAME] is True
    before = dict(hub.repos[NAME]["main"])
    for line in ("# 更好的狐狸", "# 最好的狐狸"):  # the branch is created, then exists
        (folder / "README.md").write_text(line, encoding="utf-8")
        push_folder(folder, NAME, revision="next", commit_message="改进说明")
        assert hub.repos[NAME]["next"]["README.md"].decode() == line
    assert hub.repos[NAME]["main"] == before
    assert hub.messages[NAME] == "改进说明"


def test_push_folder_refuses_an_incomplete_or_damaged_folder(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.requests.clear()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert input_error(push_folder, folder, NAME).startswith(f"{weights} is damaged: ")
    weights.unlink()
    assert (
        input_error(push_folder, folder, NAME) == f"the checkpoint {folder} is incomplete: model.safetensors is missing"
    )
    missing = tmp_path / "missing"
    assert input_error(push_folder, missing, NAME) == f"{missing} is no checkpoint folder: there is no such folder"
    (folder / "adapter_config.json").write_text("{}")
    assert input_error(push_folder, folder, NAME).endswith("is incomplete: adapter_model.safetensors is missing")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["fox", "a/b/c", "狐狸/模型"])
def test_push_folder_refuses_a_malformed_name(hub, folder, name):
    assert input_error(push_folder, folder, name) == f'"{name}" is no name on the Hub: expected owner/name'


def test_push_folder_reports_what_the_hub_refuses(hub, folder, monkeypatch):
    login = "run hf auth login or set HF_TOKEN"
    assert input_error(push_folder, folder, NAME) == (
        f"{hub.endpoint} answered 401 for {NAME}: Invalid username or password.; {login}"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert input_error(push_folder, folder, "somebody-else/fox") == (
        f"{hub.endpoint} answered 403 for somebody-else/fox: You don't have the rights to create a model under the "
        f"namespace somebody-else; {login}"
    )
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    message = input_error(push_folder, folder, NAME)
    assert message.startswith(f"{NAME} cannot be pushed to {hub.endpoint}: Invalid metadata in README.md.")
    assert message.endswith('"license" must be one of a list')
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert input_error(push_folder, folder, NAME) == "HF_HUB_OFFLINE is set: unset it and run the command again"


def test_push_command_prints_the_address_or_one_line(hub, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = ["--private", "--revision", "next", "--commit-message", "狐狸"]
    assert main(["push", str(folder), NAME, *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{hub.endpoint}/{NAME}/commit/{commit_of(hub.repos[NAME]['next'])}\n"
    assert (hub.private[NAME], hub.messages[NAME]) == (True, "狐狸")
    assert hub.repos[NAME]["main"] == {}
    (folder / "text.model").unlink()
    assert main(["push", str(folder), NAME]) == 2
    assert capsys.readouterr().err == f"cogview push: the checkpoint {folder} is incomplete: text.model is missing\n"


def test_from_pretrained_opens_a_model_of_the_hub(hub, folder, tiny_model):
    """The images are those of the folder, and the model goes by its name on the Hub."""
    hub.add(NAME, folder)
    model = CogView.from_pretrained(NAME, device="cpu", revision="main")
    assert model.name == NAME
    [image], [expected] = (opened.generate("一只狐狸", seed=3) for opened in (model, tiny_model))
    assert (image.codes == expected.codes).all()


def test_resolve_checkpoint_prefers_local_folders_and_known_names(hub, folder, tmp_path, monkeypatch):
    """A local folder wins over a known name and over the Hub; a known name over the Hub."""
    hub.add(NAME, folder)
    monkeypatch.chdir(tmp_path)
    entry = ModelEntry(about="", licence="", embedded="models/cogview-emoji")
    monkeypatch.setattr(registry, "load_registry", lambda: {NAME: entry, "fox": entry})
    (tmp_path / "fox").mkdir()  # a folder, but no checkpoint
    for name in (NAME, "fox"):
        assert resolve_checkpoint(name).name == "cogview-emoji"
    shutil.copytree(folder, tmp_path / NAME)
    shutil.copytree(folder, tmp_path / "fox", dirs_exist_ok=True)
    for name in (NAME, "fox"):
        assert resolve_checkpoint(name) == Path(name)
    assert hub.requests == []
    (tmp_path / "studio" / "wolf").mkdir()
    assert resolve_checkpoint("studio/wolf") == Path("studio/wolf")
    monkeypatch.setattr(registry, "load_registry", dict)
    shutil.rmtree(tmp_path / "studio")  # a path in a local folder is that of a local model
    assert resolve_checkpoint(NAME).is_relative_to(constants.HF_HUB_CACHE)


def test_resolve_checkpoint_refuses_a_revision_of_other_models(hub, folder):
    for name in ("cogview-emoji", str(folder), "cogview-released", "fox"):
        message = input_error(resolve_checkpoint, name, revision="v1")
        assert message == f"the revision v1 applies to models of the Hugging Face Hub (owner/name), not to {name}"
    assert "the revision v1 applies to" in input_error(CogView.from_pretrained, "cogview-released", revision="v1")


def test_adapter_is_pushed_and_merged_from_the_hub(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    adapter = tmp_path / "adapter"
    config = read_config(folder)
    transformer = load_model(folder, torch.device("cpu"), torch.float32).transformer
    settings = LoraSettings(rank=2, targets=("mlp.output",))
    add_lora(transformer, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(generator=generator)
    save_adapter(adapter, transformer, settings, BaseModelInfo.of("fox", config))
    push_folder(adapter, "studio/ink")
    assert sorted(hub.repos["studio/ink"]["main"]) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "cogview.json",
    ]
    local, fetched = (CogView.from_pretrained(folder, device="cpu", adapter=name) for name in (adapter, "studio/ink"))
    assert fetched.label == f"{folder} + studio/ink"
    weights = local.transformer.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in fetched.transformer.state_dict().items())


def test_commands_open_a_model_of_the_hub(hub, folder, tmp_path, capsys):
    hub.add(NAME, folder)
    hub.add(NAME, folder, branch="next")
    options = ["--model", NAME, "--revision", "next", "--device", "cpu"]
    assert main(["generate", "一只狐狸", *options, "--seed", "1", "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    [path] = printed.out.splitlines()
    assert printed.err.startswith(f"{NAME} on cpu")
    assert main(["caption", path, *options]) == 0
    assert main(["rerank", "--prompt", "一只狐狸", path, *options]) == 0
    capsys.readouterr()
    assert main(["info", NAME]) == 0
    assert f"{NAME}\n" in capsys.readouterr().out
    assert main(["download", NAME, "--revision", "next"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_relative_to(constants.HF_HUB_CACHE)


def test_job_of_a_hub_model_resumes_with_the_same_weights(hub, folder, tmp_path, capsys):
    """The journal holds a fingerprint of the revision that was opened, not of the branch main."""
    hub.add(NAME, folder, branch="next")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("一只狐狸\n")
    job = ["generate", "--input", str(prompts), "--model", NAME, "--revision", "next", "--device", "cpu"]
    job += ["--seed", "1", "-o", str(tmp_path / "out")]
    assert main(job) == 0
    assert main([*job, "--resume"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "studio/wolf"], "studio/wolf is neither a local folder nor a model at "),
        (["generate", "一只狐狸", "--model", "studio/wolf"], "studio/wolf is neither a local folder nor a model at "),
        (["info", NAME, "--revision", "v9"], f"{NAME} has no revision 'v9'"),
        (["info", "cogview-emoji", "--revision", "v9"], "the revision v9 applies to models of the Hugging Face Hub"),
        (["download", "cogview-base", "--revision", "v9"], "--revision applies to models of the Hugging Face Hub"),
        (["download", NAME, "-o", "out"], "-o applies to CogView v1 models; HF_HUB_CACHE sets the folder"),
        (["generate", "一只狐狸", "--adapter", "studio/ink"], "studio/ink is neither a local folder nor a model at "),
    ],
)
def test_commands_report_mistakes_in_one_line(hub, folder, capsys, arguments, message):
    hub.add(NAME, folder)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"cogview {arguments[0]}: {message}")


def test_command_reports_a_damaged_model_of_the_hub_in_one_line(hub, folder, capsys):
    (folder / "text.model").unlink()
    hub.add(NAME, folder)
    assert main(["generate", "一只狐狸", "--model", NAME]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(" is incomplete: text.model is missing")
