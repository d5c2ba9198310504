"""Initialization of a transformer from the weights of another model with another vocabulary or more positions."""

# P learned positions, D width
from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cogview.errors import InputError
from cogview.modeling.config import ModelConfig
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.text import TextTokenizer


class TextImageModel(Protocol):
    """Parts of a model that initialization reads and writes."""

    config: ModelConfig
    transformer: Transformer
    text_tokenizer: TextTokenizer


def load_weights(model: TextImageModel, source: TextImageModel, name: str) -> None:
    """Initialize the transformer of ``model`` in place from that of ``source``.

    Text tokens that both tokenizers have keep their embeddings. The embedding of a new text token is the mean over the
    tokens by which ``source`` encodes it. Image codes keep the embeddings of their indices, which is useful if the
    image tokenizer was trained further from that of ``source``. New positions follow ``continued_positions``.

    Args:
        model: Model to initialize.
        source: Model with the same layers and number of image codes; its tokenizers may differ.
        name: Name of ``source`` for error messages.

    Raises:
        InputError: The two models differ in layers, width, heads or number of image codes, or ``source`` has too few
            positions.
    """
    expected, found = (_shape(config) for config in (model.config, source.config))
    if expected != found:
        raise InputError(
            f"init_from: {name} has another shape than this recipe; expected {_described(expected)}, got "
            f"{_described(found)}"
        )
    weights = source.transformer.state_dict()
    source_embedding, embedding = weights["embedding.weight"], model.transformer.embedding.weight.detach().clone()
    source_ids, ids = source.config.vocabulary, model.config.vocabulary
    for target, origin in ((ids.image, source_ids.image), (ids.commands, source_ids.commands)):
        embedding[target.start : target.stop] = source_embedding[origin.start : origin.stop]
    index_of_piece = {piece: index for index, piece in enumerate(source.text_tokenizer.pieces)}
    for index, piece in enumerate(model.text_tokenizer.pieces):
        known = index_of_piece.get(piece)
        spelling = [known] if known is not None else source.text_tokenizer.encode(piece)
        embedding[ids.text[index]] = source_embedding[[source_ids.text[i] for i in spelling]].mean(dim=0)
    positions = continued_positions(
        weights["positions.weight"], model.config.transformer.max_positions, model.config.grid
    )
    model.transformer.load_state_dict({**weights, "embedding.weight": embedding, "positions.weight": positions})


def continued_positions(positions: Tensor, count: int, grid: int) -> Tensor:
    """Return the first ``count`` learned positions, extended where there are fewer.

    A new position copies the last existing position that lies a whole number of image rows before it. For an image
    code that is a code above it, in the same column.

    Args:
        positions: Learned positions (P, D).
        count: Number of positions to return.
        grid: Image codes per row.

    Returns:
        A new tensor (``count``, D) with the dtype and device of ``positions``.

    Raises:
        InputError: There is not even one row of positions to copy from.
    """
    num_existing = len(positions)
    rows_back = [max(0, -(-(index - num_existing + 1) // grid)) for index in range(count)]
    origins = [index - grid * rows for index, rows in enumerate(rows_back)]
    if min(origins, default=0) < 0:
        raise InputError(
            f"{num_existing} positions are too few to continue: expected at least {grid}, one row of image codes"
        )
    return positions[origins].clone()


def _shape(config: ModelConfig) -> tuple[int, int, int, int]:
    """Return what must be equal: layers, width, heads and image codes."""
    transformer = config.transformer
    return transformer.num_layers, transformer.width, transformer.num_heads, config.vocabulary.num_image_codes


def _described(shape: tuple[int, int, int, int]) -> str:
    return "{} layers of width {} with {} heads and {} image codes".format(*shape)
