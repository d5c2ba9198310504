"""Losses of a chunk of logits, and their gradient in place, in Triton; ``fused_linear_cross_entropy.py`` uses them.

One program per row reads its columns twice: first for maximum and sum of exponentials together (online softmax,
arXiv:1805.02867), then for the gradient. The second pass finds its input in the L2 cache.
"""

# M rows, I candidate ids, C columns of a block
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview.kernels.checks import check_int64
from cogview.kernels.triton_utils import LOG2_E, MIN_SCORE, check_floats

BLOCK = 4096  # columns: with 8 warps 16 per thread, whose 16-byte loads are in flight together


@triton.jit
def _add_up(logits_C, largest, total):
    """Update the maximum, and the sum of exponentials relative to it, by a block."""
    new_largest = tl.maximum(largest, tl.max(logits_C, axis=0))
    total = total * tl.exp2((largest - new_largest) * LOG2_E) + tl.sum(
        tl.exp2((logits_C - new_largest) * LOG2_E), axis=0
    )
    return new_largest, total


@triton.jit
def _gradient(logits_C, largest, scale, weight, right_C):
    """Return the gradient of weight * loss in a block of logits."""
    return tl.exp2((logits_C - largest) * LOG2_E) * scale - tl.where(right_C, weight, 0.0)


@triton.jit
def _losses_kernel(
    losses_ptr, logits_ptr, targets_ptr, weights_ptr, row_stride, num_cols, WRITE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    line_ptr = logits_ptr + row.to(tl.int64) * row_stride  # a chunk may have more than 2**31 logits
    cols_C = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < num_cols)  # otherwise the loss is nan, and no foreign memory is read
    target_logit = tl.load(line_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    whole = num_cols // BLOCK * BLOCK  # up to here without a mask, which would split loads into single elements
    rest_C = whole + cols_C
    inside_C = rest_C < num_cols

    largest = MIN_SCORE
    total = 0.0
    for first in range(0, whole, BLOCK):
        largest, total = _add_up(tl.load(line_ptr + first + cols_C).to(tl.float32), largest, total)
    rest_logits_C = tl.load(line_ptr + rest_C, mask=inside_C, other=-float("inf")).to(tl.float32)
    largest, total = _add_up(rest_logits_C, largest, total)
    tl.store(losses_ptr + row, largest - target_logit + tl.log(total))

    if WRITE:
        weight = tl.load(weights_ptr + row)
        scale = weight / total
        tl.debug_barrier()  # every thread has read the logit of the target
        for first in range(0, whole, BLOCK):
            logits_C = tl.load(line_ptr + first + cols_C).to(tl.float32)
            gradient_C = _gradient(logits_C, largest, scale, weight, first + cols_C == target)
            tl.store(line_ptr + first + cols_C, gradient_C.to(line_ptr.dtype.element_ty))
        gradient_C = _gradient(rest_logits_C, largest, scale, weight, rest_C == target)
        tl.store(line_ptr + rest_C, gradient_C.to(line_ptr.dtype.element_ty), mask=inside_C)


def losses_in_place(logits_MI: Tensor, targets_M: Tensor, weights_M: Tensor, write: bool) -> Tensor:
    """Compute ``losses_in_place_torch`` with the Triton kernel.

    Args:
        logits_MI: Logits with contiguous columns; with ``write`` overwritten by the gradient of weight * loss.
        targets_M: Indices of the correct ids among the I candidates, int64; on a GPU one out of range gives nan.
        weights_M: Weight of each loss, float32.
        write: Whether to compute the gradient.

    Returns:
        Cross-entropy (M,), float32.

    Raises:
        ValueError: The inputs do not fit together or the kernel does not support them.
    """
    check_floats("logits_MI", logits_MI)
    if logits_MI.ndim != 2 or not logits_MI.shape[1] or logits_MI.stride(1) != 1:
        raise ValueError(
            "logits_MI must be a matrix of one column or more, one beside the other, "
            f"got {tuple(logits_MI.shape)} with strides {logits_MI.stride()}"
        )
    shape = (len(logits_MI),)
    check_int64("targets_M", targets_M, logits_MI.device, shape, logits_MI.shape[1] - 1)
    if weights_M.shape != shape or weights_M.dtype != torch.float32 or weights_M.device != logits_MI.device:
        raise ValueError(
            f"weights_M must be float32 {shape} on {logits_MI.device}, "
            f"got {weights_M.dtype} {tuple(weights_M.shape)} on {weights_M.device}"
        )
    losses_M: Tensor = _losses_in_place(logits_MI, targets_M.contiguous(), weights_M.contiguous(), write)
    return losses_M


@torch.library.custom_op("cogview::losses_in_place", mutates_args=("logits_MI",))
def _losses_in_place(logits_MI: Tensor, targets_M: Tensor, weights_M: Tensor, write: bool) -> Tensor:
    losses_M = torch.empty(len(logits_MI), dtype=torch.float32, device=logits_MI.device)
    if len(logits_MI):
        _losses_kernel[(len(logits_MI),)](
            losses_M, logits_MI, targets_M, weights_M, logits_MI.stride(0), logits_MI.shape[1],
            WRITE=write, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return losses_M


@_losses_in_place.register_fake
def _(logits_MI, targets_M, weights_M, write):
    return logits_MI.new_empty(len(logits_MI), dtype=torch.float32)
