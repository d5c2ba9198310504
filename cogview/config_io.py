"""Settings in files: YAML recipes and JSON configs are converted to frozen dataclasses and back.

A recipe is a YAML file with a section per command. ``from_mapping`` converts a section, with ``key=value`` overrides of
the command line, to the dataclass of the command; ``to_mapping`` converts it back.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cogview.errors import InputError
from cogview.formatting import format_list, shorten
from cogview.plain_data import parse_yaml, read_yaml

T = TypeVar("T")

_SHOWN = 200  # characters of a wrong value in a message

# Renamed keys of recipes, checkpoints and overrides: the old name is read as the new one. No dataclass that is read
# from a file may have a field with an old name.
RENAMED_KEYS = {
    "branch_gain": "branch_norm_init",
    "caption_drop": "caption_dropout",
    "gradient_weight": "gradient_difference_weight",
    "held_out_store": "validation_store",
    "hidden_places": "full_mask_targets",
    "hidden_rows": "full_mask_rate",
    "masked_rows": "partial_mask_rate",
    "micro_batch": "micro_batch_size",
    "new_stores": "watch_folder",
    "shares": "weights",
    "start_from": "init_from",
    "text_space": "text_positions",
    "workers": "num_workers",
}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the sections of a YAML recipe.

    Args:
        path: The file, UTF-8.

    Returns:
        The sections by name, as plain values.

    Raises:
        InputError: The file cannot be read or parsed; the message has the line.
    """
    recipe = read_yaml(Path(path), "recipe")
    if not isinstance(recipe, dict):
        raise InputError(f"{path} is no recipe: expected sections, got {_describe(recipe)}")
    return recipe


