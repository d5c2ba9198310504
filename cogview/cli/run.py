"""``cogview run``: do every step of a recipe in order, and continue where an earlier run stopped."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from cogview.cli.continuation import ending_line
from cogview.cli.failures import explain_error
from cogview.cli.messages import print_note
from cogview.cli.options import FILE, Command, argument, device_option
from cogview.cli.processor import note_busy_processor
from cogview.cli.steps import (
    RecipeStep,
    check_settings,
    check_step,
    later_done,
    packaged_folder,
    steps_of,
    transformer_settings,
)
from cogview.config_io import to_mapping
from cogview.errors import ExitStatus, InputError, reason_of
from cogview.formatting import format_duration
from cogview.process_variables import rank_and_world_size
from cogview.signals import exit_status_of_signal
from cogview.training.recipe import Recipe
from cogview.training.step_records import read_records, record_step

TIMES_FILE = "times.json"
SHEETS = ("report/samples.png", "report/pictures.png", "transformer-run/samples/step-*.png")  # the best first


@click.command(cls=Command)
@argument("path", type=FILE, metavar="RECIPE", help="recipe file, or a name that `cogview recipes` lists")
@argument(
    "overrides",
    nargs=-1,
    metavar="SECTION.KEY=VALUE",
    help="change of a setting of the recipe, as in transformer.training.steps=100",
)
@click.option("--work", type=FILE, metavar="FOLDER", show_default="set by the recipe", help="results folder")
@device_option()
def command(path: Path, overrides: tuple[str, ...], work: Path | None, device: str) -> int:
    """Do every step of a recipe in order: from pictures or scenes to a packaged model and a sheet of samples.

    A step whose result exists is skipped, and an interrupted one is continued: after a stop, run the same command
    again. WORK/times.json has the time of every step.
    """
    if rank_and_world_size()[1] > 1:
        raise InputError(
            "cogview run is one process; of several, torchrun starts the training: "
            f"torchrun --nproc-per-node N --no-python cogview train {path} --resume auto"
        )
    changes = split_overrides(overrides)
    recipe = replace(Recipe.open(path, work), overrides_by_section=changes)
    for name in changes:
        recipe.section(name)  # which must be there
    steps = tuple(steps_of(recipe))
    check_settings(recipe, steps)
    recipe.work.mkdir(parents=True, exist_ok=True)
    runner = StepRunner(recipe=recipe, device=device, steps=steps)
    started = time.perf_counter()
    status = runner.run_all()
    if status not in (ExitStatus.DONE, ExitStatus.PARTLY_DONE):
        return status
    print(f"all steps done, in {format_duration(time.perf_counter() - started)} of this run", file=sys.stderr)
    for result in results_of(recipe):
        print(result)
    return status


def split_overrides(overrides: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the overrides KEY=VALUE of each section.

    Args:
        overrides: Overrides SECTION.KEY=VALUE.

    Raises:
        InputError: One has another form.
    """
    found: dict[str, tuple[str, ...]] = {}
    for override in overrides:
        name, dot, rest = override.partition(".")
        if not dot or "=" in name or "=" not in rest:
            raise InputError(f'"{override}" is not SECTION.KEY=VALUE, such as transformer.training.steps=100')
        found[name] = (*found.get(name, ()), rest)
    return found


def results_of(recipe: Recipe) -> list[Path]:
    """Return what to look at after all steps: the model folder or the last checkpoint, its card, and a sheet."""
    from cogview.training.run_folder import RunFolder

    model = recipe.work
    if "package" in recipe.sections:
        model = packaged_folder(recipe)
    elif "transformer" in recipe.sections:
        model = next(reversed(RunFolder(recipe.transformer_run).checkpoints()), model)
    sheets = (path for pattern in SHEETS for path in sorted(recipe.work.glob(pattern), reverse=True))
    found = [model, model / "README.md", next(sheets, recipe.work / SHEETS[0])]
    return [path for path in found if path.exists()]


