"""Seconds per image of the released CogView's way of drawing and of ours, side by side on the same random weights.

    python scripts/benchmarks/compare_released.py [--batches 1 8] [--whole] [--json FILE]
    python scripts/benchmarks/compare_released.py --model cogview-emoji [--batches 1 8] [--json FILE]

A prompt of 20 pieces is drawn in batches of several sizes. Ours draws whole images, prompt included. Of the released
algorithm (released_algorithm.py), which takes minutes, every 32nd step is timed at its own place, each the second time
that it is made, and stands for its neighbours; the reading of the prompt is added. --whole takes every step instead.

Before that, both fill the same blanks greedily in float32, and must choose the same codes.

On random weights ours draws one code after the other. What these expect depends little on what was drawn, so that to
guess several codes at one go, as the engine else does where it pays, would look better here than with any trained
model. With a --model, whose weights are trained, it draws as it always does.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from released_algorithm import choose, draw, no_memory, read

from cogview.cli.main import run_safely
from cogview.cli.options import require_positive
from cogview.device import DTYPES, DevicePlacement, choose_placement
from cogview.errors import InputError
from cogview.files import write_json
from cogview.generation.decode import decode
from cogview.generation.requests import DecodingRequest
from cogview.modeling.config import GREEDY, Sampling, TransformerConfig
from cogview.modeling.transformer import Transformer
from cogview.pipeline.cogview import CogView
from cogview.tokenizers.layouts import TokenSequence, layouts
from cogview.tokenizers.vocabulary import Vocabulary

SEED = 0
RANDOM = "random"
SHAPE = ("layers", "width", "heads", "grid")
NUM_PIECES = 20
PROMPT = "蓝色背景上的三只狐狸"
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
    parser.add_argument(
        "--model",
        default=RANDOM,
        metavar="NAME_OR_FOLDER",
        help=f"one that generates, of which every step is timed (default: {RANDOM} weights of that shape)",
    )
    parser.add_argument("--whole", action="store_true", help="time every step of the released algorithm")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args, parser), "compare_released.py")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The whole comparison."""
    check_arguments(args)
    require_positive("--every", args.every)
    for batch in args.batches:
        require_positive("--batches", batch)
    subject = random_subject(args) if args.model == RANDOM else trained_subject(args, parser)
    placement, row = subject.placement, subject.row
    checked = check_same_codes(subject)
    subject.transformer.to(placement.dtype).prepack()

    num_codes = int(row.blanks.sum())
    every_step = args.whole or args.model != RANDOM
    strides = {"all": 1} if every_step else strata(row, args.every)
    rows, found = [], []
    for batch in args.batches:
        print(f"{batch} at a time", file=sys.stderr)
        whole = partial(released_whole, subject, batch)
        sampled = partial(released_steps, subject, batch, strides)
        sides = in_turn(
            {
                "released": whole if every_step else sampled,
                "ours": partial(ours_whole, subject, batch),
            },
            args.repeats,
        )
        own = statistics.median(sides["ours"]["all"]) / batch
        theirs = sum(steps * statistics.median(sides["released"][part]) for part, steps in strides.items()) / batch
        rows.append([batch, f"{theirs:.3f}", f"{own:.3f}", f"{theirs / own:.1f}", f"{num_codes / own:.1f}"])
        found.append({"batch": batch, "released": theirs, "ours": own, "ratio": theirs / own, "seconds": sides})

    every = "every step" if every_step else f"one of {args.every} steps timed, for those around it"
    lines = [
        f"weights {args.model}: {describe(subject.transformer.config, math.isqrt(num_codes))}; "
        f"{describe_placement(placement)}; medians of {args.repeats} runs",
        f"{checked} codes chosen greedily in float32: the same on both sides",
        f"released algorithm: {every}",
    ]
    columns = ["images at a time", "released, s per image", "ours, s per image", "released / ours", "our codes/s"]
    report(args, lines, columns, rows, {"comparison": "released", "rows": found, **facts(placement)})
    return 0


