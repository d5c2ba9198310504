"""Read prompts with the grammar of a closed-world model: convert what it can mean, and name what it cannot.

The reader knows no world: all words and wordings are data of the model (``cogview/checkpoints/grammar.py``).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from cogview.checkpoints.checkpoint import NamedThing
from cogview.checkpoints.grammar import PromptGrammar
from cogview.formatting import shorten
from cogview.pipeline.prompt_words import (
    COMMAS,
    LATIN,
    NOUN,
    NUMERAL,
    SKIN_TONES,
    VARIATION_SELECTOR,
    PromptNoun,
    PromptScanner,
    PromptToken,
    WordKind,
    find_structure,
    is_mark,
)

_NUM_EXAMPLES = 3  # things that a message names
_MAX_SHOWN = 12  # characters of a word in a message
_STOPS = "、；。：;:"  # marks that a model misreads where a comma would do
_LARGE = frozenset("五六七八九十百千万亿")  # characters of numerals above four
_COLOUR = "色"  # the end of every name of a colour


class PromptReader:
    """Reader of the prompts of one model.

    Args:
        grammar: Words and wordings that the model understands.
        things: Things that it knows.
    """

    def __init__(self, grammar: PromptGrammar, things: Sequence[NamedThing]) -> None:
        self._grammar = grammar
        self._things = things
        self._scanner = PromptScanner(grammar, things)
        self._emoji = {_bare(thing.emoji): thing.name for thing in things if thing.emoji}
        longest_first = sorted(self._emoji, key=len, reverse=True)
        spelt = [f"{VARIATION_SELECTOR}?".join(map(re.escape, emoji)) for emoji in longest_first]
        # An emoji beside a joiner is a part of another one.
        emoji = f"(?<!\u200d)(?:{'|'.join(spelt)}){VARIATION_SELECTOR}?(?!\u200d)" if spelt else "(?!)"
        self._emoji_pattern = re.compile(emoji)
        carriers, colours = ("|".join(map(re.escape, words)) for words in (grammar.carriers, grammar.colours))
        self._colon_pattern = re.compile(rf"({carriers})\s*[:：]\s*(?={colours})")
        self._single_wordings = _expand(grammar.single_backgrounds, grammar.singles)
        self._pair_wordings = _expand(grammar.pair_backgrounds, grammar.pairs)

    def convert(self, text: str) -> tuple[str, list[str]]:
        """Return a prompt in the characters of the model, and a note on each kind of change.

        Traditional characters become simplified, emoji of things become names, other marks between two parts become
        commas, and all others are left out. Of two different things none has a count if one of them has none. Any other
        prompt is returned unchanged.

        Args:
            text: The prompt.
        """
        notes = []
        table = {old: self._grammar.traditional[old] for old in text if old in self._grammar.traditional}
        if table:
            text = "".join(table.get(character, character) for character in text)
            notes.append(f"{''.join(table)} is read as {''.join(table.values())}")
        names = {emoji: self._emoji[_bare(emoji)] for emoji in self._emoji_pattern.findall(text)}
        if names:
            text = self._emoji_pattern.sub(lambda match: names[match[0]], text)
            notes += [f"{emoji} is read as {name}" for emoji, name in names.items()]
        kept = _without_marks(self._colon_pattern.sub(r"\1", text))  # 背景：蓝色
        if kept and kept != text.strip():
            left_out = [mark for mark in dict.fromkeys(text) if is_mark(mark) and text.count(mark) > kept.count(mark)]
            notes.append(f"left out: {' '.join(left_out)}")
            text = kept
        if kept and (stops := [mark for mark in dict.fromkeys(text) if mark in _STOPS]):
            notes.append(f"{' '.join(stops)} is read as ，")
            text = text.translate(dict.fromkeys(map(ord, _STOPS), "，"))
        if (counted := self._only_counted(text)) is not None:
            count = counted.text.removesuffix(counted.word)
            text, found = re.subn(rf"{re.escape(count)}\s*(?={re.escape(counted.word)})", "", text, count=1)
            notes += [f"{counted.text} is read as {counted.word}"] * found
        return text, notes

    def problems(self, text: str) -> list[str]:
        """Return what the model does not understand of a prompt, each part with what is possible instead.

        Args:
            text: The prompt, as ``convert`` returns it.
        """
        tokens = self._scan(text)
        stray = [index for index in range(len(tokens)) if self._is_stray_colour(tokens, index)]
        nouns, _ = find_structure(_without_modifiers(tokens, stray))
        relation = self._relation_problem(tokens, stray, nouns)
        unknown = [token for token in tokens if token.kind == "outside"]
        if relation is not None:  # other unknown words are a part of it
            unknown = [token for token in unknown if token.near]
        found = [
            *self._count_problems(tokens),
            *self._colour_problems(tokens, stray, nouns),
            *self._noun_problems(tokens, nouns),
            *([relation] if relation is not None else ()),
            *self._unknown_problems(unknown),
        ]
        if not found and not self._is_wording(find_structure(tokens)[1], nouns):
            found += self._wording_problem(tokens, nouns)
        if (not nouns and not unknown) or any(not token.near and not _is_unknown_colour(token) for token in unknown):
            names = "、".join(thing.name for thing in self._things[:_NUM_EXAMPLES])
            found.append(f"it knows {len(self._things)} things such as {names}")
        return found

    def _scan(self, text: str) -> list[PromptToken]:
        """Return the words of a prompt."""
        return self._scanner.scan(_bare(unicodedata.normalize("NFKC", text)))

    def _only_counted(self, text: str) -> PromptNoun | None:
        """Return the noun with the count 1 in a wording of two things of which the other has no count, or None.

        The captions of a model give both a count or neither: it misreads 一只猫在左边，狗在右边.
        """
        nouns, wording = find_structure(self._scan(text))
        counted = [noun for noun in nouns if noun.count is not None]
        if len({noun.name for noun in nouns}) != 2 or len(nouns) != 2 or len(counted) != 1 or counted[0].count != 1:
            return None
        return counted[0] if self._is_wording(wording, nouns) else None

    def _count_problems(self, tokens: Sequence[PromptToken]) -> Iterator[str]:
        """Yield what is wrong with numbers, amounts, sizes and negations."""
        counts, forms = self._grammar.counts, self._grammar.count_forms
        numerals = [NUMERAL.match(token.text) for token in tokens if token.kind == "count" and token.count is None]
        words = [numeral[0] for numeral in numerals if numeral is not None]
        words += [token.text for token in tokens if token.kind == "quantity"]
        unknown = list(dict.fromkeys(word for word in words if word not in forms))
        large = [word for word in unknown if _is_above(word, max(counts.values()))]
        inexact = [word for word in unknown if word not in large]
        known = "、".join(numeral for numeral in counts if not numeral.isdigit())
        for word in dict.fromkeys(word for word in words if word in forms):
            yield f"{word} is not understood: write {forms[word]}"
        if large:
            yield f"the model counts to {max(counts.values())} ({known}), not {'、'.join(large)}"
        if inexact:
            yield f"the model knows no count {'、'.join(inexact)}, only {known}"
        if sizes := _words(tokens, "size"):
            yield f"{sizes} is not understood: all things have one size"
        if negations := _words(tokens, "negation"):
            yield f"{negations} is not understood: name only what the image shows"

    def _is_stray_colour(self, tokens: Sequence[PromptToken], index: int) -> bool:
        """Return whether the token at an index is a colour that modifies something other than a carrier.

        A word of one character may link the two: 红色的背景, 背景是红色.
        """
        if tokens[index].kind not in ("colour", "colour_form"):
            return False
        for side in (tokens[index + 1 :], tokens[:index][::-1]):
            around = [token.text for token in side if not token.text.isspace()][:2]
            if len(around) == 2 and len(around[0]) == 1 and around[0] not in COMMAS:
                del around[0]
            if around and around[0] in self._grammar.carriers:
                return False
        return True

    def _colour_problems(
        self, tokens: Sequence[PromptToken], stray: Sequence[int], nouns: Sequence[PromptNoun]
    ) -> Iterator[str]:
        """Yield what is wrong with colours."""
        carriers = "、".join(self._grammar.carriers)
        if stray:
            words = "、".join(dict.fromkeys(tokens[index].text for index in stray))
            background = [index for index, token in enumerate(tokens) if token.kind == "colour" and index not in stray]
            example = self._on_colour(tokens[[*background, *stray][0]].meaning, nouns)
            yield f"{words}: only the {carriers} has a colour, as in {example}"
        for index, token in enumerate(tokens):
            if token.kind == "colour_form" and index not in stray:
                yield f"{token.text}{carriers} is not understood: write {token.meaning}{carriers}"
            if _is_unknown_colour(token):
                known = dict.fromkeys(self._grammar.colour_forms.values())
                yield f"{token.text} is unknown to the model, its colours: {'、'.join(known)}"

    def _noun_problems(self, tokens: Sequence[PromptToken], nouns: Sequence[PromptNoun]) -> Iterator[str]:
        """Yield what is wrong with the number of different things, or of one of two."""
        words = {noun.name: noun.word for noun in nouns}
        num_kinds, most = len(words), self._grammar.max_kinds
        relations = _words(tokens, "word", self._grammar.relations)
        if num_kinds > most:
            yield f"{num_kinds} different things ({'、'.join(words.values())}), but an image shows at most {most}"
        elif num_kinds > 1 and not _are_single(nouns):
            yield f"different things come one each, as in {self._pair_examples(nouns)[0]}"
        elif any(token.kind == "outside" for token in tokens):
            return
        elif num_kinds == 0:
            yield f"no thing is named, as in {self._grammar.examples[0]}"
        elif num_kinds == 1 and relations:
            yield f"{relations} needs two different things, as in {self._pair_examples(nouns[:1])[0]}"

    def _relation_problem(
        self, tokens: Sequence[PromptToken], stray: Sequence[int], nouns: Sequence[PromptNoun]
    ) -> str | None:
        """Return what is wrong with the relation of two different things, or None."""
        if len({noun.name for noun in nouns}) != 2 or not _are_single(nouns):
            return None
        plain = _without_modifiers(tokens, stray)
        known = [token for token in plain if token.kind != "outside"]
        wording = find_structure(known)[1].replace(" ", "，")
        relations = [re.sub(r"\{[ab]\}", NOUN, pattern) for pattern in self._grammar.pairs]
        if any(relation in text for relation in relations for text in (wording, wording.replace("的", "", 1))):
            return None  # unknown is another part, such as an adjective or the words of the background
        phrase = self._without_background(find_structure(plain)[1]).replace(NOUN, "…").strip("，… ")
        examples = " / ".join(self._pair_examples(nouns))
        if not phrase:
            return f"two things need a relation, write {examples}"
        return f"“{phrase}” is no known relation, write {examples}"

    def _unknown_problems(self, tokens: Sequence[PromptToken]) -> Iterator[str]:
        """Yield which words are unknown, each with the things that are near in meaning."""
        words = [token for token in tokens if not _is_unknown_colour(token)]
        for token in words:
            if token.near:
                yield f"“{_shown(token)}” is unknown to the model, near in meaning: {'、'.join(token.near)}"
        if lost := [token for token in words if not token.near]:
            names = [f"“{text}”" for text in dict.fromkeys(map(_shown, lost))]
            shown = "、".join(names)
            yield f"{shown} is unknown to the model" if len(names) == 1 else f"{shown} are unknown to the model"
        if any(LATIN.match(token.text) for token in words):
            yield "it reads Chinese"

    def _wording_problem(self, tokens: Sequence[PromptToken], nouns: Sequence[PromptNoun]) -> list[str]:
        """Return that the model was not trained on such a wording, with one that it knows."""
        colours = [token.meaning for token in tokens if token.kind in ("colour", "colour_form")]
        if len({noun.name for noun in nouns}) > 1:
            example = self._pair_examples(nouns)[0]
            if colours:
                example = self._grammar.pair_backgrounds[0].format(colour=colours[0], what=example)
        else:
            example = self._on_colour(colours[0], nouns) if colours else nouns[0].text
        return ["the wording is unknown to the model, which may misread it", f"it knows for example {example}"]

    def _is_wording(self, wording: str, nouns: Sequence[PromptNoun]) -> bool:
        """Return whether the model knows a wording; a space may stand for a comma."""
        known = self._single_wordings if len({noun.name for noun in nouns}) < 2 else self._pair_wordings
        return any(wording.replace(" ", comma) in known for comma in ("", "，"))

    def _without_background(self, wording: str) -> str:
        """Return a wording without the words of its background."""
        for pattern in sorted(self._grammar.pair_backgrounds, key=len, reverse=True):
            before, after = pattern.split("{what}")
            if before + after and wording.startswith(before) and wording.endswith(after):
                return wording[len(before) : len(wording) - len(after)]
        return "，".join(part for part in wording.split("，") if "{colour}" not in part)

    def _on_colour(self, colour: str, nouns: Sequence[PromptNoun]) -> str:
        """Return a wording of the first noun on a background."""
        return self._grammar.single_backgrounds[0].format(colour=colour, what=nouns[0].text if nouns else "…")

    def _pair_examples(self, nouns: Sequence[PromptNoun]) -> list[str]:
        """Return a wording for each relation of the first two different things."""
        words = [*{noun.name: noun.word for noun in nouns}.values(), "…"]
        return [pattern.format(a=words[0], b=words[1]) for pattern in self._grammar.pair_examples]


def _bare(text: str) -> str:
    """Return a text without variation selectors and skin tones."""
    return SKIN_TONES.sub("", text.replace(VARIATION_SELECTOR, ""))


def _without_marks(text: str) -> str:
    """Return a text without punctuation marks other than commas, and without commas at its ends."""

    def is_kept(index: int) -> bool:
        character = text[index]
        inside = text[index - 1 : index].isalnum() and text[index + 1 : index + 2].isalnum()  # 2.5, T-shirt
        return not is_mark(character) or character in COMMAS or (inside and character.isascii())

    kept = "".join(character for index, character in enumerate(text) if is_kept(index))
    return kept.strip("".join(COMMAS) + " \t\n\u3000")


def _without_modifiers(tokens: Sequence[PromptToken], stray: Sequence[int]) -> list[PromptToken]:
    """Return tokens without words that have a problem of their own: sizes, amounts, negations and stray colours."""
    plain: list[PromptToken] = []
    dropped = False
    for index, token in enumerate(tokens):
        if index in stray or token.kind in ("size", "quantity", "negation"):
            dropped = True
        elif not (dropped and token.text == "的"):
            plain.append(token)
            dropped = False
    return plain


def _are_single(nouns: Iterable[PromptNoun]) -> bool:
    """Return whether no noun has another count than 1."""
    return all(noun.count in (None, 1) for noun in nouns)


def _is_unknown_colour(token: PromptToken) -> bool:
    return token.kind == "outside" and token.text.endswith(_COLOUR)


def _shown(token: PromptToken) -> str:
    """Return the text of a token for a message; Latin letters are half as wide as others."""
    return shorten(token.text, 2 * _MAX_SHOWN if LATIN.match(token.text) else _MAX_SHOWN)


def _is_above(word: str, maximum: int) -> bool:
    """Return whether a word of a count is a number above a maximum of at most four."""
    return int(word) > maximum if word.isdecimal() else bool(NUMERAL.fullmatch(word)) and not _LARGE.isdisjoint(word)


def _words(tokens: Iterable[PromptToken], kind: WordKind, among: Sequence[str] | None = None) -> str:
    """Return the words of a kind, each once."""
    found = (token.text for token in tokens if token.kind == kind and (among is None or token.text in among))
    return "、".join(dict.fromkeys(found))


def _expand(backgrounds: Iterable[str], wordings: Sequence[str]) -> frozenset[str]:
    """Return every wording on every background, with ``{noun}`` for things."""
    nouns = [re.sub(r"\{(what|a|b)\}", NOUN, wording) for wording in wordings]
    return frozenset(whole.replace("{what}", noun) for whole in backgrounds for noun in nouns)
