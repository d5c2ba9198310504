"""Captions say what the scene shows, all of it where asked, and nothing else."""

from collections.abc import Callable

import pytest

from cogview.data.emoji.names import find_names, nearest_names
from cogview.data.emoji.scene import COLOURS, Scene
from cogview.data.emoji.world import World

MakeWorld = Callable[..., World]
SEEDS = range(600)


def captions(world: World, scene: Scene, complete: bool = True) -> list[str]:
    return [world.caption(scene, seed, complete) for seed in SEEDS]


def test_the_sentences_of_the_readme_are_in_the_grammar(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    apple, fox = world.things[:2]
    blue, white = COLOURS[5], COLOURS[10]
    assert "蓝色背景上的三只狐狸" in captions(world, Scene(colour=blue, kind="many", things=(fox,), count=3))
    assert "一个红苹果" in captions(world, Scene(colour=white, kind="one", things=(apple,)), complete=False)


def test_variants_of_a_count(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    told = set(captions(world, Scene(colour=COLOURS[5], kind="many", things=(world.things[1],), count=2), False))
    assert {"两只狐狸", "2只狐狸", "两个狐狸", "两只狐狸，蓝色背景", "蓝色背景上有两只狐狸"} <= told
    assert all("狐狸" in caption and ("两" in caption or "2" in caption) for caption in told)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "beside",
            {
                "左边是狐狸，右边是鱼",
                "左边有狐狸，右边有鱼",
                "右边是鱼，左边是狐狸",
                "右边有鱼，左边有狐狸",
                "鱼在右边，狐狸在左边",
                "狐狸在左边，鱼在右边",
                "狐狸在鱼的左边",
                "狐狸在鱼左边",
                "鱼在狐狸的右边",
                "鱼在狐狸右边",
                "鱼的左边是狐狸",
                "狐狸的右边是鱼",
            },
        ),
        (
            "above",
            {
                "上面是狐狸，下面是鱼",
                "上面有狐狸，下面有鱼",
                "下面是鱼，上面是狐狸",
                "下面有鱼，上面有狐狸",
                "鱼在下面，狐狸在上面",
                "狐狸在上面，鱼在下面",
                "狐狸在鱼的上面",
                "狐狸在鱼上面",
                "狐狸在鱼上方",
                "鱼在狐狸的下面",
                "鱼在狐狸下面",
                "鱼在狐狸下方",
                "鱼的上面是狐狸",
                "狐狸的下面是鱼",
            },
        ),
    ],
)
def test_every_way_to_tell_a_pair_is_true(make_tiny_world: MakeWorld, kind: str, expected: set[str]) -> None:
    world = make_tiny_world()
    fox, fish = world.things[1], world.things[5]
    scene = Scene(colour=COLOURS[0], kind=kind, things=(fox, fish))  # type: ignore[arg-type]
    plain = {
        caption
        for seed in range(4000)
        if not set("色一1") & set(caption := world.caption(scene, seed))  # no background, no measure words
    }
    assert plain == expected
    # No order of naming is the usual one, or a model would go by it and not read.
    upper_or_left_first = sum(caption.index("狐狸") < caption.index("鱼") for caption in plain)
    assert upper_or_left_first == len(plain) / 2


def test_a_complete_caption_belongs_to_one_meaning(make_tiny_world: MakeWorld) -> None:
    """Colour, things, count and relation can all be told from it: no two scenes share one."""
    world = make_tiny_world()
    owner: dict[str, str] = {}
    for index in range(400):
        scene = world.sample(0, index)
        for seed in range(20):
            caption = world.caption(scene, seed, complete=True)
            assert owner.setdefault(caption, scene.meaning) == scene.meaning
            assert any(f"{name}背景" in caption or f"背景是{name}" in caption for name in scene.colour.names)
            known = {name: thing.name for thing in world.things for name in thing.names}
            named = [known[name] for name in find_names(caption, known)]
            assert sorted(named) == sorted(thing.name for thing in scene.things)


def test_one_caption_in_five_leaves_the_background_unsaid(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    silent = sum("背景" not in world.caption(world.sample(0, index), index) for index in range(2000))
    assert 0.17 < silent / 2000 < 0.23


def test_find_names_takes_the_longest() -> None:
    names = ["苹果", "红苹果", "狗", "热狗", "狐狸"]
    assert find_names("左边是热狗，右边是红苹果", names) == ["热狗", "红苹果"]
    assert find_names("三只狗和狐狸", names) == ["狗", "狐狸"]
    assert find_names("蓝天", names) == []
    assert find_names("苹果", []) == []


def test_nearest_names_come_by_what_they_share() -> None:
    names = ["红苹果", "汽车", "公交车", "狐狸", "老虎"]
    assert nearest_names("蓝色背景上的两辆小汽车", names, n=2) == ["汽车", "公交车"]
    assert nearest_names("一只小狐", names) == ["狐狸"]
    assert nearest_names("红色背景", names) == []  # the colour of the background names no thing
    assert nearest_names("xyz", names) == []
