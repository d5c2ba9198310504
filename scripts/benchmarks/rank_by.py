"""Compare scores that choose one of several images of a prompt, on images of a damaged model or of a noisy sampler.

    cogview scenes scripts/recipes/emoji-cpu.yaml --work WORK
    python scripts/benchmarks/rank_by.py WORK/world --captions 150 --output rank-by.json [--case CASE …]

A case is a name and its damage: ``temperature=1.5`` samples noisily, without top-k and min-p; ``noise=0.4`` adds normal
noise to every matrix of the transformer, of 0.4 times its standard deviation; ``model=FOLDER`` opens other weights,
such as those of an early checkpoint. For each of some held-out captions the script generates 16 images, computes
log p(text | picture), log p(picture | text) and log p(picture) in one forward pass each, and grades the images by the
grader of the emoji world, which sees none of these. The table has the part of the gap between random choice and the
best possible choice that each score closes, with its 95% interval over captions. Scores and grades go to a result file
from which ``--read`` prints the table again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cogview import CogView, Sampling
from cogview.emoji.evaluation.scenes import held_out_scenes
from cogview.emoji.grader import SceneGrader
from cogview.emoji.world import EmojiWorld
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import only_images

CASES = ("temperature=1.5", "temperature=2", "noise=0.3")
IMAGES = 16
SIZES = (2, 4, 8, 16)
SEED = 5
NOISE_SEED = 0
RESAMPLES = 2000
# Columns: factors of log p(text | picture), log p(picture | text) and log p(picture); "mean" divides by the tokens.
RULES: Mapping[str, Mapping[str, float]] = {
    "caption": {"caption": 1},
    "picture": {"picture": 1},
    "picture + caption": {"picture": 1, "caption": 1},
    "picture + caption x 4": {"picture": 1, "caption": 4},
    "picture + caption x 16": {"picture": 1, "caption": 16},
    "both": {"picture": 1, "caption": 1, "mean": 1},
    "guidance": {"picture": 1, "alone": -1},
    "picture x 2 - picture alone": {"picture": 2, "alone": -1},
    "picture alone": {"alone": 1},
}


def damaged(model: CogView, amount: float) -> None:
    """Add normal noise to every matrix of the transformer.

    Args:
        model: The model, which is changed.
        amount: Standard deviation of the noise over that of the matrix.
    """
    generator = torch.Generator().manual_seed(NOISE_SEED)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += amount * float(parameter.std()) * noise
    if model.transformer.packed_layers is not None:
        model.transformer.prepack()


def open_case(case: str, name: str) -> tuple[CogView, Sampling]:
    """Return the model and the sampling settings of a case."""
    kind, _, value = case.partition("=")
    if kind not in ("temperature", "noise", "model") or not value:
        raise SystemExit(f"the case {case!r} is none of temperature=T, noise=SIGMA, model=FOLDER")
    model = CogView.from_pretrained(value if kind == "model" else name, device="cpu")
    if kind == "noise":
        damaged(model, float(value))
    if kind == "temperature":
        return model, model.sampling(temperature=float(value), top_k=0, min_p=0.0)
    return model, model.sampling()


def measure(case: str, name: str, world: EmojiWorld, captions: int) -> dict[str, Any]:
    """Return the grades and scores (captions, images) of a case as lists."""
    model, sampling = open_case(case, name)
    grader, found = SceneGrader(world), {key: [] for key in ("right", "caption", "picture", "alone", "pieces")}
    for number, (scene, caption) in enumerate(tqdm(held_out_scenes(world, captions, SEED), desc=case, disable=None)):
        requests = [
            GenerationRequest(prompt=caption, seed=SEED + number, index=index, sampling=sampling)
            for index in range(IMAGES)
        ]
        images = list(only_images(model.run(requests)))
        scores = {by: model.score(images, by=by) for by in ("caption", "picture", "guidance")}
        picture = [score.log_probability for score in scores["picture"]]
        alone = [a - b.log_probability for a, b in zip(picture, scores["guidance"], strict=True)]
        found["right"].append([int(grader.grade(np.asarray(image), scene).everything) for image in images])
        found["caption"].append([round(score.log_probability, 4) for score in scores["caption"]])
        found["picture"].append([round(value, 4) for value in picture])
        found["alone"].append([round(value, 4) for value in alone])
        found["pieces"].append(scores["caption"][0].num_pieces)
    return {**found, "codes": model.config.grid**2}


def rule_scores(found: Mapping[str, Any], weights: Mapping[str, float]) -> np.ndarray:
    """Return the weighted sum (captions, images) of log-probabilities, or of their means per token."""
    lengths = {name: np.ones((len(found["right"]), 1)) for name in ("caption", "picture", "alone")}
    if weights.get("mean"):
        lengths["caption"] = np.array(found["pieces"])[:, None]
        lengths["picture"] = lengths["picture"] * found["codes"]
    return sum(weight * np.array(found[name]) / lengths[name] for name, weight in weights.items() if name != "mean")  # type: ignore[return-value]


def gap_closed(right_CN: np.ndarray, scores_CN: np.ndarray, size: int) -> tuple[float, float, float]:
    """Return the part of the gap that a score closes, with the 95% interval of a bootstrap over captions.

    Every set of ``size`` consecutive images of the 16 is chosen from, so that few images are enough.
    """
    right = right_CN.reshape(-1, size) if right_CN.shape[1] % size == 0 else right_CN[:, :size]
    scores = scores_CN.reshape(right.shape) if right_CN.shape[1] % size == 0 else scores_CN[:, :size]
    chosen = right[np.arange(len(right)), scores.argmax(axis=1)].reshape(len(right_CN), -1).mean(axis=1)
    best = right.max(axis=1).reshape(len(right_CN), -1).mean(axis=1)
    average = right.mean(axis=1).reshape(len(right_CN), -1).mean(axis=1)

    def part(rows: np.ndarray) -> np.ndarray:
        gap = (best[rows] - average[rows]).mean(axis=-1)
        return (chosen[rows] - average[rows]).mean(axis=-1) / np.where(gap > 0, gap, np.nan)

    resampled = part(np.random.default_rng(0).integers(len(best), size=(RESAMPLES, len(best))))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return float(part(np.arange(len(best)))), float(low), float(high)


def print_tables(cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table for each case."""
    for case, found in cases.items():
        right = np.array(found["right"], dtype=float)
        possible = ", ".join(
            f"{size}: {right.reshape(-1, size).max(axis=1).mean():.1%}" for size in SIZES if right.shape[1] % size == 0
        )
        print(f"\n{case}: {len(right)} captions, right {right.mean():.1%}; best possible of {possible}\n")
        print("| score | " + " | ".join(f"gap closed, best of {size}" for size in SIZES) + " |")
        print("|---|" + "---|" * len(SIZES))
        for name, weights in RULES.items():
            scores = rule_scores(found, weights)
            cells = [gap_closed(right, scores, size) for size in SIZES]
            print(f"| {name} | " + " | ".join(f"{a:.0%} ({b:.0%} to {c:.0%})" for a, b, c in cells) + " |")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cases, or read them, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, nargs="?", help="folder that cogview scenes made")
    parser.add_argument("--model", default="cogview-emoji", help="name or folder of a model (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=150, help="held-out captions (default: %(default)s)")
    parser.add_argument("--case", nargs="*", default=CASES, help="damage, as above (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="result file to add the cases to")
    parser.add_argument("--read", type=Path, help="print the tables of a result file")
    options = parser.parse_args(argv)
    if options.read:
        print_tables(json.loads(options.read.read_text()))
        return 0
    if options.world is None:
        parser.error("WORLD is missing: the folder that cogview scenes made")
    world = EmojiWorld.load(options.world)
    known = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    for case in options.case:
        known[case] = measure(case, options.model, world, options.captions)
        if options.output:
            options.output.write_text(json.dumps(known))
        print_tables({case: known[case]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
