"""``cogview eval image-tokenizer``: what is measured, printed, saved and refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cogview.cli.main import main
from cogview.evaluation.manifest import ResizeRecord, read_result


@pytest.fixture
def evaluate(tiny_checkpoint, tmp_path, monkeypatch, capsys, save_image):
    """Return a function that measures the tiny image tokenizer in a folder with pictures: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        save_image(f"pictures/{'ab'[number % 2]}/{number}.png", number, (70, 64 + number))

    def run(*arguments, folder=tiny_checkpoint):
        status = main(["eval", "image-tokenizer", str(folder), *arguments, "--device", "cpu"])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_eval_image_tokenizer_prints_measures_and_saves_a_sheet(evaluate):
    status, out, err = evaluate("pictures")
    assert (status, err) == (0, [])
    assert out[0] == "5 pictures of 64 x 64 pixels"  # the side of the model's images
    assert [line.split()[0] for line in out[1:4]] == ["PSNR", "SSIM", "codes"]
    assert out[4:] == ["reconstructions.png", "reconstructions.json"]
    with Image.open("reconstructions.png") as sheet:
        assert sheet.size == (5 * 132 + 4, 2 * 132 + 4)


def test_eval_image_tokenizer_prints_one_json_object(evaluate, tiny_checkpoint):
    status, out, _ = evaluate(
        *("pictures/a", "pictures/b/1.png", "--json", "--side", "32", "--fit", "pad", "-o", "out/sheet.png")
    )
    assert (status, len(out)) == (0, 1)
    found = json.loads(out[0])
    assert (found["pictures"], found["left_out"], found["side"], found["fit"]) == (4, 0, 32, "pad")
    assert {"psnr", "psnr_p05", "psnr_median", "ssim", "codes", "codes_used", "perplexity"} <= found.keys()
    assert found["sheet"] == str(Path("out/sheet.png"))
    again = json.loads(evaluate("pictures/a", "pictures/b/1.png", "--json", "--side", "32", "--fit", "pad")[1][0])
    assert again["psnr"] == found["psnr"]
    alone = evaluate("pictures/a", "pictures/b/1.png", "--json", folder=tiny_checkpoint / "image")[1][0]
    assert json.loads(alone)["side"] == 64  # of a tokenizer without its model


def test_eval_image_tokenizer_replaces_no_other_file_by_its_result(evaluate):
    """The result lies beside the sheet, so that ``-o labels.png`` would have replaced ``labels.json``."""
    Path("labels.json").write_text("[1]", encoding="utf-8")
    status, out, err = evaluate("pictures", "-o", "labels.png")
    assert (status, out, len(err)) == (2, [], 1)
    assert "labels.json exists and is no result of cogview, so that it is not replaced" in err[0]
    assert Path("labels.json").read_text(encoding="utf-8") == "[1]"
    assert not Path("labels.png").exists()


def test_eval_image_tokenizer_writes_a_result_of_its_pictures(evaluate, tiny_checkpoint):
    """The order and the names of pictures do not count, their contents do."""
    found = json.loads(evaluate("pictures", "--json")[1][0])
    assert found["result"] == "reconstructions.json"
    result = read_result(Path("reconstructions.json"))
    assert result.results["psnr"].value == found["psnr"]
    assert result.results["ssim"].value == pytest.approx(found["ssim"])
    assert result.manifest.resize == ResizeRecord(side=64, filter="lanczos", antialias=True, fit="crop")
    assert len(set(result.items.ids)) == result.manifest.reference.count == 5
    Path("pictures/a/0.png").rename("pictures/b/last.png")
    evaluate("pictures", folder=tiny_checkpoint / "image")
    again = read_result(Path("reconstructions_2.json"))
    assert again.manifest.reference.sha256 == result.manifest.reference.sha256
    assert again.manifest.model.sha256 == result.manifest.model.sha256
    assert main(["eval", "compare", "reconstructions.json", "reconstructions_2.json"]) == 0


def test_eval_image_tokenizer_writes_the_sheet_into_a_folder(evaluate):
    """A file ``out_2`` without a suffix was written beside the folder."""
    Path("out").mkdir()
    assert evaluate("pictures", "-o", "out")[1][-2] == "out/reconstructions.png"
    assert sorted(path.name for path in Path().iterdir()) == ["out", "pictures"]


def test_eval_image_tokenizer_measures_the_others_when_pictures_are_broken(evaluate):
    Path("pictures/broken.png").write_bytes(b"nothing")
    status, out, err = evaluate("pictures")
    assert (status, out[0]) == (1, "5 pictures of 64 x 64 pixels")
    assert err == [
        "failed: pictures/broken.png is no image that can be read; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"
    ]
    status, out, err = evaluate("pictures/broken.png")
    assert (status, out, len(err)) == (2, [], 1)
    assert "none of 1 picture can be used; the first: pictures/broken.png is no image" in err[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none",), "the source none does not exist; expected a picture, a folder"),
        (
            ("pictures", "--side", "33"),
            "codes of 8 x 8 pixels; the nearest sides that fit: 32 and 40",
        ),
        (("pictures", "--side", "8"), "8 is not in the range 16<=x<=4096"),
        ((), "missing argument 'PICTURES...'"),
    ],
)
def test_eval_image_tokenizer_refuses_in_one_line(evaluate, arguments, message):
    status, out, err = evaluate(*arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert not Path("reconstructions.png").exists()
