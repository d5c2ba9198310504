"""The grammar of the prompts of an emoji world: in-world prompts are silent, and the packaged file is up to date."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cogview.checkpoints.checkpoint import NamedThing
from cogview.checkpoints.checkpoint import read_things as read_named_things
from cogview.checkpoints.grammar import read_grammar
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.cli.package import prompt_grammar
from cogview.emoji.captions import CLAUSE_ON_COLOUR, NOUN_ON_COLOUR, PAIRS
from cogview.emoji.prompt_grammar import GrammarFiles, build_grammar
from cogview.emoji.scene import SceneWeights
from cogview.emoji.things import EmojiFiles, read_things
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.pipeline.prompt_reader import PromptReader


def embedded_world() -> EmojiWorld:
    """Return the world of the embedded model for captions alone, with the measure words of its grammar."""
    import numpy as np

    from cogview.emoji.settings import WorldSettings
    from cogview.emoji.things import EmojiObject, name_tables

    tables = name_tables()
    things = [
        EmojiObject(
            emoji=thing.emoji,
            name=thing.name,
            synonyms=thing.synonyms,
            measures=(*tables.measures.get(thing.emoji.replace("\ufe0f", ""), ("只",)), "个"),
        )
        for thing in read_named_things(resolve_checkpoint("cogview-emoji"))
    ]
    return EmojiWorld(WorldSettings(), things, np.zeros((len(things), 128, 128, 4), dtype=np.uint8))


def test_problems_are_none_for_held_out_captions():
    world, folder = embedded_world(), resolve_checkpoint("cogview-emoji")
    grammar = read_grammar(folder)
    assert grammar is not None
    reader = PromptReader(grammar, read_named_things(folder))
    for index in range(600):
        caption = world.caption(world.sample_scene(2, index, held_out=True), seed=index)
        assert reader.convert(caption) == (caption, [])
        assert reader.problems(caption) == [], caption


def test_grammar_of_the_embedded_model_has_the_wordings_of_captions():
    grammar = read_grammar(resolve_checkpoint("cogview-emoji"))
    assert grammar is not None
    assert {wording for wordings in PAIRS.values() for wording in wordings} <= set(grammar.pairs)
    assert set(NOUN_ON_COLOUR) <= set(grammar.single_backgrounds)
    assert set(CLAUSE_ON_COLOUR) <= set(grammar.pair_backgrounds)
    assert "Copyright © 1991-2022 Unicode, Inc." in grammar.licence


def test_grammar_of_the_embedded_model_suggests_its_own_things_alone():
    folder = resolve_checkpoint("cogview-emoji")
    names = {thing.name: {thing.name, *thing.synonyms} for thing in read_named_things(folder)}
    grammar = read_grammar(folder)
    assert grammar is not None
    assert {name for near in grammar.near.values() for name in near} <= set(names)
    assert not set().union(*names.values()) & set(grammar.near)


@pytest.mark.font
def test_build_grammar_makes_the_file_of_the_embedded_model():
    """Other versions of the CLDR may know other words; all else follows from the captions and ``grammar.yaml``."""
    folder = resolve_checkpoint("cogview-emoji")
    names = {thing.name for thing in read_named_things(folder)}
    built = build_grammar([thing for thing in read_things(EmojiFiles()) if thing.name in names])
    stored = read_grammar(folder)
    assert stored is not None
    assert replace(built, near={}, traditional={}) == replace(stored, near={}, traditional={})
    assert built.near["宇航员"] == stored.near["宇航员"] == ("火箭",)
    assert built.traditional["隻"] == stored.traditional["隻"] == "只"


def test_build_grammar_names_the_package_of_a_missing_file(tmp_path):
    missing = tmp_path / "zh.xml"
    with pytest.raises(InputError, match=f"{re.escape(str(missing))} is missing; .* apt install unicode-cldr-core"):
        build_grammar([], GrammarFiles(annotations=(missing,)))


@pytest.mark.font
def test_grammar_of_a_world_without_pairs_notes_prompts_of_two_things(make_tiny_world, tmp_path):
    known = make_tiny_world().things
    things = [NamedThing(emoji=thing.emoji, name=thing.name, synonyms=thing.synonyms) for thing in known]
    found = {}
    for pair in (0, 1):
        make_tiny_world(weights=SceneWeights(pair=pair)).save(tmp_path / str(pair))
        grammar = prompt_grammar(tmp_path / str(pair))
        assert grammar is not None
        reader = PromptReader(grammar, things)
        assert reader.problems("红色背景上的三只狐狸") == []
        found[pair] = reader.problems("左边是狐狸，右边是狗")
    assert found[1] == []
    assert "but an image shows at most 1" in found[0][0]