@dataclass(frozen=True, kw_only=True)
class StepRunner:
    """Does the steps of a recipe.

    Attributes:
        recipe: The recipe, with all overrides.
        device: Device of the steps that take one.
        steps: The steps.
    """

    recipe: Recipe
    device: str
    steps: tuple[RecipeStep, ...]

    def run_all(self) -> int:
        """Do all steps that are not done; return the exit status.

        Raises:
            InputError: A step cannot be done, or the result of one is stale.
        """
        left_out = False
        for number, step in enumerate(self.steps):
            name = f"step {number + 1} of {len(self.steps)}, {step.command}"
            stale = check_step(self.recipe, self.steps, number, read_records(self.recipe))
            if stale:
                print_note(f"{stale}: it is done again")
            elif step.done(self.recipe):
                self._adopt(number)
                if ended := step.ended_early(self.recipe):
                    print(f"{name}: ended after {ended.done} of {ended.planned} steps", file=sys.stderr)
                else:
                    print(f"{name}: already done", file=sys.stderr)
                continue
            status = self._run_step(step, name)
            if not is_done(step, status):
                return status
            left_out = left_out or status != ExitStatus.DONE
        return ExitStatus.PARTLY_DONE if left_out else ExitStatus.DONE

    def _run_step(self, step: RecipeStep, name: str) -> int:
        """Do a step, print its time, and note it in the work folder; return the exit status."""
        command = self._command_line(step)
        print(f"{name}: cogview {shlex.join(command)}", file=sys.stderr)
        if step.command == "train" and self._wants_processes():
            print_note(
                "this is one process; for several, stop, train with torchrun, and run the same command again: "
                f"torchrun --nproc-per-node N --no-python cogview {shlex.join(command)}"
            )
        if any(each.command in ("train", "train-image") for each in self.steps):
            note_busy_processor(self.device)  # now: a later step finds the load of this process
        began = time.perf_counter()
        if step.results is not None and not step.existing_results(self.recipe) and not self._is_repeated(step):
            record_step(self.recipe, step.command, step.recorded_settings(self.recipe))
        status = 1  # of a bug
        try:
            status = run_words(command)
        except KeyboardInterrupt as error:
            status = exit_status_of_signal(getattr(error, "number", signal.SIGINT))
            raise
        except Exception as error:
            status = (explain_error(error) or ("", status))[1]
            raise
        finally:
            seconds = time.perf_counter() - began
            note_time(self.recipe.work / TIMES_FILE, step.command, seconds, status)
            took = format_duration(seconds)
            if is_done(step, status):
                print(f"{name}: done in {took}", file=sys.stderr)
            elif status != ExitStatus.MISTAKE:  # of which a line follows
                print(f"{name}: stopped after {took}; the same command continues", file=sys.stderr)
                if (left := step.unfinished(self.recipe)) and left.can_end:
                    print(ending_line(self.recipe, left, self.recipe.named_overrides), file=sys.stderr)
        return status

    def _is_repeated(self, step: RecipeStep) -> bool:
        """Return whether a step is done once more as before, which may have the same result."""
        records = read_records(self.recipe)
        record = records.get(step.command)
        if record is None or not record.result or later_done(step, self.steps, record, records):
            return False
        return bool(record.settings == to_mapping(step.recorded_settings(self.recipe)))

    def _wants_processes(self) -> bool:
        """Return whether the training is meant for several GPUs, or could have them."""
        import torch

        return transformer_settings(self.recipe).engine.name == "deepspeed" or torch.cuda.device_count() > 1

    def _adopt(self, number: int) -> None:
        """Record a finished step that has no record, such as that of an earlier version."""
        step, records = self.steps[number], read_records(self.recipe)
        if step.command not in records:
            print_note(f"its settings were not recorded and are taken to be those of the recipe: {step.command}")
            earlier = (records[each.command].order for each in self.steps[:number] if each.command in records)
            record_step(self.recipe, step.command, step.recorded_settings(self.recipe), order=max(earlier, default=0))

    def _command_line(self, step: RecipeStep) -> list[str]:
        """Return the words of the command of a step."""
        recipe = self.recipe
        words = [*step.command.split(), str(recipe.path), *recipe.overrides_of(step.section)]
        words += [f"{name}.{override}" for name in step.others for override in recipe.overrides_of(name)]
        words += ["--work", str(recipe.work), *step.options]
        return [*words, "--device", self.device] if step.takes_device else words


def is_done(step: RecipeStep, status: int) -> bool:
    """Return whether a step that ended with ``status`` has its result."""
    # Pictures that cannot be used are listed, and the others are encoded.
    return status == ExitStatus.DONE or (step.command == "encode" and status == ExitStatus.PARTLY_DONE)


def run_words(words: Sequence[str]) -> int:
    """Run a command in this process; its exceptions pass, and so does its exit status."""
    from cogview.cli.main import CONTEXT_SETTINGS, cli

    with cli.make_context("cogview", list(words), **CONTEXT_SETTINGS) as context:
        return int(cli.invoke(context) or 0)


def note_time(path: Path, step: str, seconds: float, status: int) -> None:
    """Append a step to the JSON list ``path``; an interrupted step has several entries, which add up.

    A damaged list is put aside, and one that cannot be written is noted: a step does not fail by its time.
    """
    from cogview.files import write_json

    ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entry = {"step": step, "seconds": round(seconds, 1), "status": int(status), "ended": ended}
    try:
        write_json(path, [*_read_times(path), entry], indent=1)
    except (InputError, OSError) as error:
        print_note(f"the time of the step is not recorded: {path}: {reason_of(error)}")


def _read_times(path: Path) -> list[Any]:
    """Return the list of times in a file; a damaged one is renamed, and an empty list returned."""
    from cogview.plain_data import read_json

    if not path.exists():
        return []
    with suppress(InputError):
        times = read_json(path)
        if isinstance(times, list):
            return times
    names = (path.with_name(f"{path.name}.damaged{suffix}") for suffix in ("", *map(str, range(2, 1000))))
    aside = path.rename(next(name for name in names if not name.exists()))
    print_note(f"{path} is no list of times; a new one is begun, the old one is kept as {aside}")
    return []
