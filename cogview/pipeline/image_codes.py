"""Images to codes and back, as many at a time as memory holds."""

# B images, G codes on a side of an image
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from cogview.errors import InputError
from cogview.image_io.reading import fit
from cogview.pipeline.context import PipelineContext
from cogview.pipeline.inputs import ImageLike, describe, load_image
from cogview.pipeline.results import GeneratedImage
from cogview.planning.batches import BatchPlanner
from cogview.planning.model_memory import image_bytes
from cogview.vqvae.codec import psnr, reconstruct, to_float, to_uint8


def encode_images(
    images: Sequence[ImageLike],
    side: int,
    context: PipelineContext,
    planner: BatchPlanner,
    on_note: Callable[[int, str], object] = lambda index, note: None,
) -> np.ndarray:
    """Return the codes of images.

    A ``GeneratedImage`` gives the codes that it was generated with, if they have the wanted size and codebook and its
    pixels are unchanged. Any other image is opened, fitted to that size (``image_io.reading.fit``) and encoded.

    Args:
        images: Images of any size and form.
        side: Codes on a side.
        context: The model.
        planner: Splits the images into batches that fit in memory.
        on_note: Called with the index of an image and how it was read, resized or cropped, for example "resized from
            128 x 128 to 64 x 64".

    Returns:
        (B, side, side) int64 codes.

    Raises:
        InputError: If an image cannot be used.
    """
    tokenizer, device = context.image_tokenizer, context.placement.device
    codes = np.empty((len(images), side, side), dtype=np.int64)
    fitted = []
    for index, image in enumerate(images):
        if isinstance(image, GeneratedImage):
            own = image.codes_of(context.config.codebook_sha256)
        else:
            own = getattr(image, "codes", None)
        if own is not None and own.shape == (side, side):
            codes[index] = own
            continue
        loaded = load_image(image, f"images[{index}]", partial(on_note, index))
        pixels, note = fit(loaded, side * tokenizer.downsampling, context.config.fit)
        fitted.append((index, pixels))
        if note is not None:
            on_note(index, note)

    def encode(batch: Sequence[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        images_B3HW = to_float(np.stack([pixels for _, pixels in batch]), device)
        with torch.inference_mode():
            return list(tokenizer.encode(images_B3HW).cpu().numpy())

    bytes_per_image = image_bytes(tokenizer.config, side, decoding=False)
    encoded = planner.run(fitted, partial(_total, bytes_per_image), encode, "encoding images")
    for (index, _), own in zip(fitted, encoded, strict=True):
        codes[index] = own
    return codes


def decode_images(codes: np.ndarray, context: PipelineContext) -> np.ndarray:
    """Return the uint8 RGB images of (B, G, G) codes, for any G: (B, H, W, 3).

    Args:
        codes: int64 codes (B, G, G).
        context: The model.
    """
    return to_uint8(context.image_tokenizer.decode(torch.from_numpy(codes).to(context.placement.device)))


def check_codes(codes: object, num_codes: int, name: str = "codes") -> np.ndarray:
    """Return image codes of any type as an int64 array.

    Args:
        codes: An array, a tensor or nested lists of integers.
        num_codes: Size of the codebook.
        name: Name of the argument, for messages.

    Raises:
        InputError: If they are no integers from 0 to ``num_codes`` - 1.
    """
    try:
        array = np.asarray(codes.cpu() if isinstance(codes, torch.Tensor) else codes)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} must be an array of integers from 0 to {num_codes - 1}, got {describe(codes)}")
    if array.size and not (array.min() >= 0 and array.max() < num_codes):
        wrong = array[(array < 0) | (array >= num_codes)].flat[0]
        raise InputError(f"{name} must be from 0 to {num_codes - 1}, the codes of the codebook, got {wrong}")
    return array.astype(np.int64, copy=False)


def reconstruction_warning(pixels_NHWC: np.ndarray, name: str, context: PipelineContext) -> str | None:
    """Return a line about an image that is unlike those of the training, or None.

    Args:
        pixels_NHWC: The image, or its tiles, as uint8 RGB pixels of the model's size.
        name: Name of the model.
        context: The model.
    """
    known = context.config.reconstruction_psnr
    if known is None or (found := psnr(pixels_NHWC, reconstruct(context.image_tokenizer, pixels_NHWC))) >= known.p01:
        return None
    return (
        f"unlike the images that {name} was trained on: its reconstruction has {found:.1f} dB, "
        f"99% of theirs at least {known.p01:.1f} dB"
    )


def decode_all_images(
    codes: Sequence[np.ndarray], context: PipelineContext, planner: BatchPlanner, free_bytes: float
) -> list[np.ndarray]:
    """Return the uint8 RGB images (H, W, 3) of (G, G) codes of any sides, in batches of one side that fit in memory.

    Args:
        codes: int64 codes (G, G) of each image.
        context: The model.
        planner: Splits the images into batches.
        free_bytes: Bytes that decoding may take.
    """
    images: dict[int, np.ndarray] = {}
    for side in dict.fromkeys(map(len, codes)):
        members = [index for index, own in enumerate(codes) if len(own) == side]
        bytes_per_image = image_bytes(context.image_tokenizer.config, side, decoding=True)
        decoded = planner.run(
            members,
            partial(_total, bytes_per_image),
            lambda batch: list(decode_images(np.stack([codes[index] for index in batch]), context)),
            "decoding pixels",
            free_bytes=free_bytes,
        )
        images |= zip(members, decoded, strict=True)
    return [images[index] for index in range(len(codes))]


def _total(bytes_each: int, items: Sequence[object]) -> int:
    """Return the bytes of items that take the same each."""
    return bytes_each * len(items)
