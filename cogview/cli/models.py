"""``cogview models``: the models that are known by name, and which of them are on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogview.checkpoints.registry import ModelEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--json", action="store_true", help="one JSON document: a list with all of it, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Print; weights are not loaded."""
    from cogview.checkpoints.registry import load_registry

    rows = [describe(name, row) for name, row in load_registry().items()]
    if args.json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        print("\n\n".join("\n".join(lines(row)) for row in rows))
    return 0


def describe(name: str, row: ModelEntry) -> dict[str, Any]:
    """A row and what of it is on this machine, as plain values.

    ``folder`` is that of the model itself, None where it is not here, and ``size`` its bytes. ``files`` has those that
    are downloaded or on the way: name, path, size, and ``received``, less than the size for a part of a file.
    ``parts`` says for each task of a bundle which model does it and whether that one is here.
    """
    from cogview.checkpoints.download import received
    from cogview.checkpoints.registry import converted_folder, downloads_folder, embedded_folder, is_converted

    folder = embedded_folder(row) if row.embedded else converted_folder(name) if is_converted(name) else None
    files = []
    for file in row.files.values():
        path = downloads_folder() / file.name
        if path.is_file():
            size = path.stat().st_size
            files.append({"name": file.name, "path": str(path), "size": size, "received": size})
        elif (part := received(path.parent, file.name)) is not None:
            files.append({"name": file.name, "path": f"{path}.part", "size": part[1], "received": part[0]})
    return {
        "name": name,
        "about": row.about,
        "tasks": list(row.tasks),
        "licence": row.licence,
        "kind": "embedded" if row.embedded else "released" if row.files else "bundle",
        "folder": None if folder is None else str(folder),
        "size": None if folder is None else _bytes_in(folder),
        "needed_files": [file.name for file in row.files.values()],
        "files": files,
        "parts": {task: {"model": part, "here": is_converted(part)} for task, part in row.parts.items()},
    }


def lines(row: dict[str, Any]) -> list[str]:
    """What ``describe`` found, in words."""
    facts = {"tasks": ", ".join(row["tasks"]), "licence": row["licence"], "on disk": _on_disk(row)}
    return [f"{row['name']}: {row['about']}", *(f"  {key + ':':<10}{value}" for key, value in facts.items())]


def _on_disk(row: dict[str, Any]) -> str:
    from cogview.formatting import format_bytes

    if row["kind"] == "bundle":
        here = {part["model"]: part["here"] for part in row["parts"].values()}
        missing = not all(here.values())
        states = (f"{model} is {'here' if there else 'not here'}" for model, there in here.items())
        return ", ".join(states) + (f": cogview download {row['name']}" if missing else "")
    if row["kind"] == "embedded":
        return f"comes with the package ({format_bytes(row['size'])})"
    found = [] if row["folder"] is None else [f"converted ({format_bytes(row['size'])})"]
    whole = [file for file in row["files"] if file["received"] == file["size"]]
    if whole:
        total = format_bytes(sum(file["size"] for file in whole))
        found.append(f"{len(whole)} of {len(row['needed_files'])} files, {total}")
    found += [
        f"part of {file['name']}: {file['received'] / file['size']:.0%}" for file in row["files"] if file not in whole
    ]
    if row["folder"] is None:
        found = [f"{'; '.join(found) or 'not here'}: cogview download {row['name']}"]
    return "; ".join(found)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
