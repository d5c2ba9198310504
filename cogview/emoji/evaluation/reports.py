"""Measures of a model of the emoji world, with the files that each leaves in the folder of reports."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cogview.config_io import to_mapping
from cogview.emoji.evaluation.captions import evaluate_captions, format_caption_report
from cogview.emoji.evaluation.rerank import evaluate_rerank, format_rerank_report
from cogview.emoji.evaluation.scenes import evaluate_scenes, format_report, tune_sampling
from cogview.emoji.evaluation.upscale import evaluate_upscale, format_upscale_report
from cogview.emoji.world import EmojiWorld
from cogview.files import json_line, write_json
from cogview.image_io.contact_sheet import contact_sheet
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView

TUNED_TEMPERATURES = (0.3, 0.5, 0.7, 0.9)
TUNED_TOP_K = (5, 20, 100)
MAX_TUNING_CAPTIONS = 200
SHEET_IMAGES = 96
SHEET_UPSCALED = 24  # scenes, each in four versions


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of a measure.

    Args:
        captions: Number of held-out scenes, each with its caption.
        candidates: Images of each caption, for the measure rerank.
        seed: Seed of captions and images.
        batch_size: Images in a batch.
        image_scales: Scales on which the image tokenizer is measured, for the measure scenes.
    """

    captions: int
    candidates: int
    seed: int
    batch_size: int
    image_scales: tuple[int, ...] = (1,)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measure of a model.

    Args:
        file: Name of the report.
        result_file: Name of the result, which ``cogview eval compare`` reads.
        run: Measure a model with sampling settings, write companion files into a folder, and return the report.
        format: Return the report as Markdown.
    """

    file: str
    result_file: str
    run: Callable[[CogView, EmojiWorld, Sampling, EvaluationSettings, Path], dict[str, Any]]
    format: Callable[[Mapping[str, Any]], str]


def measure_scenes(
    model: CogView, world: EmojiWorld, sampling: Sampling, settings: EvaluationSettings, folder: Path
) -> dict[str, Any]:
    """Grade generated images; write a sheet of them.

    Args:
        model: The model.
        world: The emoji world.
        sampling: Sampling settings.
        settings: Counts, seed and batch size.
        folder: Folder of the sheet.

    Returns:
        The report as plain data.
    """
    report, images = evaluate_scenes(
        model,
        world,
        count=settings.captions,
        seed=settings.seed,
        sampling=sampling,
        batch_size=settings.batch_size,
        image_scales=settings.image_scales,
    )
    contact_sheet(images[:SHEET_IMAGES], columns=16).save(folder / "pictures.png")
    report["items"]["pictures"] = save_pictures(folder / "pictures-scenes", images)
    return report


def measure_captions(
    model: CogView, world: EmojiWorld, sampling: Sampling, settings: EvaluationSettings, folder: Path
) -> dict[str, Any]:
    """Grade greedy captions; write all of them.

    Args:
        model: The model.
        world: The emoji world.
        sampling: Ignored; captions are greedy.
        settings: Counts, seed and batch size.
        folder: Folder of the captions.

    Returns:
        The report as plain data.
    """
    report = evaluate_captions(
        model, world, count=settings.captions, seed=settings.seed, batch_size=settings.batch_size
    )
    (folder / "captions.jsonl").write_bytes(b"".join(map(json_line, report.pop("captions"))))
    return report


def measure_rerank(
    model: CogView, world: EmojiWorld, sampling: Sampling, settings: EvaluationSettings, folder: Path
) -> dict[str, Any]:
    """Grade the best of several images by score.

    Args:
        model: The model.
        world: The emoji world.
        sampling: Sampling settings of the candidates.
        settings: Counts, seed and batch size.
        folder: Ignored.

    Returns:
        The report as plain data.
    """
    return evaluate_rerank(
        model,
        world,
        captions=settings.captions,
        candidates=settings.candidates,
        seed=settings.seed,
        sampling=sampling,
        batch_size=settings.batch_size,
    )


def measure_upscale(
    model: CogView, world: EmojiWorld, sampling: Sampling, settings: EvaluationSettings, folder: Path
) -> dict[str, Any]:
    """Measure upscaled images; write a sheet of them beside their references.

    Args:
        model: The model.
        world: The emoji world.
        sampling: Sampling settings of the windows.
        settings: Counts, seed and batch size.
        folder: Folder of the sheet.

    Returns:
        The report as plain data.
    """
    report, images = evaluate_upscale(
        model,
        world,
        count=settings.captions,
        seed=settings.seed,
        sampling=sampling,
        batch_size=settings.batch_size,
    )
    contact_sheet(images[: 4 * SHEET_UPSCALED], columns=12).save(folder / "pictures-upscale.png")
    report["items"]["pictures"] = save_pictures(folder / "pictures-upscale", images[2::4])
    return report


def save_pictures(folder: Path, images: Sequence[np.ndarray]) -> list[str]:
    """Write images as PNG files, for the page of a comparison.

    Args:
        folder: Folder of the files, which is made as needed; its parent is that of the result.
        images: Images, uint8 RGB (H, W, 3).

    Returns:
        Their paths relative to the parent of ``folder``.
    """
    folder.mkdir(exist_ok=True)
    names = [f"{number:05}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / name)
    return [f"{folder.name}/{name}" for name in names]


MEASURES = {
    "scenes": Measure(file="report.json", result_file="result-scenes.json", run=measure_scenes, format=format_report),
    "captions": Measure(
        file="report-captions.json",
        result_file="result-captions.json",
        run=measure_captions,
        format=format_caption_report,
    ),
    "rerank": Measure(
        file="report-rerank.json", result_file="result-rerank.json", run=measure_rerank, format=format_rerank_report
    ),
    "upscale": Measure(
        file="report-upscale.json", result_file="result-upscale.json", run=measure_upscale, format=format_upscale_report
    ),
}


def tune(model: CogView, world: EmojiWorld, settings: EvaluationSettings, folder: Path) -> list[dict[str, Any]]:
    """Try a grid of sampling settings.

    Args:
        model: The model.
        world: The world of the model.
        settings: Number of captions, of which at most ``MAX_TUNING_CAPTIONS`` are used, and batch size.
        folder: Folder for ``sampling.json``, the returned rows.

    Returns:
        A row for each setting, best first: ``sampling``, and the accuracies ``everything`` and ``object``.
    """
    grid = [
        Sampling(temperature=temperature, top_k=top_k)
        for temperature, top_k in itertools.product(TUNED_TEMPERATURES, TUNED_TOP_K)
    ]
    count = min(settings.captions, MAX_TUNING_CAPTIONS)
    rows = [
        {"sampling": to_mapping(sampling), "everything": summary["everything"], "object": summary["object"]}
        for sampling, summary in tune_sampling(model, world, grid, count=count, batch_size=settings.batch_size)
    ]
    write_json(folder / "sampling.json", rows)
    return rows
