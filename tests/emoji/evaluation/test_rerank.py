"""The protocol of ``cogview eval rerank``: planted scores choose planted pictures, and the arithmetic is exact."""

# C captions, N pictures of each

from types import SimpleNamespace

import numpy as np
import pytest

from cogview.checkpoints.checkpoint import NamedThing
from cogview.emoji.evaluation.rerank import best_of, evaluate_rerank, format_rerank_report
from cogview.emoji.evaluation.scenes import held_out_scenes, wilson_interval
from cogview.errors import InputError
from cogview.modeling.config import Sampling
from cogview.pipeline.results import GeneratedImage


class Painter:
    """Draws picture ``index`` of caption ``number`` right where ``right_CN`` says so, else grey; scores are planted."""

    name = "painter"

    def __init__(self, world, seed, right_CN, scores_CN, tasks=("generate", "caption"), likelihoods_CN=None) -> None:
        self.config = SimpleNamespace(grid=8)
        self.things = tuple(NamedThing(name=thing.name) for thing in world.things)
        asked = held_out_scenes(world, len(right_CN), seed)
        self.pictures = {caption: (number, world.render(scene)) for number, (scene, caption) in enumerate(asked)}
        self.right_CN, self.scores_CN, self.tasks = right_CN, scores_CN, tasks
        self.likelihoods_CN = scores_CN if likelihoods_CN is None else likelihoods_CN
        self.drawn: list[tuple[int, int, int]] = []  # number of the caption, seed, index
        self.batches: list[int] = []

    def require_task(self, task):
        if task not in self.tasks:
            raise InputError(f"painter was not trained for the task {task!r}")

    def run(self, wishes):
        self.batches.append(len(wishes))
        for wish in wishes:
            number, pixels = self.pictures[wish.prompt]
            self.drawn.append((number, wish.seed, wish.index))
            shown = pixels if self.right_CN[number, wish.index] else np.full_like(pixels, 160)
            picture = GeneratedImage.from_pixels(shown, wish, np.empty(0), self.likelihoods_CN[number, wish.index])
            picture.wish = wish
            yield picture

    def score(self, images, texts, *, batch_size):
        assert [image.wish.prompt for image in images] == texts
        cells = [(self.pictures[image.wish.prompt][0], image.wish.index) for image in images]
        return [SimpleNamespace(log_probability=self.scores_CN[cell], num_pieces=7) for cell in cells]


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


def test_best_of_planted_grades_and_scores():
    right_CN = np.array(
        [
            [False, True, False, True],  # the best by score is right from the second picture on
            [False, False, True, False],  # there is a right one among four, and the score misses it
            [True, False, False, False],  # the score prefers a wrong one from the second picture on
            [False, False, False, False],  # nothing to find
            [False, True, True, False],  # equal scores: the first of them, which is wrong
        ]
    )
    scores_CN = np.array(
        [
            [-9.0, -2.0, -8.0, -3.0],
            [-5.0, -6.0, -7.0, -4.0],
            [-3.0, -1.0, -2.0, -4.0],
            [-1.0, -2.0, -3.0, -4.0],
            [-2.0, -2.0, -2.0, -2.0],
        ]
    )
    one, two, four = best_of(right_CN, scores_CN, (1, 2, 4))
    assert [row["of"] for row in (one, two, four)] == [1, 2, 4]
    assert [row["average"] for row in (one, two, four)] == [1 / 5, 3 / 10, 6 / 20]
    assert [row["best_by_score"]["right"] for row in (one, two, four)] == [1, 1, 1]
    assert [row["best_possible"]["right"] for row in (one, two, four)] == [1, 3, 4]
    assert [row["best_by_score"]["of"] for row in (one, two, four)] == [5, 5, 5]
    assert one["gap_closed"] is None  # one picture leaves nothing to choose
    assert two["gap_closed"] == pytest.approx((0.2 - 0.3) / (0.6 - 0.3))  # worse than chance
    assert four["gap_closed"] == pytest.approx((0.2 - 0.3) / (0.8 - 0.3))
    low, high = wilson_interval(4, 5)
    assert four["best_possible"] == {"right": 4, "of": 5, "accuracy": 0.8, "low": low, "high": high}


