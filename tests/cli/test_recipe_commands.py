"""The commands of a recipe: from a world to a packaged model that draws, and what they say to mistakes."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from cogview.checkpoints.checkpoint import read_config
from cogview.cli import evaluate, package, run
from cogview.cli.main import main
from cogview.config_io import to_mapping
from cogview.data.store import TokenStore
from cogview.data.store_writer import StoreWriter
from cogview.diagnostics import machine
from cogview.diagnostics import recipe as recipe_checks
from cogview.emoji.evaluation import reports, scenes
from cogview.errors import InputError
from cogview.modeling import config
from cogview.pipeline.cogview import CogView
from cogview.training import memory_plan, setup
from cogview.training.distributed import DistributedContext
from cogview.training.plots import save_run_plots
from cogview.training.run_folder import RunFolder, step_of
from cogview.training.trainer import TransformerTrainer

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A transformer, a tuning grid and numbers of a size for tests."""
    monkeypatch.setitem(config.PRESETS, "tiny", (1, 32, 2))
    monkeypatch.setattr(reports, "TUNED_TEMPERATURES", (0.1, 0.9))
    monkeypatch.setattr(reports, "TUNED_TOP_K", (5,))
    monkeypatch.setattr(scenes, "TOKENIZER_IMAGES", 8)


def sections(folder: Path) -> dict:
    return {
        "work": str(folder / "work"),
        "scenes": {"things": 6, "canvas": 64},
        "text": {"captions": 300, "size": 400, "max_piece_length": 1},
        "image": {
            "model": {"channels": [4, 8, 8], "encoder_blocks": [0, 0, 1], "num_codes": 40, "code_width": 4},
            "training": {"steps": 6, "batch_size": 4, "warmup_steps": 2},
            "run": {"save_every": 3, "evaluate_every": 0},
            "precision": "float32",
            "validation_images": 8,
        },
        "encode": {"rows": 40, "held_out_rows": 12, "text_width": 40, "batch_size": 16},
        "transformer": {
            "preset": "tiny",
            "max_positions": 112,
            "training": {"steps": 6, "batch_size": 4, "warmup_steps": 2},
            "run": {"log_every": 1, "save_every": 2, "evaluate_every": 0},
            "precision": "float32",
        },
        "package": {"card": str(folder / "card.md")},
    }


