"""``cogview models``: list the known models and which of them are on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.options import Command

if TYPE_CHECKING:
    from cogview.checkpoints.registry import ModelEntry


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="print a JSON list with every value, sizes in bytes")
def command(as_json: bool) -> int:
    """List the known models and which of them are on this machine. No weights are loaded."""
    from cogview.checkpoints.registry import load_registry

    rows = [describe_model(name, row) for name, row in load_registry().items()]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        print("\n\n".join("\n".join(model_lines(row)) for row in rows))
    return 0


def describe_model(name: str, row: ModelEntry) -> dict[str, Any]:
    """Return a row of the registry and its files on this machine, as plain data.

    ``folder`` is the checkpoint folder, None if it is not on this machine, and ``size`` its bytes. ``files`` lists
    complete and partial downloads: name, path, size and ``received``, both in bytes. ``parts`` has the model of each
    task of a bundle and whether it is on this machine.
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


def model_lines(row: dict[str, Any]) -> list[str]:
    """Return the lines of a row of ``describe_model``."""
    facts = {"tasks": ", ".join(row["tasks"]), "licence": row["licence"], "on disk": _on_disk(row)}
    return [f"{row['name']}: {row['about']}", *(f"  {key + ':':<10}{value}" for key, value in facts.items())]


def _on_disk(row: dict[str, Any]) -> str:
    """Return the state of a model on this machine, and the command that downloads it."""
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
    """Return the size of all files below a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
