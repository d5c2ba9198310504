"""Compare two results that were measured alike, with intervals of the differences."""

# N items, R resamples
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cogview.errors import InputError
from cogview.evaluation.manifest import Result, ResultItems, ResultValue, manifest_fields, unlike_fields
from cogview.evaluation.metrics import RESAMPLES
from cogview.formatting import shorten

CHUNK = 1 << 22  # indices of resamples in memory at a time
MEAN_TOLERANCE = 1e-4  # relative, between a value and the mean of its items: reports round to 4 digits or more
MIN_ITEMS = 8  # of fewer items a percentile bootstrap is too narrow
SHOWN_FIELDS = 6  # of unlike fields in a message

Method = Literal["paired", "unpaired", "from intervals", ""]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of one value between two results.

    Attributes:
        name: Name of the value.
        a: The value of the first result.
        b: That of the second.
        low: Lower end of the 95% interval of b - a; None if there is none.
        high: Upper end.
        method: Where the interval comes from: "paired", a bootstrap of items that both results have; "unpaired", of
            the items of each by itself; "from intervals", of the two values, as for independent samples; or "".
    """

    name: str
    a: ResultValue
    b: ResultValue
    low: float | None = None
    high: float | None = None
    method: Method = ""

    @property
    def value(self) -> float:
        """Return b - a."""
        return self.b.value - self.a.value

    @property
    def is_significant(self) -> bool:
        """Return whether the interval excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def verdict(self) -> str:
        """Return "better" or "worse" for b, "different" where neither is better, or "" if the interval holds 0."""
        if not self.is_significant:
            return ""
        if self.b.higher_is_better is None:
            return "different"
        return "better" if (self.value > 0) == self.b.higher_is_better else "worse"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two results and their differences.

    Attributes:
        a: The first result.
        b: The second one.
        differences: Of all values that both have, in the order of the first.
        allowed: Fields of the manifests that differ and were allowed to.
        missing: Names of values that only one of the results has.
    """

    a: Result
    b: Result
    differences: list[Difference]
    allowed: list[str]
    missing: list[str]


def compare_results(a: Result, b: Result, names: tuple[str, str], allow: Sequence[str] = ()) -> Comparison:
    """Compare two results.

    Args:
        a: A result.
        b: Another one of the same measure.
        names: Names of both, for messages.
        allow: Fields of the manifest that may differ.

    Returns:
        The comparison.

    Raises:
        InputError: They are of different measures, differ in a field that is not allowed to, or share no value, or a
            field in ``allow`` does not exist.
    """
    if a.manifest.measure != b.manifest.measure:
        raise InputError(
            f"{names[0]} and {names[1]} cannot be compared: their measures are {a.manifest.measure} and "
            f"{b.manifest.measure}"
        )
    _check_allowed(a, b, allow)
    if unlike := unlike_fields(a.manifest, b.manifest, allow):
        raise InputError(_describe_unlike(a, b, names, unlike))
    shared = [name for name in a.results if name in b.results]
    if not shared:
        raise InputError(f"{names[0]} and {names[1]} share no value")
    for name in shared:
        units = a.results[name].unit, b.results[name].unit
        if units[0] != units[1]:
            raise InputError(f'the value "{name}" has the unit "{units[0]}" in one result, "{units[1]}" in the other')
    return Comparison(
        a=a,
        b=b,
        differences=[_difference(name, a, b) for name in shared],
        allowed=unlike_fields(a.manifest, b.manifest),
        missing=sorted(a.results.keys() ^ b.results.keys()),
    )


def paired_values(a: ResultItems, b: ResultItems, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a value of the items that two results have, float64 (N,) in the order of the first, or None.

    Args:
        a: Items of a result.
        b: Items of another one.
        name: Name of the value.

    Returns:
        NaN for an item that a result does not count; None unless both have the value and the same ids.
    """
    if name not in a.values or name not in b.values or set(a.ids) != set(b.ids):
        return None
    place = {key: index for index, key in enumerate(b.ids)}
    order = [place[key] for key in a.ids]
    return np.array(a.values[name], dtype=np.float64), np.array(b.values[name], dtype=np.float64)[order]


