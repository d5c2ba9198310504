"""How well an image tokenizer reconstructs pictures."""

# H, W image in pixels, K number of codes, N images
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cogview.data.keyed_random import KeyedRandom
from cogview.evaluation.metrics import bootstrap, ssim
from cogview.evaluation.records import ResultValue
from cogview.vqvae.codec import MIN_MSE, ImageTokenizer, psnr, to_float, to_uint8

SHEET_IMAGES = 24


def code_usage(counts: np.ndarray) -> tuple[float, float]:
    """Return the fraction of codes in use and the perplexity, exp of the entropy of the codes.

    Args:
        counts: Uses of each code (K,), not all zero.
    """
    shares = counts[counts > 0] / counts.sum()
    return len(shares) / len(counts), float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(kw_only=True, eq=False)
class ReconstructionReport:
    """Measures of an image tokenizer, over all images that were added.

    Args:
        model: The image tokenizer.

    Attributes:
        psnr: PSNR of each image, in dB.
        ssim: Structural similarity of each image.
        counts: Uses of each code (K,).
        shown: Some random images with their position and their reconstruction, for a sheet.
    """

    model: ImageTokenizer
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    shown: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.model.codebook), dtype=np.int64)
        self._squared = 0.0  # sum over images of their mean squared errors

    @torch.inference_mode()
    def add(self, pixels: np.ndarray) -> np.ndarray:
        """Reconstruct images and measure them.

        Args:
            pixels: uint8 RGB (N, H, W, 3), with sides of at least 11.

        Returns:
            The reconstructions, of the same shape.
        """
        codes = self.model.encode(to_float(pixels, self.model.codebook.device))
        restored = to_uint8(self.model.decode(codes))
        self.counts += np.bincount(codes.flatten().cpu().numpy(), minlength=len(self.counts))
        for image, other in zip(pixels, restored, strict=True):
            position = len(self.psnr)
            self.psnr.append(psnr(image, other))
            self.ssim.append(ssim(image, other))
            self._squared += float(np.square((image.astype(np.float64) - other) / 255).mean())
            place = position if position < SHEET_IMAGES else KeyedRandom("sheet", position).randbelow(position + 1)
            if place < SHEET_IMAGES:  # reservoir sampling
                self.shown[place : place + 1] = [(position, image, other)]
        return restored

    def summary(self) -> dict[str, Any]:
        """Return the measures as plain JSON data.

        Returns:
            ``pictures``, their number; ``psnr`` in dB, of the mean squared error of all pixels; ``psnr_p05`` and
            ``psnr_median`` of the pictures; ``ssim``, the mean; ``codes``, the size of the codebook; ``codes_used``,
            the fraction of codes in use; ``perplexity``, exp of the entropy of the codes.

        Raises:
            ValueError: No image was added.
        """
        if not self.psnr:
            raise ValueError("no images to evaluate on")
        codes_used, perplexity = code_usage(self.counts)
        low, median = np.percentile(self.psnr, [5, 50])
        return {
            "pictures": len(self.psnr),
            "psnr": -10 * math.log10(max(self._squared / len(self.psnr), MIN_MSE)),
            "psnr_p05": float(low),
            "psnr_median": float(median),
            "ssim": float(np.mean(self.ssim)),
            "codes": len(self.counts),
            "codes_used": codes_used,
            "perplexity": perplexity,
        }

    def result_values(self) -> dict[str, ResultValue]:
        """Return the measures for a result file; intervals are of means over pictures, by the bootstrap.

        Raises:
            ValueError: No image was added.
        """
        found, count = self.summary(), len(self.psnr)
        values = {
            "psnr": ResultValue(value=found["psnr"], n=count, unit="dB", higher_is_better=True),
            "codes_used": ResultValue(value=found["codes_used"], n=count, unit="fraction", higher_is_better=True),
            "perplexity": ResultValue(value=found["perplexity"], n=count, unit="codes"),
        }
        for name in ("psnr_p05", "psnr_median"):
            values[name] = ResultValue(value=found[name], n=count, unit="dB", higher_is_better=True)
        for name, items in self.item_values().items():
            unit, each = "dB" if name == "psnr_mean" else "", np.array(items)
            mean = bootstrap(lambda rows, each=each: each[rows].mean(axis=-1), count)  # type: ignore[misc]
            values[name] = ResultValue(**mean, n=count, unit=unit, higher_is_better=True)
        return values

    def item_values(self) -> dict[str, list[float]]:
        """Return PSNR and SSIM of each image, by the name of their mean among ``result_values``."""
        return {"psnr_mean": list(self.psnr), "ssim": list(self.ssim)}

    def sheet_images(self, columns: int) -> list[np.ndarray]:
        """Return images in rows of ``columns``, each row followed by that of its reconstructions, for a sheet.

        Args:
            columns: Images in a row. A last row that is not full is left out, unless it is the only one.
        """
        chosen = sorted(self.shown, key=lambda each: each[0])
        if len(chosen) > columns:
            chosen = chosen[: len(chosen) // columns * columns]
        images = []
        for start in range(0, len(chosen), columns):
            row = chosen[start : start + columns]
            images += [image for _, image, _ in row] + [restored for _, _, restored in row]
        return images
