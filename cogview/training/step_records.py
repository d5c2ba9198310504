"""Records of the steps of a recipe: with which settings each was done, and in which order.

``WORK/steps.json`` has an entry for each finished step. A result is stale if its settings are not those of the recipe
any more, or if an earlier step was done again after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from cogview.config_io import from_mapping, to_mapping
from cogview.errors import InputError
from cogview.files import file_sha256, write_json
from cogview.formatting import MAX_ENTRY, format_list, shorten
from cogview.plain_data import read_json
from cogview.training.recipe import Recipe

RECORDS_FILE = "steps.json"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """How a step was done.

    Attributes:
        order: Its place among the steps that were done below a work folder.
        settings: Its settings, as plain values.
        result: SHA-256 of the file that it made; empty if unknown.
        overrides: Changes SECTION.KEY=VALUE of its command line.
    """

    order: int
    settings: dict[str, Any]
    result: str = ""
    overrides: tuple[str, ...] = ()


def read_records(recipe: Recipe) -> dict[str, StepRecord]:
    """Return the records below the work folder of a recipe, by step; none if there is no file.

    Args:
        recipe: The recipe.

    Raises:
        InputError: The file is damaged.
    """
    path = recipe.work / RECORDS_FILE
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise InputError(f"{path} has no names of steps")
        return {name: from_mapping(StepRecord, entry, where=f"{path}, {name}") for name, entry in found.items()}
    except InputError as error:
        raise InputError(
            f"the records of steps cannot be read; move {path} away, results are kept and taken as they are: {error}"
        ) from None


def record_step(
    recipe: Recipe, step: str, settings: object, result: Path | None = None, *, order: int | None = None
) -> None:
    """Record that a step is done.

    A step that was repeated with the same settings and the same result keeps its place in the order, so that the
    results of later steps stay valid.

    Args:
        recipe: The recipe.
        step: The command, such as ``train-text``.
        settings: Its settings: a dataclass, or plain values.
        result: The file that it made.
        order: Its place in the order; after all others if None.

    Raises:
        InputError: The file of the records is damaged.
    """
    records = read_records(recipe)
    found = file_sha256(result) if result is not None and result.is_file() else ""
    plain = to_mapping(settings)
    before = records.get(step)
    if before is not None and found and (before.settings, before.result) == (plain, found):
        order = before.order
    last = max((record.order for record in records.values()), default=0)
    records[step] = StepRecord(
        order=last + 1 if order is None else order, settings=plain, result=found, overrides=recipe.named_overrides
    )
    recipe.work.mkdir(parents=True, exist_ok=True)
    write_json(recipe.work / RECORDS_FILE, to_mapping(records), indent=1)


def changes_of(stored: Mapping[str, Any], settings: Any, free: Collection[str] = ()) -> list[str]:
    """Return what differs between stored settings and those of a recipe, one text for each key.

    Args:
        stored: The stored settings; keys that are missing have their defaults.
        settings: The settings of the recipe: a dataclass, or plain values.
        free: Keys, with dots, that do not change the result.

    Returns:
        Texts such as ``training.steps 10 -> 20``.
    """
    before: Mapping[str, Any] = stored
    if is_dataclass(settings):
        with suppress(InputError):  # of a version with other keys
            before = to_mapping(from_mapping(type(settings), stored, where="stored settings"))
    old, new = dict(_leaves(before)), dict(_leaves(to_mapping(settings)))
    return [
        f"{key} {_shown(old.get(key))} -> {_shown(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]


def _shown(value: object) -> str:
    """Return a setting for a message; a long list is shortened."""
    return f"[{format_list(map(repr, value))}]" if isinstance(value, list) else shorten(str(value), MAX_ENTRY)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested settings by their keys with dots."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
