"""Parse JSON and YAML that may be damaged or hostile: sizes and nesting are limited, and every mistake is one line.

Every file of JSON or YAML is read through this module, so that a file of brackets, a name that is given twice or bytes
that are not UTF-8 are the same one-line ``InputError`` everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cogview.errors import InputError
from cogview.formatting import shorten
from cogview.input_files import conversion_advice, marked_encoding, read_regular

MAX_JSON_BYTES = 64 << 20
MAX_YAML_BYTES = 1 << 20  # YAML is parsed a thousand times slower than JSON
MAX_DEPTH = 64  # of lists and mappings in each other
MAX_VALUES = 1_000_000  # in YAML, where an alias repeats a value for three characters

MAX_DIGITS = 4300  # of a whole number, Python's limit

_SHOWN = 40  # characters of a value in a message
_TOO_DEEP = "this is nested too deeply to be read"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-4`` as a number, as YAML 1.2 does, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping; raise ConstructorError for a duplicate key."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f'duplicate key "{key_node.value}"', problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Read a value; raise ConstructorError, which has the line, for a number or a date that cannot be read."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            text = str(node.value)
            reason = _too_long(text) if len(text) > MAX_DIGITS else f'"{shorten(text, _SHOWN)}" cannot be read: {error}'
            raise yaml.constructor.ConstructorError(problem=reason, problem_mark=node.start_mark) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_json(content: str | bytes) -> Any:
    """Parse JSON.

    Args:
        content: The text, or its bytes in UTF-8, perhaps with a byte order mark.

    Returns:
        The plain values.

    Raises:
        ValueError: It is not JSON, is nested in more than ``MAX_DEPTH`` levels, gives a key twice, or has a number of
            more than ``MAX_DIGITS`` digits.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        found = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_with_unique_keys, parse_int=_parse_int)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _measure(found)
    return found


def parse_yaml(text: str) -> Any:
    """Parse YAML; numbers such as ``1e-4`` are numbers.

    Args:
        text: The text, up to ``MAX_YAML_BYTES`` of it.

    Returns:
        The plain values.

    Raises:
        ValueError: It is not YAML, is too long, is nested in more than ``MAX_DEPTH`` levels, repeats values by aliases
            beyond ``MAX_VALUES``, or gives a key twice. The message begins with the line, where that is known.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has {len(text):,} characters, at most {MAX_YAML_BYTES:,} are read")
    try:
        found = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # from values with a wrong tag
        raise ValueError(f"a value does not match its type ({error})") from None
    if _measure(found) > MAX_VALUES:
        raise ValueError(f"its aliases repeat more than {MAX_VALUES:,} values")
    return found


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        InputError: The file cannot be read, is not JSON, or is larger than ``MAX_JSON_BYTES``.
    """
    content = read_regular(path, MAX_JSON_BYTES)
    try:
        return parse_json(content)
    except ValueError as error:
        if marked_encoding(content) is not None:
            raise InputError(f"{path} is not JSON: {error}; {conversion_advice(content, path)}") from None
        raise InputError(f"{path} is not JSON: {error}") from None


def read_yaml(path: Path, kind: str = "file") -> Any:
    """Return the content of a YAML file.

    Args:
        path: The file, UTF-8.
        kind: A word for messages, such as ``recipe``.

    Raises:
        InputError: The file cannot be read, is not YAML, or is larger than ``MAX_YAML_BYTES``. The message has the
            line.
    """
    content = read_regular(path, MAX_YAML_BYTES, kind)
    try:
        return parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        advice = conversion_advice(content, path)
        raise InputError(f"cannot read the {kind} {path}: byte {error.start} is not UTF-8; {advice}") from None
    except ValueError as error:
        raise InputError(f"{path}, {error}") from error


def _parse_int(text: str) -> int:
    """Return a whole number of JSON; raise ValueError if it is too long."""
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(_too_long(text))
    return int(text)


def _too_long(text: str) -> str:
    """Return the reason why a number is not read."""
    return f"a number of {len(text.lstrip('+-')):,} digits is too large: {text[:8]}…"


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raise ValueError for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'"{next(key for key in found if keys.count(key) > 1)}" stands here twice')
    return found


def _measure(value: Any) -> int:
    """Return the number of values in ``value``, repeated ones counted anew; raise ValueError if nested too deeply."""
    sizes: dict[int, int] = {}  # by identity: a value under several aliases is visited once

    def visit(inner: Any, depth: int) -> int:
        if not isinstance(inner, (Mapping, list, tuple, set)):
            return 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        if id(inner) not in sizes:
            children = inner.values() if isinstance(inner, Mapping) else inner
            sizes[id(inner)] = 1 + sum([visit(child, depth + 1) for child in children])
        return sizes[id(inner)]

    return visit(value, 1)
