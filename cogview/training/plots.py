"""The curves of runs as a picture: losses, speed and the largest activations, read by ``cogview.training.run_record``.

Nothing here needs PyTorch; matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.errors import InputError
from cogview.training.run_record import MetricSeries, RunRecord, columns_of, names_apart, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = (4.0, 2.5)  # inches
COLUMNS = 3  # of panels, at 100 pixels an inch: 1200 pixels
PICTURES = (".png", ".pdf", ".svg")
COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
LAYER = re.compile(r"activation_max_(?:(embedding)|layer_(\d+))$")


def save_run_plots(folder: Path) -> None:
    """``curves.png`` in a run folder, as training leaves it at its end; what hinders that is one line on stderr."""
    try:
        plot_runs([read_run(folder)], folder / "curves.png")
    except Exception as error:  # what was trained is saved by now: a drawing is not to make the run fail
        print(f"no curves.png: {' '.join(str(error).split())}", file=sys.stderr)


def plot_runs(records: Sequence[RunRecord], path: Path) -> None:
    """Draw the curves of runs over each other into ``path`` (.png, .pdf or .svg), 1200 pixels wide.

    A panel for each loss, then learning rate, gradient norm, speed, waiting for data, and for each run the largest
    activations by depth, where there are such figures. InputError where there is nothing to draw, or no matplotlib.
    """
    if path.suffix.lower() not in PICTURES:
        raise InputError(f"{path} is not named like a picture: expected a name that ends in {', '.join(PICTURES)}")
    panels = [
        *_loss_panels(records),
        *_training_panels(records),
        *_activation_panels(records),
    ]
    if not panels:
        raise InputError(f"no metrics yet in {', '.join(str(record.folder) for record in records) or 'no run'}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError:
        raise InputError("curves need matplotlib, which is missing: pip install 'cogview[train]' brings it") from None
    columns = min(COLUMNS, len(panels))
    end = 1.02 * max(max(series.steps) for record in records for series in _all_series(record))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not as a user has them for other pictures
        matplotlib.rcParams.update(
            {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
        )
        size = (PANEL[0] * COLUMNS, PANEL[1] * rows + 0.3 * (2 + len(records) // 3))
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for number, (title, draw) in enumerate(panels):
            axes[number].set_title(title, loc="left")
            draw(axes[number])
            axes[number].set_xlim(0, end)
            axes[number].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes[number].xaxis.set_major_formatter(EngFormatter(sep=""))
            if number + columns >= len(panels):
                axes[number].set_xlabel("step")
        for unused in axes[len(panels) :]:
            unused.remove()
        _add_legend(figure, records)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


Panel = tuple[str, Callable[["Axes"], None]]  # its title, and what draws it


def _loss_panels(records: Sequence[RunRecord]) -> list[Panel]:
    """Losses, the whole one first, and what else was measured on held-out rows."""
    names = dict.fromkeys(name for record in records for name in record.training)
    judged = dict.fromkeys(name for record in records for name in record.held_out)
    shown = [name for name in names if name == "loss" or name.endswith("_loss") or name in judged]
    for name in judged:
        values = {value for record in records if name in record.held_out for value in record.held_out[name].values}
        if name not in names and (name.endswith("loss") or len(values) > 1):  # how many were judged is no curve
            shown.append(name)
    shown.sort(key=lambda name: name != "loss")
    return [(_in_words(name), partial(_draw_judged, records, name)) for name in shown]


def _draw_judged(records: Sequence[RunRecord], name: str, axes: Axes) -> None:
    lines = []
    for number, record in enumerate(records):
        colour, held_out = _colour(number), record.held_out.get(name)
        if (series := record.training.get(name)) is not None:
            axes.plot(*columns_of(series), color=colour, linewidth=0.7, alpha=0.6)
            lines.append(series)
        if held_out is not None:
            axes.plot(*columns_of(held_out), ".:", color=colour, linewidth=0.8, markersize=5)
            lines.append(held_out)
        if name == "loss" and record.best is not None:
            axes.plot(
                record.best.step, record.best.held_out_loss, "*", color=colour, markersize=11, markeredgecolor="k"
            )
    if name.endswith("loss"):
        _leave_out_the_beginning(axes, lines)


def _leave_out_the_beginning(axes: Axes, lines: Sequence[MetricSeries]) -> None:
    """Let what a loss falls from in its first steps run out of the panel, which would leave no room for the rest."""
    values = [
        value
        for series in lines
        for step, value in zip(*columns_of(series), strict=True)
        if math.isfinite(value) and step >= 0.05 * series.steps[-1]
    ]
    if len(values) < 20:
        return
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _training_panels(records: Sequence[RunRecord]) -> list[Panel]:
    """What training says of its course and speed."""
    names = {name for record in records for name in record.training}
    speed = "tokens_per_second" if "tokens_per_second" in names else "samples_per_second"
    panels: dict[str, Panel] = {
        "learning_rate": ("learning rate", partial(_draw_plain, records, "learning_rate")),
        "gradient_norm": ("gradient norm", partial(_draw_gradient_norm, records)),
        "loss_scale": ("loss scale", partial(_draw_plain, records, "loss_scale")),
        speed: (_in_words(speed), partial(_draw_plain, records, speed)),
        "data_wait": ("time spent waiting for data", partial(_draw_plain, records, "data_wait")),
    }
    return [panel for name, panel in panels.items() if name in names]


def _draw_plain(records: Sequence[RunRecord], name: str, axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, PercentFormatter, StrMethodFormatter

    for number, record in enumerate(records):
        if (series := record.training.get(name)) is not None:
            axes.plot(*columns_of(series), color=_colour(number), linewidth=1)
    if name == "loss_scale":
        axes.set_yscale("log", base=2)
    elif name == "data_wait":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif name == "learning_rate":
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if name != "loss_scale":
        axes.set_ylim(bottom=0)


def _draw_gradient_norm(records: Sequence[RunRecord], axes: Axes) -> None:
    """Beside the norm a mark where steps were left out."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for number, record in enumerate(records):
        colour = _colour(number)
        if (series := record.training.get("gradient_norm")) is not None:
            axes.plot(*columns_of(series), color=colour, linewidth=0.7, alpha=0.8)
        skipped = record.training.get("skipped_steps")
        if skipped is not None:
            before = (0.0, *skipped.values)
            steps = [step for step, value, last in zip(*columns_of(skipped), before, strict=False) if value > last]
            lowest = [0.04] * len(steps)  # of the panel's height
            marks = axes.plot(steps, lowest, "x", color=colour, markersize=5, transform=axes.get_xaxis_transform())
            marks[0].set_label("skipped")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if any(line.get_label() == "skipped" for line in axes.lines):
        axes.set_title("gradient norm (x: steps skipped)", loc="left")


