"""Cross-entropy of an output embedding in slices: the logits of all places and all ids never exist at once.

A place competes against the ids of its own kind alone, so most rows of the embedding are never multiplied with it; and
places are taken in chunks, whose gradients are computed while the logits are at hand (as in Liger Kernel,
arXiv:2410.10989, section 3.2). That takes the three products of autograd, and keeps the gradients of the inputs instead
of logits.
"""

# N places in all, M places of one kind, C places of a chunk, D width, V rows of the embedding, I ids that compete
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cogview.kernels.dispatch import select_backend

# Bytes of the logits of a chunk. Small ones would stay in the cache of a CPU, but each chunk reads and writes the
# gradient of all rows that compete: about 24 MiB were fastest. A GPU must be occupied by a chunk.
CHUNK_BYTES = {"cpu": 24 * 2**20}
CHUNK_BYTES_GPU = 64 * 2**20
ALIGNED = 16  # a row of logits takes a multiple of so many numbers: products and loads of half precision ask for it
# Of half precision: how much the weights of a chunk add up to at most. Larger, and float16 overflows where the gradient
# of a row is a sum over the chunk; smaller, and probabilities that are multiplied with their weight vanish.
HALF_WEIGHTS = 256.0

# (logits_MI, targets_M, weights_M, write) -> losses_M; see ``losses_in_place_torch``.
LossesInPlace = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True, eq=False)
class LossTargets:
    """What is right at some of N places, and among which ids: one kind of target.

    ``places_M`` (int64) are rows of the hidden states, ``targets_M`` (int64) the right ids, all in ``ids``, which are
    rows of the embedding; ``weights_M`` (float32) say how much each loss counts, and have no gradient themselves.
    """

    ids: range
    positions_M: Tensor
    targets_M: Tensor
    weights_M: Tensor


