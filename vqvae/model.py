"""The VQ-VAE: images to codes of an 8192-entry codebook, and back (van den Oord et al., arXiv:1711.00937).

Two architectures share the quantizer and the interface:

* ``released``: that of CogView v1 (arXiv:2105.13290), three 4x4 stride-2 convolutions and their transposes, codes of
  width 256, no residual blocks.
* ``residual``: the default. Residual blocks at two to four scales and narrow, l2-normalized codes keep the whole
  codebook in use (see ``quantizer.py``). The encoder's receptive field is little more than the patch of a code. An
  object therefore has the same codes anywhere on the grid, which is what a transformer learns from. The decoder's
  receptive field is wider and smooths the seams.

Each scale halves the sides of the image: ``residual`` encodes 4x4, 8x8 or 16x16 pixels as one code, ``released`` 8x8.
"""

# B batch, C channels, H W pixels, S pixels of a side of a code, h w codes (H/S, W/S), D width of a code
from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogview.vqvae.codec import check_codes, check_images
from cogview.vqvae.quantizer import Quantizer

V1_MEAN = (0.79093, 0.76271, 0.75340)
V1_STD = (0.30379, 0.32279, 0.32800)


# Limits of a VQ-VAE: a damaged config must not allocate without bound.
MAX_CHANNELS = 1 << 13
MAX_BLOCKS = 64
MAX_CODES = 1 << 20
MIN_STD = 1e-3

# Pixels of a side of a code, by the number of scales.
DOWNSAMPLING_OF_SCALES = {2: 4, 3: 8, 4: 16}

