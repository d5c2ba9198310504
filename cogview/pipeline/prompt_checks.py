"""What a model says about a prompt before it generates: what is converted, and what it does not understand."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence

from cogview.checkpoints.checkpoint import Model
from cogview.formatting import shorten
from cogview.pipeline.prompt_reader import PromptReader
from cogview.pipeline.requests import MAX_SHOWN, Prompt

log = logging.getLogger(__name__)

MAX_UNKNOWN_SHARE = 0.3  # of the characters of a prompt; from this on it is noted


class PromptChecks:
    """Conversion and checks of the prompts of a model.

    Args:
        model: The model, with or without a grammar of its prompts.
        name: Name of the model, for messages.
    """

    def __init__(self, model: Model, name: str) -> None:
        self._model = model
        self._name = name
        self._reader = None if model.grammar is None else PromptReader(model.grammar, model.things)
        self._logged: set[str] = set()

    def convert(self, prompt: str) -> str:
        """Return a prompt in the characters of the model; without a grammar as it is."""
        return prompt if self._reader is None else self._reader.convert(prompt)[0]

    def notes(self, prompt: str, ids: Sequence[int] | None = None) -> list[str]:
        """Return lines on what is converted in a prompt, and on each part that the model does not understand.

        Args:
            prompt: The prompt.
            ids: Its piece ids, if they are known.
        """
        if self._reader is not None:
            converted, notes = self._reader.convert(prompt)
            return [*notes, *self._reader.problems(converted)]
        notes = []
        share = self._model.text_tokenizer.byte_share(prompt, ids)
        if share >= MAX_UNKNOWN_SHARE:
            notes.append(f"{share:.0%} of its characters are unknown to the model")
        text = unicodedata.normalize("NFKC", prompt)
        names = [name for thing in self._model.things for name in (thing.name, *thing.synonyms)]
        if names and not any(unicodedata.normalize("NFKC", name) in text for name in names):
            notes.append(f"it names none of the things that the model was trained on, such as {'、'.join(names[:3])}")
            notes.append(f"all of them: cogview info {self._name} --things")
        return notes

    def warning(self, prompt: str, ids: Sequence[int] | None = None) -> str | None:
        """Return the notes on a prompt in one line that begins with it, or None without notes."""
        notes = self.notes(prompt, ids)
        return f"“{shorten(prompt, MAX_SHOWN)}”: {'; '.join(notes)}" if notes else None

    def log_warnings(self, prompts: Iterable[Prompt]) -> None:
        """Log the warning about each prompt, once in the life of the model."""
        for prompt in prompts:
            if prompt.text not in self._logged and (warning := self.warning(prompt.text, prompt.ids)) is not None:
                self._logged.add(prompt.text)
                log.warning(warning)
