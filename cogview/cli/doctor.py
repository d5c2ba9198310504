"""``cogview doctor``: check this machine and, optionally, a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cogview.cli.options import FILE, Command, argument, device_option, overrides_argument


@click.command(cls=Command)
@argument("recipe", type=FILE, required=False, metavar="[RECIPE]", help="recipe file with a transformer section")
@overrides_argument("transformer")
@click.option("--work", type=FILE, metavar="FOLDER", show_default="set by the recipe", help="results folder")
@device_option()
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="one per GPU, or 2",
    help="processes of the all-reduce that is checked",
)
@click.option(
    "--dump", type=FILE, metavar="FOLDER", help="instead: compute a step again that was not finite, from its dump"
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object per finding")
def command(
    recipe: Path | None,
    overrides: tuple[str, ...],
    work: Path | None,
    device: str,
    processes: int | None,
    dump: Path | None,
    as_json: bool,
) -> int:
    """Check package versions, devices, communication between processes, and the disk.

    With a RECIPE, also check its stores and compute two steps, with the predicted and the peak memory. The status is 1
    if there is a problem.
    """
    from cogview.diagnostics.recipe import examine, replay_nonfinite_step
    from cogview.training.recipe import Recipe

    if dump is not None and recipe is not None:
        raise click.UsageError("--dump has its own model and rows: omit RECIPE", click.get_current_context())
    if dump is not None:
        findings = replay_nonfinite_step(dump, device)
    else:
        opened = None if recipe is None else Recipe.open(recipe, work, overrides)
        findings = examine(opened, device, processes)
    problems = 0
    for finding in findings:
        problems += finding.status == "problem"
        click.echo(json.dumps(vars(finding), ensure_ascii=False) if as_json else finding)
    return 1 if problems else 0
