"""Measure time and memory of the generate command, from the start of the process to the files written.

    python scripts/benchmarks/generate_command.py [--runs 5] [-n 4] [PROMPT] [--old CHECKOUT] [--result FILE]

One run that is not counted comes first, then RUNS runs, each a fresh process; medians are printed. With ``--old``, the
same command of another checkout runs in turn. Python writes compiled modules, as it does for a user.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import arguments
import torch

from cogview.evaluation.manifest import Manifest, ResultValue, hash_prompts, write_result
from cogview.evaluation.model_record import describe_hardware, describe_versions

ROOT = Path(__file__).resolve().parents[2]


def measure(command: list[str], folder: str, checkout: Path) -> tuple[float, float]:
    """Return wall seconds and peak resident memory in MB of one run of ``command`` in ``folder``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(checkout)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss / 1024  # Linux counts in KiB


def main() -> int:
    """Measure and print."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("prompt", nargs="?", default="蓝色背景上的三只狐狸")
    parser.add_argument("-n", type=arguments.count, default=4, help="images (default: 4)")
    parser.add_argument("--runs", type=arguments.count, default=5, help="counted runs (default: 5)")
    parser.add_argument("--old", type=arguments.folder, metavar="CHECKOUT", help="another version to run in turn")
    parser.add_argument("--result", type=arguments.output_file, metavar="FILE", help="write a result file")
    args = parser.parse_args()
    command = [sys.executable, "-m", "cogview", "generate", args.prompt, "-n", str(args.n), "--seed", "7"]
    checkouts = {"now": ROOT} if args.old is None else {"old": args.old.resolve(), "now": ROOT}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs + 1):
            for name, checkout in checkouts.items():
                runs[name].append(measure(command, folder, checkout))
    print(f"cogview generate {args.prompt} -n {args.n}: {args.runs} runs on {os.cpu_count()} cores")
    values: dict[str, ResultValue] = {}
    for name, measured in runs.items():
        seconds, megabytes = zip(*measured[1:], strict=True)
        print(f"{name}, seconds: median {statistics.median(seconds):.2f}, {min(seconds):.2f} to {max(seconds):.2f}")
        print(f"{name}, peak memory: median {statistics.median(megabytes):.0f} MB")
        values[f"{name}.seconds"] = ResultValue(value=statistics.median(seconds), n=args.runs, unit="s")
        values[f"{name}.memory"] = ResultValue(value=statistics.median(megabytes), n=args.runs, unit="MB")
    if args.old is not None:
        ratio = values["now.seconds"].value / values["old.seconds"].value
        print(f"now / old: {ratio:.2f}")
        values["ratio"] = ResultValue(value=ratio, n=args.runs)
    if args.result is not None:
        manifest = Manifest(
            measure="generate-command",
            prompts=hash_prompts([args.prompt]),
            settings={"images": args.n},
            versions=describe_versions(),
            hardware=describe_hardware(torch.device("cpu")),
        )
        write_result(args.result, manifest, values)
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
