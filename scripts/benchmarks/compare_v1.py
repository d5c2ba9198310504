"""Compare the seconds per image of the algorithm of CogView v1 and of ours on the same weights.

    python scripts/benchmarks/compare_v1.py [--batches 1 8] [--whole] [--json FILE]
    python scripts/benchmarks/compare_v1.py --model cogview-emoji [--batches 1 8] [--json FILE]

Images of a prompt of 20 pieces are generated in batches of several sizes. Ours generates whole images, prompt included.
The algorithm of v1 (v1_algorithm.py) takes minutes, so that every 32nd step is timed at its position, on its second
run, and represents its neighbours. The time of the prompt is added. --whole times every step instead.

Before that, both fill the same blanks greedily in float32, and must choose the same codes.

With random weights ours decodes sequentially. Their predictions depend little on earlier codes, so that speculative
decoding would look better here than with any trained model. With a --model, whose weights are trained, ours uses its
defaults. All weights have the values of float16, as those of the released files: the algorithm of v1 computes with them
in float32, and so does ours, which leaves them in 16 bits on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import arguments
import numpy as np
import torch
from v1_algorithm import empty_memory, forward, generate, sample

from cogview.checkpoints.checkpoint import load_transformer
from cogview.cli.main import run_safely
from cogview.device import DTYPES, DevicePlacement, choose_placement, keeps_halves
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
SAMPLING = Sampling()  # of v1: top-k 200
CHECKED = 64  # codes of an image that both sides must choose equally
VOCABULARY = Vocabulary()  # of v1

Parts = Mapping[str, float]  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print; return the exit status."""
    parser = make_parser(__doc__)
    add_shape_arguments(parser)
    parser.add_argument(
        "--batches", type=arguments.count, nargs="+", default=[1, 8], metavar="IMAGES", help="(default: 1 8)"
    )
    parser.add_argument(
        "--every", type=arguments.count, default=32, metavar="STEPS", help="time every STEPS-th step (default: 32)"
    )
    parser.add_argument(
        "--model",
        default=RANDOM,
        metavar="NAME_OR_FOLDER",
        help=f"model that generates; every step is timed (default: {RANDOM} weights of the given shape)",
    )
    parser.add_argument("--whole", action="store_true", help="time every step of the algorithm of v1")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args, parser), "compare_v1.py")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the whole comparison."""
    subject = random_subject(args) if args.model == RANDOM else trained_subject(args, parser)
    placement, row = subject.placement, subject.row
    subject.ours.prepare_cpu()
    checked = check_same_codes(subject)
    subject.transformer.to(placement.dtype)

    num_codes = int(row.blanks.sum())
    every_step = args.whole or args.model != RANDOM
    strides = {"all": 1} if every_step else strata(row, args.every)
    rows, found = [], []
    for batch in args.batches:
        print(f"{batch} at a time", file=sys.stderr)
        whole = partial(v1_whole, subject, batch)
        sampled = partial(v1_steps, subject, batch, strides)
        sides = in_turn(
            {
                "v1": whole if every_step else sampled,
                "ours": partial(ours_whole, subject, batch),
            },
            args.repeats,
        )
        own = statistics.median(sides["ours"]["all"]) / batch
        theirs = sum(steps * statistics.median(sides["v1"][part]) for part, steps in strides.items()) / batch
        rows.append([batch, f"{theirs:.3f}", f"{own:.3f}", f"{theirs / own:.1f}", f"{num_codes / own:.1f}"])
        found.append({"batch": batch, "v1": theirs, "ours": own, "ratio": theirs / own, "seconds": sides})

    every = "every step timed" if every_step else f"one of {args.every} steps timed, which represents its neighbours"
    lines = [
        f"weights {args.model}: {describe(subject.transformer.config, math.isqrt(num_codes))}; "
        f"{describe_placement(placement)}; medians of {args.repeats} runs",
        f"{checked} codes chosen greedily in float32: equal on both sides",
        f"algorithm of v1: {every}",
    ]
    columns = ["images at a time", "CogView v1, s per image", "ours, s per image", "v1 / ours", "our codes/s"]
    report(args, lines, columns, rows, {"comparison": "v1", "rows": found, **facts(placement)})
    return 0


def strata(row: TokenSequence, every: int) -> dict[str, int]:
    """Return, for each timed step by its column, the number of steps it represents; the first processes the prompt."""
    first, *others = np.flatnonzero(row.blanks).tolist()
    groups = [others[start : start + every] for start in range(0, len(others), every)]
    return {str(first): 1, **{str(group[(len(group) - 1) // 2]): len(group) for group in groups}}


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """The image of ``row`` that both sides generate, with a transformer that will be on ``placement``."""

    transformer: Transformer  # of the algorithm of v1
    ours: Transformer  # the same weights
    placement: DevicePlacement
    row: TokenSequence
    vocabulary: Vocabulary = VOCABULARY
    sampling: Sampling = SAMPLING
    speculative: int | None = 1  # maximal window of our speculative decoding; None: automatic


def random_subject(args: argparse.Namespace) -> Subject:
    """Return random weights in float32 of the requested shape, and a prompt of random pieces."""
    config = shape_of(args)
    placement = choose_placement(args.device, args.dtype, num_parameters=config.num_parameters)
    pieces = np.random.default_rng(SEED).integers(0, VOCABULARY.num_text_pieces, NUM_PIECES)
    transformer = random_transformer(config, placement.device).half().float()
    return Subject(
        transformer=transformer,
        ours=with_halves(transformer, placement),
        placement=placement,
        row=layouts(args.grid)["generate"].arrange(VOCABULARY, text=pieces),
    )


def trained_subject(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Subject:
    """Return the named model in float32, with those of its sampling settings that v1 has."""
    model = trained_model(args, parser, args.dtype, "generate")
    config, placement = model.config, model.placement
    assert model.folder is not None
    return Subject(
        transformer=load_transformer(model.folder, placement.device, torch.float32),
        ours=model.transformer,
        placement=placement,
        row=config.layouts["generate"].arrange(config.vocabulary, text=model.text_tokenizer.encode(PROMPT)),
        vocabulary=config.vocabulary,
        sampling=Sampling(temperature=config.sampling.temperature, top_k=config.sampling.top_k),
        speculative=None,
    )


def ours_whole(subject: Subject, batch: int) -> Parts:
    """Return the seconds of a batch of whole images by our decoding."""
    requests = [
        DecodingRequest(sequence=subject.row, seed=SEED, image=image, sampling=subject.sampling)
        for image in range(batch)
    ]
    work = partial(decode, subject.ours, subject.vocabulary, requests, speculative=subject.speculative)
    return {"all": seconds_of(subject.placement, work)}


def v1_whole(subject: Subject, batch: int) -> Parts:
    """Return the seconds of a batch of whole images by the algorithm of v1."""
    noise = torch.Generator(subject.placement.device).manual_seed(SEED)
    work = partial(generate, subject.transformer, subject.vocabulary, subject.row, batch, subject.sampling, noise)
    return {"all": seconds_of(subject.placement, work)}


def v1_steps(subject: Subject, batch: int, strides: Mapping[str, int]) -> Parts:
    """Return the seconds of a step of v1 at each of the columns ``strides``, with noise as the memory."""
    transformer, placement, row = subject.transformer, subject.placement, subject.row
    weight = transformer.embedding.weight
    noise = torch.Generator(placement.device).manual_seed(SEED)
    ids_T, positions_T = (torch.from_numpy(array).to(placement.device) for array in (row.ids, row.positions))

    def prefill(column: int) -> None:
        logits_BV, memory = forward(transformer, empty_memory(transformer), ids_T[None, :column], positions_T[:column])
        memory = [inputs_BSD.repeat(batch, 1, 1) for inputs_BSD in memory]
        sample(logits_BV.repeat(batch, 1), subject.vocabulary.image, subject.sampling, noise)

    def generate_some(memory: list[torch.Tensor], column: int, count: int) -> None:
        ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=placement.device)
        for position in range(column, column + count):
            logits_BV, memory = forward(transformer, memory, ids_B1, positions_T[position - 1 : position])
            ids_B1 = sample(logits_BV, subject.vocabulary.image, subject.sampling, noise).unsqueeze(1)

    found = {}
    for name, steps in strides.items():
        column, count = int(name), 1
        if row.blanks[column - 1]:
            # Launches run ahead of a GPU, so that several steps in a row are timed there.
            count = 1 if placement.device.type == "cpu" else min(8, steps // 2 + 1)
            shape = (batch, column - 1, transformer.config.width)
            memory = [torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in transformer.layers]
            work = partial(generate_some, memory, column, count)
        else:
            work = partial(prefill, column)
        work()
        found[name] = seconds_of(placement, work) / count
    return found


def check_same_codes(subject: Subject) -> int:
    """Check that both sides fill the same blanks greedily with the same codes; return the number of codes.

    Some codes are given at random positions, so that steps process one position or several.
    """
    row, vocabulary = subject.row, subject.vocabulary
    first = row.spans["image"].start
    row = row.truncate(first + min(CHECKED, row.spans["image"].stop - first))
    noise = np.random.default_rng(SEED)
    given_T = row.blanks & (noise.random(len(row)) < 0.5)
    codes_T = noise.integers(vocabulary.image.start, vocabulary.image.stop, len(row))
    row = replace(row, ids=np.where(given_T, codes_T, row.ids), blanks=row.blanks & ~given_T)
    ours = subject.ours if subject.ours.dtype == torch.float32 else subject.transformer
    (own,) = decode(ours, vocabulary, [DecodingRequest(sequence=row, seed=SEED, sampling=GREEDY)])
    noise = torch.Generator(subject.placement.device)
    theirs = generate(subject.transformer, vocabulary, row, 2, GREEDY, noise)
    assert (theirs == own.ids).all(), "the algorithm of v1 and ours chose different codes"
    return int(row.blanks.sum())


# Shared by all comparisons


def make_parser(description: str | None) -> arguments.Parser:
    """Return a parser with the arguments of every comparison: --device, --dtype, --repeats and --json."""
    parser = arguments.Parser(description)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="(default: auto)")
    parser.add_argument(
        "--repeats", type=arguments.count, default=5, metavar="COUNT", help="runs of each side (default: 5)"
    )
    parser.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write every measured time to FILE")
    return parser


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --layers, --width, --heads and --grid of random weights."""
    for name, default in (("layers", 8), ("width", 512), ("heads", 8)):
        parser.add_argument(
            f"--{name}", type=arguments.count, default=default, help=f"of random weights (default: {default})"
        )
    parser.add_argument(
        "--grid", type=arguments.count, default=32, choices=[8, 16, 32], help="codes per side of an image (default: 32)"
    )


