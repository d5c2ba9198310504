"""Compare the time of a step with peers on equal terms: one shape, one vocabulary, the same sampling, their best modes.

    pip install transformers
    python scripts/benchmarks/compare_peers.py [--batches 1 8 32] [--dtypes float32 bfloat16 int8] [--json FILE]
    python scripts/benchmarks/compare_peers.py --model cogview-emoji --batches 1 8 [--json FILE]

The peers are a GPT-2 of Hugging Face transformers, whose ``generate`` runs with eager or fused attention (sdpa), each
with a growing cache, a static cache, and a static cache and a compiled step; and a plain PyTorch loop with a static
cache in the style of gpt-fast (plain_gpt.py), eager and compiled. Both have a vocabulary of the image codes and the
pieces of the prompt alone, 8,320 ids, because ours computes the logits of 8,192 codes. All sides process 80 given
tokens, then sample with temperature 1 and top-k 200. Weights are random, and ours decodes sequentially. A layer of ours
has two more norms.

With --model, ours has the trained weights, samples all codes of images of one prompt and uses its defaults, speculative
decoding included; the peers have random weights of the same shape, and sample as many tokens after as many given ones.

Every mode runs once to warm up and once for a trial; those within 1.3 of their peer's best are repeated, in turn with
ours. The ratio is the median of the peer's best mode over ours, and larger than 1 where ours is faster.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import arguments
import numpy as np
import plain_gpt
import torch
from compare_v1 import (
    PROMPT,
    RANDOM,
    SAMPLING,
    SEED,
    VOCABULARY,
    Subject,
    add_shape_arguments,
    describe,
    facts,
    make_parser,
    ours_whole,
    report,
    seconds_of,
    shape_of,
    trained_model,
)
from torch._dynamo.exc import TorchDynamoException
from training_peers import gpt2_config, import_transformers

from cogview.benchmark.random_weights import random_transformer
from cogview.cli.main import run_safely
from cogview.device import DevicePlacement, choose_placement
from cogview.errors import InputError
from cogview.modeling.config import TransformerConfig
from cogview.modeling.transformer import Transformer
from cogview.pipeline.cogview import CogView
from cogview.tokenizers.layouts import layouts

NUM_PIECES = 77  # with three commands, 80 given tokens
PEER_IDS = 8320
REPEATED = 1.3  # times the trial of the peer's best mode
TRANSFORMERS_MODES = {
    f"transformers, {attention}, {cache}": (attention, cache)
    for attention in ("eager", "sdpa")
    for cache in ("dynamic", "static", "compiled")
}
PLAIN_MODES = {"plain loop, eager": False, "plain loop, compiled": True}
DTYPES = ("float32", "bfloat16", "int8", "int4")
Side = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = make_parser(__doc__)
    add_shape_arguments(parser)
    parser.add_argument(
        "--batches", type=arguments.count, nargs="+", default=[1, 8, 32], metavar="ROWS", help="(default: 1 8 32)"
    )
    parser.add_argument("--tokens", type=arguments.count, default=128, help="tokens to sample per row (default: 128)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES[:3]), help="(default: float32 bfloat16 int8)"
    )
    parser.add_argument(
        "--model",
        default=RANDOM,
        metavar="NAME_OR_FOLDER",
        help=f"model that generates whole images by its defaults (default: {RANDOM} weights of the given shape)",
    )
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args, parser), "compare_peers.py")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the whole comparison."""
    subject, given = None, NUM_PIECES + 3
    if args.model != RANDOM:
        subject = whole_images(trained_model(args, parser, "auto", "generate"))
        given, args.grid = subject.row.spans["image"].start, math.isqrt(int(subject.row.blanks.sum()))
        args.tokens = args.grid**2
    config = shape_of(args) if subject is None else subject.transformer.config
    limit = min(args.grid**2, config.max_positions - given)
    if not 2 <= args.tokens <= limit:
        raise InputError(f"--tokens must be from 2 to {limit}, the codes of an image that fit; got {args.tokens}")
    import_transformers()
    rows, found = [], []
    for batch in args.batches:
        times: dict[tuple[str, str], list[float]] = {}
        for dtype in args.dtypes:
            print(f"{batch} rows, {dtype}", file=sys.stderr, flush=True)
            placement = choose_placement(args.device, dtype, num_parameters=config.num_parameters)
            if subject is None:
                transformer = prepared_transformer(config, placement)
                sides = {"ours": ours(transformer, placement, args.grid, batch, args.tokens)}
            else:
                sides = {"ours": partial(ours_whole, subject, batch)}
            sides |= peers(config, placement, dtype, batch, given, args.tokens)
            for side, seconds in in_turn_of_best(placement, sides, args.repeats).items():
                times[side, dtype] = seconds
            del sides
            rows += rows_of(times, batch, dtype, args.tokens)
        if len(args.dtypes) > 1:
            rows += rows_of_best(times, batch, args.tokens)
        found.append({"batch": batch, "seconds": {f"{side}, {dtype}": each for (side, dtype), each in times.items()}})
    lines = [
        f"{describe(config, args.grid)}; {PEER_IDS} ids for peers; {torch.get_num_threads()} threads",
        f"weights {args.model}; {given} tokens given and {args.tokens} sampled; medians of {args.repeats} runs; "
        f"transformers {import_transformers().__version__}, torch {torch.__version__}",
    ]
    columns = ["rows", "dtype", "side", "tokens/s", "time over ours"]
    placement = choose_placement(args.device, args.dtypes[0], num_parameters=config.num_parameters)
    report(args, lines, columns, rows, {"comparison": "peers", "rows": found, **facts(placement)})
    return 0