def bootstrap_difference(a: np.ndarray, b: np.ndarray, *, paired: bool) -> tuple[float, float]:
    """Return the 95% percentile interval of the difference of two means (Efron, 1979).

    Args:
        a: Values of items, float64 (N,); NaN is not counted.
        b: The same of another result.
        paired: Whether a and b are of the same items, which are resampled together then.

    Returns:
        Lower and upper end for mean(b) - mean(a); equal calls give equal intervals.
    """
    generator = np.random.default_rng(0)
    differences: list[np.ndarray] = []
    while sum(map(len, differences)) < RESAMPLES:
        count = min(RESAMPLES, max(1, CHUNK // max(len(a), len(b))))
        first_RN = generator.integers(len(a), size=(count, len(a)))
        second_RN = first_RN if paired else generator.integers(len(b), size=(count, len(b)))
        differences.append(_means(b, second_RN) - _means(a, first_RN))
    found = np.concatenate(differences)[:RESAMPLES]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def combine_intervals(a: ResultValue, b: ResultValue) -> tuple[float, float] | None:
    """Return the 95% interval of b - a from those of both, for independent samples; None where one has no interval.

    The square-and-add method (Newcombe, Statistics in Medicine 17, 1998, method 10; Zou and Donner, 2008). For results
    of the same items it is too wide: a paired bootstrap is better.

    Args:
        a: A value with its interval.
        b: Another one.
    """
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    below = math.hypot(b.value - b.low, a.high - a.value)
    above = math.hypot(b.high - b.value, a.value - a.low)
    return b.value - a.value - below, b.value - a.value + above


def format_value(value: float, unit: str) -> str:
    """Return a value with its unit: fractions in percent, others with four digits.

    Args:
        value: The value.
        unit: Its unit; "fraction" is shown in percent.
    """
    return _with_unit(f"{100 * value:.1f}" if unit == "fraction" else _digits(value, unit), unit)


def format_difference(value: float, unit: str) -> str:
    """Return a difference with its sign and unit; of fractions in percentage points.

    Args:
        value: The difference.
        unit: Its unit.
    """
    return f"{_signed(value, unit)} points" if unit == "fraction" else _with_unit(_signed(value, unit), unit)


def format_interval(low: float, high: float, unit: str, *, signed: bool = False) -> str:
    """Return an interval with its unit at the end.

    Args:
        low: Lower end.
        high: Upper end.
        unit: Unit of both.
        signed: Whether it is of a difference, so that both ends have a sign.
    """
    if signed:
        return f"{_signed(low, unit)} to {_signed(high, unit)}"
    if unit == "fraction":
        return f"{100 * low:.1f} – {100 * high:.1f}%"
    return f"{_digits(low, unit)} – {_digits(high, unit)}"


def _digits(value: float, unit: str) -> str:
    if unit == "dB":
        return f"{value:.2f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _signed(value: float, unit: str) -> str:
    """Return a number with a sign and three digits; a fraction in percent, dB to the second place."""
    if unit == "fraction":
        return f"{100 * value:+.1f}"
    return f"{value:+.2f}" if unit == "dB" else f"{value:+.3g}"


def _with_unit(number: str, unit: str) -> str:
    return f"{number}%" if unit == "fraction" else f"{number} {unit}".rstrip()


def _difference(name: str, a: Result, b: Result) -> Difference:
    """Return a difference with the best interval that the results allow."""
    first, second = a.results[name], b.results[name]
    interval: tuple[float, float] | None = None
    method: Method = ""
    if a.items is not None and b.items is not None and _is_mean(a, name) and _is_mean(b, name):
        pairs = paired_values(a.items, b.items, name)
        if pairs is not None:
            interval, method = bootstrap_difference(*pairs, paired=True), "paired"
        else:
            values = (np.array(each.values[name], dtype=np.float64) for each in (a.items, b.items))
            interval, method = bootstrap_difference(*values, paired=False), "unpaired"
    elif found := combine_intervals(first, second):
        interval, method = found, "from intervals"
    low, high = interval or (None, None)
    return Difference(name=name, a=first, b=second, low=low, high=high, method=method)


def _is_mean(result: Result, name: str) -> bool:
    """Return whether a result is the mean of enough items, so that these can be resampled."""
    if result.items is None or name not in result.items.values:
        return False
    values = [value for value in result.items.values[name] if value is not None]
    if len(values) < MIN_ITEMS:
        return False
    value, mean = result.results[name].value, float(np.mean(values))
    return abs(mean - value) <= MEAN_TOLERANCE * max(abs(value), float(np.max(np.abs(values))))


def _means(values: np.ndarray, indices_RN: np.ndarray) -> np.ndarray:
    """Return the mean of each resample (R,), without NaN; NaN where nothing is counted."""
    counted = ~np.isnan(values)
    sums = np.where(counted, values, 0.0)[indices_RN].sum(axis=1)
    counts = counted[indices_RN].sum(axis=1)
    means = np.full(len(sums), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def _check_allowed(a: Result, b: Result, allow: Sequence[str]) -> None:
    """Raise InputError for a field that no manifest has, or the measure."""
    known = list(dict.fromkeys([*manifest_fields(a.manifest), *manifest_fields(b.manifest)]))
    for name in allow:
        if name == "measure":
            raise InputError("--allow measure: results of different measures cannot be compared")
        if not any(each == name or each.startswith(f"{name}.") for each in known):
            tops = dict.fromkeys(each.split(".")[0] for each in known if each != "measure")
            raise InputError(f"--allow {name}: neither manifest has it; fields: {', '.join(tops)}")


def _describe_unlike(a: Result, b: Result, names: tuple[str, str], unlike: Sequence[str]) -> str:
    """Return the message on fields that differ, with both values of each."""
    left, right = manifest_fields(a.manifest), manifest_fields(b.manifest)
    shown = [f"{name} ({_shown(left.get(name))}, {_shown(right.get(name))})" for name in unlike[:SHOWN_FIELDS]]
    if len(unlike) > SHOWN_FIELDS:
        shown.append(f"{len(unlike) - SHOWN_FIELDS} more")
    return (
        f"{names[0]} and {names[1]} were not measured alike: measure one again, or allow knowingly with --allow FIELD; "
        f"they differ in {', '.join(shown)}"
    )


def _shown(value: Any) -> str:
    """Return a field of a manifest for a message: hashes by their beginning."""
    text = "none" if value is None else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:8]}…" if is_hash else shorten(text, 40)
