"""Compare forward and backward of the two attention implementations on a CPU, in the shapes of training.

    python scripts/benchmarks/attention_training.py [--dtype bfloat16]

Both sides run in turn in one process; medians of 11 runs and their ratio are printed.
"""

from __future__ import annotations

import statistics
import time

import arguments
import torch

from cogview.device import DTYPES
from cogview.kernels.attention import SHORT_KEYS, attention_reference, attention_torch

SHAPES = [(16, 6, 84, 64), (32, 6, 84, 64), (8, 8, 256, 64), (4, 8, 512, 64), (1, 16, 1088, 64)]  # B, H, T, K


def seconds(attention, shape: tuple[int, int, int, int], dtype: torch.dtype) -> float:  # type: ignore[no-untyped-def]
    """Return the seconds of one forward and backward."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    start = time.perf_counter()
    attention(q, k, v).float().sum().backward()
    return time.perf_counter() - start


def main() -> int:
    """Measure and print a table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="(default: bfloat16)")
    dtype = DTYPES[parser.parse_args().dtype]
    print(f"{dtype}, {torch.get_num_threads()} threads; training takes the reference up to {SHORT_KEYS} keys")
    print("| B, H, T, K | reference ms | torch ms | torch / reference |\n|---|---|---|---|")
    for shape in SHAPES:
        pairs = [
            (seconds(attention_reference, shape, dtype), seconds(attention_torch, shape, dtype)) for _ in range(12)
        ]
        reference, fused = (1e3 * statistics.median(side) for side in zip(*pairs[1:], strict=True))
        print(f"| {shape} | {reference:.1f} | {fused:.1f} | {fused / reference:.2f} |")
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
