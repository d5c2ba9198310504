"""Compare scores that choose one of several images of a prompt, on images of a damaged model or of a noisy sampler.

    cogview scenes scripts/recipes/emoji-cpu.yaml --work WORK
    python scripts/benchmarks/rank_by.py WORK/world --case temperature=1.5 --captions 250 --output spoilt.json

A case is a name and its damage: ``temperature=1.5`` samples noisily, without top-k and min-p; ``noise=0.4`` adds normal
noise to every matrix of the transformer, of 0.4 times its standard deviation; ``model=FOLDER`` opens other weights,
such as those of an early checkpoint. For each of some held-out captions the script generates 16 images, and computes
the log-probabilities of ``SCORE_TERMS``, of the codes that were sampled and of the codes to which the pixels are
encoded again. The images are graded by the grader of the emoji world, which sees none of these.

The table has the part of the gap between random choice and the best possible choice that each score closes, the mean
over all subsets of 2, 4, 8 and 16 images, with its 95% interval over captions. ``--without 5:150`` leaves out the
meanings of the first 150 captions of seed 5, on which a score was chosen. A result file has the values and the
protocol, and ``--read`` prints its table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import arguments
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cogview import CogView, Sampling
from cogview.device import flush_denormals
from cogview.emoji.evaluation.scenes import held_out_scenes
from cogview.emoji.grader import SceneGrader
from cogview.emoji.scene import Scene
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.diversity import expected_best, expected_choice
from cogview.evaluation.manifest import (
    Manifest,
    ResultValue,
    SeedsRecord,
    SelectionRecord,
    hash_prompts,
    read_result,
    write_result,
)
from cogview.evaluation.metrics import bootstrap
from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions
from cogview.pipeline.ranking import term_scores
from cogview.pipeline.ranking_rules import RANKING_RULES, SCORE_TERMS
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage, only_images

IMAGES = 16
SIZES = (2, 4, 8, 16)
SEED = 6
AT_A_TIME = 4  # captions
NOISE_SEED = 0
# Factors of the means per token of ``SCORE_TERMS``, of the codes that were sampled or of those of the pixels; "cycle"
# is the fraction of codes that decoding and encoding keep.
WITH_MASKS = RANKING_RULES["both"].with_masks
assert WITH_MASKS is not None
FORMULAS: Mapping[str, Mapping[str, float]] = {
    "caption": {"caption": 1},
    "picture": {"picture": 1},
    "sum": RANKING_RULES["both"].weights,
    "guidance": {"picture": 1, "picture alone": -1},
    "alone": {"picture alone": 1},
    "cycle": {"cycle": 1},
    "sum_and_cycle": {"picture": 1, "caption": 1, "cycle": 1},
    "sum_of_pixels": {"picture of pixels": 1, "caption of pixels": 1},
    "masked_of_pixels": {"masked of pixels": 1},
    "masked": {"masked": 1},
    "both_and_pixels": {**WITH_MASKS.weights, "masked of pixels": 1},
    "both": WITH_MASKS.weights,
}
Scores = dict[str, np.ndarray]


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
    if model.transformer.cpu_layers is not None:
        model.transformer.prepare_cpu()


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


def fresh_scenes(
    world: EmojiWorld, count: int, seed: int, without: tuple[int, int] | None = None
) -> list[tuple[int, Scene, str]]:
    """Return numbered held-out scenes with captions.

    Args:
        world: The world.
        count: Number of scenes.
        seed: Their seed.
        without: Seed and number of scenes whose meanings are left out.
    """
    known = {scene.meaning for scene, _ in held_out_scenes(world, without[1], without[0])} if without else set()
    found = enumerate(held_out_scenes(world, count + len(known), seed))
    return [(index, scene, caption) for index, (scene, caption) in found if scene.meaning not in known][:count]


def score_group(model: CogView, images: Sequence[GeneratedImage], caption: str) -> Scores:
    """Return the terms of ``FORMULAS`` of the images of a caption, each (images,)."""
    context = model.context
    pieces = model.tokenize([caption])[0].ids
    sampled = model.encode_images(images)
    seen = model.encode_images([Image.fromarray(np.asarray(image)) for image in images])
    found = {"cycle": (seen == sampled).mean(axis=(1, 2))}
    for suffix, codes in (("", sampled), (" of pixels", seen)):
        for name, term in SCORE_TERMS.items():
            scored = term_scores(term, [(pieces, own) for own in codes], context, context.planner(None))
            found[name + suffix] = np.array([value / count for value, count in scored])
    return found


def measure(
    model: CogView, sampling: Sampling, world: EmojiWorld, asked: Sequence[tuple[int, Scene, str]], seed: int
) -> tuple[np.ndarray, Scores]:
    """Generate, grade and score images.

    Args:
        model: The model.
        sampling: Its sampling settings.
        world: The world of the model.
        asked: Numbered scenes with captions.
        seed: Seed of the images of scene 0.

    Returns:
        Whether each image is right, and its terms, (captions, images).
    """
    grader, right, rows = SceneGrader(world), [], []
    for first in tqdm(range(0, len(asked), AT_A_TIME), disable=None):
        batch = asked[first : first + AT_A_TIME]
        requests = [
            GenerationRequest(prompt=caption, seed=seed + number, index=index, sampling=sampling)
            for number, _, caption in batch
            for index in range(IMAGES)
        ]
        images = list(only_images(model.run(requests)))
        for place, (_, scene, caption) in enumerate(batch):
            group = images[IMAGES * place : IMAGES * (place + 1)]
            right.append([grader.grade(np.asarray(image), scene).everything for image in group])
            rows.append(score_group(model, group, caption))
    return np.array(right), {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def weighted(terms: Mapping[str, np.ndarray], factors: Mapping[str, float]) -> np.ndarray:
    """Return the weighted sum of some terms."""
    return np.sum([factor * terms[name] for name, factor in factors.items()], axis=0)


def gap_closed(right_CN: np.ndarray, scores_CN: np.ndarray) -> list[dict[str, float]]:
    """Return the part of the gap that a score closes for each of ``SIZES``, with its bootstrap interval over captions.

    Args:
        right_CN: Whether each image is right.
        scores_CN: Its score.
    """
    right = right_CN.astype(float)
    average = right.mean(axis=1, keepdims=True)
    gains = expected_choice(right, scores_CN, SIZES) - average
    gaps = expected_best(right, SIZES) - average

    def part(column: int, rows: np.ndarray) -> np.ndarray:
        gap = gaps[rows, column].mean(axis=-1)
        return np.asarray(gains[rows, column].mean(axis=-1) / np.where(gap > 0, gap, np.inf))

    return [bootstrap(lambda rows, at=at: part(at, rows), len(right)) for at in range(len(SIZES))]


def values_of(right_CN: np.ndarray, terms: Mapping[str, np.ndarray]) -> dict[str, ResultValue]:
    """Return the values of a result: FORMULA.SIZE, the average and the best possible choice."""
    count = len(right_CN)
    possible = expected_best(right_CN.astype(float), SIZES).mean(axis=0)
    values = {"average": ResultValue(value=float(right_CN.mean()), n=count, unit="fraction", higher_is_better=True)}
    for size, value in zip(SIZES, possible, strict=True):
        values[f"best_possible.{size}"] = ResultValue(
            value=float(value), n=count, unit="fraction", higher_is_better=True
        )
    for name, factors in FORMULAS.items():
        for size, found in zip(SIZES, gap_closed(right_CN, weighted(terms, factors)), strict=True):
            values[f"{name}.{size}"] = ResultValue(**found, n=count, unit="fraction", higher_is_better=True)
    return values


def manifest_of(case: str, model: CogView, sampling: Sampling, captions: Sequence[str], seed: int) -> Manifest:
    """Return how a case was measured."""
    record = describe_model(model)
    if case.startswith("noise="):
        record = replace(record, name=f"{record.name} with noise")
    return Manifest(
        measure="rank by",
        prompts=hash_prompts(captions),
        selection=SelectionRecord(candidates=IMAGES, by="each score"),
        seeds=SeedsRecord(first=seed, count=len(captions)),
        sampling=asdict(sampling),
        model=record,
        settings={"case": case.partition("=")[0], "amount": "" if "model=" in case else case.partition("=")[2]},
        versions=describe_versions(),
        hardware=describe_hardware(model.placement.device),
    )


def print_table(values: Mapping[str, ResultValue]) -> None:
    """Print the values of a result as a table."""
    average = values["average"]
    possible = ", ".join(f"{size}: {values[f'best_possible.{size}'].value:.1%}" for size in SIZES)
    print(f"{average.n} captions, right {average.value:.1%}; best possible of {possible}\n")
    print("| score | " + " | ".join(f"gap closed, best of {size}" for size in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for name in FORMULAS:
        cells = [values[f"{name}.{size}"] for size in SIZES]
        print(f"| {name} | " + " | ".join(f"{c.value:.0%} ({c.low:.0%} to {c.high:.0%})" for c in cells) + " |")


def seed_and_count(text: str) -> tuple[int, int]:
    """Return the two numbers of SEED:COUNT."""
    seed, _, count = text.partition(":")
    return int(seed), int(count)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a case, or read its result, and print a table."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("world", type=arguments.folder, nargs="?", help="folder that cogview scenes made")
    parser.add_argument("--model", default="cogview-emoji", help="name or folder of a model (default: %(default)s)")
    parser.add_argument(
        "--captions", type=arguments.count, default=150, help="held-out captions (default: %(default)s)"
    )
    parser.add_argument(
        "--skip", type=arguments.whole, default=0, help="captions to leave out before them (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=arguments.whole, default=SEED, help="seed of captions and images (default: %(default)s)"
    )
    parser.add_argument("--without", type=seed_and_count, metavar="SEED:COUNT", help="captions to leave out")
    parser.add_argument("--case", default="temperature=1.5", help="damage, as above (default: %(default)s)")
    parser.add_argument("--output", type=arguments.output_file, help="result file to write")
    parser.add_argument("--read", type=arguments.file, help="print the table of a result file")
    options = parser.parse_args(argv)
    if options.read:
        print_table(read_result(options.read).results)
        return 0
    if options.world is None:
        parser.error("WORLD is missing: the folder that cogview scenes made")
    flush_denormals()
    world = EmojiWorld.load(options.world)
    model, sampling = open_case(options.case, options.model)
    asked = fresh_scenes(world, options.skip + options.captions, options.seed, options.without)[options.skip :]
    values = values_of(*measure(model, sampling, world, asked, options.seed))
    if options.output:
        manifest = manifest_of(options.case, model, sampling, [caption for _, _, caption in asked], options.seed)
        write_result(options.output, manifest, values)
    print_table(values)
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
