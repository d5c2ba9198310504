"""Compare tools that could build the native step of a CPU: the four projections of a layer, for 1, 8 and 32 rows.

    pip install numba openvino
    python scripts/benchmarks/native_tools.py [--shapes 6x256 8x512 24x1024 1x2560] [--rows 1 8 32]

Each tool multiplies by the projections of all layers in turn, with GELU between those of the MLP, in float32: PyTorch's
operations, those with weights prepacked for MKL, ``torch.compile``, a Numba function, OpenVINO, and the C kernels of
``kernels/c``. Tools run in turn; a cell is the median of ``--repeats`` passes in milliseconds, after two passes to warm
up. Missing packages are left out.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import arguments
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogview.kernels.linear import linear_prepacked, prepack
from cogview.kernels.native import linear_native

Weights = list[tuple[Tensor, Tensor]]
Tool = Callable[[Tensor], object]


class Projections(nn.Module):
    """The projections of some layers, each on the output of the one before."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        sizes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
        self.linears = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(num_layers) for outputs, inputs in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last projection."""
        return chain(x, [lambda x, linear=linear: linear(x) for linear in self.linears])


def chain(x: Tensor, products: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Apply the four projections of each layer: attention takes the first third of its input's products."""
    for number, product in enumerate(products):
        y = product(x)
        x = (y[:, : x.shape[1]].contiguous(), y, F.gelu(y, approximate="tanh"), y)[number % 4]
    return x


def numba_product() -> Callable[[Any, Any, Any], Any]:
    """Return a Numba function x W^T + b that works on four outputs at a time, in parallel."""
    import numba
    import numpy as np

    @numba.njit(parallel=True, fastmath=True)
    def product(x_MK, weight_NK, bias_N):  # type: ignore[no-untyped-def]
        rows, inputs = x_MK.shape
        y_MN = np.empty((rows, len(weight_NK)), dtype=np.float32)
        for group in numba.prange(len(weight_NK) // 4):
            n = 4 * group
            for m in range(rows):
                a = b = c = d = np.float32(0)
                for k in range(inputs):
                    value = x_MK[m, k]
                    a += value * weight_NK[n, k]
                    b += value * weight_NK[n + 1, k]
                    c += value * weight_NK[n + 2, k]
                    d += value * weight_NK[n + 3, k]
                y_MN[m, n], y_MN[m, n + 1] = a + bias_N[n], b + bias_N[n + 1]
                y_MN[m, n + 2], y_MN[m, n + 3] = c + bias_N[n + 2], d + bias_N[n + 3]
        return y_MN

    numba.set_num_threads(torch.get_num_threads())
    return product


def tools(model: Projections, rows: int, width: int) -> dict[str, Tool]:
    """Return a function of the input for each tool that is installed."""
    pairs = [(linear.weight.detach(), linear.bias.detach()) for linear in model.linears]
    packed = [prepack(weight) for weight, _ in pairs]
    found: dict[str, Tool] = {
        "PyTorch": model,
        "MKL, prepacked": lambda x: chain(
            x,
            [lambda x, p=p, w=w, b=b: linear_prepacked(x, p, w, b) for p, (w, b) in zip(packed, pairs, strict=True)],
        ),
        "torch.compile": torch.compile(model, fullgraph=True, dynamic=False),
        "C kernels": lambda x: chain(x, [lambda x, w=w, b=b: linear_native(x, w, None, b) for w, b in pairs]),
    }
    if importlib.util.find_spec("numba"):
        product = numba_product()
        arrays = [(weight.numpy(), bias.numpy()) for weight, bias in pairs]
        found["Numba"] = lambda x: chain(
            x, [lambda x, w=w, b=b: torch.from_numpy(product(x.numpy(), w, b)) for w, b in arrays]
        )
    if importlib.util.find_spec("openvino"):
        import openvino

        threads = torch.get_num_threads()
        hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
        converted = openvino.convert_model(model, example_input=torch.zeros(rows, width))
        compiled = openvino.Core().compile_model(converted, "CPU", hints)
        found["OpenVINO"] = lambda x: compiled(x.numpy())
    return found


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = arguments.Parser(__doc__)
    shapes = [(6, 256), (8, 512), (24, 1024), (1, 2560)]
    parser.add_argument("--shapes", type=arguments.shape, nargs="+", default=shapes, metavar="LAYERSxWIDTH")
    parser.add_argument("--rows", type=arguments.count, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--repeats", type=arguments.count, default=15, metavar="COUNT", help="(default: 15)")
    args = parser.parse_args(argv)
    names: list[str] = []
    for num_layers, width in args.shapes:
        torch.manual_seed(0)
        model = Projections(num_layers, width).eval().requires_grad_(False)
        for rows in args.rows:
            torch._dynamo.reset()
            x, sides = torch.randn(rows, width), tools(model, rows, width)
            expected = model(x)
            times: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(args.repeats + 2):
                for name, work in sides.items():
                    start = time.perf_counter()
                    result = work(x)
                    if number > 1:
                        times[name].append(time.perf_counter() - start)
                    elif isinstance(result, Tensor):
                        torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)
            if not names:
                names = list(sides)
                print("| shape | rows | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
            cells = [f"{statistics.median(times[name]) * 1e3:.2f}" for name in names]
            print(f"| {num_layers}x{width} | {rows} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
