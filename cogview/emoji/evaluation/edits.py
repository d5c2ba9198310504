"""Grade edits by instructions: whether a result shows the scene after the edit, and keeps the other codes."""

# G codes on a side of an image
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from cogview.data.keyed_random import KeyedRandom
from cogview.emoji.edits import EDIT_KINDS, Edit, EditSampler, changed_cells, unchanged_share
from cogview.emoji.evaluation.images import images_without_notes
from cogview.emoji.instructions import write_instruction
from cogview.emoji.rich_grades import EditGrade, RichGrader
from cogview.emoji.world import EmojiWorld
from cogview.errors import InputError
from cogview.evaluation.metrics import accuracy, bootstrap, format_accuracy
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.pipeline.requests import GenerationRequest
from cogview.pipeline.results import GeneratedImage, only_images
from cogview.vqvae.codec import reconstruct

SETS = {"drawn": "generated images", "ceiling_reconstructions": "VQ-VAE's reconstructions"}


def measures_edits(model: CogView, world: EmojiWorld) -> bool:
    """Return whether the edits of a model can be graded: it was trained for them, and its world is rich.

    Args:
        model: The model.
        world: The world of the model.
    """
    return "edit" in model.config.tasks and world.settings.is_rich


def held_out_edits(world: EmojiWorld, count: int, seed: int = 0) -> list[tuple[Edit, str]]:
    """Return edits whose results are never trained on, each with an instruction.

    Args:
        world: The world of the scenes.
        count: Number of edits, all different.
        seed: Seed of the edits and instructions.

    Raises:
        InputError: The world has too few edits.
    """
    sampler = EditSampler(world)
    chosen: dict[str, tuple[Edit, str]] = {}
    for index in range(20 * count):
        edit = sampler.sample(seed, index, held_out=True)
        if edit.meaning not in chosen:
            chosen[edit.meaning] = edit, write_instruction(edit, KeyedRandom("instruction", seed, index, True))
        if len(chosen) == count:
            return list(chosen.values())
    raise InputError(f"this world has too few held-out edits: {count} requested, {len(chosen)} found; ask for fewer")


def run_edits(
    model: CogView, world: EmojiWorld, asked: Sequence[tuple[Edit, str]], seed: int, sampling: Sampling, batch_size: int
) -> tuple[np.ndarray, list[GeneratedImage]]:
    """Edit an image of each source; edit i has the seed ``seed`` + i.

    Args:
        model: The model.
        world: The world of the model.
        asked: Edits with their instructions.
        seed: Seed of the images.
        sampling: Sampling settings.
        batch_size: Images in a batch.

    Returns:
        Codes of the sources, (N, G, G), and the results.
    """
    sources = images_without_notes(world.render(edit.source) for edit, _ in asked)
    codes = np.concatenate(
        [model.encode_images(sources[first : first + batch_size]) for first in range(0, len(sources), batch_size)]
    )
    results: list[GeneratedImage] = []
    with tqdm(total=len(asked), unit="image", desc="editing", disable=None) as bar:
        for first in range(0, len(asked), batch_size):
            requests = [
                GenerationRequest(
                    task="edit", prompt=instruction, codes=codes[number], seed=seed + number, sampling=sampling
                )
                for number, (_, instruction) in enumerate(asked[first : first + batch_size], start=first)
            ]
            results += only_images(model.run(requests))
            bar.update(len(requests))
    return codes, results


def kept_codes(world: EmojiWorld, edit: Edit, before: np.ndarray, after: np.ndarray) -> float:
    """Return the share of equal codes among those where the edit changes no pixel; 1 if it changes all.

    Args:
        world: The world of the scenes.
        edit: The edit.
        before: Codes of the source, (G, G).
        after: Codes of the result, (G, G).
    """
    changed = changed_cells(world, edit)
    factor = len(before) // len(changed)
    if factor * len(changed) != len(before):
        raise InputError(f"codes of edits need a grid that is a multiple of {len(changed)}, got {len(before)}")
    return unchanged_share(before, after, changed.repeat(factor, axis=0).repeat(factor, axis=1))


