"""Settings, loss and metrics of training a VQ-VAE. The trainer is ``cogview.training.vqvae_trainer``."""

# B batch, C channels, H W pixels, N vectors, D width of a code
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogview.vqvae.model import VQVAE
from cogview.vqvae.ranges import COUNT, check_optimizer, check_ranges


@dataclass(frozen=True, kw_only=True)
class VQVAETrainingSettings:
    """Settings of training a VQ-VAE.

    Args:
        steps: Number of batches.
        batch_size: Images in a batch.
        learning_rate: Peak learning rate.
        warmup_steps: Steps without quantization and with a rising learning rate; the codebook then starts from the
            encoder outputs of the last of them.
        final_learning_rate: Learning rate of the last step.
        betas: Decay rates of Adam's moments.
        weight_decay: Decoupled weight decay of AdamW.
        clip_norm: Maximum norm of the gradient, above 0; None for no clipping.
        commitment: Weight of the commitment loss (arXiv:1711.00937).
        gradient_difference_weight: Weight of the loss on differences between neighbouring pixels, which keeps edges
            sharp; 0 turns it off.
        decay: Decay of the codebook's moving averages.
        revive_every: Steps between restarts of codes out of use.
        revive_below: Average assignments per step below which a code is out of use.
        seed: Seed of the weights, the images and the restarts.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    final_learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    commitment: float = 0.25
    gradient_difference_weight: float = 1.0
    decay: float = 0.99
    revive_every: int = 10
    revive_below: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_optimizer(self)
        check_ranges(
            self,
            {
                "commitment": "[0, inf)",
                "gradient_difference_weight": "[0, inf)",
                "decay": "[0, 1]",
                "revive_every": COUNT,
                "revive_below": "[0, inf)",
            },
        )


def reconstruction_loss(images: Tensor, targets: Tensor, gradient_difference_weight: float) -> Tensor:
    """Return L1 + 4 * L2 + weighted L1 of the horizontal and vertical pixel differences.

    Args:
        images: Reconstructions (B, 3, H, W).
        targets: Originals (B, 3, H, W) in [0, 1].
        gradient_difference_weight: Weight of the pixel differences (arXiv:1511.05440).

    Returns:
        A scalar.
    """
    error = images - targets
    loss = error.abs().mean() + 4 * error.square().mean()
    if gradient_difference_weight:
        loss = loss + gradient_difference_weight * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
    return loss


def evaluate_vqvae(model: VQVAE, batches: Iterable[Tensor]) -> dict[str, float]:
    """Measure reconstruction and codebook usage.

    Args:
        model: The VQ-VAE.
        batches: Images (B, 3, H, W) in [0, 1].

    Returns:
        The metrics of ``reconstruction_metrics``.

    Raises:
        ValueError: There are no images.
    """
    return reconstruction_metrics(reconstruction_totals(model, batches))


@torch.inference_mode()
def reconstruction_totals(model: VQVAE, batches: Iterable[Tensor]) -> np.ndarray:
    """Return the sums of an evaluation, which may be added over processes.

    Args:
        model: The VQ-VAE.
        batches: Images (B, 3, H, W) in [0, 1]; none give zeros.

    Returns:
        float64 (3 + K,): the sum of squared errors, the number of values that it is of, the number of images, and the
        uses of each code.
    """
    device = next(model.parameters()).device
    model.eval()
    counts = torch.zeros(model.config.num_codes, dtype=torch.long, device=device)
    squared, values, images = 0.0, 0, 0
    for batch in batches:
        batch = batch.to(device)
        codes = model.encode(batch)
        squared += (model.decode(codes) - batch).square().sum().item()
        values += batch.numel()
        images += len(batch)
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
    return np.concatenate([[squared, values, images], counts.cpu().numpy()]).astype(np.float64)


def reconstruction_metrics(totals: np.ndarray) -> dict[str, float]:
    """Return the metrics of an evaluation.

    Args:
        totals: Sums of ``reconstruction_totals``.

    Returns:
        ``psnr`` in dB, of the mean squared error of all pixels; ``codes_used``, the fraction of codes in use;
        ``perplexity``, exp of the entropy of the codes, at most their number; and ``images``, their number.

    Raises:
        ValueError: There are no images.
    """
    (squared, values, images), counts = totals[:3].tolist(), totals[3:]
    if not images:
        raise ValueError("no images to evaluate on")
    shares = counts[counts > 0] / counts.sum()
    return {
        "psnr": -10 * math.log10(max(squared / values, 1e-10)),
        "codes_used": len(shares) / len(counts),
        "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
        "images": images,
    }
