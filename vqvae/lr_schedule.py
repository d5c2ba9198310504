"""The learning rate by step, of all trainers."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, peak: float, final: float, warmup_steps: int, steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine (arXiv:1608.03983).

    Args:
        step: Index of the step, from 0.
        peak: The rate at the end of the warm-up.
        final: The rate towards which it falls until ``steps``.
        warmup_steps: Steps that rise to ``peak``, evenly.
        steps: Steps of the whole training.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return final + (peak - final) / 2 * (1 + math.cos(math.pi * progress))
