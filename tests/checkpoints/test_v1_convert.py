"""Conversion of v1 files to a folder and back, bit for bit, with one line for whatever is wrong with a file."""

import dataclasses
import errno
import io
import os
import random
import resource
import shutil
import tarfile
from argparse import Namespace
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview.checkpoints import v1_convert as conversion
from cogview.checkpoints import v1_format as released
from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.checkpoints.pickles import StoredTensor, write_pickle
from cogview.checkpoints.precision import Precision
from cogview.checkpoints.safetensors_io import WeightsWriter
from cogview.checkpoints.v1_convert import ALL_TASKS, convert_folder, export_v1, import_v1, tasks_by_name
from cogview.checkpoints.v1_format import V1Transformer, v1_name
from cogview.errors import InputError
from cogview.modeling.config import preset
from cogview.modeling.quantization import dequantize_weight, is_quantized, quantize_weight
from cogview.modeling.transformer import Transformer
from cogview.pipeline.cogview import CogView
from cogview.vqvae.quantizer import RENAMED_AVERAGES
from tests.v1_release import transformer_shapes

TRACKER = "latest_checkpointed_iteration.txt"
INT8, INT4 = Precision(quantization="int8"), Precision(quantization="int4")
WEIGHTS = ("model.safetensors", "image/model.safetensors")


def convert(files, output, **settings):
    """Run ``import_v1`` with common settings and return the folder."""
    settings = {"tasks": ALL_TASKS, "precision": Precision(), "num_heads": 4} | settings
    import_v1(**files, output=output, **settings)
    return output


@pytest.fixture(scope="session")
def files(small_release, tmp_path_factory):
    """The files of the small model in float32, one shard. Tests share them."""
    return small_release.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def folder(files, tmp_path_factory):
    """The checkpoint folder of ``files``. Tests share it."""
    return convert(files, tmp_path_factory.mktemp("small") / "ours")


@pytest.fixture(scope="session")
def half_folder(small_release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    return convert(small_release.write(folder, half=True), folder / "ours")


def states(folder):
    """Return the tensors of each file of an exported v1 checkpoint, as PyTorch reads them."""
    paths = sorted(folder.rglob("*.pt"))
    contents = {path.name: torch.load(path, weights_only=True) for path in paths}
    return {name: content.get("module", content) for name, content in contents.items()}


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(got, expected):
    """Assert equal names, dtypes, shapes and bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def error_of(call, folder):
    """Return the one-line message of ``call``, which must fail and leave ``folder`` unchanged."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError) as caught:
        call()
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- import and export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("shards", "shards_back"), [(1, 1), (2, 2), (2, 1)])
def test_export_v1_restores_the_imported_files(small_release, tmp_path, half, shards, shards_back):
    files = small_release.write(tmp_path / "released", half=half, shards=shards)
    export_v1(convert(files, tmp_path / "ours", verify=True), tmp_path / "back", shards=shards_back, verify=True)

    same = small_release.write(tmp_path / "expected", half=half, shards=shards_back)
    expected = states(same["source"])
    assert len(expected) == shards_back
    expected["vqvae_hard_biggerset_011.pt"] = torch.load(same["image_tokenizer"], weights_only=True)
    got = states(tmp_path / "back")
    assert got.keys() == expected.keys()
    for name, state in expected.items():
        assert_equal(got[name], state)
    assert {"quantize_t.cluster_size", "quantize_t.embed_avg"} <= got["vqvae_hard_biggerset_011.pt"].keys()
    assert (tmp_path / "back" / "cog-pretrain.model").read_bytes() == small_release.text_model
    assert (tmp_path / "back" / TRACKER).read_text() == "1"


def test_export_v1_stores_each_tensor_once(folder, tmp_path):
    """A mapped file is one block of memory, which must not be pickled with each tensor in it."""
    export_v1(folder, tmp_path / "back")
    size = sum(tensor.numel() for tensor in weights_of(folder).values()) * 4
    assert (tmp_path / "back" / "1" / "mp_rank_00_model_states.pt").stat().st_size < 1.1 * size + 20_000


