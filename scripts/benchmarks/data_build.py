"""Compare stores of ``cogview data build``: kinds of sources, numbers of workers, and builds that are killed.

    python scripts/benchmarks/data_build.py [--pictures 20000] [--kills 20] [--workers 1 2 4] [--model cogview-emoji]

The same pictures are drawn once, as JPEG, and given as a folder with text files, as a table and as tar shards. Every
build must give the same bytes. One build is killed with -9 at random moments and continued by the same command.

Rates are pictures per second from the moment when the build opens its journal, after imports, to its end. The
tokenizer's own rate is that of one process that reads the JPEG files, fits them and encodes them in batches of the same
size; it is measured before the builds and after them. Resident memory is that of the build with its workers, ten times
a second: the peak of the second quarter of its time is compared with that of the last.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHARD = 1000  # pictures in a shard
BATCH = 64  # pictures that are encoded together
MEASURED = 2000  # pictures that the tokenizer alone encodes at most
COLOURS = ("红色", "黄色", "蓝色", "绿色", "紫色")
SUFFIXES = ("", "-held-out")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, build, kill, resume and compare; return 1 if the stores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000, help="(default: 20000)")
    parser.add_argument("--kills", type=int, default=20, help="(default: 20)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--model", default="cogview-emoji", help="(default: cogview-emoji)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills (default: 0)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), args)


def compare(folder: Path, args: argparse.Namespace) -> int:
    """Build the stores of all kinds of sources, and one that is killed."""
    sources = write_sources(folder, args.pictures)
    own = [own_rate(folder / "pictures", args)]
    found, rates, starts = set(), [], []
    for kind, source in sources.items():
        for workers in args.workers:
            name = f"{kind}-{workers}"
            start, seconds, digest, memory = build(folder, source, name, workers, args)
            rates.append(args.pictures / seconds)
            starts.append(start)
            found.add(digest)
            print(f"{kind}, {workers} workers: {rates[-1]:.1f} pictures/s, memory {memory}, {digest[:12]}", flush=True)
    own.append(own_rate(folder / "pictures", args))
    print(f"the tokenizer alone: {own[0]:.1f} and {own[1]:.1f} pictures/s")
    mean = sum(own) / 2
    print(f"builds against it: {min(rates) / mean:.2f} to {max(rates) / mean:.2f}", flush=True)
    # On average, a start that is killed gets on by a part of the build.
    longest = max(starts) + 2 * args.pictures / min(rates) / (args.kills + 1)
    kills, digest = killed_build(folder, sources["table"], longest, args)
    print(f"after {kills} kills of {args.kills}: {digest[:12]}")
    found.add(digest)
    print("all stores are equal, byte for byte" if len(found) == 1 else f"the stores differ: {sorted(found)}")
    return int(len(found) != 1)


def write_sources(folder: Path, count: int) -> dict[str, list[Path]]:
    """Draw pictures and write them as a folder, a table and tar shards, in the same order.

    Returns:
        The sources of each kind.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    rows = []
    for number in range(count):
        generator = np.random.default_rng(number)
        left, top, *values = (int(value) for value in generator.integers(0, 120, 8))
        image = Image.new("RGB", (320, 240), tuple(2 * value for value in values[:3]))
        ImageDraw.Draw(image).ellipse((left, top, left + 200, top + 120), fill=tuple(2 * value for value in values[3:]))
        image.save(pictures / f"{number:08d}.jpg", quality=90)
        caption = f"{COLOURS[number % 5]}背景上的{COLOURS[number // 5 % 5]}椭圆"
        (pictures / f"{number:08d}.txt").write_text(caption, encoding="utf-8")
        rows.append((f"pictures/{number:08d}.jpg", caption))
    table = folder / "table.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    shards = []
    for first in range(0, count, SHARD):
        shards.append(folder / f"{first // SHARD:06d}.tar")
        with tarfile.open(shards[-1], "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(first, min(count, first + SHARD)):
                for suffix in ("jpg", "txt"):
                    archive.add(pictures / f"{number:08d}.{suffix}", arcname=f"{number:08d}.{suffix}")
    return {"folder": [pictures], "table": [table], "shards": shards}


def command_of(store: Path, source: Sequence[Path], workers: int, args: argparse.Namespace) -> list[str]:
    """Return the command of a build."""
    command = [sys.executable, "-m", "cogview", "data", "build", *map(str, source), "-o", str(store), "--device", "cpu"]
    return [*command, "--model", args.model, "--workers", str(workers), "--max-inference-batch-size", str(BATCH)]


def build(
    folder: Path, source: Sequence[Path], name: str, workers: int, args: argparse.Namespace
) -> tuple[float, float, str, str]:
    """Return the seconds of a build's start and of the rest, the hash of its stores, and its memory in words."""
    journal = folder / f"{name}.building" / "journal.jsonl"
    start = begun = time.perf_counter()
    with (folder / "errors").open("w+b") as errors:
        process = start_process(command_of(folder / name, source, workers, args), errors)
        samples = []
        while process.poll() is None:
            if not samples and not journal.exists():
                begun = time.perf_counter()
            else:
                samples.append(resident_bytes(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - begun
        if process.returncode:
            raise SystemExit(f"the build ended with status {process.returncode}: {(folder / 'errors').read_text()}")
    quarter = max(1, len(samples) // 4)
    early, late = max(samples[quarter : 2 * quarter] or samples), max(samples[-quarter:])
    return begun - start, seconds, digest_of(folder / name), f"{early / 1e6:.0f} MB, then {late / 1e6:.0f} MB"


def killed_build(folder: Path, source: Sequence[Path], longest: float, args: argparse.Namespace) -> tuple[int, str]:
    """Kill a build at random and continue it; return the number of kills, and the hash of its stores.

    Args:
        folder: Folder of the stores.
        source: The pictures.
        longest: Seconds after which every start is killed at the latest.
        args: The command line.
    """
    chance = random.Random(args.seed)
    command = command_of(folder / "killed", source, max(args.workers), args)
    kills = 0
    while kills < args.kills and not (folder / "killed").exists():
        process = start_process(command, subprocess.DEVNULL)
        try:
            process.wait(timeout=chance.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    if not (folder / "killed").exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return kills, digest_of(folder / "killed")


def own_rate(pictures: Path, args: argparse.Namespace) -> float:
    """Return the pictures per second that the tokenizer encodes from JPEG files in one process."""
    from cogview.cli.data import open_build
    from cogview.data.builders.encode import encode_renditions
    from cogview.data.builders.prepare import fit_picture
    from cogview.image_io.reading import read_image

    settings = {"fit": "crop", "held_out": 0.05, "simplified": False, "num_workers": 0}
    task = open_build(pictures / "none", args.model, settings, BATCH, "cpu")
    paths = sorted(pictures.glob("*.jpg"))[:MEASURED]
    sides = {name: round(task.side * scale) for name, scale in task.settings.scales.items()}

    def encode(batch: Sequence[Path]) -> None:
        opened = map(read_image, batch)
        images = [{name: fit_picture(image, side, "crop") for name, side in sides.items()} for image in opened]
        encode_renditions(images, task.image_tokenizer)

    encode(paths[:BATCH])
    start = time.perf_counter()
    for first in range(0, len(paths), BATCH):
        encode(paths[first : first + BATCH])
    return len(paths) / (time.perf_counter() - start)


def digest_of(store: Path) -> str:
    """Return a hash of the files of the training store and the held-out store."""
    digest = hashlib.sha256()
    for suffix in SUFFIXES:
        path = store.with_name(store.name + suffix) / "data.mdb"
        digest.update(path.read_bytes() if path.exists() else b"none")
    return digest.hexdigest()


def start_process(command: Sequence[str], errors: object) -> subprocess.Popen[bytes]:
    """Start a command in the background, without what it prints."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)  # type: ignore[call-overload]


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children, without the pages that they share."""
    total = 0
    for each in (pid, *children_of(pid)):
        try:
            _, resident, shared = Path(f"/proc/{each}/statm").read_text().split()[:3]
        except OSError:
            continue
        total += 4096 * (int(resident) - (int(shared) if each != pid else 0))
    return total


def children_of(pid: int) -> list[int]:
    """Return the children of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main())
