"""``cogview import-data``: import datasets of CogView v1 into a token store."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cogview.cli.options import FILE, Command, argument, model_option, output_option
from cogview.errors import InputError


@click.command(cls=Command)
@argument(
    "sources",
    nargs=-1,
    required=True,
    type=FILE,
    metavar="SOURCE",
    help="LMDB folder or .bin file; several are imported into one store, in this order",
)
@model_option(required=True, help="name or folder of the model whose tokenizers made the data")
@output_option(required=True, metavar="STORE", help="folder of the store")
@click.option("--skip-bad", is_flag=True, help="skip invalid rows")
def command(sources: tuple[Path, ...], model: str, output: Path, skip_bad: bool) -> int:
    """Import datasets of CogView v1 into a token store; an interrupted import is continued."""
    from cogview.checkpoints.checkpoint import read_config
    from cogview.checkpoints.registry import resolve_checkpoint
    from cogview.data.v1_datasets import V1Dataset
    from cogview.data.v1_import import import_dataset
    from cogview.files import file_sha256

    folder = resolve_checkpoint(model)
    config = read_config(folder)
    text_model = folder / "text.model"
    if not text_model.is_file():
        raise InputError(f"the checkpoint {folder} is incomplete: text.model is missing")
    text_sha256 = file_sha256(text_model)
    datasets = [
        V1Dataset(
            source,
            num_image_codes=config.vocabulary.num_image_codes,
            num_text_pieces=config.vocabulary.num_text_pieces,
            codebook_sha256=config.codebook_sha256,
            text_sha256=text_sha256,
            text_width=config.max_text,
        )
        for source in sources
    ]
    report = import_dataset(output, datasets, skip_bad=skip_bad)
    if report.skipped:
        print(f"rows skipped: {report.skipped:,}; the first: {report.first_error}", file=sys.stderr)
    print(f"{output}: {report.rows:,} rows")
    return 0
