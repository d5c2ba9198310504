"""The gate: planted losses of a row fall, equal results and rises do not, and rows may be missing."""

import dataclasses

import pytest

from cogview.emoji.evaluation.gate import GateChange, _open_prompts, compare_rows, similar_captions
from cogview.emoji.evaluation.scenes import held_out_scenes
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
