"""The command line of the released CogView v1, as all of its tasks share it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from cogview.checkpoints.registry import is_v1
from cogview.cli.main import HelpFormatter, Parser, run_safely
from cogview.cli.options import (
    DEFAULT_MODEL,
    add_adapter_argument,
    add_ceiling_argument,
    parse_max_batch_size,
    require_positive,
)
from cogview.cli.session import GenerationSession
from cogview.cli.text_io import prompt_lines, read_lines
from cogview.errors import InputError
from cogview.image_io.png import prepare_folder

# A task: given the flags and the lines of the input, or None to ask for them, it returns the exit status.
Task = Callable[[argparse.Namespace, list[str] | None], int]

# Flags of the released scripts that say what a checkpoint folder says by itself. 0: they take no value.
NEEDLESS = {
    "--deepspeed": 0,
    "--fp16": 0,
    "--model-parallel-size": 1,
    "--num-layers": 1,
    "--hidden-size": 1,
    "--num-attention-heads": 1,
    "--max-position-embeddings": 1,
    "--max-position-embeddings-finetune": 1,
    "--query-window": 1,
    "--key-window-times": 1,
    "--num-pivot": 1,
    "--is-sparse": 1,
}


def main(argv: Sequence[str] | None, *, program: str, description: str | None, tasks: Mapping[str, Task]) -> int:
    """Run one of ``tasks``, by default the first; returns the exit status."""
    args = build_parser(program, description, list(tasks)).parse_args(argv)
    return run_safely(lambda: run(args, tasks), program)


def build_parser(program: str, description: str | None, tasks: Sequence[str]) -> argparse.ArgumentParser:
    """The released flags."""
    parser = Parser(
        prog=program,
        description=description,
        formatter_class=HelpFormatter,
        epilog=f"Accepted and not needed, for a checkpoint folder knows its own shape: {', '.join(NEEDLESS)}.",
    )
    parser.add_argument("--generation-task", default=tasks[0], metavar="TASK", help=f"one of: {', '.join(tasks)}")
    parser.add_argument(
        "--input-source",
        default="interactive",
        metavar="PATH",
        help="a file with one query per line, or interactive: asks until an empty line or “stop”",
    )
    parser.add_argument("--output-path", type=Path, default=Path("samples"), metavar="PATH", help="where results go")
    parser.add_argument(
        "--batch-size", type=int, default=4, metavar="COUNT", help="pictures per prompt, or captions per image"
    )
    add_ceiling_argument(parser, "pictures")
    parser.add_argument("--with-id", action="store_true", help="lines of the file begin with ID<TAB>")
    parser.add_argument("--debug", action="store_true", help="text2image: one concatenated picture per prompt as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps, or the number of a GPU")
    parser.add_argument("--temperature", type=float, help="(default: the model's own)")
    parser.add_argument("--top_k", type=int, help="0 keeps everything (default: the model's own)")
    parser.add_argument("--top_p", type=float, help="0 or 1 keeps everything (default: the model's own)")
    parser.add_argument("--seed", type=int, default=1234, help="the same seed gives the same results")
    parser.add_argument(
        "--load", default=DEFAULT_MODEL, metavar="MODEL", help="a model's name (see cogview models) or its folder"
    )
    add_adapter_argument(parser)
    parser.add_argument(
        "--img-tokenizer-path", type=Path, metavar="PATH", help="ignored: a model's folder holds its image tokenizer"
    )
    for flag, values in NEEDLESS.items():
        parser.add_argument(flag, nargs="?" if values else 0, dest="needless", action=Needless, help=argparse.SUPPRESS)
    return parser


class Needless(argparse.Action):
    """Collects the flags that were given, whatever their values."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        namespace.needless = [*(namespace.needless or []), option]


def run(args: argparse.Namespace, tasks: Mapping[str, Task]) -> int:
    """Check the flags, read the input, and run the task."""
    interactive = args.input_source == "interactive"
    if args.generation_task not in tasks:
        raise InputError(f"--generation-task {args.generation_task} is unknown; known: {', '.join(tasks)}")
    if interactive and args.with_id:
        raise InputError("--with-id needs a file of lines that begin with ID<TAB>: give it with --input-source")
    require_positive("--batch-size", args.batch_size)
    args.ceiling = parse_max_batch_size(args)
    lines = None if interactive else read_lines(args.input_source, "a query per line")
    prepare_folder(args.output_path)
    if args.needless:
        print(f"note: not needed, and ignored: {', '.join(args.needless)}", file=sys.stderr)
    given = args.img_tokenizer_path
    converted = not is_v1(Path(args.load))  # if it is not, opening it will say so
    if given is not None and converted and given.resolve() != Path(args.load, "image").resolve():
        print(f"note: {given} is ignored: {args.load} has an image tokenizer of its own", file=sys.stderr)
    return tasks[args.generation_task](args, lines)


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the sampling flags that were given; a top-p of 0 was the release's way to say none."""
    given = {"temperature": args.temperature, "top_k": args.top_k, "top_p": 1.0 if args.top_p == 0 else args.top_p}
    return {name: value for name, value in given.items() if value is not None}


def open_easel(args: argparse.Namespace, task: str) -> GenerationSession:
    """The model, for drawing. Says on stderr where it runs."""
    easel = GenerationSession.open(
        args.load,
        tasks=[task],
        settings=sampling_settings(args),
        seed=args.seed,
        ceiling=args.ceiling,
        device=args.device,
        adapter=args.adapter,
    )
    easel.print_header()
    return easel


def answer(lines: list[str] | None, question: str, do: Callable[[list[str]], int]) -> int:
    """The status of ``do`` for all lines; or ask for lines and do one at a time, whatever becomes of the others."""
    if lines is not None:
        return do(lines)
    for line in takewhile(lambda line: line != "stop", prompt_lines(f"{question} (“stop” ends)")):
        try:
            do([line])
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
    return 0


def split_id(args: argparse.Namespace, line: str) -> tuple[str | None, str] | None:
    """The id of a line, None where lines have none, and the rest; None, and a word on stderr, if the id is missing."""
    if not args.with_id:
        return None, line
    name, tab, rest = line.partition("\t")
    if not tab:
        print(f"skipped: the line “{line}” has no id; expected ID<TAB> before the query", file=sys.stderr)
        return None
    return name, rest
