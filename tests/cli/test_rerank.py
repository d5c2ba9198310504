"""``cogview rerank``: scores in the order of the images, rankings, and unreadable images."""

import json
from pathlib import Path

import pytest

from cogview.pipeline.results import Ranking, Score

FOX, DOG = "一只狐狸在汽车的左边", "蓝色背景上的三只狗"


@pytest.fixture
def rerank(run_command):
    """Return a function that runs the command: (status, objects of its lines, stderr)."""

    def run(*arguments):
        status, lines, err = run_command("rerank", *arguments)
        return status, [json.loads(line) for line in lines], err

    return run


def as_objects(files, scores):
    best_first = sorted(range(len(scores)), key=lambda number: -scores[number].log_probability)
    return [
        {
            "file": file,
            "score": pytest.approx(score.log_probability, abs=1e-3),
            "per_piece": pytest.approx(score.log_probability / score.num_pieces, abs=1e-3),
            "rank": best_first.index(number) + 1,
        }
        for number, (file, score) in enumerate(zip(files, scores, strict=True))
    ]


def test_rerank_ranks_the_images_of_one_text(rerank, save_image, tiny_model):
    files = ["狐狸.png", "b.png", "c.png"]
    images = [save_image(file, number) for number, file in enumerate(files)]
    status, [found], err = rerank("--prompt", FOX, *files)
    assert status == 0
    scores = tiny_model.score(images, FOX)
    assert found == {"prompt": FOX, "ranked_by": "caption", "images": as_objects(files, scores)}
    best_first = sorted(zip(scores, files, strict=True), key=lambda pair: -pair[0].log_probability)
    printed_lines = err.splitlines()
    assert printed_lines[0] == f"model {tiny_model.name} on cpu, float32 (no GPU is used)"
    assert printed_lines[1] == FOX
    assert [line.split()[0] for line in printed_lines[2:]] == ["1.", "2.", "3."]
    assert [line.split()[-1] for line in printed_lines[2:]] == [file for _, file in best_first]
    assert f"({best_first[0][0].per_piece:.2f} per piece)" in printed_lines[2]


def test_rerank_accepts_images_around_options_folders_and_globs(rerank, save_image):
    for number, name in enumerate(("fotos/b.png", "fotos/a.png", "c.png", "d.png")):
        save_image(name, number)
    _, [found], _ = rerank("fotos", "--prompt", FOX, "c*")
    assert [image["file"] for image in found["images"]] == ["fotos/a.png", "fotos/b.png", "c.png"]


def test_rerank_reads_texts_and_images_from_a_file(rerank, save_image, tiny_model):
    images = [save_image(f"{number}.png", number) for number in range(3)]
    lines = [f"{FOX}\t0.png\t1.png\t2.png", f" {DOG} \t 2.png\t0.png", f"{FOX}\t1.png"]
    Path("input.txt").write_bytes(
        ("\ufeff" + "\r\n".join(lines)).encode()
    )  # with the byte-order mark and line ends of Windows
    expected = [
        {
            "prompt": FOX,
            "ranked_by": "caption",
            "images": as_objects(["0.png", "1.png", "2.png"], tiny_model.score(images, FOX)),
        },
        {
            "prompt": DOG,
            "ranked_by": "caption",
            "images": as_objects(["2.png", "0.png"], tiny_model.score([images[2], images[0]], DOG)),
        },
        {"prompt": FOX, "ranked_by": "caption", "images": as_objects(["1.png"], tiny_model.score([images[1]], FOX))},
    ]
    for size in ("16", "2"):
        status, found, _ = rerank("--input", "input.txt", "--max-inference-batch-size", size)
        assert (status, found) == (0, expected)


def test_rerank_lists_an_unreadable_image_with_an_error(rerank, save_image, tiny_model):
    images = [save_image("a.png", 0), save_image("b.png", 1)]
    Path("text.png").write_text("no image")
    Path("input.txt").write_text(f"{FOX}\ta.png\ttext.png\tb.png\n{DOG}\ttext.png\n{DOG}\tb.png\n", encoding="utf-8")
    status, found, err = rerank("--input", "input.txt", "--max-inference-batch-size", "1")
    assert status == 1
    problem = "text.png is no image that can be read; expected PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"
    bad = {"file": "text.png", "score": None, "per_piece": None, "rank": None, "error": problem}
    first, last = as_objects(["a.png", "b.png"], tiny_model.score(images, FOX))
    assert found == [
        {"prompt": FOX, "ranked_by": "caption", "images": [first, bad, last]},
        {"prompt": DOG, "ranked_by": "caption", "images": [bad]},
        {"prompt": DOG, "ranked_by": "caption", "images": as_objects(["b.png"], tiny_model.score([images[1]], DOG))},
    ]
    assert [line for line in err.splitlines() if line.startswith("failed: ")] == [f"failed: {problem}"]
    assert err.endswith(f"failed: {problem}\n")


def test_rerank_lists_a_name_without_a_file_with_an_error(rerank, save_image):
    save_image("a.png")
    status, [found], _ = rerank("--prompt", FOX, "*.jpg", "a.png")
    assert status == 1
    assert [(image["file"], image["rank"]) for image in found["images"]] == [("*.jpg", None), ("a.png", 1)]
    assert found["images"][0]["error"] == 'the pattern "*.jpg" matches no file'


