"""The protocol of ``cogview eval upscale``: how near to the true large picture, and do the windows leave seams?

A large picture is judged beside bicubic enlargements, which any viewer makes for nothing, and beside what the VQ-VAE
makes of the true large picture, which no choice of codes is expected to beat.
"""

# N pictures, G codes on a side of a small picture, R resamples

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cogview.config_io import to_mapping
from cogview.emoji.evaluation.scenes import held_out_scenes
from cogview.emoji.world import EmojiWorld
from cogview.evaluation.harness import check_world, describe
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.tokenizers.windows import upscale_windows
from cogview.vqvae.codec import reconstruct
from cogview.vqvae.model import PIXELS_PER_CODE

SEAM_PIXELS = PIXELS_PER_CODE // 2  # as far from a border as a seam is looked for, on either side
RESAMPLES = 2000
LEAST_MSE = 1e-10  # of values in [0, 1]: equal pictures have a PSNR of 100 dB
TITLES = {
    "ours": "ours",
    "bicubic": "bicubic, of the decoded codes",
    "bicubic_of_true": "bicubic, of the true small picture",
    "vq_ceiling": "VQ-VAE's reconstruction of the true large picture",
}


def evaluate_upscale(
    model: CogView, world: EmojiWorld, *, count: int, seed: int, sampling: Sampling, batch_size: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Enlarge ``count`` held-out scenes to twice their side; the report, and pictures for a sheet.

    The pictures come in fours, all of the large size: the decoded small codes with every pixel doubled, their bicubic
    enlargement, ours, and the true large picture.
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
    with tqdm(total=windows, unit="window", desc="enlarging", disable=None) as bar:
        ours = model.upscale(
            small,
            captions,
            seed=seed,
            batch_size=batch_size,
            callback=lambda progress: bar.update(progress.done == progress.total),
            **asdict(sampling),
        )

    large = {
        "ours": [np.asarray(picture) for picture in ours],
        "bicubic": [_resized(picture, side, Image.Resampling.BICUBIC) for picture in decoded],
        "bicubic_of_true": [_resized(np.asarray(picture), side, Image.Resampling.BICUBIC) for picture in small],
        "vq_ceiling": list(reconstruct(model.image_tokenizer, true, batch_size)),
    }
    figures = {name: _figures(pictures, true, decoded) for name, pictures in large.items()}
    gains = {name: figures["ours"][name] - figures["bicubic"][name] for name in ("psnr", "ssim")}
    near = border_mask(grid)
    seams = {name: _errors_near_and_far(large[name], true, near) for name in ("ours", "vq_ceiling")}
    expected = expected_under_reference(seams["ours"], seams["vq_ceiling"], near.mean())
    report = {
        "protocol": describe(model, world, captions, seed, sampling=to_mapping(sampling)),
        "large_pictures": {
            name: {figure: _mean(values) for figure, values in own.items()} for name, own in figures.items()
        },
        "gain_over_bicubic": {name: _mean(values) for name, values in gains.items()},
        "seam": {
            **{name: _estimate(partial(_ratio, errors), count) for name, errors in seams.items()},
            "quotient": _estimate(lambda rows: _ratio(seams["ours"], rows) / _ratio(expected, rows), count),
        },
    }
    doubled = decoded.repeat(2, axis=1).repeat(2, axis=2)
    fours = zip(doubled, large["bicubic"], large["ours"], true, strict=True)
    return report, [picture for four in fours for picture in four]


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one shape; 100 where they are equal."""
    mse = np.square((picture.astype(np.float64) - other) / 255).mean()
    return -10 * math.log10(max(mse, LEAST_MSE))


def ssim(picture: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures (H, W, C), at most 1; the mean over their channels.

    After Wang et al. (2004): Gaussian windows of 11 x 11 pixels with sigma 1.5, wherever one fits whole.
    """
    a, b = picture.astype(np.float64), other.astype(np.float64)
    steady_mean, steady_variance = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _blurred(a), _blurred(b)
    variances = _blurred(a * a) - mean_a**2 + _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + steady_mean) / (mean_a**2 + mean_b**2 + steady_mean)
    structure = (2 * covariance + steady_variance) / (variances + steady_variance)
    return float((luminance * structure).mean())


