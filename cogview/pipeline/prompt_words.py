"""Split a prompt into the words that the grammar of a model knows, and find its nouns and its wording."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cogview.checkpoints.checkpoint import NamedThing
from cogview.checkpoints.grammar import PromptGrammar

WordKind = Literal[
    "thing", "count", "quantity", "colour", "colour_form", "word", "conjunction", "size", "negation", "outside", "mark"
]

NOUN = "{noun}"
"""A thing with or without a count, in a wording."""

COMMAS = frozenset("，、；。：,;:")
"""Marks between the parts of a prompt."""

VARIATION_SELECTOR = "\ufe0f"
NUMERAL = re.compile(r"\d+(?:\.\d+)?|[〇零一二两三四五六七八九十百千万亿]+")
SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
LATIN = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")

_SYMBOLIC_MARKS = "~～|<>=^`"
_JOINER = "\u200d"  # between the emoji of a sequence
_REGIONS = range(0x1F1E6, 0x1F200)  # letters, two of which are a flag
_COSTS: dict[str, float] = {"mark": 0, "count": 0.9, "outside": 1.5}  # of a token; all others cost 1
_UNKNOWN_COST = 4.0  # of a character without any meaning
_MAX_NEAR = 3  # things that are near to several foreign words


@dataclass(frozen=True, kw_only=True)
class PromptToken:
    """A word or mark of a prompt.

    Args:
        text: The word, as it is written.
        kind: Its kind.
        meaning: The usual name of a thing or colour.
        count: The number of a count; None if it is unknown.
        near: For a word outside the grammar, the things that are near in meaning.
    """

    text: str
    kind: WordKind
    meaning: str = ""
    count: int | None = None
    near: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptNoun:
    """A thing of a prompt with its count, if it has one.

    Args:
        text: Count and thing, as they are written.
        word: The thing, as it is written.
        name: The usual name of the thing.
        count: The number; None without a count, or for an unknown one.
    """

    text: str
    word: str
    name: str
    count: int | None


class PromptScanner:
    """Finds the words of prompts.

    Args:
        grammar: Words and wordings that a model understands.
        things: Things that it knows.
    """

    def __init__(self, grammar: PromptGrammar, things: Sequence[NamedThing]) -> None:
        self._grammar = grammar
        self._things = things
        self._words = dict(self._all_words())
        self._longest = max(map(len, self._words))

    def _all_words(self) -> Iterator[tuple[str, PromptToken]]:
        """Yield the words that the reader finds, the ones that win last."""
        grammar = self._grammar
        for word, near in grammar.near.items():
            yield word, PromptToken(text=word, kind="outside", near=near)
        wordings = (*grammar.pairs, *grammar.singles, *grammar.single_backgrounds, *grammar.pair_backgrounds)
        separators = "|".join(map(re.escape, (*COMMAS, *grammar.carriers, *grammar.relations)))
        for wording in wordings:
            for literal in re.split(rf"\{{\w+\}}|{separators}", wording):
                if literal:
                    yield literal, PromptToken(text=literal, kind="word")
        kinds: tuple[tuple[WordKind, Iterable[str]], ...] = (
            ("size", grammar.sizes),
            ("negation", grammar.negations),
            ("quantity", grammar.quantities),
            ("conjunction", grammar.conjunctions),
            ("word", (*grammar.carriers, *grammar.relations)),
        )
        for kind, words in kinds:
            yield from ((word, PromptToken(text=word, kind=kind)) for word in words)
        for form, colour in grammar.colour_forms.items():
            yield form, PromptToken(text=form, kind="colour_form", meaning=colour)
        for colour in grammar.colours:
            yield colour, PromptToken(text=colour, kind="colour", meaning=colour)
        for thing in self._things:
            for name in (thing.name, *thing.synonyms):
                yield (
                    unicodedata.normalize("NFKC", name).lower(),
                    PromptToken(text=name, kind="thing", meaning=thing.name),
                )

    def scan(self, text: str) -> list[PromptToken]:
        """Return the words of a text so that few characters lack a meaning and the words are few."""
        lower = "".join(character.lower() if len(character.lower()) == 1 else character for character in text)
        costs, ends, best = [0.0] * (len(text) + 1), [0] * len(text), dict[int, PromptToken]()
        for start in range(len(text) - 1, -1, -1):
            options = []
            for token in self._tokens_at(text, lower, start):
                known = token.kind != "outside" or token.near or LATIN.fullmatch(token.text)
                cost = _COSTS.get(token.kind, 1.0) if known else _UNKNOWN_COST
                end = start + len(token.text)
                options.append((cost + costs[end], -end, token))
            cost, end, chosen = min(options, key=lambda option: option[:2])
            costs[start], ends[start], best[start] = cost, -end, chosen
        tokens, start = [], 0
        while start < len(text):
            tokens.append(best[start])
            start = ends[start]
        return _merge_unknown(tokens)

    def _tokens_at(self, text: str, lower: str, start: int) -> Iterator[PromptToken]:
        """Yield every token that begins at an index of a text, ``lower`` in lower case."""
        for end in range(start + 1, min(len(text), start + self._longest) + 1):
            if (token := self._words.get(lower[start:end])) is not None:
                token = replace(token, text=text[start:end])
                yield token
                if token.kind == "quantity":
                    yield from self._with_measure(token, text[end:])
        character = text[start]
        if character.isspace() or is_mark(character):
            yield PromptToken(text=character, kind="mark")
        elif (latin := LATIN.match(text, start)) is not None:
            word = latin[0].lower()
            near = next((self._words[one].near for one in (word, word[:-1], word[:-2]) if one in self._words), ())
            yield PromptToken(text=latin[0], kind="outside", near=near)
        else:
            yield PromptToken(text=character, kind="outside")
        if (numeral := NUMERAL.match(text, start)) is not None and not NUMERAL.match(text[start - 1 : start]):
            number = PromptToken(text=numeral[0], kind="count", count=self._grammar.counts.get(numeral[0]))
            yield from (number, *self._with_measure(number, text[numeral.end() :]))

    def _with_measure(self, number: PromptToken, rest: str) -> Iterator[PromptToken]:
        """Yield a number with each measure word with which the rest of the text begins."""
        space = len(rest) - len(rest.lstrip())
        for measure in self._grammar.measures:
            if rest.startswith(measure, space):
                yield replace(number, text=number.text + rest[:space] + measure)


def is_mark(character: str) -> bool:
    """Return whether a character is a punctuation mark, or a symbol that is used as one."""
    return unicodedata.category(character).startswith("P") or character in _SYMBOLIC_MARKS


def _merge_unknown(tokens: Sequence[PromptToken]) -> list[PromptToken]:
    """Return tokens with each unknown word and what belongs to it as one.

    A word that is put together from others has another meaning than they have, so no thing is near to it. Exceptions
    are words of one foreign language, and a known word behind a colour or a size. Between two things, as in 猫追狗, an
    unknown word belongs to neither.
    """
    merged: list[PromptToken] = []
    linked: PromptToken | None = None
    for index, token in enumerate(tokens):
        if len(merged) > 1 and merged[-1].text.isspace() and _is_latin(merged[-2]) and _is_latin(token):
            merged.pop()
            first = merged.pop()
            near = tuple(dict.fromkeys((*first.near, *token.near)))[:_MAX_NEAR]
            token = replace(first, text=f"{first.text} {token.text}", near=near)
        if merged and merged[-1].kind == "thing" and token.kind == "outside" and _begins_noun(tokens[index + 1 :]):
            merged.append(token)
            linked = token
            continue
        while merged and merged[-1] is not linked and _is_one_word(merged[-1], token):
            first = merged.pop()
            near = token.near if first.kind in ("colour_form", "size") else ()
            token = PromptToken(text=first.text + token.text, kind="outside", near=near)
        merged.append(token)
    return merged


def _is_latin(token: PromptToken) -> bool:
    return token.kind == "outside" and LATIN.match(token.text) is not None


def _begins_noun(tokens: Sequence[PromptToken]) -> bool:
    """Return whether tokens begin with a thing, or with a count and a thing."""
    kinds = [token.kind for token in tokens[:2]]
    return kinds[:1] == ["thing"] or kinds == ["count", "thing"]


def _are_separate_symbols(first: str, second: str) -> bool:
    """Return whether one of two adjacent words is an emoji, and both are not parts of one sequence or flag."""
    if first[-1] == _JOINER or second[0] == _JOINER or (ord(first[-1]) in _REGIONS and ord(second[0]) in _REGIONS):
        return False
    return "So" in (unicodedata.category(first[-1]), unicodedata.category(second[0]))


def _is_one_word(first: PromptToken, second: PromptToken) -> bool:
    """Return whether two adjacent tokens belong to one unknown word, such as 斑|马, 小|桌子, 深|蓝色 and 七|彩."""
    if _are_separate_symbols(first.text, second.text):
        return False
    if second.kind == "outside":
        if first.kind == "thing":
            return len(first.text) == len(second.text) == 1
        single = len(first.text) == 1 and first.kind in ("colour_form", "size", "quantity", "negation")
        return (
            first.kind == "outside" or single or (first.kind == "count" and NUMERAL.fullmatch(first.text) is not None)
        )
    if first.kind != "outside" or first.near:
        return False
    return second.kind == "colour" or (second.kind == "thing" and len(first.text) == len(second.text) == 1)


def find_structure(tokens: Sequence[PromptToken]) -> tuple[list[PromptNoun], str]:
    """Return the nouns of a prompt and its wording.

    Args:
        tokens: The words of the prompt.

    Returns:
        The nouns in order, and the text with ``{noun}``, ``{colour}`` and ``，`` for nouns, colours and marks.
    """
    words = [
        token
        for before, token in zip((None, *tokens), tokens, strict=False)
        if not (token.text.isspace() and before is not None and before.kind == "count")
    ]
    nouns: list[PromptNoun] = []
    parts: list[str] = []
    index = 0
    while index < len(words):
        noun, length = _noun_at(words, index)
        if noun is not None:
            nouns.append(noun)
            parts.append(NOUN)
        elif words[index].kind in ("colour", "colour_form"):
            parts.append("{colour}")
        elif words[index].kind == "mark":
            parts.append(" " if words[index].text.isspace() else "，")
        else:
            parts.append(words[index].text)
        index += length
    return nouns, re.sub(r"\s*，\s*", "，", "".join(parts)).strip("， ")


def _noun_at(words: Sequence[PromptToken], index: int) -> tuple[PromptNoun | None, int]:
    """Return the noun that begins at an index, such as 三只狐狸, 狐狸三只 or 狐狸, and its number of words."""

    def kind_at(offset: int) -> str:
        return words[index + offset].kind if index + offset < len(words) else ""

    count = None
    if kind_at(0) == "count" and kind_at(1) == "thing":
        count, thing, length = words[index], words[index + 1], 2
    elif kind_at(0) == "thing":
        thing, length = words[index], 1
        link = int(index + 1 < len(words) and words[index + 1].text in ("，", ",", "有"))
        if kind_at(1 + link) == "count" and kind_at(2 + link) not in ("thing", "outside"):
            count, length = words[index + 1 + link], 2 + link
    else:
        return None, 1
    text = thing.text if count is None else count.text + thing.text
    number = None if count is None else count.count
    return PromptNoun(text=text, word=thing.text, name=thing.meaning, count=number), length
