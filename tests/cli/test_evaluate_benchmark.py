"""``cogview eval benchmark``: layouts, interrupted runs, scores of files, and what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cogview.cli.main import main
from cogview.evaluation.field_benchmarks import runner
from cogview.evaluation.manifest import SeedsRecord, read_result, unlike_fields

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "apple", "count": 1}], "prompt": "一个红苹果"},
    {"tag": "single_object", "include": [{"class": "fox", "count": 1}], "prompt": "一只狐狸"},
]
DPG = """item_id,text,proposition_id,dependency,tuple,question_natural_language
vg1,一只狐狸,1,0,entity - whole (fox),Is there a fox?
partiprompts97,一个红苹果,1,0,entity - whole (apple),Is there an apple?
"""
ONEIG = "category,id,prompt_cn,class\nAnime_Stylization,000,一只狐狸,\nText_Rendering,001,一个红苹果,\n"
WORDS = "level\ttext\tprompt\n1\t一\t一个红苹果\n3\t鿍\t一只狐狸\n"


@pytest.fixture
def benchmark(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command with the tiny model in an empty folder: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    Path("geneval.jsonl").write_text("\n".join(map(json.dumps, GENEVAL)), encoding="utf-8")
    Path("dpg.csv").write_text(DPG, encoding="utf-8")
    Path("oneig.csv").write_text(ONEIG, encoding="utf-8")
    Path("words.tsv").write_text(WORDS, encoding="utf-8")

    def run(name, prompts, *arguments):
        options = ["--model", str(tiny_checkpoint), "--device", "cpu", "--subset", "-o", "out"]
        status = main(["eval", "benchmark", name, "--prompts", prompts, *options, *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def files(folder):
    """Return the contents of all files of a folder by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def test_eval_benchmark_writes_the_layout_of_geneval(benchmark):
    status, out, _ = benchmark("geneval", "geneval.jsonl", "--seed", "7")
    assert (status, out) == (0, ["out/pictures"])
    names = [name for name in files("out/pictures") if name.endswith(".png")]
    assert names == [f"{item:05}/samples/{sample:04}.png" for item in range(2) for sample in range(4)]
    assert json.loads(Path("out/pictures/00001/metadata.jsonl").read_text(encoding="utf-8")) == GENEVAL[1]


@pytest.mark.parametrize(
    ("name", "prompts", "expected"),
    [
        ("dpg", "dpg.csv", ["partiprompts97.png", "vg1.png"]),
        ("oneig-zh", "oneig.csv", ["anime/MODEL/000.png", "text/MODEL/001.png"]),
    ],
)
def test_eval_benchmark_joins_four_pictures_to_a_grid(benchmark, tiny_checkpoint, name, prompts, expected):
    assert benchmark(name, prompts)[0] == 0
    assert sorted(files("out/pictures")) == [path.replace("MODEL", tiny_checkpoint.name) for path in expected]
    with Image.open(next(Path("out/pictures").rglob("*.png"))) as grid, Image.open("out/single/00000-3.png") as last:
        assert grid.size == (2 * last.width, 2 * last.height)
    with Image.open(
        Path("out/pictures", expected[-1 if name == "dpg" else 0].replace("MODEL", tiny_checkpoint.name))
    ) as grid:
        corners = [
            grid.crop((x, y, x + last.width, y + last.height)) for y in (0, last.height) for x in (0, last.width)
        ]
        for number, corner in enumerate(corners):
            with Image.open(f"out/single/00000-{number}.png") as single:
                assert corner.tobytes() == single.convert("RGB").tobytes()


@pytest.mark.parametrize(("name", "prompts"), [("geneval", "geneval.jsonl"), ("dpg", "dpg.csv")])
def test_eval_benchmark_continues_an_interrupted_run(benchmark, monkeypatch, name, prompts):
    """The folder equals that of an uninterrupted run, and no picture is generated twice."""
    assert benchmark(name, prompts, "--seed", "7")[0] == 0
    whole = files("out")
    Path("out").rename("whole")
    written = []

    def write(path, image, metadata, *, limit=3):
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(str(path))
        kept(path, image, metadata)

    kept = runner.write_png
    monkeypatch.setattr(runner, "write_png", write)
    assert benchmark(name, prompts, "--seed", "7")[0] != 0
    assert len([path for path in files("out") if path.endswith(".png")]) == 3
    monkeypatch.setattr(runner, "write_png", lambda *arguments: write(*arguments, limit=100))
    assert benchmark(name, prompts, "--seed", "7", "--max-inference-batch-size", "1")[0] == 0
    assert files("out") == whole
    assert len(written) == len(set(written)) == len([path for path in whole if path.endswith(".png")])
    status, _, err = benchmark(name, prompts, "--seed", "7")
    assert (status, err[-2]) == (
        0,
        f"8 pictures of {'GenEval' if name == 'geneval' else 'DPG-Bench'}, generated now: 0",
    )


