"""``cogview download``: download the files of a CogView v1 model, or a model of the Hugging Face Hub."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.options import Command, argument, output_option, revision_option
from cogview.errors import ExitStatus, InputError, RetryLaterError, reason_of

if TYPE_CHECKING:
    from cogview.checkpoints.registry import FileEntry, ModelEntry


@click.command(cls=Command)
@argument("name", metavar="NAME", help="name listed by cogview models, or owner/name on the Hugging Face Hub")
@revision_option()
@output_option(
    default=None,
    show_default="$COGVIEW_HOME/files, else ~/.cache/cogview/files",
    help="folder for the files, which are then not converted",
)
@click.option("--no-convert", is_flag=True, help="do not convert the files")
@click.option("--parts", type=int, hidden=True, expose_value=False)  # of old command lines; one connection suffices
def command(name: str, revision: str | None, output: Path | None, no_convert: bool) -> int:
    """Download the files of a CogView v1 model, print their paths, and convert them into a checkpoint folder.

    For owner/name, download a model of the Hugging Face Hub and print its folder. Existing files are not downloaded
    again, and an interrupted download resumes. The status is 2 if a file cannot be downloaded or converted, and 3 if
    the same command can succeed later: a mirror did not answer, or the disk is full.
    """
    from cogview.checkpoints.download import download
    from cogview.checkpoints.hub import fetch_checkpoint, is_hub_name
    from cogview.checkpoints.registry import converted_folder, downloads_folder, is_converted, load_registry

    known = load_registry()
    row = known.get(name)
    if row is None and is_hub_name(name):
        if output is not None:
            raise InputError("-o applies to CogView v1 models; HF_HUB_CACHE sets the folder for models of the Hub")
        print(fetch_checkpoint(name, revision=revision))
        return 0
    if revision is not None:
        raise InputError(f"--revision applies to models of the Hugging Face Hub (owner/name), not to {name}")
    if row is None:
        raise InputError(f'model "{name}" is unknown; known: {", ".join(known)}')
    if row.embedded:
        print(f"{name} comes with the package: there is nothing to download", file=sys.stderr)
        return 0
    folder = downloads_folder() if output is None else output
    wanted: dict[str, FileEntry] = {}
    for model in row.models or (name,):
        if output is None and is_converted(model):
            print(f"{model} is converted already: {converted_folder(model)}", file=sys.stderr)
        else:
            wanted |= {file.name: file for file in known[model].files.values()}
    failures: set[ExitStatus] = set()
    for file in wanted.values():
        try:
            print(download(file, folder), flush=True)
        except InputError as error:
            print(f"cogview download: {error}", file=sys.stderr)
            failures.add(ExitStatus.RETRY_LATER if isinstance(error, RetryLaterError) else ExitStatus.MISTAKE)
    status = min(failures, default=ExitStatus.DONE)  # a mistake has to be mended before the command can succeed
    convert = output is None and not no_convert
    converted = convert_downloads(name, {file: folder / file for file in wanted}, convert=convert)
    return min((code for code in (status, converted) if code), default=0)


def convert_downloads(name: str, files: Mapping[str, Path], *, convert: bool) -> int:
    """Convert each model of the row ``name`` whose files are complete.

    Args:
        name: A name of the registry.
        files: The path of each file by its name; a file may be missing.
        convert: Whether to convert; otherwise the command that does is printed.

    Returns:
        The exit status: 2 if a model cannot be converted, else 0.
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
                print(f"cogview download: {model} could not be converted: {reason_of(error)}", file=sys.stderr)
                status = 2
    return status


def _convert(name: str, row: ModelEntry, files: Mapping[str, Path]) -> Path:
    """Convert ``files``, given by role, in their precision; return the checkpoint folder."""
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
