"""Measure ``cogview data build`` against its tokenizer alone, and reading a store against a LMDB dataset of CogView v1.

    python scripts/benchmarks/data_rates.py [build] [read] [--pictures 256] [--repetitions 9] [--model cogview-emoji]

**build.** The tokenizer alone, in one process, reads JPEG files, fits them and encodes them; a build does the same and
writes a store. Both take turns, so that other work on the machine delays both, and each ratio is that of two
neighbours. CPU seconds count worker processes too, and hardly depend on other work.

**read.** Both readers read the same rows in random order, in batches of 64, as int64 tensors. The v1 dataset holds, as
CogView v1 did, a pickle of int64 text ids and codes for each row under its decimal number; its reader opens a
transaction for each row, unpickles it (arrays alone, so that nothing in it is run), and pads the text.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import arguments
import lmdb
import numpy as np
import torch
from data_memory import CODES, PIECES, store_header
from PIL import Image, ImageDraw

from cogview.cli.data import open_build
from cogview.data.builders.encode import encode_renditions
from cogview.data.builders.pictures import StorePaths
from cogview.data.builders.prepare import fit_picture
from cogview.data.sources.open import open_source
from cogview.data.sources.tables import TableOptions
from cogview.data.store import NO_TOKEN, TokenStore, as_tensors
from cogview.data.store_writer import StoreWriter, pad_text
from cogview.image_io.reading import read_image

BATCH = 64
ARRAY_GLOBALS = {
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.numeric", "_frombuffer"): lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(
        shape, order=order
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments name, both by default."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("parts", nargs="*", help="build, read; both by default")
    parser.add_argument("--pictures", type=arguments.count, default=256, help="pictures of a build (default: 256)")
    parser.add_argument(
        "--rows", type=arguments.count, default=100_000, help="rows of the stores that are read (default: 100000)"
    )
    parser.add_argument("--repetitions", type=arguments.count, default=9, help="(default: 9)")
    parser.add_argument("--model", default="cogview-emoji", help="(default: cogview-emoji)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if "build" in (args.parts or ["build"]):
            measure_build(Path(folder), args)
        if "read" in (args.parts or ["read"]):
            for grid, width in ((8, 24), (32, 64)):
                measure_reading(Path(folder) / f"{grid}", args.rows * 8 // grid, grid, width, args.repetitions)
    return 0


def measure_build(folder: Path, args: argparse.Namespace) -> None:
    """Print the rates of builds against that of the tokenizer alone."""
    draw(folder / "pictures", args.pictures)
    settings = {"fit": "crop", "held_out": 0.05, "simplified": False, "num_workers": 0}
    task = open_build(folder / "store", args.model, settings, BATCH, "cpu")
    sides = {name: round(task.side * scale) for name, scale in task.settings.scales.items()}
    paths = sorted((folder / "pictures").glob("*.jpg"))

    def alone() -> None:
        for first in range(0, len(paths), BATCH):
            opened = map(read_image, paths[first : first + BATCH])
            images = [{name: fit_picture(image, side, "crop") for name, side in sides.items()} for image in opened]
            encode_renditions(images, task.image_tokenizer)

    def build(workers: int) -> None:
        shutil.rmtree(folder / "stores", ignore_errors=True)
        (folder / "stores").mkdir()
        source = {"pictures": open_source(folder / "pictures", TableOptions(), print)}
        changed = replace(task.settings, num_workers=workers)
        replace(task, sources=source, settings=changed, paths=StorePaths(store=folder / "stores" / "s")).run()

    print(f"{len(paths)} JPEG files of 320 x 240; {args.model}, sides {list(sides.values())}; torch threads: "
          f"{torch.get_num_threads()}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    alone()
    for workers in (0, 1):
        pairs = [(measured(alone), measured(lambda: build(workers))) for _ in range(args.repetitions)]  # noqa: B023
        for name, index in (("rate", 0), ("CPU time", 1)):
            ratios = sorted(own[index] / built[index] for own, built in pairs)
            own, built = (statistics.median(pair[part][index] for pair in pairs) for part in (0, 1))
            print(
                f"{workers} workers, {name}: build against alone {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}); {1000 * own / len(paths):.1f} and "
                f"{1000 * built / len(paths):.1f} ms a picture",
                flush=True,
            )


def measure_reading(folder: Path, rows: int, grid: int, width: int, repetitions: int) -> None:
    """Print bytes and rates of a token store and a v1 dataset of the same rows."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(width // 4, width + 1, rows)
    texts = [generator.integers(0, PIECES, length) for length in lengths]
    codes = generator.integers(0, CODES, (rows, grid**2))
    with StoreWriter(folder / "store", store_header(width, grid)) as writer:
        writer.append({"text": pad_text(texts, width), "image": codes.astype(np.uint16)})
    with lmdb.open(str(folder / "v1"), map_size=1 << 36) as target, target.begin(write=True) as transaction:
        transaction.put(b"length", str(rows).encode())
        for number, (text, row) in enumerate(zip(texts, codes, strict=True)):
            transaction.put(str(number).encode(), pickle.dumps((text + CODES, row), protocol=pickle.HIGHEST_PROTOCOL))
    sizes = [(folder / name / "data.mdb").stat().st_size / rows for name in ("v1", "store")]
    store, v1 = TokenStore(folder / "store"), V1Reader(folder / "v1", width)
    order = np.random.default_rng(1).permutation(rows).reshape(-1)[: 20_000 // BATCH * BATCH].reshape(-1, BATCH)

    def read(reader: Callable[[np.ndarray], dict[str, torch.Tensor]]) -> Callable[[], None]:
        return lambda: [reader(batch) for batch in order] and None

    ours = read(lambda batch: as_tensors(store.read(batch)))
    first, second = v1.read(order[0]), as_tensors(store.read(order[0]))
    assert all(torch.equal(first[name], second[name]) for name in first)
    pairs = [(measured(read(v1.read)), measured(ours)) for _ in range(repetitions)]
    ratios = sorted(old[0] / new[0] for old, new in pairs)
    old, new = (statistics.median(pair[part][0] for pair in pairs) / order.size for part in (0, 1))
    print(
        f"{rows} rows of {width} pieces and {grid**2} codes: v1 {sizes[0]:.0f} bytes a row and {1 / old:,.0f} rows/s, "
        f"store {sizes[1]:.0f} bytes ({sizes[1] / sizes[0]:.2f}) and {1 / new:,.0f} rows/s: "
        f"{statistics.median(ratios):.1f} times ({ratios[0]:.1f} to {ratios[-1]:.1f})",
        flush=True,
    )


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle numpy's arrays at the speed of pickle; any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a global that an array needs."""
        return ARRAY_GLOBALS[module.replace("_core", "core"), name]


class V1Reader:
    """Reads a LMDB dataset as CogView v1 did, a row at a time."""

    def __init__(self, path: Path, width: int) -> None:
        self.environment = lmdb.open(
            str(path), max_readers=32, readonly=True, lock=False, readahead=False, meminit=False
        )
        self.width = width

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Return a row with its text padded."""
        with self.environment.begin(write=False) as transaction:
            text, codes = ArrayUnpickler(io.BytesIO(transaction.get(str(index).encode()))).load()
        padded = np.pad(text - CODES, (0, self.width - len(text)), constant_values=NO_TOKEN)
        return {"text": padded, "image": codes}

    def read(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Return rows as int64 tensors."""
        return torch.utils.data.default_collate([self.row(int(index)) for index in indices])


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that work takes, and its CPU seconds with those of processes that it started."""
    start, before = time.perf_counter(), os.times()
    work()
    seconds, after = time.perf_counter() - start, os.times()
    return seconds, sum(after[:4]) - sum(before[:4])


def draw(folder: Path, count: int) -> None:
    """Draw pictures with captions."""
    folder.mkdir()
    for number in range(count):
        generator = np.random.default_rng(number)
        left, top, *values = (int(value) for value in generator.integers(0, 120, 8))
        image = Image.new("RGB", (320, 240), tuple(2 * value for value in values[:3]))
        ImageDraw.Draw(image).ellipse((left, top, left + 200, top + 120), fill=tuple(2 * value for value in values[3:]))
        image.save(folder / f"{number:08d}.jpg", quality=90)
        (folder / f"{number:08d}.txt").write_text("蓝色背景上的红色椭圆", encoding="utf-8")


if __name__ == "__main__":
    arguments.run_script(main)
