"""Result files: the values of a measure, with a manifest that says exactly how they were measured.

Two values can be compared if everything that could move them is equal or is what the comparison is about. A manifest
records it: prompts, reference set, resizing, feature network, blur, selection, seeds, sampling and model. A file is
sealed with a SHA-256 of its content, so that a value that was edited by hand is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogview.config_io import from_mapping, to_mapping
from cogview.errors import InputError
from cogview.evaluation.records import (
    AdapterRecord,
    BlurRecord,
    Manifest,
    ModelRecord,
    NetworkRecord,
    PromptsRecord,
    ResizeRecord,
    Result,
    ResultCurve,
    ResultItems,
    ResultValue,
    SeedsRecord,
    SelectionRecord,
    SetRecord,
)
from cogview.files import atomic_write
from cogview.plain_data import read_json

__all__ = [
    "AdapterRecord",
    "BlurRecord",
    "Manifest",
    "ModelRecord",
    "NetworkRecord",
    "PromptsRecord",
    "ResizeRecord",
    "Result",
    "ResultCurve",
    "ResultItems",
    "ResultValue",
    "SeedsRecord",
    "SelectionRecord",
    "SetRecord",
    "flatten",
    "hash_prompts",
    "hash_set",
    "manifest_fields",
    "read_result",
    "unlike_fields",
    "write_result",
]
FORMAT = "cogview-result-1"
# What a comparison is about, or what does not move a value. The number of candidates does: FID falls with it.
MAY_DIFFER = ("candidate.name", "candidate.sha256", "reference.name", "model", "versions", "hardware")


def hash_prompts(prompts: Sequence[str]) -> PromptsRecord:
    """Return the record of prompts; equal prompts in equal order have one hash on every machine.

    Args:
        prompts: Prompts or captions.
    """
    return PromptsRecord(sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(), count=len(prompts))


def hash_set(name: str, content_hashes: Iterable[str]) -> SetRecord:
    """Return the record of a set, whatever the order and the names of its members.

    Args:
        name: A name for people, without paths of this machine.
        content_hashes: Hash of the content of each member, in hexadecimal.
    """
    hashes = sorted(content_hashes)
    return SetRecord(name=name, sha256=hashlib.sha256("\n".join(hashes).encode()).hexdigest(), count=len(hashes))


def write_result(
    path: Path,
    manifest: Manifest,
    results: Mapping[str, ResultValue | Mapping[str, Any]],
    items: ResultItems | Mapping[str, Any] | None = None,
    curves: Mapping[str, ResultCurve] | None = None,
) -> None:
    """Write a result file, which is whole or absent.

    Args:
        path: The file to write or replace.
        manifest: How the values were measured.
        results: Values by name; a mapping has the fields of ``ResultValue``.
        items: Values of single items; a mapping has the fields of ``ResultItems``.
        curves: Curves by name.

    Raises:
        InputError: A number is not finite, or a value has another type than its field.
    """
    content: dict[str, Any] = {"format": FORMAT, "manifest": _plain(manifest), "results": _plain(results)}
    if items is not None:
        content["items"] = _plain(items)
    if curves:
        content["curves"] = _plain(curves)
    _read_fields(content, str(path))  # whatever is written can be read
    content["sha256"] = _seal(content)
    with atomic_write(path) as temporary:
        temporary.write_text(_format(content), encoding="utf-8")


def read_result(path: Path) -> Result:
    """Return the content of a result file.

    Raises:
        InputError: It is not a result, has a newer format, or was changed after it was written.
    """
    content = read_json(path)
    found = content.get("format") if isinstance(content, dict) else None
    version = re.fullmatch(r"cogview-result-([0-9]{1,9})", found) if isinstance(found, str) else None
    if version is None:
        raise InputError(f"{path} is not a result: expected a JSON file with the format {FORMAT}, written by cogview")
    if found != FORMAT:
        raise InputError(f"{path} has the format {found}, this version reads {FORMAT}: install a newer cogview")
    stated = content.pop("sha256", None)
    _check_finite(content, str(path), ())
    if stated != _seal(content):
        raise InputError(
            f"{path} was changed after it was written: its SHA-256 is {_seal(content)[:12]}…, it states "
            f"{str(stated)[:12]}…; measure again"
        )
    return Result(**_read_fields(content, str(path)), sha256=stated)


def unlike_fields(a: Manifest, b: Manifest, allow: Iterable[str] = ()) -> list[str]:
    """Return the fields that must be equal for a comparison and are not.

    Args:
        a: A manifest.
        b: Another one.
        allow: Further fields that may differ, with all that they hold, such as "sampling" or "blur.sigma".

    Returns:
        Dotted names, such as "reference.sha256", in the order of the manifest. ``MAY_DIFFER`` are not among them.
    """
    left, right = flatten(_plain(a)), flatten(_plain(b))
    free = (*MAY_DIFFER, *allow)
    order = {each.name: number for number, each in enumerate(fields(Manifest))}
    names = sorted(left.keys() | right.keys(), key=lambda name: (order[name.split(".")[0]], name))
    absent = object()
    return [
        name
        for name in names
        if left.get(name, absent) != right.get(name, absent)
        and not any(name == each or name.startswith(f"{each}.") for each in free)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted names; lists are values."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def manifest_fields(manifest: Manifest) -> dict[str, Any]:
    """Return the fields of a manifest that are set, with dotted names."""
    return flatten(_plain(manifest))


def _plain(value: Any) -> Any:
    """Return plain data for JSON; optional fields of dataclasses that are None or empty are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        named = {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
        required = {each.name for each in fields(value) if each.default is each.default_factory is MISSING}
        empty: tuple[Any, ...] = (None, [], {})
        return {name: inner for name, inner in named.items() if name in required or inner not in empty}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return to_mapping(value)


def _read_fields(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of ``Result`` but the hash; raise InputError for values that are not finite, or of wrong type.

    Args:
        content: Plain data of a result file.
        where: Beginning of messages.
    """
    _check_finite(content, where, ())
    known = {"format", "manifest", "results", "items", "curves"}
    for key in ("results", "curves"):
        if not isinstance(content.get(key, {}), Mapping):
            raise InputError(f"{where}: {key} must be values with names")
    if unknown := content.keys() - known:
        raise InputError(f'{where}: "{min(unknown)}" is unknown; known: {", ".join(sorted(known))}')
    items = content.get("items")
    return {
        "manifest": from_mapping(Manifest, content.get("manifest", {}), f"manifest of {where}"),
        "results": {
            name: from_mapping(ResultValue, value, f"result {name} of {where}")
            for name, value in content.get("results", {}).items()
        },
        "items": None if items is None else from_mapping(ResultItems, items, f"items of {where}"),
        "curves": {
            name: from_mapping(ResultCurve, value, f"curve {name} of {where}")
            for name, value in content.get("curves", {}).items()
        },
    }


def _check_finite(value: Any, where: str, path: tuple[str, ...]) -> None:
    """Raise InputError for a number that is not finite, which JSON has none of."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {'.'.join(path)} is {value}, expected a finite number")
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        _check_finite(each, where, (*path, str(key)))


def _seal(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain data in canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _format(content: Mapping[str, Any]) -> str:
    """Return JSON with a line for each entry of manifest, results and items: versions of a file compare well."""
    blocks = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            lines = [
                f"    {json.dumps(name)}: {json.dumps(inner, ensure_ascii=False)}" for name, inner in value.items()
            ]
            blocks.append(f"  {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n  }")
        else:
            blocks.append(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
