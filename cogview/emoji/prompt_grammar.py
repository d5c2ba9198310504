"""The grammar of the prompts of an emoji world, which a packaged model carries as ``grammar.json``.

Counts, colours, measure words and wordings are those of the captions. The annotations of the Unicode CLDR say which
words are near a thing in meaning, and Unihan says which traditional characters stand for simplified ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cogview.checkpoints.grammar import GRAMMAR_VERSION, PromptGrammar
from cogview.config_io import from_mapping
from cogview.emoji.captions import CLAUSE_ON_COLOUR, NOUN_ON_COLOUR, NUMERALS, PAIRS
from cogview.emoji.scene import COLOURS
from cogview.emoji.things import (
    VARIATION_SELECTOR,
    Annotation,
    EmojiFiles,
    EmojiObject,
    name_tables,
    read_annotations,
    read_groups,
)
from cogview.emoji.traditional import VARIANTS, read_simplified
from cogview.errors import InputError
from cogview.plain_data import read_yaml

_NEAREST = 3  # things that are named for a word
_SAME_SUBGROUP = 0.1  # score of a thing of the same subgroup; a shared keyword that ten emoji have counts as much
_DISTANCE = 0.001  # by which that score falls with each emoji between the two
_MAX_ENGLISH_USES = 16  # English keywords of more emoji are too vague
_OUTSIDE_GROUPS = ("Food & Drink", "Animals & Nature", "Objects", "Travel & Places", "Activities", "People & Body")
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
_FOLDER = Path("/usr/share/unicode")


@dataclass(frozen=True, kw_only=True)
class GrammarFiles:
    """Paths of the files to read; the defaults are those of Debian.

    Args:
        annotations: Simplified Chinese annotations of the CLDR.
        traditional: Traditional Chinese annotations.
        english: English annotations.
        emoji_test: The list of emoji, emoji-test.txt.
        variants: Unihan_Variants.txt, compressed by bzip2.
    """

    annotations: tuple[Path, ...] = EmojiFiles().annotations
    traditional: tuple[Path, ...] = (_FOLDER / "cldr/common/annotations/zh_Hant.xml",)
    english: tuple[Path, ...] = (_FOLDER / "cldr/common/annotations/en.xml",)
    emoji_test: Path = EmojiFiles().emoji_test
    variants: Path = VARIANTS

    def check(self) -> None:
        """Check that all files exist.

        Raises:
            InputError: A file is missing; the message names its Debian package.
        """
        needed = [(path, "unicode-cldr-core") for path in (*self.annotations, *self.traditional, *self.english)]
        for path, package in (*needed, (self.emoji_test, "unicode-data"), (self.variants, "unicode-data")):
            if not path.is_file():
                raise InputError(f"{path} is missing; on Debian or Ubuntu: apt install {package}")


@dataclass(frozen=True, kw_only=True)
class _GrammarTables:
    """Content of ``grammar.yaml``."""

    examples: tuple[str, ...]
    carriers: tuple[str, ...]
    relations: tuple[str, ...]
    singles: tuple[str, ...]
    single_backgrounds: tuple[str, ...]
    pairs: tuple[str, ...]
    pair_backgrounds: tuple[str, ...]
    quantities: str
    count_forms: dict[str, str]
    conjunctions: str
    sizes: str
    negations: str
    traditional_variants: str
    vague_keywords: str
    related_subgroups: str
    licence: str


@cache
def _tables() -> _GrammarTables:
    """Return the tables of ``grammar.yaml``, which is read once."""
    path = Path(__file__).with_name("grammar.yaml")
    return from_mapping(_GrammarTables, read_yaml(path), str(path))


def build_grammar(
    things: Sequence[EmojiObject], files: GrammarFiles | None = None, *, max_kinds: int = 2
) -> PromptGrammar:
    """Return the grammar of the prompts of a model.

    Args:
        things: Objects that the model was trained on, the commonest first.
        files: Paths of the files to read; those of Debian by default.
        max_kinds: Different things in one image, at most: 1 for a model that has seen no pairs.

    Raises:
        InputError: A file is missing.
    """
    files = files or GrammarFiles()
    files.check()
    tables = _tables()
    simplified = read_simplified(files.variants) | {pair[0]: pair[1] for pair in tables.traditional_variants.split()}
    colours = [name for colour in COLOURS for name in colour.names]
    forms = {name.removesuffix("色"): colour.name for colour in COLOURS for name in colour.names}
    measures = {word for words in name_tables().measures.values() for word in words}
    measures |= {*name_tables().subgroup_measures.values(), *(word for thing in things for word in thing.measures)}
    own_names = {name for thing in things for name in thing.names}
    counts = {word: count for count, numeral in NUMERALS.items() for word in (numeral, str(count))}
    counted = [number + measure for number in counts for measure in measures]
    modified = {
        before + name for before in ("", *colours, *forms, *tables.sizes.split(), *counted) for name in own_names
    }
    near = {word: names for word, names in _find_near(things, files, simplified).items() if word not in modified}
    grammar = PromptGrammar(
        format_version=GRAMMAR_VERSION,
        licence=tables.licence,
        examples=tables.examples,
        counts=counts,
        count_forms=tables.count_forms,
        measures=tuple(sorted(measures)),
        colours=tuple(colours),
        colour_forms=forms,
        carriers=tables.carriers,
        relations=tables.relations,
        max_kinds=max_kinds,
        singles=("{what}", *tables.singles),
        pairs=_distinct(*PAIRS.values(), tables.pairs),
        pair_examples=tuple(patterns[0] for patterns in PAIRS.values()),
        single_backgrounds=_distinct(NOUN_ON_COLOUR, ("{what}",), tables.single_backgrounds),
        pair_backgrounds=_distinct(CLAUSE_ON_COLOUR, ("{what}",), tables.pair_backgrounds),
        quantities=tuple(tables.quantities.split()),
        conjunctions=tuple(tables.conjunctions.split()),
        sizes=tuple(tables.sizes.split()),
        negations=tuple(tables.negations.split()),
        traditional={},
        near=near,
    )
    return grammar.with_traditional(_needed(simplified, grammar, own_names))


def _distinct(*groups: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for group in groups for word in group))


def _needed(simplified: dict[str, str], grammar: PromptGrammar, names: Iterable[str]) -> dict[str, str]:
    """Return the traditional characters whose simplified forms the grammar or a name has."""
    words = [*grammar.near, *grammar.measures, *grammar.colours, *grammar.quantities, *grammar.sizes, *names]
    words += grammar.conjunctions
    words += [*grammar.negations, *grammar.pairs, *grammar.single_backgrounds, *grammar.pair_backgrounds]
    known = set("".join(words))
    return {old: new for old, new in simplified.items() if new in known and old not in known}


def _find_near(
    things: Sequence[EmojiObject], files: GrammarFiles, simplified: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """The things that are nearest in meaning to words and emoji, the nearest first."""
    tables = _tables()
    vague = set(tables.vague_keywords.split())
    by_emoji = {thing.emoji.replace(VARIATION_SELECTOR, ""): thing for thing in things}
    chinese, english = read_annotations(files.annotations), read_annotations(files.english)
    table = str.maketrans(simplified)
    traditional = {
        emoji: Annotation(
            name=one.name.translate(table), keywords=tuple(word.translate(table) for word in one.keywords)
        )
        for emoji, one in read_annotations(files.traditional).items()
    }
    near: dict[str, dict[str, None]] = {}
    english_uses = Counter(word for one in english.values() for word in one.keywords)
    for emoji, thing in by_emoji.items():
        for one in (chinese.get(emoji), traditional.get(emoji)):
            for word in (one.name, *one.keywords) if one else ():
                if word not in vague:
                    near.setdefault(word.replace(" ", ""), {})[thing.name] = None
        if (one := english.get(emoji)) is not None:
            for word in (one.name, *one.keywords):
                if word not in vague and english_uses[word] <= _MAX_ENGLISH_USES and re.fullmatch("[a-z]{3,}", word):
                    near.setdefault(word, {})[thing.name] = None
    for emoji, names in _related_emoji(by_emoji, chinese, read_groups(files.emoji_test), vague).items():
        near.setdefault(emoji, dict.fromkeys(names))
        near.setdefault(chinese[emoji].name.replace(" ", ""), dict.fromkeys(names))
    return {word: tuple(names)[:_NEAREST] for word, names in near.items() if names}


def _related_emoji(
    by_emoji: dict[str, EmojiObject],
    annotations: dict[str, Annotation],
    groups: Sequence[tuple[str, str, str]],
    vague: set[str],
) -> dict[str, list[str]]:
    """The nearest things of every other emoji, by shared keywords and by the order of emoji-test.txt."""
    related = _tables().related_subgroups.split()
    order = {
        emoji.replace(VARIATION_SELECTOR, ""): (index, subgroup)
        for index, (emoji, group, subgroup) in enumerate(groups)
        if group in _OUTSIDE_GROUPS and not _SKIN_TONES.search(emoji)
    }
    words = {emoji: set(one.keywords) - vague for emoji, one in annotations.items() if emoji in order}
    uses = Counter(word for keywords in words.values() for word in keywords)
    nearest = {}
    for emoji, (index, subgroup) in order.items():
        if emoji in by_emoji or emoji not in words:
            continue
        scores = {}
        for other, thing in by_emoji.items():
            score = sum(
                1 / uses[word] for word in words[emoji] & (words.get(other, set()) | set(thing.names)) if uses[word]
            )
            if subgroup in related and other in order and order[other][1] == subgroup:
                score += max(_SAME_SUBGROUP - _DISTANCE * abs(order[other][0] - index), _DISTANCE)
            if score:
                scores[thing.name] = score
        nearest[emoji] = sorted(scores, key=lambda name: -scores[name])[:_NEAREST]
    return nearest
