"""Measure time and memory of the generate command, from the start of the process to the files written.

    python scripts/benchmarks/generate_command.py [--runs 5] [-n 4] [PROMPT]

One run that is not counted comes first, then RUNS runs, each a fresh process; medians are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time


def measure(command: list[str], folder: str) -> tuple[float, float]:
    """Return wall seconds and peak resident memory in MB of one run of ``command`` in ``folder``."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss / 1024  # Linux counts in KiB


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="蓝色背景上的三只狐狸")
    parser.add_argument("-n", type=int, default=4, help="images (default: 4)")
    parser.add_argument("--runs", type=int, default=5, help="counted runs (default: 5)")
    args = parser.parse_args()
    command = [sys.executable, "-m", "cogview", "generate", args.prompt, "-n", str(args.n), "--seed", "7"]
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(command, folder) for _ in range(args.runs + 1)][1:]
    seconds, megabytes = zip(*runs, strict=True)
    print(f"cogview generate {args.prompt} -n {args.n}: {args.runs} runs on {os.cpu_count()} cores")
    print(f"seconds: median {statistics.median(seconds):.2f}, {min(seconds):.2f} to {max(seconds):.2f}")
    print(f"peak memory: median {statistics.median(megabytes):.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
