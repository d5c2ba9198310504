"""``cogview convert``: convert weights of CogView v1 into a checkpoint folder, or back, or to another dtype."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cogview.cli.options import DTYPES, FILE, Command, argument, option_group
from cogview.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from cogview.checkpoints.precision import Precision
    from cogview.modeling.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The files and settings that a checkpoint of CogView v1 lacks."""

    image_tokenizer: Path | None
    text_model: Path | None
    tasks: str | None
    heads: int | None


@click.command(cls=Command)
@argument("source", type=FILE, metavar="SOURCE", help="checkpoint of CogView v1, or a checkpoint folder")
@option_group(
    ImportOptions,
    "v1",
    ("image_tokenizer", "text_model", "tasks", "heads"),
    click.option("--image-tokenizer", type=FILE, metavar="FILE", help="VQ-VAE: vqvae_hard_biggerset_011.pt"),
    click.option("--text-model", type=FILE, metavar="FILE", help="text tokenizer: cog-pretrain.model"),
    click.option(
        "--tasks",
        metavar="TASK,…",
        show_default="by the name of SOURCE, else all",
        help="tasks of the weights: generate, caption, upscale, low_level",
    ),
    click.option(
        "--heads",
        type=click.IntRange(min=1),
        metavar="COUNT",
        show_default="64 wide each, as in CogView v1",
        help="number of attention heads",
    ),
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="FOLDER",
    show_default="for a published name, its folder in the cache",
    help="new folder; must not exist",
)
@click.option("--to", "layout", type=click.Choice(["v1", "released"]), help="write the layout of CogView v1")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES[1:]),
    show_default="as stored",
    help="format of the weights; int8 and int4 quantize",
)
@click.option(
    "--shards",
    type=click.IntRange(min=1),
    default=1,
    metavar="COUNT",
    help="number of model-parallel files, with --to v1",
)
@click.option("--verify", is_flag=True, help="read the written files again and compare")
def command(
    source: Path,
    v1: ImportOptions,
    output: Path | None,
    layout: str | None,
    dtype: str | None,
    shards: int,
    verify: bool,
) -> int:
    """Convert a checkpoint of CogView v1, once, into a folder that every command opens, and print the folder.

    SOURCE is the .tar, the unpacked folder or a single .pt file, with any number of model-parallel shards. If SOURCE is
    a checkpoint folder, store its weights in another dtype, or write the layout of CogView v1 back.
    """
    from cogview.checkpoints.precision import Precision
    from cogview.checkpoints.v1_checks import unverified_in_folder, unverified_in_v1
    from cogview.checkpoints.v1_convert import convert_folder, export_v1
    from cogview.device import DTYPES as TORCH_DTYPES
    from cogview.device import parse_quantization

    if not source.exists():
        raise InputError(f"{source} does not exist: expected a checkpoint of CogView v1 or a checkpoint folder")
    precision = Precision(TORCH_DTYPES.get(dtype or ""), parse_quantization(dtype))
    is_folder = (source / "config.json").is_file()
    target = output or _cache_folder(source, is_folder)
    if layout is not None:
        if not is_folder:
            raise InputError(f"--to {layout} converts a checkpoint folder, and {source} is not one")
        if dtype is not None:
            raise InputError(f"--to {layout} keeps the dtype of the folder: convert it with --dtype first")
        export_v1(source, target, shards=shards, verify=verify)
    elif is_folder:
        if dtype is None:
            raise InputError(f"{source} is a checkpoint folder already: give --dtype or --to v1")
        convert_folder(source, target, precision=precision, verify=verify)
    else:
        import_checkpoint(source, v1, target, precision, verify=verify)
    if verify:
        print("verified: every tensor equals its source", file=sys.stderr)
        facts = unverified_in_folder(source)
        if v1.image_tokenizer is not None and v1.text_model is not None and not is_folder:
            facts = unverified_in_v1(source, v1.image_tokenizer, v1.text_model)
        for fact in facts:
            print(f"not verified: {fact}", file=sys.stderr)
    print(target)
    return 0


def import_checkpoint(source: Path, v1: ImportOptions, output: Path, precision: Precision, *, verify: bool) -> None:
    """Convert a checkpoint of CogView v1, and print its shape and tasks on stderr.

    Raises:
        InputError: A tokenizer is missing, or a file is not one of CogView v1.
    """
    from cogview.checkpoints.v1_convert import ALL_TASKS, import_v1, tasks_by_name

    if v1.image_tokenizer is None or v1.text_model is None:
        option = "--image-tokenizer" if v1.image_tokenizer is None else "--text-model"
        raise InputError(f"a checkpoint of CogView v1 holds no tokenizers: give {option} FILE")
    tasks = tuple(filter(None, (v1.tasks or "").split(","))) or tasks_by_name(source)
    if tasks is None:
        tasks = ALL_TASKS
        print(
            f"note: neither the weights nor the name {source.name} imply the tasks of training, so all tasks are "
            "allowed; --tasks restricts them",
            file=sys.stderr,
        )
    config = import_v1(
        source,
        v1.image_tokenizer,
        v1.text_model,
        output,
        tasks=tasks,
        precision=precision,
        num_heads=v1.heads,
        verify=verify,
    )
    _print_summary(config, heads_are_given=v1.heads is not None)


def _print_summary(config: ModelConfig, *, heads_are_given: bool) -> None:
    """Print shape and tasks of a converted model on stderr, with a note on an unusual vocabulary."""
    from cogview.tokenizers.vocabulary import Vocabulary

    shape, vocabulary, usual = config.transformer, config.vocabulary, Vocabulary()
    if vocabulary != usual:
        print(
            f"note: {vocabulary.num_image_codes} image codes and {vocabulary.num_text_pieces} text pieces, where "
            f"CogView v1 has {usual.num_image_codes} and {usual.num_text_pieces}: use the tokenizers of the training",
            file=sys.stderr,
        )
    print(
        f"{shape.num_layers} layers, width {shape.width}, {shape.num_heads} heads"
        f"{'' if heads_are_given else f' of {shape.head_size} (set by --heads)'}, "
        f"{shape.num_parameters:,} parameters; tasks: {', '.join(config.tasks)}",
        file=sys.stderr,
    )


def _cache_folder(source: Path, is_folder: bool) -> Path:
    """Return the folder in which a published name is found; raise InputError for any other name."""
    from cogview.checkpoints.registry import converted_folder, load_registry

    name = source.name.removesuffix(".tar")
    row = load_registry().get(name)
    if is_folder or row is None or not row.files:
        raise InputError(f"{source.name} is not a published name: give the new folder by -o FOLDER")
    return converted_folder(name)
