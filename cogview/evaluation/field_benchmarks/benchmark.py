"""What a benchmark of the field is: its prompts, the layout of its pictures, and the scorer of its answers."""

# G groups, N items of a group, R resamples
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from cogview.errors import InputError
from cogview.evaluation.text_metrics import resampled_sums
from cogview.formatting import plural, shorten
from cogview.tables import HeaderError, parse_objects, parse_table, read_text

SHOWN = 60  # characters of an id or a text in a message


@dataclass(frozen=True, kw_only=True)
class BenchmarkItem:
    """A prompt of a benchmark.

    Attributes:
        id: Its name in the benchmark, unique.
        prompt: The text from which pictures are generated.
        group: Task, category or level, by which scores are averaged.
        details: What the scorer needs besides.
    """

    id: str
    prompt: str
    group: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """Scores of a benchmark.

    Attributes:
        results: By name ``value``, ``low`` and ``high`` of a 95% interval (None where there is none), ``n``, ``unit``
            and ``higher_is_better``.
        ids: The items.
        values: Values of single items of those results that are means over items, as long as ``ids``; None for an item
            that a result does not count.
    """

    results: dict[str, dict[str, Any]]
    ids: list[str] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)


class Scorer(Protocol):
    """Compute the scores of a benchmark from detections or answers."""

    def __call__(self, items: Sequence[BenchmarkItem], answers: Path, samples: int) -> BenchmarkScore:
        """Return the scores.

        Args:
            items: The prompts.
            answers: File or folder of detections or answers.
            samples: Pictures of each prompt.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: Its name on the command line.
        title: Its name in messages.
        source: Where its prompts come from.
        counts: Prompts of each group in the published set.
        samples: Pictures of each prompt.
        read: Reads the prompts.
        layout: File of a picture, given the position of its item, the item, the number of the sample and the name of
            the model; of a grid the number does not matter.
        score: The scorer.
        grid: Whether the samples of a prompt are joined to one picture.
        files: Other files of an item, with their contents.
        answers: What the scorer reads, in words.
        unique: Whether all prompts of the published set differ.
        edits: Whether pictures are edited, not generated from text.
    """

    name: str
    title: str
    source: str
    counts: Mapping[str, int]
    samples: int
    read: Callable[[Path], list[BenchmarkItem]]
    layout: Callable[[int, BenchmarkItem, int, str], str]
    score: Scorer
    grid: bool = False
    files: Callable[[int, BenchmarkItem], Mapping[str, str]] = lambda position, item: {}
    answers: str = "answers"
    unique: bool = True
    edits: bool = False

    def read_items(self, path: Path, *, subset: bool) -> list[BenchmarkItem]:
        """Return the prompts of a file.

        Args:
            path: The file or folder.
            subset: Whether a part of the benchmark is accepted.

        Raises:
            InputError: The file cannot be read, a prompt is empty, an id is given twice, or the numbers are not those
                of the benchmark.
        """
        items = self.read(path)
        refuse_duplicates(items, str(path), unique=self.unique)
        found = Counter(item.group for item in items)
        if unknown := [group for group in found if group not in self.counts]:
            raise InputError(
                f'{path}: "{shorten(unknown[0], SHOWN)}" is no part of {self.title}; expected {", ".join(self.counts)}'
            )
        if not subset and dict(found) != dict(self.counts):
            differing = next(group for group in self.counts if found[group] != self.counts[group])
            name = f'"{differing}"' if differing else "all"
            raise InputError(
                f"{path} has {plural(found[differing], 'prompt')} of {name}, {self.title} has "
                f"{self.counts[differing]}; scores of a part cannot be compared: --subset accepts it; the whole set is "
                f"{self.source}"
            )
        return items


