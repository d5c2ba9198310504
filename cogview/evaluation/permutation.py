"""Permutation tests: how probable it is that a mean falls as far by chance (Fisher, 1935; Pitman, 1937)."""

# N items, R resamples
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 9999
CHUNK = 500  # resamples at a time, which bounds the memory


def fall_probability(before: Sequence[float], after: Sequence[float], *, paired: bool) -> float:
    """Return the probability, without any change, of a mean that falls as far as the one of ``after`` does.

    Paired items have their signs flipped, others are dealt anew. Equal calls give equal results.

    Args:
        before: Values of N items.
        after: Values; with ``paired``, of the same items in the same order.
        paired: Whether both are of the same items.

    Returns:
        At least 1 / (``RESAMPLES`` + 1), at most 1.

    Raises:
        ValueError: There are no items, or the numbers of paired ones differ.
    """
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if not len(old) or not len(new) or (paired and len(old) != len(new)):
        raise ValueError(f"a comparison needs items on both sides, got {len(old)} and {len(new)}, paired {paired}")
    random = np.random.default_rng(0)
    difference = new - old if paired else None
    observed = float(new.mean() - old.mean())
    pooled = np.concatenate([old, new])
    as_low = 1  # the observed order itself
    for start in range(0, RESAMPLES, CHUNK):
        count = min(CHUNK, RESAMPLES - start)
        if difference is not None:
            moved = difference[difference != 0]
            signs = random.integers(0, 2, size=(count, len(moved))) * 2 - 1
            means = signs @ moved / len(difference)
        else:
            dealt = random.permuted(np.broadcast_to(pooled, (count, len(pooled))), axis=1)
            means = dealt[:, len(old) :].mean(axis=1) - dealt[:, : len(old)].mean(axis=1)
        as_low += int((means <= observed + 1e-12).sum())
    return as_low / (RESAMPLES + 1)
