"""Checkpoint folders: they load as they were saved, and each kind of damage has its message."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview.checkpoints.checkpoint import (
    NamedThing,
    load_model,
    read_config,
    read_things,
    save_model,
    verify_files,
)
from cogview.checkpoints.image_tokenizer import (
    codebook_hash,
    load_image_tokenizer,
    read_image_config,
    save_image_tokenizer,
)
from cogview.errors import InputError
from cogview.files import file_sha256
from cogview.modeling.config import FORMAT_VERSION, Sampling
from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer
from cogview.vqvae.model import VQVAE, VQVAEConfig
from tests.factories import input_error

CPU = torch.device("cpu")
CAPTIONS = ["蓝色背景上的三只狐狸", "一个红苹果在汽车的左边"] * 4


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint, CPU, torch.float32)


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = config
        for part in outer:
            inner = inner[part]
        inner[last] = value
    path.write_text(json.dumps(config), encoding="utf-8")


def error_of(folder):
    """Return the one-line message of loading a folder that must fail."""
    return input_error(load_model, folder, CPU, torch.float32)


# --- saved equals loaded --------------------------------------------------------------------------------------------


def test_load_model_equals_the_saved_model(model, tmp_path):
    save_model(tmp_path / "new" / "folder", model)
    loaded = load_model(tmp_path / "new" / "folder", CPU, torch.float32)

    assert loaded.config == model.config
    assert loaded.things == model.things != ()
    assert loaded.card == model.card != ""
    for part in ("transformer", "image_tokenizer"):
        saved_weights, weights = getattr(model, part).state_dict(), getattr(loaded, part).state_dict()
        assert saved_weights.keys() == weights.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in saved_weights.items())
        assert not getattr(loaded, part).training

    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.transformer(ids), model.transformer(ids))
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.image_tokenizer.encode(images), model.image_tokenizer.encode(images))
    prompt = "蓝色背景上的三只狐狸"
    assert loaded.text_tokenizer.encode(prompt) == model.text_tokenizer.encode(prompt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_save_model_rounds_weights_once_when_stored_in_half_precision(model, tmp_path, dtype):
    """The codebook stays float32, so that codes keep their meaning."""
    save_model(tmp_path / "half", model, dtype=dtype)
    loaded = load_model(tmp_path / "half", CPU, torch.float32)
    for part in ("transformer", "image_tokenizer"):
        weights = getattr(loaded, part).state_dict()
        for name, tensor in getattr(model, part).state_dict().items():
            assert weights[name].dtype == torch.float32
            kept = name == "quantizer.codebook"
            assert torch.equal(weights[name], tensor if kept else tensor.to(dtype).float()), name
    assert codebook_hash(loaded.image_tokenizer) == codebook_hash(model.image_tokenizer)
    stored = load_file(tmp_path / "half" / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {dtype}

    save_model(tmp_path / "again", loaded, dtype=dtype)
    for file in ("config.json", "model.safetensors", "image/model.safetensors"):
        assert file_sha256(tmp_path / "again" / file) == file_sha256(tmp_path / "half" / file)


def test_load_model_converts_the_transformer_to_the_requested_dtype(tiny_checkpoint):
    loaded = load_model(tiny_checkpoint, CPU, torch.bfloat16)
    assert {p.dtype for p in loaded.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.image_tokenizer.parameters()} == {torch.float32}


def test_save_model_writes_the_whole_config(model, tmp_path):
    config = dataclasses.replace(
        model.config,
        tasks=("generate", "caption"),
        caption_stop=False,
        caption_dropout=0.1,
        sampling=Sampling(temperature=0.8, top_k=50, top_p=0.9),
    )
    save_model(tmp_path, dataclasses.replace(model, config=config))
    assert read_config(tmp_path) == config
    assert config.layouts["caption"].elements[-1].stop is None


def test_save_image_tokenizer_roundtrip(model, tmp_path):
    save_image_tokenizer(tmp_path, model.image_tokenizer)
    loaded = load_image_tokenizer(tmp_path)
    assert loaded.config == model.image_tokenizer.config
    assert codebook_hash(loaded) == codebook_hash(model.image_tokenizer)


@pytest.mark.parametrize("channels", [(4, 8), (4, 8, 8), (4, 8, 8, 8)], ids=["4x", "8x", "16x"])
def test_loaded_image_tokenizer_has_the_codes_and_pictures_of_the_saved_one(channels, tmp_path):
    torch.manual_seed(0)
    saved = VQVAE(VQVAEConfig(channels=channels, num_codes=32, code_width=4)).eval()
    save_image_tokenizer(tmp_path, saved)
    loaded = load_image_tokenizer(tmp_path)
    assert loaded.config == saved.config == read_image_config(tmp_path)
    codes = saved.encode(torch.rand(2, 3, 48, 96))
    assert torch.equal(loaded.decode(codes), saved.decode(codes))
    assert torch.equal(loaded.encode(saved.decode(codes)), saved.encode(saved.decode(codes)))


def test_codebook_hash_changes_with_the_codebook(tiny_checkpoint):
    tokenizer = load_image_tokenizer(tiny_checkpoint / "image")
    before = codebook_hash(tokenizer)
    tokenizer.quantizer.codebook[[0, 1]] = tokenizer.quantizer.codebook[[1, 0]]
    assert codebook_hash(tokenizer) != before


def test_read_things_is_empty_when_the_model_names_none(model, tmp_path):
    save_model(tmp_path, dataclasses.replace(model, things=(), card=""))
    assert read_things(tmp_path) == ()
    loaded = load_model(tmp_path, CPU, torch.float32)
    assert (loaded.things, loaded.card) == ((), "")


def test_read_things_reads_no_weights(model, tmp_path):
    things = (NamedThing(name="狐狸"), NamedThing(name="红苹果", emoji="🍎", synonyms=("苹果", "蛇果")))
    save_model(tmp_path, dataclasses.replace(model, things=things))
    (tmp_path / "model.safetensors").unlink()
    assert read_things(tmp_path) == things


def test_save_model_gives_every_file_the_same_permissions(model, tmp_path):
    save_model(tmp_path, model)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert set(modes.values()) == {modes["config.json"]}


def test_save_model_replaces_the_folder_it_was_loaded_from(folder):
    """Loaded weights must not be a view of the file that is being replaced."""
    loaded = load_model(folder, CPU, torch.float32)
    expected = {name: tensor.clone() for name, tensor in loaded.transformer.state_dict().items()}
    with torch.no_grad():
        loaded.image_tokenizer.decoder[0].bias.add_(1)
    save_model(folder, loaded)
    again = load_model(folder, CPU, torch.float32).transformer.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    save_model(folder, loaded, dtype=torch.float16)  # a smaller file
    assert all(torch.equal(loaded.transformer.state_dict()[name], tensor) for name, tensor in expected.items())


# --- incomplete folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("config.json", "{folder} is no checkpoint folder: config.json is missing"),
        ("model.safetensors", "the checkpoint {folder} is incomplete: model.safetensors is missing"),
        ("text.model", "the checkpoint {folder} is incomplete: text.model is missing"),
        ("image/config.json", "{folder}/image is no image tokenizer: config.json is missing"),
        ("image/model.safetensors", "{folder}/image is no image tokenizer: model.safetensors is missing"),
    ],
)
def test_load_model_names_the_missing_file(folder, part, message):
    (folder / part).unlink()
    assert error_of(folder) == message.format(folder=folder)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_load_model_reports_truncated_weights(folder, size):
    os.truncate(folder / "model.safetensors", size)
    assert error_of(folder).startswith(f"{folder}/model.safetensors is damaged: ")


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_load_model_reports_truncated_image_weights(folder, size):
    os.truncate(folder / "image" / "model.safetensors", size)
    assert error_of(folder).startswith(f"{folder}/image/model.safetensors is damaged: ")


def test_load_model_reports_a_truncated_text_model(folder):
    os.truncate(folder / "text.model", 100)
    assert error_of(folder).startswith(f"{folder}/text.model: 100 bytes that are no SentencePiece model")


@pytest.mark.parametrize("file", ["config.json", "image/config.json", "things.json"])
def test_load_model_reports_invalid_json(folder, file):
    (folder / file).write_text('{"grid": 8', encoding="utf-8")
    assert error_of(folder).startswith(f"{folder}/{file} is not JSON: ")


OUT_OF_MEMORY = """
import re, resource, sys
from pathlib import Path
from cogview.checkpoints.checkpoint import load_model
from cogview.cli.main import main
command = ["generate", "一只狐狸", "-o", sys.argv[3], "--dtype", "float32", "--device", "cpu", "--model"]
assert main([*command, sys.argv[1]]) == 0  # everything is imported
sys.stderr.flush()
for megabytes in (32, 96):
    used = 1024 * int(re.search(r"VmSize:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
    print(megabytes, file=sys.stderr)
    print(main([*command, sys.argv[2]]))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_ends_in_one_line_when_memory_is_exhausted(folder, tmp_path):
    """The file could not be mapped, or its float32 copy not be held: both were tracebacks of an allocator."""
    large = shutil.copytree(folder, tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    positions = 1 << 20
    tensors["positions.weight"] = torch.zeros(positions, tensors["positions.weight"].shape[1], dtype=torch.float16)
    save_file(tensors, large / "model.safetensors")
    change_config(large, transformer__max_positions=positions)
    arguments = (str(folder), str(large), str(tmp_path / "images"))
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=100,
    )
    assert done.stdout.splitlines()[-2:] == ["3", "3"]
    *_, first, one, second, two = done.stderr.splitlines()
    assert (first, second) == ("32", "96")
    for line in (one, two):
        assert line.startswith("cogview generate: the memory that ulimit allows (")
    assert len(list((tmp_path / "images").glob("*.png"))) == 1


# --- parts that do not belong together ------------------------------------------------------------------------------


def test_load_model_reports_weights_of_another_shape(folder):
    change_config(folder, transformer__max_positions=97)
    message = error_of(folder)
    assert message.startswith(f"{folder}/model.safetensors does not hold the weights that config.json describes: ")
    assert message.endswith("max_positions is 97, positions.weight has the shape [96, 32]")


@pytest.mark.parametrize(("part", "name"), [("model", "final_norm.bias"), ("image/model", "quantizer.codebook")])
@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_load_model_reports_missing_and_unexpected_weights(folder, part, name, change):
    path = folder / f"{part}.safetensors"
    weights = load_file(path)
    if change == "missing":
        del weights[name]
    else:
        name = "stranger"
        weights[name] = torch.zeros(1)
    save_file(weights, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    message = error_of(folder)
    assert message.startswith(f"{path} does not hold the weights that config.json describes: ")
    assert name in message


def test_load_model_reports_image_weights_of_another_shape(folder):
    path = folder / "image" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "num_codes": 4096}), encoding="utf-8")
    message = error_of(folder)
    assert message.startswith(f"{folder}/image/model.safetensors does not hold the weights that config.json describes")
    assert "quantizer.codebook" in message


