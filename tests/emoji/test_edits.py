"""Edits share everything that they do not name, are held out by their results, and are parsed to their changes."""

from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise

import numpy as np
import pytest

from cogview.data.image_dataset import texts
from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.attributes import BOARDS, STYLES, TYPEFACES, Sign
from cogview.emoji.datasets import EditDataset, named_regions
from cogview.emoji.edits import EDIT_KINDS, Change, Edit, EditSampler, apply_change, changed_cells, unchanged_share
from cogview.emoji.instructions import InstructionReader, write_instruction
from cogview.emoji.scene import COLOURS, PLACES, Scene, SceneWeights
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError

MakeWorld = Callable[..., EmojiWorld]
WHITE, BLUE = COLOURS[10], COLOURS[5]


@pytest.fixture(scope="module")
def world(make_rich_world: MakeWorld) -> EmojiWorld:
    return make_rich_world()


@pytest.fixture(scope="module")
def edits(world: EmojiWorld) -> EditSampler:
    return EditSampler(world)


@pytest.fixture(scope="module")
def reader(world: EmojiWorld) -> InstructionReader:
    return InstructionReader(world.things, world.colours, world.traditional)


def test_edits_are_a_function_of_their_arguments_and_of_every_kind(world: EmojiWorld, edits: EditSampler) -> None:
    found = [edits.sample(3, index) for index in range(800)]
    assert found[:50] == [EditSampler(world).sample(3, index) for index in range(50)]
    kinds = Counter(edit.change.kind for edit in found)
    assert set(kinds) == set(EDIT_KINDS)
    assert min(kinds.values()) > 65
    assert {edit.change.kind for edit in (edits.sample(3, index, kind="swap") for index in range(20))} == {"swap"}


def test_edits_are_held_out_by_their_results(edits: EditSampler) -> None:
    for index in range(300):
        trained, measured = edits.sample(0, index), edits.sample(0, index, held_out=True)
        assert not trained.result.held_out
        assert not trained.source.held_out
        assert measured.result.held_out


def test_edits_change_what_they_name_and_nothing_else(world: EmojiWorld, edits: EditSampler) -> None:
    named = {
        "background": {"colour", "pattern"},
        "replace": {"things"},
        "add": {"kind", "things"},
        "remove": {"kind", "things"},
        "count": {"kind", "count"},
        "swap": {"things"},
        "style": {"style"},
        "text": {"sign"},
    }
    for index in range(600):
        edit = edits.sample(5, index)
        before, after = vars(edit.source), vars(edit.result)
        changed = {name for name in before if before[name] != after[name]}
        assert changed
        assert changed <= named[edit.change.kind]
        assert apply_change(edit.source, edit.change) == edit.result
        if edit.change.kind in ("remove", "text") or (edit.change.kind == "add" and edit.source.kind != "one"):
            assert not changed_cells(world, edit).all()


def test_changed_cells_are_those_of_the_replaced_object(make_rich_world: MakeWorld) -> None:
    world = make_rich_world()
    apple, fox, dog = world.things[:3]
    source = Scene(colour=BLUE, kind="beside", things=(apple, fox))
    change = Change(kind="replace", old=fox, new=dog)
    result = apply_change(source, change)
    assert result is not None
    changed = changed_cells(world, Edit(source=source, change=change, result=result))
    assert changed[2:6, 4:].any()
    assert not changed[:, :4].any()
    assert not changed[:2].any()
    assert not changed[6:].any()


def test_unchanged_share_counts_only_codes_that_should_stay() -> None:
    before = np.arange(64).reshape(8, 8)
    changed = np.zeros((8, 8), dtype=bool)
    changed[:, :4] = True
    after = before.copy()
    after[:, :4] = 99
    assert unchanged_share(before, after, changed) == 1
    after[0, 4:] = 99
    assert unchanged_share(before, after, changed) == 1 - 4 / 32
    assert unchanged_share(before, after, np.ones((8, 8), dtype=bool)) == 1
    with pytest.raises(ValueError, match="codes and mask differ in shape"):
        unchanged_share(before, after[:4], changed)


def test_apply_change_refuses_what_does_not_suit_a_scene(world: EmojiWorld) -> None:
    apple, fox, dog = world.things[:3]
    one = Scene(colour=BLUE, kind="one", things=(fox,))
    sign = Scene(colour=WHITE, kind="sign", things=(), sign=Sign(text="福", board=BOARDS[3], typeface=TYPEFACES[0]))
    left = Scene(colour=BLUE, kind="left", things=(fox,))
    assert apply_change(one, Change(kind="background", colour=BLUE)) is None
    assert apply_change(one, Change(kind="swap")) is None
    assert apply_change(one, Change(kind="replace", old=dog, new=apple)) is None
    assert apply_change(one, Change(kind="replace", old=fox, new=fox)) is None
    assert apply_change(one, Change(kind="text", text="福")) is None
    assert apply_change(sign, Change(kind="text", text="福")) is None
    assert apply_change(sign, Change(kind="background", colour=BLUE)) is None  # the board would vanish
    assert apply_change(left, Change(kind="add", new=dog, place="left")) is None
    assert apply_change(left, Change(kind="add", new=dog, place="top")) is None
    added = apply_change(left, Change(kind="add", new=dog, place="right"))
    assert added == Scene(colour=BLUE, kind="beside", things=(fox, dog))
    assert apply_change(added, Change(kind="remove", old=dog)) == left


