"""A kind of option: a count, or a word such as auto."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

MAX_DIGITS = 9  # of a count


class WordOrCount(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """A whole number from 1 on, or one of some words that stand for a value."""

    name = "count"

    def __init__(self, words: Mapping[str, int | None]) -> None:
        """Accept ``words`` besides numbers."""
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number, or the value of the word."""
        if not isinstance(value, str):
            return int(value)
        if value in self.words:
            return self.words[value]
        if not (value.isdecimal() and value.strip("0")):
            self.fail(f'"{value:.40}" is not {", ".join(self.words)} or a whole number from 1 on', param, ctx)
        if len(value) > MAX_DIGITS:  # of codes or rows of a batch
            self.fail(f'"{value:.40}" is too large; expected at most {10**MAX_DIGITS - 1}', param, ctx)
        return int(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Complete the words."""
        return [click.shell_completion.CompletionItem(word) for word in self.words if word.startswith(incomplete)]
