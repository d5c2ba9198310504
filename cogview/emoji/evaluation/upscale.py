"""Protocol of ``cogview eval upscale``: measure the fidelity of upscaled images, and seams between windows.

The report compares upscaled images with bicubic enlargements, a lower bound, and with the VQ-VAE's reconstructions of
the true large images, which no choice of codes is expected to exceed.
"""

# N images, G codes on a side of a small image, R resamples

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cogview.config_io import to_mapping
from cogview.emoji.evaluation.scenes import check_world, describe, held_out_scenes
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.metrics import bootstrap, ssim
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.tokenizers.windows import upscale_windows
from cogview.vqvae.codec import psnr, reconstruct

SEAM_PIXELS = 4  # width of the strip on either side of a border in which a seam is measured
TITLES = {
    "ours": "upscaled",
    "bicubic": "bicubic, of the decoded codes",
    "bicubic_of_true": "bicubic, of the true small image",
    "vq_ceiling": "VQ-VAE's reconstruction of the true large image",
}
RESULT_NAMES = {
    "ours": "upscaled",
    "bicubic": "bicubic",
    "bicubic_of_true": "bicubic_of_true",
    "vq_ceiling": "reconstructions",
}


def evaluate_upscale(
    model: CogView, world: EmojiWorld, *, count: int, seed: int, sampling: Sampling, batch_size: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Upscale held-out scenes to twice their side and measure the result.

    Args:
        model: The model.
        world: The world of the model.
        count: Number of scenes.
        seed: Seed of scenes and images.
        sampling: Sampling settings.
        batch_size: Images in a batch.

    Returns:
        The report as plain data, with ``items`` as ``ResultItems`` has them, and images for a sheet. These come in
        fours of the large size: the decoded small codes with every pixel doubled, their bicubic enlargement, the
        upscaled image, and the true large image.
    """
    model.require_task("upscale")
    check_world(model, world)
    asked = held_out_scenes(world, count, seed)
    captions = [caption for _, caption in asked]
    small = [Image.fromarray(world.render(scene, number)) for number, (scene, _) in enumerate(asked)]
    true = np.stack([world.render(scene, number, scale=2) for number, (scene, _) in enumerate(asked)])
    batches = [slice(first, first + batch_size) for first in range(0, count, batch_size)]
    decoded = np.concatenate([model.decode_images(model.encode_images(small[batch])) for batch in batches])
    grid, side = model.config.grid, true.shape[1]
    windows = len(batches) * len(upscale_windows(grid))
    with tqdm(total=windows, unit="window", desc="upscaling", disable=None) as bar:
        ours = model.upscale(
            small,
            captions,
            seed=seed,
            batch_size=batch_size,
            callback=lambda progress: bar.update(progress.done == progress.total),
            **asdict(sampling),
        )

    large = {
        "ours": [np.asarray(image) for image in ours],
        "bicubic": [_resized(image, side, Image.Resampling.BICUBIC) for image in decoded],
        "bicubic_of_true": [_resized(np.asarray(image), side, Image.Resampling.BICUBIC) for image in small],
        "vq_ceiling": list(reconstruct(model.image_tokenizer, true, batch_size)),
    }
    measured = {name: _measure(images, true, decoded) for name, images in large.items()}
    gains = gains_over_bicubic(measured)
    report = {
        "protocol": describe(model, world, captions, seed, sampling=to_mapping(sampling)),
        **summarize_fidelity(measured),
        "seam": measure_seams(large, true, border_mask(grid, model.image_tokenizer.downsampling)),
        "items": {
            "ids": [scene.meaning for scene, _ in asked],
            "labels": captions,
            "values": {
                f"{RESULT_NAMES[name]}.{metric}": values.tolist()
                for name, metrics in measured.items()
                for metric, values in metrics.items()
            }
            | {f"gain_over_bicubic.{metric}": values.tolist() for metric, values in gains.items()},
        },
    }
    doubled = decoded.repeat(2, axis=1).repeat(2, axis=2)
    fours = zip(doubled, large["bicubic"], large["ours"], true, strict=True)
    return report, [image for four in fours for image in four]


def summarize_fidelity(measured: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Return means of PSNR and SSIM of large images, and their gains over bicubic enlargements.

    Args:
        measured: By name of the large images, with ``ours`` and ``bicubic``, and by metric: a value of each image (N,).

    Returns:
        ``large_pictures`` with the metrics of each name, and ``gain_over_bicubic``; means with 95% intervals.
    """
    return {
        "large_pictures": {
            name: {metric: _mean(values) for metric, values in metrics.items()} for name, metrics in measured.items()
        },
        "gain_over_bicubic": {name: _mean(values) for name, values in gains_over_bicubic(measured).items()},
    }


def gains_over_bicubic(measured: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return PSNR and SSIM of each upscaled image less those of its bicubic enlargement, (N,) each.

    Args:
        measured: As ``summarize_fidelity`` takes it.
    """
    return {name: measured["ours"][name] - measured["bicubic"][name] for name in ("psnr", "ssim")}


def measure_seams(
    large: Mapping[str, Sequence[np.ndarray]], true: np.ndarray, near: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return the error near window borders over that elsewhere.

    Args:
        large: Large images by name, with ``ours`` and ``vq_ceiling``; uint8 (H, W, 3) each.
        true: The true large images, uint8 (N, H, W, 3).
        near: Mask of the pixels near borders, bool (H, W).

    Returns:
        The ratio of ``ours`` and of ``vq_ceiling``, and ``quotient``, the ratio of ``ours`` over its expectation;
        each with a 95% interval.
    """
    errors = {name: _errors_near_and_far(large[name], true, near) for name in ("ours", "vq_ceiling")}
    expected = expected_under_reference(errors["ours"], errors["vq_ceiling"], near.mean())
    return {
        **{name: bootstrap(partial(_ratio, values), len(true)) for name, values in errors.items()},
        "quotient": bootstrap(lambda rows: _ratio(errors["ours"], rows) / _ratio(expected, rows), len(true)),
    }


def window_owners(grid: int) -> np.ndarray:
    """Return the index of the window that generates each code of the large image, (2G, 2G).

    Args:
        grid: Codes on a side of the small image.

    Returns:
        For each code, the index in ``upscale_windows(grid)`` of the first window whose target has the code. Later
        windows take the code as known.
    """
    owners = np.full((2 * grid, 2 * grid), -1)
    for number, window in enumerate(upscale_windows(grid)):
        target = owners[window.target]
        target[target < 0] = number
    assert (owners >= 0).all()
    return owners


def border_mask(grid: int, downsampling: int) -> np.ndarray:
    """Return a mask of the pixels within ``SEAM_PIXELS`` of a border between codes of different windows.

    Args:
        grid: Codes on a side of the small image.
        downsampling: Pixels on each side of the square that one code stands for.

    Returns:
        bool, 2G * ``downsampling`` pixels on each side.
    """
    owners = window_owners(grid).repeat(downsampling, axis=0).repeat(downsampling, axis=1)
    near = np.zeros(owners.shape, dtype=bool)
    for rows, mask in ((owners, near), (owners.T, near.T)):  # down, then across
        other = rows[SEAM_PIXELS:] != rows[:-SEAM_PIXELS]
        mask[SEAM_PIXELS:] |= other
        mask[:-SEAM_PIXELS] |= other
    return near


def expected_under_reference(errors_2N: np.ndarray, reference_2N: np.ndarray, share_near: float) -> np.ndarray:
    """Return the errors that images would have if each error were distributed as that of the reference.

    The middle of an image, where borders are, is harder to generate than its margin, and to a different extent in
    every image. A seam is the error near borders in excess of this expectation.

    Args:
        errors_2N: Mean squared errors near borders and elsewhere, of N images.
        reference_2N: The same errors of the reference, which has no windows.
        share_near: Fraction of the pixels that are near borders.

    Returns:
        Expected errors near borders and elsewhere, (2, N).
    """
    weights = np.array([share_near, 1 - share_near])
    expected: np.ndarray = reference_2N * (weights @ errors_2N) / (weights @ reference_2N)
    return expected


def format_upscale_report(report: Mapping[str, Any]) -> str:
    """Return the report of ``evaluate_upscale`` as Markdown; every metric has its 95% interval."""
    lines = [
        "| large image | PSNR to the true one, dB | SSIM to the true one | PSNR, reduced, to the decoded codes, dB |",
        "|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        row = report["large_pictures"][name]
        cells = [_interval(row["psnr"], 2), _interval(row["ssim"], 3), _interval(row["consistency"], 2)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    gain, seam = report["gain_over_bicubic"], report["seam"]
    lines += [
        "",
        f"Over {report['protocol']['captions']} held-out scenes, upscaled less bicubic is "
        f"{_interval(gain['psnr'], 2)} dB and {_interval(gain['ssim'], 3)} SSIM.",
        f"Squared error within {SEAM_PIXELS} pixels of window borders over that elsewhere: "
        f"{_interval(seam['ours'], 3)}; "
        f"of the reconstruction, which has no windows: {_interval(seam['vq_ceiling'], 3)}; "
        "over its expectation if each error were distributed as that of the reconstruction: "
        f"{_interval(seam['quotient'], 3)}.",
    ]
    return "\n".join(lines)


def _measure(images: Sequence[np.ndarray], true: np.ndarray, small: np.ndarray) -> dict[str, np.ndarray]:
    """(N,) each: PSNR and SSIM to the true large images, and PSNR of the reduced images to the small ones."""
    reduced = [_resized(image, small.shape[1], Image.Resampling.BOX) for image in images]
    return {
        "psnr": np.array([psnr(*pair) for pair in zip(images, true, strict=True)]),
        "ssim": np.array([ssim(*pair) for pair in zip(images, true, strict=True)]),
        "consistency": np.array([psnr(*pair) for pair in zip(reduced, small, strict=True)]),
    }


def _resized(image: np.ndarray, side: int, filter: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), filter))


def _errors_near_and_far(images: Sequence[np.ndarray], true: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Mean squared errors of each image in the pixels of the mask ``near``, and in the others: (2, N)."""
    squared = [np.square(a.astype(np.float64) - b).mean(axis=-1) for a, b in zip(images, true, strict=True)]
    return np.array([[errors[near].mean() for errors in squared], [errors[~near].mean() for errors in squared]])


def _ratio(errors_2N: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Error near borders over error elsewhere, for one choice of images (N,) or many (R, N)."""
    near, elsewhere = errors_2N[:, rows].mean(axis=-1)
    ratio: np.ndarray = near / elsewhere
    return ratio


def _mean(values: np.ndarray) -> dict[str, float]:
    return bootstrap(lambda rows: values[rows].mean(axis=-1), len(values))


def _interval(metric: Mapping[str, float], digits: int) -> str:
    return f"{metric['value']:.{digits}f} ({metric['low']:.{digits}f} to {metric['high']:.{digits}f})"
