"""One training step of the VQ-VAE, and what it is judged by.

The schedule: a short warm-up as a plain autoencoder; then the codebook starts from the encoder outputs of the last
batches; from there on straight-through gradients, moving averages, and codes out of use put back to work.
"""

# B batch, C channels, H W pixels, N vectors, D width of a code
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogview.vqvae.lr_schedule import warmup_cosine
from cogview.vqvae.model import VQVAE, VQVAEConfig
from cogview.vqvae.quantizer import RENAMED_AVERAGES


@dataclass(frozen=True, kw_only=True)
class VQVAETrainingSettings:
    """Settings of a run. Batches hold ``batch_size`` images; ``steps`` counts batches."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 300  # no quantization, learning rate rising; the codebook starts from what they encode
    final_learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    commitment: float = 0.25
    gradient_difference_weight: float = (
        1.0  # of the loss on differences between neighbouring pixels, which keeps edges sharp
    )
    decay: float = 0.99  # of the codebook's averages
    revive_every: int = 10
    revive_below: float = 0.01  # uses per step
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be from 1 to steps - 1 ({self.steps - 1}), got {self.warmup_steps}")
        if self.batch_size < 1 or self.revive_every < 1:
            raise ValueError(
                f"batch_size and revive_every must be at least 1, got {self.batch_size} and {self.revive_every}"
            )


def reconstruction_loss(images: Tensor, targets: Tensor, gradient_difference_weight: float) -> Tensor:
    """L1 + L2 + L1 of the horizontal and vertical differences, for (B, 3, H, W) in [0, 1]; a scalar."""
    error = images - targets
    loss = error.abs().mean() + 4 * error.square().mean()
    if gradient_difference_weight:
        loss = loss + gradient_difference_weight * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
    return loss


class VQVAETrainer:
    """Holds the model, its optimizer and the codebook's schedule; ``step`` is a function of (state, batch, step).

    A model given as ``init_from`` keeps its codebook, so that there is nothing to warm up but the learning rate.
    """

    def __init__(
        self,
        config: VQVAEConfig,
        settings: VQVAETrainingSettings,
        device: torch.device,
        autocast: torch.dtype | None = None,
        init_from: VQVAE | None = None,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.started = init_from is not None
        self.settings = settings
        self.device = device
        self.autocast = autocast
        self.model = (init_from or VQVAE(config)).to(device)
        if init_from is not None:
            self.model.quantizer.reset_codebook(init_from.quantizer.codebook)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._recent: list[Tensor] = []  # encoder outputs of the last warm-up batches

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: a linear warm-up, then a cosine down to ``final_learning_rate``."""
        return warmup_cosine(
            step,
            peak=self.settings.learning_rate,
            final=self.settings.final_learning_rate,
            warmup_steps=self.settings.warmup_steps,
            steps=self.settings.steps,
        )

    def step(self, step: int, images: Tensor) -> dict[str, float]:
        """Train on (B, 3, H, W) images in [0, 1]; return the figures to log.

        FloatingPointError, with the weights as they were, where the gradient is not finite.
        """
        settings, quantizer = self.settings, self.model.quantizer
        # Whatever is random in a step depends on its number alone, so a resumed run repeats it.
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.model.train()
        images = images.to(self.device, non_blocking=True)
        quantize = self.started or step >= settings.warmup_steps
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(images, quantize=quantize)
        loss = reconstruction_loss(output.images, images, settings.gradient_difference_weight)
        commitment = F.mse_loss(output.vectors, output.quantized) * output.vectors.shape[-1]
        (loss + settings.commitment * commitment).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {step} is not finite; lower the learning rate, or resume earlier"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        revived = 0
        vectors = output.vectors.detach()
        if quantize:
            quantizer.update(vectors, output.codes, settings.decay)
            if step % settings.revive_every == 0:
                revived = quantizer.restart_dead_codes(vectors, settings.revive_below, generator)
        else:
            self._recent.append(vectors.reshape(-1, vectors.shape[-1]))
            enough = 4 * len(quantizer.codebook)
            while sum(map(len, self._recent[1:])) >= enough:
                self._recent.pop(0)
            if step == settings.warmup_steps - 1:
                quantizer.initialize_from(torch.cat(self._recent), generator)
                self._recent.clear()
        mse = F.mse_loss(output.images.detach().clamp(0, 1), images)
        return {
            "loss": loss.item(),
            "commitment": commitment.item(),
            "psnr": -10 * math.log10(max(mse.item(), 1e-10)),
            "alive": (quantizer.ema_cluster_size > settings.revive_below).float().mean().item() if quantize else 0.0,
            "revived": float(revived),
            "gradient_norm": norm.item(),
            "learning_rate": self.learning_rate(step),
        }

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values."""
        quantizer = self.model.quantizer
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema_cluster_size": quantizer.ema_cluster_size,
            "ema_sum": quantizer.ema_sum,
            "recent": list(self._recent),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up what ``state`` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for old, name in RENAMED_AVERAGES.items():
            self.model.quantizer.get_buffer(name).copy_(state[name] if name in state else state[old])
        self._recent = [tensor.to(self.device) for tensor in state["recent"]]


@torch.inference_mode()
def evaluate_vqvae(model: VQVAE, batches: Iterable[Tensor]) -> dict[str, float]:
    """PSNR in dB (of the mean squared error of all pixels), share of codes used, and perplexity of their use.

    ``batches`` are (B, 3, H, W) images in [0, 1]. Perplexity is exp of the entropy of the codes, at most their number.
    """
    device = next(model.parameters()).device
    model.eval()
    counts = torch.zeros(model.config.num_codes, dtype=torch.long, device=device)
    squared, pixels = 0.0, 0
    for images in batches:
        images = images.to(device)
        codes = model.encode(images)
        squared += (model.decode(codes) - images).square().sum().item()
        pixels += images.numel()
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
    if not pixels:
        raise ValueError("no images to evaluate on")
    shares = counts[counts > 0].double() / counts.sum()
    return {
        "psnr": -10 * math.log10(max(squared / pixels, 1e-10)),
        "codes_used": (counts > 0).float().mean().item(),
        "perplexity": torch.exp(-(shares * shares.log()).sum()).item(),
        "images": pixels / (3 * images.shape[2] * images.shape[3]),
    }
