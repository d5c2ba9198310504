"""``cogview package``: a checkpoint folder to publish, in float16, with its model card."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cogview.checkpoints.checkpoint import load_model, save_model
from cogview.cli.evaluate import MEASURES, last_checkpoint, read_report
from cogview.cli.recipes import add_recipe_arguments, open_recipe
from cogview.config_io import from_mapping
from cogview.errors import InputError
from cogview.files import atomic_folder, file_sha256
from cogview.modeling.config import Sampling


@dataclass(frozen=True, kw_only=True)
class PackageSettings:
    """The ``package`` section of a recipe."""

    card: str  # a Markdown file; {figures} stands for the tables of the reports, {things} for what the model knows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_recipe_arguments(parser, "package")
    parser.add_argument("-o", "--output", type=Path, help="the folder to write (default: WORK/model)")


def run(args: argparse.Namespace) -> int:
    """Take the last checkpoint, the sampling settings that the grader chose, and the reports."""
    recipe = open_recipe(args)
    settings = recipe.settings(PackageSettings, "package")
    reports = {measure: report for measure in MEASURES if (report := read_report(recipe, measure)) is not None}
    if "scenes" not in reports:
        raise InputError(f"the model has no grades yet; grade it first: cogview eval scenes {recipe.path} --tune")
    model = load_model(last_checkpoint(recipe), torch.device("cpu"), torch.float32)
    sampling = from_mapping(Sampling, reports["scenes"]["protocol"]["sampling"], where="the report on scenes")
    model.config = replace(model.config, sampling=sampling)
    things = "、".join(thing.emoji + thing.name for thing in model.things)
    figures = "\n\n".join(
        f"`cogview eval {measure}`, {report['protocol']['captions']} held-out scenes:\n\n{MEASURES[measure][1](report)}"
        for measure, report in reports.items()
    )
    card = Path(settings.card).read_text(encoding="utf-8")
    model.card = card.replace("{figures}", figures).replace("{things}", things)
    output = args.output or recipe.work / "model"
    with atomic_folder(output, overwrite=True) as folder:
        save_model(folder, model, torch.float16)
    print("for checkpoints.yaml:", file=sys.stderr)
    for path in sorted(output.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            print(f"    {path.relative_to(output).as_posix()}: {file_sha256(path)}", file=sys.stderr)
    print(output)
    return 0
