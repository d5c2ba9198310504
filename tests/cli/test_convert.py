"""``cogview convert``: files of CogView v1 to a checkpoint folder and back."""

import shutil
import tarfile

import pytest
import torch
from safetensors.torch import load_file

from cogview.checkpoints.checkpoint import read_config
from cogview.checkpoints.registry import resolve_bundle, resolve_checkpoint
from cogview.cli.main import main

VOCABULARY_NOTE = (
    "note: 16 image codes and 77 text pieces, where CogView v1 has 8192 and 50000: use the tokenizers of the training"
)


@pytest.fixture
def files(small_release, tmp_path):
    """Write the files of the small model into ``tmp_path``."""
    return small_release.write(tmp_path, half=True)


@pytest.fixture
def run(files, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in ``tmp_path``: (status, lines of stdout, lines of stderr).

    Tokenizers are added unless ``whole`` says that the arguments are all there are.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COGVIEW_HOME", str(tmp_path / "home"))
    tokenizers = ["--image-tokenizer", str(files["image_tokenizer"]), "--text-model", str(files["text_model"])]

    def run(*arguments, whole=False):
        status = main(["convert", *arguments, *([] if whole else tokenizers)])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_convert_converts_a_v1_checkpoint(run, files, tmp_path):
    status, out, err = run("transformer", "-o", "ours", "--heads", "4", "--verify")
    assert (status, out) == (0, ["ours"])
    unverified = (
        f"{files['text_model']} carries no checksums, so damage that happened before the conversion does not show",
        *(
            f"no published checksum is known for {name}"
            for name in ("transformer", files["image_tokenizer"].name, files["text_model"].name)
        ),
    )
    assert err == [
        "note: neither the weights nor the name transformer imply the tasks of training, so all tasks are "
        "allowed; --tasks restricts them",
        VOCABULARY_NOTE,
        "2 layers, width 64, 4 heads, 178,496 parameters; tasks: generate, caption, upscale, low_level",
        "verified: every tensor equals its source",
        *(f"not verified: {fact}" for fact in unverified),
    ]
    assert read_config(tmp_path / "ours").transformer.num_heads == 4


def test_convert_converts_to_v1_and_back(run, files, tmp_path):
    run("transformer", "-o", "ours", "--heads", "4", "--tasks", "generate,caption")
    assert run("ours", "--to", "released", "--shards", "2", "-o", "back", "--verify", whole=True)[:2] == (0, ["back"])
    image, text = "back/vqvae_hard_biggerset_011.pt", "back/cog-pretrain.model"
    again = ("back", "--image-tokenizer", image, "--text-model", text, "--tasks", "generate,caption", "-o", "again")
    assert run(*again, "--heads", "4", whole=True)[:2] == (0, ["again"])
    for name in ("config.json", "model.safetensors", "text.model", "image/model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert read_config(tmp_path / "ours").tasks == ("generate", "caption")


def test_convert_converts_to_another_dtype(run, tmp_path):
    run("transformer", "-o", "ours", "--tasks", "generate")
    status, out, err = run("ours", "--dtype", "int8", "-o", "int8", whole=True)
    assert (status, out, err) == (0, ["int8"], [])
    status, out, err = run("transformer", "--dtype", "int8", "--tasks", "generate", "-o", "at once")
    assert (status, out) == (0, ["at once"])
    assert err == [
        VOCABULARY_NOTE,
        "2 layers, width 64, 1 heads of 64 (set by --heads), 178,496 parameters; tasks: generate",
    ]
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("int8", "at once"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_convert_writes_a_published_model_into_the_cache(run, files, tmp_path):
    """Its name also implies the tasks."""
    with tarfile.open(tmp_path / "cogview-base.tar", "w") as archive:
        archive.add(files["source"], arcname="cogview-base")
    shutil.copytree(files["source"], tmp_path / "unpacked" / "cogview-sr")
    for source, name, tasks in (
        ("cogview-base.tar", "cogview-base", ("generate",)),
        ("unpacked/cogview-sr", "cogview-sr", ("upscale", "low_level")),
    ):
        status, out, err = run(source)
        assert (status, out) == (0, [str(tmp_path / "home" / "models" / name)])
        assert err[0] == VOCABULARY_NOTE
        assert len(err) == 2
        assert resolve_checkpoint(name) == tmp_path / "home" / "models" / name
        assert read_config(resolve_checkpoint(name)).tasks == tasks
    assert list(resolve_bundle("cogview-released")) == ["generate", "upscale", "low_level"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "-o", "x"], "none does not exist: expected a checkpoint of CogView v1 or a checkpoint folder"),
        (
            ["transformer", "-o", "x", "--dtype", "float8"],
            "invalid value for '--dtype': 'float8' is not one of 'float32', 'bfloat16', 'float16', 'int8', 'int4'",
        ),
        (["transformer"], "transformer is not a published name: give the new folder by -o FOLDER"),
        (["transformer", "-o", "vqvae.pt"], "vqvae.pt is there already: remove it, or choose another folder with -o"),
        (["transformer", "-o", "x", "--heads", "5"], "transformer: width 64 does not divide into 5 heads"),
        (["transformer", "-o", "x", "--tasks", "paint"], "transformer: task 'paint' is unknown; known: generate, "),
        (
            ["transformer", "-o", "x", "--to", "released"],
            "--to released converts a checkpoint folder, and transformer is not one",
        ),
    ],
)
def test_convert_reports_mistakes_with_a_v1_checkpoint_in_one_line(run, tmp_path, arguments, message):
    before = sorted(tmp_path.iterdir())
    status, out, err = run(*arguments)
    assert (status, out) == (2, [])
    notes = [line for line in err if line.startswith("note: ")]
    assert len(err) == 1 + len(notes)
    assert err[-1].startswith(f"cogview convert: {message}")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(["--text-model", "text.model"], "--image-tokenizer"), (["--image-tokenizer", "vqvae.pt"], "--text-model")],
)
def test_convert_requires_the_tokenizers(run, arguments, option):
    assert run("transformer", "-o", "x", *arguments, whole=True) == (
        2,
        [],
        [f"cogview convert: a checkpoint of CogView v1 holds no tokenizers: give {option} FILE"],
    )


def test_convert_reports_mistakes_with_a_folder_in_one_line(run, tiny_checkpoint, tmp_path):
    folder = str(tiny_checkpoint)
    for arguments, message in [
        (["-o", "x"], f"{folder} is a checkpoint folder already: give --dtype or --to v1"),
        (["--dtype", "int8"], f"{tiny_checkpoint.name} is not a published name: give the new folder by -o FOLDER"),
        (
            ["--to", "released", "--dtype", "float16", "-o", "x"],
            "--to released keeps the dtype of the folder: convert it with --dtype first",
        ),
        (["--to", "released", "--shards", "3", "-o", "x"], "2 heads do not divide into 3 shards"),
        (
            ["--to", "released", "-o", "x"],
            f"{folder} cannot be written in the layout of CogView v1: CogView v1 has no ",
        ),
    ]:
        status, out, err = run(folder, *arguments, whole=True)
        assert (status, out, len(err)) == (2, [], 1)
        assert err[0].startswith(f"cogview convert: {message}")
        assert not (tmp_path / "x").exists()


def test_convert_help_lists_every_option(capsys):
    assert main(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    assert [option for option in ("--image-tokenizer", "--to", "--verify", "--shards") if option not in out] == []
