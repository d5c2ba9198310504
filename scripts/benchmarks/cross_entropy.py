"""Measure forward and backward of head and loss: all logits, the logits of each kind of token, and slices.

    python scripts/benchmarks/cross_entropy.py [--device cuda] [--dtype bfloat16]

One position in 17 predicts a piece of text, the others a code of the image, with the vocabulary of v1. Each method runs
in a separate process, in turn. Memory is the peak that the computation adds to its inputs: bytes of live tensors, and
resident bytes on a CPU; bytes of the allocator on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import arguments
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogview.device import DTYPES
from cogview.kernels.fused_linear_cross_entropy import (
    LossTargets,
    fused_linear_cross_entropy,
    fused_linear_cross_entropy_reference,
)
from cogview.tokenizers.vocabulary import Vocabulary

POSITIONS, WIDTH = 2048, 512
TEXT_WEIGHT = 0.1


def own_logits(hidden_ND: Tensor, embedding_VD: Tensor, targets: Sequence[LossTargets]) -> tuple[Tensor, list[Tensor]]:
    """Compute the logits of each kind of token among its ids, and PyTorch's loss of them."""
    total, losses = hidden_ND.new_zeros((), dtype=torch.float32), []
    for own in targets:
        logits_MI = F.linear(hidden_ND[own.positions_M], embedding_VD[own.ids.start : own.ids.stop]).float()
        losses_M = F.cross_entropy(logits_MI, own.targets_M - own.ids.start, reduction="none")
        total = total + (losses_M * own.weights_M).sum()
        losses.append(losses_M.detach())
    return total, losses


WAYS: dict[str, Callable[[Tensor, Tensor, Sequence[LossTargets]], tuple[Tensor, list[Tensor]]]] = {
    "all logits, masked": fused_linear_cross_entropy_reference,
    "each kind's own": own_logits,
    "slices": fused_linear_cross_entropy,
}


class Alive(TorchDispatchMode):
    """Count the bytes alive in storages that operations have allocated, without ``inputs``: now and at the peak."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def measure(way: str, device: torch.device, dtype: torch.dtype, gradients: Path) -> None:
    """Print the peak of live and of resident bytes and the seconds of a run; store the gradients."""
    vocabulary = Vocabulary()
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(POSITIONS, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    embedding_VD = torch.randn(vocabulary.padded_size, WIDTH, generator=generator).mul_(0.02).to(device, dtype)
    embedding_VD.requires_grad_()
    positions = torch.arange(POSITIONS)
    targets = []
    for ids, chosen, weight in (
        (vocabulary.image, positions % 17 != 0, 1.0),
        (vocabulary.text, positions % 17 == 0, TEXT_WEIGHT),
    ):
        positions_M = positions[chosen]
        targets_M = torch.randint(ids.start, ids.stop, positions_M.shape, generator=generator)
        weights_M = torch.full(positions_M.shape, weight / len(positions_M))
        targets.append(LossTargets(ids, *(x.to(device) for x in (positions_M, targets_M, weights_M))))

    def run() -> float:
        hidden_ND.grad = embedding_VD.grad = None
        start = time.perf_counter()
        total, _ = WAYS[way](hidden_ND, embedding_VD, targets)
        total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        run()
        peak = resident = torch.cuda.max_memory_allocated(device) - before
    else:
        before = resident_bytes()
        run()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        with Alive(hidden_ND, embedding_VD) as alive:
            run()
        peak = alive.peak
    print(peak, resident, run())
    torch.save([hidden_ND.grad.cpu(), embedding_VD.grad.cpu()], gradients)  # type: ignore[union-attr]


def resident_bytes() -> int:
    """Return the resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def difference(gradients: Path, others: Path) -> float:
    """Return the largest difference of the gradients, relative to the largest value of each."""
    pairs = zip(torch.load(gradients), torch.load(others), strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all methods in turn and print a table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="(default: float32)")
    parser.add_argument(
        "--runs", type=arguments.count, default=5, metavar="COUNT", help="runs of each method (default: 5)"
    )
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found")
    if args.measure:
        measure(args.measure[0], torch.device(args.device), DTYPES[args.dtype], Path(args.measure[1]))
        return 0
    values: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder, f"{number}.pt") for number, way in enumerate(WAYS)}
        for _ in range(args.runs):
            for way, file in files.items():
                command = [sys.executable, __file__, "--device", args.device, "--dtype", args.dtype]
                command += ["--measure", way, str(file)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                values[way].append([float(value) for value in output.split()])
        first = next(iter(files.values()))
        differences = {way: difference(file, first) for way, file in files.items()}
    medians = {way: [statistics.median(side) for side in zip(*runs, strict=True)] for way, runs in values.items()}
    whole = next(iter(medians.values()))
    print(
        f"{POSITIONS} positions, width {WIDTH}, {Vocabulary().padded_size} rows, {args.dtype}, {args.device}, "
        f"{torch.get_num_threads()} threads; medians of {args.runs}"
    )
    print("| | alive MB | ratio | resident MB | ratio | seconds | ratio | gradients differ by |")
    print("|---|---|---|---|---|---|---|---|")
    for way, (alive, resident, seconds) in medians.items():
        cells = [f"{alive / 1e6:.0f}", f"{alive / whole[0]:.3f}", f"{resident / 1e6:.0f}", f"{resident / whole[1]:.3f}"]
        cells += [f"{seconds:.3f}", f"{seconds / whole[2]:.3f}", f"{differences[way]:.1e}"]
        print(f"| {way} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
