"""Commands that still parse with ``argparse``, run under ``click``. The last of them takes this module with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import click

from cogview.errors import InputError

DEFAULT_MODEL = "cogview-emoji"


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the usage of every option."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that shows defaults, but no "(default: None)"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class BridgedCommand(click.Command):
    """A command whose module has ``add_arguments`` and ``run``."""

    def __init__(self, name: str, line: str, module: ModuleType) -> None:
        """Wrap ``module``; ``line`` is its line of help."""
        super().__init__(name, help=line)
        self.module = module

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse with ``argparse``, and collect positional arguments that follow options."""
        parser = self._parser()
        try:
            values, rest = parser.parse_known_args(args)
        except SystemExit as done:  # of --help, or of a mistake
            ctx.exit(int(done.code or 0))
        if rest:
            several = next((name for name in ("prompts", "images", "sources") if hasattr(values, name)), None)
            if several is not None and not any(word.startswith("-") for word in rest):
                getattr(values, several).extend(rest)
            elif hasattr(values, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
                values.overrides += rest
            else:
                ctx.fail(f"unrecognized arguments: {' '.join(rest)}")
        ctx.obj = values
        return []

    def invoke(self, ctx: click.Context) -> Any:
        """Run the module."""
        return self.module.run(ctx.obj)

    def get_help(self, ctx: click.Context) -> str:
        """Return the help of ``argparse``."""
        return self._parser().format_help()

    def _parser(self) -> Parser:
        line = self.help or ""
        parser = Parser(
            prog=f"cogview {self.name}", description=f"{line[0].upper()}{line[1:]}.", formatter_class=HelpFormatter
        )
        self.module.add_arguments(parser)
        return parser


def bridge(name: str, line: str, module: ModuleType) -> click.Command:
    """Return a ``click`` command that runs ``module`` through ``argparse``."""
    return BridgedCommand(name, line, module)


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
