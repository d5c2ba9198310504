"""Protocol of ``cogview eval captions``: grade greedy captions of held-out scenes by their content."""

# N images, H, W image in pixels
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from cogview.emoji.evaluation.caption_grades import CaptionGrade
from cogview.emoji.evaluation.images import images_without_notes
from cogview.emoji.evaluation.rich_captions import make_caption_grader
from cogview.emoji.evaluation.scenes import (
    MAX_CONFUSIONS,
    check_world,
    count_confusions,
    describe,
    format_parts,
    grade_items,
    held_out_scenes,
    part_accuracies,
)
from cogview.emoji.world import EmojiWorld
from cogview.pipeline.cogview import CogView
from cogview.pipeline.results import Caption
from cogview.vqvae.codec import reconstruct

COLUMNS = {"true_scenes": "true scenes", "reconstructions": "VQ-VAE's reconstructions"}


def evaluate_captions(model: CogView, world: EmojiWorld, *, count: int, seed: int, batch_size: int) -> dict[str, Any]:
    """Grade the greedy captions of held-out scenes and of their VQ-VAE reconstructions.

    Args:
        model: The model.
        world: The world of the model.
        count: Number of scenes.
        seed: Seed of the scenes.
        batch_size: Images in a batch.

    Returns:
        The report as plain data; its key ``captions`` has a row per scene, with all captions and a right one, and its
        key ``items`` the fields of ``ResultItems``.
    """
    model.require_task("caption")
    check_world(model, world)
    asked = held_out_scenes(world, count, seed)
    scenes, right_captions = [scene for scene, _ in asked], [caption for _, caption in asked]
    true = np.stack([world.render(scene, number) for number, scene in enumerate(scenes)])
    restored = reconstruct(model.image_tokenizer, true, batch_size)
    grader = make_caption_grader(world)
    report: dict[str, Any] = {"protocol": describe(model, world, right_captions, seed, method="greedy")}
    rows: list[dict[str, Any]] = [
        {"meaning": scene.meaning, "right_caption": caption}
        for scene, caption in zip(scenes, right_captions, strict=True)
    ]
    graded: dict[str, list[CaptionGrade]] = {}
    for key, images in (("true_scenes", true), ("reconstructions", restored)):
        captions = generate_captions(model, images, batch_size, f"captions of {COLUMNS[key]}")
        grades = [grader.grade(caption.text, scene) for caption, scene in zip(captions, scenes, strict=True)]
        report[key] = summarize_captions(grades)
        graded[key] = grades
        for row, caption, grade in zip(rows, captions, grades, strict=True):
            row[key] = {
                "caption": caption.text,
                "log_probability": caption.log_probability,
                "readable": grade.parsed is not None,
                "right": grade.everything,
            }
    report["captions"] = rows
    report["items"] = grade_items(asked, graded)
    return report


def summarize_captions(grades: Sequence[CaptionGrade], max_confusions: int = MAX_CONFUSIONS) -> dict[str, Any]:
    """Return the accuracy of each part, the number of unreadable captions and the most frequent confusions.

    Args:
        grades: Grades of the captions.
        max_confusions: Number of confusions to return.
    """
    return {
        "captions": len(grades),
        **part_accuracies(grades),
        "unreadable": sum(grade.parsed is None for grade in grades),
        "confusions": count_confusions(grades, ("shown", "said"), max_confusions),
    }


def format_caption_report(report: Mapping[str, Any]) -> str:
    """Return the report of ``evaluate_captions`` as Markdown."""
    unreadable = [f"{report[key]['unreadable']} of {title}" for key, title in COLUMNS.items()]
    note = f"Captions that cannot be read, and count as wrong: {', '.join(unreadable)}."
    return "\n".join([*format_parts(report, COLUMNS), "", note])


def generate_captions(model: CogView, images: np.ndarray, batch_size: int, label: str) -> list[Caption]:
    """The most probable caption of each image, uint8 (N, H, W, 3)."""
    captions = []
    with tqdm(total=len(images), unit="caption", desc=label, disable=None) as bar:
        for first in range(0, len(images), batch_size):
            chunk = images_without_notes(images[first : first + batch_size])
            captions += [caption for (caption,) in model.caption(chunk, method="greedy", batch_size=batch_size)]
            bar.update(len(chunk))
    return captions
