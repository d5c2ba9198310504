"""``cogview eval MEASURE``: grade what a model draws, describes, ranks and enlarges, on held-out scenes."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogview.cli.recipes import Recipe, add_recipe_arguments, open_recipe
from cogview.config_io import to_mapping
from cogview.emoji.evaluation.captions import evaluate_captions, format_caption_report
from cogview.emoji.evaluation.rerank import evaluate_rerank, format_rerank_report
from cogview.emoji.evaluation.upscale import evaluate_upscale, format_upscale_report
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.evaluation.harness import choose_sampling, evaluate_scenes, format_report
from cogview.files import json_line, read_json, write_json
from cogview.image_io.contact_sheet import contact_sheet
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView, resolve_seed
from cogview.training.loop import RunFolder

# What each measure is written down as, and its table.
MEASURES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "scenes": ("report.json", format_report),
    "captions": ("report-captions.json", format_caption_report),
    "rerank": ("report-rerank.json", format_rerank_report),
    "upscale": ("report-upscale.json", format_upscale_report),
}
DRAWING = ("scenes", "rerank", "upscale")
# The options that some measures have no use for, and those that have.
PARTIAL_OPTIONS = {
    "temperature": DRAWING,
    "top_k": DRAWING,
    "top_p": DRAWING,
    "tune": ("scenes",),
    "candidates": ("rerank",),
}
TUNED_TEMPERATURES = (0.3, 0.5, 0.7, 0.9)
TUNED_TOP_K = (5, 20, 100)
SHEET_PICTURES = 96
SHEET_ENLARGED = 24  # each in four versions
CAPTIONS = 500
CANDIDATES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "measure",
        choices=list(MEASURES),
        help="scenes: object, count, relation and colour in pictures drawn; captions: the same in captions written; "
        "rerank: the best of several pictures by score; upscale: pictures of twice the side",
    )
    add_recipe_arguments(parser, None)
    parser.add_argument("--model", help="a model's name or folder (default: the last checkpoint of the recipe's run)")
    parser.add_argument("-n", "--captions", type=int, default=CAPTIONS, help="held-out scenes, each with its caption")
    parser.add_argument("--candidates", type=int, help=f"rerank: pictures of each caption (default: {CANDIDATES})")
    parser.add_argument("--seed", type=int, default=0, help="of the captions and the pictures")
    parser.add_argument("--temperature", type=float, help="(default: the model's own)")
    parser.add_argument("--top-k", type=int, help="(default: the model's own)")
    parser.add_argument("--top-p", type=float, help="(default: the model's own)")
    parser.add_argument(
        "--tune", action="store_true", help="scenes: first choose temperature and top-k, on captions of their own"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("-o", "--output", type=Path, help="folder of the report (default: WORK/report)")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write the report and what goes with it."""
    refuse_unused(args)
    if args.captions < 1 or args.batch_size < 1:
        raise InputError(f"--captions and --batch-size must be at least 1, got {args.captions} and {args.batch_size}")
    candidates = CANDIDATES if args.candidates is None else args.candidates
    if candidates < 1:
        raise InputError(f"--candidates must be at least 1, got {candidates}")
    seed = resolve_seed(args.seed)
    recipe = open_recipe(args)
    world = EmojiWorld.load(recipe.world)
    model = CogView.from_pretrained(args.model or last_checkpoint(recipe), device=args.device)
    sampling = model.sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    output = args.output or recipe.work / "report"
    output.mkdir(parents=True, exist_ok=True)
    if args.measure == "scenes":
        if args.tune:
            sampling = tune(model, world, min(args.captions, 200), args.batch_size, output)
        image_settings = recipe.sections.get("image") or {}
        report, pictures = evaluate_scenes(
            model,
            world,
            image_scales=image_settings.get("scales", [1]),
            count=args.captions,
            seed=seed,
            sampling=sampling,
            batch_size=args.batch_size,
        )
        contact_sheet(pictures[:SHEET_PICTURES], columns=16).save(output / "pictures.png")
    elif args.measure == "captions":
        report = evaluate_captions(model, world, count=args.captions, seed=seed, batch_size=args.batch_size)
        captions = report.pop("captions")
        (output / "captions.jsonl").write_bytes(b"".join(map(json_line, captions)))
    elif args.measure == "rerank":
        report = evaluate_rerank(
            model,
            world,
            captions=args.captions,
            candidates=candidates,
            seed=seed,
            sampling=sampling,
            batch_size=args.batch_size,
        )
    else:
        report, pictures = evaluate_upscale(
            model, world, count=args.captions, seed=seed, sampling=sampling, batch_size=args.batch_size
        )
        contact_sheet(pictures[: 4 * SHEET_ENLARGED], columns=12).save(output / "pictures-upscale.png")
    name, table = MEASURES[args.measure]
    write_json(output / name, report)
    print(table(report))
    print(f"written to {output}", file=sys.stderr)
    return 0


def refuse_unused(args: argparse.Namespace) -> None:
    """InputError for an option that the measure would ignore."""
    for name, measures in PARTIAL_OPTIONS.items():
        value = getattr(args, name)
        if value is not None and value is not False and args.measure not in measures:
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option} has no meaning for {args.measure}, only for {', '.join(measures)}; leave it out"
            )


def tune(model: CogView, world: EmojiWorld, count: int, batch_size: int, output: Path) -> Sampling:
    """The best settings of the grid; what each of them came to is in sampling.json."""
    grid = [
        Sampling(temperature=temperature, top_k=top_k)
        for temperature, top_k in itertools.product(TUNED_TEMPERATURES, TUNED_TOP_K)
    ]
    results = choose_sampling(model, world, grid, count=count, batch_size=batch_size)
    table = [
        {"sampling": to_mapping(tried), "everything": grades["everything"], "object": grades["object"]}
        for tried, grades in results
    ]
    write_json(output / "sampling.json", table)
    for row in table:
        print(f"{row['sampling']}: everything right {row['everything']['accuracy']:.1%}", file=sys.stderr)
    return results[0][0]


def read_report(recipe: Recipe, measure: str) -> dict[str, Any] | None:
    """The report of ``measure`` below the recipe's work folder; None where it was not measured.

    InputError for a report of another checkpoint than the last.
    """
    path, checkpoint = recipe.work / "report" / MEASURES[measure][0], last_checkpoint(recipe)
    if not path.is_file():
        return None
    report: dict[str, Any] = read_json(path)
    if Path(report["protocol"]["model"]).name != checkpoint.name:
        raise InputError(
            f"{path} grades {report['protocol']['model']}, not {checkpoint}; "
            f"grade that first: cogview eval {measure} {recipe.path}"
        )
    return report


def last_checkpoint(recipe: Recipe) -> Path:
    """The newest checkpoint of the recipe's transformer."""
    found = RunFolder(recipe.transformer_run).checkpoints()
    if not found:
        raise InputError(f"{recipe.transformer_run} holds no checkpoint; train with: cogview train {recipe.path}")
    return found[-1]