def test_a_score_that_knows_closes_the_whole_gap_and_one_that_knows_nothing_none_of_it():
    right_CN = np.random.default_rng(0).random((400, 8)) < 0.4
    knowing = best_of(right_CN, right_CN.astype(float), (2, 8))
    assert [row["gap_closed"] for row in knowing] == [pytest.approx(1)] * 2
    assert all(row["best_by_score"] == row["best_possible"] for row in knowing)
    (blind,) = best_of(right_CN, np.random.default_rng(1).random((400, 8)), (8,))
    assert abs(blind["gap_closed"]) < 0.1
    (sure,) = best_of(np.ones((3, 4), dtype=bool), np.zeros((3, 4)), (4,))
    assert sure["gap_closed"] is None
    assert sure["best_by_score"]["accuracy"] == sure["average"] == 1


@pytest.mark.parametrize(("scores", "sizes"), [((3, 3), (1,)), ((3, 4), (8,)), ((3, 4), (0, 2))])
def test_best_of_refuses_what_does_not_fit(scores, sizes):
    with pytest.raises(ValueError, match=r"needs grades and scores of one shape .* got \(3, 4\) and"):
        best_of(np.ones((3, 4), dtype=bool), np.zeros(scores), sizes)


def test_pictures_are_drawn_graded_and_scored_whatever_the_batches(make_tiny_world):
    world = make_tiny_world()
    rng = np.random.default_rng(3)
    right_CN, scores_CN = rng.random((5, 6)) < 0.5, rng.normal(size=(5, 6))
    likelihoods_CN = rng.normal(size=(5, 6))
    painters = [Painter(world, 40, right_CN, scores_CN, likelihoods_CN=likelihoods_CN) for _ in range(2)]
    reports = [evaluate(p, world, candidates=6, batch_size=size) for p, size in zip(painters, (7, 30), strict=True)]
    assert reports[0] == reports[1]
    rows, by_likelihood = (best_of(right_CN, values, (1, 2, 4, 6)) for values in (scores_CN, likelihoods_CN))
    assert reports[0]["best_of"] == [  # all six are used
        {**row, "best_by_likelihood": other["best_by_score"]} for row, other in zip(rows, by_likelihood, strict=True)
    ]
    assert any(row["best_by_likelihood"] != row["best_by_score"] for row in reports[0]["best_of"])
    assert painters[0].batches == [7, 7, 7, 7, 2]
    assert painters[0].drawn == [(number, 40 + number, index) for number in range(5) for index in range(6)]
    made = reports[0]["protocol"]
    assert (made["captions"], made["pictures_of_each"], made["seed"], made["model"]) == (5, 6, 40, "painter")
    assert made["sampling"]["top_k"] == 9


def test_sixteen_pictures_are_reported_by_powers_of_two(make_tiny_world):
    world = make_tiny_world()
    grades = np.ones((2, 16), dtype=bool)
    report = evaluate(Painter(world, 40, grades, np.zeros((2, 16))), world, candidates=16)
    assert [row["of"] for row in report["best_of"]] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("missing", ["generate", "caption"])
def test_a_model_that_lacks_a_task_draws_nothing(make_tiny_world, missing):
    world = make_tiny_world()
    grades = np.ones((1, 2), dtype=bool)
    tasks = {"generate", "caption", "upscale"} - {missing}
    painter = Painter(world, 40, grades, np.zeros((1, 2)), tasks)
    with pytest.raises(InputError, match=missing):
        evaluate(painter, world, candidates=2)
    assert painter.drawn == []


def test_a_real_model_is_measured(make_tiny_world, tiny_model):
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


def test_the_report_as_a_table():
    share = {"right": 9, "of": 10, "accuracy": 0.9, "low": 0.596, "high": 0.982}
    rows = [
        {"of": 1, "average": 0.9, "best_by_score": share, "best_possible": share, "gap_closed": None},
        {"of": 16, "average": 0.8034, "best_by_score": share, "best_possible": share, "gap_closed": 0.6246},
    ]
    rows = [{**row, "best_by_likelihood": {**share, "accuracy": 0.7}} for row in rows]
    report = {"protocol": {"captions": 10}, "best_of": rows}
    lines = format_rerank_report(report).splitlines()
    assert lines[2] == "| 1 | 90.0% | 90.0% (59.6%–98.2%) | 90.0% (59.6%–98.2%) | – | 70.0% (59.6%–98.2%) |"
    assert lines[3] == "| 16 | 80.3% | 90.0% (59.6%–98.2%) | 90.0% (59.6%–98.2%) | 62.5% | 70.0% (59.6%–98.2%) |"
    assert lines[-1] == "Pictures with everything right, drawn of 10 held-out captions."
