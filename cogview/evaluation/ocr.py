"""Read the text in pictures by optical character recognition, and compare it with the expected text.

``rapidocr`` (PP-OCR) finds lines and reads them from about 10 pixels a character; where it finds none, the whole
picture is read as a line. ``ddddocr`` is an independent second opinion: it takes every picture for one line, is sure
from about 14 pixels on, and knows frequent characters alone. Below these sizes, and in words, a reader guesses from the
language; random characters measure the picture alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from cogview.errors import InputError
from cogview.evaluation.reading_scores import ReadingScore, compare_reading
from cogview.evaluation.text_metrics import resampled_sums, split_characters
from cogview.formatting import shorten
from cogview.tables import read_text

ENGINES = ("rapidocr", "ddddocr")

TextReader: TypeAlias = Callable[[Image.Image], str]  # of an RGB picture; empty where no text is found


def open_reader(engine: str) -> TextReader:
    """Return a function that reads the text in a picture, its lines joined by spaces.

    Args:
        engine: One of ``ENGINES``.

    Raises:
        InputError: The engine is not installed.
    """
    try:
        return _open_rapidocr() if engine == "rapidocr" else _open_ddddocr()
    except ImportError:
        raise InputError(f'text in pictures is read by {engine}; install it: pip install "cogview[eval]"') from None


def _open_rapidocr() -> TextReader:
    import onnxruntime  # noqa: F401  # rapidocr itself asks for it at the first picture
    from rapidocr import RapidOCR

    reader = RapidOCR(params={"Global.log_level": "critical"})

    def read(image: Image.Image) -> str:
        pixels = np.asarray(image)[:, :, ::-1]  # OpenCV's order of channels
        found = reader(pixels)
        if not getattr(found, "txts", None):  # the detector misses one of twenty single characters
            found = reader(pixels, use_det=False, use_cls=False, use_rec=True)
        return " ".join(getattr(found, "txts", None) or ())

    return read


def _open_ddddocr() -> TextReader:
    import ddddocr

    reader = ddddocr.DdddOcr(show_ad=False)
    return lambda image: str(reader.classification(image))


def read_expected(path: Path) -> list[tuple[Path, str]]:
    """Return pictures with the text that each should show.

    Args:
        path: A line per picture: its path, from the file's folder, a tab, and the text.

    Raises:
        InputError: The file cannot be read or is empty, or a line has no tab, no text, or a picture that came before.
    """
    rows: dict[Path, str] = {}
    for number, line in enumerate(read_text(str(path)).rstrip().splitlines(), start=1):
        name, tab, text = line.partition("\t")
        where = f"{path}, line {number}"
        if not tab or not name.strip():
            raise InputError(f"{where}: expected the name of a picture, a tab and its text, got {shorten(line, 60)}")
        if not split_characters(text):
            raise InputError(f"{where}: the text is empty or holds nothing but punctuation")
        picture = path.parent / name.strip()
        if picture in rows:
            raise InputError(f"{where}: {name.strip()} has a text already; expected each picture once")
        rows[picture] = text.strip()
    if not rows:
        raise InputError(f"{path} is empty; expected lines with the name of a picture, a tab and its text")
    return list(rows.items())


def reading_results(scores: Sequence[ReadingScore]) -> dict[str, dict[str, Any]]:
    """Return shares over all pictures with their 95% bootstrap intervals.

    Args:
        scores: The comparison of each picture.

    Returns:
        ``characters`` and ``words``, shares of those of all pictures together; ``similarity`` and ``exact``, means over
        pictures.
    """
    columns = {
        "characters": [(each.right_characters, each.characters) for each in scores],
        "words": [(each.right_words, each.words) for each in scores],
        "similarity": [(each.similarity, 1) for each in scores],
        "exact": [(float(each.exact), 1) for each in scores],
    }
    results = {}
    for name, pairs in columns.items():
        values = np.array(pairs, dtype=np.float64)
        sums = resampled_sums(values)
        low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
        results[name] = {
            "value": float(values[:, 0].sum() / values[:, 1].sum()),
            "low": float(low),
            "high": float(high),
            "n": len(scores),
            "unit": "fraction",
            "higher_is_better": True,
        }
    return results


def compare_all(read: Sequence[str], expected: Sequence[str]) -> list[ReadingScore]:
    """Return the comparison of each text that was read with the expected one."""
    return [compare_reading(*pair) for pair in zip(read, expected, strict=True)]
