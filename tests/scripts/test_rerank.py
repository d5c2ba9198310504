"""``scripts/rerank.py``: each line, and the scores of its images in their order."""

import math
from pathlib import Path

import pytest

FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"
TASK = ("--generation-task", "post-selection")


def numbers(line):
    return [float(field) for field in line.split("\t") if field]


@pytest.mark.parametrize("script", ["rerank", "generate_samples"])
def test_rerank_script_accepts_the_command_line_of_v1(run_script, v1_flags, save_image, tiny_model, script):
    """The flags are those of its scripts/post_selection.sh."""
    images = [save_image(f"{number}.png", number) for number in range(3)]
    lines = [f"{FOX}\t0.png\t1.png\t2.png", f"{DOG}\t2.png"]
    Path("input_select.txt").write_text("\n".join(lines), encoding="utf-8")
    options = ("--input-source", "input_select.txt", "--output-path", "samples_post_selection")
    status, printed, _ = run_script(script, *v1_flags, *TASK, *options)
    assert status == 0
    assert [printed[0], printed[2]] == lines
    scores = tiny_model.score(images, FOX), tiny_model.score(images[2:], DOG)
    for line, expected in zip((printed[1], printed[3]), scores, strict=True):
        assert numbers(line) == pytest.approx([score.log_probability for score in expected], abs=1e-3)
    written = Path("samples_post_selection/scores.txt").read_bytes().decode()
    assert written == "".join(f"{line}\n" for line in printed)


def test_rerank_script_keeps_the_columns_of_scores(run_script, save_image):
    for number in range(2):
        save_image(f"{number}.png", number)
    lines = [f"{FOX}\t0.png\tnone.png\t1.png", f"{DOG}\tnone.png", f"{DOG * 3}\t0.png\t1.png", DOG, f"{DOG}\t1.png"]
    Path("input.txt").write_text("\n".join(lines), encoding="utf-8")
    status, printed, err = run_script("rerank", "--input-source", "input.txt", "--max-inference-batch-size", "1")
    assert status == 1
    assert printed[::2] == lines
    assert [[math.isnan(score) for score in numbers(line)] for line in printed[1::2]] == [
        [False, True, False],
        [True],
        [True, True],
        [],
        [False],
    ]
    assert err.count("failed: image none.png does not exist\n") == 1
    assert "is 27 pieces long, 20 fit; shorten it\n" in err


def test_rerank_script_returns_1_for_an_unreadable_image(run_script, save_image):
    save_image("a.png")
    Path("input.txt").write_text(f"{FOX}\tnone.png\ta.png\n", encoding="utf-8")
    status, printed, _ = run_script("rerank", "--input-source", "input.txt")
    assert (status, len(printed)) == (1, 2)


def test_rerank_script_separates_ids_from_texts(run_script, save_image, tiny_model):
    image = save_image("a.png")
    Path("input.txt").write_text(f"0017\t{FOX}\ta.png\n", encoding="utf-8")
    status, printed, _ = run_script("rerank", "--input-source", "input.txt", "--with-id")
    assert (status, printed[0]) == (0, f"0017\t{FOX}\ta.png")
    assert numbers(printed[1]) == pytest.approx([tiny_model.score([image], FOX)[0].log_probability], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "post-selection takes lines TEXT<TAB>IMAGE<TAB>IMAGE… from a file: give it with --input-source"),
        (["--generation-task", "text2image"], "--generation-task text2image is unknown; known: post-selection\n"),
        (["--input-source", "none.txt"], "cannot read none.txt: No such file or directory"),
        (["--input-source", "input.txt", "--load", "cogview-bse"], 'checkpoint "cogview-bse" is unknown; known: '),
    ],
)
def test_rerank_script_reports_mistakes_in_one_line(run_script, arguments, message):
    Path("input.txt").write_text(f"{FOX}\tnone.png\n", encoding="utf-8")
    status, printed, err = run_script("rerank", *arguments)
    assert (status, printed) == (2, [])
    assert err.startswith(f"rerank.py: {message}")
    assert err.count("\n") == 1


def test_rerank_script_fails_when_no_image_can_be_read(run_script):
    Path("input.txt").write_text(f"{FOX}\tnone.png\n", encoding="utf-8")
    status, printed, err = run_script("rerank", "--input-source", "input.txt")
    assert (status, printed) == (2, [])
    assert err.endswith("rerank.py: image none.png does not exist\n")
    assert not Path("samples/scores.txt").exists()