def _activation_panels(records: Sequence[RunRecord]) -> list[Panel]:
    """A map for each run, in the same colours."""
    names = [""] if len(records) == 1 else [f": {name}" for name in _ascii_names(records)]
    depths = [_by_depth(record) for record in records]
    known = [
        value
        for own in depths
        for series in own.values()
        for value in series.values
        if math.isfinite(value) and value > 0  # others have no logarithm
    ]
    if not known:
        return []
    limits = min(known), max(max(known), 1.01 * min(known))
    return [
        (f"largest activation{name}", partial(_draw_activations, own, limits))
        for name, own in zip(names, depths, strict=True)
        if own
    ]


def _by_depth(record: RunRecord) -> dict[int, MetricSeries]:
    """The largest activations behind the embedding, 0, and behind each layer, from 1."""
    found = {}
    for name, series in record.training.items():
        if match := LAYER.match(name):
            found[0 if match[1] else int(match[2]) + 1] = series
    return found


def _draw_activations(depths: Mapping[int, MetricSeries], limits: tuple[float, float], axes: Axes) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    steps = sorted({step for series in depths.values() for step in series.steps})
    grid = np.full((max(depths) + 1, len(steps)), np.nan)
    for depth, series in depths.items():
        grid[depth, np.searchsorted(steps, series.steps)] = series.values
    drawn = axes.pcolormesh(
        np.array([0, *steps]),  # a cell reaches back to the step before it
        np.arange(len(grid) + 1) - 0.5,
        np.ma.masked_where(~(np.isfinite(grid) & (grid > 0)), grid),
        norm=LogNorm(*limits),
        cmap="magma",
        rasterized=True,
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("layer (0: embedding)")
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(drawn, ax=axes, pad=0.02)


def _add_legend(figure: Any, records: Sequence[RunRecord]) -> None:
    """Which colour is which run, and what lines, dots and the star mean."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(number), linewidth=3) for number in range(len(records))]
    texts = [
        f"{name}, {record.state} at step {record.done}{'' if record.planned is None else f' of {record.planned}'}"
        for name, record in zip(_ascii_names(records), records, strict=True)
    ]
    meanings = {
        "training": (Line2D([], [], color="grey", linewidth=0.8), any(record.training for record in records)),
        "held out": (Line2D([], [], color="grey", marker=".", linestyle=":"), any(r.held_out for r in records)),
        "best": (
            Line2D([], [], color="grey", marker="*", markersize=11, linestyle=""),
            any(record.best for record in records),
        ),
    }
    for text, (handle, there) in meanings.items():
        if there:
            handles.append(handle)
            texts.append(text)
    legend = figure.legend(handles, [" "] * len(handles), loc="outside upper left", ncols=4, frameon=False)
    for shown, text in zip(legend.get_texts(), texts, strict=True):
        shown.set_parse_math(False)  # a name may hold $
        shown.set_text(text)  # and begin with _, which would leave it out above


def _ascii_names(records: Sequence[RunRecord]) -> list[str]:
    """Names that the font of the picture has all characters for."""
    return [name if name.isascii() else f"run {number}" for number, name in enumerate(names_apart(records), start=1)]


def _all_series(record: RunRecord) -> list[MetricSeries]:
    return [*record.training.values(), *record.held_out.values()]


def _in_words(figure: str) -> str:
    return figure.replace("_per_second", "/s").replace("_", " ")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
