"""Cross-entropy fused with the output embedding: the logits of all positions and ids never exist at the same time.

A position competes only against the ids of its kind, so that most rows of the embedding are never multiplied with it.
Positions are processed in chunks, whose gradients are computed while their logits exist (as in Liger Kernel,
arXiv:2410.10989, section 3.2). That takes the three products of autograd, and stores the gradients of the inputs
instead of logits.
"""

# N positions, M positions of one kind, C positions of a chunk, D width, V rows of the embedding, I candidate ids
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cogview.kernels.dispatch import select_backend
from cogview.kernels.native_training import NATIVE_DTYPES, losses_in_place_native, runs_native_training

# Bytes of the logits of a chunk. Small chunks would stay in the cache of a CPU, but each one reads and writes the
# gradient of all candidate rows: about 24 MiB are fastest. On a GPU a chunk must occupy the device.
CHUNK_BYTES = {"cpu": 24 * 2**20}
CHUNK_BYTES_GPU = 64 * 2**20
ALIGNED = 16  # rows of logits are padded to a multiple of this, for products and loads of half precision
# Largest sum of the weights of a chunk in half precision. If it is larger, float16 overflows in the gradient of a row,
# which is a sum over the chunk; if it is smaller, weighted probabilities underflow.
HALF_WEIGHTS = 256.0

# (logits_MI, targets_M, weights_M, write) -> losses_M; see ``losses_in_place_torch``.
LossesInPlace = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True, eq=False)
class LossTargets:
    """Targets of one kind.

    Attributes:
        ids: Candidate ids: rows of the embedding.
        positions_M: Rows of the hidden states, int64.
        targets_M: Correct ids, all in ``ids``, int64.
        weights_M: Weight of each loss, float32; constants.
    """

    ids: range
    positions_M: Tensor
    targets_M: Tensor
    weights_M: Tensor


def fused_linear_cross_entropy_reference(
    hidden_ND: Tensor, embedding_VD: Tensor, targets: Sequence[LossTargets]
) -> tuple[Tensor, list[Tensor]]:
    """Compute ``fused_linear_cross_entropy`` from the logits of all ids at all positions.

    The loss of a position is -log softmax(h E^T) at its target, with -inf for ids that are no candidates.

    Args:
        hidden_ND: Hidden states (N, D).
        embedding_VD: The embedding (V, D).
        targets: Targets by kind.

    Returns:
        The weighted sum of all losses, and the losses (M,) of each kind.
    """
    _check(hidden_ND, embedding_VD, targets)
    logits_NV = F.linear(hidden_ND, embedding_VD)
    logits_NV = logits_NV.to(_precise(logits_NV.dtype))
    total, losses = logits_NV.new_zeros(()), []
    for target in targets:
        outside_V = torch.ones(len(embedding_VD), dtype=torch.bool, device=embedding_VD.device)
        outside_V[target.ids.start : target.ids.stop] = False
        logits_MV = logits_NV[target.positions_M].masked_fill(outside_V, -torch.inf)
        losses_M = F.cross_entropy(logits_MV, target.targets_M, reduction="none")
        total = total + (losses_M * target.weights_M.detach()).sum()
        losses.append(losses_M.detach())
    return total, losses


def fused_linear_cross_entropy(
    hidden_ND: Tensor, embedding_VD: Tensor, targets: Sequence[LossTargets]
) -> tuple[Tensor, list[Tensor]]:
    """Compute the cross-entropy of several kinds of targets without storing all logits.

    Gradients are computed here and only scaled in the backward pass, which can therefore run once: a second one raises
    PyTorch's error about a modified tensor. ``COGVIEW_KERNELS=reference|torch|triton`` forces an implementation.

    Args:
        hidden_ND: Hidden states, multiplied in their dtype or that of autocast.
        embedding_VD: Output embedding.
        targets: Targets of each kind; a position may be in several.

    Returns:
        The weighted sum of all losses, differentiable, and the unweighted losses (M,) of each of ``targets``, detached;
        float32, or float64 if the inputs are.

    Raises:
        ValueError: The inputs do not fit together. On a GPU ids and positions are not checked, which would synchronize.
    """
    name = select_backend(
        "fused_linear_cross_entropy", hidden_ND.device.type, available=("reference", "torch", "triton")
    )
    if name == "reference":
        return fused_linear_cross_entropy_reference(hidden_ND, embedding_VD, targets)
    _check(hidden_ND, embedding_VD, targets)
    in_place: LossesInPlace = losses_in_place_torch
    if name == "triton":
        from cogview.kernels.fused_linear_cross_entropy_triton import losses_in_place

        in_place = losses_in_place
    elif _product_dtype(hidden_ND, embedding_VD) in NATIVE_DTYPES and runs_native_training(hidden_ND):
        in_place = losses_in_place_native
    learn = torch.is_grad_enabled()
    total, *losses = _FusedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, embedding_VD, targets, in_place, learn
    )
    return total, losses