# Channels by scale, from 1/2 of the image's side on, as long as a config names none. A scale has a quarter of the
# positions of the one before; from 1/4 on the channels double, so each scale's convolutions cost alike.
DEFAULT_CHANNELS = (32, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """Shape of a VQ-VAE.

    ``downsampling`` or ``channels`` decides the number of scales; the other one follows. Without both there are three.

    Args:
        architecture: ``residual`` or ``released``.
        downsampling: Pixels on each side of the square that one code stands for: 4, 8 or 16, or 8 alone for
            ``released``. 0: as many as the channels say.
        channels: Channels at 1/2, 1/4, ... of the image's side. Empty: the first of (32, 128, 256, 512).
        encoder_blocks: Residual blocks of the encoder at the same scales. Empty: 3 at the last one.
        decoder_blocks: Residual blocks of the decoder at the same scales. Empty: 2 at the last one, 1 at the others.
        num_codes: Size of the codebook.
        code_width: Width of a code vector.
        normalize_codes: Scale codes and encoder outputs to length 1.
        mean: Mean of the RGB channels, subtracted before encoding.
        std: Standard deviation of the RGB channels.

    Raises:
        ValueError: The architecture or the downsampling is unknown, the tuples have other lengths than there are
            scales, or a number is outside its range.
    """

    architecture: str = "residual"
    downsampling: int = field(default=0, metadata={"written": False})  # in files the channels say it
    channels: tuple[int, ...] = ()
    encoder_blocks: tuple[int, ...] = ()
    decoder_blocks: tuple[int, ...] = ()
    num_codes: int = 8192
    code_width: int = 16
    normalize_codes: bool = True
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.architecture not in ("residual", "released"):
            raise ValueError(f"architecture must be residual or released, got {self.architecture!r}")
        self._fill_in_scales()
        for name, limit in (("channels", MAX_CHANNELS), ("num_codes", MAX_CODES), ("code_width", MAX_CHANNELS)):
            value = getattr(self, name)
            if not all(1 <= size <= limit for size in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name} must be in [1, {limit}], got {value}")
        for name in ("encoder_blocks", "decoder_blocks"):
            if not all(0 <= blocks <= MAX_BLOCKS for blocks in getattr(self, name)):
                raise ValueError(f"{name} must be in [0, {MAX_BLOCKS}], got {getattr(self, name)}")
        if not all(0 <= mean <= 1 for mean in self.mean):
            raise ValueError(f"mean must be in [0, 1], as RGB is, got {self.mean}")
        if not all(MIN_STD <= std <= 1 for std in self.std):
            raise ValueError(f"std must be in [{MIN_STD}, 1], got {self.std}")

    def _fill_in_scales(self) -> None:
        """Set ``downsampling`` by the channels or the channels by it, and the blocks that are not given."""
        downsampling = self.downsampling or DOWNSAMPLING_OF_SCALES.get(len(self.channels) or 3)
        if downsampling is None:
            raise ValueError(
                f"channels must have 2, 3 or 4 entries, for a downsampling of 4, 8 or 16, got {len(self.channels)}"
            )
        if downsampling not in DOWNSAMPLING_OF_SCALES.values():
            raise ValueError(f"downsampling must be 4, 8 or 16, got {downsampling}")
        if self.architecture == "released" and downsampling != 8:
            raise ValueError(f"the architecture released has a downsampling of 8, got {downsampling}")
        scales = downsampling.bit_length() - 1
        defaults = {
            "channels": DEFAULT_CHANNELS[:scales],
            "encoder_blocks": (0,) * (scales - 1) + (3,),
            "decoder_blocks": (1,) * (scales - 1) + (2,),
        }
        object.__setattr__(self, "downsampling", downsampling)  # the dataclass is frozen
        for name, default in defaults.items():
            value = getattr(self, name) or default
            if len(value) != scales:
                raise ValueError(
                    f"{name} must have {scales} entries for a downsampling of {downsampling}, one for each halving of "
                    f"the sides, got {list(value)}"
                )
            object.__setattr__(self, name, value)

    @classmethod
    def released(cls) -> VQVAEConfig:
        """Return the shape of ``vqvae_hard_biggerset_011`` of CogView v1: 8192 codes of width 256, not normalized."""
        return cls(
            architecture="released",
            channels=(512, 512, 512),
            encoder_blocks=(0, 0, 0),
            decoder_blocks=(0, 0, 0),
            code_width=256,
            normalize_codes=False,
            mean=V1_MEAN,
            std=V1_STD,
        )


class Reconstruction(NamedTuple):
    """Outputs of one forward pass in training."""

    images: Tensor  # (B, 3, H, W), [0, 1] but not clamped
    vectors: Tensor  # (B, h, w, D) encoder outputs, float32
    codes: Tensor  # (B, h, w) int64; all zero while quantization is off
    quantized: Tensor  # (B, h, w, D) the nearest code vectors, no gradient


class VQVAE(nn.Module):
    """Encode images to codes and decode codes to images; an ``ImageTokenizer``.

    Images are RGB in [0, 1], (B, 3, H, W), with sides divisible by ``downsampling``.

    Args:
        config: Shape of the networks and of the codebook.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        build = _released_networks if config.architecture == "released" else _residual_networks
        self.encoder, self.decoder = build(config)
        self.quantizer = Quantizer(config.num_codes, config.code_width, normalize=config.normalize_codes)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    @property
    def downsampling(self) -> int:
        """Pixels on each side of the square that one code stands for."""
        return self.config.downsampling

    @property
    def codebook(self) -> Tensor:
        """The (K, D) float32 code vectors."""
        return self.quantizer.codebook

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes of images.

        Args:
            images: RGB floats in [0, 1], (B, 3, H, W), with sides divisible by ``downsampling``.

        Returns:
            (B, h, w) int64 codes.

        Raises:
            TypeError: They are no tensor of floats.
            ValueError: They have another shape, or a value is outside [0, 1] or NaN.
        """
        check_images(images)
        return self.quantizer.nearest(self.encode_vectors(images.float()))

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the images of codes.

        Args:
            codes: (B, h, w) int64, from 0 to K - 1.

        Returns:
            RGB floats (B, 3, H, W), clamped to [0, 1].

        Raises:
            TypeError: They are no tensor of integers.
            ValueError: They have another shape, or one is out of range (checked on a CPU).
        """
        check_codes(codes, self.config.num_codes)
        return self.decode_vectors(self.quantizer.lookup(codes)).clamp(0, 1)

    def encode_vectors(self, images: Tensor) -> Tensor:
        """Return the encoder's float32 outputs (B, h, w, D), normalized if the config requires it.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).

        Raises:
            ValueError: The shape is another, or a side is not divisible by ``downsampling``.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (batch, 3, height, width), got {tuple(images.shape)}")
        if images.shape[2] % self.downsampling or images.shape[3] % self.downsampling:
            raise ValueError(f"image sides must be divisible by {self.downsampling}, got {tuple(images.shape[2:])}")
        normalized = (images - self.mean) / self.std
        outputs = self.encoder(normalized.contiguous(memory_format=torch.channels_last))
        return self.quantizer.normalized(outputs.permute(0, 2, 3, 1).float())

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in about [0, 1] of code vectors (B, h, w, D)."""
        channels_first = vectors.permute(0, 3, 1, 2)  # a channels-last view, which convolutions keep
        images: Tensor = self.decoder(channels_first).float() * self.std + self.mean
        return images

    def forward(self, images: Tensor, *, quantize: bool = True) -> Reconstruction:
        """Encode, quantize with a straight-through gradient, and decode.

        Args:
            images: RGB in [0, 1], (B, 3, H, W).
            quantize: Quantize the encoder's outputs; without it the model is a plain autoencoder.

        Returns:
            Images, the encoder's vectors, codes and quantized vectors.
        """
        vectors = self.encode_vectors(images)
        if not quantize:
            codes = torch.zeros(vectors.shape[:3], dtype=torch.long, device=vectors.device)
            return Reconstruction(self.decode_vectors(vectors), vectors, codes, vectors.detach())
        codes = self.quantizer.nearest(vectors.detach())
        quantized = self.quantizer.lookup(codes)
        straight_through = vectors + (quantized - vectors).detach()
        return Reconstruction(self.decode_vectors(straight_through), vectors, codes, quantized)


def _released_networks(config: VQVAEConfig) -> tuple[nn.Module, nn.Module]:
    """Return the networks of CogView v1; layers keep the indices 0, 2, 4, 6 of the released weights."""
    first, second, third = config.channels
    encoder = nn.Sequential(
        nn.Conv2d(3, first, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(first, second, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(second, third, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(third, config.code_width, 1),
    )
    decoder = nn.Sequential(
        nn.ConvTranspose2d(config.code_width, third, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(third, second, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(second, first, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(first, 3, 1),
    )
    return encoder, decoder


def _residual_networks(config: VQVAEConfig) -> tuple[nn.Module, nn.Module]:
    """Return an encoder of a pixel-unshuffle and a stride-2 convolution per further scale, and its mirrored decoder."""
    channels, last = config.channels, len(config.channels) - 1
    encoder: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, channels[0], 3, padding=1)]
    for scale, width in enumerate(channels):
        if scale > 0:
            encoder.append(nn.Conv2d(channels[scale - 1], width, 2, 2))
        kernel = 1 if scale == last else 3  # 1x1 at the scale of the codes: no other patch has an effect
        encoder += [ResidualBlock(width, kernel) for _ in range(config.encoder_blocks[scale])]
    encoder += [ChannelNorm(channels[last]), nn.Conv2d(channels[last], config.code_width, 1)]

    decoder: list[nn.Module] = [nn.Conv2d(config.code_width, channels[last], 3, padding=1)]
    for scale in range(last, -1, -1):
        decoder += [ResidualBlock(channels[scale], 3) for _ in range(config.decoder_blocks[scale])]
        if scale > 0:
            decoder += [nn.Conv2d(channels[scale], 4 * channels[scale - 1], 1), nn.PixelShuffle(2)]
    decoder += [ChannelNorm(channels[0]), nn.SiLU(), nn.Conv2d(channels[0], 12, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each position of a (B, C, H, W) map.

    Unlike GroupNorm it does not mix positions, so other parts of the image cannot change a code.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized map, channels last in memory."""
        last = x.permute(0, 2, 3, 1)
        return F.layer_norm(last, last.shape[-1:], self.weight, self.bias).permute(0, 3, 1, 2).to(x.dtype)


class ResidualBlock(nn.Module):
    """Residual block x + conv(silu(conv(silu(norm(x))))), with ``kernel`` 1 or 3."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.first = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output in the shape of ``x``."""
        residual: Tensor = self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return x + residual