def test_export_v1_fills_missing_averages(folder, tmp_path):
    """A tokenizer trained here has no averages: every code counts as chosen once."""
    ours = shutil.copytree(folder, tmp_path / "ours")
    image = load_file(ours / "image" / "model.safetensors")
    del image["quantizer.ema_cluster_size"], image["quantizer.ema_sum"]
    save_file(image, ours / "image" / "model.safetensors")
    export_v1(ours, tmp_path / "back", verify=True)
    state = states(tmp_path / "back")["vqvae_hard_biggerset_011.pt"]
    assert state["quantize_t.cluster_size"].tolist() == [1.0] * 16
    assert torch.equal(state["quantize_t.embed_avg"], state["quantize_t.embed"])


def test_export_v1_reads_former_names_of_the_averages(folder, tmp_path):
    """A folder that an earlier version converted opens with its averages and can be exported."""
    former = shutil.copytree(folder, tmp_path / "former")
    path = former / "image" / "model.safetensors"
    image = load_file(path)
    for old, name in RENAMED_AVERAGES.items():
        image[f"quantizer.{old}"] = image.pop(f"quantizer.{name}")
    save_file(image, path)
    now, then = (load_image_tokenizer(each / "image").quantizer for each in (folder, former))
    assert now.ema_sum.any()
    for name in RENAMED_AVERAGES.values():
        assert torch.equal(now.get_buffer(name), then.get_buffer(name)), name
    for source in (folder, former):
        export_v1(source, tmp_path / f"back-{source.name}", verify=True)
    exported = [states(tmp_path / f"back-{source.name}")["vqvae_hard_biggerset_011.pt"] for source in (folder, former)]
    assert_equal(*exported)


def test_import_v1_accepts_folders_archives_and_files(small_release, files, folder, tmp_path):
    """A folder, a tar of it under any name and a single file are the same model, in layouts of old PyTorch as well."""
    sources = {"file": files["source"] / "50000" / "mp_rank_00_model_states.pt"}
    for name in ("cogview-x", ".", "some/where"):
        sources[name] = tmp_path / f"{len(sources)}.tar"
        with tarfile.open(sources[name], "w") as archive:
            archive.add(files["source"], arcname=name)
    legacy = small_release.write(tmp_path / "legacy", legacy=True)
    with tarfile.open(tmp_path / "legacy.tar", "w") as archive:
        archive.add(legacy["source"], arcname="legacy")
    sources |= {"legacy": legacy["source"], "legacy tar": tmp_path / "legacy.tar"}
    no_tracker = shutil.copytree(files["source"], tmp_path / "no tracker")
    (no_tracker / TRACKER).unlink()
    sources["no tracker"] = no_tracker

    for number, (name, source) in enumerate(sources.items()):
        image = {"image_tokenizer": legacy["image_tokenizer"]} if name.startswith("legacy") else {}
        other = convert({**files, **image, "source": source}, tmp_path / f"ours{number}")
        for file in (*WEIGHTS, "config.json", "image/config.json", "text.model"):
            assert (other / file).read_bytes() == (folder / file).read_bytes(), (name, file)


def test_import_v1_writes_the_config(folder):
    config = read_config(folder)
    shape = config.transformer
    assert (shape.num_layers, shape.width, shape.num_heads, shape.max_positions) == (2, 64, 4, 1089)
    assert (config.vocabulary.num_image_codes, config.vocabulary.num_text_pieces) == (16, 77)
    assert (config.grid, config.tasks, config.caption_stop, config.max_caption) == (32, ALL_TASKS, False, 20)
    assert config.max_text == 1089 - 1024 - 4  # beside the codes and four commands
    assert config.caption_dropout == 0


