"""The manifest of a benchmark's scores: its prompts and answers, and how the pictures were generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogview.config_io import from_mapping
from cogview.errors import InputError
from cogview.evaluation.field_benchmarks.benchmark import Benchmark, BenchmarkItem
from cogview.evaluation.field_benchmarks.runner import RECORD
from cogview.evaluation.manifest import Manifest, ModelRecord, SeedsRecord, hash_prompts, hash_set
from cogview.evaluation.model_record import describe_hardware, describe_versions
from cogview.files import file_sha256
from cogview.plain_data import read_json

OCR_PACKAGES = ("rapidocr", "ddddocr", "onnxruntime")


def describe_score(
    benchmark: Benchmark,
    items: Sequence[BenchmarkItem],
    answers: Path,
    folder: Path,
    settings: Mapping[str, Any],
) -> Manifest:
    """Return the manifest of the scores of answers.

    Args:
        benchmark: The benchmark.
        items: Its prompts.
        answers: File or folder of detections or answers.
        folder: The folder of the pictures; what ``run.json`` states of model, seeds and sampling is taken over.
        settings: Further settings of the measure; those that are None are left out.

    Raises:
        InputError: ``run.json`` is of another benchmark, of other prompts or another number of pictures.
    """
    files = sorted(answers.glob("*.jsonl")) if answers.is_dir() else [answers]
    manifest = describe_pictures(benchmark, items, folder, settings)
    return replace(manifest, candidate=hash_set("answers", [file_sha256(path) for path in files]))


def describe_pictures(
    benchmark: Benchmark, items: Sequence[BenchmarkItem], folder: Path, settings: Mapping[str, Any]
) -> Manifest:
    """Return the manifest of a benchmark without what was measured of its pictures; see ``describe_score``."""
    prompts = hash_prompts([item.prompt for item in items])
    versions = describe_versions(*(OCR_PACKAGES if settings.get("ocr") else ()))
    if settings.get("ocr"):
        settings = {**settings, "ocr": f"{settings['ocr']} {versions.get(settings['ocr'], '')}"}
    shared: dict[str, Any] = {
        "measure": benchmark.name,
        "prompts": prompts,
        "settings": {key: value for key, value in settings.items() if value is not None},
        "versions": versions,
        "hardware": describe_hardware(),
    }
    path = folder / RECORD
    if not path.is_file():
        return Manifest(**shared)
    record = read_json(path)
    expected = {
        "benchmark": benchmark.name,
        "prompts": {"sha256": prompts.sha256, "count": prompts.count},
        "samples": settings["samples"],
    }
    for key, value in expected.items():
        found = record.get(key) if isinstance(record, dict) else None
        if found != value:
            raise InputError(f"{path} is of another run than the answers, with another {key}; give its folder with -o")
    return Manifest(
        **shared,
        seeds=SeedsRecord(first=record["seed"], count=len(items)),
        sampling=record["sampling"],
        model=from_mapping(ModelRecord, record["model"], where=str(path)),
    )
