"""GEdit-Bench (arXiv:2504.17761) and ImgEdit (arXiv:2505.20275): grades of edited pictures.

A vision-language model of each benchmark grades the pictures; these scorers average its grades by the rules of
``GEdit-Bench/calculate_statistics.py`` of stepfun-ai/Step1X-Edit and of ``Benchmark/Basic`` of PKU-YuanGroup/ImgEdit,
written anew.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
    read_rows,
    result,
)
from cogview.formatting import shorten
from cogview.plain_data import read_json

GEDIT_TASKS = {
    "background_change": 40,
    "color_alter": 40,
    "material_alter": 40,
    "motion_change": 40,
    "ps_human": 70,
    "style_change": 60,
    "subject-add": 60,
    "subject-remove": 57,
    "subject-replace": 60,
    "text_change": 99,
    "tone_transfer": 40,
}
IMGEDIT_TYPES = {
    "extract": 117,
    "style": 100,
    "add": 95,
    "adjust": 94,
    "background": 94,
    "replace": 92,
    "remove": 86,
    "action": 36,
    "compose": 23,
}


def read_gedit(path: Path) -> list[BenchmarkItem]:
    """Return the instructions of one language: rows of key, task_type, instruction, instruction_language.

    Raises:
        InputError: A column is missing, or the rows have several languages, whose scores are kept apart.
    """
    names = ("key", "task_type", "instruction", "instruction_language")
    rows = read_rows(path, names)
    languages = sorted({str(values["instruction_language"]) for _, values in rows})
    if len(languages) > 1:
        raise InputError(f"{path} has instructions in {', '.join(languages)}; expected one language, cn or en")
    return [
        BenchmarkItem(
            id=str(values["key"]), prompt=str(values["instruction"]), group=str(values["task_type"]), details=values
        )
        for _, values in rows
    ]


def read_imgedit(path: Path) -> list[BenchmarkItem]:
    """Return the instructions of ``basic_edit.json``: by key an object with id, prompt and edit_type.

    Raises:
        InputError: The file has another form.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(map(_is_edit, content.values())):
        raise InputError(f"{path}: expected by key an object with id (the picture), prompt and edit_type")
    return [
        BenchmarkItem(id=key, prompt=values["prompt"], group=values["edit_type"], details=values)
        for key, values in content.items()
    ]


def _is_edit(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("id", "prompt", "edit_type"))


def score_gedit(items: Sequence[BenchmarkItem], answers: Path, samples: int) -> BenchmarkScore:
    """Return semantics, quality and their geometric mean, each the mean of the means of the tasks, in [0, 10].

    Args:
        items: The instructions.
        answers: Rows of key, semantics and quality, each grade in [0, 10].
        samples: Not used: each instruction has one picture.
    """
    grades = dict(_grades(answers, "key", ("semantics", "quality"), (0, 10), items))
    overall = {key: math.sqrt(semantics * quality) for key, (semantics, quality) in grades.items()}
    columns = {
        "overall": overall,
        "semantics": {key: each[0] for key, each in grades.items()},
        "quality": {key: each[1] for key, each in grades.items()},
    }
    by_name = {name: _by_group(items, values) for name, values in columns.items()}
    results = {name: mean_of_groups(groups, "grade") for name, groups in by_name.items()}
    results |= {task: result(values, "grade") for task, values in by_name["overall"].items()}
    return BenchmarkScore(results=results, ids=[item.id for item in items], values=columns_of(items, overall))


def score_imgedit(items: Sequence[BenchmarkItem], answers: Path, samples: int) -> BenchmarkScore:
    """Return the mean of three grades by type, and their mean over pictures and over types, in [1, 5].

    Args:
        items: The instructions.
        answers: Rows of key and grades, a list of the three grades in [1, 5].
        samples: Not used: each instruction has one picture.
    """
    means = {key: sum(each) / 3 for key, each in _grades(answers, "key", ("grades",) * 3, (1, 5), items)}
    groups = _by_group(items, means)
    results = {"overall": result(list(means.values()), "grade"), "mean_of_types": mean_of_groups(groups, "grade")}
    results |= {name: result(values, "grade") for name, values in groups.items()}
    pictures: list[float | None] = [means[item.id] for item in items]
    columns = {"overall": pictures, **columns_of(items, means)}
    return BenchmarkScore(results=results, ids=[item.id for item in items], values=columns)


def _grades(
    path: Path, key: str, names: Sequence[str], span: tuple[int, int], items: Sequence[BenchmarkItem]
) -> Iterator[tuple[str, list[float]]]:
    """Yield the grades of each item; InputError for grades out of range, or of other items than the instructions."""
    found = []
    for where, row in read_rows(path, (key, names[0])):
        values: Any = row[names[0]] if len(set(names)) == 1 else [row.get(name) for name in names]
        try:
            grades = [float(each) for each in values]
        except (TypeError, ValueError):
            grades = []
        if len(grades) != len(names) or not all(span[0] <= each <= span[1] for each in grades):
            columns = ", ".join(dict.fromkeys(names))
            raise InputError(
                f"{where}: expected {len(names)} grades in [{span[0]}, {span[1]}] as {columns}, "
                f"got {shorten(str(values), 60)}"
            )
        found.append((str(row[key]), grades))
    expect_keys([each for each, _ in found], [item.id for item in items], str(path), "item")
    yield from found


def _by_group(items: Sequence[BenchmarkItem], values: dict[str, float]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for item in items:
        groups[item.group].append(values[item.id])
    return groups


GEDIT = Benchmark(
    name="gedit",
    title="GEdit-Bench",
    source="the data set stepfun-ai/GEdit-Bench, one language, without its pictures, as JSON lines",
    counts=GEDIT_TASKS,
    samples=1,
    read=read_gedit,
    layout=lambda position, item, sample, model: (
        f"{model}/fullset/{item.group}/{item.details['instruction_language']}/{item.id}.png"
    ),
    score=score_gedit,
    answers="grades",
    unique=False,
    edits=True,
)
IMGEDIT = Benchmark(
    name="imgedit",
    title="ImgEdit-Bench",
    source="Benchmark/Basic/basic_edit.json of PKU-YuanGroup/ImgEdit",
    counts=IMGEDIT_TYPES,
    samples=1,
    read=read_imgedit,
    layout=lambda position, item, sample, model: f"{item.id}.png",
    score=score_imgedit,
    answers="grades",
    unique=False,
    edits=True,
)
