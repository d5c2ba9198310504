"""The command ``cogview``: parse the command line, call the library, print the result.

Results go to stdout; progress and notes go to stderr. A mistake on the command line or in an input is one line on
stderr, with exit status 2. Where some files of a list cannot be read, the others are processed, the failures are listed
at the end, and the status is 1. ``ExitStatus`` has all statuses.

How to write a command
----------------------
A command is a module of ``cogview.cli`` with a ``click`` command named ``command``, and a row of ``SECTIONS``::

    @click.command(cls=Command)
    @argument("prompts", nargs=-1, metavar="PROMPT", help="text to generate an image from")
    @click.option("-n", type=click.IntRange(min=1), default=1, metavar="COUNT", help="images per prompt")
    @model_options("images")  # passes one argument, model: ModelOptions
    def command(prompts: tuple[str, ...], n: int, model: ModelOptions) -> int:
        \"\"\"Generate images from text.\"\"\"
        from cogview.pipeline.cogview import CogView  # torch: imported where it is used, never by the module

* The docstring is the text of ``--help``; the row of ``SECTIONS`` is the line in ``cogview --help``.
* The function returns the exit status. It raises ``InputError`` or ``click.UsageError``, never ``SystemExit``.
* Ranges and choices are types of ``click``. Help texts start in lower case, name the unit, and leave the default to
  ``click``; ``show_default="text"`` describes a default that is computed.
* ``cogview.cli.options`` has the options that several commands share. ``option_group`` passes several options as one
  dataclass, so that the function has few arguments.
* Options and arguments may be mixed in any order. ``overrides_argument`` takes KEY=VALUE of a recipe.
* A former spelling of an option stays as a second name: ``click.option("--speculative", "--parallel", …)``.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from cogview import __version__
from cogview.cli.failures import explain_error
from cogview.cli.messages import is_json, json_lines, print_error, wants_json
from cogview.cli.progress import log_batch_plans
from cogview.cli.streams import command_line, prepare_streams
from cogview.cli.translation import LANGUAGES, language_of, require_known_language, take_language, translated
from cogview.cli.usage import unknown_command, usage_message
from cogview.errors import ExitStatus, InputError, ReportedByPeer
from cogview.formatting import printable
from cogview.signals import exit_status_of_signal, terminable

# By the section of the help: command, its module in cogview.cli, and its line of help.
SECTIONS = {
    "Generate": {
        "generate": ("generate", "generate images from text"),
        "complete": ("complete", "keep a part of an image and generate the rest"),
        "edit": ("edit", "change an image as an instruction says"),
        "vary": ("vary", "generate variations of an image"),
        "upscale": ("upscale", "generate images at twice their side"),
        "caption": ("caption", "caption images"),
        "rerank": ("rerank", "rank images by how well a text describes them"),
    },
    "Models": {
        "info": ("info", "describe a model: its tasks, its training and its files"),
        "models": ("models", "list the known models and which of them are on this machine"),
        "download": ("download", "download the files of a CogView v1 model"),
        "convert": ("convert", "convert weights of CogView v1 into a checkpoint folder, or back"),
        "push": ("push", "publish a checkpoint folder on the Hugging Face Hub"),
        "adapter": ("adapter", "merge a LoRA adapter into a model, or remove it again"),
    },
    "Training": {
        "new": ("new", "write a recipe for your own pictures, with a reason for each choice"),
        "run": ("run", "do every step of a recipe, from pictures to a packaged model"),
        "recipes": ("packaged_recipes", "list the recipes that come with the package, or print one"),
        "scenes": ("scenes", "recipe step 1: create the emoji world"),
        "train-text": ("train_text", "recipe step 2: train the text tokenizer"),
        "train-image": ("train_image", "recipe step 3: train the VQ-VAE"),
        "encode": ("encode", "recipe step 4: encode scenes into a token store"),
        "train": ("train", "recipe step 5: train the transformer"),
        "eval": ("evaluate", "recipe step 6: evaluate the model"),
        "package": ("package", "recipe step 7: package the model as a checkpoint folder"),
        "runs": ("runs", "list and compare training runs"),
        "data": ("data", "build token stores from pictures with captions, and look into stores"),
        "import-data": ("import_data", "import datasets of CogView v1 into a token store"),
    },
    "Tools": {
        "estimate": ("estimate", "estimate the memory and time of a job"),
        "bench": ("bench", "benchmark generation against the limits of the hardware"),
        "doctor": ("doctor", "check this machine and, optionally, a recipe"),
    },
}
COMMANDS = {name: row for section in SECTIONS.values() for name, row in section.items()}
CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 100,
}
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
COMPLETION_VARIABLE = "_COGVIEW_COMPLETE"  # set by the script that `_COGVIEW_COMPLETE=bash_source cogview` prints


class LazyGroup(click.Group):
    """A group that imports the module of a command only to run it or to print its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"cogview.cli.{COMMANDS[cmd_name][0]}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of ``args``; for an unknown name, suggest one that is spelled like it."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(unknown_command(args[0], list(COMMANDS)))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by section, without importing them."""
        for heading, commands in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, line) for name, (_, line) in commands.items()])


@click.group(
    cls=LazyGroup,
    no_args_is_help=False,
    context_settings=CONTEXT_SETTINGS,
)
@click.option(
    "--language",
    type=click.Choice(LANGUAGES),
    expose_value=False,
    show_default="that of the locale",
    help="language of messages and help; it may stand behind the command as well",
)
@click.version_option(__version__, message="cogview %(version)s")
def cli() -> None:
    """Generate images from Chinese text, upscale, caption and rank them, and train the models."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command line without the program's name; that of the process by default.

    Returns:
        The exit status, one of ``ExitStatus``, or 128 + the signal that interrupted the command.
    """
    prepare_streams()
    # DeepSpeed's launcher puts this before everything else; the variable LOCAL_RANK holds it too.
    arguments = [argument for argument in command_line(argv) if not argument.startswith("--local_rank=")]
    try:
        language, arguments = take_language(arguments)
    except InputError as error:
        with json_lines(wants_json(arguments)):
            return _report("cogview", str(error))
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if instruction := os.environ.get(COMPLETION_VARIABLE):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "cogview", COMPLETION_VARIABLE, instruction)

    name = f"cogview {command}" if command in COMMANDS else "cogview"
    return run_command(cli, arguments, "cogview", name=name, language=language)


def run_command(
    command: click.Command,
    argv: Sequence[str] | None,
    program: str,
    *,
    name: str | None = None,
    language: str | None = None,
) -> int:
    """Run a ``click`` command of this package or of a script.

    Args:
        command: The command; its function returns the exit status.
        argv: The command line without the program's name; that of the process by default.
        program: The name of the program in its help.
        name: The name in messages about mistakes; ``program`` by default.
        language: The language of messages and help; by default English with ``--json``, else that of the locale.

    Returns:
        The exit status.
    """
    prepare_streams()  # a closed one must be replaced before it is translated
    arguments = command_line(argv)

    def run() -> int:
        with command.make_context(program, arguments, **CONTEXT_SETTINGS) as context:
            return int(command.invoke(context) or 0)

    as_json = wants_json(arguments) and not str(name).endswith("bench")  # whose --json names a file
    default = "en" if as_json else language_of(os.environ)
    with translated(language or default), json_lines(as_json):
        return run_safely(run, name or program)


def run_safely(run: Callable[[], int], name: str) -> int:
    """Run a command and turn expected errors into one line on stderr.

    Args:
        run: The command; it returns the exit status.
        name: The name of the program or command, which the line starts with.

    Returns:
        The status of ``run``; 2 for a mistake of the user, 3 where disk, memory or a lock was missing, 128 + the
        signal that interrupted it.
    """
    prepare_streams()
    try:
        _configure_logging()
        require_known_language(os.environ)
        with terminable(), log_batch_plans():
            status = run()
        if status == ExitStatus.MISTAKE and is_json():  # the lines before name the inputs, and none the status
            print_error(name, "nothing could be done", status)
        sys.stdout.flush()
        return status
    except click.exceptions.Exit as done:  # of --help and --version
        return done.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else name
        return _report(path, f"{usage_message(error)}; see {path} --help")
    except ReportedByPeer:
        return ExitStatus.MISTAKE
    except KeyboardInterrupt as error:
        status = exit_status_of_signal(getattr(error, "number", signal.SIGINT))
        if getattr(error, "keeps_results", True):
            return _report(name, "interrupted; finished results are kept", status)
        return _report(name, "interrupted; no result was written", status)
    except Exception as error:
        if (explanation := explain_error(error)) is None:
            raise
    return _report(name, *explanation)  # the traceback is freed by now, with the memory that it referred to


class _LogFormatter(logging.Formatter):
    """Names the module of a line that COGVIEW_LOG asks for; a warning is a line like those of the commands."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")
        self._warnings = logging.Formatter("warning: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        is_warning = record.levelno == logging.WARNING and record.name.partition(".")[0] == "cogview"
        return self._warnings.format(record) if is_warning else super().format(record)


def _configure_logging() -> None:
    """Log at the level of the variable COGVIEW_LOG; raise InputError for an unknown level."""
    level = (os.environ.get("COGVIEW_LOG") or "WARNING").upper()
    if level not in LOG_LEVELS:
        raise InputError(f'COGVIEW_LOG is "{level}"; expected one of {", ".join(LOG_LEVELS)}')
    form = logging.Formatter("%(levelname)s: %(message)s") if is_json() else _LogFormatter()
    handler = logging.StreamHandler()
    handler.setFormatter(form)
    logging.basicConfig(level=level, handlers=[handler])


def _report(name: str, message: str, status: int = ExitStatus.MISTAKE) -> int:
    """Print one line on stderr; return ``status``."""
    print_error(name, printable(" ".join(message.split())), status)
    return status
