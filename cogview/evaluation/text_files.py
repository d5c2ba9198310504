"""Read prompts, texts with ids, and references, several of an id: text files, JSON lines, tables, files of MS COCO."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cogview.errors import InputError
from cogview.evaluation.manifest import SetRecord, hash_set
from cogview.formatting import plural, shorten
from cogview.plain_data import read_json
from cogview.tables import HeaderError, numbered_lines, parse_objects, parse_table, print_note, read_text

ID_KEYS = ("id", "image_id", "image", "picture")
TEXT_KEYS = ("text", "caption", "texts", "captions")
EXPECTED = "expected an id (id, image_id, image or picture) and a text (text, caption, texts or captions)"
SHOWN = 60  # characters of an id or a text in a message

Row: TypeAlias = tuple[str, str, str]  # where it was read, its id, its text


def read_hypotheses(path: Path, on_note: Callable[[str], object] = print_note) -> dict[str, str]:
    """Return a text for each id.

    Args:
        path: A text per line, whose ids are the line numbers from 1; ``.jsonl``, ``.tsv`` or ``.csv`` with an id and
            a text per row; or ``.json``, a list as the results of MS COCO captions.
        on_note: Called with a line about the file's encoding.

    Raises:
        InputError: The file cannot be read or is empty, a row is not a text with an id, or an id is given twice.
    """
    found: dict[str, str] = {}
    for where, key, text in _rows(path, on_note):
        if key in found:
            raise InputError(
                f'{where}: there is a text of the id "{shorten(key, SHOWN)}" already; expected one of each'
            )
        found[key] = text
    return _not_empty(found, path)


def read_references(path: Path, on_note: Callable[[str], object] = print_note) -> dict[str, list[str]]:
    """Return the references of each id.

    Args:
        path: A line per item, its references separated by tabs; ``.jsonl``, ``.tsv`` or ``.csv`` with an id and a text
            per row, where ids may be repeated; or ``.json``, as the annotations of MS COCO captions.
        on_note: Called with a line about the file's encoding.

    Raises:
        InputError: The file cannot be read or is empty, or a row is not a text with an id.
    """
    found: dict[str, list[str]] = {}
    for _, key, text in _rows(path, on_note, separator="\t"):
        found.setdefault(key, []).append(text)
    return _not_empty(found, path)


def read_prompts(path: Path, on_note: Callable[[str], object] = print_note) -> dict[int, str]:
    """Return the prompts of a file by the numbers of their lines, from 1; blank lines are left out.

    Args:
        path: A prompt per line.
        on_note: Called with a line about the file's encoding.

    Raises:
        InputError: The file cannot be read or is empty, or a prompt is given twice.
    """
    found = dict(numbered_lines(read_text(str(path), on_note)))
    if not found:
        raise InputError(f"{path} is empty: expected a prompt per line")
    lines: dict[str, list[int]] = {}
    for number, prompt in found.items():
        lines.setdefault(prompt, []).append(number)
    repeated = [numbers for numbers in lines.values() if len(numbers) > 1]
    if repeated:
        raise InputError(
            f"{path} gives {plural(len(repeated), 'prompt')} more than once, expected each once; remove all but one "
            f"of the equal lines {'; '.join(', '.join(map(str, numbers)) for numbers in repeated)}"
        )
    return found


def match_ids(found: Iterable[str], expected: Iterable[str], found_name: str, expected_name: str) -> None:
    """Raise InputError unless two files have the same ids; the message counts and names those that are missing.

    Args:
        found: Ids of the first file.
        expected: Ids of the second file.
        found_name: Name of the first file.
        expected_name: Name of the second file.
    """
    first, second = list(found), list(expected)
    for lacking, present, name, other in (
        (set(first), second, found_name, expected_name),
        (set(second), first, expected_name, found_name),
    ):
        missing = [key for key in present if key not in lacking]
        if missing:
            raise InputError(
                f"{name} lacks {plural(len(missing), 'id')} of {plural(len(set(present)), 'id')} in {other}, first "
                f'"{shorten(missing[0], SHOWN)}"; both files must be of the same items'
            )


def hash_texts(name: str, texts: Mapping[str, Sequence[str]]) -> SetRecord:
    """Return the record of texts with ids for a manifest, whatever their order.

    Args:
        name: A name for people.
        texts: The texts of each id.
    """
    return hash_set(name, [hashlib.sha256("\n".join([key, *each]).encode()).hexdigest() for key, each in texts.items()])


def _not_empty(found: dict[str, Any], path: Path) -> dict[str, Any]:
    if not found:
        raise InputError(f"{path} holds no text")
    return found


def _rows(path: Path, on_note: Callable[[str], object], separator: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file; a line of a text file is split at ``separator``."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        yield from _coco_rows(path)
    elif suffix in (".jsonl", ".ndjson", ".tsv", ".csv"):
        content = read_text(str(path), on_note)
        delimiter = {".tsv": "\t", ".csv": ","}.get(suffix)
        try:
            lines = parse_objects(content) if delimiter is None else parse_table(content, delimiter)
            for number, values in lines:
                where = f"{path}, line {number}"
                if isinstance(values, str):
                    raise InputError(f"{where}: {values}")
                yield from _texts_of(values, where)
        except HeaderError as error:
            raise InputError(f"{path}: {error}") from None
    else:
        lines_of_text = read_text(str(path), on_note).rstrip().splitlines()
        for number, line in enumerate(lines_of_text, start=1):
            for text in line.split(separator) if separator else [line]:
                yield _checked(f"{path}, line {number}", str(number), text)


def _coco_rows(path: Path) -> Iterator[Row]:
    """Yield the captions of a file of MS COCO: a list, or the list ``annotations`` of an object."""
    content = read_json(path)
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of captions, or an object with the list annotations")
    for number, values in enumerate(rows, start=1):
        where = f"{path}, caption {number}"
        if not isinstance(values, dict):
            raise InputError(f"{where}: {EXPECTED}, got {shorten(str(values), SHOWN)}")
        key = values.get("image_id", values.get("id"))  # annotations of MS COCO have an id of their own beside it
        yield from _texts_of({**values, "id": key}, where)


def _texts_of(values: Mapping[str, Any], where: str) -> Iterator[Row]:
    key = next((values[name] for name in ID_KEYS if values.get(name) is not None), None)
    texts = next((values[name] for name in TEXT_KEYS if values.get(name) is not None), None)
    if isinstance(key, bool) or not isinstance(key, int | str) or not isinstance(texts, str | list) or texts == []:
        raise InputError(f"{where}: {EXPECTED}")
    for text in [texts] if isinstance(texts, str) else texts:
        yield _checked(where, str(key), text)


def _checked(where: str, key: str, text: object) -> Row:
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a text, got {shorten(str(text), SHOWN)}")
    if not text.strip():
        raise InputError(f"{where}: the text is empty; expected a text for every id")
    return where, key, text.strip()
