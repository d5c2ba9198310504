"""A page that shows a comparison of two results: one HTML file without requests to any server."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cogview.evaluation.comparison import (
    Comparison,
    Difference,
    format_difference,
    format_interval,
    format_value,
    paired_values,
)
from cogview.evaluation.manifest import manifest_fields
from cogview.evaluation.plots import SERIES, curve_plot, interval_plot
from cogview.evaluation.records import ResultItems, ResultValue

SHOWN_PAIRS = 8  # of the largest losses, and of the largest gains
MAX_PICTURE_SIDE = 256  # pixels
MAX_GROUPS = 6  # of pictures: two for a value
HASH_DIGITS = 64

STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True, kw_only=True)
class ComparedFiles:
    """Names of the two results to print, and the folders that their pictures are relative to."""

    names: tuple[str, str]
    folders: tuple[Path, Path]


def comparison_page(comparison: Comparison, files: ComparedFiles) -> str:
    """Return a comparison as an HTML document.

    Args:
        comparison: The comparison.
        files: Names and folders of the results.

    Raises:
        InputError: A picture that a result names cannot be read.
    """
    title = f"{comparison.a.manifest.measure}: {files.names[0]} and {files.names[1]}"
    parts = [
        _introduction(comparison, files),
        _values_section(comparison),
        _curves_section(comparison),
        _pictures_section(comparison, files),
        _manifest_section(comparison),
    ]
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _introduction(comparison: Comparison, files: ComparedFiles) -> str:
    measure = escape(comparison.a.manifest.measure)
    found = [each for each in comparison.differences if each.is_significant]
    tested = [each for each in comparison.differences if each.method]
    verdict = (
        f"{len(found)} of {len(tested)} differences have a 95% interval that excludes 0."
        if tested
        else "No value has an interval."
    )
    if len(tested) >= 10:
        verdict += f" About {len(tested) / 20:.0f} would by chance alone, if nothing had changed."
    allowed = ""
    if comparison.allowed:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in comparison.allowed)
        allowed = f"\n<p>Not measured alike, which was allowed: {names}.</p>"
    models = [_model_name(each) for each in (comparison.a, comparison.b)]
    lines = "<br>\n".join(
        f'<span class="key {css}">{css.upper()}</span> {escape(name)}{escape(model)}'
        for css, name, model in zip(SERIES, files.names, models, strict=True)
    )
    return f"<header>\n<h1>{measure}: B against A</h1>\n<p>{lines}</p>\n<p>{verdict}</p>{allowed}\n</header>"


def _model_name(result: Any) -> str:
    """Return the model of a result to print after its name, or an empty text."""
    model = result.manifest.model
    if model is None:
        return ""
    return f" · {' + '.join([model.name, *(each.name for each in model.adapters)])}, {model.weights}"


def _values_section(comparison: Comparison) -> str:
    rows = []
    for each in comparison.differences:
        unit = each.a.unit
        plot = verdict = interval = ""
        if each.low is not None and each.high is not None:
            limit = max(abs(each.low), abs(each.high), abs(each.value))
            plot = interval_plot(each.value, each.low, each.high, limit, each.verdict)
            interval = f"<small>{format_interval(each.low, each.high, unit, signed=True)}<br>{each.method}</small>"
            verdict = f'<br><small class="verdict">{each.verdict}</small>' if each.verdict else ""
        rows.append(
            f'<tr class="{each.verdict}">\n'
            f"  <td>{escape(each.name)}{_direction(each.a)}<br><small>{_counts(each)}</small></td>\n"
            f'  <td class="number">{_value_cell(each.a)}</td>\n'
            f'  <td class="number">{_value_cell(each.b)}</td>\n'
            f'  <td class="number">{format_difference(each.value, unit)}{verdict}</td>\n'
            f"  <td>{plot}</td>\n"
            f"  <td>{interval}</td>\n"
            f"</tr>"
        )
    missing = ""
    if comparison.missing:
        missing = f'\n<p class="soft">In one result alone: {escape(", ".join(comparison.missing))}.</p>'
    return (
        "<section>\n<h2>Values</h2>\n"
        '<p class="soft">Intervals are of 95%. Paired ones resample items that both results have; the others treat the '
        'two as independent, which is wider.</p>\n<div class="scroll">\n<table>\n'
        '<tr><th>value</th><th class="number a">A</th><th class="number b">B</th><th class="number">B − A</th>'
        "<th></th><th>interval</th></tr>\n" + "\n".join(rows) + f"\n</table>\n</div>{missing}\n</section>"
    )


def _direction(value: ResultValue) -> str:
    if value.higher_is_better is None:
        return ""
    return ' <span class="soft">↑</span>' if value.higher_is_better else ' <span class="soft">↓</span>'


def _counts(difference: Difference) -> str:
    counts = dict.fromkeys([difference.a.n, difference.b.n])
    return f"n = {' and '.join(map(str, counts))}"


def _value_cell(value: ResultValue) -> str:
    text = format_value(value.value, value.unit)
    if value.low is None or value.high is None:
        return text
    return f"{text}<br><small>{format_interval(value.low, value.high, value.unit)}</small>"


def _curves_section(comparison: Comparison) -> str:
    curves = [comparison.a.curves, comparison.b.curves]
    names = list(dict.fromkeys([*curves[0], *curves[1]]))
    if not names:
        return ""
    figures = []
    for name in names:
        shown = {css: found[name] for css, found in zip(SERIES, curves, strict=True) if name in found}
        keys = " ".join(f'<span class="key {css}">{css.upper()}</span>' for css in shown)
        figures.append(f"<figure>\n{curve_plot(shown)}\n<figcaption>{escape(name)} · {keys}</figcaption>\n</figure>")
    return '<section>\n<h2>Curves</h2>\n<div class="plots">\n' + "\n".join(figures) + "\n</div>\n</section>"


def _pictures_section(comparison: Comparison, files: ComparedFiles) -> str:
    a, b = comparison.a.items, comparison.b.items
    if a is None or b is None or not (a.pictures and b.pictures):
        return ""
    sections: list[str] = []
    for difference in comparison.differences:
        pairs = paired_values(a, b, difference.name)
        if pairs is None or len(sections) >= MAX_GROUPS:
            continue
        gains = pairs[1] - pairs[0]
        if difference.a.higher_is_better is False:
            gains = -gains
        for title, order in (("B lost most", np.argsort(gains)), ("B gained most", np.argsort(-gains))):
            chosen = [int(index) for index in order[:SHOWN_PAIRS] if (gains[index] < 0) == (title == "B lost most")]
            chosen = [index for index in chosen if gains[index] != 0 and not np.isnan(gains[index])]
            if chosen:
                shown = "\n".join(_pair(index, difference, a, b, files) for index in chosen)
                sections.append(
                    f"<h3>{escape(difference.name)}: items with which {title}</h3>\n"
                    f'<div class="pairs">\n{shown}\n</div>'
                )
    if not sections:
        return ""
    return "<section>\n<h2>Pictures</h2>\n" + "\n".join(sections) + "\n</section>"


def _pair(index: int, difference: Difference, a: ResultItems, b: ResultItems, files: ComparedFiles) -> str:
    """Return both pictures of an item with their values."""
    key = a.ids[index]
    other = b.ids.index(key)
    label = a.labels[index] if a.labels else key
    images, values = [], []
    for items, position, folder in ((a, index, files.folders[0]), (b, other, files.folders[1])):
        images.append(f'<img alt="{escape(label)}" src="{picture_uri(folder / items.pictures[position])}">')
        value = items.values[difference.name][position]
        unit = difference.a.unit
        values.append("–" if value is None else f"{value:g}" if unit == "fraction" else format_value(value, unit))
    return (
        f'<figure>\n<div class="pair">{images[0]}{images[1]}</div>\n'
        f'<figcaption><span class="label">{escape(label)}</span><br>{values[0]} → {values[1]}</figcaption>\n</figure>'
    )


def picture_uri(path: Path) -> str:
    """Return a picture as the URI of a PNG, with sides of at most ``MAX_PICTURE_SIDE`` pixels.

    Args:
        path: The file.

    Raises:
        InputError: It cannot be read.
    """
    from cogview.image_io.reading import read_image

    image = read_image(path)
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _manifest_section(comparison: Comparison) -> str:
    left, right = (manifest_fields(each.manifest) for each in (comparison.a, comparison.b))
    rows = []
    for name in _fields_in_order(left, right):
        values = [left.get(name), right.get(name)]
        unlike = ' class="unlike"' if values[0] != values[1] else ""
        cells = "".join(f"<td><code>{escape(_field(value))}</code></td>" for value in values)
        rows.append(f"<tr{unlike}><td>{escape(name)}</td>{cells}</tr>")
    hashes = "".join(f"<td><code>{each.sha256[:16]}…</code></td>" for each in (comparison.a, comparison.b))
    rows.append(f"<tr><td>SHA-256 of the result</td>{hashes}</tr>")
    return (
        "<section>\n<h2>How it was measured</h2>\n"
        '<p class="soft">Fields that differ are shaded.</p>\n<div class="scroll">\n<table>\n'
        '<tr><th>field</th><th class="a">A</th><th class="b">B</th></tr>\n' + "\n".join(rows) + "\n</table>\n</div>\n"
        "</section>"
    )


def _fields_in_order(left: dict[str, Any], right: dict[str, Any]) -> Sequence[str]:
    """Return the fields of both manifests; those of one follow their neighbours of the same group."""
    tops = list(dict.fromkeys(name.split(".")[0] for name in [*left, *right]))
    return sorted(dict.fromkeys([*left, *right]), key=lambda name: tops.index(name.split(".")[0]))


def _field(value: Any) -> str:
    text = "–" if value is None else str(value)
    is_hash = len(text) == HASH_DIGITS and set(text) <= set("0123456789abcdef")
    return f"{text[:16]}…" if is_hash else text
