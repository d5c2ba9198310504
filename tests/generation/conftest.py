"""Fixtures of the decoding tests: a transformer, one that ends its texts, and a record of forward passes."""

import pytest
import torch

from cogview.modeling.transformer import Transformer
from tests.factories import VOCABULARY, random_transformer


@pytest.fixture(scope="session")
def transformer():
    """A random transformer; tests must not change it."""
    return random_transformer()


@pytest.fixture
def stopping_transformer(transformer):
    """A transformer that often ends a text: [SEP] has the sum of the embeddings of two text tokens."""
    stopping = Transformer(transformer.config).eval()
    stopping.load_state_dict(transformer.state_dict())
    with torch.no_grad():
        pieces = stopping.embedding.weight[VOCABULARY.text.start : VOCABULARY.text.start + 2]
        stopping.embedding.weight[VOCABULARY.command("[SEP]")] = pieces.sum(dim=0)
    return stopping


@pytest.fixture
def forwards(transformer, monkeypatch):
    """The shapes (rows, columns) of all forward passes."""
    shapes, hidden = [], transformer.hidden

    def recorded(ids, *rest, **named):
        shapes.append(tuple(ids.shape))
        return hidden(ids, *rest, **named)

    monkeypatch.setattr(transformer, "hidden", recorded)
    return shapes
