"""Result files of the measures of the emoji world: values, curves and the manifest of a report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogview.emoji.evaluation.scenes import RICH_PARTS
from cogview.emoji.evaluation.upscale import RESULT_NAMES
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.manifest import (
    Manifest,
    PromptsRecord,
    ResultCurve,
    ResultValue,
    SeedsRecord,
    write_result,
)
from cogview.evaluation.metrics import wilson_interval
from cogview.evaluation.model_record import describe_hardware, describe_model, describe_versions
from cogview.pipeline.cogview import CogView

SCENE_SETS = {"drawn": "generated", "ceiling_reconstructions": "reconstructions", "ceiling_true_scenes": "true_scenes"}
UNITS = {"psnr": "dB", "ssim": "", "consistency": "dB"}


def write_emoji_result(path: Path, measure: str, report: dict[str, Any], model: CogView, world: EmojiWorld) -> None:
    """Write the result file of a report.

    Args:
        path: The file.
        measure: Name of the measure.
        report: The report; its ``items`` are removed from it, since the result has them.
        model: The model that was measured.
        world: The world of the report.
    """
    items = report.pop("items", None)
    values, curves = VALUES[measure](report)
    write_result(path, emoji_manifest(measure, report["protocol"], model, world), values, items, curves)


def emoji_manifest(measure: str, protocol: Mapping[str, Any], model: CogView, world: EmojiWorld) -> Manifest:
    """Return the manifest of a report.

    Args:
        measure: Name of the measure.
        protocol: How the report was made (`harness.describe_protocol`).
        model: The model that was measured.
        world: The world of the report. Its sprites count: another font has other pictures.
    """
    known = {"captions", "captions_sha256", "seed", "model", "sampling", "weights", "adapters", "cogview"}
    pictures = [world.sprites, *world.styled.values()]
    pictures += [] if world.characters is None else [world.characters.bitmaps]
    sprites = hashlib.sha256(b"".join(array.tobytes() for array in pictures)).hexdigest()
    return Manifest(
        measure=measure,
        prompts=PromptsRecord(sha256=protocol["captions_sha256"], count=protocol["captions"]),
        seeds=SeedsRecord(first=protocol["seed"], count=protocol["captions"]),
        sampling=protocol.get("sampling"),
        model=describe_model(model),
        settings={**{key: value for key, value in protocol.items() if key not in known}, "sprites_sha256": sprites},
        versions=describe_versions("pillow"),
        hardware=describe_hardware(model.placement.device),
    )


def scenes_values(report: Mapping[str, Any]) -> tuple[dict[str, ResultValue], dict[str, ResultCurve]]:
    """Return the values of a report on scenes, and no curves."""
    values = _part_values({name: report[key] for key, name in SCENE_SETS.items()})
    for key, groups in report.get("groups", {}).items():
        values |= {f"{SCENE_SETS[key]}.{group}": _accuracy_value(found) for group, found in groups.items()}
    if "edits" in report:
        values |= _edit_values(report["edits"])
    tokenizer = report["image_tokenizer"]
    count = round(tokenizer["images"])
    values["image_tokenizer.psnr"] = ResultValue(value=tokenizer["psnr"], n=count, unit="dB", higher_is_better=True)
    values["image_tokenizer.codes_used"] = ResultValue(
        value=tokenizer["codes_used"], n=count, unit="fraction", higher_is_better=True
    )
    values["image_tokenizer.perplexity"] = ResultValue(value=tokenizer["perplexity"], n=count, unit="codes")
    quality = report["reconstruction_psnr"]
    for name in ("p01", "p05", "median"):
        values[f"reconstructions.psnr_{name}"] = ResultValue(
            value=quality[name], n=report["drawn"]["pictures"], unit="dB", higher_is_better=True
        )
    return values, {}


def _edit_values(report: Mapping[str, Any]) -> dict[str, ResultValue]:
    """Return the values of a report on edits."""
    values = {}
    for key in ("drawn", "ceiling_reconstructions"):
        found, name = report[key], f"edits.{SCENE_SETS[key]}"
        values[f"{name}.everything"] = _accuracy_value(found["everything"])
        values |= {f"{name}.{kind}": _accuracy_value(right) for kind, right in found["kinds"].items()}
    values["edits.kept_codes"] = ResultValue(
        **report["kept_codes"], n=report["instructions"], unit="fraction", higher_is_better=True
    )
    return values


def caption_values(report: Mapping[str, Any]) -> tuple[dict[str, ResultValue], dict[str, ResultCurve]]:
    """Return the values of a report on captions, and no curves."""
    sets = {name: report[name] for name in ("true_scenes", "reconstructions")}
    values = _part_values(sets)
    for name, found in sets.items():
        low, high = wilson_interval(found["unreadable"], found["captions"])
        values[f"{name}.unreadable"] = ResultValue(
            value=found["unreadable"] / found["captions"],
            low=low,
            high=high,
            n=found["captions"],
            unit="fraction",
            higher_is_better=False,
        )
    return values, {}


def rerank_values(report: Mapping[str, Any]) -> tuple[dict[str, ResultValue], dict[str, ResultCurve]]:
    """Return the values of a report on reranking, and their curves over the number of images."""
    values: dict[str, ResultValue] = {}
    count = report["protocol"]["captions"]
    for row in report["best_of"]:
        size = row["of"]
        values[f"average.{size}"] = ResultValue(
            value=row["average"], n=count * size, unit="fraction", higher_is_better=True
        )
        values[f"best_possible.{size}"] = _accuracy_value(row["best_possible"])
        for rule, found in row["best_by"].items():
            values[f"best_by_{rule}.{size}"] = _accuracy_value(found)
            if (closed := row["gap_closed"][rule]) is not None:
                values[f"gap_closed_by_{rule}.{size}"] = ResultValue(
                    value=closed, n=count, unit="fraction", higher_is_better=True
                )
    curves = {}
    for name in ("average", "best_possible", *(f"best_by_{rule}" for rule in report["best_of"][0]["best_by"])):
        points = [values[f"{name}.{row['of']}"] for row in report["best_of"]]
        curves[name] = ResultCurve(
            x=[row["of"] for row in report["best_of"]],
            y=[100 * point.value for point in points],
            low=[100 * point.low for point in points if point.low is not None],
            high=[100 * point.high for point in points if point.high is not None],
            x_label="images of a caption",
            y_label="right, %",
        )
    return values, curves


def upscale_values(report: Mapping[str, Any]) -> tuple[dict[str, ResultValue], dict[str, ResultCurve]]:
    """Return the values of a report on upscaling, and no curves."""
    count = report["protocol"]["captions"]
    values = {
        f"{RESULT_NAMES[name]}.{metric}": ResultValue(**found, n=count, unit=UNITS[metric], higher_is_better=True)
        for name, metrics in report["large_pictures"].items()
        for metric, found in metrics.items()
    }
    for metric, found in report["gain_over_bicubic"].items():
        values[f"gain_over_bicubic.{metric}"] = ResultValue(**found, n=count, unit=UNITS[metric], higher_is_better=True)
    for name, found in report["seam"].items():
        values[f"seam.{RESULT_NAMES.get(name, name)}"] = ResultValue(**found, n=count, higher_is_better=False)
    return values, {}


def _part_values(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, ResultValue]:
    """Return the accuracy of each part of each set that some scene asks for."""
    return {
        f"{name}.{part}": _accuracy_value(found[part])
        for name, found in sets.items()
        for part in reversed(RICH_PARTS)
        if part in found and found[part]["of"]
    }


def _accuracy_value(found: Mapping[str, Any]) -> ResultValue:
    return ResultValue(
        value=found["accuracy"],
        low=found["low"],
        high=found["high"],
        n=found["of"],
        unit="fraction",
        higher_is_better=True,
    )


VALUES = {
    "scenes": scenes_values,
    "captions": caption_values,
    "rerank": rerank_values,
    "upscale": upscale_values,
}
