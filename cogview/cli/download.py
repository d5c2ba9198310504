"""``cogview download``: fetch the files of a released model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.cli.options import add_revision_argument
from cogview.errors import InputError

if TYPE_CHECKING:
    from cogview.checkpoints.registry import FileEntry, ModelEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Fetch the files of a CogView v1 model, print their paths, and convert them into a checkpoint folder; or fetch "
        "a model of the Hugging Face Hub. Existing files are not fetched again, and an interrupted download resumes."
    )
    parser.add_argument(
        "name", metavar="NAME", help="a name that cogview models lists, or owner/name on the Hugging Face Hub"
    )
    add_revision_argument(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where files go, and are not converted (default: $COGVIEW_HOME/files, else ~/.cache/cogview/files)",
    )
    parser.add_argument("--no-convert", action="store_true", help="leave the files as they are")
    parser.add_argument("--parts", type=int, help=argparse.SUPPRESS)  # of old command lines; one connection suffices


def run(args: argparse.Namespace) -> int:
    """Fetch every file that can be had, and convert what is complete; status 2 if anything could not be done."""
    from cogview.checkpoints.download import download
    from cogview.checkpoints.hub import fetch_checkpoint, is_hub_name
    from cogview.checkpoints.registry import converted_folder, downloads_folder, is_converted, load_registry

    known = load_registry()
    row = known.get(args.name)
    if row is None and is_hub_name(args.name):
        if args.output is not None:
            raise InputError("-o applies to CogView v1 models; HF_HUB_CACHE sets the folder for models of the Hub")
        print(fetch_checkpoint(args.name, revision=args.revision))
        return 0
    if args.revision is not None:
        raise InputError(f"--revision applies to models of the Hugging Face Hub (owner/name), not to {args.name}")
    if row is None:
        raise InputError(f'model "{args.name}" is unknown; known: {", ".join(known)}')
    if row.embedded:
        print(f"{args.name} comes with the package: there is nothing to download", file=sys.stderr)
        return 0
    folder = downloads_folder() if args.output is None else args.output
    wanted: dict[str, FileEntry] = {}
    for name in row.models or (args.name,):
        if args.output is None and is_converted(name):
            print(f"{name} is here already: {converted_folder(name)}", file=sys.stderr)
        else:
            wanted |= {file.name: file for file in known[name].files.values()}
    status = 0
    for file in wanted.values():
        try:
            print(download(file, folder), flush=True)
        except InputError as error:
            print(f"cogview download: {error}", file=sys.stderr)
            status = 2
    convert = args.output is None and not args.no_convert
    return max(status, after_download(args.name, {name: folder / name for name in wanted}, convert=convert))


def after_download(name: str, files: Mapping[str, Path], *, convert: bool) -> int:
    """Convert each model of the row ``name`` whose files are there, or say how to; returns the exit status.

    ``files`` has where each file belongs, by its name; not all of them need be there.
    """
    from cogview.checkpoints.registry import convert_command, load_registry

    known = load_registry()
    status = 0
    for model in known[name].models or (name,):
        paths = {role: files[file.name] for role, file in known[model].files.items() if file.name in files}
        if "transformer" not in paths or not paths["transformer"].is_file():
            continue
        if not convert:
            print(f"{model} has to be converted once: {convert_command(paths)}", file=sys.stderr)
        elif all(path.is_file() for path in paths.values()):
            try:
                print(f"{model} is converted: {_convert(model, known[model], paths)}", file=sys.stderr)
            except (InputError, OSError) as error:
                print(f"cogview download: {model} could not be converted: {error}", file=sys.stderr)
                status = 2
    return status


def _convert(name: str, row: ModelEntry, files: Mapping[str, Path]) -> Path:
    """The checkpoint folder that is made of ``files``, given by role, in the precision that they have."""
    from cogview.checkpoints.precision import Precision
    from cogview.checkpoints.registry import converted_folder
    from cogview.checkpoints.v1_convert import import_v1

    folder = converted_folder(name)
    import_v1(
        files["transformer"],
        files["image_tokenizer"],
        files["text_model"],
        folder,
        tasks=row.tasks,
        precision=Precision(),
    )
    return folder
