"""``cogview eval text-in-pictures``: read the text in pictures, and compare it with the expected text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cogview.cli.evaluate_benchmark import score_lines
from cogview.cli.options import FILE, Command, argument
from cogview.cli.result_file import check_result_path, result_option, save_result
from cogview.formatting import plural

if TYPE_CHECKING:
    from cogview.evaluation.reading_scores import ReadingScore

ENGINES = ("rapidocr", "ddddocr")
MAX_SHOWN = 10  # wrong readings in the table


@click.command(name="text-in-pictures", cls=Command, keeps_results=False)
@argument(
    "file", type=FILE, metavar="FILE", help="a line per picture: its path, from the file's folder, a tab, its text"
)
@click.option("--ocr", "engine", type=click.Choice(ENGINES), default="rapidocr", help="package that reads the pictures")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object per picture, then the results")
@result_option()
def text_in_pictures(file: Path, engine: str, as_json: bool, output: Path | None) -> int:
    """Measure how much of the text in pictures can be read.

    Prints the share of characters in their order, of words, the similarity (1 - normalized edit distance), the share of
    pictures without a mistake, and what was read wrongly. Punctuation, white space and case do not count. ddddocr takes
    a picture for a single line.
    """
    from cogview.evaluation.ocr import compare_all, read_expected, reading_results

    if output is not None:
        check_result_path(output)
    pictures = read_expected(file)
    read = read_pictures([path for path, _ in pictures], engine)
    scores = compare_all(read, [text for _, text in pictures])
    results = reading_results(scores)
    if output is not None:
        _write(output, pictures, engine, scores, results)
    rows = [
        {"picture": str(path), "text": text, "read": found, "exact": score.exact}
        for (path, text), found, score in zip(pictures, read, scores, strict=True)
    ]
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        print(json.dumps({"ocr": engine, "results": results}, ensure_ascii=False))
        return 0
    print(f"{plural(len(rows), 'picture')} read by {engine}")
    print("\n".join(score_lines(results)))
    for row in [row for row in rows if not row["exact"]][:MAX_SHOWN]:
        print(f"{row['picture']}: {row['text']} → {row['read'] or '–'}")
    return 0


def _write(
    output: Path,
    pictures: Sequence[tuple[Path, str]],
    engine: str,
    scores: Sequence[ReadingScore],
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the results with a manifest."""
    from cogview.evaluation.field_benchmarks.manifest import OCR_PACKAGES
    from cogview.evaluation.manifest import Manifest, hash_set
    from cogview.evaluation.model_record import describe_hardware, describe_versions
    from cogview.evaluation.text_files import hash_texts
    from cogview.files import file_sha256

    versions = describe_versions(*OCR_PACKAGES)
    manifest = Manifest(
        measure="text-in-pictures",
        reference=hash_texts("expected texts", {str(n): [text] for n, (_, text) in enumerate(pictures)}),
        candidate=hash_set("pictures", [file_sha256(path) for path, _ in pictures]),
        settings={"ocr": f"{engine} {versions.get(engine, '')}"},
        versions=versions,
        hardware=describe_hardware(),
    )
    columns = {
        "similarity": [score.similarity for score in scores],
        "exact": [float(score.exact) for score in scores],
    }
    items = {"ids": [str(number) for number in range(len(scores))], "values": columns}
    save_result(output, manifest, results, items)


def read_pictures(paths: Sequence[Path], engine: str) -> list[str]:
    """Return the text that is read in each picture, with a progress bar.

    Args:
        paths: The pictures.
        engine: ``rapidocr`` or ``ddddocr``.

    Raises:
        InputError: The engine is not installed, or a picture cannot be read.
    """
    from tqdm import tqdm

    from cogview.evaluation.ocr import open_reader
    from cogview.image_io.reading import read_image

    reader = open_reader(engine)
    return [
        reader(read_image(path).convert("RGB")) for path in tqdm(paths, unit="picture", desc="reading", disable=None)
    ]
