"""Mixtures of stores: which row of which store a sample of a run reads.

The row is a pure function of the seed, the phases of the run (``phases.py``) and the sample's number. A later phase
changes no earlier sample.
"""

# N rows, S stores

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cogview.data.phases import Phase, check_phases, check_size
from cogview.data.sampling_order import sample_index
from cogview.data.store import NO_TOKEN, TEXT_FIELDS, StoreHeader, TokenStore
from cogview.errors import InputError
from cogview.tokenizers.store_tasks import feeds

# Of the samples that reach a split, sample j goes left where floor((j + 1)·w / 2^24) exceeds floor(j·w / 2^24).
_SPLIT_BITS = 24  # j·w fits 63 bits up to sample 2^39, which is 5·10^11


class Mixture:
    """Source of every sample of a run: a pure function of (seed, phases, sample).

    Within a phase the stores are interleaved evenly, not at random. A first split separates the samples of the first
    store from the others, a second split those of the second store from the rest, and so on. At any point of a phase
    the count of a store differs from its weighted share by at most 1 for each split up to its own. (A split's share is
    rounded to a multiple of 2^-24 and is at least 2^-24.)

    Each store has its own order: its j-th sample of the whole run reads row ``sample_index(store's seed, j, size)``. A
    store therefore yields each row once in an epoch of its own length, and a new phase does not disturb a running
    epoch. A single store uses the run's seed.

    Args:
        phases: the phases of the run, at least one.
        seed: the seed of the run.
    """

    def __init__(self, phases: Sequence[Phase], seed: int) -> None:
        if not phases:
            raise ValueError("a mixture needs at least one phase")
        check_phases(phases)
        self.phases = tuple(phases)
        self.seed = seed
        self._first_samples = np.array([phase.first_sample for phase in phases])
        self._weights = [_split_weights(phase.weights) for phase in phases]
        last = phases[-1]
        self._seeds = [_store_seed(seed, store) for store in range(len(last.names))]
        # How often each store has been asked for before each phase.
        self._before = [np.zeros(len(last.names), dtype=np.int64)]
        for (phase, after), weights in zip(pairwise(phases), self._weights[:-1], strict=True):
            counts = _counts(weights, after.first_sample - phase.first_sample)
            counts += [0] * (len(last.names) - len(counts))
            self._before.append(self._before[-1] + np.array(counts))

    def phase_of(self, sample: int) -> Phase:
        """Return the phase of a sample of the run."""
        return self.phases[int(np.searchsorted(self._first_samples, sample, side="right")) - 1]

    def locate(self, samples: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the store and the row that each sample of the run reads.

        Args:
            samples: sample numbers, from 0; any shape.

        Returns:
            Two int64 arrays in the shape of ``samples``: indices of stores, and rows in these stores.

        Raises:
            ValueError: if a number is negative.
        """
        samples = np.asarray(samples, dtype=np.int64)
        if samples.size and samples.min() < 0:
            raise ValueError(f"samples are numbered from 0, got {samples.min()}")
        flat = samples.reshape(-1)
        stores, ordinals = np.zeros_like(flat), np.zeros_like(flat)
        phases = np.searchsorted(self._first_samples, flat, side="right") - 1
        for phase in np.unique(phases):
            at = np.flatnonzero(phases == phase)
            stores[at], ordinals[at] = _interleave(self._weights[phase], flat[at] - self._first_samples[phase])
            ordinals[at] += self._before[phase][stores[at]]
        rows = np.zeros_like(flat)
        for store in np.unique(stores):
            at = np.flatnonzero(stores == store)
            rows[at] = sample_index(self._seeds[store], ordinals[at], self.phases[-1].sizes[store])
        return stores.reshape(samples.shape), rows.reshape(samples.shape)


def _split_weights(shares: Sequence[float]) -> list[int]:
    """Return the share, over 2^24, that each store but the last takes of its split; never all or nothing."""
    whole = 1 << _SPLIT_BITS
    rests = (math.fsum(shares[number:]) for number in range(len(shares) - 1))
    return [min(max(round(share / rest * whole), 1), whole - 1) for share, rest in zip(shares[:-1], rests, strict=True)]


def _counts(weights: Sequence[int], num_samples: int) -> list[int]:
    """Return how many of the first ``num_samples`` samples of a phase each store gets."""
    counts = []
    for weight in weights:
        counts.append(num_samples * weight >> _SPLIT_BITS)
        num_samples -= counts[-1]
    return [*counts, num_samples]


def _interleave(weights: Sequence[int], samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the store of each of the (N,) samples of a phase, and its ordinal among that store's samples.

    With weights for stores (A, B) of 3 : 1, samples 0…7 give A A A B A A A B and the ordinals 0 1 2 0 3 4 5 1.
    """
    stores, ordinals = np.full_like(samples, len(weights)), samples.copy()
    rest = np.arange(len(samples))
    for store, weight in enumerate(weights):
        turn = ordinals[rest]
        taken = turn * weight >> _SPLIT_BITS  # of those before
        takes = (turn + 1) * weight >> _SPLIT_BITS > taken
        ordinals[rest] = np.where(takes, taken, turn - taken)
        stores[rest[takes]] = store
        rest = rest[~takes]
    return stores, ordinals


def _store_seed(seed: int, store: int) -> int:
    """Return the seed of a store's order: the run's seed for the first store, a hash for the others."""
    if store == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {store}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class MixedStore:
    """The rows of several compatible stores; ``header`` is the header of the first store.

    Text fields may be narrower than that of the first store, and a store may lack fields that another one has; both are
    padded with ``NO_TOKEN``. The object can be pickled and sent to the workers of a DataLoader.

    Args:
        stores: the stores, at least one.

    Attributes:
        fields: Width of every field that a store has, by name.

    Raises:
        InputError: if grid, tokenizers or widths of the stores differ.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        if not stores:
            raise InputError("there are no stores to train on, expected at least one")
        self.stores = tuple(stores)
        self.header = stores[0].header
        self.fields = dict(self.header.fields)
        for store in stores[1:]:
            check_fits(store, self.header, str(stores[0].path), same_fields=False)
            for name, width in store.header.fields.items():
                if self.fields.setdefault(name, width) != width and name not in TEXT_FIELDS:
                    raise InputError(
                        f'the field "{name}" is {width} wide in {store.path}, but {self.fields[name]} in another '
                        "store: encode both alike"
                    )

    def feeding(self, task: str) -> np.ndarray:
        """Return which stores can feed a task, bool (S,).

        Args:
            task: Name of the task.
        """
        return np.array([feeds(store.header.layouts, task) for store in self.stores])

    def with_store(self, store: TokenStore) -> MixedStore:
        """Return a copy with ``store`` appended."""
        return MixedStore([*self.stores, store])

    def read(self, numbers: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Read rows of several stores.

        Args:
            numbers: (N,) indices of stores.
            rows: (N,) rows in these stores.

        Returns:
            {field: (N, width) uint16 array}, new arrays.

        Raises:
            IndexError: if a store or row does not exist.
        """
        numbers, rows = np.asarray(numbers, dtype=np.int64), np.asarray(rows, dtype=np.int64)
        asked = np.unique(numbers)
        if asked.size and not 0 <= asked[0] <= asked[-1] < len(self.stores):
            outside = asked[0] if asked[0] < 0 else asked[-1]
            raise IndexError(f"store {outside} of a mixture that has the stores 0…{len(self.stores) - 1}")
        mixed = {name: np.full((len(numbers), width), NO_TOKEN, dtype=np.uint16) for name, width in self.fields.items()}
        for number in asked:
            at = np.flatnonzero(numbers == number)
            for name, ids_NW in self.stores[number].read(rows[at]).items():
                mixed[name][at, : ids_NW.shape[1]] = ids_NW
        return mixed

    def check_sizes(self, phase: Phase) -> None:
        """Raise InputError unless every store still has the rows that ``phase`` recorded."""
        for name, size, store in zip(phase.names, phase.sizes, self.stores, strict=True):
            check_size(name, size, len(store))


def check_fits(store: TokenStore, header: StoreHeader, whose: str, *, same_fields: bool = True) -> None:
    """Check that a store can be mixed with the stores of a run.

    Args:
        store: the store.
        header: header of the first store.
        whose: name of the first store, for messages.
        same_fields: Whether it must have the same fields.

    Raises:
        InputError: if fields, grid, tokenizers or widths do not match.
    """
    store.check_same_tokenizers(header)
    fields = store.header.fields
    if same_fields and set(fields) != set(header.fields):
        own, others = (", ".join(sorted(names)) for names in (fields, header.fields))
        raise InputError(f"{store.path} has the fields {own}, but {whose} has {others}: encode both alike")
    for name, width in header.fields.items():
        if name not in fields:
            continue
        if name in TEXT_FIELDS and fields[name] > width:
            raise InputError(
                f"{store.path} has texts of up to {fields[name]} pieces, {whose} of up to {width}: encode it with "
                f"text_width: {width}, or begin a run with the store of the longest texts first"
            )
        if name not in TEXT_FIELDS and fields[name] != width:
            raise InputError(
                f'the field "{name}" is {fields[name]} wide in {store.path}, but {width} in {whose}: encode both alike'
            )


# The ledger: a phase per line, as Phase.to_json has it
