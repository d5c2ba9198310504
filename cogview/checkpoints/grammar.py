"""The grammar of the prompts of a closed-world model: ``grammar.json`` of its checkpoint folder.

It is data about a model, beside the names of ``things.json``: the counts, colours and wordings that it was trained on,
and words outside its world with the things that are near in meaning. ``cogview/pipeline/prompt_reader.py`` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from cogview.config_io import from_mapping
from cogview.errors import InputError
from cogview.plain_data import read_json

GRAMMAR_VERSION = 1
GRAMMAR_FILE = "grammar.json"


@dataclass(frozen=True, kw_only=True)
class PromptGrammar:
    """Words and wordings that a model understands, and words that it does not.

    A wording is text with blanks: ``{what}`` is a thing with or without a count, ``{a}`` and ``{b}`` are single things,
    ``{colour}`` is a colour. A wording of ``pairs`` or ``singles`` fills ``{what}`` of a background.

    Args:
        format_version: Version of the format.
        licence: Sources of the words and their licence.
        examples: Prompts that the model understands.
        counts: Numerals with their values.
        count_forms: Other words for these counts, which the model does not understand, with their numerals.
        measures: Measure words.
        colours: Names of colours.
        colour_forms: Other forms of colours, which the model does not understand, with their names.
        carriers: What a colour may modify.
        relations: Words of relations between two things.
        max_kinds: Maximum number of different things.
        singles: Wordings of one kind of thing.
        pairs: Wordings of two different things.
        pair_examples: The most usual wording of each relation.
        single_backgrounds: Wordings of ``singles`` with a background, the most usual first.
        pair_backgrounds: Wordings of ``pairs`` with a background, the most usual first.
        quantities: Words such as "many" that the model does not understand.
        conjunctions: Words such as "and", which are no relation.
        sizes: Words of sizes that the model does not understand.
        negations: Words of negation that the model does not understand.
        traditional: Traditional characters with their simplified forms.
        near: Words and emoji outside the world, with the names of the things that are nearest in meaning.

    Raises:
        ValueError: The format version is unknown.
    """

    format_version: int
    licence: str
    examples: tuple[str, ...]
    counts: dict[str, int]
    count_forms: dict[str, str] = field(default_factory=dict)
    measures: tuple[str, ...]
    colours: tuple[str, ...]
    colour_forms: dict[str, str]
    carriers: tuple[str, ...]
    relations: tuple[str, ...]
    max_kinds: int
    singles: tuple[str, ...]
    pairs: tuple[str, ...]
    pair_examples: tuple[str, ...]
    single_backgrounds: tuple[str, ...]
    pair_backgrounds: tuple[str, ...]
    quantities: tuple[str, ...] = ()
    conjunctions: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    negations: tuple[str, ...] = ()
    traditional: dict[str, str]
    near: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.format_version != GRAMMAR_VERSION:
            raise ValueError(f"format version {self.format_version} is unknown, expected {GRAMMAR_VERSION}")

    def with_traditional(self, traditional: dict[str, str]) -> PromptGrammar:
        """Return the grammar with a table of traditional characters."""
        return replace(self, traditional=traditional)


def read_grammar(folder: Path) -> PromptGrammar | None:
    """Return the grammar of the prompts of a checkpoint folder, or None if it has none.

    Raises:
        InputError: The file is damaged.
    """
    path = folder / GRAMMAR_FILE
    if not path.is_file():
        return None
    plain = read_json(path)
    if not isinstance(plain, dict):
        raise InputError(f"{path} is no grammar: expected settings")
    return from_mapping(PromptGrammar, plain, where=str(path))
