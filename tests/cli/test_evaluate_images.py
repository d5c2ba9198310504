"""``cogview eval images``: what is printed and written, and what is refused."""

import json
from pathlib import Path

import pytest

from cogview.cli.main import main
from cogview.evaluation.manifest import read_result


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys, save_image):
    """Return a function that measures folder A against B, of 12 and 9 pictures: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        save_image(f"A/{number}.png", number)
        if number < 9:
            save_image(f"B/{number}.png", number + 1)

    def run(*arguments, a="A", b="B"):
        status = main(["eval", "images", a, b, *arguments, "--device", "cpu"])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_eval_images_prints_a_table_and_writes_a_result(evaluate):
    status, out, err = evaluate("--network", "stub", "--side", "48", "--blur-sigma", "1", "--blur", "reference")
    assert status == 0
    assert out[:4] == [
        "pictures: 12 against 9",
        "resized to 48 x 48 pixels: bicubic, antialiased, crop",
        "network: mean colours (not the standard FID)",
        "blurred by sigma 1: reference",
    ]
    names = [line.split("  ")[0] for line in out[4:-1]]
    assert names == ["Fréchet distance", "KID", "precision", "recall", "Inception Score"]
    assert out[4].endswith("rank-deficient")
    assert [line.split(":")[1] for line in err] == [" rank-deficient"]
    assert out[-1] == "images.json"
    result = read_result(Path("images.json"))
    manifest = result.manifest
    assert (manifest.candidate.name, manifest.candidate.count, manifest.reference.count) == ("A", 12, 9)
    assert (manifest.resize.side, manifest.network.name, manifest.blur.which) == (48, "stub", "reference")
    assert manifest.settings["rank_deficient"] is True
    assert list(result.results) == ["fid", "kid", "precision", "recall", "inception_score"]


def test_eval_images_prints_one_json_object_and_writes_into_a_folder(evaluate):
    Path("results").mkdir()
    status, out, _ = evaluate("--network", "stub", "--json", "-o", "results")
    found = json.loads(out[0])
    assert (status, len(out), found["left_out"]) == (0, 1, 0)
    results = read_result(Path(found["result"])).results
    assert found["fid"] == results["fid"].value
    assert found["rank_deficient"] is True
    assert found["intervals"] == {name: [row.low, row.high] for name, row in results.items() if row.low is not None}
    assert found["intervals"]
    assert Path("results/images.json").is_file()


def test_eval_images_refuses_a_model_that_has_nothing_to_decode(evaluate):
    """It was accepted, and not used, between two folders."""
    status, out, err = evaluate("--network", "stub", "--model", "none")
    assert (status, out) == (2, [])
    assert "--model decodes token stores, and A and B are none: leave it out" in err[0]


def test_eval_images_takes_the_network_of_a_model(evaluate, tiny_checkpoint):
    status, out, err = evaluate("--network", str(tiny_checkpoint))
    assert status == 0
    assert out[1:3] == [
        "resized to 64 x 64 pixels: bicubic, antialiased, crop",
        "network: encoder of an image tokenizer (not the standard FID)",
    ]
    assert any("the Inception Score is left out: the network has no classes" in line for line in err)


def test_eval_images_measures_pairs(evaluate):
    status, out, err = evaluate("--pairs", b="A")
    assert (status, out[0]) == (0, "12 pairs")
    assert [line.split()[0] for line in out[1:-1]] == ["PSNR", "SSIM"]
    assert out[1].split()[2] == "100.0000"
    assert [line.split(":")[1] for line in err] == [" MS-SSIM is left out"]
    result = read_result(Path("images.json"))
    assert len(result.items.ids) == 12
    assert result.items.values["psnr"] == [100.0] * 12


def test_eval_images_names_broken_pictures_and_measures_the_others(evaluate):
    Path("A/3.png").write_bytes(b"nothing")
    status, out, err = evaluate("--network", "stub")
    assert (status, out[0]) == (1, "pictures: 11 against 9")
    assert err[-1].startswith("failed: A/3.png is no image that can be read")
    assert read_result(Path("images.json")).manifest.candidate.count == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs",), "pairs need pictures of the same names, A has 12 and B has 9; only in A: 10, 11, 9"),
        (("--pairs", "--network", "stub"), "--network and --weights have no effect on --pairs"),
        (("--pairs", "--blur-sigma", "1"), "--blur-sigma has no effect on --pairs"),
        (("--lpips", "x.pth"), "--lpips measures pairs: add --pairs"),
        (("--network", "inception"), "the network inception needs its weights: --weights weights-inception"),
        (("--network", "stub", "--weights", "x.pth"), "--weights has no effect on the network stub"),
        (
            ("--network", "none-such"),
            "none-such is none of inception, efficientnet-lite0, stub, and no model: checkpoint",
        ),
        (("--network", "stub", "--sample", "1"), "1 is not in the range x>=2"),
        (("--network", "stub", "--seed", "-1"), "-1 is not in the range x>=0"),
        (("--network", "stub", "--blur-sigma", "nan"), "nan is not a finite number"),
        (("--network", "stub", "--workers", "1000000"), "1000000 is not in the range 0<=x<=1024"),
        (("--network", "stub", "-o", "A/0.png"), "the output A/0.png exists and is no result of cogview"),
        (("--network", "stub", "-o", "A/0.png/x.json"), "the output folder A/0.png cannot be written: it is a file"),
        (("--network", "stub", "--fit", "center"), "'center' is not one of 'crop', 'pad', 'stretch'"),
    ],
)
def test_eval_images_refuses_in_one_line(evaluate, arguments, message):
    status, out, err = evaluate(*arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert not Path("images.json").exists()


def test_eval_images_refuses_a_side_that_does_not_divide_into_codes(evaluate, tiny_checkpoint):
    status, _, err = evaluate("--network", str(tiny_checkpoint), "--side", "50")
    assert (status, len(err)) == (2, 1)
    assert "images of 50 pixels do not divide into codes" in err[0]


def test_eval_images_decodes_a_store_and_equals_its_export(evaluate, tiny_checkpoint, tmp_path):
    """The pictures of ``cogview data export`` have the names and the pixels of the decoded store."""
    for number in range(12):
        Path(f"A/{number}.txt").write_text(f"一只狐狸{number}", encoding="utf-8")
    model = ("--model", str(tiny_checkpoint), "--device", "cpu")
    assert main(["data", "build", "A", "-o", "store", "--workers", "0", "--held-out", "0", *model]) == 0
    assert main(["data", "export", "store", "-o", "shards", *model]) == 0
    evaluate()  # reads what was printed
    status, out, err = evaluate("--pairs", "--model", str(tiny_checkpoint), a="store", b="shards")
    assert (status, out[0]) == (0, "12 pairs"), err
    assert out[1].split()[2] == "100.0000"
    status, _, err = evaluate("--network", "stub", a="store")
    assert status == 2
    assert "decoded by an image tokenizer: name its model with --model" in err[0]
