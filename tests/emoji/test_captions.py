"""Captions describe the scene, completely on request, and are parsed to its content."""

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cogview.emoji.captions import CaptionReader, ParsedCaption
from cogview.emoji.scene import COLOURS, Colour, Scene
from cogview.emoji.settings import WorldSettings
from cogview.emoji.things import EmojiFiles, EmojiObject, read_things
from cogview.emoji.world import EmojiWorld

MakeWorld = Callable[..., EmojiWorld]
SEEDS = range(600)
WHITE, BLUE, PINK = COLOURS[10], COLOURS[5], COLOURS[7]


def captions(world: EmojiWorld, scene: Scene, complete: bool = True) -> list[str]:
    return [world.caption(scene, seed, complete) for seed in SEEDS]


def test_write_caption_writes_the_documented_sentences(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    apple, fox = world.things[:2]
    blue, white = COLOURS[5], COLOURS[10]
    assert "蓝色背景上的三只狐狸" in captions(world, Scene(colour=blue, kind="many", things=(fox,), count=3))
    assert "一个红苹果" in captions(world, Scene(colour=white, kind="one", things=(apple,)), complete=False)


def test_write_caption_varies_counts(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    found = set(captions(world, Scene(colour=COLOURS[5], kind="many", things=(world.things[1],), count=2), False))
    assert {"两只狐狸", "2只狐狸", "两个狐狸", "两只狐狸，蓝色背景", "蓝色背景上有两只狐狸"} <= found
    assert all("狐狸" in caption and ("两" in caption or "2" in caption) for caption in found)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "beside",
            {
                "左边是狐狸，右边是鱼",
                "左边有狐狸，右边有鱼",
                "右边是鱼，左边是狐狸",
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
def test_write_caption_describes_a_pair_correctly_in_every_wording(
    make_tiny_world: MakeWorld, kind: str, expected: set[str]
) -> None:
    world = make_tiny_world()
    fox, fish = world.things[1], world.things[5]
    scene = Scene(colour=COLOURS[0], kind=kind, things=(fox, fish))  # type: ignore[arg-type]
    plain = {
        caption
        for seed in range(4000)
        if not set("色一1") & set(caption := world.caption(scene, seed))  # no background, no measure words
    }
    assert plain == expected


def test_write_caption_is_unambiguous_when_complete(make_tiny_world: MakeWorld) -> None:
    """No two scenes share a complete caption."""
    world = make_tiny_world()
    owner: dict[str, str] = {}
    for index in range(400):
        scene = world.sample_scene(0, index)
        for seed in range(20):
            caption = world.caption(scene, seed, complete=True)
            assert owner.setdefault(caption, scene.meaning) == scene.meaning
            assert any(f"{name}背景" in caption or f"背景是{name}" in caption for name in scene.colour.names)
            known = {name: thing.name for thing in world.things for name in thing.names}
            longest_first = sorted(known, key=len, reverse=True)
            named = [known[name] for name in re.findall("|".join(longest_first), caption)]
            assert sorted(named) == sorted(thing.name for thing in scene.things)


def test_write_caption_omits_the_background_in_one_of_ten(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    silent = sum("背景" not in world.caption(world.sample_scene(0, index), index) for index in range(2000))
    assert 0.08 < silent / 2000 < 0.12


def world_of(things: Sequence[EmojiObject]) -> EmojiWorld:
    """Return a world for captions alone, with empty sprites."""
    return EmojiWorld(WorldSettings(), things, np.zeros((len(things), 128, 128, 4), dtype=np.uint8))


def facts(scene: Scene, caption: str) -> ParsedCaption:
    """Return the content of ``caption`` of ``scene``, with one object for every name."""
    colour = scene.colour if "背景" in caption else None
    things = tuple(frozenset([thing.emoji]) for thing in scene.things)
    return ParsedCaption(colour=colour, kind=scene.kind, count=scene.count, things=things)


@pytest.mark.parametrize("complete", [True, False])
def test_caption_reader_inverts_write_caption(make_tiny_world: MakeWorld, complete: bool) -> None:
    world = make_tiny_world()
    reader = CaptionReader(world.things, world.colours)
    silent = 0
    for index in range(300):
        scene = world.sample_scene(3, index)
        for seed in range(6):
            caption = world.caption(scene, seed, complete)
            assert reader.parses(caption) == (facts(scene, caption),), caption
            silent += "背景" not in caption
    assert silent == 0 if complete else silent > 100


def test_caption_reader_reads_decoded_text_pieces(make_tiny_world: MakeWorld) -> None:
    """A text tokenizer gives back half-width commas, and may put spaces between pieces."""
    world = make_tiny_world()
    reader = CaptionReader(world.things)
    for index in range(100):
        scene = world.sample_scene(4, index)
        caption = world.caption(scene, index)
        decoded = unicodedata.normalize("NFKC", caption)
        assert "，" not in decoded
        assert reader.read(decoded) == reader.read(" ".join(decoded)) == facts(scene, caption)
    assert reader.read("　３只狐狸，蓝色背景\n") == reader.read("3只狐狸,蓝色背景") == reader.read("蓝色背景，三只狐狸")


DOGS = (
    EmojiObject(emoji="🐕", name="狗", synonyms=("小狗",), measures=("只", "条")),
    EmojiObject(emoji="🐶", name="狗头", synonyms=("小狗", "狗"), measures=("个",)),
    EmojiObject(emoji="🐩", name="贵宾犬", synonyms=("小狗",), measures=("只", "个")),
    EmojiObject(emoji="🌭", name="热狗", measures=("根", "个")),
)
APPLES = (
    EmojiObject(emoji="🍎", name="红苹果", synonyms=("苹果",)),
    EmojiObject(emoji="🍏", name="青苹果", synonyms=("苹果", "Ｔ恤")),
    EmojiObject(emoji="👕", name="T恤", measures=("件", "个")),
    EmojiObject(emoji="📕", name="红色的书", synonyms=("书",), measures=("本", "个")),
    EmojiObject(emoji="📖", name="打开的书", synonyms=("书",), measures=("本", "个")),
)


@pytest.mark.parametrize("things", [DOGS, APPLES])
def test_caption_reader_returns_every_object_of_a_shared_name(things: tuple[EmojiObject, ...]) -> None:
    world = world_of(things)
    reader = CaptionReader(things)
    seen = set()
    for index in range(200):
        scene = world.sample_scene(0, index)
        for seed in range(6):
            caption = world.caption(scene, seed, complete=True)
            (parsed,) = reader.parses(caption)
            assert (parsed.colour, parsed.kind, parsed.count) == (scene.colour, scene.kind, scene.count)
            assert all(thing.emoji in meant for thing, meant in zip(scene.things, parsed.things, strict=True)), caption
            seen |= set(parsed.things)
    if things is DOGS:
        assert seen == {frozenset("🐕🐶"), frozenset("🐶"), frozenset("🐕🐶🐩"), frozenset("🐩"), frozenset("🌭")}
    else:
        shared = {frozenset("🍎🍏"), frozenset("🍏👕"), frozenset("📕📖")}
        assert seen == {frozenset("🍎"), frozenset("🍏"), frozenset("📕"), frozenset("📖")} | shared


@pytest.mark.parametrize(
    ("text", "colour", "kind", "count", "things"),
    [
        ("狐狸", None, "one", 1, "🦊"),
        ("一个红苹果", None, "one", 1, "🍎"),
        ("白色背景，苹果", WHITE, "one", 1, "🍎"),
        ("蓝色背景上的三只狐狸", BLUE, "many", 3, "🦊"),
        ("4辆汽车，背景是粉红色", PINK, "many", 4, "🚗"),
        ("粉色背景上有两条狗", PINK, "many", 2, "🐕"),
        ("两辆小狗", None, "many", 2, "🐕"),
        ("左边是狐狸，右边是苹果", None, "beside", 1, "🦊🍎"),
        ("苹果在狐狸的右边", None, "beside", 1, "🦊🍎"),
        ("狗在鱼的上面，背景是蓝色的", BLUE, "above", 1, "🐕🐟"),
        ("白色背景上，下面是一本打开的书，上面是1条鱼", WHITE, "above", 1, "🐟📖"),
        ("左边是一只狐狸，右边是鱼", None, "beside", 1, "🦊🐟"),
        ("鱼在鱼下方", None, "above", 1, "🐟🐟"),
    ],
)
def test_caption_reader_reads_sentences_that_people_write(
    make_tiny_world: MakeWorld, text: str, colour: Colour | None, kind: str, count: int, things: str
) -> None:
    expected = ParsedCaption(
        colour=colour,
        kind=kind,  # type: ignore[arg-type]
        count=count,
        things=tuple(frozenset([emoji]) for emoji in things),
    )
    assert CaptionReader(make_tiny_world().things).parses(text) == (expected,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "，",
        "蓝色背景",
        "河马",
        "一只河马",
        "狐",
        "狐狸狐狸",
        "狐狸和鱼",
        "三狐狸",
        "五只狐狸",
        "12只狐狸",
        "二只狐狸",
        "几只狐狸",
        "只狐狸",
        "三只",
        "天蓝色背景上的狐狸",
        "蓝背景上的狐狸",
        "金色背景上的狐狸",
        "蓝色背景上的",
        "蓝色背景上的三只狐狸，",
        "蓝色背景上的三只狐狸。",
        "蓝色背景上的三只狐狸，背景是蓝色的",
        "蓝色背景上的三只狐狸和鱼",
        "背景是蓝色的，三只狐狸",
        "狐狸在左边",
        "左边是狐狸，上面是鱼",
        "左边是狐狸，左边是鱼",
        "左边是两只狐狸，右边是鱼",
        "左边是狐狸右边是鱼",
        "狐狸在鱼",
        "狐狸在鱼的里面",
        "蓝色背景上的狐狸在鱼的左边",
        "a fox on blue",
        "{what}",
        "狐狸�",
    ],
)
def test_caption_reader_refuses_other_texts(make_tiny_world: MakeWorld, text: str) -> None:
    reader = CaptionReader(make_tiny_world().things)
    assert reader.parses(text) == ()
    assert reader.read(text) is None


def test_caption_reader_has_two_readings_when_a_name_looks_like_a_count() -> None:
    beer = EmojiObject(emoji="🍺", name="啤酒", measures=("杯", "个"))
    beers = EmojiObject(emoji="🍻", name="两杯啤酒", measures=("个",))
    reader = CaptionReader((beer, beers))
    one = ParsedCaption(colour=None, kind="one", count=1, things=(frozenset("🍻"),))
    two = ParsedCaption(colour=None, kind="many", count=2, things=(frozenset("🍺"),))
    assert reader.parses("两杯啤酒") == (one, two)
    assert reader.read("两杯啤酒") == one
    assert reader.parses("三个两杯啤酒") == (
        ParsedCaption(colour=None, kind="many", count=3, things=(frozenset("🍻"),)),
    )
    assert len(reader.parses("两杯啤酒在啤酒的左边")) == 1  # a pair has one of each


def test_caption_reader_knows_only_its_objects_and_colours(make_tiny_world: MakeWorld) -> None:
    things = make_tiny_world().things
    assert CaptionReader(()).read("狐狸") is None
    gold = Colour(names=("金色",), rgb=(212, 175, 55))
    reader = CaptionReader(things, (gold,))
    assert reader.read("蓝色背景上的狐狸") is None
    assert reader.read("金色背景上的狐狸") == ParsedCaption(colour=gold, kind="one", count=1, things=(frozenset("🦊"),))


@pytest.mark.font
def test_caption_reader_reads_captions_of_the_real_world() -> None:
    things = read_things(EmojiFiles())
    world, reader = world_of(things), CaptionReader(things)
    for thing in things:
        for name in thing.names:
            assert ParsedCaption(colour=None, kind="one", count=1, things=(frozenset([thing.emoji]),)) in reader.parses(
                name
            )
    for index in range(1000):
        scene = world.sample_scene(0, index)
        caption = world.caption(scene, index)
        assert facts(scene, caption) in reader.parses(caption), caption
