"""Compare the planned batch with the largest one that fits in memory, under enforced limits.

For each limit a separate process opens the embedded model, plans the largest batch that fits, and generates it. By
bisection, processes with fixed batches then find the largest one that succeeds, and the one that halving from
``--images`` would find. A batch succeeds if ``TIMES`` processes in a row do, since the memory of equal work varies by
some megabytes. On a CPU the limit is that of a control group (v1), which kills a process that exceeds it; where none
can be created, it is the limit of the process on its data (``ulimit -d``). ``--device cuda`` limits PyTorch's share of
the GPU.

Images are completed: all but the last line of codes is given, and differs between images. Each row therefore has
distinct keys and values, and only a few codes have to be sampled.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import arguments
import numpy as np
import torch

from cogview.device import available_memory
from cogview.errors import is_out_of_memory
from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest
from cogview.planning import batches as planning

GROUPS = Path("/sys/fs/cgroup/memory")
LIMITS = (440, 480, 520, 580, 640, 720, 820, 940)  # MB
PROMPT = "蓝色背景上的三只狐狸"
TIMES = 3
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each limit."""
    parser = arguments.Parser(__doc__)
    parser.add_argument(
        "--limits", type=arguments.count, nargs="+", default=LIMITS, metavar="MB", help="(default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="as for cogview generate")
    parser.add_argument(
        "--images", type=arguments.count, default=2048, metavar="COUNT", help="images to generate (default: 2048)"
    )
    parser.add_argument("--way", choices=("group", "data"), help="kind of limit on a CPU (default: group if possible)")
    args = parser.parse_args(argv)
    way = "share" if args.device == "cuda" else args.way or ("group" if _may_make_groups() else "data")
    means = {"group": "a control group", "data": "ulimit -d", "share": "PyTorch's share of the GPU"}[way]
    print(f"# limits by {means}; {args.dtype} on {args.device}; PyTorch {torch.__version__}")
    print("| limit | planned | largest | planned / largest | halving / largest | predicted | seen |")
    print("|---" * 7 + "|", flush=True)
    worst = 1.0
    for limit in args.limits:
        planned = attempt(args, way, limit, None)
        if planned is None:
            print(f"| {limit} MB | failed | | | | | |", flush=True)
            worst = 0.0
            continue
        count = planned["count"]
        largest = largest_of(args, way, limit, count)
        halved = args.images
        while halved > largest:
            halved //= 2
        worst = min(worst, count / largest)
        print(
            f"| {limit} MB | {count} | {largest} | {count / largest:.3f} | {halved / largest:.3f} "
            f"| {planned['predicted'] / 1e6:.0f} MB | {planned['seen'] / 1e6:.0f} MB |",
            flush=True,
        )
    print(f"worst: {worst:.3f}")
    return 0


def largest_of(args: argparse.Namespace, way: str, limit: int, known: int) -> int:
    """Return the size of the largest batch that succeeds; a batch of ``known`` does."""
    good, step = known, max(1, known // 32)
    bad = good + step
    while bad <= args.images and attempt(args, way, limit, bad) is not None:
        good, step = bad, 2 * step
        bad = good + step
    while bad - good > max(1, good // 80):
        middle = (good + bad) // 2
        if attempt(args, way, limit, middle) is None:
            bad = middle
        else:
            good = middle
    return good


def attempt(args: argparse.Namespace, way: str, limit: int, count: int | None) -> dict[str, Any] | None:
    """Return the result with the highest peak for ``count`` images (None: planned); None if a process was killed."""
    results = []
    for _ in range(TIMES):
        results.append(_attempt_once(args, way, limit, count))
        if results[-1] is None:
            return None
    return max(filter(None, results), key=lambda each: each["seen"])


def _attempt_once(args: argparse.Namespace, way: str, limit: int, count: int | None) -> dict[str, Any] | None:
    """Return the result of a separate process, None if it is killed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with _group(limit * 10**6 if way == "group" else None) as group:
        child = context.Process(target=_child, args=(theirs, group, args, way, limit * 10**6, count), daemon=True)
        child.start()
        theirs.close()
        result = None
        with suppress(EOFError):
            result = ours.recv()
        child.join()
        if result and group is not None:  # without files that other processes have opened
            result["seen"] = int((group / "memory.max_usage_in_bytes").read_text())
    if result is not None and "error" in result:
        raise SystemExit(result["error"])
    return result if result is None or "count" in result else None


def _child(
    pipe: Connection, group: Path | None, args: argparse.Namespace, way: str, limit: int, count: int | None
) -> None:
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if group is not None:
        (group / "tasks").write_text(str(os.getpid()))
    if way == "data":
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if way == "share":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        pipe.send(generate(args, limit, count))
    except (MemoryError, RuntimeError) as error:
        memory = is_out_of_memory(error)
        pipe.send({} if memory else {"error": str(error)})


def generate(args: argparse.Namespace, limit: int, count: int | None) -> dict[str, Any]:
    """Generate a batch; return its size, the predicted peak and the measured peak, in bytes."""
    model = CogView.from_pretrained(device=args.device, dtype=args.dtype)
    device, grid = model.placement.device, model.config.grid
    given = np.random.default_rng(0).integers(0, 1024, (args.images, grid - 1, grid))
    requests = [
        GenerationRequest(prompt=PROMPT, seed=1, index=index, codes=codes, sampling=model.sampling())
        for index, codes in enumerate(given)
    ]
    planning.MIN_FREE_BYTES["cuda"] = 0  # the limit is PyTorch's own, and leaves the rest of the GPU alone
    if count is None:
        count = _planned(model, requests)
    before = limit - available_memory(device)
    needed = model._requests_bytes(requests[:count])
    planning.available_memory = lambda device: 2**60  # everything fits
    planning.BatchPlanner._attempt = lambda self, items, work: work(items)  # type: ignore[method-assign]  # and once only
    results = list(model.run(requests[:count], batch_size=args.images))
    assert len(results) == count
    return {"count": count, "predicted": before + needed, "seen": _peak(device)}


def _planned(model: CogView, requests: Sequence[GenerationRequest]) -> int:
    """Return the largest batch that is planned; with more requests smaller ones may be planned, in even parts."""
    fits = model.batch_sizes(requests, batch_size=len(requests))[0]
    for count in range(fits, 2 * fits):
        if model.batch_sizes(requests[: count + 1], batch_size=len(requests))[0] <= count:
            return count
    return 2 * fits


def _peak(device: torch.device) -> int:
    """Return the peak memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _may_make_groups() -> bool:
    try:
        with _group(10**9):
            return True
    except OSError:
        return False


@contextmanager
def _group(limit: int | None) -> Iterator[Path | None]:
    """Create a control group that holds ``limit`` bytes and does not swap."""
    if limit is None:
        yield None
        return
    group = GROUPS / f"planned_batch_{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "memory.swappiness").write_text("0")
        yield group
    finally:
        group.rmdir()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    arguments.run_script(main)
