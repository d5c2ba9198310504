"""Diversity of images and expected choices: known values, all subsets by hand, and images of a model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from cogview.evaluation.diversity import (
    choice_sizes,
    code_entropy,
    different_share,
    expected_best,
    expected_choice,
    pairwise_distance,
)
from cogview.evaluation.model_report import ResultTable
from cogview.evaluation.prompt_report import PromptSettings, add_prompt_values, generate_groups, measure_prompts


def test_equal_images_have_no_diversity():
    images = np.full((5, 8, 8, 3), 70, dtype=np.uint8)
    assert different_share(images) == 1 / 5
    assert pairwise_distance(images) == 0
    entropy = code_entropy(np.full((5, 64), 3))
    assert (entropy, math.copysign(1, entropy)) == (0, 1)


def test_diversity_of_known_images():
    """Two black images and a white one: two different, and two of three pairs at distance 1."""
    images = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    images[2] = 255
    assert different_share(images) == pytest.approx(2 / 3)
    assert pairwise_distance(images) == pytest.approx(2 / 3)
    half = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    half[1, :2] = 255
    assert pairwise_distance(half) == pytest.approx(math.sqrt(1 / 2))
    with pytest.raises(ValueError, match="needs two images, got 1"):
        pairwise_distance(half[:1])


def test_code_entropy_of_known_codes():
    """All codes different: ln N; half of the positions fixed: half of it; two codes half and half: ln 2."""
    different = np.arange(8)[:, None] + np.zeros((8, 16), dtype=np.int64)
    assert code_entropy(different) == pytest.approx(math.log(8))
    different[:, :8] = 5
    assert code_entropy(different) == pytest.approx(math.log(8) / 2)
    assert code_entropy(np.array([[1], [1], [9], [9]])) == pytest.approx(math.log(2))


def test_expected_best_equals_the_mean_over_all_subsets():
    values = np.random.default_rng(0).normal(size=(3, 6))
    found = expected_best(values, range(1, 7))
    for size in range(1, 7):
        subsets = [values[:, list(chosen)].max(axis=1) for chosen in itertools.combinations(range(6), size)]
        np.testing.assert_allclose(found[:, size - 1], np.mean(subsets, axis=0))
    np.testing.assert_allclose(expected_best(np.array([[0.0, 1.0, 2.0, 3.0]]), [1, 2, 4]), [[1.5, 7 / 3, 3]])


def test_expected_best_of_four_normal_values_is_known():
    """The expected maximum of 4 values of N(0, 1) is 1.0294; of 2 it is 1 / sqrt(pi)."""
    values = np.random.default_rng(1).normal(size=(4000, 16))
    found = expected_best(values, [1, 2, 4])
    errors = 4 * found.std(axis=0) / math.sqrt(len(values))
    np.testing.assert_array_less(np.abs(found.mean(axis=0) - [0, 1 / math.sqrt(math.pi), 1.0294]), errors)
    assert errors.max() < 0.04


def test_expected_choice_follows_the_score():
    """The score chooses, the value counts; equal scores choose at random; a score against the value finds the worst."""
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_allclose(expected_choice(values, -values, [1, 2, 4]), [[2.5, 5 / 3, 1]])
    np.testing.assert_allclose(expected_choice(values, np.zeros((1, 4)), [1, 2, 4]), [[2.5, 2.5, 2.5]])
    scores = np.array([[7.0, 0.0, 7.0, 0.0]])
    expected = [
        np.mean([values[0, [i for i in pair if scores[0, i] == scores[0, list(pair)].max()]].mean() for pair in pairs])
        for pairs in [list(itertools.combinations(range(4), 2))]
    ]
    np.testing.assert_allclose(expected_choice(values, scores, [2])[0], expected)


def test_expected_choice_refuses_what_it_cannot_use():
    values = np.zeros((2, 4))
    for scores, sizes in ((np.zeros((2, 3)), [1]), (values, [5]), (values, [0, 1])):
        with pytest.raises(ValueError, match="needs values and scores of one shape"):
            expected_choice(values, scores, sizes)
    with pytest.raises(ValueError, match="NaN"):
        expected_best(np.array([[np.nan, 1.0]]), [1])


def test_choice_sizes_are_powers_of_two():
    assert choice_sizes(8) == [1, 2, 4, 8]
    assert choice_sizes(15) == [1, 2, 4, 8]
    assert choice_sizes(2) == [1, 2]


def test_images_of_prompts_are_those_of_generate(tiny_model, monkeypatch):
    """Groups have the images that ``generate`` makes with the seed, however many are generated at a time."""
    monkeypatch.setattr("cogview.evaluation.prompt_report.IMAGES_AT_A_TIME", 4)
    prompts = ["一只狐狸", "两只狗", "三个红苹果"]
    settings = PromptSettings(images=2, seed=5, sampling=tiny_model.sampling())
    groups = list(generate_groups(tiny_model, prompts, settings))
    for prompt, group in zip(prompts, groups, strict=True):
        expected = tiny_model.generate(prompt, n=2, seed=5)
        assert [image.tobytes() for image in group] == [image.tobytes() for image in expected]


def test_greedy_images_of_a_prompt_are_all_equal(tiny_model):
    """With top-k 1 a prompt has one image: 1/N different, no distance, no entropy, nothing gained by a choice."""
    table = ResultTable()
    settings = PromptSettings(images=3, seed=0, sampling=tiny_model.sampling(top_k=1), rank_by="caption")
    manifest = measure_prompts(table, tiny_model, ["一只狐狸", "两只狗"], settings)
    found = {name: row.value for name, row in table.values.items()}
    assert found["different_images"] == pytest.approx(1 / 3)
    assert (found["pairwise_distance"], found["code_entropy"]) == (0, 0)
    assert found["picture_of_best_by_caption_of_2"] == pytest.approx(found["picture_of_best_by_caption_of_1"], abs=1e-5)
    assert (manifest.sampling["top_k"], manifest.selection.candidates) == (1, 3)


def test_add_prompt_values_has_no_interval_for_one_prompt():
    table = ResultTable()
    add_prompt_values(table, "code_entropy", (["一只狐狸"], np.array([0.5])), "nats per code")
    assert (table.values["code_entropy"].value, table.values["code_entropy"].low) == (0.5, None)
