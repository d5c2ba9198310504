"""The gate: planted losses of a row fall, equal results and rises do not, and rows may be missing."""

import dataclasses

import pytest

from cogview.config_io import to_mapping
from cogview.emoji.evaluation import gate as module
from cogview.emoji.evaluation.gate import (
    CLEAN_LIMIT,
    SIGNIFICANCE,
    GateChange,
    _open_prompts,
    clean_limit,
    compare_rows,
    earlier_limit,
)
from cogview.emoji.evaluation.scenes import held_out_scenes
from cogview.emoji.evaluation.similar_captions import similar_captions
from cogview.emoji.grader import SceneGrader
from cogview.errors import InputError
from cogview.evaluation.records import Manifest, Result, ResultItems

IDS = [f"{number}只狐狸" for number in range(200)]


def result(measure="gate", **rows) -> Result:
    return Result(
        manifest=Manifest(measure=measure), results={}, items=ResultItems(ids=IDS, values=dict(rows)), sha256=""
    )


def fell(before: Result, **rows) -> list[str]:
    changes, _ = compare_rows(before, ResultItems(ids=IDS, values=dict(rows)))
    return [change.name for change in changes if change.fell]


def test_compare_rows_finds_a_planted_loss_and_not_the_row_beside_it():
    before = result(object=[1.0] * 200, colour=[1.0] * 190 + [0.0] * 10)
    assert fell(before, object=[1.0] * 190 + [0.0] * 10, colour=[0.0] * 10 + [1.0] * 190) == ["object"]
    assert fell(before, object=[1.0] * 200, colour=[1.0] * 200) == []


def test_compare_rows_pairs_items_by_ids_in_any_order():
    values = [float(number % 3 > 0) for number in range(200)]
    before = result(object=values)
    part = ResultItems(ids=IDS[99::-1], values={"object": values[99::-1]})
    ((change,), paired) = compare_rows(before, part)
    assert paired
    assert change == GateChange(
        name="object", before=change.after, after=sum(values[:100]) / 100, probability=pytest.approx(1.0)
    )
    other = ResultItems(ids=[f"另一句{number}" for number in range(200)], values={"object": values})
    assert compare_rows(before, other)[1] is False


def test_compare_rows_counts_a_missing_row_as_fallen_and_a_new_one_not():
    before = result(object=[1.0] * 200, captioning=[1.0] * 200)
    assert fell(before, object=[1.0] * 200, ranking=[0.0] * 200) == ["captioning"]


def test_compare_rows_refuses_another_measure():
    with pytest.raises(InputError, match="measure scenes, expected gate"):
        compare_rows(result(measure="scenes", object=[1.0] * 200), ResultItems(ids=IDS, values={}))


def test_compare_rows_notices_a_loss_of_five_points_of_500_other_captions():
    """Against 499 right ones; one wrong one of a hundred, which is no loss to notice, passes."""
    before = ResultItems(ids=[f"a{number}" for number in range(500)], values={"everything": [0.0] + [1.0] * 499})
    earlier = Result(manifest=Manifest(measure="gate"), results={}, items=before, sha256="")
    for wrong, noticed in ((25, True), (15, True), (5, False), (0, False)):
        after = ResultItems(
            ids=[f"b{number}" for number in range(500)], values={"everything": [0.0] * wrong + [1.0] * (500 - wrong)}
        )
        ((change,), paired) = compare_rows(earlier, after)
        assert not paired
        assert change.fell is noticed, wrong


def test_fall_of_a_run_by_chance_is_rare_enough_for_19_of_20_to_pass():
    false_alarm = 10 * SIGNIFICANCE  # of ten rows, at most
    assert (1 - false_alarm) ** 20 + 20 * false_alarm * (1 - false_alarm) ** 19 > 0.9


def test_clean_limit_is_a_quantile_of_errors_of_the_same_scenes(make_tiny_world, tiny_model, monkeypatch):
    monkeypatch.setattr(module, "CLEAN_SCENES", 20)
    grader = SceneGrader(make_tiny_world(things=4))
    limit = clean_limit(tiny_model, grader, 8)
    assert limit > 0
    assert limit == pytest.approx(clean_limit(tiny_model, grader, 20), rel=1e-6)
    monkeypatch.setattr(module, "CLEAN_QUANTILE", 0.5)
    assert clean_limit(tiny_model, grader, 20) < limit


def test_earlier_limit_refuses_another_world_and_a_result_without_limit(make_tiny_world):
    world = make_tiny_world(things=4)
    fixed = {"world": to_mapping(world.settings), "images of open prompts": 8}
    earlier = Manifest(measure="gate", settings={**fixed, CLEAN_LIMIT: 100.0})

    def limit(manifest, **settings):
        changed = dataclasses.replace(manifest, settings={**manifest.settings, **settings})
        return earlier_limit(dataclasses.replace(result(), manifest=changed), world)

    assert limit(earlier) == 100.0
    with pytest.raises(InputError, match=r"has world\.things 5, expected 4: give the --recipe"):
        limit(earlier, world={**fixed["world"], "things": 5})
    with pytest.raises(InputError, match="has no clean limit: remove it"):
        limit(Manifest(measure="gate", settings=fixed))
    with pytest.raises(InputError, match="measure scenes, expected gate"):
        limit(dataclasses.replace(earlier, measure="scenes"))


def test_similar_captions_differ_in_one_thing(make_tiny_world):
    world = make_tiny_world()
    for scene, _ in held_out_scenes(world, 20):
        right, *others = similar_captions(world, scene, 0)
        assert right == world.caption(scene, 0, complete=True)
        assert len(others) == (2 if scene.kind == "one" else 3)
        assert right not in others
        assert dataclasses.replace(scene) == scene  # scenes are values, so none was changed
        colours = [colour.names for colour in world.colours]
        named = [[any(name in text for name in names) for names in colours].count(True) for text in others]
        assert min(named) >= 1


def test_open_prompts_name_no_background(make_tiny_world):
    world = make_tiny_world()
    prompts = _open_prompts(world, held_out_scenes(world, 20))
    assert len(prompts) == len(set(prompts)) > 10
    assert not any("背景" in prompt for prompt in prompts)
