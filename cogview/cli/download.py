"""``cogview download``: fetch the files of a released model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.cli.options import require_positive
from cogview.errors import InputError

if TYPE_CHECKING:
    from cogview.checkpoints.registry import KnownFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Fetch the files of a released model and print their paths. What is there already is not fetched again, and a "
        "download that was interrupted goes on where it stopped."
    )
    parser.add_argument("name", metavar="NAME", help="a model's name; cogview models lists them")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where files go (default: $COGVIEW_HOME/files, else ~/.cache/cogview/files)",
    )
    parser.add_argument("--parts", type=int, default=4, metavar="COUNT", help="connections at a time for one file")


def run(args: argparse.Namespace) -> int:
    """Fetch every file that can be had; status 2 if there was one that cannot."""
    from cogview.checkpoints.download import download
    from cogview.checkpoints.registry import converted_folder, downloads_folder, is_converted, known_models

    require_positive("--parts", args.parts)
    known = known_models()
    row = known.get(args.name)
    if row is None:
        raise InputError(f'model "{args.name}" is unknown; known: {", ".join(known)}')
    if row.embedded:
        print(f"{args.name} comes with the package: there is nothing to download", file=sys.stderr)
        return 0
    folder = downloads_folder() if args.output is None else args.output
    wanted: dict[str, KnownFile] = {}
    for name in row.models or (args.name,):
        if args.output is None and is_converted(name):
            print(f"{name} is here already: {converted_folder(name)}", file=sys.stderr)
        else:
            wanted |= {file.name: file for file in known[name].files.values()}
    status = 0
    for file in wanted.values():
        try:
            print(download(file, folder, parts=args.parts), flush=True)
        except InputError as error:
            print(f"cogview download: {error}", file=sys.stderr)
            status = 2
    after_download(args.name, {name: folder / name for name in wanted})
    return status


def after_download(name: str, files: Mapping[str, Path]) -> None:
    """Say how to go on with each model of the row ``name`` whose transformer is there.

    ``files`` has where each file belongs, by its name; not all of them need be there.
    """
    from cogview.checkpoints.registry import convert_command, known_models

    known = known_models()
    for model in known[name].models or (name,):
        roles = {role: files[file.name] for role, file in known[model].files.items() if file.name in files}
        if "transformer" in roles and roles["transformer"].is_file():
            print(f"{model} has to be converted once: {convert_command(roles)}", file=sys.stderr)