def test_instructions_are_the_documented_sentences(world: EmojiWorld) -> None:
    apple, fox, _dog = world.things[:3]
    pair = Scene(colour=WHITE, kind="beside", things=(apple, fox))
    left = Scene(colour=WHITE, kind="left", things=(apple,))
    one = Scene(colour=WHITE, kind="one", things=(apple,))
    sign = Scene(colour=WHITE, kind="sign", things=(), sign=Sign(text="福", board=BOARDS[3], typeface=TYPEFACES[0]))
    expected = [
        (pair, Change(kind="background", colour=BLUE), "把背景换成蓝色"),
        (pair, Change(kind="replace", old=fox, new=world.things[3]), "把狐狸换成汽车"),
        (left, Change(kind="add", new=fox, place="right"), "加一只狐狸在右边"),
        (pair, Change(kind="remove", old=apple), "去掉左边的苹果"),
        (one, Change(kind="count", count=3), "变成三个"),
        (pair, Change(kind="swap"), "左右交换"),
        (pair, Change(kind="style", style=STYLES[2]), "换成扁平风格"),
        (sign, Change(kind="text", text="茶"), "把字换成“茶”"),
    ]
    for source, change, text in expected:
        result = apply_change(source, change)
        assert result is not None
        edit = Edit(source=source, change=change, result=result)
        assert text in {write_instruction(edit, KeyedRandom(seed)) for seed in range(300)}


@pytest.mark.parametrize("in_traditional", [False, True])
def test_instruction_reader_parses_instructions_to_their_changes(
    world: EmojiWorld, edits: EditSampler, reader: InstructionReader, in_traditional: bool
) -> None:
    traditional = world.traditional if in_traditional else None
    others = [edits.sample(9, index) for index in range(40)]
    for index in range(1000):
        edit = edits.sample(7, index, held_out=index % 5 == 0)
        text = write_instruction(edit, KeyedRandom("test", index), traditional)
        parsed = reader.instructions(text)
        assert any(one.asks_for(edit) for one in parsed), text
        for other in others:
            if any(one.asks_for(other) for one in parsed):
                same = apply_change(edit.source, other.change)
                assert same is None or same == edit.result, text


@pytest.mark.parametrize("text", ["", "把背景换成", "把狐狸换成", "变成七个", "换成立方体风格", "把字换成茶", "狐狸"])
def test_instruction_reader_refuses_other_texts(reader: InstructionReader, text: str) -> None:
    assert reader.instructions(text) == ()


def test_edit_chains_continue_with_the_result(edits: EditSampler) -> None:
    for index in range(30):
        chain = edits.sample_chain(0, index, 5)
        assert len(chain) == 5
        assert all(one.result == other.source for one, other in pairwise(chain))


def test_edit_sampler_of_a_plain_world_has_the_kinds_it_can(make_tiny_world: MakeWorld) -> None:
    edits = EditSampler(make_tiny_world())
    assert set(edits.kinds) == set(EDIT_KINDS) - {"style", "text"}
    assert {edits.sample(0, index).change.kind for index in range(100)} == set(edits.kinds)
    with pytest.raises(InputError, match="this world has no edits of kind style; it has: background, replace"):
        edits.sample(0, 0, kind="style")


def test_edit_dataset_renders_sources_and_results(world: EmojiWorld) -> None:
    dataset = EditDataset(world, seed=4)
    example = dataset[3]
    edit = EditSampler(world).sample(4, 3)
    assert np.array_equal(example.render(1), world.render(edit.result))
    assert np.array_equal(example.render_source(1), world.render(edit.source))
    assert example.captions == (world.caption(edit.result, 3),)
    assert len({dataset[index].instruction for index in range(100)}) > 60
    assert dataset.provenance["edits"] == list(EDIT_KINDS)
    assert len(example.regions) == len(edit.result.shown) + len(edit.result.sign.text if edit.result.sign else "")


def test_named_regions_are_those_of_objects_and_characters(world: EmojiWorld) -> None:
    scenes = (world.sample_scene(0, index) for index in range(2000))
    scene = next(one for one in scenes if one.kind == "label" and one.sign and len(one.sign.text) == 2)
    found = [(region.names, region.box) for region in named_regions(scene)]
    left, right = scene.sign.text
    assert found == [
        (scene.things[0].names, (0.0, 0.0, 1.0, 0.5)),
        ((left,), (0.0, 0.5, 0.5, 1.0)),
        ((right,), (0.5, 0.5, 1.0, 1.0)),
    ]
    assert set(scene.sign.text) <= set(EditDataset(world, seed=0).names)
    assert len(set(EditDataset(world, seed=0).names)) == len(EditDataset(world, seed=0).names)


def test_texts_of_edits_are_captions_and_instructions(world: EmojiWorld) -> None:
    dataset = EditDataset(world, seed=4)
    first, second = dataset[0], dataset[1]
    expected = [first.captions[0], first.instruction, second.captions[0], second.instruction]
    assert list(islice(texts(dataset), 4)) == expected


def test_edits_start_from_kinds_of_scenes_by_their_weights(make_rich_world: MakeWorld) -> None:
    sampler = EditSampler(make_rich_world(), SceneWeights(one=8, many=2, pair=2, place=4))
    kinds = Counter(sampler.sample(0, index, kind="background").source.kind for index in range(1600))
    expected = {"one": 800, "many": 200, "beside": 100, "above": 100, **dict.fromkeys(PLACES, 100)}
    assert kinds.keys() == expected.keys()
    assert all(abs(count - expected[kind]) < 5 * expected[kind] ** 0.5 for kind, count in kinds.items())
