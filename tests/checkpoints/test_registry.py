"""The registry of models, by name and by folder."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from cogview.checkpoints import registry
from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.registry import (
    cache_folder,
    converted_folder,
    load_registry,
    resolve_adapter,
    resolve_bundle,
    resolve_checkpoint,
)
from cogview.errors import InputError
from cogview.files import file_sha256


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


@pytest.fixture
def v1_rows(package, tmp_path, monkeypatch):
    """Rows of two v1 models and of a bundle of both, none of them on this machine."""
    page = "https://example.org/weights"
    shared = {
        "image_tokenizer": {"name": "image.pt", "urls": ["https://example.org/image.pt"], "page": page},
        "text_model": {"name": "text.model", "urls": [], "page": page, "size": 3, "sha256": "abc"},
    }
    rows = yaml.safe_load((package / "checkpoints.yaml").read_text(encoding="utf-8"))
    for name, tasks in (("draws", ["generate"]), ("enlarges", ["upscale", "low_level"])):
        files = {"transformer": {"name": f"{name}.tar", "urls": [], "page": page}, **shared}
        rows[name] = {"about": "", "licence": "", "tasks": tasks, "files": files}
    parts = {"generate": "draws", "upscale": "enlarges", "low_level": "enlarges"}
    rows["both"] = {"about": "", "licence": "", "parts": parts}
    write_rows(package, rows)
    monkeypatch.setenv("COGVIEW_HOME", str(tmp_path / "home"))


def convert(name, tiny_checkpoint):
    return shutil.copytree(tiny_checkpoint, converted_folder(name))


def write_rows(package, rows):
    (package / "checkpoints.yaml").write_text(yaml.safe_dump(rows, sort_keys=False), encoding="utf-8")


def test_resolve_checkpoint_finds_an_embedded_model(package, tiny_checkpoint):
    assert resolve_checkpoint("cogview-tiny") == package / "models" / "tiny"
    assert load_registry()["cogview-tiny"].licence == "Apache-2.0"
    assert read_config(resolve_checkpoint("cogview-tiny")) == read_config(tiny_checkpoint)


def test_resolve_checkpoint_finds_a_folder_by_path(package, tiny_checkpoint):
    assert resolve_checkpoint(str(tiny_checkpoint)) == tiny_checkpoint


@pytest.mark.parametrize("name", ["cogview-tyni", "/no/such/folder", "红苹果"])
def test_resolve_checkpoint_lists_known_names_when_the_name_is_unknown(package, name):
    with pytest.raises(InputError) as caught:
        resolve_checkpoint(name)
    assert str(caught.value) == (
        f'checkpoint "{name}" is unknown; known: cogview-tiny, cogview-lost, the path of a checkpoint folder, or '
        "owner/name on the Hugging Face Hub"
    )


@pytest.mark.parametrize("resolve", [resolve_checkpoint, resolve_adapter])
def test_path_in_a_local_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, resolve):
    monkeypatch.chdir(tmp_path)
    refuse = pytest.fail  # called if the Hub is asked
    monkeypatch.setattr(registry, "fetch_checkpoint", refuse)
    monkeypatch.setattr(registry, "fetch_adapter", refuse)
    Path("mine").mkdir()

    def message(name):
        with pytest.raises(InputError) as caught:
            resolve(name)
        return str(caught.value)

    missing = "no such folder: mine/model (the Hugging Face Hub is not asked, since mine is a folder here)"
    assert message("mine/model") == missing
    Path("mine/recipe.yaml").write_text("work: mine\n", encoding="utf-8")
    assert message("mine/model") == f"{missing}; the model is finished by cogview run mine/recipe.yaml"
    for step in (50, 100):
        Path(f"mine/transformer-run/checkpoints/step-{step:08d}").mkdir(parents=True)
    ways = (
        "; the newest checkpoint can be used: mine/transformer-run/checkpoints/step-00000100; the model is finished by "
        "cogview run mine/recipe.yaml"
    )
    assert message("mine/model") == missing + ways
    assert message("mine/recipe.yaml") == f"mine/recipe.yaml is a file, expected the folder of a checkpoint{ways}"


def test_resolve_checkpoint_refuses_changed_weights(package):
    weights = package / "models" / "tiny" / "model.safetensors"
    expected = file_sha256(weights)
    with weights.open("r+b") as file:  # one bit of the last byte
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(InputError) as caught:
        resolve_checkpoint("cogview-tiny")
    assert str(caught.value) == (
        f"{weights} is damaged or was changed: its SHA-256 is {file_sha256(weights)[:12]}…, expected {expected[:12]}…; "
        "install cogview again"
    )


def test_resolve_checkpoint_names_the_missing_file(package):
    with pytest.raises(InputError, match=r"lost is incomplete: config.json is missing"):
        resolve_checkpoint("cogview-lost")


def test_load_registry_names_the_row_with_a_mistake(package):
    page = "https://example.org"
    transformer = {"name": "x.tar", "urls": ["https://example.org/x.tar"], "page": page}
    for row, message in [
        ({"embedded": "models/tiny", "about": ""}, "licence must be given"),
        ({"about": "", "licence": ""}, "exactly one of embedded, files and parts must be given"),
        (
            {"about": "", "licence": "", "files": {"transformer": transformer}},
            "files must be those of transformer, image_tokenizer, text_model, got transformer",
        ),
        (
            {"about": "", "licence": "", "files": {"transformer": {**transformer, "urls": ["file:///etc/hostname"]}}},
            "files, transformer: file:///etc/hostname is no address of a file: http and https are understood",
        ),
    ]:
        write_rows(package, {"cogview-odd": row})
        with pytest.raises(InputError) as caught:
            load_registry()
        assert str(caught.value).startswith("checkpoints.yaml, cogview-odd")
        assert str(caught.value).endswith(message)


def test_load_registry_accepts_an_empty_file(package):
    (package / "checkpoints.yaml").write_text("# nothing yet\n", encoding="utf-8")
    assert load_registry() == {}


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("COGVIEW_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cogview"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/cogview")
    monkeypatch.setenv("COGVIEW_HOME", "~/models")
    assert cache_folder() == tmp_path / "models"


def test_resolve_checkpoint_finds_a_v1_model_when_it_is_converted(v1_rows, tiny_checkpoint):
    with pytest.raises(InputError) as caught:
        resolve_checkpoint("draws")
    assert str(caught.value) == (
        "draws is known, but not on this machine: cogview download draws, or, with its files at hand: "
        "cogview convert draws.tar --image-tokenizer image.pt --text-model text.model"
    )
    folder = convert("draws", tiny_checkpoint)
    assert resolve_checkpoint("draws") == folder
    assert resolve_bundle("draws") == {}


def test_resolve_bundle_returns_the_models_on_this_machine(v1_rows, tiny_checkpoint):
    with pytest.raises(InputError) as caught:
        resolve_bundle("both")
    assert str(caught.value) == (
        "both is known, but none of its models (draws, enlarges) is on this machine: cogview download both"
    )
    enlarges = convert("enlarges", tiny_checkpoint)
    assert resolve_bundle("both") == {"upscale": enlarges, "low_level": enlarges}
    draws = convert("draws", tiny_checkpoint)
    assert resolve_bundle("both") == {"generate": draws, "upscale": enlarges, "low_level": enlarges}
    with pytest.raises(InputError, match=r"^both stands for several models: name one of draws, enlarges$"):
        resolve_checkpoint("both")


@pytest.mark.parametrize("name", ["cogview-tiny", "/no/such/folder", "红苹果"])
def test_resolve_bundle_is_empty_for_single_models(v1_rows, name):
    assert resolve_bundle(name) == {}


@pytest.mark.parametrize(
    "name",
    [
        "cogview-base.tar",
        "image.pt",
        "release/latest_checkpointed_iteration.txt",
        "我的 模型/mp_rank_00_model_states.pt",
    ],
)
def test_resolve_checkpoint_asks_to_convert_v1_files(package, tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    path = file.parent if "/" in name else file
    with pytest.raises(InputError) as caught:
        resolve_checkpoint(str(path))
    quoted = f"'{path}'" if " " in str(path) else path
    assert str(caught.value) == (
        f"{path} is a released checkpoint, which has to be converted once: cogview convert {quoted} "
        "--image-tokenizer vqvae_hard_biggerset_011.pt --text-model cog-pretrain.model"
    )


def test_resolve_checkpoint_explains_a_v1_image_tokenizer(package, small_release, tmp_path):
    path = small_release.write(tmp_path)["image_tokenizer"]
    with pytest.raises(InputError) as caught:
        resolve_checkpoint(str(path))
    assert str(caught.value) == (
        f"{path} is the image tokenizer of released checkpoints, which belongs behind --image-tokenizer: "
        f"cogview convert cogview-base.tar --image-tokenizer {path} --text-model cog-pretrain.model"
    )


def test_embedded_models_of_the_package_are_complete():
    """Each embedded row has a folder, files with the stated checksums, and the stated tasks."""
    rows = {name: row for name, row in load_registry().items() if row.embedded}
    assert rows
    for name, row in rows.items():
        assert read_config(resolve_checkpoint(name)).tasks == row.tasks


def test_v1_models_share_tokenizers_and_form_the_bundle():
    known = load_registry()
    bundle = known["cogview-released"]
    assert bundle.models == ("cogview-base", "cogview-caption", "cogview-sr")
    assert bundle.tasks == ("generate", "caption", "upscale", "low_level")
    for task, name in bundle.parts.items():
        row = known[name]
        assert task in row.tasks
        assert row.files["transformer"].name == f"{name}.tar"
        assert row.files["image_tokenizer"] == known["cogview-base"].files["image_tokenizer"]
        assert row.files["text_model"] == known["cogview-base"].files["text_model"]
        assert all(file.page.startswith("https://") for file in row.files.values())


@pytest.mark.parametrize("name", ["", " "])
def test_resolve_checkpoint_refuses_an_empty_name(package, tiny_checkpoint, monkeypatch, name):
    """An empty name was the current folder."""
    monkeypatch.chdir(tiny_checkpoint)
    with pytest.raises(InputError, match=r"^the name of the model is empty; known: cogview-tiny, cogview-lost, the "):
        resolve_checkpoint(name)


def test_resolve_checkpoint_says_that_a_longer_path_is_a_file(package, tmp_path):
    (tmp_path / "text.model").write_bytes(b"")
    with pytest.raises(InputError, match=f"^{tmp_path}/text.model is a file, expected the folder of a checkpoint$"):
        resolve_checkpoint(f"{tmp_path}/text.model")