def test_rerank_fails_when_no_image_can_be_read(rerank):
    Path("text.png").write_text("no image")
    Path("input.txt").write_text(f"{FOX}\ttext.png\tnone.png\n{DOG}\tnone.png\n", encoding="utf-8")
    status, found, err = rerank("--input", "input.txt")
    assert (status, found) == (2, [])
    assert err.splitlines()[1:] == [
        "cogview rerank: none of 2 images can be read; the first: text.png is no image that can be read; expected PNG, "
        "JPEG, WebP, GIF, BMP, TIFF or PPM"
    ]


def test_rerank_lists_texts_that_cannot_be_scored(rerank, save_image):
    save_image("a.png")
    Path("input.txt").write_text(f"{DOG * 3}\ta.png\n{FOX}\ta.png\n{DOG}\n", encoding="utf-8")
    status, found, err = rerank("--input", "input.txt")
    assert status == 1
    problem = "the prompt “蓝色背景上的三只狗蓝色背景上的三只狗蓝色…” is 27 pieces long, 20 fit; shorten it"
    assert [one["prompt"] for one in found] == [DOG * 3, FOX, DOG]
    assert found[0]["images"] == [{"file": "a.png", "score": None, "per_piece": None, "rank": None, "error": problem}]
    assert found[1]["images"][0]["rank"] == 1
    assert found[2]["images"] == []
    assert f"skipped: {problem}\n" in err
    assert f"skipped: “{DOG}” comes without an image; expected TEXT<TAB>IMAGE<TAB>IMAGE…\n" in err


def test_rerank_refuses_an_empty_prompt(rerank, save_image, no_image_is_read):
    save_image("a.png")
    status, [found], err = rerank("--prompt", " ", "a.png")
    assert status == 2
    assert found["images"][0]["error"].startswith("the prompt is empty")
    assert "skipped: the prompt is empty; describe an image" in err


def test_rerank_orders_images_by_score():
    scores = [Score(log_probability=value, num_pieces=4) if value else None for value in (-2.0, None, -1.0, -2.0)]
    files = [Path(f"{name}.png") for name in "abcd"]
    ranking = Ranking(prompt="狐狸", files=files, scores=scores, errors=[None, "b.png is broken", None, None])
    assert ranking.order == [2, 0, 3]  # equal scores keep the given order
    images = ranking.as_json()["images"]
    assert [image["rank"] for image in images] == [2, None, 1, 3]
    assert images[1] == {"file": "b.png", "score": None, "per_piece": None, "rank": None, "error": "b.png is broken"}
    assert images[2] == {"file": "c.png", "score": -1.0, "per_piece": -0.25, "rank": 1}
    assert ranking.as_text() == [
        "狐狸",
        "  1.     -1.00 (-0.25 per piece)  c.png",
        "  2.     -2.00 (-0.50 per piece)  a.png",
        "  3.     -2.00 (-0.50 per piece)  d.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png"], "give --prompt TEXT and IMAGE…, or --input FILE with lines TEXT<TAB>IMAGE<TAB>IMAGE…"),
        (["--prompt", FOX], "give --prompt TEXT and IMAGE…, or --input FILE with lines TEXT<TAB>IMAGE<TAB>IMAGE…"),
        ([], "give --prompt TEXT and IMAGE…, or --input FILE with lines TEXT<TAB>IMAGE<TAB>IMAGE…"),
        (
            ["--input", "blank.txt", "a.png"],
            "--input holds texts and images: give either --input or --prompt TEXT and ",
        ),
        (["--input", "blank.txt", "--prompt", FOX], "--input holds texts and images: give either --input or --prompt "),
        (["--input", "none.txt"], "cannot read none.txt: No such file or directory"),
        (["--input", "blank.txt"], "blank.txt is empty: expected lines TEXT<TAB>IMAGE<TAB>IMAGE…"),
        (["--prompt", FOX, "*.jpg"], 'the pattern "*.jpg" matches no file'),
        (
            ["--prompt", FOX, "a.png", "--max-inference-batch-size", "0"],
            "invalid value for '--max-inference-batch-size': \"0\" is not auto or a whole number from 1 on",
        ),
        (["--prompt", FOX, "a.png", "--model", "cogview-bse"], 'checkpoint "cogview-bse" is unknown; known: '),
        (["--prompt", FOX, "a.png", "--dtype", "int7"], "invalid value for '--dtype': 'int7' is not one of 'auto', "),
    ],
)
def test_rerank_reports_mistakes_in_one_line(rerank, save_image, no_image_is_read, arguments, message):
    save_image("a.png")
    Path("blank.txt").write_text("\n")
    status, found, err = rerank(*arguments)
    assert (status, found) == (2, [])
    assert err.startswith(f"cogview rerank: {message}")
    assert err.count("\n") == 1


def test_rerank_rejects_a_model_without_the_task(rerank, save_image, generation_checkpoint, no_image_is_read):
    save_image("a.png")
    status, found, err = rerank("--prompt", FOX, "a.png", "--model", str(generation_checkpoint))
    assert (status, found) == (2, [])
    assert err == (
        f"cogview rerank: {generation_checkpoint} was not trained for the task 'caption'; its tasks are: generate\n"
    )