def section(recipe: Mapping[str, Any], name: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return a section of a recipe with overrides; the recipe is not changed.

    Args:
        recipe: Sections by name.
        name: The section.
        overrides: Each ``key=value`` with a value in YAML; ``key.inner=value`` sets a key of a nested section. Keys may
            have the old names of ``RENAMED_KEYS``.

    Raises:
        InputError: The section is missing or is no mapping, or an override cannot be parsed.
    """
    if name not in recipe:
        raise InputError(f'the recipe has no section "{name}"; it has: {format_list(recipe) or "none"}')
    content = {} if recipe[name] is None else recipe[name]
    if not isinstance(content, dict):
        raise InputError(f'section "{name}" of the recipe: expected settings, got {_describe(content)}')
    result = dict(content)
    for override in overrides:
        _apply_override(result, override)
    return result


def _apply_override(settings: dict[str, Any], override: str) -> None:
    """Set the key of ``key=value`` in ``settings``, in place; nested settings are copied first."""
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f'the override "{override}": expected key=value')
    try:
        parsed = parse_yaml(value)
    except ValueError as error:
        raise InputError(f'the override "{override}": {error}') from error
    *outer, last = (RENAMED_KEYS.get(key, key) for key in path.split("."))
    for key in outer:
        for old in _old_names(key):
            if old in settings and key not in settings:
                settings[key] = settings.pop(old)
        inner = settings.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise InputError(f'the override "{override}": "{key}" is {_describe(inner)} and has no inner settings')
        settings[key] = dict(inner or {})
        settings = settings[key]
    for old in _old_names(last):
        settings.pop(old, None)
    settings[last] = parsed


def _old_names(key: str) -> list[str]:
    """Return the old names of a key."""
    return [old for old, new in RENAMED_KEYS.items() if new == key]


def from_mapping(kind: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Convert plain values of YAML or JSON to a dataclass.

    Fields may be numbers, strings, booleans, None, ``Path``, ``Literal``, unions, lists, tuples, dictionaries and
    nested dataclasses. A whole number is accepted for a float and a list for a tuple; no other type is converted.

    Args:
        kind: The dataclass.
        mapping: Values by field; keys may have the old names of ``RENAMED_KEYS``.
        where: Beginning of error messages, such as "transformer section of emoji-cpu.yaml".

    Returns:
        The instance.

    Raises:
        InputError: A key is unknown, missing or given twice, a value has another type, or the dataclass rejects it.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where} must be settings with names, got {_describe(mapping)}")
    hints, settings = _fields_of(kind)  # type: ignore[arg-type]
    mapping = _with_new_names(mapping, settings, where)
    for key in mapping:
        if key not in settings:
            near = get_close_matches(str(key), settings, n=1)
            advice = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(settings)}"
            raise InputError(f'{where}: "{key}" is unknown; {advice}')
    missing = [
        name
        for name, setting in settings.items()
        if name not in mapping and setting.default is MISSING and setting.default_factory is MISSING
    ]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} must be given")
    values = {key: _convert_value(hints[key], value, f"{where}, {key}") for key, value in mapping.items()}
    try:
        return kind(**values)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


@cache
def _fields_of(kind: type) -> tuple[Mapping[str, Any], Mapping[str, Field[Any]]]:
    """Return the types of a dataclass by field, and the fields that its constructor takes."""
    return get_type_hints(kind), {setting.name: setting for setting in fields(kind) if setting.init}


def _with_new_names(mapping: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """Return ``mapping`` with old keys under their new names; raise InputError if both names are given."""
    renamed = {}
    for key, value in mapping.items():
        name = RENAMED_KEYS.get(key, key)
        name = name if name in known else key
        if name in renamed:
            old = next(old for old in _old_names(name) if old in mapping)
            raise InputError(f'{where}: "{old}" is the old name of "{name}", and both are given; keep "{name}"')
        renamed[name] = value
    return renamed


def to_mapping(value: Any) -> Any:
    """Convert a dataclass to dictionaries, lists, strings and numbers, which ``from_mapping`` reads.

    Fields with the metadata ``written: False`` are left out: others imply them. So are fields with the metadata
    ``omit_default: True`` that have their default, which files of earlier versions do not have.
    """
    if is_dataclass(value) and not isinstance(value, type):
        written = [setting.name for setting in fields(value) if setting.init and _is_written(setting, value)]
        return {name: to_mapping(getattr(value, name)) for name in written}
    if isinstance(value, Mapping):
        return {key: to_mapping(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_mapping(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _is_written(setting: Field[Any], value: Any) -> bool:
    """Return whether a field of the dataclass ``value`` is written."""
    if setting.metadata.get("omit_default", False):
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        return bool(getattr(value, setting.name) != default)
    return bool(setting.metadata.get("written", True))


def _convert_value(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as type ``kind``; raise InputError if it has another type."""
    if kind in (str, int, bool) and type(value) is kind:  # most values, and a few thousand of them
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if is_dataclass(kind):
        if isinstance(value, Mapping):
            return from_mapping(kind, value, where)  # type: ignore[arg-type]
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert_value(arguments[0], inner, where) for inner in value)
        if len(arguments) == len(value):
            return tuple(_convert_value(one, inner, where) for one, inner in zip(arguments, value, strict=True))
    elif origin is list and isinstance(value, list):
        return [_convert_value(arguments[0], inner, where) for inner in value]
    elif origin is dict and isinstance(value, Mapping):
        return {
            _convert_value(arguments[0], key, where): _convert_value(arguments[1], inner, f"{where}, {key}")
            for key, inner in value.items()
        }
    elif kind is Any:
        return value
    elif kind is float and type(value) in (int, float):
        if abs(value) > sys.float_info.max or value != value:
            raise InputError(f"{where}: expected a finite number, got {_describe(value)}")
        return float(value)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(kind, type) and type(value) is kind:  # not isinstance, since True is an int
        return value
    raise InputError(f"{where}: expected {_type_name(kind)}, got {_describe(value)}")


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return ``value`` as the first of several types that accepts it."""
    if value is None and type(None) in kinds:
        return None
    if type(value) in kinds:
        return value
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        return _convert_value(others[0], value, where)
    for kind in others:
        try:
            return _convert_value(kind, value, where)
        except InputError:
            continue
    raise InputError(f"{where}: expected {' or '.join(map(_type_name, kinds))}, got {_describe(value)}")


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "nothing",
}


_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}


def _type_name(kind: Any) -> str:
    """Return the name of a type for error messages."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a list of {_PLURALS.get(arguments[0]) or _type_name(arguments[0])}"
        return f"a list of {len(arguments)}"
    if origin is list:
        return f"a list of {_PLURALS.get(arguments[0]) or _type_name(arguments[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type_name, arguments))
    if origin is dict or is_dataclass(kind):
        return "settings"
    return _NAMES.get(kind, str(kind))


def _describe(value: Any) -> str:
    """Return a value for error messages."""
    if isinstance(value, Mapping):
        return shorten(f"the settings {', '.join(map(str, value))}", _SHOWN)
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        shown = shorten(str(value), _SHOWN)
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        shown = "a number of more than 4300 digits"
    return f'"{shown}"' if isinstance(value, str) else shown