def test_import_v1_reads_heads_from_settings_and_skips_random_states(small_release, folder, tmp_path):
    """Settings give the number of heads when the caller does not; states of random generators are skipped."""
    extra = {
        "args": Namespace(num_attention_heads=8, fp16=True, dtype=torch.float16, save=None, device="cuda"),
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "optimizer": {"loss_scale": np.float64(2.0**16), "names": {"a", "b"}},
    }
    files = small_release.write(tmp_path, extra=extra)
    configured = convert(files, tmp_path / "configured", num_heads=None)
    assert read_config(configured).transformer.num_heads == 8
    assert read_config(convert(files, tmp_path / "ours")).transformer.num_heads == 4
    assert (configured / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_import_v1_assumes_heads_of_width_64(files, tmp_path):
    assert read_config(convert(files, tmp_path / "ours", num_heads=None)).transformer.num_heads == 1


@pytest.mark.parametrize("shards", [2, 4])
def test_import_v1_drops_padding_rows_of_shards(small_release, folder, tmp_path, shards):
    rows = small_release.transformer["word_embeddings.weight"]
    filled = torch.cat([rows, torch.ones(128 * shards - len(rows), 64)])
    release = dataclasses.replace(
        small_release, transformer={**small_release.transformer, "word_embeddings.weight": filled}
    )
    other = convert(release.write(tmp_path, shards=shards), tmp_path / "ours", verify=True)
    assert read_config(other) == read_config(folder)
    assert (other / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("path", "tasks"),
    [
        ("cogview-base.tar", ("generate",)),
        ("files/cogview-caption", ("caption",)),
        ("cogview-sr/1/mp_rank_00_model_states.pt", ("upscale", "low_level")),
        ("cogview-basement.tar", None),
        ("model.tar", None),
    ],
)
def test_tasks_by_name_knows_the_published_names(tmp_path, path, tasks):
    assert tasks_by_name(tmp_path / path) == tasks


# --- the full size --------------------------------------------------------------------------------------------------


def test_v1_transformer_reads_the_shapes_of_four_billion_parameters(tmp_path, monkeypatch):
    """Names and shapes are those of the release, and are known without reading a tensor."""
    shapes = transformer_shapes(num_layers=48, width=2560, num_rows=58_240)
    with torch.device("meta"):
        ours = Transformer(preset("4b", 58_240)).state_dict()
    assert {v1_name(name): tuple(tensor.shape) for name, tensor in ours.items()} == shapes
    assert len(shapes) == len(ours)

    one = torch.zeros(1, dtype=torch.half)  # the file of all of them holds two bytes
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {name: one.expand(shape) for name, shape in shapes.items()}}, path)
    assert path.stat().st_size < 1e6
    monkeypatch.delattr(StoredTensor, "read")
    monkeypatch.setattr(StoredTensor, "check_bounds", lambda tensor: None)  # refuses two bytes for 8 GB
    with V1Transformer(path) as transformer:
        assert transformer.config == preset("4b", 58_240)
        assert (transformer.config.num_heads, transformer.config.num_parameters) == (40, 3_928_849_920)
        assert sum(spec.num_bytes for spec in transformer.specs.values()) == 2 * 3_928_849_920
        assert {name: spec.shape for name, spec in transformer.specs.items()} == {
            name: tuple(tensor.shape) for name, tensor in ours.items()
        }


# --- precision ------------------------------------------------------------------------------------------------------


def converted(weights, precision):
    """Convert each tensor on its own."""
    result = {}
    for name, tensor in weights.items():
        if precision.quantization is not None and is_quantized(name):
            result |= quantize_weight(name, tensor, precision.quantization)
        else:
            result[name] = tensor.to(precision.dtype or tensor.dtype)
    return result


