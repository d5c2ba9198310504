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

SAMPLES_FILE = "samples.png"  # of the package, which the card shows
NO_SAMPLES = f"({SAMPLES_FILE} had images of the former decoder: it is left out.)"
CARD_NOTE = """## Image decoder

The image decoder was trained further by `cogview train-image`; encoder and codebook are unchanged.
All measurements below are of the former decoder. With this decoder, reconstructions of {count} held-out images have a
PSNR of {median:.2f} dB (median), 99% of them at least {p01:.2f} dB.
"""


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
        (folder / SAMPLES_FILE).unlink(missing_ok=True)  # images of the former decoder
        if (card := folder / "README.md").is_file():
            note = CARD_NOTE.format(count=len(pixels), median=quality.median, p01=quality.p01)
            card.write_text(_with_note(card.read_text(encoding="utf-8"), note), encoding="utf-8")


def _with_note(card: str, note: str) -> str:
    """Return a card with a note below its title, and without the samples of the former decoder."""
    kept = [NO_SAMPLES if f"({SAMPLES_FILE})" in line else line for line in card.splitlines()]
    title = next((number for number, line in enumerate(kept) if line.startswith("# ")), None)
    first = 0 if title is None else title + 1
    above, below = "\n".join(kept[:first]), "\n".join(kept[first:]).strip()
    return f"{above}\n\n{note}\n{below}\n".lstrip()