def refuse_duplicates(items: Sequence[BenchmarkItem], where: str, *, unique: bool) -> None:
    """Raise InputError for an empty list, an empty prompt, an id that is given twice, or a prompt that is.

    Args:
        items: The prompts.
        where: Name of their file.
        unique: Whether prompts must differ.
    """
    if not items:
        raise InputError(f"{where} holds no prompt")
    for item in items:
        if not item.prompt.strip():
            raise InputError(f'{where}: the prompt of "{shorten(item.id, SHOWN)}" is empty')
        if any(part in ("", ".", "..") for part in item.id.split("/")) or set(item.id) & set("\\\0:"):
            raise InputError(f'{where}: the id "{shorten(item.id, SHOWN)}" cannot name a file')
    repeated = [key for key, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise InputError(
            f'{where} has {plural(len(repeated), "id")} more than once, first "{shorten(repeated[0], SHOWN)}"; '
            "expected each once"
        )
    text, count = Counter(item.prompt for item in items).most_common(1)[0]
    if count > 1 and unique:
        raise InputError(f"{where} has a prompt {count} times, expected each once: {shorten(text, SHOWN)}")


def read_rows(path: Path, names: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a file of JSON lines, or of a table with a header, each with the words that name its line.

    Args:
        path: ``.tsv``, ``.csv``, or JSON lines under any other name.
        names: Columns or keys that each row must have.

    Raises:
        InputError: The file cannot be read, is empty, or a row cannot be used.
    """
    content = read_text(str(path))
    delimiter = {".tsv": "\t", ".csv": ","}.get(path.suffix.lower())
    rows = []
    try:
        for number, values in parse_objects(content) if delimiter is None else parse_table(content, delimiter):
            where = f"{path}, line {number}"
            if isinstance(values, str):
                raise InputError(f"{where}: {values}")
            if missing := [name for name in names if values.get(name) is None]:
                raise InputError(f"{where}: {missing[0]} is missing; expected {', '.join(names)}")
            rows.append((where, dict(values)))
    except HeaderError as error:
        raise InputError(f"{path}: {error}") from None
    if not rows:
        raise InputError(f"{path} is empty; expected a row with {', '.join(names)}")
    return rows


def expect_keys(found: Iterable[Any], expected: Iterable[Any], where: str, noun: str) -> None:
    """Raise InputError unless a file has all pictures or items of a benchmark, each once, and no others.

    Args:
        found: Keys in the file.
        expected: Keys of the benchmark.
        where: Name of the file.
        noun: What a key stands for, in the singular.
    """
    counted, wanted = Counter(found), list(expected)
    known = set(wanted)
    if samples := _other_samples(counted, wanted):
        raise InputError(f"{where} has {plural(samples, 'picture')} of each prompt: give --samples {samples}")
    if other := next((key for key in counted if key not in known), None):
        raise InputError(f"{where} is of another set: it has the {noun} {_shown(other)}, which the prompts do not have")
    if repeated := next((key for key, count in counted.items() if count > 1), None):
        raise InputError(f"{where} has a {noun} more than once: {_shown(repeated)}")
    missing = [key for key in wanted if key not in counted]
    if missing:
        raise InputError(
            f"{where} lacks {len(missing)} of {plural(len(wanted), noun)}, first {_shown(missing[0])}; the score of a "
            "part is not that of the benchmark"
        )


def _other_samples(found: Iterable[Any], expected: Iterable[Any]) -> int:
    """Return the number of pictures that a file has of each prompt, if that is all that differs; else 0.

    Args:
        found: Keys in the file: a prompt, a picture, then anything.
        expected: Keys of the benchmark.
    """
    have, wanted = (
        Counter(prompt for prompt, _ in {key[:2] for key in keys if isinstance(key, tuple) and len(key) > 1})
        for keys in (found, expected)
    )
    counts = set(have.values())
    differs = have.keys() == wanted.keys() and len(counts) == 1 and counts != set(wanted.values())
    return counts.pop() if differs else 0


def _shown(key: Any) -> str:
    return shorten("/".join(map(str, key)) if isinstance(key, tuple) else str(key), SHOWN)


def result(values: Sequence[float] | np.ndarray, unit: str = "fraction") -> dict[str, Any]:
    """Return the mean of items with its 95% bootstrap interval, in the form of ``BenchmarkScore.results``.

    Args:
        values: Values of the items, at least one.
        unit: Their unit.
    """
    return mean_of_groups({"": values}, unit)


def mean_of_groups(
    groups: Mapping[str, Sequence[float] | np.ndarray],
    unit: str = "fraction",
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the mean of the means of groups with its 95% bootstrap interval.

    Args:
        groups: Values of the items of each group; items are resampled within their group.
        unit: Unit of the values.
        weights: Weight of each group; None: all groups count alike.
    """
    total = np.zeros(1001)  # the value, then its resamples
    factors = weights or dict.fromkeys(groups, 1.0)
    for name, items in groups.items():
        values = np.asarray(items, dtype=np.float64)
        means = np.concatenate([[values.mean()], resampled_sums(values[:, None], 1000)[:, 0] / len(values)])
        total += means * factors[name] / sum(factors[key] for key in groups)
    low, high = np.percentile(total[1:], [2.5, 97.5])
    count = sum(map(len, groups.values()))
    return {
        "value": float(total[0]),
        "low": float(low),
        "high": float(high),
        "n": count,
        "unit": unit,
        "higher_is_better": True,
    }


def columns_of(
    items: Sequence[BenchmarkItem], values: Mapping[str, float], names: Mapping[str, str] | None = None
) -> dict[str, list[float | None]]:
    """Return the values of single items for the result of each group, None for the items of other groups.

    Args:
        items: The items.
        values: Value of each item by its id.
        names: Name of the result of each group; None for the groups themselves.
    """
    groups = dict.fromkeys(item.group for item in items)
    return {
        (names or {}).get(group, group): [values[item.id] if item.group == group else None for item in items]
        for group in groups
    }


def picture_name(path: str, parts: int) -> str:
    """Return the last ``parts`` parts of a path, by which a picture of a layout is known wherever its folder lies."""
    return "/".join(PurePosixPath(path.replace("\\", "/")).parts[-parts:])
