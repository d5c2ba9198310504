"""Drawn pictures with captions, as a folder, and as every other kind of source."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw


def draw(path: Path, number: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Save a picture of an ellipse, different for each number, and return it."""
    generator = np.random.default_rng(number)
    width, height = size or tuple(int(side) for side in generator.integers(20, 120, 2))
    colours = [tuple(int(value) for value in generator.integers(0, 255, 3)) for _ in range(2)]
    image = Image.new("RGB", (width, height), colours[0])
    ImageDraw.Draw(image).ellipse((0, 0, width - 1, height // 2), fill=colours[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


def write_sources(folder: Path, count: int) -> dict[str, Path]:
    """Write ``count`` pictures with captions as each kind of source, in the same order; every fifth has two captions.

    Returns:
        The source of each kind.
    """
    pictures = folder / "pictures"
    rows = []
    for number in range(count):
        name = f"{number:03d}.{'png' if number % 2 else 'jpg'}"
        draw(pictures / name, number)
        captions = [f"红色背景上的{'一两三四'[number % 4]}只狐狸", *(["一只狗"] if number % 5 == 0 else [])]
        (pictures / name).with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        rows.append((name, captions))
    with (folder / "list.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["文件名", "描述"])
        writer.writerows([f"pictures/{name}", caption] for name, captions in rows for caption in captions)
    lines = [json.dumps({"image": f"pictures/{name}", "caption": captions}) for name, captions in rows]
    (folder / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")
    coco = {
        "images": [{"id": number, "file_name": f"pictures/{name}"} for number, (name, _) in enumerate(rows)],
        "annotations": [
            {"id": 0, "image_id": number, "caption": caption}
            for number, (_, captions) in enumerate(rows)
            for caption in captions
        ],
    }
    (folder / "coco.json").write_text(json.dumps(coco), encoding="utf-8")
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for path in sorted(pictures.iterdir()):
            archive.add(path, arcname=path.name)
    names = {"folder": "pictures", "csv": "list.csv", "jsonl": "list.jsonl", "coco": "coco.json", "tar": "shard.tar"}
    return {kind: folder / name for kind, name in names.items()}


@pytest.fixture(scope="session")
def draw_picture() -> Callable[..., Image.Image]:
    """Return ``draw``."""
    return draw


@pytest.fixture(scope="session")
def picture_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the same 40 pictures as each kind of source; tests share the files."""
    return write_sources(tmp_path_factory.mktemp("sources"), 40)
