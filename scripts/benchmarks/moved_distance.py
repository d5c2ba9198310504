"""Measure how far the Fréchet distance moves by resizing, JPEG and blur, without any change of the model.

Each row compares a folder of pictures with a changed copy of itself by the features of a network, at its size. The last
line has the pictures per second of processor time of the network alone.

python scripts/real_pictures.py pictures/real
python scripts/benchmarks/moved_distance.py pictures/real
python scripts/benchmarks/moved_distance.py pictures/real --network efficientnet-lite0 --changes 1
"""

# N pictures, H, W image in pixels, D features
from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import arguments
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cogview.evaluation.distribution import FeatureMoments, frechet_distance, kernel_distances
from cogview.evaluation.features import FeatureNetwork, open_network
from cogview.evaluation.image_statistics import SquareResize, gaussian_blur
from cogview.image_io.reading import read_image

LARGE = 256  # pixels
BATCH = 32
SUFFIXES = (".png", ".jpg", ".jpeg")
Change = Callable[[Image.Image], np.ndarray]  # to uint8 (side, side, 3)


def saved_as_jpeg(quality: int, resize: SquareResize) -> Change:
    """Return a change that saves a picture as JPEG before it is resized."""

    def change(image: Image.Image) -> np.ndarray:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality)
        return resize(Image.open(content).convert("RGB"))

    return change


def without_antialiasing(side: int) -> Change:
    """Return a change that resizes to ``side`` by taking the nearest pixels."""

    def change(image: Image.Image) -> np.ndarray:
        large = Image.fromarray(SquareResize(side=LARGE)(image))
        return np.asarray(large.resize((side, side), Image.Resampling.NEAREST))

    return change


def blurred(resize: SquareResize) -> Change:
    """Return a change that blurs by a Gaussian of sigma 1 after resizing."""
    return lambda image: gaussian_blur(resize(image)[None], 1.0)[0]


def changes(side: int) -> dict[str, Change]:
    """Return the changes of pictures of a side by their descriptions."""
    plain = SquareResize(side=side)
    return {
        "resized by Lanczos instead of bicubic": SquareResize(side=side, filter="lanczos"),
        "saved as JPEG of quality 95, before resizing": saved_as_jpeg(95, plain),
        "saved as JPEG of quality 75, before resizing": saved_as_jpeg(75, plain),
        "resized by the bilinear filter": SquareResize(side=side, filter="bilinear"),
        f"resized from {LARGE} to {side} pixels without antialiasing": without_antialiasing(side),
        "blurred by sigma 1": blurred(plain),
    }


class TimedNetwork:
    """A feature network whose processor time is measured.

    Args:
        network: The network.

    Attributes:
        seconds: Processor time of all features.
        pictures: Their number.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self.seconds, self.pictures = 0.0, 0

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Return the features of images (``FeatureNetwork.features``)."""
        start = time.process_time()
        found = self.network.features(pixels)
        self.seconds += time.process_time() - start
        self.pictures += len(pixels)
        return found


def collect_features(network: TimedNetwork, paths: list[Path], change: Change, label: str) -> np.ndarray:
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
    parser = arguments.Parser(__doc__)
    parser.add_argument("folder", type=arguments.folder, help="folder of pictures")
    parser.add_argument(
        "--network", default="cogview-emoji", help="feature network, as of cogview eval images (default: %(default)s)"
    )
    parser.add_argument(
        "--changes", type=arguments.count, metavar="COUNT", help="measure the first changes alone (default: all)"
    )
    options = parser.parse_args()
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        parser.error(f"{options.folder} holds {len(paths)} PNG and JPEG pictures, expected at least 2")
    network = TimedNetwork(open_network(options.network, None, torch.device("cpu")))
    side = network.network.side
    reference = collect_features(network, paths, SquareResize(side=side), "unchanged")
    print(f"| one set of {len(paths)} is | Fréchet distance | KID |\n|---|---|---|", flush=True)

    def print_row(name: str, a_ND: np.ndarray, b_ND: np.ndarray) -> None:
        kid = kernel_distances(a_ND, b_ND, size=min(700, len(a_ND) // 2)).mean()
        print(f"| {name} | {distance(a_ND, b_ND):.4f} | {kid:.4f} |", flush=True)

    for name, change in list(changes(side).items())[: options.changes]:
        print_row(name, collect_features(network, paths, change, name), reference)
    print_row("one half of the pictures, the other set the other half", reference[::2], reference[1::2])
    rate = network.pictures / network.seconds
    print(f"\n{network.pictures} features, {rate:.1f} a second of processor time, {torch.get_num_threads()} threads")
    return 0


if __name__ == "__main__":
    arguments.run_script(main)
