"""``cogview info``: facts of a model, without its weights."""

import hashlib
import json
import shutil
import tarfile

import pytest

from cogview.checkpoints.precision import Precision
from cogview.checkpoints.registry import ModelEntry, converted_folder
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.checkpoints.v1_convert import convert_folder, import_v1
from cogview.cli.main import main


def facts_of(capsys, *arguments):
    """Run ``cogview info``; return the facts by name, and the lines below them."""
    assert main(["info", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(":", 1) for line in lines if not line.startswith(" "))
    return {key: value.strip() for key, value in facts.items()}, [line.strip() for line in lines if line[0] == " "]


def test_info_describes_a_checkpoint_folder(tiny_checkpoint, capsys):
    facts, lines = facts_of(capsys, tiny_checkpoint)
    assert facts["tasks"] == "generate, caption, upscale, low_level"
    assert facts["commands"] == (
        "cogview generate, cogview complete, cogview caption, cogview rerank, cogview upscale, "
        "cogview upscale --low-level"
    )
    assert facts["images"] == "64 x 64 pixels from 8 x 8 codes"
    assert facts["maximum prompt"] == "20 pieces"
    assert facts["sampling"] == "temperature 0.9, top-k 100, top-p off, min-p off, guidance off, text attention off"
    assert facts["guidance"] == "possible: trained with 10% caption dropout"
    assert facts["things"].startswith("4, listed by: ")
    assert "8192 image codes" in facts["vocabulary"]
    assert facts["weights"] == "float32"
    assert [line.split()[0] for line in lines] == [
        "README.md",
        "config.json",
        "image/config.json",
        "image/model.safetensors",
        "model.safetensors",
        "text.model",
        "things.json",
    ]


def test_info_describes_the_folder_of_an_image_tokenizer(tiny_checkpoint, tiny_model, capsys):
    """Such a folder was refused as a model without a version."""
    facts, lines = facts_of(capsys, tiny_checkpoint / "image")
    networks = tiny_model.image_tokenizer
    count = sum(parameter.numel() for parameter in networks.parameters())
    assert facts["kind"] == "image tokenizer"
    assert facts["codes"] == "8192, each 4 numbers wide"
    assert facts["pixels"] == "8 x 8 per code"
    assert facts["networks"] == f"residual, channels 8, 8, 16, {count:,} parameters"
    assert [line.split()[0] for line in lines] == ["config.json", "model.safetensors"]


def test_info_describes_a_model_of_one_task(generation_checkpoint, capsys):
    facts, _ = facts_of(capsys, generation_checkpoint)
    assert facts["tasks"] == "generate"
    assert facts["commands"] == "cogview generate, cogview complete"
    assert facts["guidance"] == "not possible: trained without caption dropout"


def test_info_counts_the_parameters(tiny_checkpoint, tiny_model, capsys):
    main(["info", str(tiny_checkpoint)])
    count = sum(parameter.numel() for parameter in tiny_model.transformer.parameters())
    assert f"2 layers, width 32, 2 heads, {count:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("few_bits", "words"),
    [
        ("int8", "int8, with scales in bfloat16; the rest float32"),
        ("int4", "int4, with scales in bfloat16; the rest float32"),
    ],
)
def test_info_describes_quantized_weights(tiny_checkpoint, tmp_path, few_bits, words, capsys):
    convert_folder(tiny_checkpoint, tmp_path / "rounded", precision=Precision(quantization=few_bits))
    assert facts_of(capsys, tmp_path / "rounded")[0]["weights"] == words


def test_info_reads_no_weights(tiny_checkpoint, small_release, tmp_path, monkeypatch, capsys):
    def read(*_, **__):
        raise AssertionError("a tensor was read")

    files = small_release.write(tmp_path)
    monkeypatch.setattr(WeightsFile, "read", read)
    monkeypatch.setattr("cogview.checkpoints.pickles.StoredTensor.read", read)
    facts_of(capsys, tiny_checkpoint)
    facts_of(capsys, files["source"])


