"""Protocol of ``cogview eval rerank``: planted scores choose planted images, and the arithmetic is exact."""

# C captions, N images of each

from types import SimpleNamespace

import numpy as np
import pytest

from cogview.checkpoints.checkpoint import NamedThing
from cogview.emoji.evaluation.rerank import evaluate_rerank, format_rerank_report
from cogview.emoji.evaluation.scenes import held_out_scenes
from cogview.errors import InputError
from cogview.evaluation.metrics import best_of
from cogview.modeling.config import Sampling
from cogview.pipeline.results import GeneratedImage


class Painter:
    """Generates image ``index`` of caption ``number``, right by ``right_CN`` or grey; scores are planted."""

    name = "painter"

    def __init__(self, world, seed, right_CN, scores_CN, tasks=("generate", "caption"), both_CN=None) -> None:
        self.config = SimpleNamespace(grid=8)
        self.things = tuple(NamedThing(name=thing.name) for thing in world.things)
        self.image_tokenizer = SimpleNamespace(downsampling=8)
        asked = held_out_scenes(world, len(right_CN), seed)
        self.images = {caption: (number, world.render(scene)) for number, (scene, caption) in enumerate(asked)}
        self.right_CN, self.tasks = right_CN, tasks
        both_CN = scores_CN if both_CN is None else both_CN
        self.scores = {"caption": scores_CN, "picture": -scores_CN, "both": both_CN}
        self.generated: list[tuple[int, int, int]] = []  # number of the caption, seed, index
        self.batches: list[int] = []

    def require_task(self, task):
        if task not in self.tasks:
            raise InputError(f"painter was not trained for the task {task!r}")

    def run(self, requests):
        self.batches.append(len(requests))
        for request in requests:
            number, pixels = self.images[request.prompt]
            self.generated.append((number, request.seed, request.index))
            shown = pixels if self.right_CN[number, request.index] else np.full_like(pixels, 160)
            image = GeneratedImage.from_pixels(shown, request, np.empty(0), 0.0)
            image.request = request
            yield image

    def score(self, images, texts, *, by, batch_size):
        assert [image.request.prompt for image in images] == texts
        cells = [(self.images[image.request.prompt][0], image.request.index) for image in images]
        return [SimpleNamespace(log_probability=self.scores[by][cell], num_pieces=7) for cell in cells]


def evaluate(painter, world, *, candidates, batch_size=7):
    return evaluate_rerank(
        painter,
        world,
        captions=len(painter.right_CN),
        candidates=candidates,
        seed=40,
        sampling=Sampling(top_k=9),
        batch_size=batch_size,
    )


def test_evaluate_rerank_does_not_depend_on_the_batches(make_tiny_world):
    world = make_tiny_world()
    rng = np.random.default_rng(3)
    right_CN, scores_CN = rng.random((5, 6)) < 0.5, rng.normal(size=(5, 6))
    both_CN = rng.normal(size=(5, 6))
    painters = [Painter(world, 40, right_CN, scores_CN, both_CN=both_CN) for _ in range(2)]
    reports = [evaluate(p, world, candidates=6, batch_size=size) for p, size in zip(painters, (7, 30), strict=True)]
    assert reports[0] == reports[1]
    for rule, values in (("caption", scores_CN), ("picture", -scores_CN), ("both", both_CN)):
        for row, expected in zip(reports[0]["best_of"], best_of(right_CN, values, (1, 2, 4, 6)), strict=True):
            assert row["best_by"][rule] == expected["best_by_score"]
            assert row["gap_closed"][rule] == expected["gap_closed"]
            assert [row[name] for name in ("of", "average", "best_possible")] == [
                expected[name] for name in ("of", "average", "best_possible")
            ]
    assert any(row["best_by"]["both"] != row["best_by"]["caption"] for row in reports[0]["best_of"])
    assert painters[0].batches == [7, 7, 7, 7, 2]
    assert painters[0].generated == [(number, 40 + number, index) for number in range(5) for index in range(6)]
    made = reports[0]["protocol"]
    assert (made["captions"], made["pictures_of_each"], made["seed"], made["model"]) == (5, 6, 40, "painter")
    assert made["sampling"]["top_k"] == 9


def test_evaluate_rerank_reports_powers_of_two(make_tiny_world):
    world = make_tiny_world()
    grades = np.ones((2, 16), dtype=bool)
    report = evaluate(Painter(world, 40, grades, np.zeros((2, 16))), world, candidates=16)
    assert [row["of"] for row in report["best_of"]] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("missing", ["generate", "caption"])
def test_evaluate_rerank_refuses_a_model_without_a_task(make_tiny_world, missing):
    world = make_tiny_world()
    grades = np.ones((1, 2), dtype=bool)
    tasks = {"generate", "caption", "upscale"} - {missing}
    painter = Painter(world, 40, grades, np.zeros((1, 2)), tasks)
    with pytest.raises(InputError, match=missing):
        evaluate(painter, world, candidates=2)
    assert painter.generated == []


def test_evaluate_rerank_measures_a_real_model(make_tiny_world, tiny_model):
    report = evaluate_rerank(
        tiny_model,
        make_tiny_world(things=4),
        captions=2,
        candidates=3,
        seed=0,
        sampling=tiny_model.sampling(),
        batch_size=4,
    )
    assert [row["of"] for row in report["best_of"]] == [1, 2, 3]


def test_format_rerank_report_is_a_table():
    share = {"right": 9, "of": 10, "accuracy": 0.9, "low": 0.596, "high": 0.982}
    best = {"caption": share, "picture": {**share, "accuracy": 0.7}, "both": share}
    row = {"of": 16, "average": 0.8034, "best_possible": share, "best_by": best, "gap_closed": dict.fromkeys(best, 0.6)}
    lines = format_rerank_report({"protocol": {"captions": 10}, "best_of": [row]}).splitlines()
    assert lines[0].endswith("| best by caption | best by picture | best by both |")
    assert lines[2] == (
        "| 16 | 80.3% | 90.0% (59.6%–98.2%) | 90.0% (59.6%–98.2%) | 70.0% (59.6%–98.2%) | 90.0% (59.6%–98.2%) |"
    )
    assert lines[-1] == "Images with everything right, of 10 held-out captions."