def write_recipe(folder: Path, **changes) -> str:
    """The path of a tiny recipe; None for a section removes it."""
    content = {name: value for name, value in {**sections(folder), **changes}.items() if value is not None}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    (folder / "card.md").write_text("# 小模型\n\n{figures}\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def finished(make_tiny_world, tmp_path_factory) -> Path:
    """A work folder with world, text tokenizer, VQ-VAE and stores, each made by its command."""
    folder = tmp_path_factory.mktemp("finished")
    make_tiny_world().save(folder / "work" / "world")
    recipe = write_recipe(folder)
    for command in ("train-text", "train-image", "encode"):
        assert main([command, recipe]) == 0
    return folder


@pytest.fixture
def work(finished, tmp_path) -> Path:
    """A copy of the finished folder, to go on from or to spoil."""
    shutil.copytree(finished / "work", tmp_path / "work")
    return tmp_path / "work"


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# From a world to a picture


@pytest.mark.slow
def test_recipe_commands_run_in_sequence(finished, tmp_path, capsys, monkeypatch):
    """Each command writes its result to the path where the next one reads it."""
    work = tmp_path / "elsewhere"
    shutil.copytree(finished / "work", work)
    recipe = write_recipe(tmp_path)
    assert [len(TokenStore(work / name)) for name in ("store", "held-out-store")] == [40, 12]
    assert sorted(path.name for path in (work / "image").iterdir()) == ["config.json", "model.safetensors"]

    # Training that is interrupted, then goes on: with the weights of one that was not.
    step = TransformerTrainer.step

    def interrupted(self, number, batch):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, batch)

    place = ["--work", str(work), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(TransformerTrainer, "step", interrupted)
        assert main(["train", recipe, *place]) == 128 + signal.SIGTERM
    assert [step_of(path) for path in RunFolder(work / "transformer-run").checkpoints()] == [2, 4]
    assert main(["train", recipe, *place, "--resume", "auto"]) == 0
    whole = tmp_path / "whole"
    shutil.copytree(finished / "work", whole)
    with monkeypatch.context() as patch:
        patch.setattr(setup, "save_run_plots", save_run_plots)
        assert main(["train", recipe, "--work", str(whole), "--device", "cpu"]) == 0
    with Image.open(whole / "transformer-run" / "curves.png") as curves:
        assert curves.width == 1200
    weights = [
        (folder / "transformer-run" / "checkpoints" / "step-00000006" / "model.safetensors").read_bytes()
        for folder in (work, whole)
    ]
    assert weights[0] == weights[1]
    lines = (work / "transformer-run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4, 5, 6]
    assert (work / "transformer-run" / "samples" / "step-00000006.png").is_file()
    sheet = (work / "transformer-run" / "samples" / "step-00000006.txt").read_text(encoding="utf-8")
    assert len(sheet.splitlines()) == 12  # the captions of the held-out rows

    capsys.readouterr()
    assert main(["eval", "scenes", recipe, *place, "--tune", "-n", "5", "--batch-size", "4"]) == 0
    table = capsys.readouterr().out
    assert "| everything (of 5) |" in table
    report = json.loads((work / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["ceiling_true_scenes"]["everything"]["accuracy"] == 1
    tried = json.loads((work / "report" / "sampling.json").read_text(encoding="utf-8"))
    assert {row["sampling"]["temperature"] for row in tried} == {0.1, 0.9}
    assert report["protocol"]["sampling"] == tried[0]["sampling"]
    assert (work / "report" / "pictures.png").is_file()

    assert main(["package", recipe, "--work", str(work)]) == 0
    printed = capsys.readouterr()
    packaged = Path(printed.out.strip())
    assert packaged == work / "model"
    assert table.strip() in (packaged / "README.md").read_text(encoding="utf-8")
    assert not (packaged / "trainer.pt").exists()
    assert (packaged / "grammar.json").is_file() != ("note: no grammar.json" in printed.err)
    model = CogView.from_pretrained(packaged, device="cpu")
    assert {thing.name for thing in model.things} == {"红苹果", "狐狸", "狗", "汽车", "打开的书", "鱼"}
    assert model.sampling().temperature == tried[0]["sampling"]["temperature"]
    assert to_mapping(model.config.reconstruction_psnr) == report["reconstruction_psnr"]
    picture = model.generate("蓝色背景上的三只狐狸", seed=3)[0]
    assert picture.size == (64, 64)
    last = CogView.from_pretrained(work / "transformer-run" / "checkpoints" / "step-00000006", device="cpu")
    for name, tensor in last.transformer.state_dict().items():
        assert (model.transformer.state_dict()[name] == tensor.half().float()).all(), name


def test_encode_resumes_when_interrupted(work, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path)
    expected = TokenStore(work / "store").read(range(40))
    shutil.rmtree(work / "store")
    append, calls = StoreWriter.append, []

    def interrupted(self, rows):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(append(self, rows))

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", interrupted)
        assert main(["encode", recipe]) == 130
    assert "interrupted; finished results are kept" in capsys.readouterr().err
    assert len(TokenStore(work / "store")) == 32
    assert main(["encode", recipe]) == 0
    rows = TokenStore(work / "store").read(range(40))
    assert all(np.array_equal(rows[name], expected[name]) for name in rows)


@pytest.mark.font
def test_scenes_draws_a_world_with_the_emoji_font(tmp_path, capsys):
    assert main(["scenes", write_recipe(tmp_path)]) == 0
    output = capsys.readouterr()
    assert output.out.strip() == str(tmp_path / "work" / "world")
    assert "6 objects, 64 x 64 pixels" in output.err
    assert sorted(path.name for path in (tmp_path / "work" / "world").iterdir()) == [
        *("scenes.png", "sprites.npz", "world.json")
    ]


def test_train_image_starts_from_another_tokenizer_with_larger_scenes(work, tmp_path):
    start = (work / "image").rename(tmp_path / "start")
    shutil.rmtree(work / "image-run")
    recipe = write_recipe(tmp_path)
    still = ["training.learning_rate=0.0", "training.final_learning_rate=0.0", "training.decay=1.0"]
    assert main(["train-image", recipe, *still, f"init_from={start}", "scales=[1, 2]"]) == 0
    begun, trained = (load_file(folder / "model.safetensors") for folder in (start, work / "image"))
    assert all(torch.equal(trained[name], begun[name]) for name in begun if name != "quantizer.codebook")
    torch.testing.assert_close(trained["quantizer.codebook"], begun["quantizer.codebook"])

    shutil.rmtree(work / "image-run")  # another codebook is learnt anew, by the networks of the start
    assert main(["train-image", recipe, *still, f"init_from={start}", "model.code_width=5"]) == 0
    assert load_file(work / "image" / "model.safetensors")["quantizer.codebook"].shape[1] == 5


@pytest.mark.slow
def test_recipe_overrides_change_their_section_only(work, tmp_path):
    recipe = write_recipe(tmp_path)
    place = ["--work", str(work), "--device", "cpu"]
    assert main(["train", recipe, "training.steps=4", *place, "run.keep=1", "training.learning_rate=2e-4"]) == 0
    plain = yaml.safe_load((work / "transformer-run" / "recipe.yaml").read_text(encoding="utf-8"))
    assert (plain["training"]["steps"], plain["run"]["keep"], plain["training"]["learning_rate"]) == (4, 1, 2e-4)
    assert plain["training"]["batch_size"] == 4
    assert [step_of(path) for path in RunFolder(work / "transformer-run").checkpoints()] == [4]


@pytest.mark.slow
def test_train_builds_a_model_of_every_task_of_a_mixture(work, tmp_path, capsys):
    for name in ("store", "held-out-store"):
        shutil.rmtree(work / name)
    content = sections(tmp_path)
    encode = {**content["encode"], "large": True, "small": True}
    mixture = {"generate": 2, "caption": 1, "upscale": 1, "low_level": 0.5}
    transformer = {**content["transformer"], "training": {**content["transformer"]["training"], "tasks": mixture}}
    recipe = write_recipe(tmp_path, encode=encode, transformer=transformer)
    assert main(["train", recipe]) == 2
    assert "no token store" in one_line(capsys)
    assert main(["encode", recipe]) == 0
    assert main(["train", recipe, "--device", "cpu"]) == 0
    last = json.loads((work / "transformer-run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name for name in last if name.startswith("validation")} == {
        *("validation_generate_image_loss", "validation_generate_text_loss", "validation_caption_text_loss"),
        *("validation_upscale_image_loss", "validation_low_level_image_loss", "validation_loss"),
    }
    model = CogView.from_pretrained(RunFolder(work / "transformer-run").checkpoints()[-1], device="cpu")
    assert set(model.config.tasks) == set(mixture)
    pictures = model.generate("一个红苹果", n=3, keep=2, seed=1)  # and all tasks have their numbers in the card:
    capsys.readouterr()
    assert main(["package", recipe]) == 2
    assert "the model has no report yet; evaluate it first: cogview eval scenes" in one_line(capsys)
    for measure in ("scenes", "captions", "upscale"):
        assert main(["eval", measure, recipe, "-n", "3", "--device", "cpu"]) == 0
    assert main(["package", recipe]) == 0
    card = (work / "model" / "README.md").read_text(encoding="utf-8")
    assert "`cogview eval captions`, 3 held-out scenes:" in card
    assert "`cogview eval rerank`" not in card
    assert "Over 3 held-out scenes, upscaled less bicubic is" in card
    assert len(model.caption(pictures)) == 2
    assert [picture.size for picture in model.upscale(pictures, "一个红苹果", seed=1)] == [(128, 128)] * 2


def test_train_names_the_field_that_a_store_lacks_for_a_task(work, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    capsys.readouterr()
    assert main(["train", recipe, "training.tasks={upscale: 1}"]) == 2
    assert '"upscale" is needed here: encode a store for that task' in one_line(capsys)
    assert main(["train", recipe, "training.name_loss_weight=0.5"]) == 2
    assert "does not say which name stands where, but name_loss_weight is 0.5: encode the store" in one_line(capsys)


@pytest.mark.slow
def test_train_starts_from_another_model(work, tmp_path, capsys, monkeypatch):
    place = ["--work", str(work), "--device", "cpu"]
    assert main(["train", write_recipe(tmp_path), *place, "training.steps=4", "dropout=0.0"]) == 0
    (first,) = RunFolder(work / "transformer-run").checkpoints()[-1:]
    start = first.rename(tmp_path / "start")
    shutil.rmtree(work / "transformer-run")

    # With a learning rate of nothing, what is trained is what it started from.
    still = ["training.learning_rate=0.0", "training.final_learning_rate=0.0", "branch_norm_init=0.5"]
    assert main(["train", write_recipe(tmp_path), *place, *still, f"init_from={start}"]) == 0
    last = RunFolder(work / "transformer-run").checkpoints()[-1]
    weights, begun = (load_file(folder / "model.safetensors") for folder in (last, start))
    used = read_config(start).vocabulary.size  # the rows behind it are never read
    weights["embedding.weight"], begun["embedding.weight"] = (
        tensors["embedding.weight"][:used] for tensors in (weights, begun)
    )
    assert all(torch.equal(weights[name], begun[name]) for name in begun)

    shutil.rmtree(work / "transformer-run")
    capsys.readouterr()
    longer = [*still, "max_positions=130", "--init-from", str(start)]
    assert main(["train", write_recipe(tmp_path), *place, *longer]) == 0
    assert f"begins with the weights of {start}, and a new optimizer" in capsys.readouterr().err
    positions = load_file(work / "transformer-run/checkpoints/step-00000006/model.safetensors")["positions.weight"]
    assert torch.equal(positions[112:120], begun["positions.weight"][104:112])  # a row of eight codes before
    assert torch.equal(positions[120:128], begun["positions.weight"][104:112])
    shutil.rmtree(work / "transformer-run")
    monkeypatch.setitem(config.PRESETS, "other", (1, 48, 2))
    assert main(["train", write_recipe(tmp_path), *place, "preset=other", f"init_from={start}"]) == 2
    assert f"init_from: {start} has another shape than this recipe" in one_line(capsys)
    assert main(["train", write_recipe(tmp_path), *place, "init_from=没有"]) == 2
    assert "没有" in one_line(capsys)

    # Codes that look another way are no obstacle, and the user is told.
    for name in ("image-run", "store", "held-out-store"):
        shutil.rmtree(work / name)
    assert main(["train-image", write_recipe(tmp_path), "--work", str(work), f"init_from={start}"]) == 0
    assert main(["encode", write_recipe(tmp_path), "--work", str(work)]) == 0
    capsys.readouterr()
    assert main(["train", write_recipe(tmp_path), *place, *still, f"init_from={start}"]) == 0
    assert f"note: {start} was trained on another codebook" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_readable(path, tmp_path):
    from cogview.cli.package import PackageSettings
    from cogview.config_io import read_recipe
    from cogview.emoji.datasets import SceneEncodeSettings
    from cogview.emoji.export import SceneRecipe
    from cogview.tokenizers.layouts import layouts
    from cogview.training.picture_encoding import PictureEncodeSettings
    from cogview.training.recipe import Recipe
    from cogview.training.settings import TransformerSettings
    from cogview.training.text_tokenizer import TextTokenizerRecipe
    from cogview.training.vqvae_recipe import VQVAERecipe

    recipe = Recipe(path=path, sections=read_recipe(path), overrides=(), work=tmp_path)
    transformer = recipe.settings(TransformerSettings, "transformer")
    if set(recipe.sections) == {"work", "transformer"}:  # for stores that are there
        assert transformer.tokenizers is not None
        return
    recipe.settings(TextTokenizerRecipe, "text")
    image = recipe.settings(VQVAERecipe, "image")
    if image.pictures:
        pictures = recipe.settings(PictureEncodeSettings, "encode")
        assert (pictures.pictures, pictures.side, pictures.fit) == (image.pictures, image.side, image.fit)
        assert pictures.held_out == image.held_out  # no held-out picture of one step is trained on in the other
        assert layouts(image.side // 8)["generate"].max_position(pictures.text_width) <= transformer.max_positions
        return
    world = recipe.settings(SceneRecipe, "scenes")
    encode = recipe.settings(SceneEncodeSettings, "encode")
    assert (ROOT / recipe.settings(PackageSettings, "package").card).is_file()
    assert set(recipe.sections) == {"work", "scenes", "text", "image", "encode", "transformer", "package"}
    needed = layouts(world.canvas // 8)["generate"].max_position(encode.text_width)
    assert needed <= transformer.max_positions


@pytest.mark.slow
def test_train_adapter_resumes_after_a_restart(work, tmp_path, capsys):
    pytest.importorskip("peft")
    recipe, place = write_recipe(tmp_path), ["--work", str(work), "--device", "cpu"]
    assert main(["train", recipe, *place]) == 0
    base = RunFolder(work / "transformer-run").checkpoints()[-1].rename(tmp_path / "base")
    shutil.rmtree(work / "transformer-run")
    learn = [*place, "training.learning_rate=0.01", "lora={rank: 2, dropout: 0.1}", f"init_from={base}"]
    assert main(["train", recipe, *learn]) == 0
    whole = (work / "transformer-run").rename(tmp_path / "whole")

    class Stopped(Exception):
        pass

    step = TransformerTrainer.step

    def stopping(self, number, batch):
        if number == 4:
            raise Stopped
        return step(self, number, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerTrainer, "step", stopping)
        with pytest.raises(Stopped):
            main(["train", recipe, *learn])
    assert main(["train", recipe, *learn, "--resume", "auto"]) == 0
    last, expected = (folder / "checkpoints" / "step-00000006" for folder in (work / "transformer-run", whole))
    assert (last / "adapter_model.safetensors").read_bytes() == (expected / "adapter_model.safetensors").read_bytes()
    assert not (last / "model.safetensors").exists()
    weights = load_file(last / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)

    codes = [
        CogView.from_pretrained(base, device="cpu", adapter=adapter).generate("一只狐狸", seed=3)[0].codes
        for adapter in (None, last)
    ]
    assert not np.array_equal(*codes)
    capsys.readouterr()
    assert main(["train", recipe, *place, "lora={rank: 2}"]) == 2
    assert "lora trains an adapter of a model: name it in init_from" in one_line(capsys)
    assert main(["train", recipe, *learn, "lora={rank: 4}", "--resume", "auto"]) == 2
    assert "does not fit the recipe, go back to its settings or remove" in one_line(capsys)


# cogview doctor


def findings(capsys) -> dict[str, dict[str, str]]:
    """Return the last finding of each subject, from the JSON that the command printed."""
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["subject"]: line for line in lines}


@pytest.mark.slow
def test_doctor_checks_machine_and_computes_two_steps_of_recipe(work, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    capsys.readouterr()
    before = sorted(path.name for path in work.iterdir())
    assert main(["doctor", recipe, "--device", "cpu", "--json", "training.tasks={generate: 1, caption: 1}"]) == 0
    found = findings(capsys)
    assert {line["status"] for line in found.values()} <= {"ok", "note"}
    assert found["torch"]["text"] == torch.__version__
    assert re.fullmatch(
        r"all-reduce over 2 processes on this machine by gloo: \d+\.\d\d GB/s each", found["processes"]["text"]
    )
    assert found["stores"]["text"] == "40 rows in 1, 0.6 epochs"
    assert "GB free at" in found["disk"]["text"]
    assert re.search(r"s for 4 rows of up to 109 tokens, [\d,]+ tokens/s, loss \d", found["step"]["text"])
    assert " predicted, " in found["memory"]["text"]
    assert sorted(path.name for path in work.iterdir()) == before  # no file is left


def test_doctor_names_problems_with_remedies(work, tmp_path, capsys, monkeypatch):
    shutil.rmtree(work / "store")
    monkeypatch.setattr(recipe_checks, "check_processes", lambda device, count: iter(()))
    monkeypatch.setitem(machine.PACKAGES, "torch", machine.SupportedVersions("", (2, 6), (2, 7)))
    monkeypatch.setitem(machine.PACKAGES, "cogdata", machine.SupportedVersions("train"))
    capsys.readouterr()
    assert main(["doctor", write_recipe(tmp_path), "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"problem  torch         {torch.__version__}; tested with 2.6 to below 2.7: pip install 'cogview'" in lines
    assert "note     cogdata       is not installed; it is optional; pip install 'cogview[train]'" in lines
    assert lines[-1].startswith(f"problem  training      there is no token store at {work / 'store'}: make one with")


@pytest.mark.slow
def test_doctor_computes_nonfinite_step_again(work, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    capsys.readouterr()
    overflow = ["training.learning_rate=1.0e+30", "training.clip_norm=1.0e+30", "--device", "cpu"]
    assert main(["train", recipe, *overflow]) == 2
    progress, line = capsys.readouterr().err.splitlines()
    assert progress.startswith("step 1/6, loss ")
    assert "is not finite, first in " in line
    (dump,) = (work / "transformer-run" / "nonfinite").iterdir()
    assert line.strip().split("replay the step with: ")[1].startswith(f"cogview doctor --dump {dump};")
    assert main(["doctor", "--dump", str(dump), "--device", "cpu"]) == 1
    kept, now = capsys.readouterr().out.splitlines()
    assert kept.startswith("ok       kept          step ")
    assert now.startswith("problem  now           in float32 on cpu: first not finite in ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "invalid value for '--processes': 0 is not in the range x>=1"),
        (["--dump", "nowhere"], "nowhere is no dump of a step: expected RUN/nonfinite/step-…"),
        (["{recipe}", "--dump", "nowhere"], "--dump has its own model and rows: omit RECIPE"),
        (["nowhere.yaml"], "cannot read the recipe nowhere.yaml: No such file or directory; packaged recipes are: "),
        (["{recipe}", "engine.name=deepsped"], 'engine, name: expected one of torch, deepspeed, got "deepsped"'),
    ],
)
def test_doctor_reports_mistake_in_one_line(tmp_path, capsys, arguments, message):
    recipe = write_recipe(tmp_path)
    assert main(["doctor", *(word.format(recipe=recipe) for word in arguments)]) == 2
    assert message in one_line(capsys)


# Bad input: one line, status 2, nothing lost


@pytest.mark.parametrize(
    ("changes", "command", "message"),
    [
        ({"text": {"capions": 3}}, "train-text", 'section text of {recipe}: "capions" is unknown; did you mean "capt'),
        ({"text": {"captions": 0}}, "train-text", "captions must be in [1, 1000000000], got 0"),
        ({"text": {"captions": 9, "size": 20}}, "train-text", "a text tokenizer of size 20 is too small"),
        ({"image": {"training": {"stepz": 3}}}, "train-image", '"stepz" is unknown; did you mean "steps"?'),
        ({"image": {}}, "train-image", "section image of {recipe}: training must be given"),
        (
            {"image": {"training": {"steps": 400}, "scales": [0, 1]}},
            "train-image",
            "scales must be in [1, 16], got [0, 1]",
        ),
        ({"image": None}, "train-image", 'the recipe has no section "image"; it has: encode, package'),
        ({"encode": {"rows": "many"}}, "encode", 'rows: expected a whole number, got "many"'),
        ({"transformer": {"training": {"steps": 5}, "preset": "9b"}}, "train", "warmup_steps must be from 1 to"),
        ({"work": None}, "scenes", "names no folder for its results: expected work: FOLDER, or give --work"),
        ({"work": 5}, "scenes", "names no folder for its results"),
        ({"scenes": {"canvas": 65}}, "scenes", "canvas must be a multiple of 64 pixels, got 65"),
    ],
)
def test_recipe_commands_report_mistakes_in_a_recipe(work, tmp_path, capsys, changes, command, message):
    recipe = write_recipe(tmp_path, **changes)
    assert main([command, recipe]) == 2
    assert message.format(recipe=recipe) in one_line(capsys)


def test_recipe_commands_report_a_missing_recipe(tmp_path, capsys):
    assert main(["encode", str(tmp_path / "配方.yaml")]) == 2
    line = one_line(capsys)
    assert line.startswith("cogview encode: cannot read the recipe")
    assert "配方.yaml" in line


def test_scenes_names_the_package_when_the_font_is_missing(tmp_path, capsys):
    assert main(["scenes", write_recipe(tmp_path), "--font", str(tmp_path / "NotoColorEmoji.ttf")]) == 2
    line = one_line(capsys)
    assert f"{tmp_path / 'NotoColorEmoji.ttf'} is missing" in line
    assert "apt install fonts-noto-color-emoji" in line
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("missing", "command", "message"),
    [
        ("world", "train-text", "world.json is missing; make it with: cogview scenes RECIPE"),
        ("world", "train-image", "world.json is missing; make it with: cogview scenes RECIPE"),
        ("image", "encode", "no image tokenizer at {work}/image; make it with: cogview train-image {recipe}"),
        ("text.model", "encode", "expected a SentencePiece .model file; make it with: cogview train-text {recipe}"),
        ("store", "train", "there is no token store at {work}/store: make one with `cogview encode RECIPE`"),
        ("text.model", "train", "no text tokenizer at {work}/text.model"),
        ("image", "train", "make it with: cogview train-image {recipe}"),
        ("nothing", "eval scenes", "{work}/transformer-run holds no checkpoint; train with: cogview train"),
        ("nothing", "package", "{work}/transformer-run holds no checkpoint; train with: cogview train"),
    ],
)
def test_recipe_commands_name_the_command_that_has_to_run_first(work, tmp_path, capsys, missing, command, message):
    path = work / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    shutil.rmtree(work / "image-run")  # which would be refused first
    recipe = write_recipe(tmp_path)
    assert main([*command.split(), recipe]) == 2
    assert message.format(work=work, recipe=recipe) in one_line(capsys)


def test_train_refuses_to_overwrite_a_run(work, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    capsys.readouterr()
    assert main(["train-image", recipe, "--resume", "never"]) == 2
    assert "already holds a run at step-00000006; go on with --resume auto, or remove the folder" in one_line(capsys)
    assert main(["train-image", recipe]) == 2  # the same without being asked


def test_train_reports_an_exhausted_memory_in_one_line(work, tmp_path, capsys, monkeypatch):
    def exhaust(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(memory_plan, "measure_hardware", exhaust)
        assert memory_plan.device_peak_flops(DistributedContext(torch.device("cpu")), None) is None
    assert one_line(capsys) == "MFU is not logged: the memory to measure the peak FLOP/s is missing\n"
    monkeypatch.setattr(setup, "open_engine", exhaust)
    assert main(["train", write_recipe(tmp_path), "--device", "cpu"]) == 3
    assert one_line(capsys).startswith("cogview train: the model and its optimizer do not fit into memory; cogview est")


def test_train_refuses_a_store_of_another_image_tokenizer(work, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    shutil.rmtree(work / "image-run")
    assert main(["train-image", recipe, "training.seed=1"]) == 0
    capsys.readouterr()
    assert main(["train", recipe]) == 2
    line = one_line(capsys)
    assert f"{work / 'store'} was made with codebook_sha256" in line
    assert "encode the store again" in line
    assert main(["encode", recipe]) == 2
    assert "remove the store" in one_line(capsys)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preset=9b", "preset '9b' is unknown; known: "),
        ("max_positions=100", "max_positions 100 are too few for the rows of {store}: 108"),
        ("precision=float8", "precision 'float8' is unknown; known: auto, float32, bfloat16, float16"),
        ("engine.name=deepsped", 'engine, name: expected one of torch, deepspeed, got "deepsped"'),
        (
            "engine={name: deepspeed, zero: 0}",
            "in bfloat16 DeepSpeed's stage 0 trains differently from stages 1 to 3",
        ),
        ("engine={name: deepspeed, zero: 3, compile: true}", "compile does not go with zero: 3, whose weights have no"),
        ("engine={offload: true}", "offload and config are DeepSpeed's: set name: deepspeed"),
        ("watch_folder=nowhere", "there is no folder nowhere to look for new stores in: make it, or watch none"),
        ("training.nonfinite=ignore", 'nonfinite: expected one of skip, stop, got "ignore"'),
        ("training.warmup_stps=3", '"warmup_stps" is unknown; did you mean "warmup_steps"?'),
        ("preset", '"preset" is not KEY=VALUE of the section transformer'),
    ],
)
def test_train_reports_invalid_settings_of_the_transformer(work, tmp_path, capsys, override, message):
    assert main(["train", write_recipe(tmp_path), override]) == 2
    assert message.format(store=work / "store") in one_line(capsys)
    assert not (work / "transformer-run").exists()


@pytest.mark.slow
def test_train_refuses_to_resume_a_checkpoint_of_another_shape(work, tmp_path, capsys, monkeypatch):
    recipe = write_recipe(tmp_path)
    monkeypatch.setitem(config.PRESETS, "other", (1, 48, 2))
    assert main(["train", recipe, "training.steps=3"]) == 0
    capsys.readouterr()
    assert main(["train", recipe, "preset=other", "--resume", "auto"]) == 2
    assert "does not fit the recipe, go back to its settings or remove" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "invalid value for '-n' / '--captions': 0 is not in the range x>=1"),
        (["--seed", "-1"], "the seed must be from 0"),
        (["--temperature", "0"], "invalid value for '--temperature': 0.0 is not in the range x>0"),
        (["--model", "cogview-bse"], 'checkpoint "cogview-bse" is unknown; known:'),
        ([], "knows 4 objects, not the 6 of this world: use the recipe of the model"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
    ],
)
def test_eval_reports_mistakes_in_one_line(work, tmp_path, tiny_checkpoint, capsys, arguments, message):
    model = [] if "--model" in arguments else ["--model", str(tiny_checkpoint)]
    assert main(["eval", "scenes", write_recipe(tmp_path), *model, *arguments]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("measure", "arguments", "message"),
    [
        ("captions", ["--tune"], "--tune has no effect on captions, only on scenes; leave it out"),
        ("rerank", ["--tune"], "--tune has no effect on rerank"),
        ("upscale", ["--tune"], "--tune has no effect on upscale"),
        ("scenes", ["--candidates", "4"], "--candidates has no effect on scenes, only on rerank; leave it out"),
        ("upscale", ["--candidates", "1"], "--candidates has no effect on upscale"),
        ("captions", ["--temperature", "0.5"], "--temperature has no effect on captions, only on scenes, rerank, u"),
        ("captions", ["--top-k", "0"], "--top-k has no effect on captions"),
        ("captions", ["--top-p", "0.9"], "--top-p has no effect on captions"),
        ("captions", ["--min-p", "0.1"], "--min-p has no effect on captions"),
        ("captions", ["--noise-version", "1"], "--noise-version has no effect on captions"),
        ("rerank", ["--candidates", "0"], "invalid value for '--candidates': 0 is not in the range x>=1"),
        ("rerank", ["-n", "0"], "invalid value for '-n' / '--captions': 0 is not in the range x>=1"),
    ],
)
def test_eval_refuses_an_option_that_a_measure_does_not_use(tmp_path, capsys, measure, arguments, message):
    assert main(["eval", measure, write_recipe(tmp_path), *arguments]) == 2
    assert message in one_line(capsys)


@pytest.mark.slow
def test_package_refuses_a_report_of_another_checkpoint(work, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    assert main(["train", recipe, "training.steps=3"]) == 0
    (work / "report").mkdir()
    accuracy = {"right": 1, "of": 1, "accuracy": 1.0, "low": 0.2, "high": 1.0}
    grades = {part: accuracy for part in scenes.PARTS}
    report = {name: grades for name in ("drawn", "ceiling_reconstructions", "ceiling_true_scenes")}
    report["image_tokenizer"] = {"things": 5, "images": 8.0, "psnr": 20.0, "codes_used": 0.5, "perplexity": 9.0}
    report["protocol"] = {"model": "work/transformer-run/checkpoints/step-00000002", "sampling": {}}
    (work / "report" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    capsys.readouterr()
    assert main(["package", recipe]) == 2
    line = one_line(capsys)
    assert "step-00000002, not " in line
    assert "step-00000003; evaluate that first: cogview eval scenes" in line
    assert not (work / "model").exists()


# cogview run


def steps_run(work: Path) -> list[tuple[str, int]]:
    return [(entry["step"], entry["status"]) for entry in json.loads((work / "times.json").read_text())]


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The command lines of the steps, which are not run."""
    found: list[list[str]] = []
    monkeypatch.setattr(run, "run_words", lambda words: found.append(list(words)) or 0)
    return found


@pytest.mark.slow
def test_run_does_missing_steps_and_resumes(work, tmp_path, capsys, monkeypatch):
    recipe, place = write_recipe(tmp_path), ["--device", "cpu"]
    monkeypatch.setattr(evaluate, "CAPTIONS", 4)
    step = TransformerTrainer.step

    def interrupted(self, number, batch):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TransformerTrainer, "step", interrupted)
        assert main(["run", recipe, *place]) == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert "step 3 of 7, train-image: already done" in error
    assert "step 5 of 7, train: stopped after " in error
    assert steps_run(work) == [("train", 143)]

    (tmp_path / "card.md").rename(tmp_path / "card.txt")
    assert main(["run", recipe, *place]) == 2
    assert one_line(capsys).startswith("cogview run: the model card ")  # before the first step

    def refuse(*_: object) -> None:
        raise InputError("the package cannot be written")

    (tmp_path / "card.txt").rename(tmp_path / "card.md")
    with monkeypatch.context() as patch:
        patch.setattr(package, "save_half", refuse)
        assert main(["run", recipe, *place]) == 2
    error = capsys.readouterr().err
    assert "step 4 of 7, encode: already done" in error
    assert f"resuming {work / 'transformer-run'} after step 4" in error
    assert steps_run(work)[1:] == [("train", 0), ("eval scenes", 0), ("package", 2)]

    assert main(["run", recipe, *place]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-3:] == [
        str(work / name) for name in ("model", "model/README.md", "report/pictures.png")
    ]
    assert "step 6 of 7, eval scenes: already done" in output.err
    assert steps_run(work)[4:] == [("package", 0)]

    before = (work / "times.json").read_text()
    assert main(["run", recipe, *place]) == 0
    assert capsys.readouterr().err.count("already done") == 7
    assert (work / "times.json").read_text() == before
    assert json.loads(before)[0]["seconds"] > 0

    assert main(["run", recipe, *place, "transformer.sampling={top_k: 3}"]) == 2  # the report of the model has them
    assert "sampling settings do not reach the package" in capsys.readouterr().err
    assert (work / "times.json").read_text() == before


def test_run_starts_with_the_first_step(asked, tmp_path):
    recipe = write_recipe(tmp_path)
    work = ["--work", str(tmp_path / "elsewhere")]
    assert main(["run", recipe, *work, "--device", "cpu", "image.training.steps=7"]) == 0
    commands = ["scenes", "train-text", "train-image", "encode", "train", "eval", "package"]
    assert [command[0] for command in asked] == commands
    assert all(str(tmp_path / "elsewhere") in command and recipe in command for command in asked)
    assert ["--resume" in command for command in asked] == [name in ("train-image", "train") for name in commands]
    assert ["training.steps=7" in command for command in asked] == [name == "train-image" for name in commands]


def test_run_evaluates_every_trained_task(asked, tmp_path):
    transformer = sections(tmp_path)["transformer"]
    transformer["training"]["tasks"] = {"generate": 2, "caption": 1, "upscale": 1}
    recipe = write_recipe(tmp_path, transformer=transformer)
    assert main(["run", recipe, "--work", str(tmp_path / "elsewhere"), "--device", "cpu"]) == 0
    assert [command[:2] for command in asked[5:9]] == [
        ["eval", measure] for measure in ("scenes", "captions", "rerank", "upscale")
    ]
    assert ["--tune" in command for command in asked[5:9]] == [True, False, False, False]
    assert asked[9][0] == "package"


@pytest.mark.parametrize(
    ("changes", "message", "begun"),
    [
        ({"text": {"size": 500}}, "the settings of step train-text have changed: size 400 -> 500", "text.model"),
        (
            {"image": {"training": {"steps": 9, "batch_size": 4, "warmup_steps": 2}, "run": {"save_every": 2}}},
            "the settings of step train-image have changed: training.steps 6 -> 9",
            "image-run",
        ),
        ({"encode": {"text_width": 50}}, "the settings of step encode have changed: text_width 40 -> 50", "store"),
    ],
)
def test_run_notices_a_changed_recipe(work, asked, tmp_path, capsys, changes, message, begun):
    """Results of other settings were reused without a word, and the packaged model was not that of the recipe."""
    whole = {name: {**sections(tmp_path)[name], **change} for name, change in changes.items()}
    assert main(["run", write_recipe(tmp_path), "--device", "cpu"]) == 0  # a note that the world has no record
    asked.clear()
    capsys.readouterr()
    assert main(["run", write_recipe(tmp_path, **whole), "--device", "cpu"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"cogview run: {message}")
    assert f"or do this step and those that depend on it anew after: rm -r {work / begun}" in line
    assert str(work / "store") in line
    assert not asked


def test_run_notices_a_step_that_was_done_again(work, asked, tmp_path, capsys):
    """A new text tokenizer of the same size went unnoticed until the training refused the store, or never."""
    recipe = write_recipe(tmp_path)
    before = (work / "text.model").read_bytes()
    assert main(["train-text", recipe]) == 0
    assert (work / "text.model").read_bytes() == before
    assert main(["run", recipe, "--device", "cpu"]) == 0  # the same result: everything stays valid
    assert main(["train-text", recipe, "captions=30"]) == 0
    assert main(["train-text", recipe, "size=401"]) == 0
    changed = write_recipe(tmp_path, text={**sections(tmp_path)["text"], "size": 401})
    capsys.readouterr()
    assert main(["run", changed, "--device", "cpu"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("cogview run: step encode was done before step train-text was done again; do this step")
    assert f" {work / 'store'} " in line
    assert "image" not in line.partition("rm -r")[2], "the image tokenizer has read no text"


def test_run_says_how_to_train_with_several_processes(asked, tmp_path, capsys):
    transformer = {**sections(tmp_path)["transformer"], "engine": {"name": "deepspeed"}}
    recipe = write_recipe(tmp_path, transformer=transformer)
    assert main(["run", recipe, "--work", str(tmp_path / "elsewhere"), "--device", "cpu"]) == 0
    assert f"torchrun --nproc-per-node N --no-python cogview train {recipe} --work " in capsys.readouterr().err


def test_run_reports_mistakes_in_one_line(tmp_path, capsys, monkeypatch):
    assert main(["run", str(tmp_path / "nothing.yaml")]) == 2
    assert one_line(capsys).startswith("cogview run: cannot read the recipe")
    assert main(["run"]) == 2
    assert "RECIPE" in one_line(capsys)
    recipe = write_recipe(tmp_path)
    for override in ("steps", "steps=1", "image=1", "=.x"):
        assert main(["run", recipe, override]) == 2
        assert f'"{override}" is not SECTION.KEY=VALUE' in one_line(capsys)
    assert main(["run", recipe, "pictures.side=3"]) == 2
    assert 'the recipe has no section "pictures"' in one_line(capsys)
    (tmp_path / "empty.yaml").write_text("work: work\n")
    assert main(["run", str(tmp_path / "empty.yaml")]) == 2
    assert "has no section of a step, expected some of: scenes, text, " in one_line(capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", recipe]) == 2
    assert "torchrun starts the training: torchrun --nproc-per-node N" in one_line(capsys)
