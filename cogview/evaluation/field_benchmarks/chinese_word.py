"""ChineseWord (Qwen-Image, arXiv:2508.02324): single characters of the three levels of the standard table (2013).

Neither prompts nor scorer are published. Here a picture is right if the text that was read in it is its character and
nothing else. The total weighs the levels by their sizes: 97.29, 40.53 and 6.48 give 58.30, as Qwen-Image reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogview.errors import InputError
from cogview.evaluation.field_benchmarks.benchmark import (
    Benchmark,
    BenchmarkItem,
    BenchmarkScore,
    columns_of,
    expect_keys,
    mean_of_groups,
    picture_name,
    read_rows,
    result,
)
from cogview.evaluation.reading_scores import is_chinese
from cogview.evaluation.text_metrics import split_characters
from cogview.formatting import shorten

LEVELS = {"1": 3500, "2": 3000, "3": 1605}


def read_items(path: Path) -> list[BenchmarkItem]:
    """Return the prompts of a table with the columns level (1, 2 or 3), text (the character) and prompt.

    Raises:
        InputError: A column is missing, or a text is no single Chinese character.
    """
    items = []
    for where, values in read_rows(path, ("level", "text", "prompt")):
        text = str(values["text"])
        if len(text) != 1 or not is_chinese(text):
            raise InputError(f"{where}: expected one Chinese character as text, got {shorten(text, 60)}")
        items.append(
            BenchmarkItem(
                id=f"U+{ord(text):04X}", prompt=str(values["prompt"]), group=str(values["level"]), details=values
            )
        )
    return items


def score(items: Sequence[BenchmarkItem], answers: Path, samples: int) -> BenchmarkScore:
    """Return the accuracy of each level and of all characters.

    Args:
        items: The prompts.
        answers: Rows of ``picture`` (…/1/U+4E00-0.png) and ``text``, what was read in it; it may be empty.
        samples: Pictures of each prompt.
    """
    read: dict[str, str] = {}
    names = []
    for where, row in read_rows(answers, ("picture",)):
        if not isinstance(row.get("text") or "", str):
            raise InputError(f"{where}: expected a text, got {row['text']}")
        names.append(picture_name(str(row["picture"]), 2))
        read[names[-1]] = row.get("text") or ""
    pictures = {item.id: [layout(0, item, number, "") for number in range(samples)] for item in items}
    expect_keys(names, [name for group in pictures.values() for name in group], str(answers), "picture")
    shares: dict[str, float] = {}
    levels: dict[str, list[float]] = {level: [] for level in LEVELS}
    for item in items:
        expected = split_characters(str(item.details["text"]))
        right = [split_characters(read[name]) == expected for name in pictures[item.id]]
        shares[item.id] = sum(right) / samples
        levels[item.group].append(shares[item.id])
    found = {level: values for level, values in levels.items() if values}
    results: dict[str, Any] = {
        "overall": mean_of_groups(found, weights={level: float(LEVELS[level]) for level in found})
    }
    shown = {level: f"level_{level}" for level in found}
    results |= {shown[level]: result(values) for level, values in found.items()}
    return BenchmarkScore(results=results, ids=list(shares), values=columns_of(items, shares, shown))


def layout(position: int, item: BenchmarkItem, sample: int, model: str) -> str:
    """Return the file of a picture: its level, and the code point of its character."""
    return f"{item.group}/{item.id}-{sample}.png"


CHINESE_WORD = Benchmark(
    name="chinese-word",
    title="ChineseWord",
    source="the standard table of 2013 with prompts of your choice; those of Qwen-Image are not published",
    counts=LEVELS,
    samples=1,
    read=read_items,
    layout=layout,
    score=score,
    answers="texts that were read",
)