def fused_linear_cross_entropy_reference(
    hidden_ND: Tensor, embedding_VD: Tensor, targets: Sequence[LossTargets]
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum of all losses, and the losses (M,) of each of ``targets``, from logits of all ids at all places.

    The loss of a place is -log softmax(h E^T) at its target, where ids that do not compete count as -inf.
    """
    _check(hidden_ND, embedding_VD, targets)
    logits_NV = F.linear(hidden_ND, embedding_VD)
    logits_NV = logits_NV.to(_precise(logits_NV.dtype))
    total, losses = logits_NV.new_zeros(()), []
    for own in targets:
        outside_V = torch.ones(len(embedding_VD), dtype=torch.bool, device=embedding_VD.device)
        outside_V[own.ids.start : own.ids.stop] = False
        logits_MV = logits_NV[own.positions_M].masked_fill(outside_V, -torch.inf)
        losses_M = F.cross_entropy(logits_MV, own.targets_M, reduction="none")
        total = total + (losses_M * own.weights_M.detach()).sum()
        losses.append(losses_M.detach())
    return total, losses


def fused_linear_cross_entropy(
    hidden_ND: Tensor, embedding_VD: Tensor, targets: Sequence[LossTargets]
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum of all losses, differentiable, and the unweighted losses (M,) of each of ``targets``, detached.

    ``hidden_ND`` are multiplied with the rows of ``embedding_VD`` that compete, in the dtype of both or that of
    autocast; losses and sums are float32, or float64 where the inputs are. A place may be in several ``targets``.
    Gradients are computed here and scaled in the backward, which can run once: a second one is PyTorch's error about a
    tensor that has been modified. ValueError for inputs that do not fit; on a GPU ids and places are not looked at,
    which would wait for it. ``COGVIEW_KERNELS=reference|torch|triton`` forces a form.
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
    learn = torch.is_grad_enabled()
    total, *losses = _FusedLinearCrossEntropy.apply(hidden_ND, embedding_VD, targets, in_place, learn)
    return total, losses


def losses_in_place_torch(logits_MI: Tensor, targets_M: Tensor, weights_M: Tensor, write: bool) -> Tensor:
    """Cross-entropy (M,) in float32; with ``write`` the gradient of weight * loss takes the place of ``logits_MI``.

    ``targets_M`` (int64) count from the first of the I ids. Of float64 logits everything is float64.
    """
    log_probs_MI = logits_MI.log_softmax(dim=1, dtype=_precise(logits_MI.dtype))
    target_M1 = targets_M.unsqueeze(1)
    losses_M1 = -log_probs_MI.gather(1, target_M1)
    if write:
        # p, and p - 1 at the target; what is small comes out exactly, and is rounded to half precision last.
        gradient_MI = log_probs_MI.exp_().scatter_(1, target_M1, torch.expm1(-losses_M1))
        torch.mul(gradient_MI, weights_M.unsqueeze(1), out=logits_MI)
    return losses_M1.squeeze(1)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Losses and the gradients that are needed, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        embedding_VD: Tensor,
        targets: Sequence[LossTargets],
        in_place: LossesInPlace,
        learn: bool,
    ) -> tuple[Tensor, ...]:
        # Whether an input asks for its gradient does not say whether gradients are recorded.
        needed = [learn and asks for asks in ctx.needs_input_grad[:2]]
        dtype = _product_dtype(hidden_ND, embedding_VD)
        precise = _precise(dtype)
        gradients = [
            torch.zeros_like(of, dtype=precise, memory_format=torch.contiguous_format) if asked else None
            for of, asked in zip((hidden_ND, embedding_VD), needed, strict=True)
        ]
        total, losses = hidden_ND.new_zeros((), dtype=precise), []
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for own in targets:
                losses_M = _kind_losses(hidden_ND, embedding_VD, own, in_place, dtype, *gradients)
                total += (losses_M * own.weights_M).sum()
                losses.append(losses_M)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_ND.dtype, embedding_VD.dtype
        ctx.mark_non_differentiable(*losses)
        return total, *losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward, scaled where they are: a second copy of the embedding's would be large."""
        gradients = [
            None if gradient is None else gradient.mul_(d_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None


def _kind_losses(
    hidden_ND: Tensor,
    embedding_VD: Tensor,
    own: LossTargets,
    in_place: LossesInPlace,
    dtype: torch.dtype,
    d_hidden_ND: Tensor | None,
    d_embedding_VD: Tensor | None,
) -> Tensor:
    """The losses (M,) of one kind of target; what they add to the gradients is added, where these are given."""
    if not len(own.positions_M):
        return torch.empty(0, dtype=_precise(dtype), device=hidden_ND.device)
    chosen = slice(own.ids.start, own.ids.stop)
    rows_ID = embedding_VD[chosen].to(dtype)
    losses_M = torch.empty(len(own.positions_M), dtype=_precise(dtype), device=hidden_ND.device)
    targets_M, weights_M = own.targets_M - own.ids.start, own.weights_M.to(losses_M.dtype)
    size = _chunk_size(len(own.positions_M), len(own.ids), rows_ID)
    half = dtype.itemsize == 2
    if half:
        # Before the backward nothing scales a loss: weights of 1 / N would vanish in float16.
        unit = (weights_M.abs().amax() * (size / HALF_WEIGHTS)).clamp_(min=torch.finfo(torch.float32).tiny)
        weights_M = weights_M / unit
    write = d_hidden_ND is not None or d_embedding_VD is not None
    padded = -(-len(own.ids) // ALIGNED) * ALIGNED
    # PyTorch's product of bfloat16 on a CPU multiplies some of what is behind a row with zero, which must be a number.
    space_CI = rows_ID.new_zeros(size, padded)[:, : len(own.ids)]
    for first in range(0, len(own.positions_M), size):
        chunk = slice(first, first + size)
        places_C = own.positions_M[chunk]
        hidden_CD = hidden_ND[places_C].to(dtype)
        logits_CI = torch.mm(hidden_CD, rows_ID.T, out=space_CI[: len(places_C)])
        losses_M[chunk] = in_place(logits_CI, targets_M[chunk], weights_M[chunk], write)
        if d_hidden_ND is not None:
            d_hidden_CD = torch.mm(logits_CI, rows_ID).to(d_hidden_ND.dtype)
            if half:
                d_hidden_CD *= unit
            # Unlike index_add_, in one order on a GPU too.
            d_hidden_ND.index_put_((places_C,), d_hidden_CD, accumulate=True)
        if d_embedding_VD is not None:
            if half:
                d_embedding_VD[chosen].addcmul_(torch.mm(logits_CI.T, hidden_CD), unit)
            else:
                d_embedding_VD[chosen].addmm_(logits_CI.T, hidden_CD)
    return losses_M


def _chunk_size(num_places: int, num_ids: int, rows_ID: Tensor) -> int:
    """Places of a chunk: as many as give logits of about ``CHUNK_BYTES``, in chunks that are equally large."""
    most = CHUNK_BYTES.get(rows_ID.device.type, CHUNK_BYTES_GPU) // (num_ids * rows_ID.element_size())
    num_chunks = -(-num_places // max(most, 1))
    return -(-num_places // num_chunks)


def _product_dtype(hidden_ND: Tensor, embedding_VD: Tensor) -> torch.dtype:
    """What ``F.linear`` would multiply in; autocast leaves float64 alone."""
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden_ND.dtype


def _precise(dtype: torch.dtype) -> torch.dtype:
    """What sums, losses and gradients are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _check(hidden_ND: Tensor, embedding_VD: Tensor, targets: Sequence[LossTargets]) -> None:
    """ValueError naming what does not fit, and where; nothing is computed before."""
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
    for number, own in enumerate(targets):
        _check_targets(f"targets[{number}]", own, hidden_ND, len(embedding_VD))


def _check_targets(name: str, own: LossTargets, hidden_ND: Tensor, num_rows: int) -> None:
    if own.ids.step != 1 or not 0 <= own.ids.start < own.ids.stop <= num_rows:
        raise ValueError(f"{name}.ids must be a range of 1 to {num_rows} rows of the embedding, got {own.ids}")
    shape = (own.positions_M.numel(),)
    for part, values, dtype in (
        ("positions_M", own.positions_M, torch.int64),
        ("targets_M", own.targets_M, torch.int64),
        ("weights_M", own.weights_M, torch.float32),
    ):
        if values.shape != shape or values.dtype != dtype or values.device != hidden_ND.device:
            raise ValueError(
                f"{name}.{part} must be {dtype} {shape} on {hidden_ND.device}, "
                f"got {values.dtype} {tuple(values.shape)} on {values.device}"
            )
    if hidden_ND.device.type != "cpu":
        return
    for part, values, permitted in (
        ("positions_M", own.positions_M, range(len(hidden_ND))),
        ("targets_M", own.targets_M, own.ids),
    ):
        wrong = values[(values < permitted.start) | (values >= permitted.stop)]
        if len(wrong):
            raise ValueError(
                f"{name}.{part} must be from {permitted.start} to {permitted.stop - 1}, got {int(wrong[0])}"
            )
