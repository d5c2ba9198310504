"""``cogview eval scenes``: grade what a model draws of held-out captions."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from cogview.cli.recipes import Recipe, add_recipe_arguments, open_recipe
from cogview.config_files import to_plain
from cogview.data.emoji.world import World
from cogview.errors import InputError
from cogview.evaluation.protocol import choose_sampling, evaluate_scenes, format_report
from cogview.pipeline import CogView, checked_seed
from cogview.sampling import Sampling
from cogview.sheets import contact_sheet
from cogview.training.run import Run

TUNED_TEMPERATURES = (0.3, 0.5, 0.7, 0.9)
TUNED_TOP_K = (5, 20, 100)
SHEET_PICTURES = 96
CAPTIONS = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("measure", choices=["scenes"], help="scenes: object, count, relation and colour")
    add_recipe_arguments(parser, None)
    parser.add_argument("--model", help="a model's name or folder (default: the last checkpoint of the recipe's run)")
    parser.add_argument("-n", "--captions", type=int, default=CAPTIONS, help="held-out captions, one picture each")
    parser.add_argument("--seed", type=int, default=0, help="of the captions and the pictures")
    parser.add_argument("--temperature", type=float, help="(default: the model's own)")
    parser.add_argument("--top-k", type=int, help="(default: the model's own)")
    parser.add_argument("--top-p", type=float, help="(default: the model's own)")
    parser.add_argument(
        "--tune", action="store_true", help="first choose temperature and top-k, on captions of their own"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="pictures drawn at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("-o", "--output", type=Path, help="folder of the report (default: WORK/report)")


def run(args: argparse.Namespace) -> int:
    """Draw, grade, print a table and write report.json and a sheet of pictures."""
    if args.captions < 1 or args.batch_size < 1:
        raise InputError(f"--captions and --batch-size must be at least 1, got {args.captions} and {args.batch_size}")
    seed = checked_seed(args.seed)
    recipe = open_recipe(args)
    world = World.load(recipe.world)
    model = CogView.from_pretrained(args.model or last_checkpoint(recipe), device=args.device)
    sampling = model.sampling(args.temperature, args.top_k, args.top_p)
    output = args.output or recipe.work / "report"
    output.mkdir(parents=True, exist_ok=True)
    if args.tune:
        grid = [
            Sampling(temperature=temperature, top_k=top_k)
            for temperature, top_k in itertools.product(TUNED_TEMPERATURES, TUNED_TOP_K)
        ]
        results = choose_sampling(model, world, grid, count=min(args.captions, 200), batch_size=args.batch_size)
        sampling = results[0][0]
        table = [
            {"sampling": to_plain(tried), "everything": grades["everything"], "object": grades["object"]}
            for tried, grades in results
        ]
        write_json(output / "sampling.json", table)
        for row in table:
            print(f"{row['sampling']}: everything right {row['everything']['accuracy']:.1%}", file=sys.stderr)
    image_settings = recipe.sections.get("image") or {}
    report, pictures = evaluate_scenes(
        model,
        world,
        image_world=world.with_things(image_settings.get("things")),
        count=args.captions,
        seed=seed,
        sampling=sampling,
        batch_size=args.batch_size,
    )
    write_json(output / "report.json", report)
    contact_sheet(pictures[:SHEET_PICTURES], columns=16).save(output / "pictures.png")
    print(format_report(report))
    print(f"written to {output}", file=sys.stderr)
    return 0


def last_checkpoint(recipe: Recipe) -> Path:
    """The newest checkpoint of the recipe's transformer."""
    found = Run(recipe.transformer_run).checkpoints()
    if not found:
        raise InputError(f"{recipe.transformer_run} holds no checkpoint; train with: cogview train {recipe.path}")
    return found[-1]


def write_json(path: Path, content: object) -> None:
    """Plain data as JSON."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