@pytest.mark.parametrize("source", ["folder", "half_folder"])
@pytest.mark.parametrize(
    "precision",
    [Precision(torch.float32), Precision(torch.bfloat16), Precision(torch.float16), INT8, INT4],
    ids=str,
)
def test_convert_folder_and_import_v1_convert_each_tensor(request, source, precision, small_release, tmp_path):
    """Each tensor is converted as if it were alone, from v1 files and from a folder."""
    ours = request.getfixturevalue(source)
    expected = converted(weights_of(ours), precision)
    files = small_release.write(tmp_path / "released", half=source == "half_folder", shards=2)
    assert_equal(weights_of(convert(files, tmp_path / "a", precision=precision, verify=True)), expected)
    convert_folder(ours, tmp_path / "b", precision=precision, verify=True)
    assert_equal(weights_of(tmp_path / "b"), expected)
    others = [path.relative_to(ours) for path in ours.rglob("*") if path.is_file()]
    for path in others:
        assert path.name == "model.safetensors" or (ours / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    assert len(others) == len([path for path in (tmp_path / "b").rglob("*") if path.is_file()]) == 6


@pytest.mark.parametrize("precision", [INT8, INT4], ids=str)
def test_convert_folder_dequantizes(folder, tmp_path, precision):
    """A quantized folder opens as it is, and converts back to the dequantized weights."""
    convert_folder(folder, tmp_path / "rounded", precision=precision)
    convert_folder(tmp_path / "rounded", tmp_path / "restored", precision=Precision(torch.float32))
    weights, few_bits = weights_of(folder), precision.quantization
    for name in filter(is_quantized, weights):
        weights[name] = dequantize_weight(*quantize_weight(name, weights[name], few_bits).values(), few_bits)
    assert_equal(weights_of(tmp_path / "restored"), weights)

    ids, logits = torch.arange(60)[None], []
    for name in ("rounded", "restored"):
        model = CogView.from_pretrained(tmp_path / name, device="cpu", dtype="float32")
        with torch.inference_mode():
            logits.append(model.transformer(ids))
    torch.testing.assert_close(logits[0], logits[1])


def test_export_v1_refuses_window_attention(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "sparse")
    path = source / "config.json"
    pattern = '{"pattern": "window", "window": 9, "pivots": 4}'
    path.write_text(path.read_text().replace('"transformer": {', f'"transformer": {{"attention": {pattern},', 1))
    assert error_of(lambda: export_v1(source, tmp_path / "back"), tmp_path) == (
        f"{source} has window attention, whose pivots CogView v1 samples anew in every layer: only a model with dense "
        "attention can be exported"
    )
    assert not (tmp_path / "back").exists()


def test_convert_folder_and_export_v1_refuse_quantized_weights(folder, tmp_path):
    convert_folder(folder, tmp_path / "int8", precision=INT8)
    for call, message in [
        (
            lambda: convert_folder(tmp_path / "int8", tmp_path / "x", precision=INT4),
            f"{tmp_path}/int8/model.safetensors: the weights are stored as int8, which cannot be turned into int4",
        ),
        (
            lambda: export_v1(tmp_path / "int8", tmp_path / "x"),
            f"{tmp_path / 'int8'} holds int8 weights, which CogView v1 cannot read: export the folder they came from",
        ),
    ]:
        assert error_of(call, tmp_path) == message


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "file"), [("final_norm.bias", "model.safetensors"), ("encoder.0.bias", "image")], ids=["ours", "image"]
)
def test_import_v1_verify_finds_a_changed_bit(files, tmp_path, monkeypatch, changed, file):
    change_a_bit(monkeypatch, changed)
    message = error_of(lambda: convert(files, tmp_path / "x", verify=True), tmp_path)
    assert message.endswith(f"{file} does not hold what was written: {changed} differs; is the disk sound?")
    convert(files, tmp_path / "x")  # without verify


def test_convert_folder_verify_finds_a_changed_bit(folder, tmp_path, monkeypatch):
    change_a_bit(monkeypatch, "layers.1.mlp.input.scale")
    message = error_of(lambda: convert_folder(folder, tmp_path / "x", precision=INT8, verify=True), tmp_path)
    assert "layers.1.mlp.input.scale differs" in message


def change_a_bit(monkeypatch, changed):
    """Make writing change a bit of the tensor ``changed``."""
    write = WeightsWriter.write

    def write_badly(writer, name, tensor):
        if name == changed:
            tensor = tensor.clone()
            tensor.view(torch.uint8)[0] ^= 1
        write(writer, name, tensor)

    monkeypatch.setattr(WeightsWriter, "write", write_badly)


def test_convert_folder_verify_finds_a_bad_copy(folder, tmp_path, monkeypatch):
    copy = shutil.copyfile

    def copy_badly(source, target):
        copy(source, target)
        if target.name == "text.model":
            target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copyfile", copy_badly)
    message = error_of(lambda: convert_folder(folder, tmp_path / "x", precision=INT8, verify=True), tmp_path)
    assert message == f"{tmp_path / 'x'} does not hold what was written: text.model differs; is the disk sound?"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("transformer.final_layernorm.bias", "final_norm.bias"), ("dec.blocks.6.bias", "decoder.6.bias")],
)
def test_export_v1_verify_finds_a_changed_bit(folder, tmp_path, monkeypatch, theirs, ours):
    def write_badly(content, path):
        for state in (content, content.get("module", {})):
            if theirs in state:
                state[theirs] = state[theirs].clone()
                state[theirs].view(torch.uint8)[0] ^= 1
        write_pickle(content, path)

    for module in (conversion, released):
        monkeypatch.setattr(module, "write_pickle", write_badly)
    message = error_of(lambda: export_v1(folder, tmp_path / "x", shards=2, verify=True), tmp_path)
    assert message == f"{tmp_path / 'x'} does not hold what was written: {ours} differs; is the disk sound?"


