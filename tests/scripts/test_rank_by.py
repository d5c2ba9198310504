"""``scripts/benchmarks/rank_by.py``: planted scores close the part of the gap that was computed by hand."""

from math import comb
from pathlib import Path

import numpy as np
import pytest

from cogview.emoji.evaluation.scenes import held_out_scenes
from cogview.evaluation.manifest import Manifest, write_result

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
PROMPT = "一只狐狸在汽车的左边"


@pytest.fixture
def rank_by(load_script, monkeypatch):
    """The script, imported as from its own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_script("rank_by")


@pytest.fixture
def verdicts():
    """Two captions with 12 and 8 right images of 16."""
    return np.array([[1] * 12 + [0] * 4, [0, 1] * 8], dtype=bool)


def closed(rank_by, right_CN, scores_CN):
    """Return the values of ``gap_closed`` for 2, 4, 8 and 16 images."""
    return [found["value"] for found in rank_by.gap_closed(right_CN, scores_CN)]


def test_gap_closed_is_one_for_the_verdicts_and_nothing_for_equal_scores(rank_by, verdicts):
    assert closed(rank_by, verdicts, verdicts.astype(float)) == pytest.approx([1, 1, 1, 1])
    assert closed(rank_by, verdicts, np.zeros((2, 16))) == pytest.approx([0, 0, 0, 0], abs=1e-12)
    [first, *_] = rank_by.gap_closed(verdicts, verdicts.astype(float))
    assert (first["low"], first["high"]) == pytest.approx((1, 1))


def test_gap_closed_of_the_opposite_score_is_that_of_the_worst_image(rank_by, verdicts):
    """An image is right only where all K are: C(R, K) of C(16, K) subsets."""
    expected = []
    for size in (2, 4, 8, 16):
        subsets = comb(16, size)
        gains = [comb(count, size) / subsets - count / 16 for count in (12, 8)]
        gaps = [1 - comb(16 - count, size) / subsets - count / 16 for count in (12, 8)]
        expected.append(sum(gains) / sum(gaps))
    assert expected[0] == pytest.approx(-1)
    assert expected[3] == pytest.approx(-1.25 / 0.75)
    assert closed(rank_by, verdicts, -verdicts.astype(float)) == pytest.approx(expected)


def test_gap_closed_is_nothing_without_a_gap(rank_by):
    assert closed(rank_by, np.ones((3, 16), dtype=bool), np.random.default_rng(0).random((3, 16))) == [0, 0, 0, 0]


def planted_terms(rank_by, right_CN):
    """Return terms of which log p(picture | text) alone knows the right images."""
    names = dict.fromkeys(name for factors in rank_by.FORMULAS.values() for name in factors)
    return {name: right_CN.astype(float) if name == "picture" else np.zeros((2, 16)) for name in names}


def test_values_of_planted_terms_are_those_of_the_formulas(rank_by, verdicts):
    values = rank_by.values_of(verdicts, planted_terms(rank_by, verdicts))
    assert values["average"].value == 20 / 32
    assert values["best_possible.16"].value == 1
    assert values["best_possible.2"].value == pytest.approx((1 - 6 / 120 + 1 - 28 / 120) / 2)
    assert [
        values[f"{name}.8"].value for name in ("picture", "guidance", "both", "caption", "masked")
    ] == pytest.approx([1, 1, 1, 0, 0], abs=1e-12)
    assert len(values) == 1 + 4 + 4 * len(rank_by.FORMULAS)


def test_main_reads_the_table_of_a_result(rank_by, verdicts, tmp_path, capsys):
    path = tmp_path / "result.json"
    write_result(path, Manifest(measure="rank by"), rank_by.values_of(verdicts, planted_terms(rank_by, verdicts)))
    assert rank_by.main(["--read", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "2 captions, right 62.5%" in printed
    assert "| picture | 100% (100% to 100%) | 100% (100% to 100%) |" in printed
    assert "| caption | 0% (0% to 0%) |" in printed


def test_score_group_has_the_terms_of_the_library(rank_by, tiny_model):
    """The weighted sum of the means per token is ``score`` of the same images."""
    images = tiny_model.generate(PROMPT, n=3, seed=7, temperature=1.7, top_k=0)
    terms = rank_by.score_group(tiny_model, images, PROMPT)
    expected = [score.log_probability for score in tiny_model.score(images, by="both")]
    assert rank_by.weighted(terms, rank_by.FORMULAS["sum"]) == pytest.approx(expected, abs=1e-4)
    assert {name for factors in rank_by.FORMULAS.values() for name in factors} <= set(terms)


def test_fresh_scenes_leave_out_known_meanings(rank_by, make_tiny_world):
    world = make_tiny_world()
    known = {scene.meaning for scene, _ in held_out_scenes(world, 6, 5)}
    fresh = rank_by.fresh_scenes(world, 5, 6, (5, 6))
    assert len(fresh) == 5
    assert known.isdisjoint(scene.meaning for _, scene, _ in fresh)
    everything = held_out_scenes(world, 11, 6)
    assert all(everything[number] == (scene, caption) for number, scene, caption in fresh)


@pytest.mark.parametrize("case", ["temperature", "noise=", "light=3"])
def test_open_case_refuses_unknown_damage(rank_by, case):
    with pytest.raises(SystemExit, match="is none of temperature=T, noise=SIGMA, model=FOLDER"):
        rank_by.open_case(case, "cogview-emoji")
