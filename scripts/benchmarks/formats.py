"""Compare the weight formats of a CPU: tokens per second of one row, and the share of the memory bandwidth.

    python scripts/benchmarks/formats.py [--layers 24 --width 1024 --heads 16] [--tokens 32] [--json FILE]
    python scripts/benchmarks/formats.py --layers 48 --width 2560 --heads 40 --formats bfloat16 int8 int4

Weights are random and should be larger than the cache of the processor, so that a step takes the time of reading them.
The formats sample tokens one after the other, in turn; a cell is the median of ``--repeats`` runs. The limit is the
time in which this process sums an array of as many bytes as a step reads of the weights; keys and values are left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import arguments
import torch
from compare_peers import Side, ours, prepared_transformer
from compare_v1 import add_shape_arguments, describe, facts, make_parser, report, seconds_of, shape_of

from cogview.cli.main import run_safely
from cogview.device import choose_placement
from cogview.modeling.config import TransformerConfig
from cogview.planning.hardware import measure_hardware
from cogview.planning.model_memory import ACTIVATION_BYTES, layer_bytes

NUM_CODES = 8192


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = make_parser(__doc__)
    add_shape_arguments(parser)
    parser.set_defaults(layers=24, width=1024, heads=16)
    parser.add_argument("--tokens", type=arguments.count, default=32, help="tokens to sample (default: 32)")
    formats = ("float32", "bfloat16", "int8", "int4")
    parser.add_argument("--formats", nargs="+", choices=formats, default=list(formats), help="(default: all)")
    args = parser.parse_args(argv)
    return run_safely(lambda: run(args), "formats.py")


def run(args: argparse.Namespace) -> int:
    """Run the whole comparison."""
    config = shape_of(args)
    sides: dict[str, tuple[Side, Side]] = {}
    for name in args.formats:
        print(f"random weights in {name}", file=sys.stderr, flush=True)
        placement = choose_placement("cpu", name, num_parameters=config.num_parameters)
        transformer = prepared_transformer(config, placement)
        first, whole = (ours(transformer, placement, args.grid, 1, count) for count in (1, args.tokens + 1))
        sides[name] = (first, whole)
    times: dict[str, list[float]] = {name: [] for name in sides}
    bandwidths = []
    for number in range(args.repeats + 1):
        print(f"run {number} of {args.repeats}" if number else "warming up", file=sys.stderr, flush=True)
        for name, (first, whole) in sides.items():
            seconds = seconds_of(placement, whole) - seconds_of(placement, first)
            if number:
                times[name].append(seconds / args.tokens)
        bandwidths.append(measure_hardware(torch.device("cpu"), torch.float32).bandwidth)
    bandwidth = statistics.median(bandwidths)
    slowest = statistics.median(times[args.formats[0]])
    rows = []
    for name, measured in times.items():
        median, size = statistics.median(measured), step_bytes(config, name)
        share = f"{size / bandwidth / median:.0%}"
        rows.append([name, f"{size / 1e6:,.0f}", f"{1 / median:.2f}", share, f"{slowest / median:.2f}"])
    lines = [
        f"{describe(config, args.grid)}; {torch.get_num_threads()} threads; medians of {args.repeats} runs",
        f"80 tokens given and {args.tokens} sampled; a sum over memory reads {bandwidth / 1e9:.1f} GB/s",
    ]
    columns = ["weights", "MB a token", "tokens/s", "of the limit", f"speed over {args.formats[0]}"]
    placement = choose_placement("cpu", args.formats[0], num_parameters=config.num_parameters)
    data = {"comparison": "formats", "seconds": times, "bandwidths": bandwidths, **facts(placement)}
    report(args, lines, columns, rows, data)
    return 0


def step_bytes(config: TransformerConfig, dtype: str) -> int:
    """Return the bytes of the weights that a step reads: the layers, and the rows of the head for codes."""
    return layer_bytes(config, dtype) + NUM_CODES * config.width * ACTIVATION_BYTES[dtype]


if __name__ == "__main__":
    sys.exit(main())
