"""Several stores read as one, while new ones come: which sample of a run reads which row of which store.

A run has phases. In each a fixed list of stores is mixed by shares, every store with the number of rows that it had
when it came. A new store begins a new phase, with the stores of the phase before and itself. Which row a sample reads
follows from the seed, the phases and its number alone. So the phases are all that a run has to write down, and a later
phase changes no sample before it.
"""

# N rows, S stores

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cogview.data.sampling_order import sample_index
from cogview.data.store import DATA_FILE, NO_TOKEN, TEXT_FIELD, StoreHeader, TokenStore
from cogview.data.v1_datasets import InvalidRow, open_dataset
from cogview.errors import InputError
from cogview.files import atomic_write

PHASES_FILE = "stores.jsonl"  # of the phases, in the folder of a run

# Of the samples that reach a split, sample j goes left where floor((j + 1)·w / 2^24) exceeds floor(j·w / 2^24).
_SPLIT_BITS = 24  # j·w fits 63 bits up to sample 2^39, which is 5·10^11


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Which stores are mixed from sample ``first_sample`` of a run on, up to the next phase.

    For each store ``names`` has its path as it was given, ``shares`` its part of the samples (relative to the others),
    and ``sizes`` its rows when it came: those that a store gets later are not read.
    """

    first_sample: int
    names: tuple[str, ...]
    weights: tuple[float, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.first_sample < 0:
            raise ValueError(f"samples are numbered from 0, got {self.first_sample}")
        if not len(self.names) == len(self.weights) == len(self.sizes):
            raise ValueError(
                f"{len(self.names)} stores have {len(self.weights)} shares and {len(self.sizes)} sizes, expected one of "
                "each for every store"
            )
        if not self.names:
            raise InputError("there are no stores to train on, expected at least one")
        for number, name in enumerate(self.names):
            if name in self.names[:number]:
                raise InputError(f"the store {name} is given twice: give it once, with the share of both")
            if not 0 < self.weights[number] < math.inf:
                raise InputError(f"the share of {name} is {self.weights[number]}, expected a number above 0")
            if self.sizes[number] < 1:
                raise InputError(f"{name} has no rows: leave it out, or encode some first")

    def with_stores(self, first_sample: int, sizes: Mapping[str, int]) -> Phase:
        """The phase from ``first_sample`` on in which the stores ``sizes`` (rows by name) join those of this one.

        The share of a new store is sum(shares) · size / sum(sizes): each of its rows comes as often as a row of the
        stores that are there does on average. These keep their shares among themselves.
        """
        share_of_a_row = math.fsum(self.weights) / sum(self.sizes)
        return Phase(
            first_sample=first_sample,
            names=(*self.names, *sizes),
            weights=(*self.weights, *(share_of_a_row * size for size in sizes.values())),
            sizes=(*self.sizes, *sizes.values()),
        )

    def to_json(self) -> str:
        """One line, without its end."""
        stores = [
            {"name": name, "share": share, "size": size}
            for name, share, size in zip(self.names, self.weights, self.sizes, strict=True)
        ]
        return json.dumps({"first_sample": self.first_sample, "stores": stores}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Phase:
        """Read ``to_json`` back; ValueError where it is no phase."""
        content = json.loads(text)
        try:
            first_sample, stores = content["first_sample"], content["stores"]
            columns = [tuple(store[key] for store in stores) for key in ("name", "share", "size")]
        except (KeyError, TypeError):
            raise ValueError("it is no phase of a run") from None
        names, shares, sizes = columns
        if not (_are(int, [first_sample, *sizes]) and _are(str, names) and _are((int, float), shares)):
            raise ValueError("it is no phase of a run")
        return Phase(first_sample=first_sample, names=names, weights=shares, sizes=sizes)


def _are(kind: type | tuple[type, ...], values: Sequence[Any]) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def check_phases(phases: Sequence[Phase]) -> None:
    """InputError unless the phases begin at sample 0, rise, and each goes on with the stores of the one before."""
    if phases and phases[0].first_sample:
        raise InputError(f"the first phase begins at sample {phases[0].first_sample}, expected 0")
    for before, after in pairwise(phases):
        if after.first_sample <= before.first_sample:
            raise InputError(
                f"a phase begins at sample {after.first_sample}, the one before at {before.first_sample}: expected a "
                "later one"
            )
        now = dict(zip(after.names, after.sizes, strict=True))
        for number, (name, size) in enumerate(zip(before.names, before.sizes, strict=True)):
            if after.names[number : number + 1] != (name,) or now[name] != size:
                raise InputError(
                    f"the phase from sample {after.first_sample} on does not go on with {name} as it was before: "
                    "expected the same stores in the same order with the same sizes, and new ones behind them"
                )


class Mixture:
    """Where the samples of a run come from: a pure function of (seed, phases, sample).

    Within a phase the stores are interleaved evenly, not at random: a split parts the samples of the first store from
    those of all others, the next one those of the second from what remains, and so on. After any number of samples of
    a phase a store had what its share asks for, to within 1 for each split up to its own. (What a split takes is
    rounded to 1 in 2^24 of its samples, and is at least that.)

    Each store has an order of its own: the j-th sample of the whole run that it is asked for, earlier phases counted,
    reads row ``sample_index(seed of the store, j, size)``. So it gives each row once in an epoch of its own length, and
    a new phase changes nothing about an epoch under way. A store alone has the seed itself.
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

    def locate(self, samples: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the store, and of the row in it, that each sample of the run reads: int64, in their shape."""
        samples = np.asarray(samples, dtype=np.int64)
        if samples.size and samples.min() < 0:
            raise ValueError(f"samples are numbered from 0, got {samples.min()}")
        flat = samples.reshape(-1)
        stores, turns = np.zeros_like(flat), np.zeros_like(flat)
        phases = np.searchsorted(self._first_samples, flat, side="right") - 1
        for phase in np.unique(phases):
            at = np.flatnonzero(phases == phase)
            stores[at], turns[at] = _interleave(self._weights[phase], flat[at] - self._first_samples[phase])
            turns[at] += self._before[phase][stores[at]]
        rows = np.zeros_like(flat)
        for store in np.unique(stores):
            at = np.flatnonzero(stores == store)
            rows[at] = sample_index(self._seeds[store], turns[at], self.phases[-1].sizes[store])
        return stores.reshape(samples.shape), rows.reshape(samples.shape)


def _split_weights(shares: Sequence[float]) -> list[int]:
    """What each store but the last takes of the samples that reach it, over 2^24; none takes all or nothing."""
    whole = 1 << _SPLIT_BITS
    rests = (math.fsum(shares[number:]) for number in range(len(shares) - 1))
    return [min(max(round(share / rest * whole), 1), whole - 1) for share, rest in zip(shares[:-1], rests, strict=True)]


def _counts(weights: Sequence[int], num_samples: int) -> list[int]:
    """How many of the first ``num_samples`` of a phase each store gets."""
    counts = []
    for weight in weights:
        counts.append(num_samples * weight >> _SPLIT_BITS)
        num_samples -= counts[-1]
    return [*counts, num_samples]


def _interleave(weights: Sequence[int], samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Store of each of the (N,) samples of a phase, and how many before it the phase has for that store."""
    stores, turns = np.full_like(samples, len(weights)), samples.copy()
    rest = np.arange(len(samples))
    for store, weight in enumerate(weights):
        turn = turns[rest]
        taken = turn * weight >> _SPLIT_BITS  # of those before
        takes = (turn + 1) * weight >> _SPLIT_BITS > taken
        turns[rest] = np.where(takes, taken, turn - taken)
        stores[rest[takes]] = store
        rest = rest[~takes]
    return stores, turns


def _store_seed(seed: int, store: int) -> int:
    """The seed itself for the first store: a run on one store reads what ``sample_index`` says."""
    if store == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {store}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class MixedStore:
    """The rows of several stores that were made alike; ``header`` is that of the first.

    InputError unless they have the same fields, grid and tokenizers. Their texts may be narrower than those of the
    first: what is missing is ``ABSENT``. Like its stores it can be pickled, and handed to the workers of a DataLoader.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        if not stores:
            raise InputError("there are no stores to train on, expected at least one")
        self.stores = tuple(stores)
        self.header = stores[0].header
        for store in stores[1:]:
            _check_fits(store, self.header, str(stores[0].path))

    def with_store(self, store: TokenStore) -> MixedStore:
        """These stores and ``store`` as the last; this object stays as it is."""
        return MixedStore([*self.stores, store])

    def read(self, numbers: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Row ``rows[n]`` of store ``numbers[n]`` for each n, as {field: (N, width) uint16 array}, the caller's own."""
        numbers, rows = np.asarray(numbers, dtype=np.int64), np.asarray(rows, dtype=np.int64)
        asked = np.unique(numbers)
        if asked.size and not 0 <= asked[0] <= asked[-1] < len(self.stores):
            outside = asked[0] if asked[0] < 0 else asked[-1]
            raise IndexError(f"store {outside} of a mixture that has the stores 0…{len(self.stores) - 1}")
        mixed = {
            name: np.full((len(numbers), width), NO_TOKEN, dtype=np.uint16)
            for name, width in self.header.fields.items()
        }
        for number in asked:
            at = np.flatnonzero(numbers == number)
            for name, ids_NW in self.stores[number].read(rows[at]).items():
                mixed[name][at, : ids_NW.shape[1]] = ids_NW
        return mixed

    def check_sizes(self, phase: Phase) -> None:
        """InputError unless every store still has the rows that it had when it came, by ``phase``."""
        for name, size, store in zip(phase.names, phase.sizes, self.stores, strict=True):
            _check_size(name, size, len(store))


def _check_size(name: str, before: int, now: int) -> None:
    if now < before:
        raise InputError(
            f"{name} has {now} rows, the run began to read {before}: bring them back, or begin another run"
        )


def _check_fits(store: TokenStore, header: StoreHeader, whose: str) -> None:
    """InputError unless ``store`` can be mixed with stores of ``header``, that of ``whose``."""
    store.check_compatible(
        codebook_sha256=header.codebook_sha256,
        text_sha256=header.text_sha256,
        num_image_codes=header.num_image_codes,
        num_text_pieces=header.num_text_pieces,
        grid=header.grid,
    )
    fields = store.header.fields
    if set(fields) != set(header.fields):
        own, others = (", ".join(sorted(names)) for names in (fields, header.fields))
        raise InputError(f"{store.path} has the fields {own}, but {whose} has {others}: encode both alike")
    for name, width in header.fields.items():
        if name == TEXT_FIELD and fields[name] > width:
            raise InputError(
                f"{store.path} has texts of up to {fields[name]} pieces, {whose} of up to {width}: encode it with "
                f"text_width: {width}, or begin a run with the store of the longest texts first"
            )
        if name != TEXT_FIELD and fields[name] != width:
            raise InputError(
                f'the field "{name}" is {fields[name]} wide in {store.path}, but {width} in {whose}: encode both alike'
            )


class StoreWatcher:
    """Looks for new stores directly below ``folder``, which fit ``header`` and feed ``tasks``.

    A store may be written there, moved there or linked there. It must not be written once it was found.
    """

    def __init__(self, folder: str | Path, header: StoreHeader, tasks: Collection[str] = ()) -> None:
        self.folder = Path(folder)
        self.header = header
        self.tasks = tuple(tasks)
        self._told: set[str] = set()
        if not self.folder.is_dir():
            raise InputError(f"there is no folder {self.folder} to look for new stores in: make it, or watch none")

    def new_stores(self, known: Collection[str]) -> list[TokenStore]:
        """The stores that are none of ``known`` (paths), in the order of their names; released datasets are some, too.

        What is hidden, is written just now, has no rows or cannot be read as a store may be one the next time. A store
        that does not fit is told once on stderr, and ignored from then on. Writing is noticed by the lock that LMDB
        has meanwhile, if it is on this machine and the lock's file may be written to.
        """
        seen = {os.path.realpath(name) for name in known}
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if not entry.name.startswith("."))
        except OSError as error:
            self._tell_once("", f"no new stores: {self.folder} cannot be read any more ({error.strerror})")
            return []
        found = []
        for path in (self.folder / name for name in names):
            place = os.path.realpath(path)
            if place in seen or place in self._told:
                continue
            seen.add(place)
            try:
                store = self._open(path)
            except InputError as error:
                self._tell_once(place, f"a new store does not fit and is left out: {error}")
            else:
                found += [store] if store is not None else []
        return found

    def _open(self, path: Path) -> TokenStore | None:
        """The store at ``path``, or None where there is none yet; InputError where it does not fit."""
        header = self.header
        try:
            if not (path / DATA_FILE).is_file() or _is_being_written(path):
                return None
            store = open_dataset(
                path,
                num_image_codes=header.num_image_codes,
                num_text_pieces=header.num_text_pieces,
                codebook_sha256=header.codebook_sha256,
                text_sha256=header.text_sha256,
            )
        except InvalidRow:  # of a released dataset, which can be read as such
            raise
        except (InputError, OSError):
            return None
        if not len(store):
            return None
        _check_fits(store, header, "the run")
        for task in self.tasks:
            store.check_compatible(layout=task)
        return store

    def _tell_once(self, place: str, message: str) -> None:
        if place not in self._told:
            self._told.add(place)
            print(message, file=sys.stderr)


