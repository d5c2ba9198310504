"""Ranges of numeric settings, checked in the ``__post_init__`` of their dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

# Intervals that several dataclasses share.
COUNT = "[1, 1000000000]"
INTERVAL = "[0, 1000000000]"  # in steps; 0 for never
BATCH = "[1, 1048576]"
WORKERS = "[0, 1024]"  # processes
SEED = "[0, 9223372036854775807]"  # below 2^63, as for generation


def check_ranges(settings: object, ranges: Mapping[str, str]) -> None:
    """Raise ValueError for the first attribute outside its interval; NaN is outside every interval.

    Args:
        settings: A dataclass instance.
        ranges: Intervals by attribute, such as ``[0, 1)`` or ``(0, inf)``. Each number of a tuple is checked.

    Raises:
        ValueError: An attribute is outside its interval.
    """
    for name, interval in ranges.items():
        value = getattr(settings, name)
        if not all(_contains(interval, number) for number in (value if isinstance(value, tuple) else (value,))):
            given = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{name} must be {_describe(interval)}, got {given}")


class OptimizerSettings(Protocol):
    """Numbers that the settings of every trainer have."""

    @property
    def steps(self) -> int:
        """Number of steps."""

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""

    @property
    def clip_norm(self) -> float | None:
        """Maximum norm of the gradient; None for no clipping."""


OPTIMIZER_RANGES = {
    "steps": "[2, 1000000000]",
    "batch_size": BATCH,
    "learning_rate": "[0, inf)",
    "final_learning_rate": "[0, inf)",
    "betas": "[0, 1)",
    "weight_decay": "[0, inf)",
    "seed": SEED,
}


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raise ValueError unless the schedule, the optimizer's numbers and the seed of a trainer are in range.

    Args:
        settings: Settings with the attributes of ``OPTIMIZER_RANGES``, ``warmup_steps`` and ``clip_norm``.
    """
    check_ranges(settings, OPTIMIZER_RANGES)
    steps, warmup_steps, clip_norm = settings.steps, settings.warmup_steps, settings.clip_norm
    if not 0 < warmup_steps < steps:
        raise ValueError(
            f"warmup_steps must be from 1 to steps - 1 ({steps - 1}), got {warmup_steps}; set it as well, for example "
            f"to {max(1, steps // 20)}"
        )
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be above 0 and finite, or null for no clipping, got {clip_norm}")


def _contains(interval: str, number: float) -> bool:
    """Return whether a number lies in an interval."""
    low, high = (float(end) if end == "inf" or "." in end else int(end) for end in interval[1:-1].split(", "))
    return (number >= low if interval[0] == "[" else number > low) and (
        number <= high if interval[-1] == "]" else number < high
    )


def _describe(interval: str) -> str:
    """Return an interval in words, such as "at least 1"."""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    return f"{'at least' if interval[0] == '[' else 'above'} {low} and finite"
