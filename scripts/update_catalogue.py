"""Collect the messages of the library in the catalogues of translations.

Run ``python scripts/update_catalogue.py`` after a change of a message. New templates are added to
``cogview/locale/*.po`` with an empty translation, templates that no source has are removed, and the number of missing
translations is printed.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import polib

ROOT = Path(__file__).parents[1]
SOURCES = (
    "cogview",
    "kernels/dispatch.py",
    "kernels/native.py",
    "kernels/native_library.py",
    "tokenizers",
    "vqvae",
    "scripts",
)  # shape checks of kernels are for Python
SKIPPED = (
    "scripts/benchmarks",
    "scripts/recipes",
    "scripts/update_catalogue.py",
    "scripts/check_figures.py",  # for developers
    "cogview/evaluation/page.py",  # markup of a page, which is in English
    "cogview/evaluation/plots.py",
)
# What click says itself, and words of a single letter sequence that head a line.
ELSEWHERE = (
    "Usage",
    "Options",
    "Commands",
    "Generate",
    "Models",
    "Training",
    "Tools",
    "Arguments",
    "note",
    "skipped",
    "failed",
    "warning",
    "required",
    "default",
    "Show this message and exit.",
    "Show the version and exit.",
    "missing argument '{name}'",
    "missing argument '{name}...'",
    "missing option '{name}'",
    "no such option '{name}'",
    "no such option: {name}",
    "no such option '{name}'. Did you mean '{other}'?",
    "no such option: {name} Did you mean {other}?",
    "invalid value for '{name}': {problem}",
    "invalid value: {problem}",
    "option '{name}' requires an argument",
    "option '{name}' requires {count} arguments",
    "got unexpected extra argument ({arguments})",
    "got unexpected extra arguments ({arguments})",
    "{value} is not in the range {range}",
    "'{value}' is not a valid integer",
    "'{value}' is not a valid float",
    "'{value}' is not one of {choices}",
    "; see {command} --help",
    # of the operating system
    "No such file or directory",
    "Permission denied",
    "Is a directory",
    "Not a directory",
    "File exists",
    "File too large",
    "No space left on device",
    "Read-only file system",
    # single words that messages and progress bars put in
    "generating",
    "completing",
    "editing",
    "filling",
    "varying",
    "captioning",
    "upscaling",
    "scoring",
    "reading",
    "verifying",
    "converting",
    "images",
    "captions",
    "codes",
    "pieces",
    "all",
    "random",
    "recipe",
    # a step of a recipe, with its command line
    "step {count} of {count2}, {command}: cogview {line}",
    # of PyYAML
    "mapping values are not allowed here",
    "mapping keys are not allowed here",
    "sequence entries are not allowed here",
    "could not find expected ':'",
    "found character {character} that cannot start any token",
    "found unknown escape character {character}",
    "found undefined alias {name}",
    "found unexpected end of stream",
    "found unhashable key",
    "could not determine a constructor for the tag {tag}",
    "expected a single document in the stream",
    "expected {wanted}, but found {found}",
    "expected {wanted}, but got {found}",
    "expected ',' or ']', but got {found}",
    "expected ',' or '}', but got {found}",
    "expected <block end>, but found {found}",
    "expected the node content, but found {found}",
    # of Python's reader of JSON
    "Expecting value: line {line} column {column} (char {character})",
    "Expecting ',' delimiter: line {line} column {column} (char {character})",
    "Expecting ':' delimiter: line {line} column {column} (char {character})",
    "Expecting property name enclosed in double quotes: line {line} column {column} (char {character})",
    "Unterminated string starting at: line {line} column {column} (char {character})",
    "Extra data: line {line} column {column} (char {character})",
    "Invalid control character at: line {line} column {column} (char {character})",
    # kinds of settings
    "texts",
    "paths",
    "numbers",
    "whole numbers",
    "a number",
    "a path",
    "{where}: expected text, got {value}",
    "one of {choices}",
)
PROSE = re.compile(r"[A-Za-z][a-z’']+[,;:]? +(?:[a-z{(]|[A-Z0-9])")  # two words
_PERCENT = re.compile(r"%[sd]")  # of logging
_OTHER = re.compile(r"\\|%\||:\d|^\^")  # patterns and formats
_MAX_VARIANTS = 8


def field_name(node: ast.expr) -> str:
    """Return a name for what an expression of an f-string puts in."""
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Subscript):
        return field_name(node.value)
    if isinstance(node, ast.Call):
        first = node.args[0] if node.args else None
        return field_name(first if isinstance(first, ast.Name | ast.Attribute) else node.func)
    return "value"


def templates(node: ast.AST) -> list[str]:
    """Return the templates of an expression that makes a text; none if it is no such expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        count = itertools.count(1)
        return [_PERCENT.sub(lambda _: f"{{value{'' if (number := next(count)) == 1 else number}}}", node.value)]
    if isinstance(node, ast.JoinedStr):
        text, used = "", dict[str, int]()
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                name = field_name(part.value) or "value"
                used[name] = used.get(name, 0) + 1
                text += f"{{{name}{used[name] if used[name] > 1 else ''}}}"
            elif isinstance(part, ast.Constant):
                text += str(part.value)
        return [text]
    if isinstance(node, ast.IfExp):
        return [*templates(node.body), *templates(node.orelse)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        joined = [_joined(left, right) for left in templates(node.left) for right in templates(node.right)]
        return joined if len(joined) <= _MAX_VARIANTS else []
    return []


def _joined(left: str, right: str) -> str:
    """Join two templates; a field of the second that the first has as well gets a number."""
    taken = set(re.findall(r"\{(\w+)\}", left))

    def rename(match: re.Match[str]) -> str:
        name, number = match[1], 2
        while name in taken:
            name, number = f"{match[1]}{number}", number + 1
        return f"{{{name}}}"

    return left + re.sub(r"\{(\w+)\}", rename, right)


def nouns(node: ast.AST) -> list[str]:
    """Return the two forms of a counted noun, ``plural(count, "image")``."""
    is_plural = isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "plural"
    if not is_plural or len(node.args) < 2:
        return []
    return [f"{{count}} {form}" for text in templates(node.args[1]) for form in (text, f"{text}s")]


def messages(path: Path) -> Iterator[str]:
    """Yield every text of a source that a user may read: two words or more, docstrings of commands included.

    Args:
        path: A Python source.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    shown = path.parent.name == "cli" or path.parent.name == "scripts"
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0].value if node.body and isinstance(node.body[0], ast.Expr) else None
            docstrings.add(docstring)
            if shown and isinstance(node, ast.FunctionDef) and any(map(_is_command, node.decorator_list)):
                paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
                yield from (" ".join(part.split()) for part in paragraphs if part)

    def visit(node: ast.AST) -> Iterator[str]:
        if node in docstrings:
            return
        found = templates(node)
        yield from found
        yield from nouns(node)
        for child in ast.iter_child_nodes(node):
            if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
                yield from visit(child)

    for text in visit(tree):
        for line in text.splitlines():
            stripped = line.strip(" ;:,.") if "{" not in line else line.strip()
            if _OTHER.search(stripped):
                continue
            if PROSE.search(re.sub(r"\{\w+\}", "x", stripped)) or re.fullmatch(r"\{count\} \w+", stripped):
                yield stripped


def _is_command(decorator: ast.expr) -> bool:
    """Return whether a decorator makes a command, whose docstring is its help."""
    function = decorator.func if isinstance(decorator, ast.Call) else None
    return isinstance(function, ast.Attribute) and function.attr in ("command", "group")


def collect() -> list[str]:
    """Return the templates of all sources, each once, in their order."""
    found = dict.fromkeys(ELSEWHERE)
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")) or [ROOT / folder]:
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(SKIPPED):
                found.update(dict.fromkeys(messages(path)))
    return list(found)


def update(path: Path, wanted: list[str]) -> int:
    """Bring a catalogue up to date.

    Args:
        path: The ``.po`` file.
        wanted: The templates in their order.

    Returns:
        The number of templates without a translation.
    """
    known = {entry.msgid: entry.msgstr for entry in polib.pofile(str(path), encoding="utf-8")} if path.exists() else {}
    catalogue = polib.POFile(wrapwidth=0)
    catalogue.metadata = {"Language": path.stem, "Content-Type": "text/plain; charset=UTF-8"}
    for text in wanted:
        catalogue.append(polib.POEntry(msgid=text, msgstr=known.get(text, "")))
    catalogue.save(str(path))
    return len(catalogue.untranslated_entries())


def main() -> int:
    """Update every catalogue, and print what each lacks."""
    argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0]).parse_args()
    wanted = collect()
    for path in sorted((ROOT / "cogview" / "locale").glob("*.po")):
        print(f"{path.relative_to(ROOT)}: {len(wanted)} messages, {update(path, wanted)} without a translation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