def strata(row: TokenSequence, every: int) -> dict[str, int]:
    """For each step that is timed, by its column, how many it stands for; the first one reads the prompt."""
    first, *others = np.flatnonzero(row.blanks).tolist()
    groups = [others[start : start + every] for start in range(0, len(others), every)]
    return {str(first): 1, **{str(group[(len(group) - 1) // 2]): len(group) for group in groups}}


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What both sides draw: the picture of ``row``, by a transformer that is to be on ``placement``."""

    transformer: Transformer
    placement: DevicePlacement
    row: TokenSequence
    vocabulary: Vocabulary = VOCABULARY
    sampling: Sampling = SAMPLING
    parallel: int | None = 1  # codes that ours guesses at one go; None for as many as pay


def random_subject(args: argparse.Namespace) -> Subject:
    """Random weights in float32, of the shape that ``args`` ask for, and a prompt of random pieces."""
    config = shape_of(args)
    placement = choose_placement(args.device, args.dtype, num_parameters=config.num_parameters)
    pieces = np.random.default_rng(SEED).integers(0, VOCABULARY.num_text_pieces, NUM_PIECES)
    return Subject(
        transformer=random_transformer(config, placement.device),
        placement=placement,
        row=layouts(args.grid)["generate"].arrange(VOCABULARY, text=pieces),
    )


def trained_subject(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Subject:
    """The model of that name in float32, with settings of its own as far as the release has them."""
    model = trained_model(args, parser, "float32", "generate")
    config = model.config
    return Subject(
        transformer=model.transformer,
        placement=choose_placement(args.device, args.dtype, num_parameters=config.transformer.num_parameters),
        row=config.layouts["generate"].arrange(config.vocabulary, text=model.text_tokenizer.encode(PROMPT)),
        vocabulary=config.vocabulary,
        sampling=Sampling(temperature=config.sampling.temperature, top_k=config.sampling.top_k),
        parallel=None,
    )


def ours_whole(subject: Subject, batch: int) -> Parts:
    """Seconds of a batch of whole images by our engine."""
    jobs = [
        DecodingRequest(sequence=subject.row, seed=SEED, image=image, sampling=subject.sampling)
        for image in range(batch)
    ]
    work = partial(decode, subject.transformer, subject.vocabulary, jobs, speculative=subject.parallel)
    return {"all": seconds_of(subject.placement, work)}


def released_whole(subject: Subject, batch: int) -> Parts:
    """Seconds of a batch of whole images by the released algorithm."""
    noise = torch.Generator(subject.placement.device).manual_seed(SEED)
    work = partial(draw, subject.transformer, subject.vocabulary, subject.row, batch, subject.sampling, noise)
    return {"all": seconds_of(subject.placement, work)}


def released_steps(subject: Subject, batch: int, strides: Mapping[str, int]) -> Parts:
    """Seconds of the released algorithm's step at each of the columns ``strides``, with noise as the memory."""
    transformer, placement, row = subject.transformer, subject.placement, subject.row
    weight = transformer.embedding.weight
    noise = torch.Generator(placement.device).manual_seed(SEED)
    ids_T, positions_T = (torch.from_numpy(array).to(placement.device) for array in (row.ids, row.positions))

    def read_prompt(column: int) -> None:
        logits_BV, memory = read(transformer, no_memory(transformer), ids_T[None, :column], positions_T[:column])
        memory = [inputs_BSD.repeat(batch, 1, 1) for inputs_BSD in memory]
        choose(logits_BV.repeat(batch, 1), subject.vocabulary.image, subject.sampling, noise)

    def draw_some(memory: list[torch.Tensor], column: int, count: int) -> None:
        ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=placement.device)
        for place in range(column, column + count):
            logits_BV, memory = read(transformer, memory, ids_B1, positions_T[place - 1 : place])
            ids_B1 = choose(logits_BV, subject.vocabulary.image, subject.sampling, noise).unsqueeze(1)

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


def check_same_codes(subject: Subject) -> int:
    """Both sides fill the same blanks greedily, which must give the same codes; returns how many were chosen.

    The first codes of an image are given in random places, so that one and several are read at a time.
    """
    row, vocabulary, transformer = subject.row, subject.vocabulary, subject.transformer
    first = row.spans["image"].start
    row = row.truncate(first + min(CHECKED, row.spans["image"].stop - first))
    noise = np.random.default_rng(SEED)
    given_T = row.blanks & (noise.random(len(row)) < 0.5)
    codes_T = noise.integers(vocabulary.image.start, vocabulary.image.stop, len(row))
    row = replace(row, ids=np.where(given_T, codes_T, row.ids), blanks=row.blanks & ~given_T)
    (own,) = decode(transformer, vocabulary, [DecodingRequest(sequence=row, seed=SEED, sampling=GREEDY)])
    theirs = draw(transformer, vocabulary, row, 2, GREEDY, torch.Generator(transformer.embedding.weight.device))
    assert (theirs == own.ids).all(), "the released algorithm and ours chose different codes"
    return int(row.blanks.sum())


# What all comparisons share


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments of every comparison: --device, --dtype, --repeats and --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def trained_model(args: argparse.Namespace, parser: argparse.ArgumentParser, dtype: str, *tasks: str) -> CogView:
    """The --model asked for; InputError where it has not all of the tasks, or a shape was given besides."""
    given = [f"--{name}" for name in SHAPE if getattr(args, name) != parser.get_default(name)]
    if given:
        raise InputError(
            f"{', '.join(given)}: {args.model} has a shape of its own; for random weights add --model {RANDOM}"
        )
    model = CogView.from_pretrained(args.model, device=args.device, dtype=dtype)
    if model.bundle is not None:
        raise InputError(f"{args.model} is several models; expected one that has the tasks {' and '.join(tasks)}")
    for needed in tasks:
        model.require_task(needed)
    return model


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


def seconds_of(placement: DevicePlacement, work: Callable[[], object]) -> float:
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


def describe_placement(placement: DevicePlacement) -> str:
    """Device and dtype in words."""
    known = facts(placement)
    return f"{known['dtype']} on {known['device']}" + (
        f" with {known['threads']} threads" if placement.device.type == "cpu" else ""
    )


def facts(placement: DevicePlacement) -> dict[str, Any]:
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
        write_json(args.json, {"arguments": given, **data}, indent=1)


if __name__ == "__main__":
    sys.exit(main())
