"""``cogview eval`` beyond scenes: each measure's report and companions, in a small world."""

import json
import shutil

import pytest
import yaml
from PIL import Image

from cogview.cli.evaluate import read_report
from cogview.cli.main import main
from cogview.emoji.evaluation.captions import format_caption_report
from cogview.emoji.evaluation.reports import MEASURES
from cogview.errors import InputError
from cogview.evaluation.manifest import SeedsRecord, read_result
from cogview.evaluation.model_record import hash_weights
from cogview.training.recipe import Recipe


@pytest.fixture
def recipe(make_tiny_world, tmp_path) -> str:
    """A recipe whose world holds the four things that the tiny checkpoint knows."""
    make_tiny_world(things=4).save(tmp_path / "work" / "world")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"work": str(tmp_path / "work")}), encoding="utf-8")
    return str(path)


def evaluate(measure, recipe, checkpoint, *options) -> int:
    return main(["eval", measure, recipe, "--model", str(checkpoint), "--device", "cpu", "-n", "2", *options])


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rerank_leaves_its_report(recipe, tiny_checkpoint, tmp_path, capsys):
    assert evaluate("rerank", recipe, tiny_checkpoint, "--candidates", "3", "--top-k", "5", "--seed", "9") == 0
    output = capsys.readouterr()
    assert output.out.startswith("| images of a caption |")
    assert output.err.splitlines()[-1] == f"written to {tmp_path / 'work' / 'report'}"
    assert files(tmp_path / "work" / "report") == ["report-rerank.json", "result-rerank.json"]
    report = json.loads((tmp_path / "work" / "report" / "report-rerank.json").read_text(encoding="utf-8"))
    made = report["protocol"]
    assert (made["captions"], made["pictures_of_each"], made["seed"], made["sampling"]["top_k"]) == (2, 3, 9, 5)
    assert [row["of"] for row in report["best_of"]] == [1, 2, 3]


def test_upscale_leaves_its_report_and_a_sheet(recipe, tiny_checkpoint, tmp_path, capsys):
    assert evaluate("upscale", recipe, tiny_checkpoint, "-o", str(tmp_path / "here")) == 0
    assert capsys.readouterr().out.startswith("| large image |")
    assert files(tmp_path / "here") == [
        *("pictures-upscale", "pictures-upscale.png", "report-upscale.json", "result-upscale.json"),
    ]
    report = json.loads((tmp_path / "here" / "report-upscale.json").read_text(encoding="utf-8"))
    assert report["protocol"]["captions"] == 2
    with Image.open(tmp_path / "here" / "pictures-upscale.png") as sheet:
        assert sheet.size == (8 * 132 + 4, 132 + 4)  # two pictures, four versions of each


