"""Arguments that commands of the four tasks have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cogview.errors import InputError

DEFAULT_MODEL = "cogview-emoji"
SAMPLING = ("temperature", "top_k", "top_p", "guidance", "text_attention")  # as ``CogView.sampling`` names them


def add_model_arguments(parser: argparse.ArgumentParser, batch: str) -> None:
    """--model, --revision, --adapter, --device, --dtype, --kv-dtype, and --max-inference-batch-size (``batch``)."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME_OR_FOLDER",
        help="a name that cogview models lists, a checkpoint folder, or owner/name on the Hugging Face Hub",
    )
    add_revision_argument(parser)
    add_adapter_argument(parser)
    add_ceiling_argument(parser, batch)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16, float16, int8 or int4 (rounded weights: less memory, fewer bytes to read per "
        "token)",
    )
    parser.add_argument(
        "--kv-dtype",
        default="auto",
        help="how keys and values are kept: auto (as --dtype computes) or int8 (rounded: half the memory of 16 bits)",
    )


def add_revision_argument(parser: argparse.ArgumentParser) -> None:
    """Add --revision."""
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a model on the Hugging Face Hub (default: main)"
    )


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """--adapter."""
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="a LoRA adapter to merge into the weights: a folder, or owner/name on the Hugging Face Hub",
    )


def add_ceiling_argument(parser: argparse.ArgumentParser, batch: str) -> None:
    """--max-inference-batch-size, the most ``batch``."""
    parser.add_argument(
        "--max-inference-batch-size",
        default="auto",
        metavar="COUNT",
        help=f"at most so many {batch} at a time; auto: as many as memory holds and pay",
    )


def parse_max_batch_size(args: argparse.Namespace) -> int | None:
    """What ``add_ceiling_argument`` was given; None for auto. InputError for anything but a count."""
    given = args.max_inference_batch_size
    if given == "auto":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f'--max-inference-batch-size must be auto or a whole number from 1 on, got "{given}"')
    return int(given)


def add_sampling_arguments(parser: argparse.ArgumentParser, ids: str, default: str) -> None:
    """--temperature, --top-k and --top-p of a draw among ``ids``."""
    parser.add_argument("--temperature", type=float, help=f"lower is surer, higher wilder (default: {default})")
    parser.add_argument("--top-k", type=int, help=f"choose among so many {ids}, 0: all (default: {default})")
    parser.add_argument(
        "--top-p", type=float, help=f"choose among the likeliest {ids} of this share, 1: all (default: {default})"
    )


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """How codes of pictures are drawn, and the folder they go to."""
    add_sampling_arguments(parser, "codes", "the model's own")
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help="draw from u + S (c - u), what the model expects without and with the text; 1: no guidance; takes twice "
        "the time, and weights that were trained with captions left out (default: the model's own)",
    )
    parser.add_argument(
        "--text-attention",
        type=float,
        metavar="W",
        help="look W times as much at the text, 1: as trained; costs nothing (default: the model's own)",
    )
    add_parallel_argument(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs"), metavar="FOLDER", help="where files go")


def add_parallel_argument(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """--parallel, which ``parallel`` reads."""
    parser.add_argument(
        "--parallel",
        default=default,
        metavar="COUNT",
        help="guess at most so many codes of a picture at one go and keep those that hold; off: one after another; "
        "auto: what pays; the pictures are the same",
    )


def add_seed_argument(parser: argparse.ArgumentParser, same: str) -> None:
    """--seed; ``same`` is what, with the same seed, gives the same result."""
    parser.add_argument("--seed", type=int, help=f"the same seed, {same} (default: a new one, told)")


def add_query_arguments(parser: argparse.ArgumentParser, line: str) -> None:
    """IMAGE… with one --prompt, or --input with a ``line`` for each text."""
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders or globs")
    parser.add_argument("--prompt", metavar="TEXT", help="the text that belongs to every IMAGE")
    parser.add_argument("--input", metavar="FILE", help=f"instead of both: UTF-8 lines {line}; - is standard input")


def parse_speculative(args: argparse.Namespace) -> int | None:
    """What --parallel was given: None for auto, 1 for off. InputError for anything but these or a count."""
    given = args.parallel
    if given in ("auto", "off"):
        return {"auto": None, "off": 1}[given]
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f'--parallel must be auto, off or a whole number from 1 on, got "{given}"')
    return int(given)


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the sampling arguments that were given."""
    return {name: value for name in SAMPLING if (value := getattr(args, name, None)) is not None}


def require_positive(name: str, value: int) -> None:
    """InputError unless ``value`` is at least 1."""
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")
