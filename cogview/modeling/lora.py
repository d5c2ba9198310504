"""Low-rank adapters in a transformer: settings, injection, and the arithmetic of merging (LoRA, arXiv:2106.09685).

A projection W of a layer becomes W + scale * B A, with A (R, K) and B (N, R) of a small rank R. PEFT trains A and B.
For generation the product is merged into W, which needs no PEFT and adds no cost per token. The files of an adapter are
the concern of ``cogview.checkpoints.adapter``.
"""

# N outputs, K inputs, R rank, V ids, D width, M ids with rows of their own
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from cogview.errors import InputError
from cogview.modeling.config import PROJECTIONS
from cogview.modeling.transformer import Transformer

ROWS_PER_STEP = 1024  # rows of a weight that are merged at a time, which bounds the float32 copies
MAX_RANK = 65536
TOKEN_ROWS = "embedding.token_adapter.trainable_tokens_delta.default"  # PEFT's name; these are rows, not differences


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Rank, scale and target projections of an adapter.

    Attributes:
        rank: Rank R of the product B A, from 1 to ``MAX_RANK``.
        alpha: Numerator of ``scale``, above 0.
        dropout: Dropout rate on the inputs of A in training, in [0, 1).
        targets: Projections that are adapted in every layer; keys of ``PROJECTIONS``.
        words: Texts whose pieces, or bytes where there is no piece, get embeddings of their own.

    Raises:
        ValueError: A setting is outside its range, or a target is unknown.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(PROJECTIONS)
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank of an adapter must be at least 1, got {self.rank}")
        if self.rank > MAX_RANK:
            raise ValueError(f"the rank of an adapter must be at most {MAX_RANK}, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            raise ValueError(f"targets must name at least one of {', '.join(PROJECTIONS)}")
        for target in self.targets:
            if target not in PROJECTIONS:
                near = get_close_matches(target, PROJECTIONS, n=1)
                advice = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(PROJECTIONS)}"
                raise ValueError(f'the target "{target}" is unknown; {advice}')
        if not all(word.strip() for word in self.words):
            raise ValueError("words must not be empty: each is a text whose embeddings are learnt")

    @property
    def scale(self) -> float:
        """Factor of B A: alpha / R."""
        return self.alpha / self.rank


def add_lora(transformer: Transformer, settings: LoraSettings, token_ids: Sequence[int] = ()) -> None:
    """Inject trainable LoRA layers into ``transformer`` in place, and freeze all other parameters.

    The adapter changes nothing at first (B = 0); A is drawn from torch's global generator. Call this before the
    optimizer is built.

    Args:
        transformer: Model with floating-point weights and without LoRA layers.
        settings: Rank, scale, dropout and targets.
        token_ids: Ids whose embeddings are trained too.

    Raises:
        InputError: PEFT is missing, the weights are quantized, or LoRA layers are injected already.
    """
    peft = _import_peft()
    if has_adapter(transformer):
        raise InputError("the transformer has an adapter already: only one can be trained at a time")
    require_float_weights(transformer)
    transformer.cpu_layers = None  # they would bypass the LoRA layers
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        bias="none",
        trainable_token_indices={"embedding": sorted(token_ids)} if token_ids else None,
    )
    peft.inject_adapter_in_model(config, transformer)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(_is_trained(name))


def has_adapter(transformer: nn.Module) -> bool:
    """Return whether LoRA layers are injected; such a transformer must not be prepacked."""
    return any(".lora_" in name for name, _ in transformer.named_parameters())


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the injected A and B, and the trained rows of the embedding, by their parameter names."""
    return {name: parameter for name, parameter in transformer.named_parameters() if _is_trained(name)}


def trained_token_ids(transformer: Transformer) -> list[int]:
    """Return the ids whose embeddings are trained beside LoRA layers, in the order of ``TOKEN_ROWS``."""
    wrapped: Any = transformer.embedding  # PEFT replaces the module
    return list(wrapped.token_adapter.token_indices["default"]) if hasattr(wrapped, "token_adapter") else []


def _is_trained(name: str) -> bool:
    return ".lora_" in name or name == TOKEN_ROWS


@dataclass(frozen=True)
class RowChange:
    """A change of some rows of the embedding: ``factor`` * (``rows`` - the model's rows)."""

    ids: Tensor  # int64 (M,)
    rows_MD: Tensor
    factor: float


def embedding_with_rows(weight_VD: Tensor, changes: Sequence[RowChange]) -> Tensor:
    """Return an embedding with changes of rows added: they are summed in float32, and the sum is added once.

    Args:
        weight_VD: The embedding, of any floating-point dtype; it is not changed.
        changes: The changes, each of other rows or of the same.

    Returns:
        float32 (V, D), in memory of its own.
    """
    total_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
    for change in changes:
        ids, rows_MD = change.ids.to(weight_VD.device), change.rows_MD.to(weight_VD.device, torch.float32)
        total_VD.index_add_(0, ids, rows_MD - weight_VD[ids].float(), alpha=change.factor)
    return total_VD.add_(weight_VD)


@dataclass(frozen=True)
class LowRankChange:
    """A change of a projection: ``factor`` * B A, with A (R, K) and B (N, R)."""

    a_RK: Tensor
    b_NR: Tensor
    factor: float


def merged_weight(weight_NK: Tensor, changes: Sequence[LowRankChange]) -> Tensor:
    """Return a weight with changes added: they are summed in float32, and the sum is added once.

    Args:
        weight_NK: Weight of a projection, of any floating-point dtype; it is not changed.
        changes: The changes; a negative factor takes a merged adapter out again, up to rounding.

    Returns:
        float32 (N, K), in memory of its own.
    """
    merged_NK = torch.empty(weight_NK.shape, dtype=torch.float32, device=weight_NK.device)
    parts = [
        (change.a_RK.to(weight_NK.device, torch.float32), change.b_NR.to(weight_NK.device, torch.float32), change)
        for change in changes
    ]
    for start in range(0, len(weight_NK), ROWS_PER_STEP):
        rows = slice(start, start + ROWS_PER_STEP)
        total = torch.zeros_like(merged_NK[rows])
        for a_RK, b_NR, change in parts:
            total.addmm_(b_NR[rows], a_RK, alpha=change.factor)
        torch.add(weight_NK[rows].float(), total, out=merged_NK[rows])
    return merged_NK


def require_float_weights(transformer: Transformer) -> None:
    """Raise InputError for quantized weights, beside which no adapter can be trained."""
    if any(not tensor.is_floating_point() for tensor in transformer.state_dict().values()):
        raise InputError(
            "an adapter is trained beside float weights, and these are quantized: name the model they were made of"
        )


def require_peft() -> None:
    """Raise InputError unless PEFT is installed; it is not imported."""
    if find_spec("peft") is None:
        raise InputError("adapters are trained with PEFT, which is missing: pip install 'cogview[lora]'")


def _import_peft() -> Any:
    require_peft()
    import peft

    return peft