def prepared_transformer(config: TransformerConfig, placement: DevicePlacement) -> Transformer:
    """Return random weights, ready to generate."""
    transformer = random_transformer(config, placement)
    transformer.prepare_cpu()
    return transformer


def ours(transformer: Transformer, placement: DevicePlacement, grid: int, batch: int, count: int) -> Side:
    """Return the function that generates ``count`` codes with our engine."""
    pieces = np.random.default_rng(SEED).integers(0, VOCABULARY.num_text_pieces, NUM_PIECES)
    row = layouts(grid)["generate"].arrange(VOCABULARY, text=pieces)
    row = row.truncate(row.spans["image"].start + count)
    return partial(ours_whole, Subject(transformer=transformer, ours=transformer, placement=placement, row=row), batch)


def whole_images(model: CogView) -> Subject:
    """Return the image of a prompt by the defaults of a trained model."""
    config = model.config
    text = model.text_tokenizer.encode(PROMPT)
    return Subject(
        transformer=model.transformer,
        ours=model.transformer,
        placement=model.placement,
        row=config.layouts["generate"].arrange(config.vocabulary, text=text),
        vocabulary=config.vocabulary,
        sampling=config.sampling,
        speculative=None,
    )


def peers(
    config: TransformerConfig, placement: DevicePlacement, dtype: str, batch: int, given: int, count: int
) -> dict[str, Side]:
    """Return the functions that generate with each mode of the peers, by its name."""
    sides: dict[str, Side] = {}
    torch.manual_seed(SEED)
    prompt_BT = torch.randint(0, PEER_IDS, (1, given), device=placement.device).expand(batch, -1)
    if dtype in ("float32", "bfloat16"):
        gpt2 = make_gpt2(config, placement)
        sides = {
            mode: partial(generate, gpt2, prompt_BT, count, *TRANSFORMERS_MODES[mode]) for mode in TRANSFORMERS_MODES
        }
    if placement.device.type == "cpu" and dtype != "int4":
        shape = (config.num_layers, config.width, config.num_heads, PEER_IDS, config.max_positions)
        plain = plain_gpt.PlainGPT(*shape).eval()
        plain = plain.quantize() if dtype == "int8" else plain.to(placement.dtype)
        settings = (SAMPLING.temperature, SAMPLING.top_k)
        for mode, compiled in PLAIN_MODES.items():
            sides[mode] = partial(plain_gpt.generate, plain, prompt_BT, count, *settings, compiled=compiled)
    return sides