def test_load_model_refuses_the_codebook_of_another_model(folder, model):
    """Its shapes fit, but every code would mean something else."""
    other = load_image_tokenizer(folder / "image")
    other.quantizer.codebook.mul_(-1)
    save_image_tokenizer(folder / "image", other)
    found, expected = codebook_hash(other)[:12], model.config.codebook_sha256[:12]
    assert error_of(folder) == (
        f"the image tokenizer in {folder}/image has another codebook ({found}…) than the transformer was trained with "
        f"({expected}…); restore the folder's own"
    )


def test_load_model_refuses_a_text_model_of_another_size(folder, model):
    (folder / "text.model").write_bytes(train_text_tokenizer(CAPTIONS, size=290, max_piece_length=1))
    expected = model.config.vocabulary.num_text_pieces
    message = error_of(folder)
    assert message.startswith(f"{folder}/text.model has ")
    assert message.endswith(f" pieces, the config says {expected}; restore the folder's own")


def test_load_model_refuses_a_text_model_with_two_pieces_swapped(folder, model):
    """It has as many pieces as before, and was accepted: 红 meant 蓝 from then on."""
    content = model.text_tokenizer.model_bytes
    red, blue, between = (character.encode() for character in "红蓝囗")
    assert red in content
    assert blue in content
    swapped = content.replace(red, between).replace(blue, red).replace(between, blue)
    (folder / "text.model").write_bytes(swapped)
    found, expected = (sha256(each).hexdigest()[:12] for each in (swapped, content))
    assert TextTokenizer.load(folder / "text.model").size == model.text_tokenizer.size
    assert error_of(folder) == (
        f"{folder}/text.model is another text tokenizer ({found}…) than the transformer was trained with "
        f"({expected}…); restore the folder's own"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": ["generate", "dance"]},
            "task 'dance' is unknown; known: generate, caption, upscale, low_level, edit, fill, score",
        ),
        ({"grid": 9}, "the task 'upscale' needs a multiple of 4 codes on a side, since it divides images into parts"),
        ({"transformer__vocabulary_size": 128}, "rows, the transformer 128"),
        ({"transformer__num_heads": 5}, "transformer: width 32 does not divide into 5 heads"),
        ({"sampling__top_p": 2.0}, r"top_p must be in (0, 1], got 2.0"),
        ({"grit": 8}, '"grit" is unknown; did you mean "grid"?'),
    ],
)
def test_load_model_reports_an_invalid_config(folder, changes, message):
    change_config(folder, **changes)
    error = error_of(folder)
    assert error.startswith(f"{folder}/config.json")
    assert message in error


