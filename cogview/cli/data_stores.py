"""The commands of ``cogview data`` that read token stores: inspect, stats, validate, merge and export."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.messages import print_note
from cogview.cli.options import (
    FILE,
    MODEL_HELP,
    Command,
    Decorator,
    argument,
    device_option,
    max_batch_size_option,
    model_option,
    output_option,
)
from cogview.errors import ExitStatus, InputError
from cogview.formatting import format_list, plural

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    import numpy as np

    from cogview.data.store import TokenStore
    from cogview.tokenizers.text import TextTokenizer
    from cogview.vqvae.model import VQVAE

SHARD_SIZE = 1000  # pictures


def store_argument(**settings: object) -> Decorator:
    """Return the argument STORE."""
    return argument("store", type=FILE, metavar="STORE", help="folder of a token store", **settings)


def store_model_option(**settings: object) -> Decorator:
    """Return ``--model``: the model whose tokenizers made a store."""
    return model_option(help=f"model whose tokenizers made the store: {MODEL_HELP}", default=None, **settings)


@click.command(cls=Command)
@store_argument()
@store_model_option(required=True)
@click.option("-n", "count", type=click.IntRange(min=1, max=1000), default=32, metavar="COUNT", help="number of rows")
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="NUMBER", show_default="the first rows", help="choose random rows"
)
@output_option(default="sheet.png", metavar="FILE", help="PNG file of the sheet")
@max_batch_size_option("pictures")
@device_option()
def inspect(
    store: Path, model: str, count: int, seed: int | None, output: Path, max_batch_size: int | None, device: str
) -> int:
    """Decode rows of a store, save them as a sheet with their captions, and print its path."""
    import numpy as np
    from PIL import Image

    from cogview.data.store_export import largest_field
    from cogview.data.store_stats import caption_of_row
    from cogview.image_io.captioned_sheet import captioned_sheet
    from cogview.image_io.png import prepare_folder, save_png

    opened, text_tokenizer, decode = open_with_tokenizers(store, model, max_batch_size, device)
    rows = np.arange(min(count, len(opened)))
    if seed is not None:
        rows = np.sort(np.random.default_rng(seed).choice(len(opened), size=len(rows), replace=False))
    found = opened.read(rows)
    codes = found[largest_field(opened)].astype(np.int64)
    side = round(codes.shape[1] ** 0.5)
    images = map(Image.fromarray, decode(codes.reshape(-1, side, side)))
    captions = [caption_of_row(text, text_tokenizer) for text in found["text"]]
    sheet = captioned_sheet([(caption, [image]) for caption, image in zip(captions, images, strict=True)], print_note)
    prepare_folder(output.parent)
    print(save_png(output, sheet, {"store": store.name, "rows": " ".join(map(str, rows))}))
    return ExitStatus.DONE


@click.command(cls=Command)
@store_argument()
@store_model_option(show_default="none: captions are not decoded")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def stats(store: Path, model: str | None, as_json: bool) -> int:
    """Print the rows of a store in numbers: lengths of texts, codes in use, frequent captions, duplicates."""
    from cogview.data.store_stats import store_stats

    opened = open_store(store)
    text_tokenizer = None
    if model is not None:
        text_tokenizer = open_text_tokenizer(model)
        check_text(opened, text_tokenizer)
    facts = store_stats(opened, text_tokenizer)
    print(json.dumps(facts.as_json(), ensure_ascii=False) if as_json else "\n".join(facts.as_text()))
    return ExitStatus.DONE


@click.command(cls=Command)
@argument("stores", nargs=-1, required=True, type=FILE, metavar="STORE", help="folder of a token store")
def validate(stores: tuple[Path, ...]) -> int:
    """Compare stores with their checksums, read every row, and locate damage; the status is 1 if there is any."""
    from cogview.data.store import TokenStore
    from cogview.data.store_blocks import damaged_blocks
    from cogview.data.store_stats import chunks

    if missing := [str(path) for path in stores if not path.is_dir()]:
        raise InputError(f"there is no folder {format_list(missing)}: expected the folders of token stores")
    status = ExitStatus.DONE
    for path in stores:
        try:
            damaged, count = damaged_blocks(path)
            for block in damaged:
                first, last = block.rows
                print(
                    f"{path}: block {block.number} of {count} is damaged: bytes {block.first:,} to {block.end - 1:,}, "
                    f"about rows {first:,} to {last:,}"
                )
            if damaged:
                print(f"{path} is damaged: copy it again, or build it again", file=sys.stderr)
                status = ExitStatus.PARTLY_DONE
                continue
            with TokenStore(path) as opened:
                rows = sum(len(part["text"]) for part in chunks(opened))
        except InputError as error:
            print(error, file=sys.stderr)
            status = ExitStatus.PARTLY_DONE
            continue
        parts = f" in {plural(count, 'block')}" if count else ""  # stores of earlier versions list no blocks
        print(f"{path}: {plural(rows, 'row')}{parts}, no damage")
    return status


@click.command(cls=Command)
@argument("stores", nargs=-1, required=True, type=FILE, metavar="STORE", help="stores of the same tokenizers, in order")
@output_option(required=True, metavar="STORE", help="folder of the new store; must not exist")
def merge(stores: tuple[Path, ...], output: Path) -> int:
    """Write the rows of several stores to one, and print it."""
    from cogview.data.store_copy import copy_rows

    rows = copy_rows(stores, output)
    print(f"{output}: {plural(rows, 'row')}")
    return ExitStatus.DONE


@click.command(cls=Command)
@store_argument()
@store_model_option(required=True)
@output_option(required=True, help="folder of the shards; must not exist")
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=SHARD_SIZE, metavar="COUNT", help="pictures in a shard"
)
@max_batch_size_option("pictures")
@device_option()
def export(store: Path, model: str, output: Path, shard_size: int, max_batch_size: int | None, device: str) -> int:
    """Decode a store into tar shards of PNG pictures with captions, and print the folder.

    Rows of one picture that follow each other are one picture with several captions. Codes at twice the side are
    decoded where the store has them.
    """
    from tqdm import tqdm

    from cogview.data.store_export import export_shards

    opened, text_tokenizer, decode = open_with_tokenizers(store, model, max_batch_size, device)
    if "named" in opened.header.fields:
        print_note("the names of codes are not exported: boxes stay in the table that the store was built from")
    with tqdm(unit="picture", desc="exporting", disable=None, leave=False) as bar:
        pictures, shards = export_shards(
            opened, output, text_tokenizer, decode, shard_size=shard_size, on_picture=bar.update
        )
    print(f"{output}: {plural(pictures, 'picture')} in {plural(shards, 'shard')}")
    return ExitStatus.DONE


def open_store(path: Path) -> TokenStore:
    """Open a store that has rows; InputError for any other."""
    from cogview.data.store import TokenStore

    store = TokenStore(path)
    if not len(store) or "text" not in store.header.fields or "image" not in store.header.fields:
        raise InputError(f"{path} has no rows of texts and images")
    return store


def open_text_tokenizer(model: str) -> TextTokenizer:
    """Return the text tokenizer of a model."""
    from cogview.checkpoints.registry import resolve_checkpoint
    from cogview.tokenizers.text import TextTokenizer

    return TextTokenizer.load(resolve_checkpoint(model) / "text.model")


def check_text(store: TokenStore, text_tokenizer: TextTokenizer) -> None:
    """Raise InputError unless a store was made with a text tokenizer."""
    import hashlib

    store.check_compatible(text_sha256=hashlib.sha256(text_tokenizer.model_bytes).hexdigest())


def open_with_tokenizers(
    path: Path, model: str, max_batch_size: int | None, device: str
) -> tuple[TokenStore, TextTokenizer, Callable[[np.ndarray], list[np.ndarray]]]:
    """Return a store, its text tokenizer, and a function that decodes (B, G, G) codes to uint8 RGB images (H, H, 3).

    Raises:
        InputError: The store cannot be read, or other tokenizers made it.
    """
    from cogview.checkpoints.image_tokenizer import codebook_hash, load_image_tokenizer
    from cogview.checkpoints.registry import resolve_checkpoint
    from cogview.device import choose_placement

    store = open_store(path)
    text_tokenizer = open_text_tokenizer(model)
    check_text(store, text_tokenizer)
    image_tokenizer = load_image_tokenizer(resolve_checkpoint(model) / "image")
    store.check_compatible(codebook_sha256=codebook_hash(image_tokenizer))
    image_tokenizer.to(choose_placement(device).device)
    return store, text_tokenizer, planned_decoder(image_tokenizer, max_batch_size)


def planned_decoder(image_tokenizer: VQVAE, max_batch_size: int | None) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Return a function that decodes codes in batches that fit into memory."""
    import numpy as np
    import torch

    from cogview.planning.batches import BatchPlanner
    from cogview.planning.model_memory import image_bytes
    from cogview.vqvae.codec import to_uint8

    device = image_tokenizer.codebook.device
    planner = BatchPlanner(device, max_batch_size)

    def decode(codes_BGG: np.ndarray) -> list[np.ndarray]:
        bytes_each = image_bytes(image_tokenizer.config, codes_BGG.shape[1], decoding=True)

        def work(batch: Sequence[np.ndarray]) -> list[np.ndarray]:
            with torch.inference_mode():
                return list(to_uint8(image_tokenizer.decode(torch.from_numpy(np.stack(batch)).to(device))))

        return list(planner.run(list(codes_BGG), lambda batch: bytes_each * len(batch), work, "decoding pixels"))

    return decode
