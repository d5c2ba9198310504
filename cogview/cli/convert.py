"""``cogview convert``: released files to a checkpoint folder and back, and weights to another precision."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cogview.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import: --help does without
    from cogview.checkpoints.precision import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Convert a released CogView checkpoint, once, into a folder that every command opens: SOURCE is the .tar, the "
        "unpacked folder or a single .pt file, of any number of model-parallel shards. Where SOURCE is a checkpoint "
        "folder already, store its weights in another dtype, or write the released layout back. Prints the new folder."
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="released checkpoint, or a checkpoint folder")
    parser.add_argument("--image-tokenizer", type=Path, metavar="FILE", help="vqvae_hard_biggerset_011.pt")
    parser.add_argument("--text-model", type=Path, metavar="FILE", help="cog-pretrain.model")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="must not be there yet (default: for a published name, the place where that name is found)",
    )
    parser.add_argument("--to", choices=["released"], help="write the released layout")
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16; or int8 or int4, rounded weights (default: as they are stored)"
    )
    parser.add_argument(
        "--tasks",
        metavar="TASK,…",
        help="of generate, caption, upscale, low_level (default: what the name says, or all)",
    )
    parser.add_argument(
        "--heads", type=int, metavar="COUNT", help="attention heads (default: each 64 wide, as released)"
    )
    parser.add_argument(
        "--shards", type=int, default=1, metavar="COUNT", help="with --to released: model-parallel files"
    )
    parser.add_argument("--verify", action="store_true", help="read all that was written again, and compare")


def run(args: argparse.Namespace) -> int:
    """Convert, and print the new folder."""
    from cogview.checkpoints.precision import Precision
    from cogview.checkpoints.v1_convert import convert_folder, export_v1
    from cogview.device import DTYPES, QUANTIZATIONS, parse_quantization

    source = args.source
    if not source.exists():
        raise InputError(f"there is nothing at {source}: expected a released checkpoint or a checkpoint folder")
    few_bits = parse_quantization(args.dtype)
    if args.dtype is not None and few_bits is None and args.dtype not in DTYPES:
        raise InputError(f"dtype {args.dtype!r} is unknown; known: {', '.join([*DTYPES, *QUANTIZATIONS])}")
    precision = Precision(DTYPES.get(args.dtype), few_bits)
    ours = (source / "config.json").is_file()
    output = args.output or _place_by_name(source, ours)
    if args.to == "released":
        if not ours:
            raise InputError(f"--to released writes a checkpoint folder in the released layout, and {source} is none")
        if args.dtype is not None:
            raise InputError("--to released keeps the dtype of the folder: convert it with --dtype first")
        export_v1(source, output, shards=args.shards, verify=args.verify)
    elif ours:
        if args.dtype is None:
            raise InputError(f"{source} is a checkpoint folder already: give --dtype or --to released")
        convert_folder(source, output, precision=precision, verify=args.verify)
    else:
        _import(args, output, precision)
    if args.verify:
        print("verified: every tensor is what it was converted to", file=sys.stderr)
    print(output)
    return 0


def _import(args: argparse.Namespace, output: Path, precision: Precision) -> None:
    from cogview.checkpoints.v1_convert import ALL_TASKS, import_v1, tasks_by_name
    from cogview.tokenizers.vocabulary import Vocabulary

    for option, file in (("--image-tokenizer", args.image_tokenizer), ("--text-model", args.text_model)):
        if file is None:
            raise InputError(f"a released checkpoint has no tokenizers of its own: give {option} FILE")
    tasks = tuple(filter(None, (args.tasks or "").split(","))) or tasks_by_name(args.source)
    if tasks is None:
        tasks = ALL_TASKS
        print(
            f"note: neither the weights nor the name {args.source.name} tell what they were trained for: all tasks are "
            "allowed; --tasks says otherwise",
            file=sys.stderr,
        )
    config = import_v1(
        args.source,
        args.image_tokenizer,
        args.text_model,
        output,
        tasks=tasks,
        precision=precision,
        num_heads=args.heads,
        verify=args.verify,
    )
    shape, vocabulary, usual = config.transformer, config.vocabulary, Vocabulary()
    if vocabulary != usual:
        print(
            f"note: {vocabulary.num_image_codes} image codes and {vocabulary.num_text_pieces} text pieces, not the "
            f"released {usual.num_image_codes} and {usual.num_text_pieces}: right only if the weights learnt with them",
            file=sys.stderr,
        )
    print(
        f"{shape.num_layers} layers, width {shape.width}, {shape.num_heads} heads"
        f"{'' if args.heads else f' of {shape.head_size} (--heads says otherwise)'}, "
        f"{shape.num_parameters:,} parameters; tasks: {', '.join(config.tasks)}",
        file=sys.stderr,
    )


def _place_by_name(source: Path, ours: bool) -> Path:
    """Where the registry looks for a published name; InputError for any other."""
    from cogview.checkpoints.registry import converted_folder, load_registry

    name = source.name.removesuffix(".tar")
    row = load_registry().get(name)
    if ours or row is None or not row.files:
        raise InputError(f"say where the result goes, for {source.name} is no published name: -o FOLDER")
    return converted_folder(name)
