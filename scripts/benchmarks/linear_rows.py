"""Measure one linear layer of the 4-billion-parameter model for 1 to 256 rows, by each method.

For every count of rows: float32, float32 in MKL's own order, bfloat16, bfloat16 computed in float32, PyTorch's kernel
for int8 and for int4, and int8 unpacked first; in milliseconds, the median of ``--repeats``, with enough matrices that
none stays in the cache.
The borders MANY_ROWS_… of ``kernels/linear.py`` were read off this table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import arguments
import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.kernels.linear import (
    linear,
    linear_int4_packed,
    linear_int8_reference,
    linear_prepacked,
    pack_int4_for_cpu,
    prepack,
    quantize_int4,
    quantize_int8,
)

INPUTS, OUTPUTS = 2560, 10240


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--repeats", type=arguments.count, default=9, metavar="COUNT", help="(default: 9)")
    parser.add_argument(
        "--shape",
        type=arguments.shape,
        default=f"{OUTPUTS}x{INPUTS}",
        help=f"outputs x inputs (default: {OUTPUTS}x{INPUTS})",
    )
    parser.add_argument(
        "--copies", type=arguments.count, default=6, metavar="COUNT", help="matrices in turn (default: 6)"
    )
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    outputs, inputs = args.shape
    weights = [torch.randn(outputs, inputs) * 0.02 for _ in range(args.copies)]
    packed = list(map(prepack, weights))
    halves = [weight.bfloat16() for weight in weights]
    int8 = [quantize_int8(weight) for weight in weights]
    int4 = [(pack_int4_for_cpu(steps), scale) for steps, scale in map(quantize_int4, weights)]
    bias = torch.zeros(outputs, dtype=torch.bfloat16)

    def ways(x: Tensor) -> dict[str, Callable[[int], Tensor]]:
        half = x.bfloat16()
        return {
            "float32": lambda i: F.linear(x, weights[i]),
            "float32 packed": lambda i: linear_prepacked(x, packed[i], weights[i], None),
            "bfloat16": lambda i: F.linear(half, halves[i]),
            "bfloat16 in float32": lambda i: linear(half, halves[i], bias),
            "int8": lambda i: torch._weight_int8pack_mm(half, *int8[i]),
            "int8 unpacked": lambda i: linear_int8_reference(half, *int8[i], bias),
            "int4": lambda i: linear_int4_packed(half, *int4[i], bias),
        }

    print(f"# {outputs} x {inputs}, {torch.get_num_threads()} threads, milliseconds, median of {args.repeats}")
    print("| rows | " + " | ".join(ways(torch.zeros(1, inputs))) + " |")
    print("|---" * (len(ways(torch.zeros(1, inputs))) + 1) + "|")
    for rows in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256):
        x = torch.randn(rows, inputs)
        times = []
        for way in ways(x).values():
            taken = []
            for number in range(args.repeats + 1):
                start = time.perf_counter()
                way(number % args.copies)
                taken.append(time.perf_counter() - start)
            times.append(statistics.median(taken[1:]) * 1e3)
        print(f"| {rows} | " + " | ".join(f"{ms:.1f}" for ms in times) + " |", flush=True)
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
