"""Plant faults in a model, run the gate on each with several seeds, and count how often it notices.

An unchanged model runs as often with the same seeds, and should pass. All runs are compared with the result of seed 0
in MODEL/gate.json. The unchanged model, and the first run of each fault, measure all rows. Other runs end after the
first group of rows of which one fell, since the fault is noticed then. The runs are written to a result file; the
command makes those that are missing in it.

python scripts/benchmarks/gate_faults.py RESULT [--runs 20] [--prompts 500] [--fault NAME …]
python scripts/benchmarks/gate_faults.py RESULT --read
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogview import CogView
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.cli.evaluate_gate import GATE_FILE, open_world
from cogview.config_io import to_mapping
from cogview.emoji.evaluation.gate import (
    CLEAN_LIMIT,
    SIGNIFICANCE,
    GateSettings,
    as_items,
    compare_rows,
    earlier_limit,
    gate_groups,
    measure_group,
)
from cogview.emoji.evaluation.scenes import check_world
from cogview.emoji.grader import SceneGrader
from cogview.errors import InputError
from cogview.evaluation.manifest import read_result, unlike_fields, write_result
from cogview.evaluation.metrics import wilson_interval
from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions
from cogview.evaluation.records import Manifest, Result, ResultItems, ResultValue
from cogview.generation import token_sampler

MEASURE = "gate-faults"
FELL = "fell."  # begins the name of the verdict whether a row fell
GROUP = 64  # columns of an int4 group
FIRST_SEED = 1  # gate.json has seed 0
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault to plant.

    Attributes:
        description: What is wrong.
        damage: Changes weights in place.
        sampling: Sampling settings to replace.
        patch: Returns the context in which the model runs.
        first: The group of rows that is measured first.
    """

    description: str
    damage: Callable[[Weights], None] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    patch: Callable[[], AbstractContextManager[None]] = nullcontext
    first: str = "images"


def scale_group(weights: Weights, *, matrices: Sequence[str], factor: float) -> None:
    """Multiply the first int4 group of every row of matrices, as a wrong scale of the group would.

    Args:
        weights: Weights by name.
        matrices: Names of matrices (rows, columns).
        factor: The wrong scale, divided by the right one.
    """
    for name in matrices:
        weights[name][:, :GROUP] *= factor


def swap_norms(weights: Weights, *, pairs: Sequence[tuple[str, str]]) -> None:
    """Exchange layer norms.

    Args:
        weights: Weights by name.
        pairs: Names of two norms each.
    """
    for pair in pairs:
        for part in ("weight", "bias"):
            first, second = (f"{name}.{part}" for name in pair)
            weights[first], weights[second] = weights[second].clone(), weights[first].clone()


