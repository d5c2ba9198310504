"""Grade generated pictures against planted answers: a fake generator that returns the right or a wrong picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 8


@pytest.fixture
def grader(load_script, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts/benchmarks"))
    return load_script("own_pictures")


@pytest.fixture
def pictures(grader):
    """Five pictures: two share a caption, one has two, and one is held out."""
    images = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    captions = [("红苹果",), ("鱼",), ("鱼", "一条鱼"), ("狐狸",), ("猫",)]
    return [
        grader.KnownPicture(image=image, captions=texts, held_out="猫" in texts)
        for image, texts in zip(images, captions, strict=True)
    ]


def noisy(image):
    """Return a picture that is not equal to ``image`` but near it."""
    return np.clip(image.astype(int) + 9, 0, 255).astype(np.uint8)


def test_measure_counts_pictures_drawn_back(grader, pictures):
    own = {"红苹果": 0, "鱼": 1, "一条鱼": 2, "狐狸": 3}
    report, generated = grader.measure(
        pictures, lambda texts: [noisy(pictures[own[text]].image) for text in texts], noisy
    )
    assert (report["pictures"], report["training_pictures"], report["captions"]) == (5, 4, 4)
    assert report["nearest_is_own"]["right"] == 4
    assert report["nearest_of_reconstructions"]["accuracy"] == 1
    assert report["wrong"] == []
    assert list(generated) == ["红苹果", "鱼", "一条鱼", "狐狸"]  # not the held-out 猫


def test_measure_takes_every_picture_of_a_shared_caption_as_right(grader, pictures):
    # Right: 鱼 as its second picture. Wrong: 一条鱼 as the picture that is only called 鱼, 狐狸 as a held-out cat.
    drawn = {"红苹果": 0, "鱼": 2, "一条鱼": 1, "狐狸": 4}
    report, _ = grader.measure(pictures, lambda texts: [pictures[drawn[text]].image for text in texts], noisy)
    assert report["captions_of_several_pictures"] == 1
    assert report["nearest_is_own"]["right"] == 2
    assert report["wrong"] == ["一条鱼", "狐狸"]


def test_evenly_chosen_captions_are_spread_over_all(grader):
    assert grader.evenly_chosen("abcdefg", 3) == ["a", "c", "e"]
    assert grader.evenly_chosen("abc", 3) == grader.evenly_chosen("abc", None) == grader.evenly_chosen("abc", 9)


def test_nearest_equals_the_definition(grader, pictures):
    images = np.random.default_rng(1).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)
    expected = [
        int(np.argmin([np.square(image.astype(float) - picture.image).mean() for picture in pictures]))
        for image in images
    ]
    assert grader.nearest(images, pictures).tolist() == expected


def test_measure_counts_reconstructions_nearest_to_another_picture(grader, pictures):
    report, _ = grader.measure(
        pictures, lambda texts: [pictures[0].image for _ in texts], lambda images: np.roll(images, 1, axis=0)
    )
    assert report["nearest_of_reconstructions"]["right"] == 0


def test_merged_copies_are_one_picture_with_all_captions(grader):
    from cogview.data.builders.prepare import PreparedPicture

    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    first, second, other = (
        PreparedPicture(record=None, digest=digest * 16, captions=captions, images={"image": image})
        for digest, captions in (("0", ("法国国旗",)), ("0", ("法属圭亚那国旗",)), ("f", ("国旗",)))
    )
    unusable = PreparedPicture(record=None, left_out=("broken",))
    found = grader.merged([first, unusable, second, other], held_out=0.05)
    assert [(one.captions, one.held_out) for one in found] == [
        (("法国国旗", "法属圭亚那国旗"), True),
        (("国旗",), False),
    ]


def test_main_measures_a_model_and_writes_a_sheet(grader, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(2)
    (tmp_path / "pictures").mkdir()
    for name in ("狐狸", "狗", "苹果"):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f"pictures/{name}.png")
        (tmp_path / f"pictures/{name}.txt").write_text(f"一只{name}\n", encoding="utf8")
    (tmp_path / "own.yaml").write_text(
        "work: runs\nencode: {pictures: [pictures], side: 64, text_width: 20, held_out: 0}\n", encoding="utf8"
    )
    (tmp_path / "runs/transformer-run").mkdir(parents=True)
    losses = "".join(f'{{"step": {step}, "validation_generate_image_loss": {9 - step}}}\n' for step in (1, 2))
    (tmp_path / "runs/transformer-run/metrics.jsonl").write_text(losses, encoding="utf8")
    status = grader.main(
        ["own.yaml", "--model", str(tiny_checkpoint), "-o", "sheet.png", "--captions", "2", "--json", "found.json"]
    )
    assert status == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf8"))
    assert (found["pictures"], found["captions"], found["nearest_is_own"]["of"]) == (3, 2, 2)
    assert found["held_out_loss"] == {"first": 8, "lowest": 7, "last": 7}
    assert "3 training pictures of 3" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 3 * 64
