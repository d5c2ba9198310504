"""Known models, by name and by folder."""

import os
import shutil

import pytest
import yaml

from cogview.checkpoints import registry
from cogview.checkpoints.folder import file_sha256, read_config
from cogview.checkpoints.registry import find_checkpoint, known_models
from cogview.errors import InputError


@pytest.fixture
def package(tiny_checkpoint, tmp_path, monkeypatch):
    """A package with one embedded model, cogview-tiny, and a second row, cogview-lost, whose folder is empty."""
    package = tmp_path / "package"
    folder = shutil.copytree(tiny_checkpoint, package / "models" / "tiny")
    (package / "models" / "lost").mkdir()
    row = {
        "embedded": "models/tiny",
        "about": "draws the things of a tiny world",
        "licence": "Apache-2.0",
        "sha256": {name: file_sha256(folder / name) for name in ("config.json", "model.safetensors")},
    }
    write_rows(package, {"cogview-tiny": row, "cogview-lost": {**row, "embedded": "models/lost"}})
    monkeypatch.setattr(registry, "_package", lambda: package)
    return package


def write_rows(package, rows):
    (package / "checkpoints.yaml").write_text(yaml.safe_dump(rows, sort_keys=False), encoding="utf-8")


def test_known_model_is_found_and_whole(package, tiny_checkpoint):
    assert find_checkpoint("cogview-tiny") == package / "models" / "tiny"
    assert known_models()["cogview-tiny"].licence == "Apache-2.0"
    assert read_config(find_checkpoint("cogview-tiny")) == read_config(tiny_checkpoint)


def test_folder_is_found_by_its_path(package, tiny_checkpoint):
    assert find_checkpoint(str(tiny_checkpoint)) == tiny_checkpoint


@pytest.mark.parametrize("name", ["cogview-tyni", "/no/such/folder", "红苹果"])
def test_unknown_name_lists_the_known(package, name):
    with pytest.raises(InputError) as caught:
        find_checkpoint(name)
    assert str(caught.value) == (
        f'checkpoint "{name}" is unknown; known: cogview-tiny, cogview-lost, or the path of a checkpoint folder'
    )


def test_changed_weights_are_refused(package):
    weights = package / "models" / "tiny" / "model.safetensors"
    expected = file_sha256(weights)
    with weights.open("r+b") as file:  # one bit of the last byte
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(InputError) as caught:
        find_checkpoint("cogview-tiny")
    assert str(caught.value) == (
        f"{weights} is damaged or was changed: its SHA-256 is {file_sha256(weights)[:12]}…, expected {expected[:12]}…; "
        "install cogview again"
    )


def test_missing_file_of_a_known_model(package):
    with pytest.raises(InputError, match=r"lost is incomplete: config.json is missing"):
        find_checkpoint("cogview-lost")


def test_row_with_a_mistake_is_named(package):
    write_rows(package, {"cogview-odd": {"embedded": "models/tiny", "about": "", "licence": ""}})
    with pytest.raises(InputError, match=r"checkpoints.yaml, cogview-odd: sha256 must be given"):
        known_models()


def test_empty_registry_knows_nothing(package):
    (package / "checkpoints.yaml").write_text("# nothing yet\n", encoding="utf-8")
    assert known_models() == {}


def test_models_of_this_package_are_whole():
    """Every row that ships: its folder is there, and its files have the sums that the row states."""
    for name in known_models():
        assert read_config(find_checkpoint(name)).tasks
