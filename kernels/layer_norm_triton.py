"""PB-relax LayerNorm in Triton, forward and backward; ``layer_norm.py`` dispatches to it.

================  =====================  ===========================================================================
kernel            grid                   computes
================  =====================  ===========================================================================
_forward_kernel   blocks of tokens       x + LN(branch), and LN of that sum
_backward_kernel  programs over tokens   gradients of x and branch, and partial sums of those of weights and biases
================  =====================  ===========================================================================

One kernel per direction reads memory once. A program keeps whole tokens in registers, so that the statistics of a token
(largest value, mean, deviation) need no second read, and the next norm starts from the sum in registers. The backward
pass recomputes the normalized token from its input and three saved numbers. Each program sums the gradients of weights
over its tokens, then these are summed over the programs: no two programs write to the same address, and results are
deterministic.
"""

# N tokens, D width, R tokens and C columns (D and beyond) of a block, P programs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview.kernels.layer_norm import RELAX, SMALLEST
from cogview.kernels.triton_utils import as_rows, check_floats

MAX_WIDTH = 8192  # a token must fit into the registers of a program
TILE = 4096  # elements that a program processes at a time, but at least one token
BUFFERS = 96 * 1024  # bytes of shared memory of GPUs with asynchronous copies
SMALLEST_MAX = tl.constexpr(SMALLEST)