def test_load_model_asks_for_an_update_when_the_format_is_newer(folder):
    """The version is checked before settings that this version cannot know."""
    change_config(folder, format_version=FORMAT_VERSION + 1, holograms=True)
    assert error_of(folder) == (
        f"{folder}/config.json has format version {FORMAT_VERSION + 1}, this version reads up to {FORMAT_VERSION}; "
        "update cogview"
    )


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": "1"}'])
def test_load_model_reports_json_without_a_format_version(folder, content):
    (folder / "config.json").write_text(content, encoding="utf-8")
    assert error_of(folder) == f"{folder}/config.json is no config of a checkpoint: it has no format_version"


# --- checksums ------------------------------------------------------------------------------------------------------


def test_verify_files_compares_checksums(folder):
    sums = [(name, file_sha256(folder / name)) for name in ("text.model", "config.json")]
    verify_files(folder, sums)
    with pytest.raises(InputError, match="is incomplete: other is missing"):
        verify_files(folder, [*sums, ("other", "0" * 64)])
    change_config(folder, max_text=19)
    with pytest.raises(InputError) as caught:
        verify_files(folder, sums)
    found = file_sha256(folder / "config.json")
    assert str(caught.value) == (
        f"{folder}/config.json is damaged or was changed: its SHA-256 is {found[:12]}…, expected {sums[1][1][:12]}…; "
        "install cogview again"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image/config.json", "[1]", r"image/config.json must be settings with names, got \[1\]"),
        ("things.json", "[1]", "things.json must be settings with names, got 1"),
        ("things.json", '{"狐狸": 1}', "things.json must be a list of things"),
    ],
)
def test_open_refuses_json_of_another_form(tiny_checkpoint, tmp_path, name, content, message):
    """A list where settings are expected, and the reverse."""
    from cogview import CogView

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        CogView.from_pretrained(folder, device="cpu")


def test_load_model_reads_a_card_that_is_not_utf8(tiny_checkpoint, tmp_path):
    """A card in another encoding was a UnicodeDecodeError, though no weight depends on it."""
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_bytes("# gâteau".encode("latin-1"))
    assert load_model(tmp_path / "model", torch.device("cpu"), torch.float32).card == "# g\ufffdteau"