def test_verify_accepts_negative_zero(small_release, tmp_path):
    bias = torch.tensor([-0.0, 1.0] + [0.0] * 62)
    release = dataclasses.replace(
        small_release, transformer={**small_release.transformer, "transformer.final_layernorm.bias": bias}
    )
    ours = convert(release.write(tmp_path), tmp_path / "ours", verify=True)
    export_v1(ours, tmp_path / "back", verify=True)
    got = states(tmp_path / "back")["mp_rank_00_model_states.pt"]["transformer.final_layernorm.bias"]
    assert_equal({"bias": got.view(torch.int32)}, {"bias": bias.view(torch.int32)})


@pytest.mark.parametrize(
    ("part", "name", "ours"),
    [
        ("transformer", "transformer.final_layernorm.bias", "final_norm.bias"),
        ("image_tokenizer", "quantize_t.embed", "quantize_t.embed"),
    ],
)
def test_import_v1_refuses_weights_that_are_not_finite(small_release, tmp_path, part, name, ours):
    """A disk error or a diverged training left NaN, and the converted model drew noise without a word."""
    tensors = getattr(small_release, part)
    damaged = tensors[name].clone()
    damaged.view(-1)[1:3] = torch.tensor([torch.nan, torch.inf])
    files = dataclasses.replace(small_release, **{part: {**tensors, name: damaged}}).write(tmp_path)
    source = files["source" if part == "transformer" else part]
    message = error_of(lambda: convert(files, tmp_path / "ours"), tmp_path)
    expected = (
        f"{source}: {ours} has 2 of {damaged.numel():,} numbers that are NaN or infinite: the file is damaged, or "
    )
    assert message == f"{expected}its training diverged; restore it, or take an earlier checkpoint"


@pytest.mark.parametrize("file", WEIGHTS)
def test_export_v1_refuses_weights_that_are_not_finite(folder, tmp_path, file):
    ours = shutil.copytree(folder, tmp_path / "ours")
    tensors = load_file(ours / file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, ours / file)
    with pytest.raises(InputError, match=f"^{ours / file}: {name} has 1 of "):
        export_v1(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- damaged and mixed files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "content", "words"),
    [
        (
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "8"},
            b"damaged",
            "is no tar archive",
        ),
        ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 40}, b"1\n0\n8\n", "holes"),
        ({"GNU.sparse.map": "0,8,999999999999,8", "GNU.sparse.size": "9" * 14}, b"x" * 16, "members with holes"),
        ({"GNU.sparse.map": "0,x"}, b"x" * 16, "is no tar archive"),
        ({"size": "-5"}, b"x" * 16, "is no tar archive"),
        ({"size": "9" * 14}, b"x" * 16, "is no tar archive"),
    ],
)
def test_import_v1_refuses_archives_with_holes(files, tmp_path, headers, content, words):
    """Such a header was a traceback, or a member of terabytes."""
    archive = tmp_path / "cogview-base.tar"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("model/50000/mp_rank_00_model_states.pt")
        member.size, member.pax_headers = len(content), headers
        tar.addfile(member, io.BytesIO(content))
    message = error_of(lambda: convert({**files, "source": archive}, tmp_path / "ours"), tmp_path)
    assert words in message


