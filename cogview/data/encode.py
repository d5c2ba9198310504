"""Scenes to token rows: drawn, encoded by the VQ-VAE, captioned, and stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cogview.checkpoints.image import codebook_hash
from cogview.config_files import to_plain
from cogview.data.emoji.scenes import World
from cogview.data.store import StoreHeader, StoreWriter, pad_text
from cogview.tokenizers.text import TextTokenizer
from cogview.vqvae.model import PIXELS_PER_CODE, VQVAE


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """The ``encode`` section of a recipe."""

    rows: int  # training scenes
    held_out_rows: int = 2048
    text_width: int = 48  # pieces in the longest caption
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "held_out_rows", "text_width", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def encode_scenes(
    path: Path,
    world: World,
    text_tokenizer: TextTokenizer,
    image_tokenizer: VQVAE,
    settings: EncodeSettings,
    *,
    rows: int,
    held_out: bool,
) -> None:
    """Write scenes 0 … ``rows`` - 1 to a store at ``path``; one that was interrupted is continued."""
    grid = world.settings.canvas // PIXELS_PER_CODE
    header = StoreHeader(
        fields={"text": settings.text_width, "image": grid * grid},
        grid=grid,
        num_image_codes=image_tokenizer.config.num_codes,
        num_text_pieces=text_tokenizer.size,
        layouts=("generate",),
        codebook_sha256=codebook_hash(image_tokenizer),
        text_sha256=hashlib.sha256(text_tokenizer.model_bytes).hexdigest(),
        provenance={"scenes": to_plain(world.settings), "seed": settings.seed, "held_out": held_out},
    )
    device = next(image_tokenizer.parameters()).device
    with (
        StoreWriter(path, header, resume=True) as writer,
        tqdm(total=rows, initial=writer.count, unit="scene", desc=path.name, disable=None) as bar,
    ):
        while writer.count < rows:
            numbers = range(writer.count, min(writer.count + settings.batch_size, rows))
            scenes = [world.sample(settings.seed, number, held_out=held_out) for number in numbers]
            captions = [world.caption(scene, number) for number, scene in zip(numbers, scenes, strict=True)]
            pixels = np.stack([world.render(scene, number) for number, scene in zip(numbers, scenes, strict=True)])
            images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
            codes = image_tokenizer.encode(images).flatten(1).cpu().numpy()
            text = pad_text([text_tokenizer.encode(caption) for caption in captions], settings.text_width)
            writer.append({"text": text, "image": codes})
            bar.update(len(numbers))
