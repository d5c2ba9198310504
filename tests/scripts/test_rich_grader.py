"""``scripts/benchmarks/rich_grader.py``: planted faults change one part, and its tables of a small world are right."""

import sys
from pathlib import Path

import pytest

from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.scene import SceneWeights
from cogview.errors import InputError


@pytest.fixture
def rich_grader(load_script, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))
    return load_script("rich_grader")


@pytest.fixture
def world_folder(make_tiny_world, tmp_path):
    make_tiny_world(max_count=6, patterns=30, weights=SceneWeights(place=1, row=1)).save(tmp_path / "world")
    return tmp_path / "world"


def test_faults_change_the_part_that_they_name(rich_grader, make_tiny_world):
    world = make_tiny_world(max_count=6, patterns=30, weights=SceneWeights(row=1))
    changed = {"another object": "things", "one less": "count", "opposite order": "things", "another colour": "colour"}
    for index in range(60):
        scene = world.sample_scene(0, index)
        for name, attribute in changed.items():
            shown = rich_grader.FAULTS[name][1](world, scene, KeyedRandom("test", index))
            if shown is None:
                continue
            before, after = vars(scene), vars(shown)
            assert [key for key in before if before[key] != after[key]] == [attribute]


def test_held_out_of_kind_yields_held_out_scenes_of_that_kind(rich_grader, make_tiny_world):
    world = make_tiny_world(max_count=6)
    scenes = list(rich_grader.held_out_of_kind(world, "many", 20))
    assert len(scenes) == 20
    assert all(scene.held_out and scene.kind == "many" for scene in scenes)


def test_rich_grader_prints_a_row_for_each_kind_and_fault(rich_grader, world_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rich_grader.py", str(world_folder), "--scenes", "6"])
    assert rich_grader.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("| 100.0% (61.0%–100.0%) |") for line in lines) == 9  # of 13 kinds, those of the weights
    assert sum(" (of " in line for line in lines) == 7


def test_rich_grader_refuses_a_plain_world(rich_grader, make_tiny_world, tmp_path, monkeypatch):
    make_tiny_world().save(tmp_path / "plain")
    monkeypatch.setattr(sys, "argv", ["rich_grader.py", str(tmp_path / "plain")])
    with pytest.raises(InputError, match="is a plain world; expected a rich one"):
        rich_grader.main()