def trained_model(args: argparse.Namespace, parser: argparse.ArgumentParser, dtype: str, *tasks: str) -> CogView:
    """Open --model; raise InputError if it lacks one of the tasks, or if a shape was given as well."""
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


def shape_of(args: argparse.Namespace) -> TransformerConfig:
    """Return the shape of the random weights."""
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
    """Return random float32 weights that are the same in every run."""
    torch.manual_seed(SEED)
    transformer = Transformer(config).eval().to(device)
    sharpen(transformer)
    return transformer


def with_halves(transformer: Transformer, placement: DevicePlacement) -> Transformer:
    """Return a copy that our engine loads from a float16 file of these weights, in the dtype of ``placement``."""
    ours = copy.deepcopy(transformer).to(placement.dtype).requires_grad_(False)
    if keeps_halves(placement.device, placement.dtype, torch.float16):
        for parameter in ours.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.half()
    return ours


@torch.no_grad()
def sharpen(transformer: Transformer) -> None:
    """Sharpen attention: fresh weights average over all positions, and greedy codes soon repeat."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("query_key_value.weight"):
            parameter.mul_(8)


def seconds_of(placement: DevicePlacement, work: Callable[[], object]) -> float:
    """Return the wall seconds of ``work``, until its device is done."""
    on_gpu = placement.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(placement.device)
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(placement.device)
    return time.perf_counter() - start


def in_turn(sides: Mapping[str, Callable[[], Parts]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Run the sides in turn and return the seconds of each part; the first run of each is a warm-up."""
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
    """Describe the shape of a model."""
    return f"{config.num_layers} layers of width {config.width}, {config.vocabulary_size} ids, {grid * grid} codes"


def describe_placement(placement: DevicePlacement) -> str:
    """Describe device and dtype."""
    known = facts(placement)
    return f"{known['dtype']} on {known['device']}" + (
        f" with {known['threads']} threads" if placement.device.type == "cpu" else ""
    )


def facts(placement: DevicePlacement) -> dict[str, Any]:
    """Return device, dtype, threads and version of PyTorch."""
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