def test_captions_leave_their_report_and_every_caption(recipe, tiny_checkpoint, tmp_path, capsys):
    assert evaluate("captions", recipe, tiny_checkpoint, "--seed", "4", "--batch-size", "8") == 0
    output = capsys.readouterr().out
    assert output.startswith("| right |")
    folder = tmp_path / "work" / "report"
    assert files(folder) == ["captions.jsonl", "report-captions.json", "result-captions.json"]
    assert len((folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    report = json.loads((folder / "report-captions.json").read_text(encoding="utf-8"))
    assert report["protocol"]["seed"] == 4
    assert "captions" not in report
    assert output == format_caption_report(report) + "\n"


def test_eval_passes_precision_and_guidance_to_the_model(recipe, tiny_checkpoint, tmp_path):
    given = ("--candidates", "1", "--dtype", "bfloat16", "--guidance", "1", "--text-attention", "2")
    assert evaluate("rerank", recipe, tiny_checkpoint, *given) == 0
    report = json.loads((tmp_path / "work" / "report" / "report-rerank.json").read_text(encoding="utf-8"))
    made = report["protocol"]
    assert (made["sampling"]["guidance"], made["sampling"]["text_attention"]) == (1.0, 2.0)
    assert (made["weights"], made["adapters"]) == ("bfloat16", [])


@pytest.mark.parametrize("measure", ["scenes", "captions", "rerank", "upscale"])
def test_eval_leaves_a_result_with_its_manifest(recipe, tiny_checkpoint, tmp_path, capsys, measure):
    """The values are those of the report; a result compared with itself has no difference, and makes a page."""
    options = () if measure != "rerank" else ("--candidates", "2")
    assert evaluate(measure, recipe, tiny_checkpoint, *options, "-o", str(tmp_path / "here")) == 0
    path = tmp_path / "here" / f"result-{measure}.json"
    found = read_result(path)
    assert (found.manifest.measure, found.manifest.prompts.count) == (measure, 2)
    assert found.manifest.seeds == SeedsRecord(first=0, count=2)
    assert found.manifest.model.sha256 == hash_weights([tiny_checkpoint])
    assert len(found.manifest.settings["sprites_sha256"]) == 64
    report = json.loads((path.parent / MEASURES[measure].file).read_text(encoding="utf-8"))
    assert "items" not in report
    value, expected = {
        "scenes": ("generated.object", ["drawn", "object", "accuracy"]),
        "captions": ("true_scenes.everything", ["true_scenes", "everything", "accuracy"]),
        "rerank": ("best_by_both.2", ["best_of", 1, "best_by", "both", "accuracy"]),
        "upscale": ("upscaled.psnr", ["large_pictures", "ours", "psnr", "value"]),
    }[measure]
    for key in expected:
        report = report[key]
    assert found.results[value].value == report
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["eval", "compare", str(path), str(path), "-o", str(page)]) == 0
    assert "*" not in capsys.readouterr().out.splitlines()[1]
    assert page.is_file()


def test_eval_of_upscaling_has_the_sampling_of_that_task(recipe, tiny_checkpoint, tmp_path):
    """Upscaled images were measured with the settings of generation, which the task never has otherwise."""
    model = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["upscale_sampling"] = {"temperature": 0.3, "top_k": 5}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = {}
    for measure in ("scenes", "upscale"):
        assert evaluate(measure, recipe, model, "-o", str(tmp_path)) == 0
        found[measure] = read_result(tmp_path / f"result-{measure}.json").manifest.sampling
    assert (found["scenes"]["temperature"], found["scenes"]["top_k"]) == (0.9, 100)
    assert (found["upscale"]["temperature"], found["upscale"]["top_k"]) == (0.3, 5)


def test_items_of_scenes_have_the_mean_of_their_value(recipe, tiny_checkpoint, tmp_path):
    """A part that a scene does not ask for is not counted, in the items as in the value."""
    assert evaluate("captions", recipe, tiny_checkpoint, "-n", "9", "-o", str(tmp_path)) == 0
    found = read_result(tmp_path / "result-captions.json")
    for name, values in found.items.values.items():
        counted = [value for value in values if value is not None]
        if name in found.results:
            assert found.results[name].n == len(counted)
            assert found.results[name].value == pytest.approx(sum(counted) / len(counted))
        else:
            assert counted == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["captions", "--guidance", "2"], "--guidance has no effect on captions, only on scenes, rerank, upscale"),
        (["scenes", "--adapter", "style"], "--adapter style is added to its base model: name that with --model"),
    ],
)
def test_eval_refuses_options_without_an_effect(recipe, capsys, options, message):
    measure, *rest = options
    assert main(["eval", measure, recipe, *rest]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"protocol": []}', '{"protocol": {"model": 7}}'])
def test_read_report_refuses_damaged_content(recipe, tmp_path, content):
    """A damaged report was a KeyError or a TypeError in `cogview package`."""
    (tmp_path / "work" / "transformer-run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "work" / "report").mkdir()
    (tmp_path / "work" / "report" / "report-rerank.json").write_text(content)
    with pytest.raises(InputError, match=r"report-rerank\.json is no report of a model; evaluate again: cogview eval"):
        read_report(Recipe.open(tmp_path / "tiny.yaml"), "rerank")
