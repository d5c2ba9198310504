"""The VQ-VAE's networks: shapes, ranges, what a code may depend on, the released layers, wrong settings."""

# B batch, C channels, H W pixels, S pixels of a side of a code, h w codes (H/S, W/S)

import math

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.config_io import from_mapping, to_mapping
from cogview.vqvae.model import V1_MEAN, V1_STD, VQVAE, VQVAEConfig

RESIDUAL = VQVAEConfig(channels=(8, 16, 24), encoder_blocks=(0, 0, 2), num_codes=50, code_width=4)
RESIDUAL_4X = VQVAEConfig(channels=(8, 16), num_codes=50, code_width=4)
RESIDUAL_16X = VQVAEConfig(channels=(8, 16, 16, 24), num_codes=50, code_width=4)
RESIDUALS = (RESIDUAL_4X, RESIDUAL, RESIDUAL_16X)
RELEASED = VQVAEConfig(
    architecture="released",
    channels=(8, 12, 16),
    num_codes=50,
    code_width=6,
    normalize_codes=False,
    mean=V1_MEAN,
    std=V1_STD,
)


# A config with such a mean or standard deviation of RGB was accepted, and each image was one colour.
NO_COLOURS = (math.inf, -math.inf, math.nan, -0.5, 1e308)


def make(config: VQVAEConfig) -> VQVAE:
    """A model with random weights, whose codes are outputs of its encoder."""
    torch.manual_seed(0)
    model = VQVAE(config).eval()
    with torch.inference_mode():
        outputs = model.encode_vectors(noise(4, 3, 64, 64)).reshape(-1, config.code_width)
    model.quantizer.initialize_from(outputs, torch.Generator().manual_seed(0))
    return model


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [*RESIDUALS, RELEASED], ids=["4x", "8x", "16x", "released"])
def test_vqvae_shapes_and_ranges(config):
    model = make(config)
    codes = model.encode(noise(2, 3, 32, 48))
    assert codes.shape == (2, 32 // config.downsampling, 48 // config.downsampling)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < config.num_codes
    images = model.decode(codes)
    assert images.shape == (2, 3, 32, 48)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    # The range is the clamp's doing: far-out vectors leave it on both sides before.
    wild = model.decode_vectors(1e4 * model.quantizer.lookup(codes))
    assert wild.min() < 0
    assert wild.max() > 1


@pytest.mark.parametrize("config", [RESIDUAL, RELEASED], ids=["residual", "released"])
def test_vqvae_encodes_and_decodes_each_image_independently(config):
    model, images = make(config), noise(3, 3, 32, 32)
    codes = model.encode(images)
    assert torch.equal(model.encode(images), codes)
    assert torch.equal(model.encode(images[1:2])[0], codes[1])
    assert len(codes.unique()) > 1
    torch.testing.assert_close(model.decode(codes)[2:], model.decode(codes[2:]), atol=1e-6, rtol=0)
    assert torch.equal(model.decode(codes), model.decode(codes))


def test_vqvae_forward_decodes_nearest_codes_with_a_straight_through_gradient():
    model, images = make(RESIDUAL), noise(2, 3, 16, 16)
    output = model(images)
    assert torch.equal(output.codes, model.encode(images))
    torch.testing.assert_close(output.images.clamp(0, 1), model.decode(output.codes), atol=1e-5, rtol=0)
    output.images.sum().backward()
    assert model.encoder[1].weight.grad.abs().sum() > 0
    assert not output.quantized.requires_grad


def test_vqvae_forward_decodes_encoder_outputs_when_quantization_is_off():
    model, images = make(RESIDUAL), noise(2, 3, 16, 16)
    output = model(images, quantize=False)
    torch.testing.assert_close(output.images, model.decode_vectors(model.encode_vectors(images)))
    assert torch.equal(output.codes, torch.zeros(2, 2, 2, dtype=torch.long))


@pytest.mark.parametrize("config", RESIDUALS, ids=["4x", "8x", "16x"])
def test_residual_encoder_has_a_receptive_field_of_a_patch_and_two_pixels_around(config):
    """The codes of an object must not depend on other parts of the image."""
    side = config.downsampling
    model, image = make(config), noise(1, 3, 8 * side, 8 * side)
    before = model.encode_vectors(image)[0]
    outside = torch.ones(8 * side, 8 * side, dtype=torch.bool)
    outside[3 * side - 2 : 4 * side + 2, 4 * side - 2 : 5 * side + 2] = False
    changed = torch.where(outside, 1 - image, image)
    after = model.encode_vectors(changed)[0]
    torch.testing.assert_close(after[3, 4], before[3, 4], atol=1e-6, rtol=0)
    assert (after - before).abs().amax(dim=-1).gt(1e-3).sum() == 63

    for row, column, seen in [(3, 4, True), (3 - 2 / side, 4, True), (3 - 3 / side, 4, False)]:
        one = image.clone()
        one[..., round(row * side), round(column * side)] = 1 - one[..., round(row * side), round(column * side)]
        moved = (model.encode_vectors(one)[0, 3, 4] - before[3, 4]).abs().max() > 1e-6
        assert moved == seen, (row, column)


@pytest.mark.parametrize("config", RESIDUALS, ids=["4x", "8x", "16x"])
def test_residual_encoder_gives_an_object_the_same_codes_anywhere_on_the_grid(config):
    side = config.downsampling
    model, patch = make(config), noise(3, 2 * side, 2 * side)
    image = torch.full((1, 3, 8 * side, 8 * side), 0.5)
    image[0, :, side : 3 * side, side : 3 * side] = patch
    image[0, :, 5 * side : 7 * side, 4 * side : 6 * side] = patch
    codes = model.encode(image)[0]
    assert torch.equal(codes[1:3, 1:3], codes[5:7, 4:6])


def test_released_vqvae_has_the_names_and_shapes_of_the_v1_weights():
    """FORMATS: enc_b.blocks.{0,2,4,6} and dec.blocks.{0,2,4,6}, 512 channels, 8192 codes of width 256."""
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig.released())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "encoder.0.weight": (512, 3, 4, 4),
        "encoder.2.weight": (512, 512, 4, 4),
        "encoder.4.weight": (512, 512, 4, 4),
        "encoder.6.weight": (256, 512, 1, 1),
        "decoder.0.weight": (256, 512, 4, 4),  # transposed convolutions hold (in, out, ...)
        "decoder.2.weight": (512, 512, 4, 4),
        "decoder.4.weight": (512, 512, 4, 4),
        "decoder.6.weight": (3, 512, 1, 1),
    }
    assert tuple(model.state_dict()["quantizer.codebook"].shape) == (8192, 256)


