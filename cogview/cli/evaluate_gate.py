"""``cogview eval gate MODEL``: notice in some minutes that a model of the emoji world became worse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.messages import print_note
from cogview.cli.options import (
    FILE,
    MODEL_HELP,
    Command,
    adapter_option,
    argument,
    device_option,
    precision_options,
    sampling_options,
)
from cogview.cli.result_file import check_result_path, save_result
from cogview.errors import ExitStatus, InputError

if TYPE_CHECKING:
    from cogview.emoji.world import EmojiWorld
    from cogview.evaluation.manifest import Result

GATE_FILE = "gate.json"  # in a model's folder: what it is compared with


@click.command(cls=Command, keeps_results=False)
@argument("model", metavar="MODEL", help=MODEL_HELP)
@click.option(
    "--against",
    type=FILE,
    metavar="RESULT",
    show_default=f"MODEL/{GATE_FILE}, if it exists",
    help="result of an earlier gate to compare with",
)
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    default=500,
    metavar="COUNT",
    help="number of held-out captions, at least 20",
)
@click.option("--seed", type=int, default=0, help="random seed of captions and images")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, metavar="COUNT", help="number of images in a batch"
)
@click.option(
    "--recipe",
    type=FILE,
    default="emoji-cpu",
    metavar="RECIPE",
    help="recipe of the emoji world that the model was trained on",
)
@adapter_option()
@sampling_options("codes", image_options=True)
@device_option()
@precision_options()[0]
@click.option("-o", "--output", type=FILE, metavar="FILE", help="write the result, with its items")
def gate(
    model: str,
    against: Path | None,
    prompts: int,
    seed: int,
    batch_size: int,
    recipe: Path,
    adapter: tuple[str, ...],
    settings: dict[str, Any],
    device: str,
    dtype: str,
    output: Path | None,
) -> int:
    """Notice that a model became worse.

    Images, their diversity, captions and ranking are graded on held-out captions of the emoji world. Each row is
    compared with an earlier result by a permutation test. The exit status is 1 if a row fell: at most one run in
    fifty of an unchanged model with another seed; with the same seed and the same arithmetic nothing changes.
    """
    from cogview.emoji.evaluation.gate import GateSettings, ask, compare_rows, earlier_limit, run_gate
    from cogview.pipeline.cogview import CogView
    from cogview.pipeline.inputs import resolve_seed

    if output is not None:
        check_result_path(output)
    gated = GateSettings(prompts=prompts, seed=resolve_seed(seed), batch_size=batch_size)
    before = None if against is None else _read_earlier(against, output)
    world = open_world(recipe)
    ask(world, gated)  # refuses too few prompts, before the model is loaded, which takes longer
    if before is not None:
        earlier_limit(before, world)
    opened = CogView.from_pretrained(model, device=device, dtype=dtype, adapter=adapter)
    shipped = None if opened.folder is None else opened.folder / GATE_FILE
    if before is None and shipped is not None and shipped.is_file():
        before = _read_earlier(shipped, output)
    manifest, values, items = run_gate(opened, world, opened.sampling(**settings), gated, before)
    if output is not None:
        save_result(output, manifest, values, items)
    if before is None:
        for name, value in values.items():
            print(f"{name}: {value.value:.1%} of {value.n}")
        print_note(f"nothing to compare with: give --against, or write {GATE_FILE} into the model's folder with -o")
        return ExitStatus.DONE
    changes, paired = compare_rows(before, items)
    for change in changes:
        print(format_change(change))
    print(
        "same captions and seeds" if paired else "other captions or seeds: only larger falls are noticed",
        file=sys.stderr,
    )
    fallen = [change.name for change in changes if change.fell]
    if fallen:
        print(f"failed: lower than before: {', '.join(fallen)}", file=sys.stderr)
        return ExitStatus.PARTLY_DONE
    return ExitStatus.DONE


def _read_earlier(path: Path, output: Path | None) -> Result:
    """Return the result to compare with; InputError if it is none, or if ``output`` would replace it."""
    from cogview.evaluation.manifest import read_result

    before = read_result(path)
    if output is not None and output.resolve() == path.resolve():
        raise InputError(
            f"the output {output} is the earlier result, which a worse one would replace; choose another name, or "
            "remove it first to begin anew"
        )
    return before


def format_change(change: Any) -> str:
    """Return a ``GateChange`` as a line: name, both means, and the probability of such a fall by chance."""
    before, after = ("–" if mean is None else f"{mean:.1%}" for mean in (change.before, change.after))
    note = "" if change.probability is None else f" (p = {change.probability:.4f})"
    return f"{'FELL ' if change.fell else 'ok   '} {change.name}: {before} -> {after}{note}"


def open_world(path: Path) -> EmojiWorld:
    """Return the emoji world of a recipe: the saved one, or one made of the emoji font.

    Args:
        path: Recipe file, or the name of a recipe.

    Raises:
        InputError: The recipe has no scenes, or a file of the world is missing.
    """
    from cogview.emoji.export import SceneRecipe
    from cogview.emoji.world import EmojiWorld
    from cogview.training.recipe import Recipe

    recipe = Recipe.open(path, None)
    if "scenes" not in recipe.sections:
        raise InputError(f"{recipe.path} has no section scenes; give --recipe one of an emoji world, such as emoji-cpu")
    if recipe.world.is_dir():
        return EmojiWorld.load(recipe.world)
    settings = recipe.settings(SceneRecipe, "scenes")
    return settings.create()