def in_turn_of_best(placement: DevicePlacement, sides: Mapping[str, Side], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of ours and of the best modes of each peer, run in turn."""
    trials = {}
    for side, work in sides.items():
        try:
            seconds_of(placement, work)
        except TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            print(f"left out: {side}: nothing can be compiled here ({reason})", file=sys.stderr, flush=True)
            continue
        trials[side] = seconds_of(placement, work)
        print(f"  {side}: {trials[side]:.2f} s", file=sys.stderr, flush=True)

    def best_of_peer(side: str) -> float:
        peer = side.split(",")[0]
        return min(seconds for other, seconds in trials.items() if other.split(",")[0] == peer)

    kept = [side for side in trials if trials[side] <= REPEATED * best_of_peer(side)]
    times: dict[str, list[float]] = {side: [] for side in kept}
    for _ in range(repeats):
        for side in kept:
            times[side].append(seconds_of(placement, sides[side]))
    return times


def rows_of(
    times: Mapping[tuple[str, str], Sequence[float]], batch: int, dtype: str, count: int
) -> list[Sequence[object]]:
    """Return the rows of a dtype: ours, and each repeated mode of the peers."""
    own = statistics.median(times["ours", dtype])
    return [
        [
            batch,
            dtype,
            side,
            f"{batch * count / statistics.median(seconds):.0f}",
            f"{statistics.median(seconds) / own:.2f}",
        ]
        for (side, other), seconds in times.items()
        if other == dtype
    ]


def rows_of_best(times: Mapping[tuple[str, str], Sequence[float]], batch: int, count: int) -> list[Sequence[object]]:
    """Return the rows of the best dtype and mode of each side."""
    best: dict[str, tuple[float, str, str]] = {}
    for (side, dtype), seconds in times.items():
        peer, median = side.split(",")[0], statistics.median(seconds)
        best[peer] = min(best.get(peer, (median, dtype, side)), (median, dtype, side))
    own = best["ours"][0]
    return [
        [batch, f"best: {dtype}", side, f"{batch * count / median:.0f}", f"{median / own:.2f}"]
        for median, dtype, side in best.values()
    ]


def make_gpt2(config: TransformerConfig, placement: DevicePlacement) -> Any:
    """Return a GPT-2 of the same shape with random weights."""
    transformers = import_transformers()
    torch.manual_seed(SEED)
    shape = gpt2_config(config, vocab_size=PEER_IDS, pad_token_id=0)
    return transformers.GPT2LMHeadModel(shape).eval().to(placement.device, placement.dtype)


@torch.inference_mode()
def generate(model: Any, prompt_BT: torch.Tensor, count: int, attention: str, cache: str) -> torch.Tensor:
    """Return the prompts, each followed by ``count`` sampled tokens, in one of the ``TRANSFORMERS_MODES``."""
    from transformers import CompileConfig

    compiling: dict[str, Any] = {"disable_compile": True}
    if cache == "compiled":
        compiling = {"compile_config": CompileConfig()}
        compiling["compile_config"]._compile_all_devices = True  # a CPU would be skipped
    model.set_attn_implementation(attention)
    ids_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=count,
        do_sample=True,
        temperature=SAMPLING.temperature,
        top_k=SAMPLING.top_k,
        cache_implementation="dynamic" if cache == "dynamic" else "static",
        **compiling,
    )
    assert ids_BT.shape[1] == prompt_BT.shape[1] + count, "generate stopped early"
    return ids_BT


if __name__ == "__main__":
    sys.exit(main())
