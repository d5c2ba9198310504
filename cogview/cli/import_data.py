"""``cogview import-data``: datasets of the released CogView as a token store."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cogview.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="an LMDB folder or a .bin file; several make one store, in this order",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="the model whose tokenizers made the data, which does not say so itself",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="STORE", help="the folder to write")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be used")


def run(args: argparse.Namespace) -> int:
    """Convert; an interrupted import is continued."""
    from cogview.checkpoints.checkpoint import read_config
    from cogview.checkpoints.registry import resolve_checkpoint
    from cogview.data.v1_datasets import V1Dataset
    from cogview.data.v1_import import import_dataset
    from cogview.files import file_sha256

    folder = resolve_checkpoint(args.model)
    config = read_config(folder)
    text_model = folder / "text.model"
    if not text_model.is_file():
        raise InputError(f"the checkpoint {folder} is incomplete: text.model is missing")
    text_sha256 = file_sha256(text_model)
    sources = [
        V1Dataset(
            Path(source),
            num_image_codes=config.vocabulary.num_image_codes,
            num_text_pieces=config.vocabulary.num_text_pieces,
            codebook_sha256=config.codebook_sha256,
            text_sha256=text_sha256,
            text_width=config.max_text,
        )
        for source in args.sources
    ]
    made = import_dataset(args.output, sources, skip_bad=args.skip_bad)
    if made.skipped:
        print(f"rows left out: {made.skipped:,}; the first: {made.first_error}", file=sys.stderr)
    print(f"{args.output}: {made.rows:,} rows")
    return 0
