"""The protocol of ``cogview eval scenes``: which captions, which pictures, which ceilings beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from cogview import __version__
from cogview.config_io import to_mapping
from cogview.emoji.evaluation.scenes import SceneGrader, format_accuracy, held_out_scenes, summarize
from cogview.emoji.scene import Scene
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest
from cogview.training.vqvae_trainer import held_out_batches
from cogview.vqvae.codec import reconstruct
from cogview.vqvae.model import PIXELS_PER_CODE
from cogview.vqvae.training import evaluate_vqvae

TUNING_SEED = 1_000_003  # of the captions that sampling settings are chosen on
PARTS = ("colour", "object", "count", "relation", "everything")


def draw_captions(
    model: CogView, captions: Sequence[str], seed: int, sampling: Sampling, batch_size: int, label: str
) -> list[np.ndarray]:
    """One picture of each caption, uint8 (H, W, 3). Caption i has seed ``seed`` + i, so that no two share noise."""
    pictures = []
    with tqdm(total=len(captions), unit="picture", desc=label, disable=None) as bar:
        for first in range(0, len(captions), batch_size):
            chunk = [
                GenerationRequest(prompt=caption, seed=seed + number, sampling=sampling)
                for number, caption in enumerate(captions[first : first + batch_size], start=first)
            ]
            pictures += [np.asarray(picture) for picture in model.run(chunk)]
            bar.update(len(chunk))
    return pictures


def evaluate_scenes(
    model: CogView,
    world: EmojiWorld,
    *,
    count: int,
    seed: int,
    sampling: Sampling,
    batch_size: int,
    image_scales: Sequence[int] = (1,),
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Grade one picture of each of ``count`` held-out captions; the report, and the pictures.

    Beside the model's figures stand two ceilings from the same grader: on the VQ-VAE's reconstructions of the true
    scenes, and on the true scenes themselves. The VQ-VAE's own figures are of held-out scenes at ``image_scales``, as
    it learnt from them.
    """
    check_world(model, world)
    asked = held_out_scenes(world, count, seed)
    scenes, captions = [scene for scene, _ in asked], [caption for _, caption in asked]
    grader = SceneGrader(world)
    true = np.stack([world.render(scene, number) for number, scene in enumerate(scenes)])
    restored = reconstruct(model.image_tokenizer, true, batch_size)
    drawn = draw_captions(model, captions, seed, sampling, batch_size, "drawing")
    report = {
        "protocol": describe(model, world, captions, seed, sampling=to_mapping(sampling)),
        "drawn": _grade(grader, drawn, scenes, "grading pictures"),
        "ceiling_reconstructions": _grade(grader, list(restored), scenes, "grading reconstructions"),
        "ceiling_true_scenes": _grade(grader, list(true), scenes, "grading true scenes"),
        "image_tokenizer": {
            "scales": list(image_scales),
            **evaluate_vqvae(model.image_tokenizer, held_out_batches(world, image_scales)),
        },
    }
    return report, drawn


def choose_sampling(
    model: CogView, world: EmojiWorld, settings: Sequence[Sampling], *, count: int, batch_size: int
) -> list[tuple[Sampling, dict[str, Any]]]:
    """Each of ``settings`` with its grades on tuning captions, best first.

    Best is the lowest temperature, then the smallest top-k, of those whose share of pictures with everything right lies
    in the 95% interval of the highest share: so many captions cannot tell them apart, and less noise draws cleaner
    pictures. The others follow by that share.

    The tuning captions are held out from training too, and chosen with a seed of their own.
    """
    check_world(model, world)
    asked = held_out_scenes(world, count, TUNING_SEED)
    grader = SceneGrader(world)
    results = []
    for sampling in settings:
        label = f"T {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}"
        drawn = draw_captions(model, [caption for _, caption in asked], TUNING_SEED, sampling, batch_size, label)
        results.append((sampling, _grade(grader, drawn, [scene for scene, _ in asked], "grading")))
    results.sort(key=lambda result: -result[1]["everything"]["accuracy"])
    as_good = results[0][1]["everything"]["low"]
    best = min(
        (result for result in results if result[1]["everything"]["accuracy"] >= as_good),
        key=lambda result: (result[0].temperature, result[0].top_k),
    )
    return [best, *(result for result in results if result is not best)]


def check_world(model: CogView, world: EmojiWorld) -> None:
    """InputError unless the model knows exactly the things of ``world`` and draws at its size."""
    side = model.config.grid * PIXELS_PER_CODE
    if side != world.settings.canvas:
        raise InputError(f"{model.name} draws {side} pixels, the world has {world.settings.canvas}: use its own recipe")
    known = {thing.name for thing in model.things}
    if known and known != {thing.name for thing in world.things}:
        raise InputError(
            f"{model.name} knows {len(known)} things, not the {len(world.things)} of this world: use its own recipe"
        )


def describe(
    model: CogView, world: EmojiWorld, captions: Sequence[str], seed: int, **settings: object
) -> dict[str, Any]:
    """How a report was made: the same captions have the same sum, wherever they were written."""
    return {
        "captions": len(captions),
        "captions_sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
        "seed": seed,
        "things": len(world.things),
        "candidates": len(world.candidates),
        "world": to_mapping(world.settings),
        "model": model.name,
        **settings,
        "cogview": __version__,
    }


def format_report(report: dict[str, Any]) -> str:
    """A Markdown table: accuracies in percent with their 95% intervals."""
    columns = [
        ("drawn", "pictures drawn"),
        ("ceiling_reconstructions", "VQ-VAE's reconstructions"),
        ("ceiling_true_scenes", "true scenes"),
    ]
    lines = ["| right | " + " | ".join(title for _, title in columns) + " |", "|---|" + "---|" * len(columns)]
    for part in PARTS:
        cells = [format_accuracy(report[key][part]) for key, _ in columns]
        lines.append(f"| {part} (of {report['drawn'][part]['of']}) | " + " | ".join(cells) + " |")
    tokenizer = report["image_tokenizer"]
    scales = " and ".join(map(str, tokenizer["scales"]))
    lines += [
        "",
        f"Image tokenizer on {tokenizer['images']:.0f} held-out scenes at scale {scales}: "
        f"PSNR {tokenizer['psnr']:.2f} dB, "
        f"{tokenizer['codes_used']:.1%} of the codes used, perplexity {tokenizer['perplexity']:.0f}.",
    ]
    return "\n".join(lines)


def _grade(grader: SceneGrader, pictures: Sequence[np.ndarray], scenes: Sequence[Scene], label: str) -> dict[str, Any]:
    grades = [
        grader.grade(picture, scene)
        for picture, scene in tqdm(zip(pictures, scenes, strict=True), total=len(scenes), desc=label, disable=None)
    ]
    return summarize(grades)
