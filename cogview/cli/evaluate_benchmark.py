"""``cogview eval benchmark``: generate the pictures of a benchmark of the field, and score detections or answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.benchmark_distances import DistanceOptions, distance_options, measure_distances
from cogview.cli.options import (
    FILE,
    Command,
    ModelOptions,
    argument,
    model_options,
    option_group,
    output_option,
    sampling_options,
)
from cogview.cli.result_file import check_result_path, save_result
from cogview.errors import InputError
from cogview.formatting import aligned_columns, plural

if TYPE_CHECKING:
    from cogview.evaluation.field_benchmarks.benchmark import Benchmark, BenchmarkItem, BenchmarkScore

RESULT_FILE = "result.json"
READ_TEXTS = "texts that were read"  # answers of benchmarks whose pictures OCR judges
NAMES = ("coco-30k", "geneval", "dpg", "oneig-zh", "chinese-word", "gedit", "imgedit")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """The prompts of a benchmark, how many pictures they get, and what is scored."""

    prompts: Path
    answers: Path | None
    ocr: str | None
    samples: int | None
    seed: int
    subset: bool


@click.command(name="benchmark", cls=Command)
@argument("name", type=click.Choice(NAMES), metavar="NAME", help=f"benchmark: {', '.join(NAMES)}")
@option_group(
    BenchmarkOptions,
    "options",
    ("prompts", "answers", "ocr", "samples", "seed", "subset"),
    click.option(
        "--prompts",
        required=True,
        type=FILE,
        metavar="FILE",
        help="prompts of the benchmark, which are not part of CogView",
    ),
    click.option(
        "--answers",
        "--detections",
        "answers",
        type=FILE,
        metavar="FILE",
        help="score these detections or answers instead of generating pictures",
    ),
    click.option(
        "--ocr",
        type=click.Choice(["rapidocr", "ddddocr"]),
        show_default="none",
        help="chinese-word: read the pictures with this package, and score what was read",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1, max=1000),
        metavar="COUNT",
        show_default="that of the benchmark",
        help="number of pictures per prompt",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        metavar="NUMBER",
        help="random seed; prompt i, counted from 0, has the seed NUMBER + i",
    ),
    click.option("--subset", is_flag=True, help="accept a part of the prompts, whose scores cannot be compared"),
)
@output_option(required=True, help="folder for the pictures and the result")
@distance_options()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@sampling_options("codes", image_options=True)
@model_options("pictures")
def benchmark(
    name: str,
    options: BenchmarkOptions,
    output: Path,
    as_json: bool,
    settings: dict[str, Any],
    model: ModelOptions,
    distances: DistanceOptions,
) -> int:
    """Generate the pictures of a benchmark, or score its answers.

    Pictures are written to OUTPUT/pictures in the layout of the benchmark's scorer; the same command continues a run
    that was interrupted. With --answers, no picture is generated: the file has the detections or answers of the
    benchmark's judge, and OUTPUT/result.json gets the scores.
    """
    from cogview.evaluation.field_benchmarks.catalogue import BENCHMARKS

    chosen = BENCHMARKS[name]
    items = chosen.read_items(options.prompts, subset=options.subset)
    samples = options.samples or chosen.samples
    if distances.reference is not None or options.ocr is not None or options.answers is not None:
        check_result_path(output / RESULT_FILE)
    if distances.reference is not None:
        measured = {"samples": samples, "subset": options.subset}
        manifest, results, curves = measure_distances(chosen, items, samples, output, distances, measured)
        _print_score(chosen, results, as_json=as_json)
        save_result(output / RESULT_FILE, manifest, results, curves=curves)
        return 0
    if options.ocr is not None:
        options = replace(options, answers=_read(chosen, items, samples, options, output))
    if options.answers is not None:
        score = chosen.score(items, options.answers, samples)
        _print_score(chosen, score.results, as_json=as_json)
        _write_score(chosen, items, samples, options, output, score)
        return 0
    made = _generate(chosen, items, samples, options, settings, model, output)
    facts = {"benchmark": name, "prompts": len(items), "samples": samples, "generated": made}
    if as_json:
        print(json.dumps({**facts, "folder": str(output / "pictures")}, ensure_ascii=False))
        return 0
    print(output / "pictures")
    total = plural(len(items) * samples, "picture")
    print(f"{total} of {chosen.title}, generated now: {made}", file=sys.stderr)
    if chosen.name == "coco-30k":
        print("now compare them with true pictures: --reference PICTURES", file=sys.stderr)
        return 0
    print(
        f"now let the benchmark's judge look at them, and score its {chosen.answers} with --answers FILE",
        file=sys.stderr,
    )
    return 0


def _read(chosen: Benchmark, items: list[BenchmarkItem], samples: int, options: BenchmarkOptions, output: Path) -> Path:
    """Read the pictures of a benchmark; return the file of what was read."""
    from cogview.cli.evaluate_reading import read_pictures
    from cogview.files import append_json_line, atomic_write

    if chosen.answers != READ_TEXTS or options.answers is not None:
        raise InputError(
            "--ocr reads the pictures of chinese-word, and takes the place of --answers; leave one of them out"
        )
    root = output / "pictures"
    paths = [root / chosen.layout(number, item, k, "") for number, item in enumerate(items) for k in range(samples)]
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError(
            f"{len(missing)} of {plural(len(paths), 'picture')} are missing, first {missing[0]}; the same command "
            "without --ocr generates them"
        )
    target = output / f"{options.ocr}.jsonl"
    read = read_pictures(paths, str(options.ocr))
    with atomic_write(target) as temporary:
        for path, text in zip(paths, read, strict=True):
            append_json_line(temporary, {"picture": str(path.relative_to(root)), "text": text})
    return target


def _generate(
    chosen: Benchmark,
    items: list[BenchmarkItem],
    samples: int,
    options: BenchmarkOptions,
    settings: dict[str, Any],
    model: ModelOptions,
    output: Path,
) -> int:
    """Generate the pictures that are not there yet; return their number."""
    from cogview.cli.session import note_unknown_words, open_model
    from cogview.config_io import to_mapping
    from cogview.evaluation.field_benchmarks.runner import BenchmarkPictures, generate_pictures
    from cogview.evaluation.manifest import hash_prompts
    from cogview.evaluation.model_record import describe_model
    from cogview.image_io.png import prepared_folder

    if chosen.edits:
        raise InputError(
            f"{chosen.title} edits pictures, which no model of this version can do; give --answers with the grades of "
            "pictures that were edited by other means"
        )
    with prepared_folder(output):
        opened = open_model(model, ["generate"])
        picture_settings = BenchmarkPictures(
            folder=output,
            samples=samples,
            seed=options.seed,
            sampling=opened.sampling(**settings),
            max_batch_size=model.max_batch_size,
        )
        record = {
            "benchmark": chosen.name,
            "prompts": asdict(hash_prompts([item.prompt for item in items])),
            "samples": samples,
            "seed": options.seed,
            "sampling": to_mapping(picture_settings.sampling),
            "model": asdict(describe_model(opened)),
        }
        note_unknown_words(opened, [item.prompt for item in items])
        return generate_pictures(opened, chosen, items, picture_settings, record)


def _write_score(
    chosen: Benchmark,
    items: list[BenchmarkItem],
    samples: int,
    options: BenchmarkOptions,
    output: Path,
    score: BenchmarkScore,
) -> None:
    """Write the scores with a manifest as ``result.json``."""
    from cogview.evaluation.field_benchmarks.manifest import describe_score

    settings = {"samples": samples, "subset": options.subset, "ocr": options.ocr}
    manifest = describe_score(chosen, items, Path(str(options.answers)), output, settings)
    items_of_score = {"ids": score.ids, "values": score.values}
    save_result(output / RESULT_FILE, manifest, score.results, items_of_score)


def _print_score(chosen: Benchmark, results: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"benchmark": chosen.name, "results": results}, ensure_ascii=False))
        return
    print("\n".join(score_lines(results)))


def score_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a table of results with their intervals."""
    rows = [["", "score", "95% interval", "n", "unit"]]
    for name, found in results.items():
        interval = "–" if found["low"] is None else f"{found['low']:.4f}–{found['high']:.4f}"
        rows.append([name, f"{found['value']:.4f}", interval, str(found["n"]), found["unit"]])
    return aligned_columns(rows, left={0, 4})
