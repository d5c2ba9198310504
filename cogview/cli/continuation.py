"""How to go on with the steps of a recipe, or to end a training early: the command lines that messages name."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview.training.recipe import Recipe
from cogview.training.step_records import StepRecord

STEPS_KEYS = ("training.steps", "training.warmup_steps")  # which change nothing about the steps that are done


@dataclass(frozen=True, kw_only=True)
class UnfinishedTraining:
    """A training that has a checkpoint, and steps left.

    Attributes:
        section: Its section of the recipe.
        done: Steps that are done.
        planned: Steps of the run, as its folder has them.
        warmup: Steps of its warm-up.
    """

    section: str
    done: int
    planned: int
    warmup: int = 0

    @classmethod
    def find(cls, section: str, folder: Path) -> UnfinishedTraining | None:
        """Return the training in a run folder; None if it is finished, has no checkpoint, or is not known.

        Args:
            section: Its section of the recipe.
            folder: The run folder.
        """
        from cogview.training.run_folder import RunFolder, step_of

        training = (run_settings(folder) or {}).get("training")
        numbers = training if isinstance(training, Mapping) else {}
        planned, warmup = numbers.get("steps"), numbers.get("warmup_steps", 0)
        if not isinstance(planned, int) or not isinstance(warmup, int):
            return None
        done = step_of(RunFolder(folder).checkpoints()[-1])
        return cls(section=section, done=done, planned=planned, warmup=warmup) if done < planned else None

    @property
    def can_end(self) -> bool:
        """Whether its last checkpoint can be a result: the codebook of a VQ-VAE is made at the end of the warm-up."""
        return self.done >= max(2, self.warmup)  # a training has at least two steps

    @property
    def ending(self) -> str:
        """The override by which the training ends with its last checkpoint."""
        return f"{self.section}.training.steps={self.done}"


def run_settings(folder: Path) -> Mapping[str, Any] | None:
    """Return the settings in the run folder of a training; None before its first checkpoint."""
    from cogview.plain_data import read_yaml
    from cogview.training.run_folder import RunFolder

    stored = folder / "recipe.yaml"
    if not RunFolder(folder).checkpoints() or not stored.is_file():
        return None
    found = read_yaml(stored)
    return found if isinstance(found, dict) else None


def earlier_overrides(records: Mapping[str, StepRecord]) -> tuple[str, ...]:
    """Return the overrides with which steps were done or begun, the last one of each key.

    Args:
        records: The records of the steps.
    """
    ordered = sorted(records.values(), key=lambda record: record.order)
    return merge_overrides(override for record in ordered for override in record.overrides)


def merge_overrides(overrides: Iterable[str]) -> tuple[str, ...]:
    """Return overrides SECTION.KEY=VALUE without those whose key comes again."""
    return tuple({override.partition("=")[0]: override for override in overrides}.values())


def run_command(recipe: Recipe, overrides: Iterable[str]) -> str:
    """Return the command line of ``cogview run`` for a recipe.

    Args:
        recipe: The recipe, whose work folder may be another one than the file names.
        overrides: Overrides SECTION.KEY=VALUE.
    """
    words = ["cogview", "run", str(recipe.path), *overrides]
    if Path(str(recipe.sections.get("work", ""))) != recipe.work:
        words += ["--work", str(recipe.work)]
    return shlex.join(words)


def ending_line(recipe: Recipe, training: UnfinishedTraining, overrides: Iterable[str]) -> str:
    """Return the line that says how to end a training with its last checkpoint.

    Args:
        recipe: The recipe.
        training: The training.
        overrides: Overrides SECTION.KEY=VALUE of the command lines so far.
    """
    command = run_command(recipe, merge_overrides([*overrides, training.ending]))
    return f"to end the training after its {training.done} steps: {command}"


def remedies(
    recipe: Recipe, records: Mapping[str, StepRecord], training: UnfinishedTraining | None, *, ends: bool
) -> list[str]:
    """Return how to keep a result whose settings have changed, one text for each way.

    Args:
        recipe: The recipe, with the overrides of this command line.
        records: The records of the steps.
        training: The unfinished training that made the result.
        ends: Whether the training may be ended, so that only its steps have changed.
    """
    given, before = recipe.named_overrides, earlier_overrides(records)
    found = []
    missing = [override for override in before if override not in given]
    if missing:
        command = run_command(recipe, merge_overrides([*given, *before]))
        found.append(f"the last command line had {' '.join(missing)}, with which it goes on: {command}")
    if training is not None and training.can_end and ends:
        found.append(ending_line(recipe, training, [*before, *given]))
    return found
