"""Plant faults in a model, run the gate on each with several seeds, and count how often it notices.

Faults: the scale of one int4 group of 64 columns in every row of a matrix, two exchanged layer norms, temperature 2,
and images of one prompt that are all alike. An unchanged model is run as often with other seeds, and should pass. All
are compared with a result of seed 0 in MODEL/gate.json.

python scripts/benchmarks/gate_faults.py [--runs 20] [--prompts 500] [--fault NAME …]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cogview import CogView
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.cli.evaluate_gate import GATE_FILE, open_world
from cogview.emoji.evaluation.gate import GateSettings, compare_rows, run_gate
from cogview.evaluation.manifest import read_result
from cogview.modeling.config import Sampling

GROUP = 64  # columns of an int4 group
LAYER = "layers.3"
Weights = dict[str, torch.Tensor]


def wrong_scale(weights: Weights) -> None:
    """Double a group of columns in every row of a matrix, as a wrong scale would."""
    weights[f"{LAYER}.mlp.output.weight"][:, :GROUP] *= 2


def swapped_norms(weights: Weights) -> None:
    """Exchange the layer norms before attention and before the MLP."""
    for part in ("weight", "bias"):
        first, second = f"{LAYER}.attention_norm.{part}", f"{LAYER}.mlp_norm.{part}"
        weights[first], weights[second] = weights[second].clone(), weights[first].clone()


WEIGHT_FAULTS: Mapping[str, Callable[[Weights], None]] = {"scale": wrong_scale, "norms": swapped_norms}
SAMPLING_FAULTS: Mapping[str, Mapping[str, Any]] = {
    "temperature": {"temperature": 2.0},
    "collapsed": {"top_k": 1},
}
NAMES = ("unchanged", *WEIGHT_FAULTS, *SAMPLING_FAULTS)


def faulty_model(model: str, fault: str, folder: Path) -> CogView:
    """Return a model with a fault in its weights, if the fault is one of weights.

    Args:
        model: Name or folder of the model.
        fault: One of ``NAMES``.
        folder: A new folder for the copy.
    """
    if fault not in WEIGHT_FAULTS:
        return CogView.from_pretrained(model, device="cpu")
    shutil.copytree(resolve_checkpoint(model), folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    WEIGHT_FAULTS[fault](weights)
    save_file(weights, path)
    return CogView.from_pretrained(str(folder), device="cpu")


def faulty_sampling(model: CogView, fault: str) -> Sampling:
    """Return the sampling settings of a model, with the fault if it is one of sampling."""
    return replace(model.sampling(), **SAMPLING_FAULTS.get(fault, {}))


def main() -> int:
    """Print a row for each fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cogview-emoji", help="name or folder (default: %(default)s)")
    parser.add_argument("--recipe", type=Path, default=Path("emoji-cpu"), help="recipe of its world")
    parser.add_argument("--runs", type=int, default=20, help="runs of each fault (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=500, help="captions of a run (default: %(default)s)")
    parser.add_argument("--fault", nargs="*", choices=NAMES, default=NAMES, help="faults (default: all)")
    options = parser.parse_args()
    before, world = read_result(resolve_checkpoint(options.model) / GATE_FILE), open_world(options.recipe)
    print("| fault | runs | noticed | rows, with the number of runs in which they fell |\n|---|---|---|---|")
    for fault in options.fault:
        fallen: dict[str, int] = {}
        noticed, everything = 0, []
        with tempfile.TemporaryDirectory() as scratch:
            model = faulty_model(options.model, fault, Path(scratch) / "model")
            for seed in range(1, options.runs + 1):
                settings = GateSettings(prompts=options.prompts, seed=seed)
                _, values, items = run_gate(model, world, faulty_sampling(model, fault), settings)
                names = [change.name for change in compare_rows(before, items)[0] if change.fell]
                noticed += bool(names)
                everything.append(values["everything"].value)
                for name in names:
                    fallen[name] = fallen.get(name, 0) + 1
        rows = ", ".join(f"{name} {times}" for name, times in sorted(fallen.items(), key=lambda row: -row[1]))
        mean = sum(everything) / len(everything)
        print(f"| {fault} ({mean:.1%} right) | {options.runs} | {noticed} | {rows or '–'} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
