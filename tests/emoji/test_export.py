"""Sprites of another style, from a folder: their world, its grader, and scenes that are exported as pictures."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cogview.cli.main import main
from cogview.data.sources.tar_shards import TarShard
from cogview.emoji.captions import CaptionReader
from cogview.emoji.evaluation.scenes import held_out_scenes
from cogview.emoji.export import SceneRecipe, export_scenes
from cogview.emoji.grader import SceneGrader
from cogview.emoji.scene import SceneWeights
from cogview.emoji.things import EmojiFiles, EmojiObject, read_sprites
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

ANNOTATIONS = """<ldml><annotations>
<annotation cp="🍎" type="tts">红苹果</annotation>
<annotation cp="🦊" type="tts">狐狸</annotation>
<annotation cp="☂" type="tts">伞</annotation>
<annotation cp="🐻‍❄" type="tts">北极熊</annotation>
</annotations></ldml>"""
EMOJI_TEST = """# group: Animals & Nature
# subgroup: animal-mammal
1F98A ; fully-qualified # 🦊
1F43B 200D 2744 FE0F ; fully-qualified # 🐻‍❄️
1F34E ; fully-qualified # 🍎
2602 FE0F ; fully-qualified # ☂️
"""
SPRITES = {"1f34e.png": (220, 20, 40), "1F98A.webp": (250, 150, 30), "1f43b-200d-2744-fe0f.png": (200, 220, 240)}
NO_PAIRS = SceneWeights(one=2, many=1, pair=0)


@pytest.fixture
def files(tmp_path: Path) -> EmojiFiles:
    """Lists of four emoji, and no font."""
    names, test = tmp_path / "zh.xml", tmp_path / "emoji-test.txt"
    names.write_text(ANNOTATIONS, encoding="utf-8")
    test.write_text(EMOJI_TEST, encoding="utf-8")
    return EmojiFiles(font=tmp_path / "missing.ttf", annotations=(names, names), emoji_test=test)


@pytest.fixture
def sprites(tmp_path: Path) -> Path:
    """Pictures of three of the four emoji: a disc, a bar and a frame; and files that are none of theirs."""
    folder = tmp_path / "sprites"
    folder.mkdir()
    y, x = np.mgrid[:128, :128]
    shapes = [(x - 64) ** 2 + (y - 64) ** 2 < 55**2, abs(y - 64) < 24, (abs(x - 64) > 40) | (abs(y - 64) > 40)]
    for shape, (name, colour) in zip(shapes, SPRITES.items(), strict=True):
        pixels = np.zeros((128, 128, 4), dtype=np.uint8)
        pixels[shape] = (*colour, 255)
        Image.fromarray(pixels).save(folder / name, lossless=True)
    (folder / "1f600.png").write_bytes((folder / "1f34e.png").read_bytes())  # a smiley, of which no scene is made
    (folder / "README.md").write_text("sprites", encoding="utf-8")
    return folder


def make_world(files: EmojiFiles, sprites: Path) -> EmojiWorld:
    return EmojiWorld.create(SceneRecipe(weights=NO_PAIRS).world, files, sprites)


def test_world_of_sprites_from_a_folder_needs_no_font(files: EmojiFiles, sprites: Path) -> None:
    world = make_world(files, sprites)
    # The umbrella has no picture; case and variation selectors of file names do not matter.
    assert [thing.name for thing in world.things] == ["红苹果", "狐狸", "北极熊"]
    for sprite, colour in zip(world.sprites, SPRITES.values(), strict=True):
        assert {tuple(pixel) for pixel in sprite.reshape(-1, 4)} == {(0, 0, 0, 0), (*colour, 255)}


def test_read_sprites_scales_pictures_of_other_sizes_and_keeps_their_shape(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 32), (10, 20, 30, 255)).save(tmp_path / "1f98a.png")
    things, (sprite,) = read_sprites([EmojiObject(emoji="🦊", name="狐狸")], tmp_path)
    assert [thing.name for thing in things] == ["狐狸"]
    assert (sprite[32:96] == (10, 20, 30, 255)).all()
    assert (sprite[:32, :, 3] == 0).all()
    assert (sprite[96:, :, 3] == 0).all()


def test_grader_of_a_world_of_sprites_knows_its_scenes(files: EmojiFiles, sprites: Path) -> None:
    world = make_world(files, sprites)
    grader = SceneGrader(world)
    asked = held_out_scenes(world, 8)
    assert {scene.kind for scene, _ in asked} == {"one", "many"}
    assert all(grader.grade(world.render(scene), scene).everything for scene, _ in asked)
    scene, other = asked[0][0], next(scene for scene, _ in asked if scene.things != asked[0][0].things)
    assert not grader.grade(world.render(other), scene).object


def test_read_sprites_refuses_folders_without_sprites_and_names_broken_ones(sprites: Path, tmp_path: Path) -> None:
    fox = EmojiObject(emoji="🦊", name="狐狸")
    with pytest.raises(InputError, match=r"no folder of sprites .*nowhere"):
        read_sprites([fox], tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no picture in .*of a known emoji, such as 1f98b\.png"):
        read_sprites([EmojiObject(emoji="🦋", name="蝴蝶")], sprites)
    (sprites / "1F98A.webp").write_bytes((sprites / "1F98A.webp").read_bytes()[:30])
    with pytest.raises(InputError, match=r"1F98A\.webp"):
        read_sprites([fox], sprites)


def test_export_scenes_writes_training_scenes_with_all_their_captions(
    files: EmojiFiles, sprites: Path, tmp_path: Path
) -> None:
    world = make_world(files, sprites)
    settings = SceneRecipe(weights=NO_PAIRS, exported=400, seed=3)
    paths = [tmp_path / name for name in ("a.tar", "b.tar", "c.tar")]
    counts = export_scenes(world, settings, paths[0])
    assert export_scenes(world, settings, paths[1]) == counts
    assert paths[0].read_bytes() == paths[1].read_bytes()
    export_scenes(world, SceneRecipe(weights=NO_PAIRS, exported=400, seed=4), paths[2])
    assert paths[0].read_bytes() != paths[2].read_bytes()

    # Every meaning of one object or several is one picture, with different captions of that meaning alone.
    records = list(TarShard(paths[0]))
    sampled = {world.sample_scene(3, index).meaning: world.sample_scene(3, index) for index in range(400)}
    assert counts == (len(records), sum(len(record.captions) for record in records))
    assert len(records) == len(sampled)
    reader = CaptionReader(world.things)
    for record, scene in zip(records, sampled.values(), strict=True):
        assert not scene.held_out
        assert scene.kind in ("one", "many")
        assert len(set(record.captions)) == len(record.captions)
        for caption in record.captions:
            parsed = reader.read(caption)
            assert parsed is not None
            assert parsed.colour in (None, scene.colour)
            assert (parsed.count, parsed.things) == (scene.count, (frozenset({scene.things[0].emoji}),))
    with tarfile.open(paths[0]) as shard, Image.open(shard.extractfile("000000.png")) as first:  # type: ignore[arg-type]
        assert (np.asarray(first) == world.render(next(iter(sampled.values())))).all()


def test_scenes_command_makes_world_and_pictures_of_a_recipe(
    files: EmojiFiles, sprites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"sprites": str(sprites), "things": 3, "weights": {"one": 1, "many": 0, "pair": 0}, "exported": 60}
    recipe = tmp_path / "style.yaml"
    recipe.write_text(yaml.safe_dump({"work": str(tmp_path / "work"), "scenes": section}), encoding="utf-8")
    lists = ["--annotations", *map(str, files.annotations), "--emoji-test", str(files.emoji_test)]
    assert main(["scenes", str(recipe), *lists]) == 0
    printed = capsys.readouterr()
    assert "3 objects have a sprite" in printed.err
    records = list(TarShard(tmp_path / "work" / "scenes.tar"))
    assert f"{len(records)} pictures with {sum(len(record.captions) for record in records)} captions" in printed.err
    world = EmojiWorld.load(tmp_path / "work" / "world")
    assert world.settings.weights == SceneWeights(one=1, many=0, pair=0)
    assert {scene.kind for scene, _ in held_out_scenes(world, 2)} == {"one"}
    assert main(["run", str(recipe)]) == 0  # all that it asks for is there
    assert "scenes: already done" in capsys.readouterr().err
    (tmp_path / "work" / "scenes.tar").unlink()
    assert main(["scenes", str(recipe), *lists]) == 0
    assert len(list(TarShard(tmp_path / "work" / "scenes.tar"))) == len(records)
