"""Measure how far the Fréchet distance moves by resizing, JPEG and blur, without any change of the model.

Each row compares a folder of pictures with a changed copy of itself by the encoder features of an image tokenizer.

python scripts/real_pictures.py pictures/real
python scripts/benchmarks/moved_distance.py pictures/real
"""

# N pictures, H, W image in pixels, D features
from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cogview.evaluation.distribution import FeatureMoments, frechet_distance, kernel_distances
from cogview.evaluation.features import FeatureNetwork, open_network
from cogview.evaluation.image_statistics import SquareResize, gaussian_blur
from cogview.image_io.reading import read_image

SIDE, LARGE = 64, 256  # pixels
BATCH = 32
SUFFIXES = (".png", ".jpg", ".jpeg")
Change = Callable[[Image.Image], np.ndarray]  # uint8 (SIDE, SIDE, 3)


def resized(filter_name: str) -> Change:
    """Return a change that resizes by a filter, with antialiasing."""
    return SquareResize(side=SIDE, filter=filter_name)


def saved_as_jpeg(quality: int) -> Change:
    """Return a change that saves a picture as JPEG before it is resized."""

    def change(image: Image.Image) -> np.ndarray:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality)
        return resized("bicubic")(Image.open(content).convert("RGB"))

    return change


def without_antialiasing(image: Image.Image) -> np.ndarray:
    """Return a picture that is resized by taking the nearest pixels."""
    large = Image.fromarray(SquareResize(side=LARGE)(image))
    return np.asarray(large.resize((SIDE, SIDE), Image.Resampling.NEAREST))


def blurred(image: Image.Image) -> np.ndarray:
    """Return a picture that is blurred by a Gaussian of sigma 1."""
    return gaussian_blur(resized("bicubic")(image)[None], 1.0)[0]


CHANGES: dict[str, Change] = {
    "resized by Lanczos instead of bicubic": resized("lanczos"),
    "saved as JPEG of quality 95, before resizing": saved_as_jpeg(95),
    "saved as JPEG of quality 75, before resizing": saved_as_jpeg(75),
    "resized by the bilinear filter": resized("bilinear"),
    "resized from 256 to 64 pixels without antialiasing": without_antialiasing,
    "blurred by sigma 1": blurred,
}


def collect_features(network: FeatureNetwork, paths: list[Path], change: Change, label: str) -> np.ndarray:
    """Return the features of changed pictures."""
    parts = []
    for start in tqdm(range(0, len(paths), BATCH), desc=label, disable=None):
        images = np.stack([change(read_image(path)) for path in paths[start : start + BATCH]])
        parts.append(network.features(images))
    return np.concatenate(parts)


def distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return the Fréchet distance of two sets of features."""
    moments = []
    for features in (a_ND, b_ND):
        moments.append(FeatureMoments(features.shape[1]))
        moments[-1].add(features)
    return frechet_distance(*moments)


def main() -> int:
    """Print a row for each change, then one for two halves of the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of pictures")
    parser.add_argument("--model", default="cogview-emoji", help="model of the image tokenizer (default: %(default)s)")
    options = parser.parse_args()
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        parser.error(f"{options.folder} holds {len(paths)} PNG and JPEG pictures, expected at least 2")
    network = open_network(options.model, None, torch.device("cpu"))
    reference = collect_features(network, paths, resized("bicubic"), "unchanged")
    print(f"| one set of {len(paths)} is | Fréchet distance | KID |\n|---|---|---|", flush=True)

    def print_row(name: str, a_ND: np.ndarray, b_ND: np.ndarray) -> None:
        kid = kernel_distances(a_ND, b_ND, size=min(700, len(a_ND) // 2)).mean()
        print(f"| {name} | {distance(a_ND, b_ND):.4f} | {kid:.4f} |", flush=True)

    for name, change in CHANGES.items():
        print_row(name, collect_features(network, paths, change, name), reference)
    print_row("one half of the pictures, the other set the other half", reference[::2], reference[1::2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