@contextmanager
def shared_first_noise() -> Iterator[None]:
    """Sample the first code of an image with noise that ignores the seed.

    The first code is a corner of the image, which shows the background and no object; the later codes continue it. So
    all images of a prompt that names no background have one background, but different objects and places. Of captions
    it changes nothing, since they are greedy.
    """
    keys = token_sampler.noise_keys

    def ignoring(seeds: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        return torch.where(
            positions == 0, keys(torch.zeros_like(seeds), images, positions), keys(seeds, images, positions)
        )

    token_sampler.noise_keys = ignoring
    try:
        yield
    finally:
        token_sampler.noise_keys = keys


UNCHANGED = "unchanged"
# Scale and norms were chosen to cost about 5 points of `everything` at 500 captions, by the images of seed 1.
FAULTS: Mapping[str, Fault] = {
    UNCHANGED: Fault(description="none"),
    "scale": Fault(
        description="one int4 group of each row of the attention's input in layer 0 times 2.25",
        damage=partial(scale_group, matrices=("layers.0.attention.query_key_value.weight",), factor=2.25),
    ),
    "norms": Fault(
        description="layer norms behind the MLPs of layers 0 and 1 exchanged",
        damage=partial(swap_norms, pairs=[("layers.0.mlp_output_norm", "layers.1.mlp_output_norm")]),
    ),
    "temperature": Fault(description="temperature 2", sampling={"temperature": 2.0}),
    "collapsed": Fault(
        description="one background for all images of a prompt: the noise of the first code ignores the seed",
        patch=shared_first_noise,
        first="diversity",
    ),
}


def open_faulty(model: str, fault: Fault, folder: Path) -> CogView:
    """Return a model, with the fault in its weights if it is one of weights.

    Args:
        model: Name or folder of the model.
        fault: The fault.
        folder: A new folder for a copy of the model.
    """
    if fault.damage is None:
        return CogView.from_pretrained(model, device="cpu")
    shutil.copytree(resolve_checkpoint(model), folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    fault.damage(weights)
    save_file(weights, path)
    return CogView.from_pretrained(str(folder), device="cpu")


def run_once(
    model: CogView, grader: SceneGrader, fault: Fault, settings: GateSettings, before: Result, *, whole: bool
) -> dict[str, float | None]:
    """Run the gate; return the mean of each row and, with ``FELL`` before its name, whether it fell.

    Args:
        model: The model, with the fault in its weights if it is one of weights.
        grader: Grader of its world.
        fault: The fault.
        settings: Counts and seed.
        before: The result to compare with.
        whole: Measure all groups of rows, also after a fall.
    """
    sampling, limit = replace(model.sampling(), **fault.sampling), earlier_limit(before, grader.world)
    groups = sorted(gate_groups(model), key=lambda group: group != fault.first)
    found: dict[str, float | None] = {}
    for group in groups:
        with fault.patch():
            rows = measure_group(group, model, grader, sampling, settings, limit)
        for change in compare_rows(before, as_items(rows))[0]:
            if change.after is not None:  # else of another group
                found |= {change.name: change.after, f"{FELL}{change.name}": float(change.fell)}
        if not whole and count_fallen(found):
            break
    return found


def count_fallen(run: Mapping[str, float | None]) -> int:
    """Return how many rows of a run fell."""
    return sum(value == 1 for name, value in run.items() if name.startswith(FELL))


def read_runs(path: Path, manifest: Manifest) -> dict[str, dict[str, float | None]]:
    """Return the runs of a result file by "FAULT SEED"; none if there is no file.

    Args:
        path: The file.
        manifest: The manifest of further runs.

    Raises:
        InputError: The file is no result, or its runs were measured in another way.
    """
    if not path.exists():
        return {}
    earlier = read_result(path)
    unlike = unlike_fields(earlier.manifest, manifest)
    if earlier.manifest.model != manifest.model:
        unlike.append("model")
    if unlike or earlier.items is None:
        raise InputError(f"{path} has runs that differ in {', '.join(unlike) or 'items'}: name another file")
    values = earlier.items.values
    return {name: {row: values[row][at] for row in values} for at, name in enumerate(earlier.items.ids)}


def write_runs(path: Path, manifest: Manifest, runs: Mapping[str, Mapping[str, float | None]]) -> None:
    """Write a result file: the runs as items; and of each fault how often it was noticed, by which rows, and means.

    Args:
        path: The file to write or replace.
        manifest: How the runs were measured.
        runs: Runs by "FAULT SEED".
    """
    results: dict[str, ResultValue] = {}
    for fault in FAULTS:
        mine = [run for name, run in runs.items() if name.split()[0] == fault]
        if not mine:
            continue
        noticed = [float(count_fallen(run) > 0) for run in mine]
        results[f"{fault}.noticed"] = _share(noticed)
        for row in dict.fromkeys(row for run in mine for row in run):
            values = [value for run in mine if (value := run.get(row)) is not None]
            if values:
                verdicts = row.startswith(FELL)
                results[f"{fault}.{row.replace(' ', '_')}"] = _share(values) if verdicts else _mean(values)
    rows = list(dict.fromkeys(row for run in runs.values() for row in run))
    items = ResultItems(ids=list(runs), values={row: [run.get(row) for run in runs.values()] for row in rows})
    write_result(path, manifest, results, items)


def format_table(result: Result) -> str:
    """Return the runs of a result file as a Markdown table, a line for each fault, and what fewer runs measured.

    Its numbers are checked by scripts/check_figures.py under the mark
    ``results: NAME {row}.{column} | unchanged scale norms temperature collapsed | everything noticed - -``.

    Args:
        result: A result of ``write_runs``, with or without its items.
    """
    lines = ["| fault | everything right | noticed | runs | rows that fell |", "|---|---|---|---|---|"]
    notes = []
    for name, fault in FAULTS.items():
        noticed = result.results.get(f"{name}.noticed")
        if noticed is None:
            continue
        prefix = f"{name}.{FELL}"
        times = {
            key.removeprefix(prefix).replace("_", " "): round(value.value * value.n)
            for key, value in result.results.items()
            if key.startswith(prefix)
        }
        fallen = ", ".join(f"{row} {count}" for row, count in sorted(times.items(), key=lambda each: -each[1]) if count)
        share = f"{noticed.value:.0%} ({noticed.low:.1%}–{noticed.high:.1%})"
        right = result.results.get(f"{name}.everything")
        lines.append(
            f"| {fault.description} | {'–' if right is None else f'{right.value:.1%}'} | {share} | {noticed.n} | "
            f"{fallen or '–'} |"
        )
        if right is not None and right.n < noticed.n:
            notes.append(f"Everything right, with the fault of {name}: measured in {right.n} of {noticed.n} runs.")
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _share(verdicts: Sequence[float]) -> ResultValue:
    low, high = wilson_interval(int(sum(verdicts)), len(verdicts))
    return ResultValue(value=sum(verdicts) / len(verdicts), low=low, high=high, n=len(verdicts), unit="fraction")


def _mean(values: Sequence[float]) -> ResultValue:
    return ResultValue(value=sum(values) / len(values), n=len(values), unit="fraction")


def run_all(options: argparse.Namespace) -> None:
    """Run the gate on the faults that were asked for, and write the result file after each run.

    Args:
        options: Parsed options.

    Raises:
        InputError: The model, its result or the result file cannot be used.
    """
    before, world = read_result(resolve_checkpoint(options.model) / GATE_FILE), open_world(options.recipe)
    limit = earlier_limit(before, world)
    unchanged = CogView.from_pretrained(options.model, device="cpu")
    check_world(unchanged, world)
    manifest = Manifest(
        measure=MEASURE,
        sampling=to_mapping(unchanged.sampling()),
        model=describe_model(unchanged),
        settings={
            "prompts": options.prompts,
            "first seed": FIRST_SEED,
            "against": before.sha256,
            CLEAN_LIMIT: limit,
            "significance": SIGNIFICANCE,
            "faults": {name: fault.description for name, fault in FAULTS.items()},
        },
        versions=describe_versions(),
        hardware=describe_hardware(),
    )
    runs = read_runs(options.result, manifest)
    seeds = range(FIRST_SEED, FIRST_SEED + options.runs)
    wanted = [(UNCHANGED, seed) for seed in seeds]  # first, so that an interrupted file has the false alarms
    wanted += [(name, seed) for seed in seeds for name in FAULTS if name != UNCHANGED]
    grader, models = SceneGrader(world), {UNCHANGED: unchanged}
    with tempfile.TemporaryDirectory() as scratch:
        for name, seed in wanted:
            label = f"{name} {seed}"
            if name not in options.fault or label in runs:
                continue
            started = time.monotonic()
            if name not in models:
                models[name] = open_faulty(options.model, FAULTS[name], Path(scratch) / name)
            settings = GateSettings(prompts=options.prompts, seed=seed, batch_size=options.batch_size)
            whole = name == UNCHANGED or seed == FIRST_SEED
            runs[label] = run_once(models[name], grader, FAULTS[name], settings, before, whole=whole)
            write_runs(options.result, manifest, runs)
            fallen = [row.removeprefix(FELL) for row, value in runs[label].items() if row.startswith(FELL) and value]
            seconds = time.monotonic() - started
            print(f"{label}: {seconds:.0f} s, fell: {', '.join(fallen) or 'nothing'}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, and print a line for each fault."""
    parser = arguments.Parser(__doc__)
    parser.add_argument(
        "result", type=arguments.output_file, metavar="RESULT", help="result file to write or to continue"
    )
    parser.add_argument("--read", action="store_true", help="only print the table of the result file")
    parser.add_argument("--model", default="cogview-emoji", help="name or folder (default: %(default)s)")
    parser.add_argument("--recipe", type=Path, default=Path("emoji-cpu"), help="recipe of its world")
    parser.add_argument("--runs", type=arguments.count, default=20, help="runs of each fault (default: %(default)s)")
    parser.add_argument("--prompts", type=arguments.count, default=500, help="captions of a run (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=arguments.count, default=64, help="images in a batch (default: %(default)s)"
    )
    parser.add_argument("--fault", nargs="*", choices=list(FAULTS), default=list(FAULTS), help="faults (default: all)")
    options = parser.parse_args(argv)
    try:
        if not options.read:
            run_all(options)
        print(format_table(read_result(options.result)))
    except InputError as error:
        print(f"gate_faults.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
