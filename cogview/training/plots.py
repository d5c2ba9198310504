"""Plots of runs: losses, throughput and activation maxima, read by ``cogview.training.run_record``.

Nothing here needs PyTorch; matplotlib is imported when a figure is drawn.
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
from cogview.formatting import format_list
from cogview.training.run_record import MetricSeries, RunRecord, columns_of, names_apart, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = (4.0, 2.5)  # inches
COLUMNS = 3  # of panels, at 100 pixels an inch: 1200 pixels
IMAGE_SUFFIXES = (".png", ".pdf", ".svg")
COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
LAYER = re.compile(r"activation_max_(?:(embedding)|layer_(\d+))$")


def save_run_plots(folder: Path) -> None:
    """Write ``curves.png`` into a run folder; a failure is one line on stderr.

    Args:
        folder: The run folder.
    """
    try:
        plot_runs([read_run(folder)], folder / "curves.png")
    except Exception as error:  # the training is saved by now; a plot must not make the run fail
        print(f"no curves.png: {' '.join(str(error).split())}", file=sys.stderr)


def plot_runs(records: Sequence[RunRecord], path: Path) -> None:
    """Draw the curves of runs over each other, 1200 pixels wide.

    There is a panel for each loss, then for learning rate, gradient norm, throughput and time spent waiting for data,
    and for each run one with activation maxima by depth. Panels without metrics are left out.

    Args:
        records: The runs.
        path: Image to write: .png, .pdf or .svg.

    Raises:
        InputError: The name has another ending, there are no metrics, or matplotlib is missing.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(
            f"{path} is not the name of an image: expected a name that ends in {', '.join(IMAGE_SUFFIXES)}"
        )
    panels = [
        *_loss_panels(records),
        *_training_panels(records),
        *_activation_panels(records),
    ]
    if not panels:
        folders = format_list(record.folder for record in records)
        raise InputError(f"no metrics yet in {folders}" if folders else "there is no run to plot")
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
        matplotlib.rcdefaults()  # a user's settings belong to other plots
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


Panel = tuple[str, Callable[["Axes"], None]]  # title, and the function that draws it


def _loss_panels(records: Sequence[RunRecord]) -> list[Panel]:
    """Return a panel for each loss, the weighted sum first, and for other validation metrics."""
    names = dict.fromkeys(name for record in records for name in record.training)
    validated = dict.fromkeys(name for record in records for name in record.validation)
    shown = [name for name in names if name == "loss" or name.endswith("_loss") or name in validated]
    for name in validated:
        values = {value for record in records if name in record.validation for value in record.validation[name].values}
        if name not in names and (name.endswith("loss") or len(values) > 1):  # a constant, such as a count, is no curve
            shown.append(name)
    shown.sort(key=lambda name: name != "loss")
    return [(_in_words(name), partial(_draw_loss, records, name)) for name in shown]


def _draw_loss(records: Sequence[RunRecord], name: str, axes: Axes) -> None:
    """Draw a metric of training as a line and that of the validation data as dots."""
    lines = []
    for number, record in enumerate(records):
        colour, validation = _colour(number), record.validation.get(name)
        if (series := record.training.get(name)) is not None:
            axes.plot(*columns_of(series), color=colour, linewidth=0.7, alpha=0.6)
            lines.append(series)
        if validation is not None:
            axes.plot(*columns_of(validation), ".:", color=colour, linewidth=0.8, markersize=5)
            lines.append(validation)
        if name == "loss" and record.best is not None:
            axes.plot(
                record.best.step, record.best.validation_loss, "*", color=colour, markersize=11, markeredgecolor="k"
            )
    if name.endswith("loss"):
        _crop_initial_fall(axes, lines)


def _crop_initial_fall(axes: Axes, lines: Sequence[MetricSeries]) -> None:
    """Limit the panel to the values after the first 5 % of the steps, whose fall would flatten the rest."""
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
    """Return the panels of learning rate, gradient norm, loss scale, throughput and waiting."""
    names = {name for record in records for name in record.training}
    throughput = "tokens_per_second" if "tokens_per_second" in names else "samples_per_second"
    panels: dict[str, Panel] = {
        "learning_rate": ("learning rate", partial(_draw_plain, records, "learning_rate")),
        "gradient_norm": ("gradient norm", partial(_draw_gradient_norm, records)),
        "loss_scale": ("loss scale", partial(_draw_plain, records, "loss_scale")),
        throughput: (_in_words(throughput), partial(_draw_plain, records, throughput)),
        "data_wait": ("time spent waiting for data", partial(_draw_plain, records, "data_wait")),
    }
    return [panel for name, panel in panels.items() if name in names]


def _draw_plain(records: Sequence[RunRecord], name: str, axes: Axes) -> None:
    """Draw a training metric as a line for each run."""
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
    """Draw the gradient norm, with marks where steps were skipped."""
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
    """Return a panel with a map of activation maxima for each run, in a common colour scale."""
    names = [""] if len(records) == 1 else [f": {name}" for name in _ascii_names(records)]
    depths = [_by_depth(record) for record in records]
    known = [
        value
        for maxima in depths
        for series in maxima.values()
        for value in series.values
        if math.isfinite(value) and value > 0  # others have no logarithm
    ]
    if not known:
        return []
    limits = min(known), max(max(known), 1.01 * min(known))
    return [
        (f"largest activation{name}", partial(_draw_activations, maxima, limits))
        for name, maxima in zip(names, depths, strict=True)
        if maxima
    ]


def _by_depth(record: RunRecord) -> dict[int, MetricSeries]:
    """Return the activation maxima by depth: 0 is the embedding, 1 the first layer."""
    found = {}
    for name, series in record.training.items():
        if match := LAYER.match(name):
            found[0 if match[1] else int(match[2]) + 1] = series
    return found


def _draw_activations(depths: Mapping[int, MetricSeries], limits: tuple[float, float], axes: Axes) -> None:
    """Draw activation maxima by depth and step as colours."""
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
    """Add a legend of the runs' colours and of lines, dots and stars."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(number), linewidth=3) for number in range(len(records))]
    texts = [
        f"{name}, {record.state} at step {record.done}{'' if record.planned is None else f' of {record.planned}'}"
        for name, record in zip(_ascii_names(records), records, strict=True)
    ]
    meanings = {
        "training": (Line2D([], [], color="grey", linewidth=0.8), any(record.training for record in records)),
        "validation": (Line2D([], [], color="grey", marker=".", linestyle=":"), any(r.validation for r in records)),
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
        shown.set_text(text)  # and start with _, which would hide the entry


def _ascii_names(records: Sequence[RunRecord]) -> list[str]:
    """Return names of the runs that the font can show: a number replaces a name that is not ASCII."""
    return [name if name.isascii() else f"run {number}" for number, name in enumerate(names_apart(records), start=1)]


def _all_series(record: RunRecord) -> list[MetricSeries]:
    """Return the training and validation metrics of a run."""
    return [*record.training.values(), *record.validation.values()]


def _in_words(metric: str) -> str:
    """Return a metric's name as a title."""
    return metric.replace("_per_second", "/s").replace("_", " ")


def _colour(number: int) -> str:
    """Return the colour of a run."""
    return COLOURS[number % len(COLOURS)]
