"""Measures of an image tokenizer: equal to those of its training, and a sheet in rows."""

import numpy as np
import pytest
import torch

from cogview.evaluation.metrics import ssim
from cogview.evaluation.reconstruction import SHEET_IMAGES, ReconstructionReport
from cogview.vqvae.codec import psnr, reconstruct, to_float
from cogview.vqvae.model import VQVAE, VQVAEConfig
from cogview.vqvae.training import evaluate_vqvae

CONFIG = VQVAEConfig(channels=(4, 8, 8), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1), num_codes=32, code_width=4)


@pytest.fixture(scope="module")
def model() -> VQVAE:
    """A VQ-VAE with random weights whose codebook starts from what its encoder gives."""
    torch.manual_seed(3)
    model = VQVAE(CONFIG).eval()
    with torch.inference_mode():
        vectors = model(to_float(pictures(8)), quantize=False).vectors
    model.quantizer.initialize_from(vectors.reshape(-1, 4), torch.Generator().manual_seed(0))
    return model


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_reconstruction_report_agrees_with_the_evaluation_of_training(model):
    """One tokenizer must not have two values of its PSNR, codes in use and perplexity."""
    pixels = pictures(9)
    report = ReconstructionReport(model=model)
    for start in (0, 2, 7):  # the size of batches does not matter
        report.add(pixels[start : {0: 2, 2: 7, 7: 9}[start]])
    found, expected = report.summary(), evaluate_vqvae(model, [to_float(pixels)])
    assert found["pictures"] == 9
    assert found["psnr"] == pytest.approx(expected["psnr"], abs=0.02)  # reconstructions are rounded to 8 bits
    assert found["codes_used"] == pytest.approx(expected["codes_used"])
    assert found["perplexity"] == pytest.approx(expected["perplexity"])
    restored = reconstruct(model, pixels)
    assert found["psnr_median"] == pytest.approx(
        np.median([psnr(*pair) for pair in zip(pixels, restored, strict=True)])
    )
    assert found["ssim"] == pytest.approx(np.mean([ssim(*pair) for pair in zip(pixels, restored, strict=True)]))


def test_reconstruction_report_shows_random_images_above_their_reconstructions(model):
    pixels = pictures(60)
    report = ReconstructionReport(model=model)
    report.add(pixels)
    positions = sorted(position for position, _, _ in report.shown)
    assert len(set(positions)) == SHEET_IMAGES
    assert positions[-1] > 40
    images = report.sheet_images(12)
    assert len(images) == 2 * SHEET_IMAGES
    for number, position in enumerate(positions):
        row, column = divmod(number, 12)
        assert np.array_equal(images[24 * row + column], pixels[position])
        restored = reconstruct(model, pixels[position : position + 1])[0]
        assert np.abs(images[24 * row + 12 + column].astype(int) - restored).max() <= 1


def test_reconstruction_report_refuses_to_measure_nothing(model):
    with pytest.raises(ValueError, match="no images to evaluate on"):
        ReconstructionReport(model=model).summary()


class TwoCodeTokenizer:
    """8,192 codes, of which the left half of each image has one and the right half another."""

    downsampling = 16
    codebook = torch.zeros(8192, 1)

    def encode(self, images):
        return torch.tensor([[[5, 4000]]]).expand(len(images), 1, 2)

    def decode(self, codes):
        return torch.full((len(codes), 3, 16, 32), 0.5)


def test_perplexity_of_two_codes_in_equal_use_is_two():
    report = ReconstructionReport(model=TwoCodeTokenizer())
    report.add(np.zeros((3, 16, 32, 3), np.uint8))
    found = report.summary()
    assert found["perplexity"] == pytest.approx(2.0, abs=1e-12)
    assert f"{found['codes_used']:.4%}" == "0.0244%"