def _is_being_written(path: Path) -> bool:
    """Whether another process has the LMDB in ``path`` open as a writer does.

    LMDB keeps a lock on the first byte of its lock file as long as an environment is open (``mdb_env_share_locks``);
    our readers open it without. A process must not ask about what it writes itself: the system would drop its lock.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows, where LMDB locks otherwise
        return False
    try:
        with (path / "lock.mdb").open("r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            except (BlockingIOError, PermissionError):
                return True
    except OSError:
        pass  # copied without a lock file, or from somebody else
    return False


# The ledger: a phase per line, as Phase.to_json has it


def read_phases(path: Path) -> list[Phase]:
    """The phases in the ledger at ``path``, none where there is no such file.

    A last line that a kill cut short does not count. InputError for any other that is no phase, or does not go on with
    the ones before.
    """
    try:
        lines = path.read_bytes().split(b"\n")  # names of files need not be UTF-8
    except FileNotFoundError:
        return []
    phases: list[Phase] = []
    for number, line in enumerate(lines, start=1):
        try:
            phases.append(Phase.from_json(line.decode("utf-8", errors="surrogateescape")))
            check_phases(phases)
        except ValueError as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                if number == len(lines):  # what is behind the end of the last whole line
                    break
                reason = "it is no JSON"
            raise InputError(
                f"line {number} of {path} cannot be used: {reason}; bring back the file as the run wrote it, or begin "
                "another run"
            ) from None
    return phases


def append_phase(path: Path, phase: Phase) -> None:
    """Write ``phase`` behind those in the ledger at ``path``, in place of a line that was cut short.

    The file is replaced, so that a kill leaves the old one or the new one. InputError where ``phase`` does not go on
    with the others.
    """
    phases = [*read_phases(path), phase]
    check_phases(phases)
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file,
    ):
        file.writelines(phase.to_json() + "\n" for phase in phases)
        file.flush()
        os.fsync(file.fileno())


def check_same_start(phases: Sequence[Phase], stores: Phase) -> None:
    """InputError unless the run of ``phases`` began with ``stores``: the names, the shares, at least the rows.

    ``stores`` is the phase that would begin a run now. Shares that are the stores' sizes may have grown with them.
    """
    if not phases:
        return
    began = phases[0]
    remedy = "resume with the stores that it began with, or begin another run"
    for number, (name, now) in enumerate(zip(began.names, stores.names, strict=False), start=1):
        if name != now:
            raise InputError(f"the run began with {name} as store {number}, now it is {now}: {remedy}")
    if missing := began.names[len(stores.names) :]:
        raise InputError(f"the run began with {missing[0]} too, which is not given now: {remedy}")
    if added := stores.names[len(began.names) :]:
        raise InputError(f"the run began without {added[0]}: {remedy}; a watched folder can bring new stores")
    for name, before, now_size in zip(began.names, began.sizes, stores.sizes, strict=True):
        _check_size(name, before, now_size)
    if _are_sizes(began) and _are_sizes(stores):
        return
    for name, share, now_share in zip(began.names, _parts(began.weights), _parts(stores.weights), strict=True):
        if not math.isclose(share, now_share, rel_tol=1e-9):
            raise InputError(
                f"the run began with a share of {share:.6g} of all samples for {name}, now it is {now_share:.6g}: "
                "resume with the shares that it began with, or begin another run"
            )


def _parts(amounts: Sequence[float]) -> list[float]:
    whole = math.fsum(amounts)
    return [amount / whole for amount in amounts]


def _are_sizes(phase: Phase) -> bool:
    """Whether the shares of the stores are as their sizes, so that all rows are alike."""
    both = zip(_parts(phase.weights), _parts(phase.sizes), strict=True)
    return all(math.isclose(share, size, rel_tol=1e-9) for share, size in both)
