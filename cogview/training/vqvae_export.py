"""A model folder with a tuned image decoder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from cogview.checkpoints.checkpoint import config_mapping, read_config
from cogview.checkpoints.image_tokenizer import codebook_hash, load_image_tokenizer
from cogview.data.image_dataset import ImageDataset, render
from cogview.errors import InputError
from cogview.evaluation.metrics import reconstruction_quality
from cogview.files import atomic_folder, write_json
from cogview.training.vqvae_images import VALIDATION_IMAGES
from cogview.vqvae.codec import reconstruct

CARD_NOTE = "\n\nThe image decoder was trained further by `cogview train-image`; encoder and codebook are unchanged.\n"


def copy_with_image_tokenizer(source: Path, image: Path, held_out: ImageDataset, target: Path) -> None:
    """Copy a model folder, with another image tokenizer of the same codebook in place of its own.

    Args:
        source: The model folder.
        image: Folder of the image tokenizer.
        held_out: Images that the quality of its reconstructions is measured on, for the config.
        target: The folder to write; an older one is replaced.

    Raises:
        InputError: The codebook is another, so the transformer's codes would have another meaning.
    """
    config, model = read_config(source), load_image_tokenizer(image)
    if codebook_hash(model) != config.codebook_sha256:
        raise InputError(f"{image} has another codebook than {source}, whose transformer was trained with its own")
    pixels = [render(held_out[number], held_out.side) for number in range(min(VALIDATION_IMAGES, len(held_out)))]
    restored = [reconstruct(model, each[None])[0] for each in pixels]
    with atomic_folder(target, overwrite=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        shutil.rmtree(folder / "image")
        shutil.copytree(image, folder / "image")
        quality = reconstruction_quality(pixels, restored)
        write_json(folder / "config.json", config_mapping(replace(config, reconstruction_psnr=quality)))
        if (card := folder / "README.md").is_file():
            card.write_text(card.read_text(encoding="utf-8").rstrip() + CARD_NOTE, encoding="utf-8")
