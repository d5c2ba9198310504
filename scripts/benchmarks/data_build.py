"""Compare stores of ``cogview data build``: kinds of sources, numbers of workers, kills, and files that are left out.

    python scripts/benchmarks/data_build.py [--pictures 20000] [--kills 20] [--workers 1 2 4] [--work runs/data-build]

The same pictures are drawn once, as JPEG, and given as a folder with text files, as a table and as tar shards. Every
build must give the same bytes. One build is killed with -9 at random moments and continued by the same command. A
folder in which 1% of the pictures are broken, copied or without a caption must give the store of the other pictures
alone, and a report that names exactly these files. One byte of a store is flipped, and located by ``data validate``.

A small image tokenizer with random weights encodes, since bytes are compared here; ``data_rates.py`` measures rates.
The command goes on where it was stopped: builds that are done stand in ``WORK/builds.jsonl``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import arguments
import numpy as np
import torch
from PIL import Image, ImageDraw

from cogview.checkpoints.image_tokenizer import save_image_tokenizer
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.data.store_blocks import SMALLEST_BLOCK
from cogview.vqvae.model import VQVAE, VQVAEConfig

SHARD = 1000  # pictures in a shard
BATCH = 64  # pictures that are encoded together
SIZE = (96, 72)  # pixels of a picture
COLOURS = ("红色", "黄色", "蓝色", "绿色", "紫色")
SUFFIXES = ("", "-held-out")
FAULTS = {1: "broken", 2: "copied", 3: "without a caption"}  # by the last two digits of the number of a picture


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, build, kill, resume and compare; return 1 if something differs."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("--pictures", type=arguments.count, default=20_000, help="(default: 20000)")
    parser.add_argument("--kills", type=arguments.whole, default=20, help="(default: 20)")
    parser.add_argument("--workers", type=arguments.count, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument(
        "--work", type=arguments.output_folder, default=Path("runs/data-build"), help="(default: runs/data-build)"
    )
    parser.add_argument("--seed", type=arguments.whole, default=0, help="seed of the moments of the kills (default: 0)")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "drawn").exists():
        write_sources(args.work, args.pictures)
        write_faults(args.work, args.pictures)
        write_model(args.work / "model")
        (args.work / "drawn").touch()
    return int(not all([compare_sources(args), compare_faults(args), find_flipped_byte(args)]))


def compare_sources(args: argparse.Namespace) -> bool:
    """Build the stores of all kinds of sources, and one that is killed; return whether they are equal."""
    work = args.work
    sources = {"folder": [work / "pictures"], "table": [work / "table.csv"], "shards": sorted(work.glob("*.tar"))}
    found, longest = set(), 0.0
    for kind, source in sources.items():
        for workers in args.workers:
            done = build(work, source, f"{kind}-{workers}", workers)
            found.add(done["digest"])
            longest = max(longest, float(done["seconds"]))
    done = killed_build(args, sources["table"], longest)
    print(f"killed {len(done['kills'])} times, with these records done: {done['kills']}")
    found.add(done["digest"])
    print("all stores are equal, byte for byte" if len(found) == 1 else f"the stores differ: {sorted(found)}")
    return len(found) == 1


def compare_faults(args: argparse.Namespace) -> bool:
    """Compare the store of a folder with faulty files with that of the other files alone, and read its report."""
    faulty = build(args.work, [args.work / "faulty"], "of-faulty", max(args.workers), status=1)
    good = build(args.work, [args.work / "good"], "of-good", max(args.workers))
    lines = (args.work / "of-faulty-left-out.jsonl").read_text(encoding="utf-8").splitlines()
    named = sorted(Path(json.loads(line)["file"]).name for line in lines)
    expected = sorted(json.loads((args.work / "faults.json").read_text(encoding="utf-8")))
    equal = faulty["digest"] == good["digest"]
    print(f"{len(named)} files are left out and named, {len(expected)} were made: {named == expected}")
    print(f"the store equals that of the other files alone, byte for byte: {equal}")
    return equal and named == expected


def find_flipped_byte(args: argparse.Namespace) -> bool:
    """Flip a byte of a store, and return whether ``data validate`` names the block that has it."""
    store, copy = args.work / f"table-{args.workers[0]}", args.work / "flipped"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    size = (copy / "data.mdb").stat().st_size
    place = random.Random(args.seed).randrange(size)
    with (copy / "data.mdb").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    command = [sys.executable, "-m", "cogview", "data", "validate", str(store), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"byte {place:,} of {size:,} is flipped; status {done.returncode}:\n{done.stdout}", end="")
    return done.returncode == 1 and f"flipped: block {place // SMALLEST_BLOCK} of" in done.stdout


def write_sources(folder: Path, count: int) -> None:
    """Draw pictures and write them as a folder, a table and tar shards, in the same order."""
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        generator = np.random.default_rng(number)
        colours = [tuple(map(int, generator.integers(0, 256, 3))) for _ in range(2)]
        left, top = (int(generator.integers(0, side // 2)) for side in SIZE)
        image = Image.new("RGB", SIZE, colours[0])
        ImageDraw.Draw(image).ellipse((left, top, left + SIZE[0] // 2, top + SIZE[1] // 2), fill=colours[1])
        image.save(pictures / f"{number:08d}.jpg", quality=90)
        caption = f"{COLOURS[number % 5]}背景上的{COLOURS[number // 5 % 5]}椭圆"
        (pictures / f"{number:08d}.txt").write_text(caption, encoding="utf-8")
        rows.append((f"pictures/{number:08d}.jpg", caption))
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(first, min(count, first + SHARD)):
                for suffix in ("jpg", "txt"):
                    archive.add(pictures / f"{number:08d}.{suffix}", arcname=f"{number:08d}.{suffix}")


def write_faults(folder: Path, count: int) -> None:
    """Write a folder of which 1% of the files have each fault, one of the others, and the names of the faulty files."""
    pictures, faulty, good = (folder / name for name in ("pictures", "faulty", "good"))
    faulty.mkdir(exist_ok=True)
    good.mkdir(exist_ok=True)
    names = []
    for number in range(count):
        picture, text = (pictures / f"{number:08d}.{suffix}" for suffix in ("jpg", "txt"))
        fault = FAULTS.get(number % 100)
        for target in (faulty, *(() if fault in ("broken", "without a caption") else (good,))):
            for path in (picture, text):
                (target / path.name).unlink(missing_ok=True)
                os.link(path, target / path.name)
        if fault == "broken":
            (faulty / picture.name).unlink()
            content = picture.read_bytes()
            (faulty / picture.name).write_bytes(content[: len(content) // 2])
        elif fault == "without a caption":
            (faulty / text.name).unlink()
        elif fault == "copied":
            for path in (picture, text):
                shutil.copyfile(path, faulty / f"{path.stem}_copy{path.suffix}")
        if fault:
            names.append(f"{picture.stem}_copy.jpg" if fault == "copied" else picture.name)
    (folder / "faults.json").write_text(json.dumps(names), encoding="utf-8")


def write_model(folder: Path) -> None:
    """Write a model whose image tokenizer is small; its weights are random."""
    shutil.copytree(resolve_checkpoint("cogview-emoji"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["tasks"] = ["generate", "caption"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    shape = VQVAEConfig(channels=(8, 16, 16), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0), num_codes=256)
    save_image_tokenizer(folder / "image", VQVAE(shape))


def command_of(work: Path, source: Sequence[Path], name: str, workers: int) -> list[str]:
    """Return the command of a build."""
    command = [sys.executable, "-m", "cogview", "data", "build", *map(str, source), "-o", str(work / name)]
    command += ["--model", str(work / "model"), "--device", "cpu"]
    return [*command, "--workers", str(workers), "--max-inference-batch-size", str(BATCH)]


def build(work: Path, source: Sequence[Path], name: str, workers: int, status: int = 0) -> dict[str, object]:
    """Build a store unless it is done; return its line in ``builds.jsonl``."""
    if done := finished(work, name):
        return done
    start = time.perf_counter()
    ended = subprocess.run(command_of(work, source, name, workers), capture_output=True, text=True, check=False)
    if ended.returncode != status:
        raise SystemExit(f"{name} ended with status {ended.returncode}, expected {status}: {ended.stderr}")
    return record(work, name, seconds=time.perf_counter() - start)


def killed_build(args: argparse.Namespace, source: Sequence[Path], longest: float) -> dict[str, object]:
    """Kill a build at random moments and continue it; its line names the records that were done at each kill.

    Args:
        args: The command line.
        source: The pictures.
        longest: Seconds of a build that is not killed.
    """
    if done := finished(args.work, "killed"):
        return done
    chance = random.Random(args.seed)
    command = command_of(args.work, source, "killed", max(args.workers))
    journal, kills = args.work / "killed.building" / "journal.jsonl", []
    start = time.perf_counter()
    while len(kills) < args.kills and not (args.work / "killed").exists():
        before = count_lines(journal)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # One kill in four comes while the process starts; the others after a block, within a 20th of the build or so.
        is_early = chance.random() < 0.25
        while not is_early and count_lines(journal) <= max(1, before) and process.poll() is None:
            time.sleep(0.1)
        try:
            process.wait(timeout=chance.uniform(0, 1.5 * longest / args.kills))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills.append(max(0, count_lines(journal) - 1))
    if not (args.work / "killed").exists():
        subprocess.run(command, check=True, capture_output=True)
    return record(args.work, "killed", seconds=time.perf_counter() - start, kills=kills)


def count_lines(path: Path) -> int:
    """Return the number of lines of a file; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def record(work: Path, name: str, **values: object) -> dict[str, object]:
    """Print and write the line of a build that is done."""
    line = {"name": name, "digest": digest_of(work / name), **values}
    with (work / "builds.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    return line


def finished(work: Path, name: str) -> dict[str, object] | None:
    """Return the line of a build that is done."""
    path = work / "builds.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line for line in map(json.loads, lines) if line["name"] == name), None)


def digest_of(store: Path) -> str:
    """Return a hash of the files of the training store and the held-out store."""
    digest = hashlib.sha256()
    for suffix in SUFFIXES:
        digest.update((store.with_name(store.name + suffix) / "data.mdb").read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    arguments.run_script(main)
