"""Activation checkpointing of a layer: what is kept for the backward pass, and what is recomputed."""

# B batch, T positions, D width
from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Activations of a layer that are kept for the backward pass: all; the results of matrix products and attention, since
# the rest is cheap to recompute; or the input alone, from which the whole layer is recomputed.
Checkpointing = Literal["none", "selective", "full"]

# Parts of operator names: matrix products, a linear layer that is one operator, attention's reference and fused forms.
_PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten.linear.", "mkldnn", "scaled_dot_product")


def run_layer(layer: nn.Module, checkpointing: Checkpointing, x_BTD: Tensor, *others: Any) -> Tensor:
    """Return the output of a layer, with activation checkpointing where gradients are recorded.

    Args:
        layer: The layer.
        checkpointing: What is kept for the backward pass.
        x_BTD: Input of the layer.
        *others: Its other arguments.
    """
    result: Tensor
    if checkpointing == "none" or not torch.is_grad_enabled():
        result = layer(x_BTD, *others)
    elif checkpointing == "full":
        result = checkpoint(layer, x_BTD, *others, use_reentrant=False)
    else:
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        result = checkpoint(layer, x_BTD, *others, use_reentrant=False, context_fn=contexts)
    return result


def _keep_products(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """Save the results of matrix products and of fused attention, and recompute everything else."""
    name = str(operation)
    kept = any(product in name for product in _PRODUCTS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