def test_eval_benchmark_refuses_a_folder_of_another_run(benchmark):
    assert benchmark("geneval", "geneval.jsonl", "--samples", "1")[0] == 0
    for arguments, field in (
        (("--samples", "1", "--seed", "1"), "seed (0, now 1)"),
        ((), "samples (1, now 4)"),
        (("--samples", "1", "--top-k", "1"), "sampling ("),
    ):
        status, out, err = benchmark("geneval", "geneval.jsonl", *arguments)
        assert (status, out) == (2, [])
        assert f"out holds pictures of another run, with another {field}" in err[-1]
    status, _, err = benchmark("dpg", "dpg.csv")
    assert (status, len(err)) == (2, 1)
    assert "with another benchmark (geneval, now dpg)" in err[0]


def test_eval_benchmark_scores_a_file_without_a_model(benchmark):
    rows = [
        {"picture": "out/pictures/1/U+4E00-0.png", "text": "一"},
        {"picture": "out/pictures/3/U+9FCD-0.png", "text": ""},
    ]
    Path("read.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    status, out, err = benchmark("chinese-word", "words.tsv", "--answers", "read.jsonl")
    assert (status, err) == (0, ["written to out/result.json"])
    assert [line.split()[:2] for line in out[1:]] == [
        ["overall", "0.6856"],
        ["level_1", "1.0000"],
        ["level_3", "0.0000"],
    ]
    status, out, _ = benchmark("chinese-word", "words.tsv", "--answers", "read.jsonl", "--json")
    assert json.loads(out[0])["results"]["overall"]["value"] == pytest.approx(3500 / 5105)


def test_eval_benchmark_writes_a_result_with_the_model_of_its_pictures(benchmark, tiny_checkpoint):
    assert benchmark("geneval", "geneval.jsonl", "--samples", "1", "--seed", "7", "--top-k", "3")[0] == 0
    rows = [{"filename": f"{item:05}/samples/0000.png", "correct": item == 0} for item in range(2)]
    Path("found.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert benchmark("geneval", "geneval.jsonl", "--samples", "1", "--detections", "found.jsonl")[0] == 0
    result = read_result(Path("out/result.json"))
    assert (result.results["overall"].value, result.results["overall"].n) == (0.5, 2)
    manifest = result.manifest
    assert (manifest.measure, manifest.seeds, manifest.prompts.count) == ("geneval", SeedsRecord(first=7, count=2), 2)
    assert (manifest.model.name, manifest.sampling["top_k"]) == (tiny_checkpoint.name, 3)
    assert manifest.settings == {"samples": 1, "subset": True}
    assert result.items.values["single_object"] == [1.0, 0.0]
    Path("found.jsonl").write_text("\n".join(json.dumps({**row, "correct": True}) for row in rows), encoding="utf-8")
    assert benchmark("geneval", "geneval.jsonl", "--samples", "1", "--detections", "found.jsonl")[0] == 0
    again = read_result(Path("out/result.json"))
    assert (again.results["overall"].value, unlike_fields(manifest, again.manifest)) == (1.0, [])


def test_eval_benchmark_refuses_answers_on_pictures_of_another_run(benchmark):
    assert benchmark("geneval", "geneval.jsonl", "--samples", "1")[0] == 0
    rows = [{"filename": f"{item:05}/samples/{k:04}.png", "correct": True} for item in range(2) for k in range(4)]
    Path("found.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    status, _, err = benchmark("geneval", "geneval.jsonl", "--detections", "found.jsonl")
    assert (status, len(err)) == (2, 1)
    assert "out/run.json is of another run than the answers, with another samples; give its folder with -o" in err[0]
    assert not Path("out/result.json").exists()


def test_eval_benchmark_says_that_models_cannot_edit(benchmark):
    edit = {"key": "a", "task_type": "color_alter", "instruction": "换成红色", "instruction_language": "cn"}
    Path("edits.jsonl").write_text(json.dumps(edit), encoding="utf-8")
    status, out, err = benchmark("gedit", "edits.jsonl")
    assert (status, out, len(err)) == (2, [], 1)
    assert "GEdit-Bench edits pictures, which no model of this version can do; give --answers" in err[0]


def test_eval_benchmark_refuses_prompts_that_the_model_cannot_use(benchmark):
    rows = [GENEVAL[0], {**GENEVAL[1], "prompt": "狐狸" * 100}]
    Path("long.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    status, out, err = benchmark("geneval", "long.jsonl")
    assert (status, out) == (2, [])
    assert "the model cannot use 1 of 2 prompts, and none may be left out; the first: the prompt “狐狸" in err[-1]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("geneval", "none.jsonl"), "cannot read none.jsonl"),
        (("dpg", "geneval.jsonl"), "geneval.jsonl, line 1: item_id is missing"),
        (("dpg", "dpg.csv", "--samples", "3"), "DPG-Bench joins pictures to a grid: --samples must be 1 or 4, got 3"),
        (("dpg", "dpg.csv", "--answers", "words.tsv"), "words.tsv, line 2: picture is missing"),
    ],
)
def test_eval_benchmark_refuses_in_one_line(benchmark, arguments, message):
    status, out, err = benchmark(*arguments)
    assert (status, out) == (2, [])
    assert message in err[-1]


@pytest.fixture
def coco(benchmark, save_image):
    """Return a function that measures generated pictures of four captions against other pictures."""
    Path("captions.tsv").write_text(
        "id\tcaption\n9\t一只狐狸\n10\t一个红苹果\n11\t一只狐狸\n12\t一只猫\n", encoding="utf-8"
    )
    for number in range(5):
        save_image(f"true/{number}.png", number)
    assert benchmark("coco-30k", "captions.tsv")[0] == 0
    return lambda *arguments: benchmark("coco-30k", "captions.tsv", "--network", "stub", *arguments)


def test_eval_benchmark_measures_blurred_distances_of_coco(coco):
    """FID-k equals the distance of `eval images` at that blur; equal sets have none where both are blurred."""
    assert sorted(files("out/pictures")) == ["10.png", "11.png", "12.png", "9.png"]
    status, out, err = coco("--reference", "true", "--json")
    found = {name: value["value"] for name, value in json.loads(out[0])["results"].items()}
    assert (status, list(found)) == (0, [f"fid_{k}" for k in (0, 1, 2, 4, 8)])
    for k in (0, 2):
        options = ["--network", "stub", "--side", "256", "--blur-sigma", str(k), "-o", f"{k}.json", "--device", "cpu"]
        assert main(["eval", "images", "out/pictures", "true", *options]) == 0
        assert found[f"fid_{k}"] == pytest.approx(read_result(Path(f"{k}.json")).results["fid"].value, rel=1e-6)
    assert "rank-deficient: the covariance of 48 dimensions needs more pictures" in err[0]
    result = read_result(Path("out/result.json"))
    assert (result.manifest.blur.which, result.manifest.settings["sigmas"]) == ("both", [0, 1, 2, 4, 8])
    assert (result.manifest.reference.count, result.manifest.candidate.count, result.manifest.prompts.count) == (
        5,
        4,
        4,
    )
    assert result.curves["fid_k"].y == list(found.values())


@pytest.mark.parametrize("which", ["both", "reference"])
def test_eval_benchmark_blurs_both_sets_or_the_reference(coco, which):
    status, out, _ = coco("--reference", "out/pictures", "--blur", which, "--json")
    found = [value["value"] for value in json.loads(out[0])["results"].values()]
    assert (status, found[0]) == (0, pytest.approx(0, abs=1e-9))
    assert all(value == pytest.approx(0, abs=1e-9) for value in found) == (which == "both")


def test_eval_benchmark_refuses_sets_that_cannot_be_compared(coco, benchmark):
    for change, arguments, message in (
        (lambda: None, ("--reference", "none"), "none does not exist"),
        (lambda: None, ("--answers", "captions.tsv"), "MS-COCO-30k has no answers: compare its pictures"),
        (
            lambda: Path("out/pictures/7.png").write_bytes(Path("true/0.png").read_bytes()),
            ("--reference", "true"),
            "out/pictures has 5 pictures, the prompts ask for 4",
        ),
        (
            lambda: Path("out/pictures/9.png").unlink(),
            ("--reference", "true"),
            "1 of 4 pictures are missing, first out/pictures/9.png",
        ),
    ):
        change()
        status, out, err = coco(*arguments)
        assert (status, out, len(err)) == (2, [], 1)
        assert message in err[0]
    status, _, err = benchmark("geneval", "geneval.jsonl", "--reference", "true")
    assert (status, len(err)) == (2, 1)
    assert "--reference measures the pictures of coco-30k alone; leave it out" in err[0]
