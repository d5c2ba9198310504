"""The protocol of ``cogview eval rerank``: is the picture that our score likes best of N better than any of the N?

The grader says which pictures are right and never sees a score; the score never sees a grade. Beside the score,
log p(text | picture), stands what drawing knows for nothing: log p(picture | text).
"""

# C captions, N pictures of each

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from cogview.config_io import to_mapping
from cogview.emoji.evaluation.scenes import SceneGrader, accuracy, format_accuracy, held_out_scenes
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.harness import check_world, describe
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
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
    """Draw ``candidates`` pictures of each of ``captions`` held-out captions, score and grade them; the report.

    Picture i of caption number c has seed ``seed`` + c and index i, so that no two share noise.
    """
    for task in ("generate", "caption"):  # the score is a caption's probability
        model.require_task(task)
    check_world(model, world)
    asked = held_out_scenes(world, captions, seed)
    grader = SceneGrader(world)
    wishes = [
        GenerationRequest(prompt=caption, seed=seed + number, index=index, sampling=sampling)
        for number, (_, caption) in enumerate(asked)
        for index in range(candidates)
    ]
    right: list[bool] = []
    scores: list[float] = []
    likelihoods: list[float] = []
    with tqdm(total=len(wishes), unit="picture", desc="drawing, scoring and grading", disable=None) as bar:
        for first in range(0, len(wishes), batch_size):
            chunk = wishes[first : first + batch_size]
            pictures = list(only_images(model.run(chunk)))
            scored = model.score(pictures, [wish.prompt for wish in chunk], batch_size=batch_size)
            scores += [score.log_probability for score in scored]
            likelihoods += [picture.log_probability for picture in pictures]
            for number, picture in enumerate(pictures, start=first):
                scene, _ = asked[number // candidates]
                right.append(grader.grade(np.asarray(picture), scene).everything)
            bar.update(len(chunk))
    sizes = [size for size in SIZES if size < candidates] + [candidates]
    shape = (captions, candidates)
    grades = np.reshape(right, shape)
    rows = best_of(grades, np.reshape(scores, shape), sizes)
    for row, drawn in zip(rows, best_of(grades, np.reshape(likelihoods, shape), sizes), strict=True):
        row["best_by_likelihood"] = drawn["best_by_score"]
    return {
        "protocol": describe(
            model,
            world,
            [caption for _, caption in asked],
            seed,
            pictures_of_each=candidates,
            sampling=to_mapping(sampling),
        ),
        "best_of": rows,
    }


def best_of(right_CN: np.ndarray, scores_CN: np.ndarray, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """What choosing by score gains among the first of each of ``sizes`` pictures of every caption.

    ``right_CN`` is bool, ``scores_CN`` float; of equal scores the first wins. ``best_by_score`` is the share of
    captions whose best picture by score is right, ``best_possible`` of those that have a right one at all, ``average``
    the share of right pictures, and ``gap_closed`` how much of the way from the average to the best possible the score
    goes: 0 is chance, below 0 worse than chance, None where there is no gap.
    """
    if right_CN.shape != scores_CN.shape or not 1 <= min(sizes) <= max(sizes) <= right_CN.shape[1]:
        raise ValueError(
            f"best of {list(sizes)} needs grades and scores of one shape (captions, pictures) with as many pictures, "
            f"got {right_CN.shape} and {scores_CN.shape}"
        )
    rows = []
    for size in sizes:
        right, scores = right_CN[:, :size], scores_CN[:, :size]
        chosen = right[np.arange(len(right)), scores.argmax(axis=1)]  # argmax: the first of equals
        best = accuracy(int(chosen.sum()), len(right))
        possible = accuracy(int(right.any(axis=1).sum()), len(right))
        average = float(right.mean())
        gap = possible["accuracy"] - average
        rows.append(
            {
                "of": size,
                "average": average,
                "best_by_score": best,
                "best_possible": possible,
                "gap_closed": (best["accuracy"] - average) / gap if gap > 0 else None,
            }
        )
    return rows


def format_rerank_report(report: dict[str, Any]) -> str:
    """A Markdown table: shares of pictures with everything right, with the 95% intervals of those over captions."""
    made = report["protocol"]
    lines = [
        "| pictures of a caption | average | best by our score | best possible | of the gap closed "
        "| best by log p(picture \\| text) |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["best_of"]:
        closed = "–" if row["gap_closed"] is None else f"{row['gap_closed']:.1%}"
        best, possible, likeliest = (
            format_accuracy(row[name]) for name in ("best_by_score", "best_possible", "best_by_likelihood")
        )
        lines.append(f"| {row['of']} | {row['average']:.1%} | {best} | {possible} | {closed} | {likeliest} |")
    lines += ["", f"Pictures with everything right, drawn of {made['captions']} held-out captions."]
    return "\n".join(lines)
