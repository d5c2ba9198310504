"""Images of a model for captions of its own training and for held-out ones, beside the pictures of these captions."""

# H, W image in pixels, N images
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogview.data.store import NO_TOKEN, TokenStore
from cogview.evaluation.harness import generate_images
from cogview.evaluation.metrics import pixel_distances
from cogview.image_io.captioned_sheet import captioned_sheet
from cogview.modeling.config import Sampling
from cogview.pipeline.cogview import CogView
from cogview.vqvae.codec import to_uint8

SHEET_CAPTIONS = 12  # of each split, on the sheet
MAX_COMPARED = 1000  # training pictures that an image is compared with
DECODED_TOGETHER = 64
BATCH = 48  # captions


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionSamples:
    """Generated images of some captions.

    Attributes:
        captions: The captions.
        images: The generated images, uint8 (N, H, W, 3).
        originals: The pictures of the captions, decoded from their codes, alike.
    """

    captions: tuple[str, ...]
    images: np.ndarray
    originals: np.ndarray


def draw_samples(model: CogView, store: TokenStore, count: int, sampling: Sampling) -> CaptionSamples:
    """Generate an image for each of some captions of a store.

    Args:
        model: The model.
        store: The store, whose rows are taken at equal distances; of equal captions the first one is taken.
        count: Maximum number of captions.
        sampling: Sampling settings. Caption i has the seed i.
    """
    rows = np.unique(np.linspace(0, len(store) - 1, min(count, len(store))).astype(np.int64))
    content = store.read(rows)
    captions = [model.text_tokenizer.decode(text[text != NO_TOKEN].tolist()) for text in content["text"]]
    first = sorted({caption: index for index, caption in reversed(list(enumerate(captions)))}.values())
    chosen = [captions[index] for index in first]
    images = generate_images(model, chosen, 0, sampling, BATCH, "generating")
    return CaptionSamples(
        captions=tuple(chosen),
        images=np.stack(images),
        originals=decode_codes(model, content["image"][first], store.header.grid),
    )


def decode_codes(model: CogView, codes: np.ndarray, grid: int) -> np.ndarray:
    """Return the images of codes, uint8 (N, H, W, 3).

    Args:
        model: The model with the image tokenizer.
        codes: Codes (N, grid * grid).
        grid: Codes on a side.
    """
    tokenizer = model.image_tokenizer
    parts = []
    for start in range(0, len(codes), DECODED_TOGETHER):
        part = torch.from_numpy(codes[start : start + DECODED_TOGETHER].astype(np.int64)).reshape(-1, grid, grid)
        with torch.inference_mode():
            parts.append(to_uint8(tokenizer.decode(part.to(tokenizer.codebook.device))))
    return np.concatenate(parts)


def nearest_share(model: CogView, store: TokenStore, samples: CaptionSamples) -> tuple[float, int]:
    """Return the share of images that are nearest to a picture of their own caption among training pictures.

    Args:
        model: The model.
        store: The training store, of which ``MAX_COMPARED`` rows at equal distances are compared.
        samples: Images for captions of the store.

    Returns:
        The share, by the mean squared error of pixels, and the number of pictures that were compared.
    """
    rows = np.unique(np.linspace(0, len(store) - 1, min(MAX_COMPARED, len(store))).astype(np.int64))
    others = decode_codes(model, store.read(rows)["image"], store.header.grid)
    nearest = pixel_distances(list(samples.images), list(others)).min(axis=1)
    own = np.array(
        [
            pixel_distances([image], [original]).item()
            for image, original in zip(samples.images, samples.originals, strict=True)
        ]
    )
    return float((own <= nearest).mean()), len(others)


def sample_sheet(
    parts: Sequence[tuple[str, CaptionSamples]], on_note: Callable[[str], object]
) -> tuple[Image.Image, list[str]]:
    """Return a sheet of generated images, each beside the picture of its caption, and the lines of its captions.

    Args:
        parts: Samples, each with a word that is put before its captions.
        on_note: Called with a line about captions that no font can show.
    """
    groups: list[tuple[str, list[Image.Image]]] = []
    for word, samples in parts:
        for caption, image, original in zip(*_first(samples), strict=True):
            groups.append((f"{word}：{caption}", [Image.fromarray(image), Image.fromarray(original)]))
    return captioned_sheet(groups, on_note), [caption for caption, _ in groups]


def _first(samples: CaptionSamples) -> tuple[Any, Any, Any]:
    count = SHEET_CAPTIONS
    return samples.captions[:count], samples.images[:count], samples.originals[:count]
