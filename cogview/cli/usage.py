"""Messages about the command line: which command or option was meant, and the options behind the fields of Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

import click

from cogview.cli.translation import translate

_JOB_LINE = re.compile(r"\bline \d+\b")


def unknown_command(word: str, commands: Sequence[str], *, is_prompt: bool = True) -> str:
    """Return the message about a word that is none of ``commands``: the command that was probably meant.

    Args:
        word: The word.
        commands: The commands that there are.
        is_prompt: Whether a word that is none of them may be meant as a text to generate an image from.
    """
    from difflib import get_close_matches

    if near := get_close_matches(word, commands, n=1):
        return f'no command "{word}"; did you mean "{near[0]}"?'
    if not is_prompt:
        return f'no command "{word}"; expected one of {", ".join(commands)}'
    if not word.isascii() or " " in word:
        quoted = word if word.isalnum() else shlex.quote(word)
        return f'no command "{word}"; to generate images from it: cogview generate {quoted}'
    return f'no command "{word}"'


def usage_message(error: click.UsageError) -> str:
    """Return the message of ``click`` as the middle of a line: in lower case, without a full stop.

    Where an unknown option may be meant as an argument, the message says how to write that.
    """
    message = error.format_message().strip()
    message = f"{message[:1].lower()}{message[1:]}".rstrip(".")
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        takes_arguments = any(isinstance(item, click.Argument) for item in error.ctx.command.params)
        if takes_arguments and (not error.option_name.isascii() or not error.option_name.startswith("--")):
            hint = "write -- before an argument that begins with a dash, and options before that"
            message = f"{message}; {hint}"
    return message


def with_options(message: str, command: click.Command) -> str:
    """Name the options of a command in place of the fields of Python, as in ``top_k``.

    Args:
        message: A message of the library. One about a line of a job file, whose keys are the fields, is unchanged.
        command: The command that the user called.

    Returns:
        The message in the language of the running command; ``device="cpu"`` has become ``--device cpu``.
    """
    options = {
        item.name: max(item.opts, key=len)
        for item in command.params
        if isinstance(item, click.Option) and item.name is not None
    }
    if not options or _JOB_LINE.search(message):
        return message
    renamed = _rename(message, options, command)
    # The templates of translations have the fields of Python.
    return message if renamed == message else _rename(translate(message), options, command)


def _rename(message: str, options: Mapping[str, str], command: click.Command) -> str:
    """Return ``message`` with ``options`` in place of their fields."""
    names = "|".join(options)
    message = re.sub(rf'\b({names})="([^"]*)"', lambda found: f"{options[found[1]]} {found[2]}", message)
    fields = [name for name in options if "_" in name]
    if not fields or "overrides" in [item.name for item in command.params]:  # keys of the recipe
        return message
    # What stands in quotation marks is a value, such as a task.
    return re.sub(rf"(?<![\w.'\"-])({'|'.join(fields)})\b(?!=)", lambda found: options[found[1]], message)