def test_import_v1_refuses_archives_with_a_negative_size(files, tmp_path):
    """The header behind such a member is the one before it, and the archive was read for ever."""
    member = tarfile.TarInfo("model/50000/mp_rank_00_model_states.pt")
    member.size = -512
    archive = tmp_path / "cogview-base.tar"
    archive.write_bytes(tarfile.TarInfo("a").tobuf() + member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    message = error_of(lambda: convert({**files, "source": archive}, tmp_path / "ours"), tmp_path)
    assert "is no tar archive, or is cut short (a member has a negative size)" in message


@pytest.mark.parametrize("legacy", [False, True])
def test_import_v1_reports_truncated_files(small_release, tmp_path, legacy):
    """A download may break off in the archive, in a transformer or in an image tokenizer."""
    files = small_release.write(tmp_path, legacy=legacy, shards=2)
    archive = tmp_path / "whole.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(files["source"], arcname="model")
    shard = files["source"] / "50000" / "mp_rank_00_model_states.pt"
    for whole, role in ((archive, "source"), (shard, "source"), (files["image_tokenizer"], "image_tokenizer")):
        content, cut = whole.read_bytes(), tmp_path / f"cut{whole.suffix}"
        size = archive.stat().st_size - 10_240 if whole is archive else len(content)  # a tar ends in zeros
        for length in (0, 3, 100, 700, *(int(size * share) for share in (0.1, 0.5, 0.9, 0.999)), size - 1):
            cut.write_bytes(content[:length])
            message = error_of(lambda role=role, cut=cut: convert({**files, role: cut}, tmp_path / "ours"), tmp_path)
            assert str(cut) in message
        cut.unlink()


def test_import_v1_explains_a_truncated_file(small_release, tmp_path):
    files = small_release.write(tmp_path, shards=2)
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        tar.add(files["source"], arcname="model")
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "whole.tar").read_bytes()[:300_000])
    message = error_of(lambda: convert({**files, "source": cut}, tmp_path / "ours"), tmp_path)
    assert message == f"{cut} is no tar archive, or is cut short (unexpected end of data): download it again"
    image = files["image_tokenizer"]
    image.write_bytes(image.read_bytes()[:-9])
    message = error_of(lambda: convert(files, tmp_path / "ours"), tmp_path)
    assert message == f"{image}: the file is cut short: a zip archive without its end"
    image.write_bytes("no weights, but a page: 未找到".encode())
    message = error_of(lambda: convert(files, tmp_path / "ours"), tmp_path)
    assert message.startswith(f"{image} is no PyTorch file, or is cut short or damaged (")


@pytest.mark.parametrize("missing", [0, 2, 3])
def test_import_v1_names_the_missing_shard(small_release, tmp_path, missing):
    files = small_release.write(tmp_path, shards=4)
    (files["source"] / "50000" / f"mp_rank_{missing:02d}_model_states.pt").unlink()
    message = error_of(lambda: convert(files, tmp_path / "ours"), tmp_path)
    assert message.startswith(f"{files['source']} is incomplete: ")
    expected = "only mp_rank_00 to mp_rank_02" if missing == 3 else f"mp_rank_{missing:02d}_model_states.pt is missing"
    assert expected in message


def test_import_v1_refuses_shards_of_different_models(small_release, tmp_path):
    files = small_release.write(tmp_path, shards=2)
    first, second = sorted((files["source"] / "50000").iterdir())
    content = torch.load(second, weights_only=True)
    name = "transformer.final_layernorm.bias"

    content["module"][name] = torch.zeros(65)
    torch.save(content, second)
    message = error_of(lambda: convert(files, tmp_path / "ours"), tmp_path)
    assert message == f"{second} does not belong to {first}: {name} has the shape [65], there it is [64]"
    del content["module"][name]
    torch.save(content, second)
    message = error_of(lambda: convert(files, tmp_path / "ours"), tmp_path)
    assert message == f"{second} does not belong to {first}: only one of them has {name}"


def test_import_v1_refuses_a_tensor_of_another_shape(small_release, tmp_path):
    weights = {**small_release.transformer, "transformer.final_layernorm.bias": torch.zeros(7)}
    files = dataclasses.replace(small_release, transformer=weights).write(tmp_path)
    message = error_of(lambda: convert(files, tmp_path / "ours"), tmp_path)
    assert message.endswith(
        "holds no transformer of CogView: transformer.final_layernorm.bias has the shape [7], expected [64]"
    )


def test_import_v1_reports_files_in_the_wrong_argument(files, tmp_path):
    shard = files["source"] / "50000" / "mp_rank_00_model_states.pt"
    for given, message in [
        (
            {"source": files["image_tokenizer"]},
            f"{files['image_tokenizer']} is an image tokenizer; it belongs behind --image-tokenizer, ",
        ),
        (
            {"image_tokenizer": shard},
            f"{shard} is a transformer; expected an image tokenizer such as ",
        ),
        ({"text_model": shard}, f"{shard}: "),
        ({"text_model": tmp_path / "none"}, f"no text tokenizer at {tmp_path / 'none'}: expected a SentencePiece"),
        ({"image_tokenizer": tmp_path / "none"}, f"cannot read {tmp_path / 'none'}: No such file or directory"),
        (
            {"source": tmp_path / "none"},
            f"there is no CogView v1 checkpoint at {tmp_path / 'none'}: expected a folder, ",
        ),
        ({"source": files["text_model"]}, f"{files['text_model']} is no PyTorch file, or is cut short or damaged ("),
    ]:
        assert error_of(lambda given=given: convert({**files, **given}, tmp_path / "x"), tmp_path).startswith(message)


