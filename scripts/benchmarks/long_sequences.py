"""Compare window attention with dense attention on long sequences: time per code, and the loss of a trained toy.

    python scripts/benchmarks/long_sequences.py [--only time|loss] [--json FILE]

Time: a model of random weights generates 64 x 64 codes from a prompt of 77 pieces. Steps of both patterns are timed in
turn at evenly spaced codes and at the last one, with the keys and values of all codes before in the cache: CPU seconds
of one thread (--threads), medians of --repeats. Below 1 window attention is faster.

Loss: a toy (long_sequences_toy.py) learns grids of 32 x 32 codes whose textures return 16 rows further on, far outside
of its window. Dense attention, window attention, and a window without sampled codes train on the same
pictures. The last shows what a model loses that forgets everything before its window.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import arguments
import numpy as np
import torch
from compare_v1 import SEED, VOCABULARY, facts, make_parser, report
from long_sequences_toy import ToyTrainer, ToyTraining

from cogview.benchmark.random_weights import random_transformer
from cogview.cli.main import run_safely
from cogview.device import DevicePlacement, choose_placement, flush_denormals
from cogview.generation.decoding_state import DecodingState
from cogview.generation.guidance import arrange_rows
from cogview.generation.requests import DecodingRequest
from cogview.generation.token_sampler import TokenSampler
from cogview.modeling.config import AttentionConfig, Sampling, TransformerConfig
from cogview.modeling.pivots import count_keys
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.batching import pad_left
from cogview.tokenizers.layouts import TokenSequence, layouts

GRID, NUM_PIECES = 64, 77
TIMED = 8  # evenly spaced codes, besides the last one
DENSE = AttentionConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=["time", "loss"], help="one of the two comparisons")
    parser.add_argument("--threads", type=arguments.count, default=1, help="(default: 1)")
    shape = parser.add_argument_group("time")
    for name, default in (("layers", 8), ("width", 512), ("heads", 8), ("window", 512), ("pivots", 256)):
        shape.add_argument(f"--{name}", type=arguments.count, default=default, help=f"(default: {default})")
    shape.add_argument(
        "--batches", type=arguments.count, nargs="+", default=[1, 8], metavar="ROWS", help="(default: 1 8)"
    )
    shape.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(default: float32 bfloat16)")
    toy = parser.add_argument_group("loss")
    toy.add_argument("--steps", type=arguments.count, default=ToyTraining.steps, help=f"(default: {ToyTraining.steps})")
    toy.add_argument("--toy-window", type=arguments.count, default=128, help="(default: 128)")
    toy.add_argument("--toy-pivots", type=arguments.count, default=256, help="(default: 256)")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args), "long_sequences.py")


def run(args: argparse.Namespace) -> int:
    """Run the comparisons, and write both to --json."""
    torch.set_num_threads(args.threads)
    flush_denormals()
    found: dict[str, Any] = {}
    parts = {"time": compare_time, "loss": compare_loss}
    for name in [args.only] if args.only else parts:
        lines, columns, rows, found[name] = parts[name](args)
        is_last = name == (args.only or "loss")
        shown = args if is_last else argparse.Namespace(json=None)
        placement = choose_placement(args.device, "float32")
        report(shown, lines, columns, rows, {"comparison": "long sequences", **found, **facts(placement)})
    return 0


Table = tuple[list[str], list[str], list[Sequence[object]], list[dict[str, Any]]]


# --- time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A batch that is decoded code by code, with a cache of random keys and values."""

    state: DecodingState
    sampler: TokenSampler

    @classmethod
    def of(cls, transformer: Transformer, sequence: TokenSequence, batch: int) -> Subject:
        """Return a batch of ``batch`` images of one prompt."""
        requests = [
            DecodingRequest(sequence=sequence, seed=SEED, image=number, sampling=Sampling(top_k=200))
            for number in range(batch)
        ]
        rows = pad_left([sequence.until_last_blank()] * batch, VOCABULARY.pad)
        state = DecodingState(transformer, rows, None)
        state.cache.keys_values.normal_(generator=torch.Generator().manual_seed(SEED))
        return cls(state=state, sampler=TokenSampler(transformer, VOCABULARY, requests, rows, arrange_rows(requests)))

    @torch.inference_mode()
    def seconds(self, column: int) -> float:
        """Return the CPU seconds of sampling the code at ``column``."""
        started = time.process_time()
        self.state.cache.length = column - 1
        hidden_BD = self.state.forward_to(column)
        everyone_J = np.ones(len(self.sampler.requests), dtype=bool)
        for group in self.sampler.groups_at(column, everyone_J):
            ids = group.sample(hidden_BD, self.sampler.keys_JT[:, column], self.sampler.log_probability_JT[:, column])
            group.write_tokens(self.state.ids_BT, column, ids)
        return time.process_time() - started


