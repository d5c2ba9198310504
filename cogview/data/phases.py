"""Phases of a run: which stores are mixed from which sample on, and the file that records them.

A phase mixes a fixed list of stores by weights, each with the number of rows that it had when it joined. A new store
starts a new phase with the stores of the previous phase and itself. The phases are all that a run must record, because
the row that a sample reads follows from the seed, the phases and the sample's number (``mixture.py``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cogview.errors import InputError
from cogview.files import MAX_LINES_BYTES, atomic_write
from cogview.input_files import read_regular
from cogview.plain_data import parse_json

PHASES_FILE = "stores.jsonl"  # of the phases, in the folder of a run


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The stores that are mixed from sample ``first_sample`` of a run up to the next phase.

    ``names`` holds the path of each store as given, ``weights`` its relative share of the samples, and ``sizes`` its
    number of rows when it joined. Rows added to a store later are not read.
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
                f"{len(self.names)} stores have {len(self.weights)} weights and {len(self.sizes)} sizes, expected one "
                "of each for every store"
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
        """Return the phase in which new stores join the stores of this phase.

        A new store gets the weight sum(weights) · size / sum(sizes), so that its rows are read as often as the average
        row of the present stores, which keep their weights.

        Args:
            first_sample: the sample from which the new phase holds.
            sizes: number of rows of each new store, by name.

        Returns:
            The phase with all stores.
        """
        weight_of_a_row = math.fsum(self.weights) / sum(self.sizes)
        return Phase(
            first_sample=first_sample,
            names=(*self.names, *sizes),
            weights=(*self.weights, *(weight_of_a_row * size for size in sizes.values())),
            sizes=(*self.sizes, *sizes.values()),
        )

    def to_json(self) -> str:
        """Return the phase as one line of JSON, without a newline."""
        stores = [
            {"name": name, "share": share, "size": size}
            for name, share, size in zip(self.names, self.weights, self.sizes, strict=True)
        ]
        return json.dumps({"first_sample": self.first_sample, "stores": stores}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Phase:
        """Parse a line written by ``to_json``.

        Raises:
            ValueError: if the line is not a phase.
        """
        content = parse_json(text)
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
    """Check that phases begin at sample 0, rise, and each continues with the stores of the previous one.

    Raises:
        InputError: if they do not.
    """
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


def check_size(name: str, before: int, now: int) -> None:
    """Check that a store has not lost rows.

    Args:
        name: name of the store.
        before: number of rows when it joined the run.
        now: number of rows now.

    Raises:
        InputError: if there are fewer rows than before.
    """
    if now < before:
        raise InputError(
            f"{name} has {now} rows, the run began to read {before}: bring them back, or begin another run"
        )


def read_phases(path: Path) -> list[Phase]:
    """Read the phases of a run.

    Args:
        path: the file ``stores.jsonl`` of the run; a missing file means no phases.

    Returns:
        The phases in order. A last line that was cut short by a kill is ignored.

    Raises:
        InputError: if the file cannot be read, or any other line is not a phase or does not continue the phases before
            it.
    """
    if not os.path.lexists(path):
        return []
    lines = read_regular(path, MAX_LINES_BYTES).split(b"\n")  # names of files need not be UTF-8
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
    """Append a phase to the file of a run, replacing a last line that was cut short.

    The file is replaced atomically, so that a kill leaves the old or the new file.

    Args:
        path: the file ``stores.jsonl`` of the run.
        phase: the new phase.

    Raises:
        InputError: if ``phase`` does not continue the recorded phases.
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
    """Check that a run began with the stores that are given now.

    Names and weights must be equal and no store may have fewer rows than before. Weights that equal the stores' sizes
    may have grown with them.

    Args:
        phases: the recorded phases of the run.
        stores: the phase that would begin a new run with the stores given now.

    Raises:
        InputError: if a store is missing, new, in another order, smaller or weighted differently.
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
        check_size(name, before, now_size)
    if _are_sizes(began) and _are_sizes(stores):
        return
    for name, share, now_share in zip(
        began.names, _normalized(began.weights), _normalized(stores.weights), strict=True
    ):
        if not math.isclose(share, now_share, rel_tol=1e-9):
            raise InputError(
                f"the run began with a share of {share:.6g} of all samples for {name}, now it is {now_share:.6g}: "
                "resume with the shares that it began with, or begin another run"
            )


def _normalized(amounts: Sequence[float]) -> list[float]:
    whole = math.fsum(amounts)
    return [amount / whole for amount in amounts]


def _are_sizes(phase: Phase) -> bool:
    """Return whether the weights are proportional to the sizes, so that all rows are equally likely."""
    both = zip(_normalized(phase.weights), _normalized(phase.sizes), strict=True)
    return all(math.isclose(share, size, rel_tol=1e-9) for share, size in both)
