"""Measure the memory of what reads many rows: stores of 10^4 to 10^7 rows, tables, and names of files.

    python scripts/benchmarks/data_memory.py [--rows 10000 100000 1000000 10000000] [--parts order stats …]

Each part runs in a process of its own: writing a store, reading a million rows in training order, ``stats``,
``validate`` and ``merge`` of ``cogview data``, opening and reading a table, and pairing the names of pictures and
captions in a folder. Printed are the greatest anonymous memory of the process, and how much more it is than before the
part. Pages of a mapped file are not counted: they are page cache, which all processes share. The stores take 190 bytes
a row in the folder of temporary files, and are removed.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import arguments
import numpy as np

from cogview.cli.main import main as cogview
from cogview.data.sampling_order import sample_index
from cogview.data.sources.names import FilePairs
from cogview.data.sources.open import open_source
from cogview.data.sources.tables import TableOptions
from cogview.data.store import NO_TOKEN, StoreHeader, TokenStore
from cogview.data.store_writer import StoreWriter

WIDTH, CODES, PIECES, GRID = 24, 8192, 506, 8
AT_ONCE = 1 << 14  # rows
SAMPLES = 1_000_000  # that are read in training order


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every part for every number of rows."""
    parser = arguments.Parser(__doc__)
    parser.add_argument(
        "--rows", type=arguments.count, nargs="+", default=[10**4, 10**5, 10**6, 10**7], help="(default: 10⁴…10⁷)"
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="(default: all)")
    parser.add_argument(
        "--measure", nargs=3, metavar=("PART", "ROWS", "FOLDER"), help="measure one part in this process"
    )
    args = parser.parse_args(argv)
    if args.measure:
        part, rows, folder = args.measure
        PARTS[part](int(rows), Path(folder))
        return 0
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            for part in args.parts:
                subprocess.run([sys.executable, __file__, "--measure", part, str(rows), folder], check=True)
    return 0


def write(rows: int, folder: Path) -> None:
    """Write a store of random rows, with 10,000 different texts."""
    with measured("write", rows), StoreWriter(folder / "store", store_header(WIDTH, GRID)) as writer:
        for start in range(0, rows, AT_ONCE):
            count = min(AT_ONCE, rows - start)
            generator = np.random.default_rng(start)
            text = generator.integers(0, PIECES, (count, WIDTH)).astype(np.uint16)
            text[:, 2:] = NO_TOKEN
            text[:, 0] %= 100
            text[:, 1] %= 100
            writer.append({"text": text, "image": generator.integers(0, CODES, (count, GRID**2)).astype(np.uint16)})


def order(rows: int, folder: Path) -> None:
    """Read rows in training order."""
    store = TokenStore(folder / "store")
    with measured("order", rows):
        for start in range(0, SAMPLES, 256):
            store.read(sample_index(0, np.arange(start, start + 256), rows))


def stats(rows: int, folder: Path) -> None:
    """Run ``cogview data stats``."""
    run("stats", rows, str(folder / "store"))


def validate(rows: int, folder: Path) -> None:
    """Run ``cogview data validate``."""
    run("validate", rows, str(folder / "store"))


def merge(rows: int, folder: Path) -> None:
    """Run ``cogview data merge``."""
    run("merge", rows, str(folder / "store"), "-o", str(folder / "merged"))


def table(rows: int, folder: Path) -> None:
    """Open a table of rows, and read it."""
    with (folder / "table.csv").open("w", encoding="utf-8") as file:
        file.write("image,caption\n")
        file.writelines(f"pictures/{number:08d}.jpg,第{number}只狐狸\n" for number in range(rows))
    with measured("table", rows):
        source = open_source(folder / "table.csv", TableOptions(), lambda note: None)
        assert sum(1 for _ in source) == len(source) == rows


def names(rows: int, folder: Path) -> None:
    """Pair the names of pictures and captions."""
    generated = (f"{number * 7919 % rows:08d}.{suffix}" for number in range(rows) for suffix in ("jpg", "txt"))
    with measured("names", rows):
        pairs = FilePairs(generated)
        assert sum(captions is not None for _, _, captions in pairs) == len(pairs) == rows


PARTS: dict[str, Callable[[int, Path], None]] = {
    each.__name__: each for each in (write, order, stats, validate, merge, table, names)
}


def run(name: str, rows: int, *arguments: str) -> None:
    """Run a command of ``cogview data`` without what it prints."""
    with measured(name, rows), contextlib.redirect_stdout(io.StringIO()):
        assert cogview(["data", name, *arguments]) == 0


class measured:  # noqa: N801  used as a function
    """Print the greatest anonymous memory within a block."""

    def __init__(self, name: str, rows: int) -> None:
        self.name, self.rows = name, rows

    def __enter__(self) -> None:
        self.before = self.peak = anonymous_bytes()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        self.start = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()
        print(
            f"{self.rows:>12,} rows, {self.name}: {self.peak / 1e6:.0f} MB, {(self.peak - self.before) / 1e6:.1f} MB "
            f"more than before, {time.process_time() - self.start:.0f} s of CPU",
            flush=True,
        )

    def _watch(self) -> None:
        while not self.done.wait(0.05):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process, without mapped files."""
    lines: Iterator[str] = iter(Path("/proc/self/status").read_text().splitlines())
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def store_header(width: int, grid: int) -> StoreHeader:
    """Return the header of a store of rows of ``width`` pieces and ``grid`` x ``grid`` codes."""
    return StoreHeader(
        fields={"text": width, "image": grid**2},
        grid=grid,
        num_image_codes=CODES,
        num_text_pieces=PIECES,
        layouts=("generate", "caption"),
        codebook_sha256="0" * 64,
        text_sha256="0" * 64,
    )


if __name__ == "__main__":
    arguments.run_script(main)