def test_import_v1_refuses_parts_of_different_models(small_release, tiny_checkpoint, files, tmp_path):
    image = {
        name: torch.cat([tensor] * 2, dim=-1) if name.startswith("quantize_t.") else tensor
        for name, tensor in small_release.image_tokenizer.items()
    }
    torch.save(image, tmp_path / "image.pt")
    pieces = read_config(tiny_checkpoint).vocabulary.num_text_pieces
    for given, (codes, size, rows) in (
        ({"image_tokenizer": tmp_path / "image.pt"}, (32, 77, 256)),
        ({"text_model": tiny_checkpoint / "text.model"}, (16, pieces, 384)),
    ):
        message = error_of(lambda given=given: convert({**files, **given}, tmp_path / "ours"), tmp_path)
        assert message == (
            f"{files['source']} has 128 word embeddings, but the {codes} codes of the image tokenizer, the {size} "
            f"pieces of the text model and 27 commands take {rows}: one of the two files belongs to another model"
        )


def test_import_v1_refuses_an_image_tokenizer_of_another_architecture(small_release, tmp_path):
    image = {name: tensor for name, tensor in small_release.image_tokenizer.items() if name != "dec.blocks.4.bias"}
    files = dataclasses.replace(small_release, image_tokenizer=image).write(tmp_path)
    message = error_of(lambda: convert(files, tmp_path / "ours"), tmp_path)
    assert message == f"{tmp_path / 'vqvae.pt'} is no image tokenizer of CogView: dec.blocks.4.bias is missing"


