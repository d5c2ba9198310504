"""Images between bytes and numbers, and what the VQ-VAE makes of them."""

# H W pixels

import math

import numpy as np
import pytest
import torch

from cogview.vqvae.codec import psnr, reconstruct, to_float, to_uint8
from cogview.vqvae.model import VQVAE, VQVAEConfig

CONFIG = VQVAEConfig(channels=(4, 8, 8), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1), num_codes=16, code_width=4)


def test_to_float_gives_channels_from_0_to_1():
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[2, 5] = (255, 51, 0)
    image = to_float(pixels)
    assert image.shape == (3, 8, 16)
    assert image.dtype == torch.float32
    assert image[:, 2, 5].tolist() == pytest.approx([1.0, 0.2, 0.0])


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_to_uint8_undoes_to_float(lead):
    """Every byte comes back, for any number of leading axes, from an array as from a tensor."""
    shape = (*lead, 16, 16, 3)
    pixels = np.arange(np.prod(shape)).astype(np.uint8).reshape(shape)
    assert np.unique(pixels).size == 256
    assert np.array_equal(to_uint8(to_float(pixels)), pixels)
    assert np.array_equal(to_uint8(to_float(torch.from_numpy(pixels), torch.device("cpu"))), pixels)


def test_to_uint8_rounds_to_the_nearest_byte():
    images = torch.tensor([0.0, 0.49, 0.51, 254.49, 254.51, 255.0]).div(255).expand(3, 1, 6)
    assert to_uint8(images)[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


def test_reconstruct_gives_bytes_of_what_the_model_decodes():
    torch.manual_seed(0)
    model = VQVAE(CONFIG).eval()
    pixels = np.random.default_rng(0).integers(256, size=(3, 16, 24, 3), dtype=np.uint8)
    restored = reconstruct(model, pixels)
    assert restored.shape == pixels.shape
    assert restored.dtype == np.uint8
    expected = model.decode(model.encode(to_float(pixels)))
    assert np.array_equal(restored[1], (expected[1] * 255).round().byte().permute(1, 2, 0).numpy())


def test_psnr_of_known_errors():
    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    assert psnr(image, image) == 100
    for error in (1, 5):
        off = np.where(image > 127, image - error, image + error).astype(np.uint8)  # none is clipped
        assert psnr(image, off) == pytest.approx(20 * math.log10(255 / error))
    assert psnr(np.zeros_like(image), np.full_like(image, 255)) == 0
