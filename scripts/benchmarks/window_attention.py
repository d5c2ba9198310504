"""Compare window attention with dense attention over lengths, forward and backward: window attention is linear.

    python scripts/benchmarks/window_attention.py [--device cuda]

8 heads of 64 in float32 on a CPU and float16 on a GPU, a window of 768, 64 positions of text and 256 sampled ones of
the image as pivots. For each length all forms run in turn in one process, and medians of 5 runs are printed; memory is
the peak of a run in a process of its own, less what it had before. The masked reference, whose scores are stored, ends
at ``--reference-up-to``.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import arguments
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.kernels.window_attention import window_attention_reference, window_attention_torch
from cogview.kernels.window_mask import Pivots
from cogview.modeling.pivots import pivot_bias

LENGTHS = (1345, 2690, 5380, 10760)
HEADS, SIZE, WINDOW, TEXT, SAMPLED = 8, 64, 768, 64, 256
FORMS = ("window", "dense causal", "masked reference")


def attention(form: str, length: int, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function of q, k and v of a column."""
    if form == "dense causal":
        return partial(F.scaled_dot_product_attention, is_causal=True)
    image_sizes = np.repeat([0, length - TEXT], [TEXT, length - TEXT])
    bias_S = pivot_bias(image_sizes, SAMPLED, np.random.default_rng(0))
    pivots = Pivots.from_bias(torch.from_numpy(bias_S).unsqueeze(0)).to(torch.device(device))
    function = window_attention_reference if form == "masked reference" else window_attention_torch
    if form == "triton window":
        from cogview.kernels.window_attention_triton import window_attention_triton as function  # type: ignore[assignment]
    return partial(function, window=WINDOW, pivots_BN=pivots.positions_BN, pivot_bias_BN=pivots.bias_BN)


def seconds(form: str, length: int, device: str) -> float:
    """Run one forward and backward."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    q, k, v = (torch.randn(1, HEADS, length, SIZE, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    function = attention(form, length, device)
    d_out = torch.ones_like(q)
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(q, k, v).backward(d_out)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(field: str) -> int:
    """Return the resident bytes of this process (``VmRSS``) or their peak (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def peak(form: str, length: int, device: str) -> float:
    """Return the megabytes of one forward and backward, after a short one that loads libraries."""
    seconds(form, 2 * SAMPLED, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(form, length, device)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    seconds(form, length, device)
    return (resident("VmHWM") - before) / 1e6


def main() -> int:
    """Measure and print a table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--lengths", type=arguments.count, nargs="+", default=LENGTHS, help="(default: 1345 to 10760)")
    parser.add_argument("--reference-up-to", type=arguments.count, default=5380, help="in positions (default: 5380)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found")
    forms = (*FORMS, "triton window") if args.device == "cuda" else FORMS
    print(
        f"{torch.__version__} on {args.device}, {torch.get_num_threads()} threads; "
        f"B, H, K = 1, {HEADS}, {SIZE}; window {WINDOW}"
    )
    columns = [f"{form} {unit}" for form in forms for unit in ("ms", "MB")]
    ratios = [f"{form} / window" for form in forms[1:]]
    print(f"| length | {' | '.join(columns + ratios)} |\n|{'---|' * (1 + len(columns + ratios))}")
    for length in args.lengths:
        measured = [form for form in forms if form != "masked reference" or length <= args.reference_up_to]
        runs = [{form: seconds(form, length, args.device) for form in measured} for _ in range(6)]
        times = {form: 1e3 * statistics.median(run[form] for run in runs[1:]) for form in measured}
        memory = {}
        for form in measured:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory[form] = pool.apply(peak, (form, length, args.device))
        cells = [f"{times[form]:.0f} | {memory[form]:.0f}" if form in times else "– | –" for form in forms]
        cells += [
            f"{times[form] / times['window']:.2f}x, {memory[form] / memory['window']:.2f}x" if form in times else "–"
            for form in forms[1:]
        ]
        print(f"| {length} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