class Call:
    """An object that unpickles as a call."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("function", "asks_for"), [(os.system, "posix.system"), (exec, "__builtin__.exec")])
def test_import_v1_refuses_files_that_run_code(small_release, files, tmp_path, function, asks_for, legacy):
    proof = tmp_path / "proof"
    argument = f"touch '{proof}'" if function is os.system else f"open({str(proof)!r}, 'w').close()"
    shard = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(
        {"module": small_release.transformer, "args": Call(function, argument)},
        shard,
        _use_new_zipfile_serialization=not legacy,
    )
    image = tmp_path / "image.pt"
    torch.save(
        {"a": Call(function, argument), **small_release.image_tokenizer},
        image,
        _use_new_zipfile_serialization=not legacy,
    )
    for given in ({"source": shard}, {"image_tokenizer": image}):
        message = error_of(lambda given=given: convert({**files, **given}, tmp_path / "ours"), tmp_path)
        assert message == (
            f"{next(iter(given.values()))} asks for {asks_for}, which no checkpoint needs and which could run code: "
            "the file is refused"
        )
    assert not proof.exists()
    torch.load(image, weights_only=False)
    assert proof.exists()  # the file does run code


def test_import_v1_reports_invalid_tracker_files(files, tmp_path):
    source = shutil.copytree(files["source"], tmp_path / "model")
    given = {**files, "source": source}
    (source / TRACKER).write_text("<html>\n")
    message = error_of(lambda: convert(given, tmp_path / "ours"), tmp_path)
    assert message == f"{source}: {TRACKER} holds '<html>'; expected a number or release"
    (source / TRACKER).write_text("7")
    message = error_of(lambda: convert(given, tmp_path / "ours"), tmp_path)
    assert message == f"{source} is incomplete: 7/mp_rank_00_model_states.pt is missing"
    (tmp_path / "empty").mkdir()
    message = error_of(lambda: convert({**files, "source": tmp_path / "empty"}, tmp_path / "ours"), tmp_path)
    assert message.startswith(f"{tmp_path / 'empty'} is no CogView v1 checkpoint: expected {TRACKER} and mp_rank_00")


def test_import_v1_refuses_a_folder_of_several_checkpoints(files, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(files["source"], tmp_path / "models" / name)
    given = {**files, "source": tmp_path / "models"}
    message = error_of(lambda: convert(given, tmp_path / "ours"), tmp_path)
    assert message == (
        f"{tmp_path / 'models'} holds several checkpoints (a/{TRACKER}, b/{TRACKER}): give the folder of one of them"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 5}, "width 64 does not divide into 5 heads"),
        ({"num_heads": 0}, "num_heads must be in [1, 4096], got 0"),
        ({"tasks": ("paint",)}, "task 'paint' is unknown; known: "),
    ],
)
def test_import_v1_reports_invalid_settings(files, tmp_path, settings, message):
    got = error_of(lambda: convert(files, tmp_path / "ours", **settings), tmp_path)
    assert got.startswith(f"{files['source']}: {message}")


def test_import_v1_asks_for_the_heads_when_the_width_is_ambiguous(files, tmp_path):
    shapes = transformer_shapes(num_layers=1, width=48, num_rows=128)
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "narrow.pt")
    given = {**files, "source": tmp_path / "narrow.pt"}
    message = error_of(lambda: convert(given, tmp_path / "ours", num_heads=None), tmp_path)
    assert message.endswith("a width of 48 does not determine the number of heads: give --heads")


# --- what cannot be exported ----------------------------------------------------------------------------------------


def test_export_v1_reports_models_it_cannot_write(tiny_checkpoint, folder, tmp_path):
    message = error_of(lambda: export_v1(tiny_checkpoint, tmp_path / "x"), tmp_path)
    assert message == (
        f"{tiny_checkpoint} cannot be written in the layout of CogView v1: CogView v1 has no layers for an image "
        "tokenizer of the architecture 'residual'"
    )
    message = error_of(lambda: export_v1(folder, tmp_path / "x", shards=3), tmp_path)
    assert message == "4 heads do not divide into 3 shards"
    message = error_of(lambda: export_v1(tmp_path, tmp_path / "x"), tmp_path)
    assert message == f"{tmp_path} is no checkpoint folder: config.json is missing"


# --- the output folder ----------------------------------------------------------------------------------------------


def every_conversion(files, folder, output):
    """Return calls of the three functions that write a folder."""
    return [
        lambda: convert(files, output),
        lambda: convert_folder(folder, output, precision=INT8),
        lambda: export_v1(folder, output),
    ]


def test_conversions_refuse_an_existing_folder(files, folder, tmp_path):
    output = tmp_path / "ours"
    output.mkdir()
    (output / "notes.txt").write_text("重要")
    for call in every_conversion(files, folder, output):
        message = error_of(call, tmp_path)
        assert message == f"{output} is there already: remove it, or choose another folder with -o"
    assert (output / "notes.txt").read_text() == "重要"


def test_import_v1_removes_the_remains_of_a_killed_conversion(files, folder, tmp_path):
    (tmp_path / ".ours-writing").mkdir()
    (tmp_path / ".ours-writing" / "model.safetensors").write_bytes(b"half")
    convert(files, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(path.name for path in folder.iterdir())


def test_conversions_report_a_full_disk_before_writing(files, folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for call in every_conversion(files, folder, tmp_path / "ours")[:2]:
        message = error_of(call, tmp_path)
        assert message.startswith(f"there is no room for {tmp_path / 'ours'}: ")
        assert message.endswith(" GB are free there; nothing was written")


@contextmanager
def files_of_at_most(size):
    """Limit the size of files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize("size", [1000, 500_000, 800_000])  # before, in and behind the transformer
def test_conversions_report_a_disk_that_fills_up(files, folder, tmp_path, monkeypatch, size, claimed):
    """The space may be allocated in advance or not, which not every system can."""
    if not claimed:
        monkeypatch.delattr(os, "posix_fallocate")
    for call in every_conversion(files, folder, tmp_path / "ours"):

        def limited(call=call):
            with files_of_at_most(size):
                call()

        assert error_of(limited, tmp_path).startswith(f"there is no room for {tmp_path / 'ours'}: ")


def test_conversions_leave_nothing_when_interrupted(files, folder, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(WeightsWriter, "write", interrupt)
    monkeypatch.setattr(conversion, "write_pickle", interrupt)
    for call in every_conversion(files, folder, tmp_path / "ours"):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert list(tmp_path.iterdir()) == []