def losses_in_place_torch(logits_MI: Tensor, targets_M: Tensor, weights_M: Tensor, write: bool) -> Tensor:
    """Compute the cross-entropy of a chunk of logits, and optionally its gradient in place.

    Args:
        logits_MI: Logits of the candidates; with ``write`` overwritten by the gradient of weight * loss.
        targets_M: Indices of the correct ids among the I candidates, int64.
        weights_M: Weight of each loss.
        write: Whether to compute the gradient.

    Returns:
        Cross-entropy (M,), float32, or float64 for float64 logits.
    """
    log_probs_MI = logits_MI.log_softmax(dim=1, dtype=_precise(logits_MI.dtype))
    target_M1 = targets_M.unsqueeze(1)
    losses_M1 = -log_probs_MI.gather(1, target_M1)
    if write:
        # p, and p - 1 at the target; small values are exact, and rounded to half precision last.
        gradient_MI = log_probs_MI.exp_().scatter_(1, target_M1, torch.expm1(-losses_M1))
        torch.mul(gradient_MI, weights_M.unsqueeze(1), out=logits_MI)
    return losses_M1.squeeze(1)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Losses and the needed gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        embedding_VD: Tensor,
        targets: Sequence[LossTargets],
        in_place: LossesInPlace,
        learn: bool,
    ) -> tuple[Tensor, ...]:
        # An input may require a gradient while gradients are not recorded.
        needed = [learn and asks for asks in ctx.needs_input_grad[:2]]
        dtype = _product_dtype(hidden_ND, embedding_VD)
        precise = _precise(dtype)
        gradients = [
            torch.zeros_like(of, dtype=precise, memory_format=torch.contiguous_format) if asked else None
            for of, asked in zip((hidden_ND, embedding_VD), needed, strict=True)
        ]
        total, found = hidden_ND.new_zeros((), dtype=precise), dict[int, Tensor]()
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for numbers in _with_equal_ids(targets, dtype):
                kinds = [targets[number] for number in numbers]
                losses_M = _kind_losses(hidden_ND, embedding_VD, _joined(kinds), in_place, dtype, *gradients)
                parts = losses_M.split([len(kind.positions_M) for kind in kinds])
                for number, kind, part_M in zip(numbers, kinds, parts, strict=True):
                    total += (part_M * kind.weights_M).sum()
                    found[number] = part_M
        losses = [found[number] for number in range(len(targets))]
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_ND.dtype, embedding_VD.dtype
        ctx.mark_non_differentiable(*losses)
        return total, *losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the forward pass in place, since a copy of that of the embedding would be large."""
        is_one = d_total.device.type == "cpu" and d_total.item() == 1  # on a GPU the question would wait
        gradients: list[Tensor | None] = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is not None and is_one:
                torch.autograd.graph.increment_version(gradient)  # the gradient is given away all the same
            elif gradient is not None:
                gradient.mul_(d_total)
            gradients.append(None if gradient is None else gradient.to(dtype))
        return *gradients, None, None, None


def _with_equal_ids(targets: Sequence[LossTargets], dtype: torch.dtype) -> list[list[int]]:
    """Return the numbers of the kinds that compete among the same ids, for one product each.

    In float16 a common unit of weights could let the smaller ones underflow: there every kind stays alone.
    """
    groups: dict[object, list[int]] = {}
    for number, target in enumerate(targets):
        if len(target.positions_M):
            groups.setdefault(number if dtype == torch.float16 else target.ids, []).append(number)
        else:
            groups[number] = [number]
    return list(groups.values())


def _joined(kinds: Sequence[LossTargets]) -> LossTargets:
    """Return the targets of several kinds with the same ids as one kind."""
    if len(kinds) == 1:
        return kinds[0]
    return LossTargets(
        ids=kinds[0].ids,
        positions_M=torch.cat([kind.positions_M for kind in kinds]),
        targets_M=torch.cat([kind.targets_M for kind in kinds]),
        weights_M=torch.cat([kind.weights_M for kind in kinds]),
    )


def _kind_losses(
    hidden_ND: Tensor,
    embedding_VD: Tensor,
    target: LossTargets,
    in_place: LossesInPlace,
    dtype: torch.dtype,
    d_hidden_ND: Tensor | None,
    d_embedding_VD: Tensor | None,
) -> Tensor:
    """Return the losses (M,) of one kind of target, and add their gradients in place where tensors are given."""
    if not len(target.positions_M):
        return torch.empty(0, dtype=_precise(dtype), device=hidden_ND.device)
    chosen = slice(target.ids.start, target.ids.stop)
    rows_ID = embedding_VD[chosen].to(dtype)
    losses_M = torch.empty(len(target.positions_M), dtype=_precise(dtype), device=hidden_ND.device)
    targets_M, weights_M = target.targets_M - target.ids.start, target.weights_M.to(losses_M.dtype)
    size = _chunk_size(len(target.positions_M), len(target.ids), rows_ID)
    half = dtype.itemsize == 2
    if half:
        # No loss scale acts before the backward pass: weights of 1 / N would underflow in float16.
        unit = (weights_M.abs().amax() * (size / HALF_WEIGHTS)).clamp_(min=torch.finfo(torch.float32).tiny)
        weights_M = weights_M / unit
    write = d_hidden_ND is not None or d_embedding_VD is not None
    padded = -(-len(target.ids) // ALIGNED) * ALIGNED
    # PyTorch's bfloat16 product on a CPU multiplies some elements after a row by zero: they must be finite.
    padded_CI = rows_ID.new_empty(size, padded)
    padded_CI[:, len(target.ids) :] = 0
    buffer_CI = padded_CI[:, : len(target.ids)]
    for first in range(0, len(target.positions_M), size):
        chunk = slice(first, first + size)
        positions_C = target.positions_M[chunk]
        hidden_CD = hidden_ND[positions_C].to(dtype)
        logits_CI = torch.mm(hidden_CD, rows_ID.T, out=buffer_CI[: len(positions_C)])
        losses_M[chunk] = in_place(logits_CI, targets_M[chunk], weights_M[chunk], write)
        if d_hidden_ND is not None:
            d_hidden_CD = torch.mm(logits_CI, rows_ID).to(d_hidden_ND.dtype)
            if half:
                d_hidden_CD *= unit
            # Unlike index_add_, deterministic on a GPU.
            d_hidden_ND.index_put_((positions_C,), d_hidden_CD, accumulate=True)
        if d_embedding_VD is not None:
            if half:
                d_embedding_VD[chosen].addcmul_(torch.mm(logits_CI.T, hidden_CD), unit)
            else:
                d_embedding_VD[chosen].addmm_(logits_CI.T, hidden_CD)
    return losses_M


def _chunk_size(num_positions: int, num_ids: int, rows_ID: Tensor) -> int:
    """Return the positions of a chunk, for equal chunks whose logits take about ``CHUNK_BYTES``."""
    largest = CHUNK_BYTES.get(rows_ID.device.type, CHUNK_BYTES_GPU) // (num_ids * rows_ID.element_size())
    num_chunks = -(-num_positions // max(largest, 1))
    return -(-num_positions // num_chunks)


def _product_dtype(hidden_ND: Tensor, embedding_VD: Tensor) -> torch.dtype:
    """Return the dtype in which ``F.linear`` would multiply; autocast ignores float64."""
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden_ND.dtype


def _precise(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, losses and gradients."""
    return torch.promote_types(dtype, torch.float32)