def test_released_vqvae_normalizes_pixels_by_the_v1_mean_and_std():
    model, image = make(RELEASED), noise(1, 3, 16, 16)
    mean, std = torch.tensor(V1_MEAN).view(3, 1, 1), torch.tensor(V1_STD).view(3, 1, 1)
    vectors = model.encoder((image - mean) / std).permute(0, 2, 3, 1)
    torch.testing.assert_close(model.encode_vectors(image), vectors)
    decoded = model.decoder(vectors.permute(0, 3, 1, 2)) * std + mean
    torch.testing.assert_close(model.decode_vectors(vectors), decoded)


def test_vqvae_state_has_no_averages_of_training():
    assert not [name for name in make(RESIDUAL).state_dict() if "ema" in name or "mean" in name]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 60, 64), r"sides must be divisible by 8, got \(60, 64\)"),
        ((1, 3, 64, 65), r"sides must be divisible by 8, got \(64, 65\)"),
        ((3, 64, 64), r"must be \(batch, 3, height, width\), got \(3, 64, 64\)"),
        ((1, 1, 64, 64), r"must be \(batch, 3, height, width\), got \(1, 1, 64, 64\)"),
    ],
)
def test_vqvae_refuses_images_of_other_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        make(RESIDUAL).encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "resnet"}, "architecture must be residual or released, got 'resnet'"),
        ({"channels": (8,)}, "channels must have 2, 3 or 4 entries, for a downsampling of 4, 8 or 16, got 1"),
        ({"channels": (8,) * 10**5}, "got 100000"),
        ({"downsampling": 32}, "downsampling must be 4, 8 or 16, got 32"),
        ({"downsampling": 16, "channels": (8, 8, 8)}, r"channels must have 4 entries for .* of 16, .*got \[8, 8, 8\]"),
        ({"channels": (8, 8), "encoder_blocks": (0, 0, 1)}, r"encoder_blocks must have 2 entries for .* of 4"),
        ({"decoder_blocks": (1, 1, 1, 1)}, "decoder_blocks must have 3 entries for a downsampling of 8"),
        ({"architecture": "released", "downsampling": 16}, "the architecture released has a downsampling of 8, got 16"),
        ({"num_codes": 0}, "must be in "),
        ({"channels": (8, 0, 8)}, "must be in "),
        ({"channels": (8, 10**18, 8)}, "channels must be in "),
        ({"num_codes": 10**18}, "num_codes must be in "),
        ({"code_width": 10**18}, "code_width must be in "),
        ({"encoder_blocks": (0, 0, 10**18)}, r"encoder_blocks must be in \[0, 64\], got \(0, 0, 10{18}\)"),
        ({"decoder_blocks": (0, -1, 0)}, r"decoder_blocks must be in \[0, 64\], got \(0, -1, 0\)"),
        *(({"mean": (0.5, value, 0.5)}, r"mean must be in \[0, 1\], as RGB is, got ") for value in NO_COLOURS),
        *(({"std": (0.5, value, 0.5)}, r"std must be in \[0\.001, 1\], got ") for value in (*NO_COLOURS, 0.0)),
    ],
)
def test_vqvae_config_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**settings)


