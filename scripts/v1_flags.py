"""The command line of CogView v1, which all of its scripts share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import click

from cogview.checkpoints.registry import is_v1
from cogview.cli.main import run_command
from cogview.cli.options import (
    DEFAULT_MODEL,
    FILE,
    Command,
    ModelOptions,
    SessionOptions,
    adapter_option,
    combine,
    device_option,
    max_batch_size_option,
)
from cogview.cli.session import GenerationSession
from cogview.cli.text_io import prompt_lines, read_lines
from cogview.errors import InputError
from cogview.image_io.png import prepared_folder
from cogview.limits import MAX_RESULTS

SHAPE = "a checkpoint folder holds the model's shape"
PATTERN = "a checkpoint folder holds the model's pattern of attention"
# Flags of CogView v1 that have no effect, each with whether it takes a value, and the reason.
NEEDLESS = {
    "--deepspeed": (False, "DeepSpeed is for training"),
    "--fp16": (False, "the device decides the precision"),
    "--model-parallel-size": (True, "one device holds the whole model"),
    "--num-layers": (True, SHAPE),
    "--hidden-size": (True, SHAPE),
    "--num-attention-heads": (True, SHAPE),
    "--max-position-embeddings": (True, SHAPE),
    "--max-position-embeddings-finetune": (True, SHAPE),
    "--query-window": (True, PATTERN),
    "--key-window-times": (True, PATTERN),
    "--num-pivot": (True, PATTERN),
    "--is-sparse": (True, PATTERN),
}


@dataclass(frozen=True, kw_only=True)
class V1Flags:
    """Values of the flags, under their names."""

    generation_task: str
    input_source: str
    output_path: Path
    batch_size: int
    max_batch_size: int | None
    with_id: bool
    debug: bool
    device: str
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int
    load: str
    adapter: tuple[str, ...]
    img_tokenizer_path: Path | None

    @property
    def model(self) -> ModelOptions:
        """The model of the flags."""
        return ModelOptions(
            model=self.load, adapter=self.adapter, max_batch_size=self.max_batch_size, device=self.device
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings that were given; CogView v1 disables top-p by 0."""
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": 1.0 if self.top_p == 0 else self.top_p}
        return {name: value for name, value in given.items() if value is not None}


# A task: it takes the flags and the lines of the input, None to ask for them, and returns the exit status.
Task = Callable[[V1Flags, "list[str] | None"], int]

FLAGS = (
    click.option(
        "--input-source",
        default="interactive",
        metavar="PATH",
        help="file with one query per line, or interactive, which asks until an empty line or “stop”",
    ),
    click.option("--output-path", type=FILE, default="samples", metavar="PATH", help="folder for the results"),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1, max=MAX_RESULTS),
        default=4,
        metavar="COUNT",
        help="number of images per prompt, or captions per image",
    ),
    max_batch_size_option("images"),
    click.option("--with-id", is_flag=True, help="lines of the file start with ID<TAB>"),
    click.option("--debug", is_flag=True, help="text2image: also write one concatenated image per prompt"),
    device_option(help="auto, cpu, cuda, mps, or the number of a GPU"),
    click.option("--temperature", type=float, metavar="T", show_default="set by the model"),
    click.option("--top_k", type=int, metavar="K", show_default="set by the model", help="0 disables"),
    click.option("--top_p", type=float, metavar="P", show_default="set by the model", help="0 or 1 disables"),
    click.option("--seed", type=int, default=1234, metavar="NUMBER", help="random seed"),
    click.option(
        "--load", default=DEFAULT_MODEL, metavar="MODEL", help="name of a model (see cogview models) or its folder"
    ),
    adapter_option(),
    click.option(
        "--img-tokenizer-path",
        type=FILE,
        metavar="PATH",
        help="ignored: a checkpoint folder holds its image tokenizer",
    ),
)


def main(argv: Sequence[str] | None, *, program: str, description: str | None, tasks: Mapping[str, Task]) -> int:
    """Run a script of CogView v1.

    Args:
        argv: The command line without the program's name; that of the process by default.
        program: The name of the script.
        description: Its help text.
        tasks: Its tasks by the value of ``--generation-task``; the first one is the default.

    Returns:
        The exit status.
    """
    return run_command(build_command(description, tasks), argv, program)


