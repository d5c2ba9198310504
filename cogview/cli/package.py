"""``cogview package``: a checkpoint folder to publish, in float16, with its model card."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cogview.checkpoints.folder import file_sha256, load_model, save_model
from cogview.cli.evaluate import last_checkpoint
from cogview.cli.recipes import add_recipe_arguments, open_recipe
from cogview.config_files import build
from cogview.errors import InputError
from cogview.evaluation.protocol import format_report
from cogview.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class PackageSettings:
    """The ``package`` section of a recipe."""

    card: str  # a Markdown file; {figures} stands for the table of the report, {things} for what the model knows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_recipe_arguments(parser, "package")
    parser.add_argument("-o", "--output", type=Path, help="the folder to write (default: WORK/model)")


def run(args: argparse.Namespace) -> int:
    """Take the last checkpoint, the sampling settings that the grader chose, and the report."""
    recipe = open_recipe(args)
    settings = recipe.settings(PackageSettings, "package")
    report_file, card_file = recipe.work / "report" / "report.json", Path(settings.card)
    if not report_file.is_file():
        raise InputError(f"{report_file} is missing; grade the model first: cogview eval scenes {recipe.path} --tune")
    report = json.loads(report_file.read_text(encoding="utf-8"))

    checkpoint = last_checkpoint(recipe)
    if Path(report["protocol"]["model"]).name != checkpoint.name:
        raise InputError(
            f"{report_file} grades {report['protocol']['model']}, not {checkpoint}; "
            f"grade that first: cogview eval scenes {recipe.path} --tune"
        )
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    sampling = build(Sampling, report["protocol"]["sampling"], where=str(report_file))
    model.config = replace(model.config, sampling=sampling)
    things = "、".join(thing.emoji + thing.name for thing in model.things)
    card = card_file.read_text(encoding="utf-8")
    model.card = card.replace("{figures}", format_report(report)).replace("{things}", things)
    output = args.output or recipe.work / "model"
    aside = output.with_name(f".{output.name}-writing")
    shutil.rmtree(aside, ignore_errors=True)
    save_model(aside, model, torch.float16)
    if output.exists():
        shutil.rmtree(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    os.replace(aside, output)
    print("for checkpoints.yaml:", file=sys.stderr)
    for path in sorted(output.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            print(f"    {path.relative_to(output).as_posix()}: {file_sha256(path)}", file=sys.stderr)
    print(output)
    return 0