@pytest.mark.parametrize(
    ("downsampling", "channels", "encoder_blocks", "decoder_blocks"),
    [
        (4, (32, 128), (0, 3), (1, 2)),
        (8, (32, 128, 256), (0, 0, 3), (1, 1, 2)),
        (16, (32, 128, 256, 512), (0, 0, 0, 3), (1, 1, 1, 2)),
    ],
)
def test_vqvae_config_follows_from_the_downsampling_or_from_the_channels(
    downsampling, channels, encoder_blocks, decoder_blocks
):
    config = VQVAEConfig(downsampling=downsampling)
    assert (config.channels, config.encoder_blocks, config.decoder_blocks) == (channels, encoder_blocks, decoder_blocks)
    assert VQVAEConfig(channels=channels) == config
    assert from_mapping(VQVAEConfig, to_mapping(config), "config") == config
    assert VQVAEConfig() == VQVAEConfig(downsampling=8)


def test_vqvae_config_is_written_without_downsampling():
    """Versions that know 8x alone read the configs of 8x, and a training that they began is continued."""
    assert "downsampling" not in to_mapping(VQVAEConfig())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (
            torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
            TypeError,
            r"got tensor of uint8 \(1, 3, 64, 64\); to_float in",
        ),
        (np.zeros((1, 64, 64, 3), np.uint8), TypeError, r"got array of uint8 \(1, 64, 64, 3\); to_float in"),
        (Image.new("RGB", (64, 64)), TypeError, "got PIL.Image; .*CogView.encode_images takes images of any form"),
        (None, TypeError, "got NoneType"),
        (torch.full((1, 3, 64, 64), 255.0), ValueError, r"in \[0, 1\], got values from 255 to 255"),
        (torch.full((1, 3, 64, 64), -1.0), ValueError, r"in \[0, 1\], got values from -1 to -1"),
        (torch.full((1, 3, 64, 64), math.nan), ValueError, "got values from nan to nan"),
    ],
)
def test_vqvae_encode_refuses_what_it_would_misread(images, error, message):
    """Bytes from 0 to 255 as a tensor once gave the codes of a white image."""
    with pytest.raises(error, match=message):
        make(RESIDUAL).encode(images)


def test_vqvae_encode_takes_any_strides_and_floats():
    """Views, double precision and tensors of a graph give the codes of their values."""
    model, images = make(RESIDUAL), torch.rand(2, 3, 16, 24)
    expected = model.encode(images)
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    for form in (turned, images.double(), images.clone().requires_grad_()):
        assert torch.equal(model.encode(form), expected)


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (
            torch.full((1, 2, 2), RESIDUAL.num_codes),
            ValueError,
            f"from 0 to {RESIDUAL.num_codes - 1}, .*got {RESIDUAL.num_codes}",
        ),
        (torch.full((1, 2, 2), -1), ValueError, "codes must be from 0 to .*got -1"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"codes must be \(batch, height, width\), got \(2, 2\)"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), TypeError, r"an int64 tensor \(B, h, w\), got tensor of uint8"),
        ([[[1]]], TypeError, r"an int64 tensor \(B, h, w\), got list"),
    ],
)
def test_vqvae_decode_refuses_codes(codes, error, message):
    with pytest.raises(error, match=message):
        make(RESIDUAL).decode(codes)
