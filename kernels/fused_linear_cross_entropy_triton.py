"""Losses of a chunk of logits, and their gradient in its place, in Triton; ``cross_entropy.py`` says what they are for.

One program for each row, which goes over its columns twice: first for maximum and sum of exponentials together
(arXiv:1805.02867), then for the gradient. The second pass finds what it reads in the L2 cache.
"""

# M rows, I ids that compete, C columns of a block
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview.kernels.checks import check_int64
from cogview.kernels.triton_utils import LEAST, LOG2_E, check_floats

BLOCK = 4096  # columns; with 8 warps 16 of each thread, whose loads of 16 bytes are in flight together


@triton.jit
def _add_up(logits_C, most, total):
    """The maximum, and the sum of exponentials below it, with one block more."""
    larger = tl.maximum(most, tl.max(logits_C, axis=0))
    total = total * tl.exp2((most - larger) * LOG2_E) + tl.sum(tl.exp2((logits_C - larger) * LOG2_E), axis=0)
    return larger, total


@triton.jit
def _gradient(logits_C, most, scale, weight, right_C):
    return tl.exp2((logits_C - most) * LOG2_E) * scale - tl.where(right_C, weight, 0.0)


@triton.jit
def _losses_kernel(
    losses_ptr, logits_ptr, targets_ptr, weights_ptr, row_stride, num_cols, WRITE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    line_ptr = logits_ptr + row.to(tl.int64) * row_stride  # a chunk can be made to have more than 2**31 logits
    cols_C = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < num_cols)  # else the loss shows it, and nothing foreign is read
    target_logit = tl.load(line_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    whole = num_cols // BLOCK * BLOCK  # up to here without a mask, which would cut loads to single numbers
    rest_C = whole + cols_C
    inside_C = rest_C < num_cols

    most = LEAST
    total = 0.0
    for first in range(0, whole, BLOCK):
        most, total = _add_up(tl.load(line_ptr + first + cols_C).to(tl.float32), most, total)
    rest_logits_C = tl.load(line_ptr + rest_C, mask=inside_C, other=-float("inf")).to(tl.float32)
    most, total = _add_up(rest_logits_C, most, total)
    tl.store(losses_ptr + row, most - target_logit + tl.log(total))

    if WRITE:
        weight = tl.load(weights_ptr + row)
        scale = weight / total
        tl.debug_barrier()  # by now every thread has read the target's logit
        for first in range(0, whole, BLOCK):
            logits_C = tl.load(line_ptr + first + cols_C).to(tl.float32)
            gradient_C = _gradient(logits_C, most, scale, weight, first + cols_C == target)
            tl.store(line_ptr + first + cols_C, gradient_C.to(line_ptr.dtype.element_ty))
        gradient_C = _gradient(rest_logits_C, most, scale, weight, rest_C == target)
        tl.store(line_ptr + rest_C, gradient_C.to(line_ptr.dtype.element_ty), mask=inside_C)


def losses_in_place(logits_MI: Tensor, targets_M: Tensor, weights_M: Tensor, write: bool) -> Tensor:
    """Cross-entropy (M,) float32; with ``write`` the gradient of weight * loss takes the place of ``logits_MI``.

    ``targets_M`` (int64) count from the first of the I ids; on a GPU one that is out of range has the loss NaN. Rows of
    logits may lie apart, columns not.
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
    return _losses_in_place(logits_MI, targets_M.contiguous(), weights_M.contiguous(), write)


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
