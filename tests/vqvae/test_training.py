"""Settings, loss and metrics of VQ-VAE training: losses by hand, metrics of a known model."""

# B batch, H W pixels

import math

import pytest
import torch

from cogview.vqvae.model import VQVAE, VQVAEConfig
from cogview.vqvae.training import VQVAETrainingSettings, evaluate_vqvae, reconstruction_loss

CONFIG = VQVAEConfig(
    channels=(8, 16, 16), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 1, 1), num_codes=32, code_width=4
)


def test_reconstruction_loss_by_hand():
    images, targets = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    images[..., 0, 0] = 0.5  # one pixel of four is off by 0.5
    absolute, squared = 0.5 / 4, 0.25 / 4
    differences = 2 * (0.5 / 2)  # one of two differences, in each direction
    assert reconstruction_loss(images, targets, 0.0).item() == pytest.approx(absolute + 4 * squared)
    assert reconstruction_loss(images, targets, 2.0).item() == pytest.approx(absolute + 4 * squared + 2 * differences)


class HalfRight(VQVAE):
    """Encode the halves of every image as the codes 1 and 0, and decode to grey."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        codes = torch.zeros(len(images), images.shape[2] // 8, images.shape[3] // 8, dtype=torch.long)
        codes[:, : codes.shape[1] // 2] = 1
        return codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.full((len(codes), 3, 8 * codes.shape[1], 8 * codes.shape[2]), 0.5)


def test_evaluate_vqvae_of_a_known_model():
    batches = [torch.zeros(3, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)]  # of unequal size
    metrics = evaluate_vqvae(HalfRight(CONFIG), batches)
    assert metrics["psnr"] == pytest.approx(-10 * math.log10(0.75 * 0.25))
    assert metrics["codes_used"] == pytest.approx(2 / 32)
    assert metrics["perplexity"] == pytest.approx(2)
    assert metrics["images"] == 4


def test_evaluate_vqvae_refuses_an_empty_dataset():
    with pytest.raises(ValueError, match="no images to evaluate on"):
        evaluate_vqvae(VQVAE(CONFIG), [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 300}, r"warmup_steps must be from 1 to steps - 1 \(299\), got 300"),
        ({"steps": 10, "warmup_steps": 0}, "warmup_steps must be from 1"),
        ({"steps": 1000, "batch_size": 0}, r"batch_size must be in \[1, 1048576\], got 0"),
        ({"steps": 1000, "revive_every": 0}, r"revive_every must be in \[1, 1000000000\], got 0"),
        ({"steps": 1000, "clip_norm": 0.0}, "clip_norm must be above 0 and finite, or null for no clipping, got 0.0"),
        ({"steps": 1000, "learning_rate": math.nan}, "learning_rate must be at least 0 and finite, got nan"),
        ({"steps": 1000, "decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ({"steps": 1000, "commitment": math.inf}, "commitment must be at least 0 and finite, got inf"),
        ({"steps": 1000, "seed": 2**63}, r"seed must be in \[0, 9223372036854775807\], got 9223372036854775808"),
    ],
)
def test_vqvae_training_settings_refuse_numbers_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        VQVAETrainingSettings(**settings)
