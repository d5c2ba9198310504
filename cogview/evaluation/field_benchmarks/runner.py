"""Generate the pictures of a benchmark in the layout of its scorer; an interrupted run continues.

``FOLDER/pictures`` is the layout. Pictures that are joined to grids are kept in ``FOLDER/single`` as well. A picture
is written under a temporary name and renamed, so that what has its name is complete; it depends on its prompt, the seed
and its number alone. A continued run thus writes what is missing, and the folder equals that of an uninterrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from cogview.errors import InputError
from cogview.evaluation.field_benchmarks.benchmark import Benchmark, BenchmarkItem
from cogview.files import write_json
from cogview.formatting import plural, shorten
from cogview.image_io.png import safe_name, write_png
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest
from cogview.plain_data import parse_json, read_json

PICTURES, SINGLE, RECORD = "pictures", "single", "run.json"
GRID_SIDE = 2  # pictures on a side of a grid
PART = 256  # pictures that are requested together


@dataclass(frozen=True, kw_only=True)
class BenchmarkPictures:
    """How pictures are generated.

    Attributes:
        folder: The output folder.
        samples: Pictures of each prompt.
        seed: Prompt i has the seed ``seed`` + i; picture k of it the number k.
        sampling: Sampling settings.
        max_batch_size: Maximum number of pictures in a batch; None for as many as fit.
    """

    folder: Path
    samples: int
    seed: int
    sampling: Sampling
    max_batch_size: int | None = None


def generate_pictures(
    model: CogView,
    benchmark: Benchmark,
    items: Sequence[BenchmarkItem],
    settings: BenchmarkPictures,
    record: Mapping[str, Any],
) -> int:
    """Generate the pictures of a benchmark that are not there yet.

    Args:
        model: The model.
        benchmark: The benchmark.
        items: Its prompts.
        settings: How they are generated.
        record: What the pictures depend on, plain data; kept in ``FOLDER/run.json``.

    Returns:
        The number of pictures that were generated.

    Raises:
        InputError: The model cannot use a prompt, or the folder holds pictures of another run.
    """
    require_possible(model, benchmark, items, settings.samples)
    keep_record(settings.folder, record)
    name = safe_name(Path(model.name).name)
    root = settings.folder / PICTURES
    grids, missing = [], []
    for position, item in enumerate(items):
        paths = [root / benchmark.layout(position, item, sample, name) for sample in range(settings.samples)]
        if benchmark.grid:
            target = paths[0]
            if target.exists():
                continue
            paths = [settings.folder / SINGLE / f"{position:05}-{sample}.png" for sample in range(settings.samples)]
            grids.append((target, paths))
        missing += [(position, item, sample, path) for sample, path in enumerate(paths) if not path.exists()]
        for other, content in benchmark.files(position, item).items():
            _write_text(root / other, content)
    _generate(model, settings, missing)
    for target, parts in grids:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(target, joined(parts), {})
    return len(missing)


def require_possible(model: CogView, benchmark: Benchmark, items: Sequence[BenchmarkItem], samples: int) -> None:
    """Raise InputError if a model cannot make the pictures of a benchmark."""
    if benchmark.grid and samples not in (1, GRID_SIDE**2):
        raise InputError(
            f"{benchmark.title} joins pictures to a grid: --samples must be 1 or {GRID_SIDE**2}, got {samples}"
        )
    model.require_task("generate")
    problems = [problem for item in items if (problem := model.prompt_problem(item.prompt)) is not None]
    if problems:
        raise InputError(
            f"the model cannot use {len(problems)} of {plural(len(items), 'prompt')}, and none may be left out; "
            f"the first: {problems[0]}"
        )


def keep_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what the pictures of a folder depend on; InputError if the folder has pictures that depend on other things.

    Args:
        folder: The output folder.
        record: Plain data.
    """
    path = folder / RECORD
    record = parse_json(json.dumps(record))  # as it will be read: lists instead of tuples
    if path.is_file():
        before = read_json(path)
        differing = [key for key in record if not isinstance(before, dict) or before.get(key) != record[key]]
        if differing:
            name = differing[0]
            old = before.get(name) if isinstance(before, dict) else None
            raise InputError(
                f"{folder} holds pictures of another run, with another {name} ({shorten(str(old), 40)}, now "
                f"{shorten(str(record[name]), 40)}); choose another folder with -o"
            )
        return
    if (folder / PICTURES).exists():
        raise InputError(f"{folder} holds pictures but no {RECORD}; choose another folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(record))


def _generate(
    model: CogView, settings: BenchmarkPictures, missing: Sequence[tuple[int, BenchmarkItem, int, Path]]
) -> None:
    """Generate pictures and write each as soon as its batch is done."""
    rest: Iterator[tuple[int, BenchmarkItem, int, Path]] = iter(missing)
    with tqdm(total=len(missing), unit="picture", desc="generating", disable=None) as bar:
        while part := list(islice(rest, PART)):
            requests = [
                GenerationRequest(
                    prompt=item.prompt, seed=settings.seed + position, index=sample, sampling=settings.sampling
                )
                for position, item, sample, _ in part
            ]
            images = model.run(requests, batch_size=settings.max_batch_size)
            for (_, _, _, path), image in zip(part, images, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                facts = model.file_metadata(image)  # type: ignore[arg-type]  # no caption is asked for
                facts.pop("log_probability", None)  # its last digits depend on the batch
                write_png(path, image, facts)  # type: ignore[arg-type]
                bar.update()


def joined(paths: Sequence[Path]) -> Image.Image:
    """Return pictures of one size in a grid of two columns, row by row; one picture as it is."""
    images: list[Image.Image] = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    if len(images) == 1:
        return images[0]
    width, height = images[0].size
    grid = Image.new("RGB", (GRID_SIDE * width, GRID_SIDE * height))
    for number, image in enumerate(images):
        grid.paste(image, (number % GRID_SIDE * width, number // GRID_SIDE * height))
    return grid


def _write_text(path: Path, content: str) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")