def evaluate_edits(
    model: CogView, world: EmojiWorld, grader: RichGrader, *, count: int, seed: int, sampling: Sampling, batch_size: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Grade one result of each of several held-out edits, beside the reconstructions of the true results.

    Args:
        model: The model.
        world: The world of the model.
        grader: Its grader.
        count: Number of edits.
        seed: Seed of edits and images.
        sampling: Sampling settings.
        batch_size: Images in a batch.

    Returns:
        The report as plain data, with ``items`` as ``ResultItems`` has them, and the results.
    """
    asked = held_out_edits(world, count, seed)
    edits = [edit for edit, _ in asked]
    codes, results = run_edits(model, world, asked, seed, sampling, batch_size)
    restored = reconstruct(model.image_tokenizer, np.stack([world.render(edit.result) for edit in edits]), batch_size)
    images = {"drawn": [np.asarray(image) for image in results], "ceiling_reconstructions": list(restored)}
    grades = {
        key: [
            grader.grade_edit(image, edit)
            for image, edit in zip(tqdm(found, desc=f"grading {SETS[key]}", disable=None), edits, strict=True)
        ]
        for key, found in images.items()
    }
    kept = [
        kept_codes(world, edit, before, image.codes) for edit, before, image in zip(edits, codes, results, strict=True)
    ]
    report = {
        "instructions": count,
        **{key: summarize_edits(edits, found) for key, found in grades.items()},
        "kept_codes": _mean(np.array(kept)),
        "items": {
            "ids": [edit.meaning for edit in edits],
            "labels": [instruction for _, instruction in asked],
            "values": {
                "edits.everything": [float(grade.everything) for grade in grades["drawn"]],
                "edits.kept_codes": kept,
            },
        },
    }
    return report, images["drawn"]


def summarize_edits(edits: Sequence[Edit], grades: Sequence[EditGrade]) -> dict[str, Any]:
    """Return accuracies of all results and of each kind of edit, and how many still show the source.

    Args:
        edits: The edits.
        grades: Grades of their results.
    """
    kinds = {}
    for kind in EDIT_KINDS:
        right = [grade.everything for edit, grade in zip(edits, grades, strict=True) if edit.change.kind == kind]
        if right:
            kinds[kind] = accuracy(sum(right), len(right))
    return {
        "everything": accuracy(sum(grade.everything for grade in grades), len(grades)),
        "unchanged": accuracy(sum(grade.unchanged for grade in grades), len(grades)),
        "kinds": kinds,
    }


def _mean(values: np.ndarray) -> dict[str, float]:
    if len(values) == 1:
        return {"value": float(values[0])}
    return bootstrap(lambda rows: np.asarray(values[rows].mean(axis=-1)), len(values))


def format_edits(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table of a report of ``evaluate_edits``.

    Args:
        report: The report.
    """
    lines = ["| right edits | " + " | ".join(SETS.values()) + " |", "|---|" + "---|" * len(SETS)]
    rows = {"all": [report[key]["everything"] for key in SETS]}
    rows |= {kind: [report[key]["kinds"][kind] for key in SETS] for kind in report["drawn"]["kinds"]}
    for name, found in rows.items():
        lines.append(f"| {name} (of {found[0]['of']}) | " + " | ".join(map(format_accuracy, found)) + " |")
    kept = report["kept_codes"]
    interval = f" ({kept['low']:.1%}–{kept['high']:.1%})" if "low" in kept else ""
    unchanged = format_accuracy(report["drawn"]["unchanged"])
    return [
        *lines,
        "",
        f"Codes kept outside of the change: {kept['value']:.1%}{interval}. Still the source: {unchanged}.",
    ]
