"""Rich scenes: the split, styles, patterns, arrangements and signs; and plain scenes, which are as they were."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogview.config_io import from_mapping, to_mapping
from cogview.emoji.attributes import BOARDS, PATTERNS, STYLES, TYPEFACES, Sign, scene_tables
from cogview.emoji.backgrounds import background
from cogview.emoji.characters import CharacterFonts, draw_characters
from cogview.emoji.scene import (
    COLOURS,
    NUM_THINGS,
    RICH_LAYOUTS,
    Scene,
    SceneWeights,
    cells_of,
    is_style_held_out,
    is_text_held_out,
)
from cogview.emoji.settings import WorldSettings
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

MakeWorld = Callable[..., EmojiWorld]
WHITE, BLUE = COLOURS[10], COLOURS[5]


def digest_of(world: EmojiWorld) -> str:
    """SHA-256 of the meanings, captions and pixels of 200 scenes, one in four of them held out."""
    digest = hashlib.sha256()
    for index in range(200):
        scene = world.sample_scene(5, index, index % 4 == 0)
        digest.update(scene.meaning.encode())
        digest.update(world.caption(scene, index, index % 2 == 0).encode())
        digest.update(world.render(scene, index).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "98826e5f2dce86266ba28be32af87c120d3c396e0208b54659de2e8427ebb81f"),
        (
            {"canvas": 128, "jitter": 5, "sizes": (0.5, 1.0)},
            "72d6d7b728a74eed28c2c0506f0b7f1132cf67db0c5484aaf6685759bdda58ec",
        ),
    ],
    ids=["grid", "free"],
)
def test_plain_scenes_are_those_of_earlier_versions(
    make_tiny_world: MakeWorld, settings: dict[str, Any], expected: str
) -> None:
    """Computed at commit 89a183c, which had no rich scenes."""
    assert digest_of(make_tiny_world(**settings)) == expected


def test_plain_worlds_are_saved_as_by_earlier_versions(make_tiny_world: MakeWorld, tmp_path: Path) -> None:
    """Other versions read them, and stores that were begun compare the settings."""
    world = make_tiny_world()
    assert set(to_mapping(world.settings)) == {"things", "canvas", "jitter", "sizes", "weights"}
    assert set(to_mapping(world.settings.weights)) == {"one", "many", "pair"}
    world.save(tmp_path)
    saved = json.loads((tmp_path / "world.json").read_text(encoding="utf-8"))
    assert set(saved) == {"format_version", "settings", "colours", "candidates"}
    assert saved["format_version"] == 1


def test_sample_scene_samples_every_part_of_a_rich_world(make_rich_world: MakeWorld) -> None:
    world = make_rich_world()
    scenes = [world.sample_scene(0, index) for index in range(3000)]
    assert scenes == [make_rich_world().sample_scene(0, index) for index in range(3000)]
    assert {scene.kind for scene in scenes} == set(NUM_THINGS)
    assert {scene.count for scene in scenes} == {1, 2, 3, 4, 5, 6}
    with_things = [scene for scene in scenes if scene.things]
    styles = Counter(scene.style.key for scene in with_things)
    assert set(styles) == {style.key for style in STYLES}
    assert all(0.15 < number / len(with_things) < 0.35 for number in styles.values())
    assert 0.25 < np.mean([scene.pattern is not None for scene in scenes]) < 0.35
    signs = [scene.sign for scene in scenes if scene.sign]
    assert {len(sign.text) for sign in signs} == {1, 2}
    assert {sign.board for sign in signs} == set(BOARDS)
    assert {sign.typeface for sign in signs} == set(TYPEFACES)
    assert all(scene.sign.board.name != scene.colour.name for scene in scenes if scene.sign)
    containers = {scene.things[0].name for scene in scenes if scene.kind == "inside"}
    assert containers == {"包裹", "书包"}


def test_sample_scene_holds_out_styles_of_objects_and_pairs_of_characters(make_rich_world: MakeWorld) -> None:
    world = make_rich_world()
    trained = [world.sample_scene(0, index) for index in range(3000)]
    assert not any(is_style_held_out(thing, scene.style) for scene in trained for thing in scene.things)
    assert not any(is_text_held_out(scene.sign.text) for scene in trained if scene.sign)
    measured = [world.sample_scene(0, index, held_out=True) for index in range(600)]
    assert any(is_style_held_out(thing, scene.style) for scene in measured for thing in scene.things)
    assert any(is_text_held_out(scene.sign.text) for scene in measured if scene.sign)
    pairs = [(thing, style) for thing in world.things for style in STYLES]
    assert 0 < sum(is_style_held_out(thing, style) for thing, style in pairs) < 0.3 * len(pairs)
    texts = [one + other for one in scene_tables().characters for other in scene_tables().characters]
    assert 0.09 < np.mean([is_text_held_out(text) for text in texts]) < 0.11
    assert not any(is_style_held_out(thing, STYLES[0]) for thing in world.things)


def test_held_out_contents_are_held_out_in_every_style(make_rich_world: MakeWorld) -> None:
    """A caption that leaves the style open would show a held-out content otherwise."""
    world = make_rich_world()
    for index in range(300):
        scene = world.sample_scene(0, index, held_out=True)
        plain = Scene(colour=scene.colour, kind="one", things=(world.things[1],))
        if plain.held_out:
            styled = [Scene(colour=scene.colour, kind="one", things=plain.things, style=style) for style in STYLES]
            assert all(other.held_out for other in styled)
            assert len({other.meaning for other in styled}) == len(STYLES)
            return
    pytest.fail("no held-out content was found")


def test_scenes_of_the_first_style_have_the_meanings_of_plain_ones(make_rich_world: MakeWorld) -> None:
    fox = make_rich_world().things[1]
    assert Scene(colour=BLUE, kind="many", things=(fox,), count=3).meaning == "蓝色|many|3|🦊"
    styled = Scene(colour=BLUE, kind="one", things=(fox,), style=STYLES[2], pattern=PATTERNS[0])
    assert styled.meaning == "蓝色stripes|one|1|🦊|fluent-flat"


def test_render_draws_every_style_with_its_sprites(make_rich_world: MakeWorld) -> None:
    world = make_rich_world()
    images = [
        world.render(Scene(colour=BLUE, kind="left", things=world.things[:1], style=style))[16:48, :32].tobytes()
        for style in STYLES
    ]
    assert len(set(images)) == len(STYLES)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.key)
def test_background_patterns_repeat_with_every_code(pattern: Any) -> None:
    image = background(BLUE, pattern, 64)
    cells = image.reshape(8, 8, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(64, -1)
    assert len(np.unique(cells, axis=0)) == 1
    assert np.ptp(image.astype(int), axis=(0, 1)).max() > 20  # the pattern is visible
    twice = background(BLUE, pattern, 128).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(twice - image).mean() < 4


@pytest.mark.parametrize("kind", ["five", "six", "row", "inside", "on", "left", "bottom"])
def test_layouts_keep_sprites_on_the_canvas_and_apart(kind: str) -> None:
    taken = np.zeros((8, 8), dtype=int)
    for cell in RICH_LAYOUTS[kind]:
        assert 0 <= cell.x <= 8 - cell.side
        assert 0 <= cell.y <= 8 - cell.side
        taken[cell.y : cell.y + cell.side, cell.x : cell.x + cell.side] += 1
    assert taken.max() == (2 if kind == "inside" else 1)


def test_render_stacks_objects_so_that_they_touch(make_rich_world: MakeWorld) -> None:
    """The fish has no pixel in the first rows, and the car none in the last ones, until they are moved."""
    world = make_rich_world()
    for upper in world.things[:6]:
        for lower in world.things[6:]:
            image = world.render(Scene(colour=WHITE, kind="on", things=(upper, lower)))
            visible = np.flatnonzero((image != WHITE.rgb).any(axis=(1, 2)))
            assert {31, 32} <= set(visible)


def test_signs_have_the_same_tiles_everywhere(make_rich_world: MakeWorld) -> None:
    """So a character always has the same codes."""
    world = make_rich_world()
    assert world.characters is not None
    text = world.characters.characters[:2]
    signs = [Sign(text=part, board=BOARDS[0], typeface=TYPEFACES[0]) for part in (text, text[0])]
    images = [
        world.render(Scene(colour=WHITE, kind=kind, things=things, sign=sign))
        for sign in signs
        for kind, things in (("sign", ()), ("label", world.things[:1]))
    ]
    places = [(0, 16), (0, 32), (16, 16), (16, 32)]
    tiles = {image[y : y + 32, x : x + 32].tobytes() for image, (x, y) in zip(images, places, strict=True)}
    assert len(tiles) == 1
    large = world.render(Scene(colour=WHITE, kind="sign", things=(), sign=signs[0]), scale=2)
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3)) - images[0]).mean() < 6


def test_world_load_inverts_save_of_a_rich_world(make_rich_world: MakeWorld, tmp_path: Path) -> None:
    world = make_rich_world()
    world.save(tmp_path)
    loaded = EmojiWorld.load(tmp_path)
    assert loaded.settings == world.settings
    for index in range(60):
        scene = loaded.sample_scene(1, index)
        assert scene == world.sample_scene(1, index)
        assert np.array_equal(loaded.render(scene), world.render(scene))
        assert loaded.caption(scene, index) == world.caption(scene, index)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"styles": ["twemoji"]}, r"styles must begin with noto and differ, got \['twemoji'\]"),
        ({"styles": ["noto", "cubist"]}, "expected one of noto, twemoji, fluent-flat"),
        ({"characters": -1}, "characters must be 0 or a number of at least 2, got -1"),
        ({"max_count": 7}, "max_count must be from 4 to 6, got 7"),
        ({"patterns": 101}, "patterns must be from 0 to 100 percent, got 101"),
        ({"weights": {"sign": 1}}, "scenes with a sign need characters"),
        ({"max_count": 6, "jitter": 2}, r"needs jitter 0 and sizes \[1\.0\], got jitter 2"),
        ({"captions": {"traditional": 120}}, "traditional must be from 0 to 100 percent, got 120"),
    ],
)
def test_world_settings_refuse_rich_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_mapping(WorldSettings, settings, "scenes section")


def test_scene_refuses_missing_and_needless_signs(make_rich_world: MakeWorld) -> None:
    fox = make_rich_world().things[1]
    with pytest.raises(ValueError, match="a scene of kind sign needs a sign"):
        Scene(colour=BLUE, kind="sign", things=())
    sign = Sign(text="福", board=BOARDS[0], typeface=TYPEFACES[0])
    with pytest.raises(ValueError, match="a scene of kind one has no sign"):
        Scene(colour=BLUE, kind="one", things=(fox,), sign=sign)
    with pytest.raises(ValueError, match="a sign has 1 to 2 characters, got '福春茶'"):
        Sign(text="福春茶", board=BOARDS[0], typeface=TYPEFACES[0])


def test_world_refuses_what_it_has_no_pictures_of(make_tiny_world: MakeWorld, make_rich_world: MakeWorld) -> None:
    tiny = make_tiny_world()
    with pytest.raises(ValueError, match=r"the styles \['twemoji'\] have no sprites"):
        EmojiWorld(WorldSettings(styles=("noto", "twemoji")), tiny.candidates, tiny.sprites)
    with pytest.raises(ValueError, match="5 characters need bitmaps, got 0"):
        EmojiWorld(WorldSettings(characters=5), tiny.candidates, tiny.sprites)
    sign = Sign(text="汤", board=BOARDS[0], typeface=TYPEFACES[0])
    with pytest.raises(InputError, match="this world has no pictures of the characters 汤"):
        make_rich_world().render(Scene(colour=BLUE, kind="sign", things=(), sign=sign))
    with pytest.raises(InputError, match="none of the 6 objects can hold another one"):
        tiny.sample_scene(0, 0, weights=SceneWeights(inside=1))
    with pytest.raises(InputError, match="scenes with a sign need characters; this world has none"):
        tiny.sample_scene(0, 0, weights=SceneWeights(sign=1))


def test_scene_tables_have_distinct_characters_and_words_of_them() -> None:
    tables = scene_tables()
    assert len(set(tables.characters)) == len(tables.characters) >= 100
    assert all(len(word) == 2 for word in tables.words)
    assert {word for word in tables.words if not set(word) <= set(tables.characters)} == set()


def test_draw_characters_names_the_package_of_a_missing_font(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="apt install fonts-lxgw-wenkai"):
        draw_characters("福", CharacterFonts(hei=Path(__file__), kai=tmp_path / "no.ttf"))


@pytest.mark.skipif(not CharacterFonts().kai.is_file(), reason="apt install fonts-noto-cjk fonts-lxgw-wenkai")
def test_draw_characters_fills_every_tile_without_clipping() -> None:
    drawn = draw_characters(scene_tables().characters, CharacterFonts())
    assert drawn.bitmaps.shape[:2] == (2, len(scene_tables().characters))
    ink = drawn.bitmaps > 64
    for edge in (ink[:, :, 0], ink[:, :, -1], ink[:, :, :, 0], ink[:, :, :, -1]):
        assert not edge.any()
    share = ink.mean(axis=(2, 3))
    assert share.min() > 0.03
    different = drawn.bitmaps.reshape(2 * len(scene_tables().characters), -1)
    assert len(np.unique(different, axis=0)) == len(different)


def test_cells_of_a_scene_are_as_many_as_its_objects(make_rich_world: MakeWorld) -> None:
    world = make_rich_world()
    for index in range(300):
        scene = world.sample_scene(2, index)
        assert len(cells_of(scene)) == len(scene.shown)