def _check(hidden_ND: Tensor, embedding_VD: Tensor, targets: Sequence[LossTargets]) -> None:
    """Raise ValueError for inputs that do not fit together, before anything is computed."""
    for name, matrix in (("hidden_ND", hidden_ND), ("embedding_VD", embedding_VD)):
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise ValueError(f"{name} must be a matrix of floats, got {matrix.dtype} {tuple(matrix.shape)}")
    if embedding_VD.shape[1] != hidden_ND.shape[1] or embedding_VD.device != hidden_ND.device:
        raise ValueError(
            f"embedding_VD must be of width {hidden_ND.shape[1]} on {hidden_ND.device} as hidden_ND is, "
            f"got {embedding_VD.shape[1]} on {embedding_VD.device}"
        )
    doubles = torch.float64 in (hidden_ND.dtype, embedding_VD.dtype)
    casts = torch.is_autocast_enabled(hidden_ND.device.type) and not doubles
    if embedding_VD.dtype != hidden_ND.dtype and not casts:
        raise ValueError(f"embedding_VD must be {hidden_ND.dtype} as hidden_ND is, got {embedding_VD.dtype}")
    for number, target in enumerate(targets):
        _check_targets(f"targets[{number}]", target, hidden_ND, len(embedding_VD))


def _check_targets(name: str, target: LossTargets, hidden_ND: Tensor, num_rows: int) -> None:
    """Raise ValueError for targets that do not fit the hidden states or the embedding."""
    if target.ids.step != 1 or not 0 <= target.ids.start < target.ids.stop <= num_rows:
        raise ValueError(f"{name}.ids must be a range of 1 to {num_rows} rows of the embedding, got {target.ids}")
    shape = (target.positions_M.numel(),)
    for part, values, dtype in (
        ("positions_M", target.positions_M, torch.int64),
        ("targets_M", target.targets_M, torch.int64),
        ("weights_M", target.weights_M, torch.float32),
    ):
        if values.shape != shape or values.dtype != dtype or values.device != hidden_ND.device:
            raise ValueError(
                f"{name}.{part} must be {dtype} {shape} on {hidden_ND.device}, "
                f"got {values.dtype} {tuple(values.shape)} on {values.device}"
            )
    if hidden_ND.device.type != "cpu":
        return
    for part, values, permitted in (
        ("positions_M", target.positions_M, range(len(hidden_ND))),
        ("targets_M", target.targets_M, target.ids),
    ):
        wrong = values[(values < permitted.start) | (values >= permitted.stop)]
        if len(wrong):
            raise ValueError(
                f"{name}.{part} must be from {permitted.start} to {permitted.stop - 1}, got {int(wrong[0])}"
            )
