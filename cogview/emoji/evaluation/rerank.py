"""Protocol of ``cogview eval rerank``: measure the gain of reranking N images of a caption.

Scores and grades are independent of each other. The report compares the scores of ``--rank-by``.
"""

# C captions, N images of each

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from cogview.config_io import to_mapping
from cogview.emoji.evaluation.scenes import check_world, describe, held_out_scenes
from cogview.emoji.rich_grades import AnyGrader, make_grader
from cogview.emoji.scene import Scene
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.metrics import best_of, format_accuracy
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.pipeline.ranking_rules import RANKING_RULES
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import only_images

SIZES = (1, 2, 4, 8, 16)


def evaluate_rerank(
    model: CogView,
    world: EmojiWorld,
    *,
    captions: int,
    candidates: int = 16,
    seed: int,
    sampling: Sampling,
    batch_size: int,
) -> dict[str, Any]:
    """Generate, score and grade several images of each of several held-out captions.

    Image i of caption number c has the seed ``seed`` + c and the index i, so that no two images share noise.

    Args:
        model: The model.
        world: The world of the model.
        captions: Number of captions.
        candidates: Number of images of each caption.
        seed: Seed of captions and images.
        sampling: Sampling settings.
        batch_size: Images in a batch.

    Returns:
        The report as plain data.
    """
    for task in ("generate", "caption"):  # of the scores
        model.require_task(task)
    check_world(model, world)
    asked = held_out_scenes(world, captions, seed)
    requests = [
        GenerationRequest(prompt=caption, seed=seed + number, index=index, sampling=sampling)
        for number, (_, caption) in enumerate(asked)
        for index in range(candidates)
    ]
    scenes = [scene for scene, _ in asked for _ in range(candidates)]
    right, scores = _grade_and_score(model, make_grader(world), requests, scenes, batch_size)
    right_CN = np.reshape(right, (captions, candidates))
    sizes = [size for size in SIZES if size < candidates] + [candidates]
    choices = {
        rule: best_of(right_CN, np.reshape(values, (captions, candidates)), sizes) for rule, values in scores.items()
    }
    rows = [
        {
            **{name: choices["caption"][index][name] for name in ("of", "average", "best_possible")},
            "best_by": {rule: choice[index]["best_by_score"] for rule, choice in choices.items()},
            "gap_closed": {rule: choice[index]["gap_closed"] for rule, choice in choices.items()},
        }
        for index in range(len(sizes))
    ]
    made = {"pictures_of_each": candidates, "sampling": to_mapping(sampling)}
    return {"protocol": describe(model, world, [caption for _, caption in asked], seed, **made), "best_of": rows}


def _grade_and_score(
    model: CogView,
    grader: AnyGrader,
    requests: Sequence[GenerationRequest],
    scenes: Sequence[Scene],
    batch_size: int,
) -> tuple[list[bool], dict[str, list[float]]]:
    """Return the verdict on an image for each request, and its scores by the name of the ranking rule."""
    right: list[bool] = []
    scores: dict[str, list[float]] = {rule: [] for rule in RANKING_RULES}
    with tqdm(total=len(requests), unit="image", desc="generating, scoring and grading", disable=None) as bar:
        for first in range(0, len(requests), batch_size):
            chunk = requests[first : first + batch_size]
            images = list(only_images(model.run(chunk)))
            for rule, values in scores.items():
                scored = model.score(images, [request.prompt for request in chunk], by=rule, batch_size=batch_size)
                values += [score.log_probability for score in scored]
            for image, scene in zip(images, scenes[first : first + batch_size], strict=True):
                right.append(grader.grade(np.asarray(image), scene).everything)
            bar.update(len(chunk))
    return right, scores


def format_rerank_report(report: Mapping[str, Any]) -> str:
    """Return the report of ``evaluate_rerank`` as a Markdown table: accuracies with their 95% intervals."""
    lines = [
        "| images of a caption | average | best possible | "
        + " | ".join(f"best by {rule}" for rule in RANKING_RULES)
        + " |",
        "|---|---|---|" + "---|" * len(RANKING_RULES),
    ]
    for row in report["best_of"]:
        cells = [format_accuracy(found) for found in (row["best_possible"], *row["best_by"].values())]
        lines.append(f"| {row['of']} | {row['average']:.1%} | {' | '.join(cells)} |")
    lines += ["", f"Images with everything right, of {report['protocol']['captions']} held-out captions."]
    return "\n".join(lines)
