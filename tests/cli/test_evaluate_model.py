"""``cogview eval model``: what it prints, and the stores and prompts that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cogview.cli.main import main
from cogview.emoji.evaluation.judge import grader_judge
from cogview.evaluation.manifest import read_result
from cogview.modeling.config import Sampling
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage
from tests.evaluation.test_model_measures import TEXTS, write_store


@pytest.fixture
def evaluate(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["eval", "model", str(tiny_checkpoint), "--device", "cpu", *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_eval_model_prints_losses_scores_and_recall(evaluate, tiny_model):
    """Each row has a value, its number of items and a unit; proportions and means have an interval."""
    write_store("store", tiny_model)
    status, out, _ = evaluate("--store", "store", "--json", "-o", "folder/result.json")
    results = json.loads(out)["results"]
    assert status == 0
    assert {"loss_generate_image", "loss_caption_text", "caps", "caploss", "codes_used"} <= set(results)
    assert results["text_to_picture_r1_by_caption"]["n"] == len(TEXTS)
    assert results["picture_to_text_r10_by_guidance"]["value"] == 1.0  # five candidates
    assert results["caps"]["low"] < results["caps"]["value"] < results["caps"]["high"]
    assert results["caps"]["higher_is_better"]
    assert not results["caploss"]["higher_is_better"]
    written = read_result(Path("folder/result.json"))
    assert written.manifest.measure == "model"
    assert written.manifest.reference.count == len(TEXTS)
    for name, values in written.items.values.items():
        assert np.mean(values) == pytest.approx(results[name]["value"])
    _, lines, _ = evaluate("--store", "store", "--pairs", "0")
    assert not any("picture_to_text" in line for line in lines.splitlines())
    assert next(line for line in lines.splitlines() if line.startswith("caploss")).endswith("n = 5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--store", "none"], "none"),
        (["--store", "empty"], "empty has no rows: encode some first"),
        (["--store", "other"], "was made with text_sha256"),
        (["--store", "store", "--pairs", "1"], "--pairs must be 0 or at least 2, got 1"),
        (["--store", "twin"], "has 1 different pair of a text and an image, retrieval needs 2"),
    ],
)
def test_eval_model_refuses_stores_in_one_line(evaluate, tiny_model, arguments, message):
    """A store without rows, of another tokenizer, or without pairs gives one line and status 2."""
    write_store("store", tiny_model)
    write_store("empty", tiny_model, [])
    write_store("twin", tiny_model, ["一只狗", "一只狗"])
    write_store("other", tiny_model, text_sha256="0" * 64)
    status, out, err = evaluate(*arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


PROMPTS = ["一只狐狸", "两只狗", "三个红苹果"]


def write_prompts(*lines: str, name: str = "prompts.txt") -> None:
    Path(name).write_text("\n".join(lines), encoding="utf-8")


def test_eval_model_measures_images_of_prompts(evaluate, tiny_model):
    """Each prompt is an item; the manifest has all that moves the values; equal calls give equal results."""
    write_prompts(*PROMPTS)
    options = ["--prompts", "prompts.txt", "--images", "4", "--rank-by", "picture", "--seed", "7", "--json"]
    options += ["--temperature", "0.8", "--guidance", "2", "--speculative", "off", "--kv-dtype", "int8"]
    status, out, err = evaluate(*options, "-o", "result.json")
    assert status == 0, err
    results = json.loads(out)["results"]
    assert set(results) == {
        *("different_images", "pairwise_distance", "code_entropy"),
        *(f"caption_of_best_by_picture_of_{size}" for size in (1, 2, 4)),
        *(f"caption_of_best_possible_of_{size}" for size in (1, 2, 4)),
    }
    assert 0 < results["code_entropy"]["value"] <= np.log(4)
    written = read_result(Path("result.json"))
    manifest = written.manifest
    assert (manifest.prompts.count, manifest.seeds.first, manifest.selection.candidates) == (3, 7, 4)
    assert manifest.selection.by == "log p(picture | text)"
    assert manifest.settings["judge"] == "log p(text | picture)"
    assert (manifest.sampling["temperature"], manifest.sampling["guidance"]) == (0.8, 2.0)
    assert (manifest.model.speculative, manifest.model.kv_dtype) == (1, "int8")
    assert written.items.ids == PROMPTS
    for name, values in written.items.values.items():
        assert np.mean(values) == pytest.approx(results[name]["value"])
    assert written.curves["caption_of_best_by_picture"].x == [1, 2, 4]
    again = json.loads(evaluate(*options, "--max-inference-batch-size", "3")[1])["results"]
    assert {name: row["value"] for name, row in again.items()} == pytest.approx(
        {name: row["value"] for name, row in results.items()}, rel=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure the model on: give --store FOLDER, --prompts FILE or --pictures FOLDER"),
        (["--store", "store", "--prompts", "prompts.txt"], "--store and --prompts are two measures: give one of them"),
        (["--prompts", "none.txt"], "cannot read none.txt"),
        (["--prompts", "empty.txt"], "empty.txt is empty: expected a prompt per line"),
        (["--prompts", "twice.txt"], "remove all but one of the equal lines 1, 4; 2, 5"),
        (["--prompts", "long.txt"], "long.txt, line 2: the prompt"),
        (["--prompts", "prompts.txt", "--images", "1"], "1 is not in the range"),
        (["--prompts", "prompts.txt", "-o", "prompts.txt"], "prompts.txt exists and is no result of cogview, so"),
        (["--prompts", "prompts.txt", "--pairs", "5"], "--pairs applies to --store only; leave it out"),
        (["--store", "store", "--top-k", "5"], "--top-k applies to --prompts only; leave it out"),
        (["--prompts", "prompts.txt", "--rank-by", "both"], "a choice by both has no independent judge"),
        (["--prompts", "prompts.txt", "--judge", "emoji-cpu"], "--judge judges the choice by a score: add --rank-by"),
    ],
)
def test_eval_model_refuses_prompts_in_one_line(evaluate, arguments, message):
    """A file that cannot be used, or options of the other measure, give one line and status 2."""
    write_prompts(*PROMPTS)
    write_prompts("", " ", name="empty.txt")
    write_prompts("一只狐狸", "两只狗", "鱼", "一只狐狸", " 两只狗", name="twice.txt")
    write_prompts("一只狐狸", "一只狐狸" * 30, name="long.txt")
    status, out, err = evaluate(*arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.fixture
def pictures(evaluate, save_image):
    """A folder of 60 pictures, in the folder of ``evaluate``."""
    for number in range(60):
        save_image(f"pictures/{number:02d}.png", number)


def test_eval_model_measures_reconstructions_of_pictures(evaluate, tiny_checkpoint, pictures):
    """Values equal those of ``eval image-tokenizer`` and of ``eval images`` on the reconstructions."""
    options = ["--pictures", "pictures", "--network", "stub", "--json"]
    status, out, _ = evaluate(*options, "-o", "result.json")
    found = json.loads(out)["results"]
    assert (status, list(found)[:3]) == (0, ["rfid", "psnr", "codes_used"])
    assert 0 < found["rfid"]["low"] < found["rfid"]["value"] < found["rfid"]["high"]
    assert not found["rfid"]["higher_is_better"]
    command = ["eval", "image-tokenizer", str(tiny_checkpoint), "pictures", "-o", "sheet.png", "--device", "cpu"]
    assert main(command) == 0
    other = read_result(Path("sheet.json")).results
    for name in ("psnr", "ssim", "codes_used", "perplexity"):
        assert found[name]["value"] == pytest.approx(other[name].value, rel=1e-2)  # that one averages large pictures
    manifest = read_result(Path("result.json")).manifest
    assert (manifest.measure, manifest.network.name, manifest.reference.count) == ("model pictures", "stub", 60)
    again = json.loads(evaluate(*options, "--max-inference-batch-size", "7")[1].splitlines()[-1])["results"]
    assert again["rfid"]["value"] == pytest.approx(found["rfid"]["value"], rel=1e-4)


def test_eval_model_names_broken_pictures_and_measures_the_others(evaluate, pictures):
    Path("pictures/03.png").write_bytes(b"nothing")
    for number in range(10, 60):
        Path(f"pictures/{number}.png").unlink()
    status, out, err = evaluate("--pictures", "pictures", "--network", "stub")
    assert (status, out.splitlines()[0].split()[-1]) == (1, "9")
    assert "rank-deficient: rfid of 48 dimensions" in err
    assert err.splitlines()[-1].startswith("failed: pictures/03.png is no image that can be read")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "none"], "none does not exist"),
        (["--pictures", "one", "--network", "stub"], "one has 1 picture that can be read, expected at least 2"),
        (["--pictures", "broken", "--network", "stub"], "expected at least 2; the first problem: broken/"),
        (["--pictures", "store"], "a token store has codes alone: give --store instead"),
        (["--pictures", "pictures", "--network", "none-such"], "none-such"),
        (["--pictures", "pictures", "--rows", "5"], "--rows applies to --store only; leave it out"),
        (["--store", "store", "--network", "stub"], "--network applies to --pictures only; leave it out"),
        (["--pictures", "pictures", "--prompts", "x"], "--prompts and --pictures are two measures"),
        (["--pictures", "pictures", "-o", "pictures"], "the output pictures is a folder; expected the name of a file"),
    ],
)
def test_eval_model_refuses_pictures_in_one_line(evaluate, tiny_model, pictures, save_image, arguments, message):
    write_store("store", tiny_model)
    save_image("one/0.png", 1)
    Path("broken").mkdir()
    Path("broken/0.png").write_bytes(b"nothing")
    status, out, err = evaluate(*arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.fixture
def judging_world(make_tiny_world, monkeypatch):
    """The world of the recipe that ``--judge`` names."""
    world = make_tiny_world()
    monkeypatch.setattr("cogview.cli.evaluate_gate.open_world", lambda path: world)
    return world


def test_eval_model_lets_the_grader_judge_the_choice(evaluate, judging_world, tiny_model):
    """``both`` has a judge then; prompts that are no captions of the world give one line and status 2."""
    scenes = [judging_world.sample_scene(0, index) for index in range(30)]
    captions = list(dict.fromkeys(judging_world.caption(scene, complete=True) for scene in scenes))
    captions = [caption for caption in captions if tiny_model.prompt_problem(caption) is None][:2]
    write_prompts(*captions)
    options = ["--prompts", "prompts.txt", "--images", "2", "--rank-by", "both", "--judge", "emoji-cpu"]
    status, out, err = evaluate(*options, "--json", "-o", "result.json")
    assert status == 0, err
    results = json.loads(out)["results"]
    assert {name for name in results if "best" in name} == {
        f"grader_of_best_{by}_of_{size}" for by in ("by_both", "possible") for size in (1, 2)
    }
    assert results["grader_of_best_by_both_of_2"]["unit"] == "fraction"
    assert read_result(Path("result.json")).manifest.settings["judge"] == "everything right by the grader"
    write_prompts(captions[0], "一只狐狸在笑")
    status, out, err = evaluate(*options)
    assert (status, out) == (2, "")
    assert "line 2: the grader cannot judge “一只狐狸在笑”; expected a caption of the emoji world" in err


def test_grader_judge_knows_the_pictures_of_the_world(judging_world):
    """A rendered scene is right for its caption, and a grey image is wrong."""
    scene = judging_world.sample_scene(0, 3)
    caption = judging_world.caption(scene, complete=True)
    judge = grader_judge(judging_world, {1: caption}, Path("prompts.txt"))
    request = GenerationRequest(prompt=caption, seed=0, sampling=Sampling())
    pixels = judging_world.render(scene)
    images = [
        GeneratedImage.from_pixels(shown, request, np.zeros((8, 8), dtype=np.int64), 0.0)
        for shown in (pixels, np.full_like(pixels, 160))
    ]
    assert judge.values_of(images) == [1.0, 0.0]
