"""Measure a job of 1,000 prompts: images per second, growth of memory, and its files after kill -9.

    python scripts/benchmarks/killed_job.py [--prompts 1000] [--kills 5] [--model cogview-emoji]

The job runs once undisturbed, then again in another folder, where it is killed at random and resumed ``--kills`` times.
Every file of the second run must equal that of the first, bit for bit, and the ledgers must record the same. Resident
memory is read four times a second. It rises and falls with each batch, so that the peak during the first tenth of the
images is compared with the peak during the last tenth.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import arguments

THINGS = ("狐狸", "红苹果", "足球", "猫", "企鹅", "汽车", "蛋糕", "狗")
COLOURS = ("蓝色", "黄色", "紫色", "绿色", "粉色")
NUMBERS = ("一", "两", "三", "四")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, kill, resume and compare; return 1 if the files differ."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--prompts", type=arguments.count, default=1000, help="(default: 1000)")
    parser.add_argument("--kills", type=arguments.whole, default=5, help="(default: 5)")
    parser.add_argument("--model", default="cogview-emoji", help="(default: cogview-emoji)")
    parser.add_argument("--seed", type=arguments.whole, default=0, help="seed of the times of the kills (default: 0)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), args)


def compare(folder: Path, args: argparse.Namespace) -> int:
    """Run the job undisturbed and with kills."""
    job = folder / "job.txt"
    lines = (f"{COLOURS[i % 5]}背景上的{NUMBERS[i // 5 % 4]}个{THINGS[i // 20 % 8]}" for i in range(args.prompts))
    job.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "cogview", "generate", "--model", args.model, "--seed", "7"]
    command += ["--input", str(job)]

    whole = folder / "whole"
    start = time.perf_counter()
    samples = watch(start_process([*command, "-o", str(whole)]), whole)
    seconds = time.perf_counter() - start
    count = len(list(whole.glob("*.png")))
    tenth = count // 10
    first = [size for done, size in samples if 0 < done <= tenth]
    last = [size for done, size in samples if done >= count - tenth]
    growth = max(last) / max(first) - 1
    print(f"undisturbed: {count} images in {seconds:.0f} s, loading included: {count / seconds:.2f} a second")
    print(f"peak resident memory, first to last tenth: {max(first) / 1e6:.0f} MB, {growth:+.1%}", flush=True)

    killed, chance = folder / "killed", random.Random(args.seed)
    points = sorted(chance.sample(range(1, count), args.kills))
    for number, point in enumerate(points):
        process = start_process([*command, "-o", str(killed), *(["--resume"] if number else [])])
        while process.poll() is None and len(list(killed.glob("*.png"))) < point:
            time.sleep(0.02)
        time.sleep(chance.random())
        process.kill()
        process.wait()
        print(f"killed with {len(list(killed.glob('*.png')))} images", flush=True)
    start_process([*command, "-o", str(killed), "--resume"]).wait()

    def files(of: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in of.iterdir() if path.suffix == ".png"}

    def records(of: Path) -> list[str]:
        (ledger,) = of.glob("*.ledger.jsonl")
        return sorted(
            json.dumps(json.loads(line), sort_keys=True) for line in ledger.read_text("utf-8").splitlines()[1:]
        )

    one, other = files(whole), files(killed)
    different = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    same = records(whole) == records(killed)
    print(f"{len(other)} files after {args.kills} kills, {len(different)} of them different from the undisturbed run; ")
    print(f"the ledgers record {'the same' if same else 'something else'}")
    return 0 if same and not different else 1


def start_process(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command in the background, without its output."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def watch(process: subprocess.Popen[bytes], folder: Path) -> list[tuple[int, int]]:
    """Yield (images written, resident bytes) until the process ends."""
    samples = []
    while process.poll() is None:
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except OSError:
            break
        samples.append((len(list(folder.glob("*.png"))), 4096 * pages))
        time.sleep(0.25)
    if process.wait():
        raise SystemExit(f"the job ended with status {process.returncode}")
    return samples


if __name__ == "__main__":
    arguments.run_script(main)
