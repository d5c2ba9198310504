"""Images of 64 x 64 codes in one sequence, with window attention and without."""

import numpy as np
import pytest

from cogview.checkpoints.checkpoint import save_model
from cogview.modeling.config import AttentionConfig
from cogview.pipeline.cogview import CogView
from cogview.planning.inference import estimate_inference
from tests.factories import tiny_model, tiny_text_tokenizer

GRID = 64
WINDOW = AttentionConfig(pattern="window", window=100, pivots=50)


def long_model(attention):
    """Return a model with one thin layer whose images have 64 x 64 codes."""
    tokenizer = tiny_text_tokenizer(("一只狐狸", "红苹果"), 300, max_piece_length=1)
    shape = {"num_layers": 1, "width": 16, "max_positions": GRID**2 + 20, "attention": attention}
    return tiny_model(tokenizer, shape=shape, grid=GRID, tasks=("generate",), max_text=8)


def opened(attention, folder):
    """Return the saved and loaded model, as the pipeline uses it."""
    save_model(folder, long_model(attention))
    return CogView.from_pretrained(folder, device="cpu")


@pytest.mark.slow
def test_generate_makes_64_by_64_codes_in_one_sequence(tmp_path):
    model = opened(WINDOW, tmp_path / "long")
    assert model.config.transformer.attention == WINDOW
    estimate = estimate_inference(model.config, model.image_tokenizer.config, task="generate", rows=1)
    assert estimate.sequence_length == 3 + 8 + GRID**2
    (image,) = model.generate("红苹果", seed=1)
    assert image.size == (512, 512)
    assert np.asarray(image.codes).shape == (GRID, GRID)
    # The last rows again, from the first: the same keys are read, and the noise is that of the position.
    (completed,) = model.complete(image, "红苹果", rows=60, seed=1)
    assert np.array_equal(completed.codes, image.codes)


def test_generate_makes_64_by_64_codes_with_dense_attention(tmp_path):
    model = opened(AttentionConfig(), tmp_path / "long")
    codes = np.random.default_rng(0).integers(0, 512, (1, GRID, GRID))
    (image,) = model.complete(model.decode_images(codes)[0], "红苹果", rows=62, seed=1)
    assert np.asarray(image.codes).shape == (GRID, GRID)
