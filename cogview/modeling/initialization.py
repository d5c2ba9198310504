"""Initialization of a transformer from the weights of another model.

The other model may have another vocabulary, fewer positions, and a width of which the new one is a multiple.
"""

# P learned positions, D width
from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from cogview.errors import InputError
from cogview.modeling.config import PROJECTIONS, ModelConfig
from cogview.modeling.transformer import Transformer
from cogview.tokenizers.text import TextTokenizer

WIDENING_NOISE = 0.5  # standard deviation of what tells copies apart, over that of their weights


class TextImageModel(Protocol):
    """Parts of a model that initialization reads and writes."""

    config: ModelConfig
    transformer: Transformer
    text_tokenizer: TextTokenizer


def load_weights(model: TextImageModel, source: TextImageModel, name: str) -> None:
    """Initialize the transformer of ``model`` in place from that of ``source``.

    Text tokens that both tokenizers have keep their embeddings. The embedding of a new text token is the mean over the
    tokens by which ``source`` encodes it. Image codes keep the embeddings of their indices, which is useful if the
    image tokenizer was trained further from that of ``source``. New positions follow ``continued_positions``. A wider
    model computes the same function (``widened``).

    Args:
        model: Model to initialize.
        source: Model with the same layers and number of image codes; its tokenizers may differ, and its width and
            heads may be those of ``model`` divided by the same number.
        name: Name of ``source`` for error messages.

    Raises:
        InputError: The two models differ in layers, width, heads or number of image codes, or ``source`` has too few
            positions.
    """
    copies = max(1, model.config.transformer.width // source.config.transformer.width)
    expected, found = (_shape(config) for config in (model.config, source.config))
    layers, width, heads, codes = found
    if expected != (layers, copies * width, copies * heads, codes):
        raise InputError(
            f"init_from: {name} has another shape than this recipe; expected {_described(expected)}, or the same with "
            f"a fraction of width and heads, got {_described(found)}"
        )
    weights = source.transformer.state_dict()
    if copies > 1:
        weights = widened(weights, copies, torch.Generator().manual_seed(0))
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


def widened(weights: Mapping[str, Tensor], copies: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the weights of a transformer whose channels and heads are copies of those of a narrower one.

    It computes the same logits, up to rounding (Net2WiderNet, arXiv:1511.05641): every channel has the same value in
    each copy, a projection divides its weights among the copies of its inputs, and the last norm divides the logits,
    which sum over all copies. The weights of copies differ by noise that sums to 0, so that training uses them all.

    Args:
        weights: State of the narrower transformer, as of ``Transformer.state_dict``.
        copies: Number of copies, at least 2.
        generator: Source of the noise, on a CPU.
    """
    wide: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        part, kind = name.removesuffix(".weight"), name.rpartition(".")[2]
        projection = next((one for one in PROJECTIONS if part.endswith(f".{one}")), "")
        if projection and kind == "weight":
            wide[name] = _widened_projection(tensor, projection, copies, generator)
        elif name.endswith("query_key_value.bias"):
            wide[name] = tensor.view(3, -1).repeat(1, copies).flatten()
        else:
            wide[name] = tensor.repeat(*(1,) * (tensor.dim() - 1), copies)
    for kind in ("weight", "bias"):
        wide[f"final_norm.{kind}"] = wide[f"final_norm.{kind}"] / copies
    return wide


def _widened_projection(weight: Tensor, projection: str, copies: int, generator: torch.Generator) -> Tensor:
    """Return the weight (copies * outputs, copies * inputs) of a wider projection; see ``widened``."""
    noise = torch.randn(copies, copies, *weight.shape, generator=generator, dtype=torch.float32)
    noise = (noise - noise.mean(dim=1, keepdim=True)).to(weight) * (WIDENING_NOISE / copies) * weight.std()
    rows = weight / copies + noise  # (output copies, input copies, outputs, inputs)
    if projection == "attention.query_key_value":  # thirds of queries, keys and values
        thirds = rows.view(copies, copies, 3, -1, weight.shape[1])
        return thirds.permute(2, 0, 3, 1, 4).reshape(copies * weight.shape[0], -1)
    return rows.permute(0, 2, 1, 3).reshape(copies * weight.shape[0], -1)


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
