"""Scenes: functions of their seeds, held out by meaning, rendered by the layout, saved and loaded."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from cogview.config_io import from_mapping
from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.scene import COLOURS, COUNTS, LAYOUTS, Scene, SceneKind, SceneWeights, cells_of
from cogview.emoji.settings import WorldSettings
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

MakeWorld = Callable[..., EmojiWorld]


def all_scenes(world: EmojiWorld) -> list[Scene]:
    scenes = []
    for colour in world.colours:
        for thing in world.things:
            scenes.append(Scene(colour=colour, kind="one", things=(thing,)))
            scenes.extend(Scene(colour=colour, kind="many", things=(thing,), count=count) for count in COUNTS)
        for pair in permutations(world.things, 2):
            scenes.append(Scene(colour=colour, kind="beside", things=pair))
            scenes.append(Scene(colour=colour, kind="above", things=pair))
    return scenes


def test_keyed_random_equals_recorded_numbers() -> None:
    # Computed once with this code: a change of these numbers changes every training set and every held-out part.
    random = KeyedRandom("scene", 7, 0)
    assert [random.randbelow(1000) for _ in range(10)] == [908, 25, 82, 431, 698, 390, 933, 215, 248, 648]
    assert KeyedRandom("a").randbelow(10**9) != KeyedRandom("b").randbelow(10**9)


def test_sample_scene_is_a_function_of_its_arguments(make_tiny_world: MakeWorld) -> None:
    world, again = make_tiny_world(), make_tiny_world()
    forwards = [world.sample_scene(3, index) for index in range(50)]
    backwards = [again.sample_scene(3, index) for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert [world.sample_scene(4, index) for index in range(50)] != forwards
    assert [scene.meaning for scene in forwards[:3]] == ["蓝色|above|1|🦊|🚗", "棕色|one|1|🐟", "青色|above|1|📖|🚗"]


def test_sample_scene_separates_one_held_out_meaning_in_ten(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    scenes = all_scenes(world)
    assert len({scene.meaning for scene in scenes}) == len(scenes)
    share = np.mean([scene.held_out for scene in scenes])
    assert 0.07 < share < 0.13  # 1008 meanings: 0.1 give or take three standard deviations

    trained = {world.sample_scene(0, index).meaning for index in range(2000)}
    measured = {world.sample_scene(0, index, held_out=True).meaning for index in range(200)}
    held_out = {scene.meaning for scene in scenes if scene.held_out}
    assert not trained & held_out
    assert measured <= held_out


def test_sample_scene_has_equal_frequencies_of_kinds(make_tiny_world: MakeWorld) -> None:
    kinds = Counter(make_tiny_world().sample_scene(0, index).kind for index in range(3000))
    assert all(900 < number < 1100 for number in (kinds["one"], kinds["many"], kinds["beside"] + kinds["above"]))


def test_sample_scene_has_frequencies_by_weights(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    kinds = Counter(
        world.sample_scene(0, index, weights=SceneWeights(one=1, many=0, pair=3)).kind for index in range(2000)
    )
    assert 440 < kinds["one"] < 560
    assert kinds["many"] == 0
    assert 700 < kinds["beside"] < 800
    assert sum(kinds.values()) == 2000


@pytest.mark.parametrize("weights", [{"pair": -1}, {"one": 0, "many": 0, "pair": 0}], ids=str)
def test_scene_weights_refuse_negative_and_all_zero(weights: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="weights must be 0 or more and one of them above 0"):
        SceneWeights(**weights)


def test_sample_scene_samples_only_the_first_objects(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world(things=2)
    seen = {thing.name for index in range(100) for thing in world.sample_scene(0, index).things}
    assert seen == {"红苹果", "狐狸"}
    assert len(world.candidates) == 6


@pytest.mark.parametrize("canvas", [64, 128])
def test_render_gives_an_object_the_same_pixels_anywhere_on_the_grid(make_tiny_world: MakeWorld, canvas: int) -> None:
    """Each place begins on a multiple of an eighth of the canvas, so a sprite always has the same codes."""
    world = make_tiny_world(canvas=canvas)
    fox, blue = world.things[1], COLOURS[5]
    half = canvas // 2
    patches = set()
    for count in COUNTS:
        scene = Scene(colour=blue, kind="many", things=(fox,), count=count)
        image = world.render(scene)
        rest = np.ones((canvas, canvas), dtype=bool)
        for cell in cells_of(scene):
            x, y = cell.x * canvas // 8, cell.y * canvas // 8
            patches.add(image[y : y + half, x : x + half].tobytes())
            rest[y : y + half, x : x + half] = False
        assert (image[rest] == blue.rgb).all()
    assert len(patches) == 1


@pytest.mark.parametrize("kind", ["one", "beside", "above"])
def test_render_at_a_scale_equals_a_larger_world(make_tiny_world: MakeWorld, kind: SceneKind) -> None:
    small, large = make_tiny_world(canvas=64), make_tiny_world(canvas=128)
    scene = Scene(colour=COLOURS[5], kind=kind, things=small.things[: 1 if kind == "one" else 2])
    assert np.array_equal(small.render(scene, scale=2), large.render(scene))
    assert np.array_equal(large.render(scene, scale=0.5), small.render(scene))


def test_render_at_a_scale_keeps_free_positions(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world(canvas=128, jitter=12, sizes=(0.5, 0.75, 1.0))
    scene = Scene(colour=COLOURS[11], kind="beside", things=(world.things[0], world.things[3]))
    for seed in range(20):
        image, large = world.render(scene, seed), world.render(scene, seed, scale=2)
        reduced = large.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
        error, astray = (np.abs(np.roll(reduced, pixels, axis=1) - image).mean() for pixels in (0, 1))
        assert error < 0.5 * astray  # one pixel to the side would be seen


def test_render_composes_background_and_sprites(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world()
    book, fish = world.things[4], world.things[5]
    image = world.render(Scene(colour=COLOURS[10], kind="above", things=(book, fish)))
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert tuple(image[0, 0]) == COLOURS[10].rgb
    assert tuple(image[16, 32]) == COLOURS[10].rgb  # the hole of the ring
    assert tuple(image[32 + 16, 16 + 8]) == (250, 250, 120)  # the body of the fish, below
    alone = world.render(Scene(colour=COLOURS[10], kind="one", things=(book,)))
    assert tuple(alone[32, 8 + 6]) == (20, 140, 60)  # the left side of the ring, larger


def test_render_keeps_objects_in_their_areas_when_positions_are_free(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world(canvas=128, jitter=12, sizes=(0.5, 0.75, 1.0))
    scene = Scene(colour=COLOURS[11], kind="beside", things=(world.things[0], world.things[3]))
    images = [world.render(scene, seed) for seed in range(40)]
    assert np.array_equal(images[3], world.render(scene, 3))
    assert len({image.tobytes() for image in images}) > 30
    for image in images:
        red = image[:, :, 0] > 150
        blue = image[:, :, 2] > 150
        assert red[:, :64].any()
        assert not red[:, 64:].any()
        assert blue[:, 64:].any()
        assert not blue[:, :64].any()


def test_positions_in_lists_every_rendered_position(make_tiny_world: MakeWorld) -> None:
    world = make_tiny_world(canvas=128, jitter=5, sizes=(0.5, 1.0))
    for cells in LAYOUTS.values():
        for cell in cells:
            for seed in range(20):
                x, y, side = world._place(cell, KeyedRandom(seed))
                assert side in world.sides_in(cell)
                assert (x, y) in world.positions_in(cell, side)


def test_world_load_inverts_save(make_tiny_world: MakeWorld, tmp_path: Path) -> None:
    world = make_tiny_world(things=4, jitter=3, sizes=(0.5, 1.0))
    world.save(tmp_path / "world")
    loaded = EmojiWorld.load(tmp_path / "world")
    assert (loaded.settings, loaded.candidates, loaded.things) == (world.settings, world.candidates, world.things)
    assert loaded.colours == world.colours
    for index in range(20):
        scene = loaded.sample_scene(1, index)
        assert scene == world.sample_scene(1, index)
        assert np.array_equal(loaded.render(scene, index), world.render(scene, index))
        assert loaded.caption(scene, index) == world.caption(scene, index)


def test_world_save_leaves_nothing_when_interrupted(
    make_tiny_world: MakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="no space"):
        make_tiny_world().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_world_load_refuses_other_folders(make_tiny_world: MakeWorld, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"world\.json is missing; make it with: cogview scenes"):
        EmojiWorld.load(tmp_path)
    make_tiny_world().save(tmp_path)
    description = json.loads((tmp_path / "world.json").read_text(encoding="utf-8"))
    (tmp_path / "world.json").write_text(json.dumps({**description, "format_version": 99}), encoding="utf-8")
    with pytest.raises(InputError, match="format version 99, expected 1"):
        EmojiWorld.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"things": "most"}, "things: expected a whole number or one of all"),
        ({"things": 1}, "a number of at least 2, got 1"),
        ({"canvas": 100}, "canvas must be a multiple of 64 pixels, got 100"),
        ({"jitter": -1}, "jitter must be from 0 to 63 pixels, got -1"),
        ({"sizes": []}, "sizes must be numbers from 0.25 to 1.25"),
        ({"sizes": [2.0]}, "sizes must be numbers from 0.25 to 1.25"),
        ({"size": [1.0]}, '"size" is unknown; did you mean "sizes"'),
    ],
)
def test_world_settings_refuse_values_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_mapping(WorldSettings, settings, "scenes section")


def test_world_refuses_missing_objects_and_sprites(make_tiny_world: MakeWorld) -> None:
    with pytest.raises(InputError, match="a world of 7 objects was requested, but only 6 are known"):
        make_tiny_world(things=7)
    world = make_tiny_world()
    with pytest.raises(ValueError, match=r"6 objects need uint8 sprites \(6, 128, 128, 4\)"):
        EmojiWorld(world.settings, world.candidates, world.sprites[:5])


def test_scene_refuses_inconsistent_content(make_tiny_world: MakeWorld) -> None:
    fox, dog = make_tiny_world().things[1:3]
    with pytest.raises(ValueError, match="no scene of kind 'many' holds 7 each of 狐狸"):
        Scene(colour=COLOURS[0], kind="many", things=(fox,), count=7)
    with pytest.raises(ValueError, match="no scene of kind 'one' holds 1 each of 狐狸、狗"):
        Scene(colour=COLOURS[0], kind="one", things=(fox, dog))
    with pytest.raises(ValueError, match="the objects of a pair must differ, got 狐狸 twice"):
        Scene(colour=COLOURS[0], kind="beside", things=(fox, fox))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("world.json", b"[]", "world.json holds no world: expected an object"),
        ("sprites.npz", b"PK\x03\x04", "sprites.npz is damaged or holds no arrays of numpy"),
    ],
)
def test_world_load_refuses_damaged_files(
    make_tiny_world: MakeWorld, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    """Damage was an AttributeError, a BadZipFile or a zlib.error."""
    make_tiny_world(things=2).save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        EmojiWorld.load(tmp_path)


def test_world_load_refuses_sprites_of_another_world(make_tiny_world: MakeWorld, tmp_path: Path) -> None:
    make_tiny_world(things=2).save(tmp_path)
    np.savez(tmp_path / "sprites.npz", sprites=np.zeros((1, 128, 128, 4), dtype=np.uint8))
    with pytest.raises(InputError, match="is damaged: 6 objects need uint8 sprites"):
        EmojiWorld.load(tmp_path)
    np.savez(tmp_path / "sprites.npz", others=np.zeros(1))
    with pytest.raises(InputError, match="holds no sprites"):
        EmojiWorld.load(tmp_path)
