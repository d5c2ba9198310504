"""Translate messages, notes, questions and help of the command line.

The library writes English. The command line translates whole messages at its edge, with the gettext catalogue of the
user's language, ``cogview/locale/LANGUAGE.po``. A message is matched with the template that it was made from: the
source ``f"cannot read {path}: {error}"`` is the entry ``cannot read {path}: {error}``, and what the fields matched is
translated as well. ``scripts/update_catalogue.py`` collects the templates from the sources.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cogview.errors import InputError
from cogview.formatting import display_width

FOLDER = Path(__file__).parents[1] / "locale"
LANGUAGES = ("en", "zh")
VARIABLES = ("COGVIEW_LANGUAGE", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set decides
FIELD = re.compile(r"\{(\w+)\}")
MAX_DEPTH = 4  # of messages within messages

_LINE = "line "  # what the number of a line stands behind
_NUMBERED = re.compile(rf"\{{count\w*\}}|\b{_LINE}\{{")
# The frame of a message about the command line: its command, and where its help is.
_FRAME = re.compile(
    r"(?P<name>cogview(?: [a-z-]+)*: |\w+\.py: )?(?P<message>.*?)(?P<see>; see \S.* --help)?", re.DOTALL
)
# A note on a prompt: each part of it is a message.
_PROMPT_NOTE = re.compile(r"(?P<head>(?:note: )?)(?P<prompt>“.*?”): (?P<notes>.*)", re.DOTALL)
# The place of a mistake in a recipe, before the message about it.
_PLACE = re.compile(r"section (?P<name>\w+) of (?P<path>[^:]+?\.ya?ml)(?P<keys>(?:, [\w.]+)*)(?=: )")
_HEAD = re.compile(r"(warning|note|failed): (.*)", re.DOTALL)
_OPAQUE = "\ue000"  # stands for the place while the message is translated: no template knows it
_NUMBERS = re.compile(r"(\d+(?:, \d+)*) (and|or) (\d+)")
_SHORTENED = re.compile(r"(.*\S) (and \d+ more)", re.DOTALL)  # of ``format_list``
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_JOINED_BEFORE = re.compile(r"[\u4e00-\u9fff] $")
_DEFAULT = re.compile(r"(.*?)  \[(.*)\]", re.DOTALL)  # how click appends the default and the range to a help text
_COMPUTED = re.compile(r"(?<=default: )\((.*?)\)(?=;|$)")  # how click shows the text of a computed default
_PARENTHESIS = re.compile(r"(.*\S) \((.*)\)", re.DOTALL)
# What stays on one line: a word or a Chinese character, with opening marks before it and closing marks behind it.
_PIECES = re.compile(
    r"[\[（【“‘]*(?:[\u3000-\u9fff\uff00-\uffef]|[^\s\u3000-\u9fff\uff00-\uffef]+)[\]，。；：、）】”’！？]*\s*"
)
_JOINTS = ((re.compile(r"; "), "；"), (re.compile(r": "), "："), (re.compile(r", "), "，"))


class Catalogue:
    """The translations of one language: entries without fields by their text, the others as patterns."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        """Keep the entries.

        Args:
            entries: English templates and their translations, with the same ``{fields}``.
        """
        self.exact = {source: target for source, target in entries.items() if not FIELD.search(source)}
        # Those with the most literal text come first: the most specific template of a message is the right one.
        templates = [source for source in entries if FIELD.search(source) and _is_specific(source)]
        self.templates = {
            source: (max(FIELD.split(source)[::2], key=len), entries[source])
            for source in sorted(templates, key=lambda source: -sum(map(len, FIELD.split(source)[::2])))
        }

    def translate(self, text: str, depth: int = 0) -> str:
        """Return the translation of a message; what has none stays English.

        Args:
            text: A message, or a part of one.
            depth: Number of messages that ``text`` is a field of.
        """
        stripped = text.strip()
        if depth > MAX_DEPTH or not stripped.strip("0123456789.,:;()[] "):
            return text
        if stripped in self.exact:
            found: str | None = self.exact[stripped]
        elif numbers := _NUMBERS.fullmatch(stripped):
            joint = {"and": "和", "or": "或"}[numbers[2]]
            found = f"{numbers[1].replace(', ', '、')} {joint} {numbers[3]}"
        elif listed := _SHORTENED.fullmatch(stripped):
            found = "，".join(self.translate(part, depth + 1) for part in listed.groups())
        elif headed := _HEAD.fullmatch(stripped):
            found = self._from_template(stripped, depth, f"{headed[1]}: ") or "：".join(
                self.translate(part, depth + 1) for part in headed.groups()
            )
        elif place := _PLACE.match(stripped):
            keys = place["keys"].replace(", ", "，")
            where = self.translate(place[0].removesuffix(place["keys"]), depth + 1) + keys
            found = self._at_place(_OPAQUE + stripped[place.end() :], depth).replace(_OPAQUE, where)
        elif (match := _FRAME.fullmatch(stripped)) and match["message"] not in ("", stripped):
            before, after = match["name"] or "", match["see"] or ""
            found = before + self.translate(match["message"], depth + 1) + self.translate(after, depth + 1)
        elif note := _PROMPT_NOTE.fullmatch(stripped):
            head = f"{self.translate('note', depth + 1)}：" if note["head"] else ""
            parts = (self.translate(part, depth + 1) for part in note["notes"].split("; "))
            found = f"{head}{note['prompt']}：{'；'.join(parts)}"
        else:
            found = self._from_template(stripped, depth) or self._by_parts(stripped, depth)
        return text.replace(stripped, found) if found else text

    def _at_place(self, text: str, depth: int) -> str:
        """Translate a message behind a place and ``: ``, the place being a field of its template or not."""
        for source, (_, target) in self.templates.items():
            if source.startswith("{") and (match := _pattern(source).fullmatch(text)) and match[1] == _OPAQUE:
                return self._filled(target, match, depth)
        place, _, message = text.partition(": ")
        return f"{place}：{self.translate(message, depth + 1)}"

    def _from_template(self, text: str, depth: int, head: str = "") -> str | None:
        """Return the translation of the most specific template, beginning with ``head``, that matches ``text``."""
        for source, (literal, target) in self.templates.items():
            if literal not in text or not source.startswith(head):
                continue
            if match := _pattern(source).fullmatch(text):
                return self._filled(target, match, depth)
        return None

    def _filled(self, target: str, match: re.Match[str], depth: int) -> str:
        """Return a translation with its fields; no space stands between two Chinese characters where one is new."""
        text, after_translated = "", False
        for index, part in enumerate(FIELD.split(target)):
            value = part if index % 2 == 0 else self.translate(match[part], depth + 1)
            is_translated = index % 2 == 1 and value != match[part]
            if is_translated and _JOINED_BEFORE.search(text) and _CHINESE.match(value):
                text = text.rstrip(" ")
            if after_translated and value.startswith(" ") and _CHINESE.match(value[1:]) and _CHINESE.match(text[-1:]):
                value = value[1:]
            text += value
            after_translated = is_translated
        return text

    def _by_parts(self, text: str, depth: int) -> str | None:
        """Translate the two sides of a joint, preferably one where both have a translation, else the most of it."""
        partly = None
        for joint, mark in _JOINTS:
            for match in joint.finditer(text):
                left, right = text[: match.start()], text[match.end() :]
                sides = self.translate(left, depth + 1), self.translate(right, depth + 1)
                if sides[0] != left and sides[1] != right:
                    return mark.join(sides)
                if sides[0] != left or sides[1] != right:
                    found = (mark if sides[0] != left or not left else match[0]).join(sides)
                    partly = found if partly is None else min(partly, found, key=_count_letters)
        if partly is None and (whole := _PARENTHESIS.fullmatch(text)):
            inner = self.translate(whole[2], depth + 1)
            return f"{self.translate(whole[1], depth + 1)}（{inner}）" if inner != whole[2] else None
        return partly


def _count_letters(text: str) -> int:
    """Return the number of Latin letters of a text, most of which are not translated."""
    return sum(character.isascii() and character.isalpha() for character in text)


def _is_specific(source: str) -> bool:
    """Return whether a template has enough words to know its messages by: two, or one beside a number."""
    if source.startswith("known: "):
        return True
    words = re.findall(r"[A-Za-z’']{2,}", FIELD.sub(" ", source))
    return len(words) > 1 or (bool(words) and bool(_NUMBERED.search(source)))


@functools.cache
def _pattern(source: str) -> re.Pattern[str]:
    """Return the pattern of the messages that a template makes."""
    parts = FIELD.split(source)
    named = [
        re.escape(part)
        if index % 2 == 0
        else f"(?P<{part}>[0-9,]+)"
        if part.startswith("count") or parts[index - 1].endswith(_LINE)
        else f"(?P<{part}>.*?)"
        for index, part in enumerate(parts)
    ]
    return re.compile("".join(named), re.DOTALL)


@functools.cache
def load_catalogue(language: str) -> Catalogue | None:
    """Read the catalogue of a language.

    Args:
        language: One of ``LANGUAGES``.

    Returns:
        The catalogue; None for English.
    """
    if language == "en":
        return None
    import polib

    entries = polib.pofile(str(FOLDER / f"{language}.po"), encoding="utf-8")
    return Catalogue({entry.msgid: entry.msgstr for entry in entries if entry.msgstr and not entry.obsolete})


def take_language(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Remove ``--language`` from a command line, where it may stand anywhere.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The language, None if there is no such option; and the other arguments.

    Raises:
        InputError: ``--language`` names an unknown language, or none.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    chosen, left, words = None, [], iter(arguments[:end])
    for word in words:
        if word == "--language":
            chosen = next(words, "")
        elif word.startswith("--language="):
            chosen = word.partition("=")[2]
        else:
            left.append(word)
    if chosen is not None and chosen not in LANGUAGES:
        raise InputError(f'--language is "{chosen}"; expected one of {", ".join(LANGUAGES)}')
    return chosen, [*left, *arguments[end:]]


def language_of(environment: Mapping[str, str]) -> str:
    """Return the language that the variables of a process choose: Chinese in a Chinese locale, else English."""
    locale = next(filter(None, map(environment.get, VARIABLES)), "")
    return "zh" if locale.startswith("zh") else "en"


def require_known_language(environment: Mapping[str, str]) -> None:
    """Raise InputError if COGVIEW_LANGUAGE chooses none of ``LANGUAGES``; the variables of a locale may be any."""
    chosen = environment.get("COGVIEW_LANGUAGE") or "en"
    if not chosen.startswith(LANGUAGES):  # zh_CN and zh-Hans are Chinese
        raise InputError(f'COGVIEW_LANGUAGE is "{chosen}"; expected one of {", ".join(LANGUAGES)}')


class TranslatedStream:
    """A stream that translates the messages written to it; progress bars, which rewrite their line, pass."""

    def __init__(self, stream: Any, catalogue: Catalogue) -> None:
        """Write to ``stream`` in the language of ``catalogue``."""
        self.untranslated = stream
        self.catalogue = catalogue

    def __getattr__(self, name: str) -> Any:
        """Pass everything but ``write`` to the stream."""
        return getattr(self.untranslated, name)

    def as_line(self, message: str) -> str:
        """Return a message as ``write`` would write it, for a handler of signals, which may not print."""
        return self.catalogue.translate(message)

    def write(self, text: str) -> int:
        """Write ``text``, each of its lines translated.

        Args:
            text: Whole lines, with or without the last line's end.

        Returns:
            The number of characters of ``text``.
        """
        if "\r" in text:
            self.untranslated.write(text)
        else:
            self.untranslated.write("".join(map(self.catalogue.translate, text.splitlines(keepends=True))))
        return len(text)


class TranslatedHelp(click.HelpFormatter):
    """A help page in the language of a catalogue, wrapped by the columns that its characters take."""

    catalogue: Catalogue

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write the line of usage."""
        super().write_usage(prog, args, prefix or f"{self.catalogue.translate('Usage')}：")

    def write_heading(self, heading: str) -> None:
        """Write the heading of a section."""
        self.write(f"{' ' * self.current_indent}{self.catalogue.translate(heading)}：\n")

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        indent = " " * self.current_indent
        for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
            joined = " ".join(paragraph.split())
            whole = self.catalogue.exact.get(joined, joined)
            self.write("\n" if number else "")
            for line in wrap_columns(whole, self.width - self.current_indent):
                self.write(f"{indent}{line}\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write a list of options or commands."""
        listed = list(rows)
        first = min(max((display_width(name) for name, _ in listed), default=0), col_max) + col_spacing
        indent = " " * self.current_indent
        for name, text in listed:
            lines = wrap_columns(self._entry(text), max(self.width - first - self.current_indent, 10))
            if display_width(name) <= first - col_spacing and lines:
                self.write(f"{indent}{name}{' ' * (first - display_width(name))}{lines.pop(0)}\n")
            else:
                self.write(f"{indent}{name}\n")
            for line in lines:
                self.write(f"{indent}{' ' * first}{line}\n")

    def _entry(self, text: str) -> str:
        """Return the help of an option, with its default."""
        match = _DEFAULT.fullmatch(text)
        if match is None:
            return self.catalogue.translate(text)
        details = "；".join(map(self.catalogue.translate, _COMPUTED.sub(r"\1", match[2]).split("; ")))
        return f"{self.catalogue.translate(match[1])}  [{details}]"


def wrap_columns(text: str, width: int) -> list[str]:
    """Break a text into lines, at spaces and between Chinese characters.

    Args:
        text: One paragraph.
        width: Maximum number of columns of a line; Chinese characters take two.

    Returns:
        The lines. None begins with a closing mark or ends in an opening one.
    """
    lines, line = [], ""
    for piece in _PIECES.findall(" ".join(text.split())):
        if line and display_width(line + piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
    return [*lines, line.rstrip()] if line.strip() else lines


@contextlib.contextmanager
def translated(language: str) -> Iterator[None]:
    """Translate what the block writes to stderr, and help pages.

    Args:
        language: One of ``LANGUAGES``.
    """
    catalogue = load_catalogue(language)
    if catalogue is None:
        yield
        return
    formatter = type("CatalogueHelp", (TranslatedHelp,), {"catalogue": catalogue})
    before = sys.stderr, click.Context.formatter_class
    sys.stderr, click.Context.formatter_class = TranslatedStream(sys.stderr, catalogue), formatter
    try:
        yield
    finally:
        sys.stderr, click.Context.formatter_class = before


def translate(text: str) -> str:
    """Return a word or a message in the language of the running command.

    Args:
        text: English text that goes elsewhere than to stderr by itself, such as to a progress bar or to stdout.
    """
    catalogue: Catalogue | None = getattr(sys.stderr, "catalogue", None)
    return text if catalogue is None else catalogue.translate(text)
