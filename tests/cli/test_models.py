"""``cogview models``: the known models, and their files on this machine."""

import json
import shutil

import pytest

from cogview.checkpoints.registry import FileEntry, ModelEntry
from cogview.cli.main import main

BASE = "not here: cogview download cogview-base"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Set $COGVIEW_HOME to an empty folder."""
    monkeypatch.setenv("COGVIEW_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "files").mkdir(parents=True)
    return tmp_path / "home"


def on_disk(capsys, name):
    """Return the line about the files on this machine."""
    assert main(["models"]) == 0
    blocks = {block.split(":")[0]: block.splitlines() for block in capsys.readouterr().out.split("\n\n")}
    return blocks[name][-1].removeprefix("  on disk:").strip()


def as_json(capsys, name):
    assert main(["models", "--json"]) == 0
    return next(row for row in json.loads(capsys.readouterr().out) if row["name"] == name)


def leave_part(files, name, size, count):
    """Leave the files of an interrupted download."""
    (files / f"{name}.part").write_bytes(b"x" * count)
    note = {"url": "https://example.org", "size": size, "etag": ""}
    (files / f"{name}.part.json").write_text(json.dumps(note), encoding="utf-8")


def test_models_lists_tasks_and_licence_of_every_model(home, capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cogview-emoji: generates, captions, ranks and upscales")
    for line in (
        "  tasks:    generate, caption, upscale, low_level",
        "  tasks:    upscale, low_level",
        "  licence:  Apache-2.0",
        "  licence:  see the publisher's page (the code is Apache-2.0)",
        f"  on disk:  {BASE}",
    ):
        assert line in out.splitlines()


def test_models_describes_the_embedded_model(home, capsys):
    assert on_disk(capsys, "cogview-emoji").startswith("comes with the package (2")
    row = as_json(capsys, "cogview-emoji")
    assert row["kind"] == "embedded"
    assert row["folder"].endswith("cogview-emoji")
    assert row["size"] > 20_000_000


def test_models_describes_the_files_of_a_v1_model(home, tiny_checkpoint, capsys):
    files = home / "files"
    assert on_disk(capsys, "cogview-base") == BASE
    assert as_json(capsys, "cogview-base")["folder"] is None
    leave_part(files, "cogview-base.tar", 1000, 310)
    assert on_disk(capsys, "cogview-base") == "part of cogview-base.tar: 31%: cogview download cogview-base"
    (files / "cog-pretrain.model").write_bytes(b"x" * 1_021_864)
    (files / "vqvae_hard_biggerset_011.pt").write_bytes(b"x" * 8_136)
    assert on_disk(capsys, "cogview-base") == (
        "2 of 3 files, 1.0 MB; part of cogview-base.tar: 31%: cogview download cogview-base"
    )
    assert on_disk(capsys, "cogview-sr") == "2 of 3 files, 1.0 MB: cogview download cogview-sr"
    assert as_json(capsys, "cogview-base")["files"][0] == {
        "name": "cogview-base.tar",
        "path": str(files / "cogview-base.tar.part"),
        "size": 1000,
        "received": 310,
    }
    folder = shutil.copytree(tiny_checkpoint, home / "models" / "cogview-base")
    row = as_json(capsys, "cogview-base")
    assert row["folder"] == str(folder)
    assert row["size"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    state = on_disk(capsys, "cogview-base")
    assert state.startswith("converted (")
    assert state.endswith("); 2 of 3 files, 1.0 MB; part of cogview-base.tar: 31%")


def test_models_describes_the_models_of_a_bundle(home, tiny_checkpoint, capsys):
    assert on_disk(capsys, "cogview-released") == (
        "cogview-base is not here, cogview-caption is not here, cogview-sr is not here: "
        "cogview download cogview-released"
    )
    shutil.copytree(tiny_checkpoint, home / "models" / "cogview-sr")
    assert on_disk(capsys, "cogview-released") == (
        "cogview-base is not here, cogview-caption is not here, cogview-sr is here: cogview download cogview-released"
    )
    parts = as_json(capsys, "cogview-released")["parts"]
    assert parts["low_level"] == {"model": "cogview-sr", "here": True}
    assert parts["caption"] == {"model": "cogview-caption", "here": False}
    for name in ("cogview-base", "cogview-caption"):
        shutil.copytree(tiny_checkpoint, home / "models" / name)
    assert on_disk(capsys, "cogview-released") == "cogview-base is here, cogview-caption is here, cogview-sr is here"


def test_models_prints_chinese_without_escapes(home, monkeypatch, capsys):
    file = FileEntry(name="模型.tar", urls=(), page="https://example.org")
    files = dict.fromkeys(("transformer", "image_tokenizer", "text_model"), file)
    row = ModelEntry(about="画狐狸", licence="Apache-2.0", tasks=("generate",), files=files)
    monkeypatch.setattr("cogview.checkpoints.registry.load_registry", lambda: {"狐狸": row})
    assert as_json(capsys, "狐狸")["about"] == "画狐狸"
    assert on_disk(capsys, "狐狸") == "not here: cogview download 狐狸"


def test_models_help_lists_every_option(capsys):
    assert main(["models", "--help"]) == 0
    assert "--json" in capsys.readouterr().out