@triton.jit
def _block(first, num_rows, ROWS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows (R, 1), columns (1, C) and a mask; int64, since a long batch has more than 2**31 elements."""
    row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < num_rows) & (column < SIZE)


@triton.jit
def _relaxed(token, inside, epsilon, SIZE: tl.constexpr):
    """Return token / max|x| without its mean (R, C), and 1 / max|x|, the mean and 1 / deviation, (R, 1) each."""
    inverse = 1.0 / tl.maximum(tl.max(tl.abs(token), 1, keep_dims=True), SMALLEST_MAX)
    relaxed = token * inverse
    mean = tl.sum(relaxed, 1, keep_dims=True) / SIZE
    centred = tl.where(inside, relaxed - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / SIZE + epsilon)
    return centred, inverse, mean, 1.0 / deviation


@triton.jit
def _save(stats_ptr, norm, row, num_rows, inverse, mean, rstd):
    """Store the three statistics of each token for the backward pass."""
    pointer = stats_ptr + norm * 3 * num_rows.to(tl.int64) + row
    tl.store(pointer, inverse, mask=row < num_rows)
    tl.store(pointer + num_rows, mean, mask=row < num_rows)
    tl.store(pointer + 2 * num_rows, rstd, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr, branch_ptr, weight_ptr, bias_ptr, next_weight_ptr, next_bias_ptr, sum_ptr, normed_ptr, stats_ptr,
    x_stride, branch_stride, num_rows, epsilon,
    ADDS: tl.constexpr, NEXT: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, column, inside = _block(tl.program_id(0) * ROWS, num_rows, ROWS, SIZE, COLUMNS)
    branch = tl.load(branch_ptr + row * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)

    centred, inverse, mean, rstd = _relaxed(branch, inside, epsilon, SIZE)
    _save(stats_ptr, 0, row, num_rows, inverse, mean, rstd)
    out = centred * rstd * weight + bias
    if ADDS:
        out += x
    stored = out.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row * SIZE + column, stored, mask=inside)

    if NEXT:  # from the sum as stored, which the backward pass reads
        centred, inverse, mean, rstd = _relaxed(stored.to(tl.float32), inside, epsilon, SIZE)
        _save(stats_ptr, 1, row, num_rows, inverse, mean, rstd)
        next_weight = tl.load(next_weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
        next_bias = tl.load(next_bias_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
        normed = centred * rstd * next_weight + next_bias
        tl.store(normed_ptr + row * SIZE + column, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(d_out, token, weight, stats_ptr, norm, row, num_rows, SIZE: tl.constexpr):
    """Return the gradients (R, C) of the token and of the weight for each row; max|x| is a constant.

    Columns beyond the token are arbitrary and harmless, since ``weight`` is zero there.
    """
    pointer = stats_ptr + norm * 3 * num_rows.to(tl.int64) + row
    inverse = tl.load(pointer, mask=row < num_rows, other=0.0)
    mean = tl.load(pointer + num_rows, mask=row < num_rows, other=0.0)
    rstd = tl.load(pointer + 2 * num_rows, mask=row < num_rows, other=0.0)
    normal = (token * inverse - mean) * rstd
    d_normal = d_out * weight
    d_weight = d_out * normal
    mean_d_normal = tl.sum(d_normal, 1, keep_dims=True) / SIZE
    projection = tl.sum(d_normal * normal, 1, keep_dims=True) / SIZE
    d_token = (d_normal - mean_d_normal - normal * projection) * (rstd * inverse)
    return d_token, d_weight


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    d_sum_ptr, d_normed_ptr, branch_ptr, sum_ptr, weight_ptr, next_weight_ptr, stats_ptr,
    d_x_ptr, d_branch_ptr, partial_ptr, d_sum_stride, d_normed_stride, branch_stride, num_rows,
    NEXT: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sum_d_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    if NEXT:
        sum_d_next_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
        sum_d_next_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row, column, inside = _block(first, num_rows, ROWS, SIZE, COLUMNS)
        d_out = tl.load(d_sum_ptr + row * d_sum_stride + column, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + row * branch_stride + column, mask=inside, other=0.0).to(tl.float32)
        if NEXT:
            d_normed = tl.load(d_normed_ptr + row * d_normed_stride + column, mask=inside, other=0.0).to(tl.float32)
            token = tl.load(sum_ptr + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
            next_weight = tl.load(next_weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
            d_token, d_weight = _norm_backward(d_normed, token, next_weight, stats_ptr, 1, row, num_rows, SIZE)
            sum_d_next_weight += d_weight
            sum_d_next_bias += d_normed
            d_out += d_token
            tl.store(d_x_ptr + row * SIZE + column, d_out.to(d_x_ptr.dtype.element_ty), mask=inside)
        weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
        d_branch, d_weight = _norm_backward(d_out, branch, weight, stats_ptr, 0, row, num_rows, SIZE)
        sum_d_weight += d_weight
        sum_d_bias += d_out
        tl.store(d_branch_ptr + row * SIZE + column, d_branch.to(d_branch_ptr.dtype.element_ty), mask=inside)

    column = tl.arange(0, COLUMNS)
    programs = tl.num_programs(0).to(tl.int64)
    pointer = partial_ptr + tl.program_id(0) * SIZE + column
    tl.store(pointer, tl.sum(sum_d_weight, 0), mask=column < SIZE)
    tl.store(pointer + programs * SIZE, tl.sum(sum_d_bias, 0), mask=column < SIZE)
    if NEXT:
        tl.store(pointer + 2 * programs * SIZE, tl.sum(sum_d_next_weight, 0), mask=column < SIZE)
        tl.store(pointer + 3 * programs * SIZE, tl.sum(sum_d_next_bias, 0), mask=column < SIZE)


def pb_relax_layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Compute ``pb_relax_layer_norm`` with the Triton kernels; differentiable.

    Args:
        x: Tokens (..., D), D up to 8192.
        weight: (D,), of any supported dtype.
        bias: (D,), of any supported dtype.
        epsilon: Added to the variance.

    Returns:
        Normalized tokens in the shape and dtype of ``x``.

    Raises:
        ValueError: The kernels do not support the inputs; nothing was launched.
    """
    _check(x, "x", {"weight": weight, "bias": bias})
    out: Tensor
    out, _, _ = _sandwich(None, x, weight, bias, None, None, epsilon)
    return out


def sandwich_layer_norm_triton(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor | None = None,
    next_bias: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``sandwich_layer_norm`` with the Triton kernels; differentiable.

    Args:
        x: Residual stream (..., D), D up to 8192.
        branch: Branch output, in the shape of ``x``.
        weight: Weight (D,) of the norm of the branch.
        bias: Bias (D,) of the norm of the branch.
        next_weight: Weight (D,) of the next norm; None for no next norm.
        next_bias: Bias (D,) of the next norm.
        epsilon: Added to the variance.

    Returns:
        The sum x + LN(branch) in the dtype of ``x``, and its norm in the dtype of ``branch``, or None.

    Raises:
        ValueError: The kernels do not support the inputs; nothing was launched.
    """
    check_floats("x", x)
    if x.shape != branch.shape or x.device != branch.device:
        raise ValueError(
            f"x must be {tuple(branch.shape)} on {branch.device} as branch is, got {tuple(x.shape)} on {x.device}"
        )
    parameters = {"weight": weight, "bias": bias}
    if next_weight is not None and next_bias is not None:
        parameters |= {"next_weight": next_weight, "next_bias": next_bias}
    _check(branch, "branch", parameters)
    total, normed, _ = _sandwich(x, branch, weight, bias, next_weight, next_bias, epsilon)
    return total, None if next_weight is None else normed


def _check(token: Tensor, name: str, parameters: dict[str, Tensor]) -> None:
    """Raise ValueError for inputs that the kernels do not support."""
    check_floats(name, token)
    if token.ndim == 0 or not 1 <= token.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{name} must be (..., D) with D from 1 to {MAX_WIDTH}, got {tuple(token.shape)}")
    for parameter_name, parameter in parameters.items():
        check_floats(parameter_name, parameter)
        if parameter.shape != token.shape[-1:] or parameter.device != token.device:
            raise ValueError(
                f"{parameter_name} must be {tuple(token.shape[-1:])} on {token.device}, "
                f"got {tuple(parameter.shape)} on {parameter.device}"
            )


@torch.library.custom_op("cogview::sandwich_layer_norm", mutates_args=())
def _sandwich(
    x: Tensor | None,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum (without ``x`` the norm alone), the next norm or an empty tensor, and statistics (norms, 3, N)."""
    branch_ND, x_ND = as_rows(branch), None if x is None else as_rows(x)
    total, normed, stats = _results(x, branch, next_weight)
    config, warps = _launch_config(branch.shape[-1])
    _forward_kernel[(triton.cdiv(len(branch_ND), config["ROWS"]),)](
        x_ND, branch_ND, *(None if p is None else p.contiguous() for p in (weight, bias, next_weight, next_bias)),
        total, normed, stats, 0 if x_ND is None else x_ND.stride(0), branch_ND.stride(0), len(branch_ND),
        epsilon / RELAX**2, ADDS=x is not None, NEXT=next_weight is not None, num_warps=warps, **config,
    )  # fmt: skip
    return total, normed, stats


@_sandwich.register_fake
def _(x, branch, weight, bias, next_weight, next_bias, epsilon):
    return _results(x, branch, next_weight)


def _results(x: Tensor | None, branch: Tensor, next_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty outputs of the forward pass."""
    size = branch.shape[-1]
    total = branch.new_empty(branch.shape, dtype=branch.dtype if x is None else x.dtype)
    normed = branch.new_empty(0 if next_weight is None else branch.shape)
    stats = branch.new_empty(1 if next_weight is None else 2, 3, branch.numel() // size, dtype=torch.float32)
    return total, normed, stats


@torch.library.custom_op("cogview::sandwich_layer_norm_backward", mutates_args=())
def _sandwich_backward(
    d_sum: Tensor,
    d_normed: Tensor | None,
    branch: Tensor,
    total: Tensor | None,
    weight: Tensor,
    next_weight: Tensor | None,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, of ``branch``, and (2 or 4, D) float32 of weights and biases.

    Without a next norm the sum is not needed, and the gradient of ``x``, equal to ``d_sum``, is returned empty.
    """
    d_x, d_branch, d_parameters = _gradients(branch, total)
    d_sum_ND, branch_ND, size = as_rows(d_sum), as_rows(branch), branch.shape[-1]
    d_normed_ND = None if d_normed is None else as_rows(d_normed)
    config, warps = _launch_config(size)
    programs = min(triton.cdiv(len(branch_ND), config["ROWS"]), _most_programs(branch.device))
    partial = d_parameters.new_empty(len(d_parameters), programs, size)
    inputs = [x_ND for x_ND in (d_sum_ND, d_normed_ND, branch_ND, total) if x_ND is not None]
    tile_bytes = config["ROWS"] * config["COLUMNS"] * sum(x_ND.element_size() for x_ND in inputs)
    stages = 2 if 2 * tile_bytes <= BUFFERS else 1
    _backward_kernel[(programs,)](
        d_sum_ND, d_normed_ND, branch_ND, total, weight.contiguous(),
        None if next_weight is None else next_weight.contiguous(), stats, d_x, d_branch, partial,
        d_sum_ND.stride(0), 0 if d_normed_ND is None else d_normed_ND.stride(0), branch_ND.stride(0), len(branch_ND),
        NEXT=total is not None, STAGES=stages, num_warps=2 * warps, **config,
    )  # fmt: skip
    torch.sum(partial, dim=1, out=d_parameters)
    return d_x, d_branch, d_parameters


@_sandwich_backward.register_fake
def _(d_sum, d_normed, branch, total, weight, next_weight, stats):
    return _gradients(branch, total)


def _gradients(branch: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty outputs of the backward pass."""
    d_x = branch.new_empty(0) if total is None else total.new_empty(total.shape)
    d_parameters = branch.new_empty(2 if total is None else 4, branch.shape[-1], dtype=torch.float32)
    return d_x, branch.new_empty(branch.shape), d_parameters


def _setup_context(ctx, inputs, output):
    x, branch, weight, bias, next_weight, next_bias, _ = inputs
    total, _, stats = output
    ctx.save_for_backward(branch, None if next_weight is None else total, weight, next_weight, stats)
    ctx.adds = x is not None
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in (bias, next_bias)]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_sum, d_normed, _):
    branch, total, weight, next_weight, stats = ctx.saved_tensors
    if total is None:
        _, d_branch, (d_weight, d_bias) = _sandwich_backward(d_sum, None, branch, None, weight, None, stats)
        d_x, d_next_weight, d_next_bias = d_sum if ctx.adds else None, None, None
    else:
        d_sum = torch.zeros_like(total) if d_sum is None else d_sum
        d_normed = torch.zeros_like(branch) if d_normed is None else d_normed
        d_x, d_branch, d_parameters = _sandwich_backward(d_sum, d_normed, branch, total, weight, next_weight, stats)
        d_weight, d_bias, d_next_weight, d_next_bias = d_parameters
        d_next_weight, d_next_bias = d_next_weight.to(next_weight.dtype), d_next_bias.to(ctx.dtypes[1])
    return d_x, d_branch, d_weight.to(weight.dtype), d_bias.to(ctx.dtypes[0]), d_next_weight, d_next_bias, None


_sandwich.register_autograd(_backward, setup_context=_setup_context)


def _launch_config(size: int) -> tuple[dict[str, int], int]:
    """Return the block sizes, in whole tokens, and the number of warps."""
    columns = max(16, triton.next_power_of_2(size))
    rows = max(1, TILE // columns)
    return {"SIZE": size, "COLUMNS": columns, "ROWS": rows}, rows * columns // 512


def _most_programs(device: torch.device) -> int:
    """Return the number of programs of the backward pass: two per multiprocessor run concurrently."""
    if device.type == "cpu":  # interpreted sequentially
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * 2
