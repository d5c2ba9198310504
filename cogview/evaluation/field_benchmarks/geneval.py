"""GenEval (Ghosh et al., arXiv:2310.11513): whether objects, counts, colours and positions are right.

The rules are those of ``evaluation/evaluate_images.py`` and ``summary_scores.py`` of djghosh13/geneval, written anew:

* An object counts above a confidence of 0.3, in the task ``counting`` above 0.9; of a class the 16 most confident ones.
* Of a class that is asked for N times, the N most confident ones alone are checked for colour and position.
* An object is left of another if the offset of their centres, less 0.1 of the sum of their sizes in each direction,
  points there by more than half of the length of the whole offset. Two relations may hold at once.
* ``overall`` is the mean of the six task means, each over all pictures of the task.
"""

from __future__ import annotations

import json
import re
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
    columns_of,
    expect_keys,
    mean_of_groups,
    picture_name,
    read_rows,
    result,
)
from cogview.formatting import shorten

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16  # of a class
POSITION_MARGIN = 0.1  # of the sizes of two objects, within which an offset counts as none
TASKS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}

_NAME = re.compile(r"(\d+)/samples/(\d+)\.png")
_DETECTION = '{"class": …, "score": …, "box": [x0, y0, x1, y1], "color": …}'


def read_items(path: Path) -> list[BenchmarkItem]:
    """Return the prompts of ``evaluation_metadata.jsonl``, or of a translation that changes ``prompt`` alone.

    Raises:
        InputError: A line lacks tag, prompt or include, or they have another form.
    """
    items = []
    for position, (where, values) in enumerate(read_rows(path, ("tag", "prompt", "include"))):
        for clause in ("include", "exclude"):
            requirements = values.get(clause, [])
            if not isinstance(requirements, list) or not all(map(_is_requirement, requirements)):
                raise InputError(f"{where}: {clause} must be a list of objects with class and count")
        for index, requirement in enumerate(values["include"]):
            target = requirement.get("position", ["", -1])[1]
            if "position" in requirement and not 0 <= target < index:
                raise InputError(f"{where}: a position refers to object {target}, which does not stand before it")
        items.append(
            BenchmarkItem(id=f"{position:05}", prompt=str(values["prompt"]), group=str(values["tag"]), details=values)
        )
    return items


def _is_requirement(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("class"), str):
        return False
    position = value.get("position", ["", 0])
    is_position = isinstance(position, list) and len(position) == 2 and isinstance(position[1], int)
    return isinstance(value.get("count"), int) and value["count"] >= 1 and is_position


def score(items: Sequence[BenchmarkItem], answers: Path, samples: int) -> BenchmarkScore:
    """Return the accuracy of each task, of all pictures and of prompts, and ``overall``.

    Args:
        items: The prompts.
        answers: JSON lines, one per picture, with ``filename`` (…/00000/samples/0000.png). Each has ``detections``, a
            list of class, score, box [x0, y0, x1, y1] in pixels and, where a colour is asked for, color; or
            ``correct``, as the benchmark's script writes.
        samples: Pictures of each prompt.
    """
    grades: dict[tuple[str, str], bool] = {}
    found = []
    by_id = {item.id: item for item in items}
    for where, values in read_rows(answers, ("filename",)):
        match = _NAME.fullmatch(picture_name(str(values["filename"]), 3))
        if match is None:
            raise InputError(f"{where}: expected a filename as 00000/samples/0000.png, got {values['filename']}")
        key = (match[1], match[2])
        found.append(key)
        item = by_id.get(match[1])
        if item is not None:
            prompt = values.get("prompt", item.prompt)
            if prompt != item.prompt:
                raise InputError(f"{where} is of another set: its prompt is {shorten(str(prompt), 60)}")
            grades[key] = _grade(values, item, where)
    expect_keys(found, [(item.id, f"{n:04}") for item in items for n in range(samples)], str(answers), "picture")
    shares = {item.id: [grades[item.id, f"{number:04}"] for number in range(samples)] for item in items}
    by_task: dict[str, list[float]] = defaultdict(list)
    for item in items:
        by_task[item.group].append(float(np.mean(shares[item.id])))
    results = {"overall": mean_of_groups(by_task)}
    results |= {task: result(by_task[task]) for task in TASKS if task in by_task}
    results["pictures"] = result([float(np.mean(each)) for each in shares.values()])
    results["prompts"] = result([float(any(each)) for each in shares.values()])
    means = {key: float(np.mean(each)) for key, each in shares.items()}
    columns = columns_of(items, means)
    columns["pictures"] = list(means.values())
    columns["prompts"] = [float(any(each)) for each in shares.values()]
    return BenchmarkScore(results=results, ids=list(shares), values=columns)