def test_info_hashes_prints_the_hash_of_every_file(tiny_checkpoint, small_release, tmp_path, capsys):
    _, lines = facts_of(capsys, tiny_checkpoint, "--hashes")
    for line in lines:
        sha256 = hashlib.sha256((tiny_checkpoint / line.split()[0]).read_bytes()).hexdigest()
        assert line.endswith(f", SHA-256 {sha256})")
    file = small_release.write(tmp_path)["text_model"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert facts_of(capsys, file, "--hashes")[0]["file"].endswith(f", SHA-256 {sha256})")


@pytest.mark.parametrize("shards", [1, 2])
def test_info_describes_a_v1_transformer(small_release, tmp_path, shards, capsys):
    source = small_release.write(tmp_path, half=True, shards=shards)["source"]
    facts, lines = facts_of(capsys, source)
    assert facts["tasks"] == "unknown: neither the weights nor the name imply them; cogview convert --tasks sets them"
    count = sum(tensor.numel() for tensor in small_release.transformer.values())
    heads = "1 heads, each 64 wide (assumed)"
    assert facts["transformer"] == f"2 layers, width 64, {heads}, {count:,} parameters"
    assert (facts["weights"], facts["vocabulary"], facts["positions"]) == ("float16", "128 ids", "1089")
    assert (facts["shards"], facts["iteration"]) == (str(shards), "50000")
    tokenizers = "--image-tokenizer vqvae_hard_biggerset_011.pt --text-model cog-pretrain.model"
    assert facts["to convert"] == f"cogview convert {source} {tokenizers} -o FOLDER"
    ranks = [f"50000/mp_rank_{rank:02d}_model_states.pt" for rank in range(shards)]
    assert [line.split()[0] for line in lines] == [*ranks, "latest_checkpointed_iteration.txt"]


def test_info_knows_a_v1_archive_by_its_name(small_release, tmp_path, capsys):
    source = small_release.write(tmp_path, half=True)["source"]
    path = tmp_path / "cogview-sr.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(source, "cogview-sr")
    facts, lines = facts_of(capsys, path)
    assert facts["tasks"] == "upscale, low_level, by its name"
    assert facts["to convert"].endswith(" --text-model cog-pretrain.model")  # the command names the default file
    assert (facts["file"].split(" (")[0], lines) == (str(path), [])


def test_info_describes_v1_tokenizers(small_release, tmp_path, capsys):
    files = small_release.write(tmp_path)
    facts, _ = facts_of(capsys, files["image_tokenizer"])
    assert facts["kind"] == "image tokenizer of CogView v1: --image-tokenizer of cogview convert"
    assert facts["codes"] == "16, each 4 numbers wide"
    count = sum(t.numel() for name, t in small_release.image_tokenizer.items() if "quantize" not in name)
    channels = len(small_release.image_tokenizer["enc_b.blocks.0.weight"])
    assert facts["networks"] == f"released, channels {channels}, {channels}, {channels}, {count:,} parameters"
    assert facts["weights"] == "float32"
    facts, _ = facts_of(capsys, files["text_model"])
    assert facts["kind"] == "text model (SentencePiece): --text-model of cogview convert"
    assert facts["pieces"] == "77"


def test_info_describes_the_journal_of_a_job(tmp_path, capsys):
    """What failed is listed with its reason; an error that has a result by now is not."""
    path = tmp_path / "job.ledger.jsonl"
    header = {"cogview_job": 2, "model": "cogview-emoji", "device": "cpu", "dtype": "float32", "seed": 7, "batch": 4}
    lines = [
        {"id": "line 1/0", "error": "image a.png does not exist"},
        {"id": "line 1/0", "task": "caption", "text": "狐狸"},
        {"id": "fox/0", "task": "generate", "path": "fox.png"},
        {"id": "line 3", "error": "the prompt is empty\x1b", "line": 3},
    ]
    path.write_text("\n".join(map(json.dumps, [header, *lines])), encoding="utf-8")
    facts, more = facts_of(capsys, path)
    assert facts == {
        "journal": str(path),
        "model": "cogview-emoji",
        "device": "cpu, float32",
        "seed": "7",
        "batch": "4",
        "results": "2: caption 1, generate 1",
        "failed": "1",
    }
    assert more == ["line 3: the prompt is empty\\x1b"]


def test_info_describes_a_bundle(small_release, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COGVIEW_HOME", str(tmp_path / "home"))
    files = small_release.write(tmp_path)
    import_v1(**files, output=converted_folder("cogview-sr"), tasks=["upscale"], precision=Precision())
    facts, lines = facts_of(capsys, "cogview-released")
    assert facts["tasks"] == "generate, caption, upscale, low_level"
    assert [facts["parts"], *lines] == [
        "cogview-base for generate; not on this machine: cogview download cogview-base",
        "cogview-caption for caption; not on this machine: cogview download cogview-caption",
        f"cogview-sr for upscale, low_level; {converted_folder('cogview-sr')}",
    ]
    assert facts_of(capsys, "cogview-sr")[0]["tasks"] == "upscale"


def test_info_things_lists_the_objects(tiny_checkpoint, capsys):
    assert main(["info", str(tiny_checkpoint), "--things"]) == 0
    assert capsys.readouterr().out == "🦊\t狐狸\n🐕\t狗\n🍎\t红苹果\t苹果\n🚗\t汽车\t轿车、小汽车\n"


def test_info_lists_the_known_models(tiny_checkpoint, monkeypatch, capsys):
    row = ModelEntry(embedded="models/tiny", about="draws foxes", licence="Apache-2.0", sha256={})
    monkeypatch.setattr("cogview.checkpoints.registry.load_registry", lambda: {"tiny": row})
    monkeypatch.setattr("cogview.checkpoints.registry.resolve_checkpoint", lambda name, revision: tiny_checkpoint)
    assert main(["info"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "tiny: draws foxes\n"
    assert printed.err == "cogview models shows which of them are on this machine\n"
    assert main(["info", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "draws foxes" in out
    assert "Apache-2.0" in out


def test_info_reports_mistakes_in_one_line(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COGVIEW_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "open-world")
    (folder / "things.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "狐狸.txt").write_text("一只狐狸")
    (tmp_path / "text.model").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    damaged = shutil.copytree(tiny_checkpoint, tmp_path / "damaged") / "model.safetensors"
    damaged.write_bytes(b"no weights")
    for arguments, message in [
        (["cogview-bse"], 'checkpoint "cogview-bse" is unknown; known: '),
        (["nope.png"], "there is no file nope.png; a path starts at the current folder, so it would be /"),
        ([f"{tmp_path}/nope.pt"], f"there is no file {tmp_path}/nope.pt\n"),
        ([""], "the name of the model is empty; known: "),
        (["cogview-base"], "cogview-base is known, but not on this machine: cogview download cogview-base, or, "),
        ([f"{tmp_path}/empty"], f"{tmp_path}/empty is no checkpoint folder: config.json is missing"),
        (
            [f"{tmp_path}/adapter"],
            f"{tmp_path}/adapter is an adapter, not a model; it is described by: cogview adapter info {tmp_path}/adap",
        ),
        ([f"{tmp_path}/狐狸.txt"], f"{tmp_path}/狐狸.txt is not a model: expected a name, a checkpoint folder, or a "),
        ([f"{tmp_path}/text.model"], f"{tmp_path}/text.model: 42 bytes that are no SentencePiece model"),
        ([f"{tmp_path}/weights.pt"], f"{tmp_path}/weights.pt is no PyTorch file, or is cut short or damaged"),
        ([str(damaged.parent)], f"{damaged} is damaged: "),
        ([str(folder), "--things"], f"{folder} has no things.json: "),
        (["--things"], "--things needs a model: cogview info MODEL --things"),
        (["--hashes"], "--hashes needs a model: cogview info MODEL --hashes"),
        (["cogview-released", "--hashes"], "cogview-released stands for several models: name one of cogview-base, "),
    ]:
        assert main(["info", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"cogview info: {message}")
        assert err.count("\n") == 1


def test_info_help_lists_every_option(capsys):
    assert main(["info", "--help"]) == 0
    assert "--things" in capsys.readouterr().out
