"""Initialization from another model: positions, and shapes that do not match."""

import re
from types import SimpleNamespace

import pytest
import torch

from cogview.errors import InputError
from cogview.modeling.config import ModelConfig, TransformerConfig
from cogview.modeling.initialization import continued_positions, load_weights
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_image_codes=16, num_text_pieces=4)


class Pieces:
    """Stand-in for a text tokenizer: its pieces are single characters."""

    def __init__(self, pieces):
        self.pieces = list(pieces)

    def encode(self, text):
        return [self.pieces.index(character) for character in text]


def model_of(pieces, max_positions=80, width=8, num_layers=1, num_heads=2):
    transformer = TransformerConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        vocabulary_size=VOCABULARY.padded_size,
        max_positions=max_positions,
    )
    config = ModelConfig(transformer=transformer, vocabulary=VOCABULARY, grid=8, tasks=("generate",), max_text=8)
    return SimpleNamespace(config=config, transformer=Transformer(transformer), text_tokenizer=Pieces(pieces))


def test_continued_positions_keeps_the_first_ones_when_fewer_are_wanted():
    positions = torch.randn(8, 2)
    found = continued_positions(positions, 5, grid=4)
    assert torch.equal(found, positions[:5])
    assert found.data_ptr() != positions.data_ptr()


def test_continued_positions_copies_the_code_above_when_more_are_wanted():
    positions = torch.arange(6.0).unsqueeze(1)
    assert continued_positions(positions, 12, grid=4).flatten().tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3]


def test_continued_positions_names_the_row_when_there_is_less_than_one():
    with pytest.raises(InputError, match="3 positions are too few to continue: expected at least 4, one row"):
        continued_positions(torch.zeros(3, 2), 8, grid=4)


def test_load_weights_keeps_known_pieces_and_averages_the_spelling_of_new_ones():
    """狐狸 is one piece here and two in the source: its embedding is the mean of the two."""
    source, model = model_of(["狐", "狸", "红", "色"]), model_of(["红", "狐狸", "狐", "狸"], max_positions=90)
    load_weights(model, source, "source")
    before, after = source.transformer.embedding.weight, model.transformer.embedding.weight
    first = VOCABULARY.text.start
    assert torch.equal(after[first], before[first + 2])
    assert torch.equal(after[first + 1], before[first : first + 2].mean(dim=0))
    assert torch.equal(after[: VOCABULARY.text.start], before[: VOCABULARY.text.start])
    assert torch.equal(model.transformer.positions.weight[80], source.transformer.positions.weight[72])
    assert torch.equal(model.transformer.layers[0].mlp.input.weight, source.transformer.layers[0].mlp.input.weight)


def test_load_weights_gives_both_shapes_when_they_differ():
    model, source = model_of("红狐狸色"), model_of("红狐狸色", width=16)
    message = (
        "init_from: my-model has another shape than this recipe; expected 1 layers of width 8 with 2 heads and 16 "
        "image codes, or the same with a fraction of width and heads, got 1 layers of width 16 with 2 heads and 16 "
        "image codes"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_weights(model, source, "my-model")


@pytest.mark.parametrize("copies", [2, 3])
def test_load_weights_of_a_narrower_model_keeps_its_function(copies):
    torch.manual_seed(0)
    source = model_of("红狐狸色", width=16, num_layers=2)
    with torch.no_grad():
        for parameter in source.transformer.parameters():  # every bias and gain counts
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model = model_of("红狐狸色", width=16 * copies, num_layers=2, num_heads=2 * copies)
    load_weights(model, source, "source")
    ids = torch.randint(0, VOCABULARY.size, (3, 20))  # padding has no embedding that matters
    with torch.no_grad():
        expected, found = (one.transformer.eval()(ids)[..., : VOCABULARY.size] for one in (source, model))
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    model.transformer(ids).square().mean().backward()
    gradient = model.transformer.layers[1].mlp.input.weight.grad
    assert not torch.allclose(gradient[:64], gradient[64:128], rtol=0.1)


def test_load_weights_refuses_a_wider_model():
    with pytest.raises(InputError, match="has another shape than this recipe"):
        load_weights(model_of("红狐狸色", width=8), model_of("红狐狸色", width=16, num_heads=4), "wide")
