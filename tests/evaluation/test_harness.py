"""Generic evaluation: images of captions, graders of any reference, and the choice of sampling settings."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from cogview.evaluation.harness import (
    TUNING_SEED,
    choose_sampling,
    describe_protocol,
    generate_images,
    grade_images,
)
from cogview.evaluation.metrics import accuracy
from cogview.modeling.config import Sampling

CAPTIONS = [f"第{number}张图片" for number in range(10)]


@dataclass
class Brightness:
    everything: bool


class BrightnessGrader:
    """Grades an image right if its mean is above the reference."""

    def grade(self, image, reference, /):
        return Brightness(everything=bool(image.mean() > reference))


class Grey:
    """Generates images that are as bright as the temperature and the number of the caption allow."""

    name = "grey"

    def __init__(self):
        self.seeds = []

    def run(self, requests):
        for request in requests:
            self.seeds.append(request.seed)
            level = 200 if CAPTIONS.index(request.prompt) < 10 * request.sampling.temperature else 20
            yield np.full((8, 8, 3), level, dtype=np.uint8)


def summarize(images):
    grades = grade_images(BrightnessGrader(), images, [100.0] * len(images), "grading")
    return {"everything": accuracy(sum(grade.everything for grade in grades), len(grades))}


def test_generate_images_does_not_depend_on_the_batch_or_repeat_noise(tiny_model):
    captions = ["一只狐狸", "一只狐狸", "蓝色背景上的三只狗"]
    one, together = (
        generate_images(tiny_model, captions, 40, Sampling(top_k=50), batch_size, "") for batch_size in (1, 3)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, together, strict=True))
    assert not np.array_equal(one[0], one[1])
    assert np.array_equal(one[1], np.asarray(tiny_model.generate("一只狐狸", seed=41, temperature=1.0, top_k=50)[0]))


def test_grade_images_pairs_each_image_with_its_reference():
    images = [np.full((4, 4, 3), level, dtype=np.uint8) for level in (10, 120, 250)]
    grades = grade_images(BrightnessGrader(), images, [5.0, 200.0, 200.0], "grading")
    assert [grade.everything for grade in grades] == [True, False, True]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        grade_images(BrightnessGrader(), images, [5.0], "grading")


def test_choose_sampling_orders_settings_by_accuracy():
    model = Grey()
    grid = [Sampling(temperature=temperature, top_k=20) for temperature in (0.2, 0.9, 0.3)]
    results = choose_sampling(model, CAPTIONS, grid, summarize, batch_size=4)
    assert [sampling.temperature for sampling, _ in results] == [0.9, 0.3, 0.2]
    assert [summary["everything"]["right"] for _, summary in results] == [9, 3, 2]
    assert model.seeds[:10] == [TUNING_SEED + number for number in range(10)]


def test_choose_sampling_prefers_the_lowest_temperature_near_the_best():
    grid = [Sampling(temperature=t, top_k=k) for t, k in ((0.9, 5), (0.8, 5), (0.7, 20), (0.7, 5), (0.3, 5))]
    results = choose_sampling(Grey(), CAPTIONS, grid, summarize, batch_size=10)
    assert results[0][0] == Sampling(temperature=0.7, top_k=5)  # the interval of 9 of 10 begins at 0.596
    assert results[-1][0].temperature == 0.3


def test_describe_protocol_has_the_data_and_the_hash_of_the_captions():
    model = SimpleNamespace(name="grey")
    made = describe_protocol(model, CAPTIONS, 3, data={"folder": "照片"}, method="greedy")
    assert list(made) == ["captions", "captions_sha256", "seed", "folder", "model", "method", "cogview"]
    assert (made["captions"], made["seed"], made["model"], made["method"]) == (10, 3, "grey", "greedy")
    other = describe_protocol(model, CAPTIONS[::-1], 3, data={})
    assert other["captions_sha256"] != made["captions_sha256"]
