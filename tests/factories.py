"""Small vocabularies, sequences, requests and transformers that several tests build."""

import numpy as np
import torch

from cogview.generation.requests import DecodingRequest
from cogview.modeling.config import Sampling, TransformerConfig
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.layouts import layouts
from cogview.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_image_codes=64, num_text_pieces=37)
TABLE = layouts(8)
SAMPLING = Sampling(temperature=1.2, top_k=20, top_p=0.95)
SHORT, LONG = [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]  # text tokens


def random_transformer(width: int = 32) -> Transformer:
    """Return a transformer whose weights are well above those of a fresh one: a wrong context samples other ids.

    The embedding is smaller: tied to the output, it would make the model repeat the last id.
    """
    generator = torch.Generator().manual_seed(0)
    config = TransformerConfig(
        num_layers=2, width=width, num_heads=4, vocabulary_size=VOCABULARY.padded_size, max_positions=96
    )
    transformer = Transformer(config).eval()
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
