"""``cogview <command>``: parse, call the library, print.

A user's mistake is one line on stderr and status 2. Results go to stdout, progress and notes to stderr. Where a list
holds a few files that cannot be read, the others are done, those are named at the end, and the status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from cogview import __version__
from cogview.cli.progress import log_batch_plans
from cogview.errors import InputError, ReportedByPeer

# Command, its module in cogview.cli (with add_arguments(parser) and run(args) -> int), and its line of help.
COMMANDS = {
    "generate": ("generate", "draw pictures from text"),
    "complete": ("complete", "keep the upper part of an image and draw the rest"),
    "upscale": ("upscale", "draw images at twice their side"),
    "caption": ("caption", "describe images"),
    "rerank": ("rerank", "rank images by how well a text describes them"),
    "info": ("info", "what a model is, was trained on and can do"),
    "estimate": ("estimate", "how much memory and time a job takes"),
    "bench": ("bench", "how fast a model draws here, and how fast it could"),
    "convert": ("convert", "convert released weights into a checkpoint folder, or back"),
    "models": ("models", "the known models, and which of them are on this machine"),
    "download": ("download", "fetch the files of a released model"),
    "push": ("push", "publish a checkpoint folder on the Hugging Face Hub"),
    "scenes": ("scenes", "recipe step 1: make the emoji world"),
    "train-text": ("train_text", "recipe step 2: train the text tokenizer"),
    "train-image": ("train_image", "recipe step 3: train the VQ-VAE"),
    "encode": ("encode", "recipe step 4: encode scenes into a token store"),
    "train": ("train", "recipe step 5: train the transformer"),
    "eval": ("evaluate", "recipe step 6: grade what a model draws"),
    "package": ("package", "recipe step 7: make a checkpoint folder to publish"),
    "adapter": ("adapter", "merge a LoRA adapter into a model, or take it out again"),
    "runs": ("runs", "list and compare training runs"),
    "doctor": ("doctor", "what is wrong with this machine, or with a recipe on it"),
    "import-data": ("import_data", "make a token store of datasets of the released CogView"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of every option."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the arguments of ``command`` are filled in, so that ``--help`` imports little."""
    parser = Parser(
        prog="cogview",
        description="Draw pictures from Chinese text, enlarge, describe and rank them, and train the models.",
    )
    parser.add_argument("--version", action="version", version=f"cogview {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=line, description=line[0].upper() + line[1:] + ".", formatter_class=HelpFormatter
        )
        if name == command:
            importlib.import_module(f"cogview.cli.{module}").add_arguments(subparser)
    return parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but no "(default: None)"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    given = sys.argv[1:] if argv is None else argv
    # DeepSpeed's launcher puts this before everything else; the variable LOCAL_RANK says it too.
    arguments = [argument for argument in given if not argument.startswith("--local_rank=")]
    command = next((argument for argument in arguments if argument in COMMANDS), None)
    parser = build_parser(command)
    args, rest = parser.parse_known_args(arguments)
    if rest:
        # argparse takes one run of positional arguments; more of them, or KEY=VALUE of a recipe, may follow an option.
        several = next((name for name in ("prompts", "images", "sources") if hasattr(args, name)), None)
        if several is not None and not any(word.startswith("-") for word in rest):
            getattr(args, several).extend(rest)
        elif hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
            args.overrides += rest
        else:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    module = importlib.import_module(f"cogview.cli.{COMMANDS[args.command][0]}")
    return run_safely(lambda: module.run(args), f"cogview {args.command}")


def run_safely(run: Callable[[], int], name: str) -> int:
    """``run()``, with a user's mistakes as one line on stderr and status 2, and Ctrl-C as status 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=os.environ.get("COGVIEW_LOG", "WARNING").upper(), format="%(name)s: %(message)s")
    try:
        with log_batch_plans():
            return run()
    except ReportedByPeer:
        return 2
    except (InputError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ValueError as error:
        from cogview.kernels.dispatch import ForcedKernelsError  # with PyTorch, which has been imported by then

        if not isinstance(error, ForcedKernelsError):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was finished is kept", file=sys.stderr)
        return 130
