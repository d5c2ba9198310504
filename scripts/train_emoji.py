"""Train a model of the emoji world from nothing: every step of a recipe, one after the other.

    python scripts/train_emoji.py scripts/recipes/emoji-cpu.yaml

Each step is the command ``cogview <step> RECIPE``. A step whose result is already there is skipped, one that was
interrupted goes on where it stood, and once a step has run, so do all after it. The first step that fails stops the
script, which ends with that step's status. WORK/times.json holds the seconds of every step that ran.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from cogview.cli.main import HelpFormatter, Parser, run_safely
from cogview.cli.main import main as cogview
from cogview.cli.recipes import open_recipe
from cogview.errors import InputError
from cogview.files import read_json, write_json
from cogview.training.recipe import Recipe

# What is measured where so many tasks are trained, and how; sixteen pictures of each caption are reranked.
MEASURES = (
    ("scenes", {"generate"}, ("--tune",)),
    ("captions", {"caption"}, ()),
    ("rerank", {"generate", "caption"}, ("-n", "100")),
    ("upscale", {"upscale"}, ()),
)


@dataclass(frozen=True)
class Step:
    """One command, how to see that its result is already there, and what it is given besides the recipe."""

    command: str
    done: Callable[[Recipe], bool]
    options: tuple[str, ...] = ()
    takes_device: bool = False


def world_made(recipe: Recipe) -> bool:
    """Whether the emoji world is whole; world.json is written last."""
    return (recipe.world / "world.json").is_file()


def text_trained(recipe: Recipe) -> bool:
    """Whether there is a text tokenizer."""
    return recipe.text_model.is_file()


def image_trained(recipe: Recipe) -> bool:
    """Whether the VQ-VAE's training has ended; until then it lies in its run folder alone."""
    return recipe.image_tokenizer.is_dir()


def encoded(recipe: Recipe) -> bool:
    """Whether both stores have all their rows."""
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
    """Whether the transformer has made all its steps."""
    from cogview.training.run_folder import RunFolder, step_of
    from cogview.training.settings import TransformerSettings

    checkpoints = RunFolder(recipe.transformer_run).checkpoints()
    steps = recipe.settings(TransformerSettings, "transformer").training.steps
    return bool(checkpoints) and step_of(checkpoints[-1]) >= steps


def graded(measure: str, recipe: Recipe) -> bool:
    """Whether there is a report of ``measure`` on the last checkpoint."""
    from cogview.cli.evaluate import read_report

    try:
        return read_report(recipe, measure) is not None
    except InputError:  # of an earlier checkpoint, or there is none yet
        return False


def packaged(recipe: Recipe) -> bool:
    """Whether there is a model folder, made after the reports."""
    config = recipe.work / "model" / "config.json"
    reports = (recipe.work / "report").glob("report*.json")
    return config.is_file() and config.stat().st_mtime >= max(report.stat().st_mtime for report in reports)


def steps_of(recipe: Recipe) -> list[Step]:
    """The steps of a recipe, with a measure for each task that it trains."""
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


def run(args: argparse.Namespace) -> int:
    """All steps; the status of the first that fails, or 0."""
    recipe = open_recipe(args)
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
            command += ["--device", args.device]
        print(f"{name}: cogview {shlex.join(command)}", file=sys.stderr)
        began = time.perf_counter()
        status = cogview(command)
        seconds = time.perf_counter() - began
        note_time(recipe.work / "times.json", step.command, seconds, status)
        if status:
            print(f"{name}: ended with status {status} after {seconds:.0f} s; run this again to go on", file=sys.stderr)
            return status
        print(f"{name}: done in {seconds:.0f} s", file=sys.stderr)
    print(f"all steps done, in {time.perf_counter() - started:.0f} s this time", file=sys.stderr)
    print(recipe.work / "model")
    return 0


def note_time(path: Path, step: str, seconds: float, status: int) -> None:
    """Append a step to ``path``, a JSON list; a step that was interrupted has several entries, which add up."""
    times = read_json(path) if path.is_file() else []
    ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
    times.append({"step": step, "seconds": round(seconds, 1), "status": status, "ended": ended})
    write_json(path, times, indent=1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        prog="train_emoji.py",
        description="Train a model of the emoji world: every step of a recipe, one after the other.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a YAML file such as scripts/recipes/emoji-cpu.yaml"
    )
    parser.add_argument("--work", type=Path, help="folder of the results (default: the recipe's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.set_defaults(overrides=())
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args), "train_emoji.py")


if __name__ == "__main__":
    sys.exit(main())
