"""Seconds per image of the released CogView's way of drawing and of ours, side by side on the same random weights.

    python scripts/benchmarks/compare_released.py [--batches 1 8] [--whole] [--json FILE]

A prompt of 20 pieces is drawn in batches of several sizes. Ours draws whole images, prompt included. Of the released
algorithm (released_algorithm.py), which takes minutes, every 32nd step is timed at its own place, each the second time
that it is made, and stands for its neighbours; the reading of the prompt is added. --whole takes every step instead.

Before that, both fill the same blanks greedily in float32, and must choose the same codes.

Ours draws one code after the other. What random weights expect depends little on what was drawn, so that to guess
several codes at one go, as the engine else does where it pays, would look better here than with any trained model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from released_algorithm import choose, draw, no_memory, read

from cogview.cli.main import Parser, run_safely
from cogview.cli.options import require_positive
from cogview.config import TransformerConfig
from cogview.device import DTYPES, Placement, choose_placement
from cogview.easels import Job
from cogview.engine import fill
from cogview.errors import InputError
from cogview.sampling import GREEDY, Sampling
from cogview.tokenizers.layouts import Arranged, layouts
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.transformer import Transformer

SEED = 0
NUM_PIECES = 20
SAMPLING = Sampling()  # as released: top-k 200
CHECKED = 64  # codes of an image that are drawn to see that both sides agree
VOCABULARY = Vocabulary()  # the released one

Parts = Mapping[str, float]  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print; returns the exit status."""
    parser = make_parser(__doc__)
    add_shape_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="IMAGES", help="(default: 1 8)")
    parser.add_argument("--every", type=int, default=32, metavar="STEPS", help="time one of so many (default: 32)")
    parser.add_argument("--whole", action="store_true", help="time every step of the released algorithm")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args), "compare_released.py")


def run(args: argparse.Namespace) -> int:
    """The whole comparison."""
    check_arguments(args)
    require_positive("--every", args.every)
    for batch in args.batches:
        require_positive("--batches", batch)
    config = shape_of(args)
    placement = choose_placement(args.device, args.dtype, num_parameters=config.num_parameters)
    transformer = random_transformer(config, placement.device)
    pieces = np.random.default_rng(SEED).integers(0, VOCABULARY.num_text_pieces, NUM_PIECES)
    checked = check_same_codes(transformer, args.grid, pieces)
    transformer.to(placement.dtype).pack()

    row = layouts(args.grid)["generate"].arrange(VOCABULARY, text=pieces)
    num_codes = int(row.blanks.sum())
    strides = {"all": 1} if args.whole else strata(row, args.every)
    rows, found = [], []
    for batch in args.batches:
        print(f"{batch} at a time", file=sys.stderr)
        whole = partial(released_whole, transformer, row, batch, placement)
        sampled = partial(released_steps, transformer, row, batch, placement, strides)
        sides = in_turn(
            {
                "released": whole if args.whole else sampled,
                "ours": partial(ours_whole, transformer, row, batch, placement),
            },
            args.repeats,
        )
        own = statistics.median(sides["ours"]["all"]) / batch
        theirs = sum(steps * statistics.median(sides["released"][part]) for part, steps in strides.items()) / batch
        rows.append([batch, f"{theirs:.3f}", f"{own:.3f}", f"{theirs / own:.1f}", f"{num_codes / own:.1f}"])
        found.append({"batch": batch, "released": theirs, "ours": own, "ratio": theirs / own, "seconds": sides})

    every = "every step" if args.whole else f"one of {args.every} steps timed, for those around it"
    lines = [
        f"{describe(config, args.grid)}; {describe_placement(placement)}; medians of {args.repeats} runs",
        f"{checked} codes chosen greedily in float32: the same on both sides",
        f"released algorithm: {every}",
    ]
    columns = ["images at a time", "released, s per image", "ours, s per image", "released / ours", "our codes/s"]
    report(args, lines, columns, rows, {"comparison": "released", "rows": found, **facts(placement)})
    return 0


