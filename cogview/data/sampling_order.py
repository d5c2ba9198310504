"""The order of training samples, as a function of a seed and a step.

Sample ``k`` of a run is row ``k % size`` of epoch ``k // size``, sent through a permutation keyed by the seed and the
epoch. Nothing is stored or shuffled, so the state to resume from is one integer, with any number of processes.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8  # of the Feistel network; four make one pseudorandom when its functions are (Luby and Rackoff, 1988)

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def sample_index(seed: int, k: int | np.ndarray, size: int) -> np.ndarray:
    """Return the row that a sample of a run reads.

    Every ``size`` consecutive samples from a multiple of ``size`` on form an epoch, which has each row exactly once.

    Args:
        seed: seed of the order.
        k: sample numbers, from 0; any shape.
        size: number of rows of the store, at least 1.

    Returns:
        int64 array of rows in [0, size), in the shape of ``k``.

    Raises:
        ValueError: if ``size`` is below 1 or a sample number is negative.
    """
    if size < 1:
        raise ValueError(f"there are {size} rows to sample from, at least 1 is needed")
    samples = np.asarray(k, dtype=np.int64)
    if samples.size and samples.min() < 0:
        raise ValueError(f"samples are numbered from 0, got {samples.min()}")
    epoch, position = np.divmod(samples.reshape(-1), size)
    key = _mix(_mix(np.full(epoch.shape, seed % 2**64, dtype=np.uint64)) ^ epoch.astype(np.uint64))

    # The network permutes 0…2^bits-1. Sent through it again and again, a number below ``size`` comes back below
    # ``size`` at some point, and the first such points are a permutation again (Black and Rogaway, 2002).
    bits = max(2, int(size - 1).bit_length())
    row = _feistel(position.astype(np.uint64), key, bits)
    while (outside := np.flatnonzero(row >= size)).size:
        row[outside] = _feistel(row[outside], key[outside], bits)
    return row.astype(np.int64).reshape(samples.shape)


def _feistel(number: np.ndarray, key: np.ndarray, bits: int) -> np.ndarray:
    """Apply a permutation of 0…2^bits-1 keyed by ``key``; both arrays are uint64 of one shape.

    Each round changes one half by a function of the other half and is its own inverse, whatever that function is.
    """
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = number >> low_bits, number & low_mask
    for index in range(ROUNDS):
        round_key = key + np.uint64(index * _GOLDEN % 2**64)
        if index % 2:
            low = low ^ (_mix(high ^ round_key) & low_mask)
        else:
            high = high ^ (_mix(low ^ round_key) & high_mask)
    permuted: np.ndarray = (high << low_bits) | low
    return permuted


def _mix(number: np.ndarray) -> np.ndarray:
    """Apply the scrambling step of SplitMix64 (Steele, Lea and Flood, 2014), on uint64 modulo 2^64.

    ``generation.sampling`` has it for int64 tensors; torch has few operations for uint64.
    """
    number = number + np.uint64(_GOLDEN)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = number ^ (number >> np.uint64(31))
    return mixed
