"""OneIG-Bench-ZH (Chang et al., arXiv:2506.07977): alignment, text, reasoning, style and diversity of Chinese prompts.

The rules are those of ``scripts/`` of OneIG-Bench/OneIG-Benchmark, written anew. Alignment and text are computed from
answers and from texts that were read. Reasoning, style and diversity are means of scores that networks of the benchmark
give (LLM2CLIP, CSD and OneIG-StyleEncoder, DreamSim): they are read from files.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
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
from cogview.evaluation.field_benchmarks.dpg import check_graph, counted, read_answers
from cogview.evaluation.reading_scores import edit_distance, is_chinese
from cogview.plain_data import parse_json, read_json

FOLDERS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
COUNTS = {"anime": 245, "human": 244, "object": 206, "text": 200, "reasoning": 225, "multilingualism": 200}
ALIGNED = ("anime", "human", "object", "multilingualism")
PROMPTS, TEXTS, QUESTIONS = "OneIG-Bench-ZH.csv", "scripts/text/text_content_zh.csv", "scripts/alignment/Q_D"
MAX_DISTANCE = 50  # edits at which the text score takes nothing more off; of the English set it is 100
NOT_TEXT = ("addCriterion", "No text recognized.")  # what the benchmark's reader says without having read anything

_KEPT = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"


def read_items(path: Path) -> list[BenchmarkItem]:
    """Return the prompts with questions and expected texts.

    Args:
        path: The folder of the benchmark, or its ``OneIG-Bench-ZH.csv`` alone, which is enough to generate pictures.

    Raises:
        InputError: A file is missing, a category is unknown, or a question depends on one that is not there.
    """
    questions: dict[str, dict[int, list[int]]] = {}
    texts: dict[str, str] = {}
    if path.is_dir():
        for folder in ALIGNED:
            questions |= _read_questions(path / QUESTIONS / f"{folder}_zh.json", folder)
        texts = {f"text/{row['id']}": row["text_content"] for _, row in read_rows(path / TEXTS, ("id", "text_content"))}
        path /= PROMPTS
    items = []
    for where, values in read_rows(path, ("category", "id", "prompt_cn")):
        folder = FOLDERS.get(values["category"], "")
        if not folder:
            raise InputError(f"{where}: the category is {values['category']}; expected one of {', '.join(FOLDERS)}")
        key = f"{folder}/{values['id']}"
        details = {"parents": questions.get(key), "text": texts.get(key), "style": values.get("class") or ""}
        items.append(BenchmarkItem(id=key, prompt=values["prompt_cn"], group=folder, details=details))
    return items


def _read_questions(path: Path, folder: str) -> dict[str, dict[int, list[int]]]:
    """Return the parents of each question of each item of a category."""
    content = read_json(path)
    found = {}
    try:
        for name, item in content.items():
            graph = item["dependency"]
            graph = parse_json(graph) if isinstance(graph, str) else graph  # the files hold JSON as text
            parents = {int(number): [int(each) for each in above if each] for number, above in graph.items()}
            check_graph(parents, f'{path}, "{name}"')
            found[f"{folder}/{name}"] = parents
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: expected an object with question and dependency for each id") from None
    return found


def score(items: Sequence[BenchmarkItem], answers: Path, samples: int) -> BenchmarkScore:
    """Return the scores of the dimensions whose answers are there.

    Args:
        items: The prompts.
        answers: Folder with ``alignment.jsonl`` (item_id such as object/000, picture, question, answer), ``text.jsonl``
            (item_id, picture, text: what was read), and ``reasoning.jsonl``, ``style.jsonl`` and ``diversity.jsonl``
            (item_id, score: the mean over its pictures).
        samples: Pictures of each prompt.
    """
    names = ("alignment", "text", "reasoning", "style", "diversity")
    files = {name: answers / f"{name}.jsonl" for name in names}
    present = {name: path for name, path in files.items() if path.is_file()}
    if not present:
        raise InputError(
            f"{answers} holds no answers; expected one of {', '.join(path.name for path in files.values())}"
        )
    results: dict[str, Any] = {}
    values: dict[str, dict[str, float]] = {}
    for name, path in present.items():
        if name == "alignment":
            values[name] = _alignment(_with(items, "parents", ALIGNED), path, samples)
            results[name] = result(list(values[name].values()))
            for folder in ALIGNED:
                if part := [value for key, value in values[name].items() if key.startswith(f"{folder}/")]:
                    results[f"{name}/{folder}"] = result(part)
        elif name == "text":
            results |= text_scores(_with(items, "text", ("text",)), path, samples)
        else:
            wanted = [item for item in items if _is_scored(item, name)]
            values[name] = _given_scores(wanted, path)
            results[name] = result(list(values[name].values()))
    ids = [item.id for item in items]
    columns: dict[str, list[float | None]] = {name: [found.get(key) for key in ids] for name, found in values.items()}
    return BenchmarkScore(results=results, ids=ids, values=columns)


def _with(items: Sequence[BenchmarkItem], key: str, groups: Sequence[str]) -> list[BenchmarkItem]:
    """Return the items of groups; InputError for one without questions or an expected text."""
    found = [item for item in items if item.group in groups]
    if lacking := [item for item in found if not item.details[key]]:
        raise InputError(
            f"the questions and texts of {lacking[0].id} are missing; give the folder of the benchmark as --prompts, "
            f"with {PROMPTS}, {QUESTIONS} and {TEXTS}"
        )
    if not found:
        raise InputError(f"the prompts have none of {', '.join(groups)}, which the answers are about")
    return found


def _is_scored(item: BenchmarkItem, dimension: str) -> bool:
    """Return whether an item has a score of a dimension: style is that of prompts that name one."""
    if dimension == "style":
        return item.group == "anime" and bool(item.details["style"])
    return dimension == "diversity" or item.group == dimension


def _alignment(items: Sequence[BenchmarkItem], path: Path, samples: int) -> dict[str, float]:
    """Return the alignment of each item: a question whose parent is answered no counts 0, but not its grandchildren."""
    found = read_answers(path, [(item.id, item.details["parents"]) for item in items], samples)
    scores = {}
    for item in items:
        counts = [
            counted(found[item.id, picture], item.details["parents"], cascade=False) for picture in range(samples)
        ]
        scores[item.id] = float(np.mean([np.mean(list(each.values())) for each in counts]))
    return scores


def _given_scores(items: Sequence[BenchmarkItem], path: Path) -> dict[str, float]:
    rows = [(str(row["item_id"]), row["score"], where) for where, row in read_rows(path, ("item_id", "score"))]
    expect_keys([key for key, _, _ in rows], [item.id for item in items], str(path), "item")
    for _, value, where in rows:
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise InputError(f"{where}: expected a number as score, got {value}")
    return {key: float(value) for key, value, _ in rows}


def text_scores(items: Sequence[BenchmarkItem], path: Path, samples: int) -> dict[str, dict[str, Any]]:
    """Return the scores of rendered text.

    Args:
        items: Prompts with expected texts.
        path: Rows of item_id, picture and text, what was read in it; it may be empty.
        samples: Pictures of each prompt.

    Returns:
        ``text/edit_distance``, the mean over pictures in characters; ``text/complete``, the share of pictures without
        an edit; ``text/words``, the share of expected characters (words, where the text is not Chinese) in any order,
        over all pictures together; and ``text``: 1 - min(50, distance) (1 - complete) (1 - words) / 50.
    """
    read: dict[tuple[str, int], str] = {}
    keys = []
    for where, row in read_rows(path, ("item_id", "picture")):
        if not isinstance(row.get("text") or "", str) or isinstance(row["picture"], bool):
            raise InputError(f"{where}: expected a text, and a whole number as picture")
        try:
            key = (str(row["item_id"]), int(row["picture"]))
        except (TypeError, ValueError):
            raise InputError(f"{where}: expected a whole number as picture") from None
        keys.append(key)
        read[key] = row.get("text") or ""
    expect_keys(keys, [(item.id, number) for item in items for number in range(samples)], str(path), "picture")
    totals = defaultdict(list)
    for item in items:
        for number in range(samples):
            for name, value in compare_text(read[item.id, number], item.details["text"]).items():
                totals[name].append(value)
    distance, complete = result(totals["distance"], "characters"), result(totals["complete"])
    distance["higher_is_better"] = False
    share = sum(totals["right"]) / sum(totals["of"])
    value = 1 - min(MAX_DISTANCE, distance["value"]) * (1 - complete["value"]) * (1 - share) / MAX_DISTANCE
    without = {"low": None, "high": None, "n": len(keys), "unit": "fraction", "higher_is_better": True}
    return {
        "text": {"value": value, **without},
        "text/edit_distance": distance,
        "text/complete": complete,
        "text/words": {"value": share, **without},
    }


def compare_text(read: str, expected: Mapping[str, Any] | str) -> dict[str, float]:
    """Return ``distance``, ``complete``, and of ``of`` expected characters or words those that were ``right``."""
    for phrase in NOT_TEXT:
        read = read.replace(phrase, "")
    found, wanted = clean_text(read), clean_text(str(expected))
    distance = edit_distance(found, wanted)
    split = list if is_chinese(wanted) else str.split
    first, second = Counter(split(found)), Counter(split(wanted))
    return {
        "distance": distance,
        "complete": float(distance == 0),
        "right": (first & second).total(),
        "of": second.total(),
    }


def clean_text(text: str) -> str:
    """Return Chinese characters, Latin letters and digits; words stay apart only in a text without Chinese."""
    kept = re.sub(rf"[^{_KEPT}\s]", "", text)
    return re.sub(r"\s+", "" if is_chinese(kept) else " ", kept).strip()


ONEIG = Benchmark(
    name="oneig-zh",
    title="OneIG-Bench-ZH",
    source="the folder of OneIG-Bench/OneIG-Benchmark",
    counts=COUNTS,
    samples=4,
    read=read_items,
    layout=lambda position, item, sample, model: f"{item.group}/{model}/{item.id.split('/')[1]}.png",
    grid=True,
    score=score,
)