def _grade(values: Mapping[str, Any], item: BenchmarkItem, where: str) -> bool:
    if isinstance(values.get("correct"), bool):
        return bool(values["correct"])
    detections = values.get("detections")
    if not isinstance(detections, list):
        raise InputError(f"{where}: expected correct (true or false) or detections, a list of {_DETECTION}")
    for each in detections:
        if not _is_detection(each):
            raise InputError(f"{where}: expected detections as {_DETECTION}, got {shorten(str(each), 60)}")
    return is_correct(detections, item.details, where)


def _is_detection(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("class"), str):
        return False
    box = value.get("box")
    numbers = [value.get("score"), *(box if isinstance(box, list) else [])]
    return len(numbers) == 5 and all(isinstance(each, int | float) and np.isfinite(each) for each in numbers)


def is_correct(detections: Sequence[Mapping[str, Any]], details: Mapping[str, Any], where: str = "") -> bool:
    """Return whether the objects of a picture are those that a prompt asks for.

    Args:
        detections: Objects with ``class``, ``score``, ``box`` and, where a colour is asked for, ``color``.
        details: The prompt's metadata: ``tag``, ``include`` and ``exclude``.
        where: Line of the detections, for messages.

    Raises:
        InputError: An object whose colour is asked for has none.
    """
    objects = objects_by_class(detections, COUNTING_THRESHOLD if details["tag"] == "counting" else THRESHOLD)
    matched: list[list[Mapping[str, Any]]] = []
    correct = True
    for requirement in details["include"]:
        count = requirement["count"]
        found = objects.get(requirement["class"], [])[:count]
        right = len(found) == count
        if right and "color" in requirement:
            if any(not each.get("color") for each in found):
                raise InputError(f'{where}: a detection of "{requirement["class"]}" has no color, which is asked for')
            right = all(each["color"] == requirement["color"] for each in found)
        if right and "position" in requirement:
            relation, target = requirement["position"]
            right = bool(matched[target]) and all(
                relation in relations(each["box"], other["box"]) for each in found for other in matched[target]
            )
        matched.append(found if right else [])
        correct = correct and right
    return correct and all(
        len(objects.get(requirement["class"], [])) < requirement["count"] for requirement in details.get("exclude", [])
    )


def objects_by_class(detections: Sequence[Mapping[str, Any]], threshold: float) -> dict[str, list[Mapping[str, Any]]]:
    """Return the objects above a confidence by class, the most confident first, ``MAX_OBJECTS`` of each at most."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in sorted(detections, key=lambda detection: -detection["score"]):
        if each["score"] > threshold and len(found[each["class"]]) < MAX_OBJECTS:
            found[each["class"]].append(each)
    return found


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Return where an object is: ``left of``, ``right of``, ``above`` or ``below`` another, or none or two of them.

    Args:
        box: The object [x0, y0, x1, y1] in pixels, y downwards.
        other: The other one.
    """
    first, second = np.array(box, dtype=float).reshape(2, 2), np.array(other, dtype=float).reshape(2, 2)
    offset = first.mean(axis=0) - second.mean(axis=0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    beyond = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    tests = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in tests.items() if holds}


GENEVAL = Benchmark(
    name="geneval",
    title="GenEval",
    source="prompts/evaluation_metadata.jsonl of djghosh13/geneval",
    counts=TASKS,
    samples=4,
    read=read_items,
    layout=lambda position, item, sample, model: f"{position:05}/samples/{sample:04}.png",
    files=lambda position, item: {f"{position:05}/metadata.jsonl": json.dumps(item.details, ensure_ascii=False)},
    score=score,
    answers="detections",
)
