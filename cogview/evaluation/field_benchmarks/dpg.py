"""DPG-Bench (Hu et al., arXiv:2403.05135): questions on long prompts, in a graph of dependencies.

The rules are those of ``dpg_bench/compute_dpg_bench.py`` of TencentQQGYLab/ELLA, written anew, without its slips, which
docs/evaluation.md lists. A question whose parent is answered no counts 0, and so do its descendants. The score of a
picture is the share of its questions that count 1; that of a prompt the mean over its pictures; that of the benchmark
the mean over prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogview.errors import InputError
from cogview.evaluation.field_benchmarks.benchmark import (
    Benchmark,
    BenchmarkItem,
    BenchmarkScore,
    expect_keys,
    read_rows,
    result,
)
from cogview.formatting import shorten

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
ANSWERS = {"yes": True, "no": False, "是": True, "否": False}


def read_items(path: Path) -> list[BenchmarkItem]:
    """Return the prompts of ``dpg_bench.csv``, with the parents and the category of each question.

    Raises:
        InputError: A column is missing, or a question has a wrong number, twice the same, or an unknown parent.
    """
    texts: dict[str, str] = {}
    parents: dict[str, dict[int, list[int]]] = defaultdict(dict)
    categories: dict[str, dict[int, str]] = defaultdict(dict)
    for where, values in read_rows(path, COLUMNS):
        key, text = str(values["item_id"]), str(values["text"])
        if texts.setdefault(key, text) != text:
            raise InputError(f'{where}: "{shorten(key, 60)}" has another text than before')
        try:
            number = int(values["proposition_id"])
            found = [int(each) for each in str(values["dependency"]).split(",")]
        except ValueError:
            raise InputError(
                f"{where}: expected a whole number as proposition_id and numbers joined by commas as dependency"
            ) from None
        if number in parents[key]:
            raise InputError(f'{where}: "{shorten(key, 60)}" has question {number} twice')
        parents[key][number] = [each for each in found if each != 0]  # 0: no parent
        categories[key][number] = str(values["tuple"]).split("(")[0].strip()
    for key, graph in parents.items():
        check_graph(graph, f'{path}, "{shorten(key, 60)}"')
    return [
        BenchmarkItem(id=key, prompt=text, details={"parents": parents[key], "categories": categories[key]})
        for key, text in texts.items()
    ]


def check_graph(parents: Mapping[int, Sequence[int]], where: str) -> None:
    """Raise InputError for a question that depends on one that is not there."""
    for number, above in parents.items():
        if unknown := [each for each in above if each not in parents]:
            raise InputError(f"{where}: question {number} depends on question {unknown[0]}, which is not there")


def counted(answers: Mapping[int, bool], parents: Mapping[int, Sequence[int]], *, cascade: bool) -> dict[int, float]:
    """Return 1 for each question that is answered yes, as are its parents, and 0 for the others.

    Args:
        answers: Whether each question is answered yes.
        parents: The questions on which each depends.
        cascade: Whether a question that counts 0 because of a parent takes the count of its children as well, in the
            order of ``parents``.
    """
    counts = {number: float(yes) for number, yes in answers.items()}
    before = counts if cascade else dict(counts)
    for number, above in parents.items():
        if any(before[each] == 0 for each in above):
            counts[number] = 0.0
    return counts


def score(items: Sequence[BenchmarkItem], answers: Path, samples: int) -> BenchmarkScore:
    """Return the score, and the share of questions answered yes in each category.

    Args:
        items: The prompts.
        answers: Rows of ``item_id``, ``picture`` (from 0, row by row of the grid), ``question`` (its proposition_id)
            and ``answer`` (yes or no).
        samples: Pictures of each prompt.
    """
    found = read_answers(answers, [(item.id, item.details["parents"]) for item in items], samples)
    scores, by_category = [], defaultdict(list)
    for item in items:
        of_pictures = []
        for picture in range(samples):
            given = found[item.id, picture]
            of_pictures.append(np.mean(list(counted(given, item.details["parents"], cascade=True).values())))
            for number, category in item.details["categories"].items():
                by_category[category.split("-")[0].strip()].append(float(given[number]))
        scores.append(float(np.mean(of_pictures)))
    results = {"dpg": result(scores)}
    results |= {category: result(by_category[category]) for category in sorted(by_category)}
    return BenchmarkScore(results=results, ids=[item.id for item in items], values={"dpg": list(scores)})


def read_answers(
    path: Path, graphs: Sequence[tuple[str, Mapping[int, Sequence[int]]]], samples: int
) -> dict[tuple[str, int], dict[int, bool]]:
    """Return the answers of each item and picture by question.

    Args:
        path: JSON lines or a table with ``item_id`` (or ``id``), ``picture``, ``question`` and ``answer``.
        graphs: Id and questions of each item.
        samples: Pictures of each item.

    Raises:
        InputError: An answer is missing, is given twice, is of another set, or is neither yes nor no.
    """
    found: dict[tuple[str, int], dict[int, bool]] = defaultdict(dict)
    keys = []
    for where, values in read_rows(path, ("picture", "question", "answer")):
        answer = _answer(values["answer"], where)
        key = values.get("item_id", values.get("id"))
        try:
            picture, question = int(values["picture"]), int(values["question"])
        except (TypeError, ValueError):
            raise InputError(f"{where}: expected whole numbers as picture and question") from None
        if key is None:
            raise InputError(f"{where}: item_id is missing")
        keys.append((str(key), picture, question))
        found[str(key), picture][question] = answer
    expected = [(key, picture, number) for key, graph in graphs for picture in range(samples) for number in graph]
    expect_keys(keys, expected, str(path), "answer")
    return found


def _answer(value: Any, where: str) -> bool:
    text = value.strip().strip(".。").lower() if isinstance(value, str) else value
    if isinstance(text, bool):
        return text
    if text not in ANSWERS:
        raise InputError(f"{where}: expected yes or no as answer, got {shorten(str(value), 60)}")
    return ANSWERS[text]


DPG = Benchmark(
    name="dpg",
    title="DPG-Bench",
    source="dpg_bench/dpg_bench.csv of TencentQQGYLab/ELLA",
    counts={"": 1065},
    samples=4,
    read=read_items,
    layout=lambda position, item, sample, model: f"{item.id}.png",
    grid=True,
    score=score,
)