def _blurred(values: np.ndarray) -> np.ndarray:
    """(H, W, C) seen through Gaussian windows: (H - 10, W - 10, C)."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-0.5 * (offsets / 1.5) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        values = np.lib.stride_tricks.sliding_window_view(values, len(weights), axis=axis) @ weights
    return values


def window_owners(grid: int) -> np.ndarray:
    """Which of ``upscale_windows(grid)`` draws each code of the large image: (2G, 2G) numbers from 0.

    It is the first whose target holds the code; later windows take the code as known.
    """
    owners = np.full((2 * grid, 2 * grid), -1)
    for number, window in enumerate(upscale_windows(grid)):
        target = owners[window.target]
        target[target < 0] = number
    assert (owners >= 0).all()
    return owners


def border_mask(grid: int) -> np.ndarray:
    """The 4 pixels on either side of every border between codes of different windows: (16G, 16G) bool."""
    owners = window_owners(grid).repeat(PIXELS_PER_CODE, axis=0).repeat(PIXELS_PER_CODE, axis=1)
    near = np.zeros(owners.shape, dtype=bool)
    for own, mask in ((owners, near), (owners.T, near.T)):  # down, then across
        other = own[SEAM_PIXELS:] != own[:-SEAM_PIXELS]
        mask[SEAM_PIXELS:] |= other
        mask[:-SEAM_PIXELS] |= other
    return near


def expected_under_reference(errors_2N: np.ndarray, reference_2N: np.ndarray, share_near: float) -> np.ndarray:
    """The errors near and elsewhere, (2, N), if each picture's whole error lay in it as the reference's lies.

    What stands at a border, the middle of a picture above all, is harder to draw than its margin, and more so in some
    pictures than in others: a seam is what is left when that is allowed for. ``share_near`` is that of the pixels.
    """
    weights = np.array([share_near, 1 - share_near])
    return reference_2N * (weights @ errors_2N) / (weights @ reference_2N)


def format_upscale_report(report: dict[str, Any]) -> str:
    """A Markdown table and a line on seams; every figure with its 95% interval."""
    lines = [
        "| large picture | PSNR to the true one, dB | SSIM to the true one | PSNR, reduced, to the decoded codes, dB |",
        "|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        own = report["large_pictures"][name]
        cells = [_interval(own["psnr"], 2), _interval(own["ssim"], 3), _interval(own["consistency"], 2)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    gain, seam = report["gain_over_bicubic"], report["seam"]
    lines += [
        "",
        f"Over {report['protocol']['captions']} held-out scenes, ours less bicubic is {_interval(gain['psnr'], 2)} dB "
        f"and {_interval(gain['ssim'], 3)} SSIM.",
        f"Squared error within {SEAM_PIXELS} pixels of window borders over that elsewhere: "
        f"{_interval(seam['ours'], 3)}; "
        f"of the reconstruction, which has no windows: {_interval(seam['vq_ceiling'], 3)}; "
        "over what it would be if each picture's error lay as the reconstruction's does: "
        f"{_interval(seam['quotient'], 3)}.",
    ]
    return "\n".join(lines)


def _figures(pictures: list[np.ndarray], true: np.ndarray, small: np.ndarray) -> dict[str, np.ndarray]:
    """(N,) each: PSNR and SSIM to the true large pictures, and PSNR of the pictures reduced to the small ones."""
    reduced = [_resized(picture, small.shape[1], Image.Resampling.BOX) for picture in pictures]
    return {
        "psnr": np.array([psnr(*pair) for pair in zip(pictures, true, strict=True)]),
        "ssim": np.array([ssim(*pair) for pair in zip(pictures, true, strict=True)]),
        "consistency": np.array([psnr(*pair) for pair in zip(reduced, small, strict=True)]),
    }


def _resized(picture: np.ndarray, side: int, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((side, side), how))


def _errors_near_and_far(pictures: list[np.ndarray], true: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Mean squared errors of each picture in the pixels of the mask ``near``, and in the others: (2, N)."""
    squared = [np.square(a.astype(np.float64) - b).mean(axis=-1) for a, b in zip(pictures, true, strict=True)]
    return np.array([[own[near].mean() for own in squared], [own[~near].mean() for own in squared]])


def _ratio(errors_2N: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Error near over error elsewhere, for one choice of pictures (N,) or many (R, N)."""
    near, elsewhere = errors_2N[:, rows].mean(axis=-1)
    return near / elsewhere


def _mean(values: np.ndarray) -> dict[str, float]:
    return _estimate(lambda rows: values[rows].mean(axis=-1), len(values))


def _estimate(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> dict[str, float]:
    """A statistic of ``count`` pictures, and its 95% interval by the bootstrap: the pictures drawn anew, many times."""
    resamples = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.percentile(statistic(resamples), [2.5, 97.5])
    return {"value": float(statistic(np.arange(count))), "low": float(low), "high": float(high)}


def _interval(figure: dict[str, float], digits: int) -> str:
    return f"{figure['value']:.{digits}f} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"
