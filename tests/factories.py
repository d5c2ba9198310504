"""Small vocabularies, sequences, requests and models that several tests build.

Weights are random and depend on the seed alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.checkpoints.checkpoint import Model
from cogview.checkpoints.image_tokenizer import codebook_hash
from cogview.errors import InputError
from cogview.generation.requests import DecodingRequest
from cogview.modeling.config import ModelConfig, Sampling, TransformerConfig
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.vqvae.model import VQVAE, VQVAEConfig

VOCABULARY = Vocabulary(num_image_codes=64, num_text_pieces=37)
TABLE = layouts(8)
SAMPLING = Sampling(temperature=1.2, top_k=20, top_p=0.95)
SHORT, LONG = [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]  # text tokens
TINY_VQVAE = VQVAEConfig(channels=(8, 8, 16), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1), code_width=4)


@functools.cache
def tiny_text_tokenizer(captions: tuple[str, ...], size: int, **settings: Any) -> TextTokenizer:
    """Return a text tokenizer trained on ``captions``, with at most ``size`` pieces."""
    return TextTokenizer(train_text_tokenizer(captions, size=size, **settings))


def tiny_transformer_config(vocabulary: Vocabulary, **changes: Any) -> TransformerConfig:
    """Return a shape of 2 layers, width 32, 2 heads and 96 positions without dropout, with ``changes``."""
    shape = {"num_layers": 2, "width": 32, "num_heads": 2, "max_positions": 96, "dropout": 0.0, **changes}
    return TransformerConfig(vocabulary_size=vocabulary.padded_size, **shape)


def tiny_model(
    text_tokenizer: TextTokenizer,
    *,
    vqvae: VQVAEConfig = TINY_VQVAE,
    shape: dict[str, Any] | None = None,
    seed: int = 0,
    vqvae_seed: int | None = None,
    things: Sequence[Any] = (),
    card: str = "",
    **config: Any,
) -> Model:
    """Return a whole model with random weights: 8 x 8 codes and all four tasks.

    Args:
        text_tokenizer: Its size determines the vocabulary.
        vqvae: Shape of the image tokenizer; its number of codes determines the vocabulary.
        shape: Changes to the shape of the transformer (`tiny_transformer_config`).
        seed: Seed of the transformer, and of the image tokenizer without ``vqvae_seed``.
        vqvae_seed: Seed of the image tokenizer, for models of several seeds that share one.
        things: Objects that the model can draw.
        card: Text of the model card.
        config: Changes to the `ModelConfig`.
    """
    vocabulary = Vocabulary(num_image_codes=vqvae.num_codes, num_text_pieces=text_tokenizer.size)
    transformer_config = tiny_transformer_config(vocabulary, **(shape or {}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = Transformer(transformer_config)
        if vqvae_seed is not None:
            torch.manual_seed(vqvae_seed)
        image_tokenizer = VQVAE(vqvae)
    settings = {
        "grid": 8,
        "tasks": ("generate", "caption", "upscale", "low_level"),
        "codebook_sha256": codebook_hash(image_tokenizer),
        **config,
    }
    return Model(
        config=ModelConfig(transformer=transformer_config, vocabulary=vocabulary, **settings),
        transformer=transformer,
        image_tokenizer=image_tokenizer,
        text_tokenizer=text_tokenizer,
        things=tuple(things),
        card=card,
    )


def random_transformer(width: int = 32, **changes: Any) -> Transformer:
    """Return a transformer whose weights are well above those of a fresh one: a wrong context samples other ids.

    The embedding is smaller: tied to the output, it would make the model repeat the last id.
    """
    generator = torch.Generator().manual_seed(0)
    transformer = Transformer(tiny_transformer_config(VOCABULARY, width=width, num_heads=4, **changes)).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * noise if parameter.dim() == 2 else parameter + 0.1 * noise)
        transformer.embedding.weight.mul_(0.5)
    return transformer


def generate_sequence(text, image=None):
    """Return a sequence of the task ``generate``; ``image`` gives known codes, None where blank."""
    return TABLE["generate"].arrange(VOCABULARY, text=text, **({} if image is None else {"image": image}))


def upscale_sequence(text, seed=0):
    """Return a window of upscaling whose first rows are known, and single codes scattered over the rest."""
    generator = np.random.default_rng(seed)
    known = generator.random(64) < 0.3
    known[:16] = True
    image = np.ma.masked_array(generator.integers(0, 64, 64), mask=~known)
    return TABLE["upscale"].arrange(VOCABULARY, text=text, small=generator.integers(0, 64, 16), image=image)


def caption_sequence(seed=0, max_text=6):
    """Return a sequence of the task ``caption`` for a random image."""
    image = np.random.default_rng(seed).integers(0, 64, 64)
    return TABLE["caption"].arrange(VOCABULARY, image=image, max_text=max_text)


def request_for(sequence, seed, image=0, sampling=SAMPLING, **rest):
    """Return a decoding request."""
    return DecodingRequest(sequence=sequence, seed=seed, image=image, sampling=sampling, **rest)


def codes_of(result, sequence):
    """Return the image codes of a result."""
    return result.ids[sequence.spans["image"]].tolist()


def text_ids_of(result, sequence):
    """Return the text ids of a result, padding included."""
    return result.ids[sequence.spans["text"]].tolist()


def assert_on_sheet(sheet: str | Path, files: Sequence[str | Path], factor: int = 3) -> None:
    """Assert that a contact sheet shows images, each side enlarged by ``factor``."""
    page_HWC = np.asarray(Image.open(sheet))
    for file in files:
        tile_HWC = np.asarray(Image.open(file)).repeat(factor, axis=0).repeat(factor, axis=1)
        height, width, _ = tile_HWC.shape
        corners = page_HWC[: 1 - height, : 1 - width], page_HWC[height - 1 :, width - 1 :]
        fits = [(part == tile_HWC[end, end]).all(axis=-1) for part, end in zip(corners, (0, -1), strict=True)]
        tops, lefts = np.nonzero(fits[0] & fits[1])
        assert any(
            np.array_equal(page_HWC[top : top + height, left : left + width], tile_HWC)
            for top, left in zip(tops, lefts, strict=True)
        ), f"{file} is not on {sheet}"


def input_error(function: Callable[..., object], *arguments: Any, **settings: Any) -> str:
    """Return the message of the ``InputError`` that a call must raise, which is one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message