def compare_time(args: argparse.Namespace) -> Table:
    """Time the steps of both patterns for each batch size and dtype."""
    sequence = layouts(GRID)["generate"].arrange(
        VOCABULARY, text=np.random.default_rng(SEED).integers(0, VOCABULARY.num_text_pieces, NUM_PIECES)
    )
    attention = AttentionConfig(pattern="window", window=args.window, pivots=args.pivots)
    first, last = np.flatnonzero(sequence.blanks)[[0, -1]].tolist()
    part = (last - first + 1) // TIMED
    columns = [*range(first + part // 2, last, part), last]
    keys = {name: count_keys(one, sequence.image_sizes) for name, one in (("dense", DENSE), ("window", attention))}
    rows, found = [], []
    for dtype in args.dtypes:
        placement = choose_placement(args.device, dtype)
        transformers = prepared_transformers(args, placement, attention, len(sequence))
        for batch in args.batches:
            print(f"{dtype}, {batch} rows", file=sys.stderr, flush=True)
            sides = {name: Subject.of(one, sequence, batch) for name, one in transformers.items()}
            seconds = in_turn(sides, columns, args.repeats)
            mean, at_last = ratios(seconds)
            rows.append([batch, dtype, f"{mean:.2f}", f"{at_last:.2f}"])
            found.append({"batch": batch, "dtype": dtype, "mean": mean, "last": at_last, "seconds": seconds})
            del sides
    layers = type(transformers["dense"].cpu_layers).__name__
    lines = [
        f"{args.layers} layers of width {args.width}, {GRID * GRID} codes, {NUM_PIECES} pieces; {layers}; "
        f"{args.threads} threads; medians of {args.repeats}",
        f"window {args.window}, {args.pivots} sampled codes: the last code reads {keys['window'][last - 1]} keys of "
        f"{keys['dense'][last - 1]}",
    ]
    return (
        lines,
        ["rows", "dtype", "time per code, window / dense", "time of the last code, window / dense"],
        rows,
        found,
    )


def prepared_transformers(
    args: argparse.Namespace, placement: DevicePlacement, attention: AttentionConfig, length: int
) -> Mapping[str, Transformer]:
    """Return a transformer of random weights with dense attention, and one with window attention."""
    shape = TransformerConfig(
        num_layers=args.layers,
        width=args.width,
        num_heads=args.heads,
        vocabulary_size=VOCABULARY.padded_size,
        max_positions=length,
        dropout=0.0,
    )
    found = {}
    for name, one in (("dense", DENSE), ("window", attention)):
        found[name] = random_transformer(replace(shape, attention=one), placement)
        found[name].prepare_cpu()
    return found


def in_turn(sides: Mapping[str, Subject], columns: Sequence[int], repeats: int) -> dict[str, list[float]]:
    """Return the median seconds of each side at each column, after one run to warm up."""
    runs: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name in sides:
            runs[name].append([])
        for column in columns:
            for name, side in sides.items():
                runs[name][-1].append(side.seconds(column))
    return {name: [statistics.median(times) for times in zip(*each[1:], strict=True)] for name, each in runs.items()}


def ratios(seconds: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Return window over dense: of the evenly spaced codes together, and of the last one."""
    dense, window = seconds["dense"], seconds["window"]
    return sum(window[:-1]) / sum(dense[:-1]), window[-1] / dense[-1]


# --- loss ---------------------------------------------------------------------------------------------------------


def compare_loss(args: argparse.Namespace) -> Table:
    """Train the toy with each pattern."""
    toy = ToyTraining(steps=args.steps)
    window = AttentionConfig(pattern="window", window=args.toy_window, pivots=args.toy_pivots)
    patterns = {"dense": DENSE, "window": window, "window without sampled codes": replace(window, pivots=0)}
    rows, found = [], []
    for name, attention in patterns.items():
        print(f"training: {name}", file=sys.stderr, flush=True)
        trainer = ToyTrainer(toy, attention)
        trainer.train()
        losses = {**trainer.losses(), "seconds": trainer.seconds}
        found.append({"pattern": name, **losses})
        base = found[0]
        rows.append(
            [
                name,
                f"{losses['all']:.3f}",
                f"{losses['all'] - base['all']:+.3f}",
                f"{losses['lower']:.3f}",
                f"{losses['lower'] - base['lower']:+.3f}",
                f"{losses['seconds'] / base['seconds']:.2f}",
            ]
        )
    lines = [
        f"toy of {toy.layers} layers of width {toy.width}, 32 x 32 codes, {toy.steps} steps of {toy.batch_size}",
        f"window {window.window}, {window.pivots} sampled codes; held-out loss in nats per code",
    ]
    columns = ["attention", "loss", "over dense", "loss of the lower half", "over dense", "training time over dense"]
    return lines, columns, rows, found


if __name__ == "__main__":
    sys.exit(main())