def strata(row: Arranged, every: int) -> dict[str, int]:
    """For each step that is timed, by its column, how many it stands for; the first one reads the prompt."""
    first, *others = np.flatnonzero(row.blanks).tolist()
    groups = [others[start : start + every] for start in range(0, len(others), every)]
    return {str(first): 1, **{str(group[(len(group) - 1) // 2]): len(group) for group in groups}}


def ours_whole(transformer: Transformer, row: Arranged, batch: int, placement: Placement) -> Parts:
    """Seconds of a batch of whole images by our engine."""
    jobs = [Job(row=row, seed=SEED, image=image, sampling=SAMPLING) for image in range(batch)]
    return {"all": seconds_of(placement, partial(fill, transformer, VOCABULARY, jobs, parallel=1))}


def released_whole(transformer: Transformer, row: Arranged, batch: int, placement: Placement) -> Parts:
    """Seconds of a batch of whole images by the released algorithm."""
    noise = torch.Generator(placement.device).manual_seed(SEED)
    return {"all": seconds_of(placement, partial(draw, transformer, VOCABULARY, row, batch, SAMPLING, noise))}


def released_steps(
    transformer: Transformer, row: Arranged, batch: int, placement: Placement, strides: Mapping[str, int]
) -> Parts:
    """Seconds of the released algorithm's step at each of the columns ``strides``, with noise as the memory."""
    weight = transformer.embedding.weight
    noise = torch.Generator(placement.device).manual_seed(SEED)
    ids_T, positions_T = (torch.from_numpy(array).to(placement.device) for array in (row.ids, row.positions))

    def read_prompt(column: int) -> None:
        logits_BV, memory = read(transformer, no_memory(transformer), ids_T[None, :column], positions_T[:column])
        memory = [inputs_BSD.repeat(batch, 1, 1) for inputs_BSD in memory]
        choose(logits_BV.repeat(batch, 1), VOCABULARY.image, SAMPLING, noise)

    def draw_some(memory: list[torch.Tensor], column: int, count: int) -> None:
        ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=placement.device)
        for place in range(column, column + count):
            logits_BV, memory = read(transformer, memory, ids_B1, positions_T[place - 1 : place])
            ids_B1 = choose(logits_BV, VOCABULARY.image, SAMPLING, noise).unsqueeze(1)

    found = {}
    for name, steps in strides.items():
        column, count = int(name), 1
        if row.blanks[column - 1]:
            # A GPU is told of the next steps while it works on one, so several in a row are timed there.
            count = 1 if placement.device.type == "cpu" else min(8, steps // 2 + 1)
            shape = (batch, column - 1, transformer.config.width)
            memory = [torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in transformer.layers]
            work = partial(draw_some, memory, column, count)
        else:
            work = partial(read_prompt, column)
        work()
        found[name] = seconds_of(placement, work) / count
    return found


def check_same_codes(transformer: Transformer, grid: int, pieces: np.ndarray) -> int:
    """Both sides fill the same blanks greedily, which must give the same codes; returns how many were chosen.

    The first codes of an image are given in random places, so that one and several are read at a time.
    """
    noise = np.random.default_rng(SEED)
    codes = np.ma.masked_array(noise.integers(0, VOCABULARY.num_image_codes, CHECKED), mask=noise.random(CHECKED) < 0.5)
    row = layouts(grid)["generate"].arrange(VOCABULARY, text=pieces, image=codes)
    row = row.cut(row.spans["image"].start + CHECKED)
    (own,) = fill(transformer, VOCABULARY, [Job(row=row, seed=SEED, sampling=GREEDY)])
    theirs = draw(transformer, VOCABULARY, row, 2, GREEDY, torch.Generator(transformer.embedding.weight.device))
    assert (theirs == own.ids).all(), "the released algorithm and ours chose different codes"
    return int(row.blanks.sum())


# What all comparisons share


def make_parser(description: str | None) -> Parser:
    """A parser with the arguments of every comparison: --device, --dtype, --repeats and --json."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="(default: auto)")
    parser.add_argument("--repeats", type=int, default=5, metavar="COUNT", help="runs of each side (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time that was measured there")
    return parser


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """--layers, --width, --heads and --grid of random weights."""
    for name, default in (("layers", 8), ("width", 512), ("heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of random weights (default: {default})")
    parser.add_argument(
        "--grid", type=int, default=32, choices=[8, 16, 32], help="codes on a side of an image (default: 32)"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """InputError, before minutes of work, for what could not be done or written after it."""
    require_positive("--repeats", args.repeats)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise InputError(f"--json {args.json}: there is no folder {args.json.parent}; make it first")


def shape_of(args: argparse.Namespace) -> TransformerConfig:
    """The shape of the random weights."""
    try:
        return TransformerConfig(
            num_layers=args.layers,
            width=args.width,
            num_heads=args.heads,
            vocabulary_size=VOCABULARY.padded_size,
            dropout=0.0,
        )
    except ValueError as error:
        raise InputError(f"--layers {args.layers} --width {args.width} --heads {args.heads}: {error}") from None


def random_transformer(config: TransformerConfig, device: torch.device) -> Transformer:
    """The same random weights in every run, in float32."""
    torch.manual_seed(SEED)
    transformer = Transformer(config).eval().to(device)
    sharpen(transformer)
    return transformer


@torch.no_grad()
def sharpen(transformer: Transformer) -> None:
    """Have attention choose among places: at first it averages over all, and greedy codes soon repeat themselves."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("query_key_value.weight"):
            parameter.mul_(8)


def seconds_of(placement: Placement, work: Callable[[], object]) -> float:
    """Wall seconds of ``work``, until its device is done."""
    on_gpu = placement.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(placement.device)
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(placement.device)
    return time.perf_counter() - start


def in_turn(sides: Mapping[str, Callable[[], Parts]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """The seconds of each part of each side, which run in turn; the first run of each is not counted."""
    found: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    for number in range(repeats + 1):
        print(f"run {number} of {repeats}" if number else "warming up", file=sys.stderr, flush=True)
        for side, run_side in sides.items():
            parts = run_side()
            if number:
                for part, seconds in parts.items():
                    found[side].setdefault(part, []).append(seconds)
    return found


def describe(config: TransformerConfig, grid: int) -> str:
    """The shape of a model in words."""
    return f"{config.num_layers} layers of width {config.width}, {config.vocabulary_size} ids, {grid * grid} codes"


def describe_placement(placement: Placement) -> str:
    """Device and dtype in words."""
    known = facts(placement)
    return f"{known['dtype']} on {known['device']}" + (
        f" with {known['threads']} threads" if placement.device.type == "cpu" else ""
    )


def facts(placement: Placement) -> dict[str, Any]:
    """Where it was measured."""
    on_gpu = placement.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(placement.device) if on_gpu else str(placement.device),
        "dtype": str(placement.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def report(
    args: argparse.Namespace,
    lines: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    data: Mapping[str, Any],
) -> None:
    """Print ``lines`` and a Markdown table; write ``data`` and the arguments to --json."""
    print(*lines, "", sep="\n")
    for cells in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(map(str, cells)) + " |")
    if args.json is not None:
        given = {name: value for name, value in vars(args).items() if name != "json"}
        aside = args.json.with_name(f".{args.json.name}.part")
        aside.write_text(json.dumps({"arguments": given, **data}, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, args.json)


if __name__ == "__main__":
    sys.exit(main())