def build_command(description: str | None, tasks: Mapping[str, Task]) -> click.Command:
    """Return the command with the flags of CogView v1."""
    needless: list[str] = []

    def note(ctx: click.Context, param: click.Parameter, value: object) -> None:
        if value is not None and value is not False:
            needless.append(param.opts[0])

    @combine(
        click.option(
            "--generation-task", default=next(iter(tasks)), metavar="TASK", help=f"one of: {', '.join(tasks)}"
        ),
        *FLAGS,
        *(
            click.option(flag, is_flag=False, flag_value="", hidden=True, expose_value=False, callback=note)
            if takes_value
            else click.option(flag, is_flag=True, hidden=True, expose_value=False, callback=note)
            for flag, (takes_value, _) in NEEDLESS.items()
        ),
    )
    def call(**values: Any) -> int:
        flags = V1Flags(**values)
        return run(flags, tasks, needless)

    epilog = f"Accepted without effect: {flags_by_reason(NEEDLESS)}."
    return click.command(cls=Command, help=description, epilog=epilog)(call)


def run(flags: V1Flags, tasks: Mapping[str, Task], needless: Sequence[str]) -> int:
    """Check the flags, read the input, and run the task; ``needless`` holds the ignored flags that were given."""
    interactive = flags.input_source == "interactive"
    if flags.generation_task not in tasks:
        raise InputError(f"--generation-task {flags.generation_task} is unknown; known: {', '.join(tasks)}")
    if interactive and flags.with_id:
        raise InputError("--with-id needs a file of lines that start with ID<TAB>: give it with --input-source")
    lines = None if interactive else read_lines(flags.input_source, "a query per line")
    if needless:
        print(f"note: not needed, and ignored: {flags_by_reason(needless)}", file=sys.stderr)
    given = flags.img_tokenizer_path
    converted = not is_v1(Path(flags.load))  # weights of CogView v1 are refused when they are loaded
    if given is not None and converted and given.resolve() != Path(flags.load, "image").resolve():
        print(f"note: {given} is ignored: {flags.load} has its own image tokenizer", file=sys.stderr)
    with prepared_folder(flags.output_path):
        return tasks[flags.generation_task](flags, lines)


def flags_by_reason(flags: Iterable[str]) -> str:
    """Return ignored flags as text, those of a reason together with it."""
    reasons: dict[str, list[str]] = {}
    for flag in flags:
        reasons.setdefault(NEEDLESS[flag][1], []).append(flag)
    return "; ".join(f"{', '.join(named)} ({reason})" for reason, named in reasons.items())


def open_session(flags: V1Flags, task: str) -> GenerationSession:
    """Load the model for ``task``, and print a header on stderr."""
    options = SessionOptions(model=flags.model, settings=flags.settings, seed=flags.seed)
    session = GenerationSession.open(options, [task])
    session.print_header()
    return session


def process_lines(lines: list[str] | None, question: str, process: Callable[[list[str]], int]) -> int:
    """Process the lines of a file together, or ask for lines and process each on its own.

    Args:
        lines: The lines; None asks for them.
        question: The question.
        process: Called with lines; it returns the exit status.

    Returns:
        The exit status: that of ``process`` for a file, else 0.
    """
    if lines is not None:
        return process(lines)
    for line in takewhile(lambda line: line != "stop", prompt_lines(f"{question} (“stop” ends)")):
        try:
            process([line])
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
    return 0


def split_id(flags: V1Flags, line: str) -> tuple[str | None, str] | None:
    """Split the id off a line.

    Returns:
        The id, None where lines have none, and the rest; None, with a message on stderr, if the id is missing.
    """
    if not flags.with_id:
        return None, line
    name, tab, rest = line.partition("\t")
    if not tab:
        print(f"skipped: the line “{line}” has no id; expected ID<TAB> before the query", file=sys.stderr)
        return None
    return name, rest
