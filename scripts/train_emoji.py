"""Train a model of the emoji world from scratch: run every step of a recipe in order.

    python scripts/train_emoji.py scripts/recipes/emoji-cpu.yaml

Each step is the command ``cogview <step> RECIPE``. A step whose result exists is skipped, and an interrupted step is
resumed. After a step has run, all later steps run too. The first step that fails ends the script with its status.
WORK/times.json holds the seconds of every step that ran.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import click

from cogview.cli.main import main as cogview
from cogview.cli.main import run_command
from cogview.cli.options import Command, device_option
from cogview.cli.recipes import recipe_options
from cogview.errors import InputError
from cogview.files import write_json
from cogview.plain_data import read_json
from cogview.training.recipe import Recipe

# Measures of the evaluation, the tasks that they need, and their options; rerank takes 16 images of each caption.
MEASURES = (
    ("scenes", {"generate"}, ("--tune",)),
    ("captions", {"caption"}, ()),
    ("rerank", {"generate", "caption"}, ("-n", "100")),
    ("upscale", {"upscale"}, ()),
)


@dataclass(frozen=True)
class Step:
    """One command, the test whether its result exists, and its options."""

    command: str
    done: Callable[[Recipe], bool]
    options: tuple[str, ...] = ()
    takes_device: bool = False


def world_made(recipe: Recipe) -> bool:
    """Return whether the emoji world is complete; world.json is written last."""
    return (recipe.world / "world.json").is_file()


def text_trained(recipe: Recipe) -> bool:
    """Return whether the text tokenizer exists."""
    return recipe.text_model.is_file()


def image_trained(recipe: Recipe) -> bool:
    """Return whether the training of the VQ-VAE has ended; until then only its run folder exists."""
    return recipe.image_tokenizer.is_dir()


def encoded(recipe: Recipe) -> bool:
    """Return whether both stores have all their rows."""
    from cogview.data.store import TokenStore
    from cogview.emoji.datasets import SceneEncodeSettings

    if not (recipe.store.is_dir() and recipe.held_out_store.is_dir()):
        return False
    settings = recipe.settings(SceneEncodeSettings, "encode")
    return (
        len(TokenStore(recipe.store)) >= settings.rows
        and len(TokenStore(recipe.held_out_store)) >= settings.held_out_rows
    )


def trained(recipe: Recipe) -> bool:
    """Return whether the transformer was trained for all its steps."""
    from cogview.training.run_folder import RunFolder, step_of
    from cogview.training.settings import TransformerSettings

    checkpoints = RunFolder(recipe.transformer_run).checkpoints()
    steps = recipe.settings(TransformerSettings, "transformer").training.steps
    return bool(checkpoints) and step_of(checkpoints[-1]) >= steps


def graded(measure: str, recipe: Recipe) -> bool:
    """Return whether a report of ``measure`` on the last checkpoint exists."""
    from cogview.cli.evaluate import read_report

    try:
        return read_report(recipe, measure) is not None
    except InputError:  # no checkpoint yet, or a report on an earlier one
        return False


def packaged(recipe: Recipe) -> bool:
    """Return whether the model folder is newer than the reports."""
    config = recipe.work / "model" / "config.json"
    reports = (recipe.work / "report").glob("report*.json")
    return config.is_file() and config.stat().st_mtime >= max(report.stat().st_mtime for report in reports)


def steps_of(recipe: Recipe) -> list[Step]:
    """Return the steps of a recipe, with a measure for each task that it trains."""
    from cogview.training.settings import TransformerSettings

    tasks = recipe.settings(TransformerSettings, "transformer").training.tasks
    measures = [
        Step(f"eval {measure}", partial(graded, measure), options=options, takes_device=True)
        for measure, needed, options in MEASURES
        if needed <= set(tasks)
    ]
    return [
        Step("scenes", world_made),
        Step("train-text", text_trained),
        Step("train-image", image_trained, options=("--resume", "auto"), takes_device=True),
        Step("encode", encoded, takes_device=True),
        Step("train", trained, options=("--resume", "auto"), takes_device=True),
        *measures,
        Step("package", packaged),
    ]


@click.command(cls=Command)
@recipe_options(None)
@device_option()
def command(recipe: Recipe, device: str) -> int:
    """Train a model of the emoji world: run every step of a recipe in order.

    A step whose result exists is skipped, and an interrupted step is resumed. The status is that of the first step that
    fails, else 0.
    """
    recipe.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    earlier_ran = False
    steps = steps_of(recipe)
    for number, step in enumerate(steps, start=1):
        name = f"step {number} of {len(steps)}, {step.command}"
        if not earlier_ran and step.done(recipe):
            print(f"{name}: already done", file=sys.stderr)
            continue
        earlier_ran = True
        command = [*step.command.split(), str(recipe.path), "--work", str(recipe.work), *step.options]
        if step.takes_device:
            command += ["--device", device]
        print(f"{name}: cogview {shlex.join(command)}", file=sys.stderr)
        began = time.perf_counter()
        status = cogview(command)
        seconds = time.perf_counter() - began
        note_time(recipe.work / "times.json", step.command, seconds, status)
        if status:
            print(
                f"{name}: ended with status {status} after {seconds:.0f} s; run this again to resume", file=sys.stderr
            )
            return status
        print(f"{name}: done in {seconds:.0f} s", file=sys.stderr)
    print(f"all steps done, in {time.perf_counter() - started:.0f} s of this run", file=sys.stderr)
    print(recipe.work / "model")
    return 0


def note_time(path: Path, step: str, seconds: float, status: int) -> None:
    """Append a step to the JSON list ``path``; an interrupted step has several entries, which add up."""
    times = read_json(path) if path.is_file() else []
    ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
    times.append({"step": step, "seconds": round(seconds, 1), "status": status, "ended": ended})
    write_json(path, times, indent=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    return run_command(command, argv, "train_emoji.py")


if __name__ == "__main__":
    sys.exit(main())
