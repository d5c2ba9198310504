"""Sparse attention of CogView: a window of recent positions, and pivots that represent everything before it.

Models with ``attention: {pattern: window}`` call it for whole sequences: in training, and to score. Steps of decoding
read the same keys from a cache (``window_mask.py``). It is meant for long sequences, where dense attention grows with
the square of the length. The model does not use the neighbourhood in the plane, which is a library offer.

Each query attends to the ``window`` most recent positions, itself included, and of the positions before them only to
the pivots: the text, and a random sample of the image. The scores of sampled pivots are raised by log(s / n), so that n
sampled positions weigh as much as the s positions they are drawn from. That is the sparse attention of CogView
(arXiv:2105.13290; ``sparse_attention`` in
https://github.com/THUDM/CogView/blob/169a0234990d4507ab5ec8e70b15831d8d5b3dd3/mpu/sparse_transformer.py). The cost
grows with length times (window + pivots).

The window can be restricted to a neighbourhood in the plane: columns near that of the query, in as many rows above as
the window reaches back. The reference, with its mask over all pairs, is the specification.
"""

# B batch, H heads, T positions (queries and keys), K size of a head, N pivots; M queries and S keys of a block
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cogview.kernels.attention import attention_reference
from cogview.kernels.dispatch import select_backend

BLOCK = 256  # queries that share a slice of keys in PyTorch's implementation


def window_attention(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    *,
    window: int,
    pivots_BN: Tensor,
    pivot_bias_BN: Tensor | None = None,
    grid: int | None = None,
    columns: int | None = None,
    image_starts_B: Tensor | None = None,
) -> Tensor:
    """Compute causal attention to a window and to the pivots before it; scores are scaled by 1 / sqrt(K).

    ``grid``, ``columns`` and ``image_starts_B`` belong together. Positions from ``image_starts_B`` on are then an
    image in rows of ``grid`` codes. In its window, a query of the image attends to codes whose column differs from its
    own by at most ``columns``; a window of n ``grid`` + ``columns`` + 1 reaches n rows up. Earlier positions and pivots
    are not restricted.

    Args:
        q_BHTK: Queries, of any floating-point dtype.
        k_BHTK: Keys, like the queries.
        v_BHTK: Values, like the queries.
        window: Number of recent positions that a query at t attends to, from t - ``window`` + 1 to t; at least 1.
        pivots_BN: Positions of the pivots, int64, ascending in a row, then -1 where a row has fewer. A query attends to
            those up to t - ``window``. On a GPU the values are not checked.
        pivot_bias_BN: Bias of the scores of the pivots, a float32 constant; None for 0. For n positions sampled
            from s it is log(s / n).
        grid: Codes per row of the image.
        columns: Largest difference of columns, from 0 to ``grid`` - 1.
        image_starts_B: First position of each image, int64. On a GPU the values are not checked.

    Returns:
        Attention output (B, H, T, K) in the dtype of the queries.

    Raises:
        ValueError: The inputs do not fit together.
    """
    name = select_backend("window_attention", q_BHTK.device.type, available=("reference", "torch", "triton"))
    implementation: Callable[..., Tensor]
    if name == "triton":
        from cogview.kernels.window_attention_triton import window_attention_triton as implementation
    else:
        check_inputs(q_BHTK, k_BHTK, v_BHTK, window, pivots_BN, pivot_bias_BN, grid, columns, image_starts_B)
        implementation = window_attention_reference if name == "reference" else window_attention_torch
    return implementation(
        q_BHTK,
        k_BHTK,
        v_BHTK,
        window=window,
        pivots_BN=pivots_BN,
        pivot_bias_BN=pivot_bias_BN,
        grid=grid,
        columns=columns,
        image_starts_B=image_starts_B,
    )


def check_inputs(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    window: int,
    pivots_BN: Tensor,
    pivot_bias_BN: Tensor | None,
    grid: int | None,
    columns: int | None,
    image_starts_B: Tensor | None,
) -> None:
    """Raise ValueError for arguments of ``window_attention`` that no implementation supports.

    Args:
        q_BHTK: As in ``window_attention``, and so are the others.
        k_BHTK: Keys.
        v_BHTK: Values.
        window: Keys before a query that it attends to.
        pivots_BN: Sampled pivots.
        pivot_bias_BN: Bias of the pivots.
        grid: Side of the image in codes.
        columns: Columns of the two-dimensional neighbourhood.
        image_starts_B: First position of the image.
    """
    if q_BHTK.ndim != 4 or not q_BHTK.numel():
        raise ValueError(f"q_BHTK must be (B, H, T, K) and not empty, got {tuple(q_BHTK.shape)}")
    rows, length, device = q_BHTK.shape[0], q_BHTK.shape[2], q_BHTK.device
    for name, tensor in (("k_BHTK", k_BHTK), ("v_BHTK", v_BHTK)):
        if tensor.shape != q_BHTK.shape or tensor.dtype != q_BHTK.dtype or tensor.device != device:
            raise ValueError(
                f"{name} must be {q_BHTK.dtype} {tuple(q_BHTK.shape)} on {device} as q_BHTK is, got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if pivots_BN.ndim != 2 or len(pivots_BN) != rows or pivots_BN.dtype != torch.int64 or pivots_BN.device != device:
        raise ValueError(
            f"pivots_BN must be int64 ({rows}, N) on {device}, got {pivots_BN.dtype} {tuple(pivots_BN.shape)} on "
            f"{pivots_BN.device}"
        )
    if device.type == "cpu":  # on a GPU the check would synchronize: there the caller is responsible
        ascending_BN = torch.where(pivots_BN == -1, length + torch.arange(pivots_BN.shape[1]), pivots_BN)
        outside_B = ((pivots_BN < -1) | (pivots_BN >= length)).any(dim=1)
        wrong_B = outside_B | (ascending_BN.diff(dim=1) <= 0).any(dim=1)
        if bool(wrong_B.any()):
            row = int(wrong_B.nonzero()[0])
            raise ValueError(
                f"pivots_BN must ascend from 0 to {length - 1} without repetition and end in -1, got "
                f"{pivots_BN[row].tolist()} in row {row}"
            )
    if pivot_bias_BN is not None:
        fits = pivot_bias_BN.shape == pivots_BN.shape and pivot_bias_BN.device == device
        if not fits or pivot_bias_BN.dtype != torch.float32 or pivot_bias_BN.requires_grad:
            raise ValueError(
                f"pivot_bias_BN must be float32 {tuple(pivots_BN.shape)} on {device} and a constant, got "
                f"{pivot_bias_BN.dtype} {tuple(pivot_bias_BN.shape)} on {pivot_bias_BN.device}, requires_grad="
                f"{pivot_bias_BN.requires_grad}"
            )
    if grid is None and columns is None and image_starts_B is None:
        return
    if grid is None or columns is None or image_starts_B is None:
        raise ValueError(
            f"grid, columns and image_starts_B go together, got {grid}, {columns} and "
            f"{'None' if image_starts_B is None else 'a tensor'}"
        )
    if not 0 <= columns < grid:
        raise ValueError(f"columns must be from 0 to grid - 1 = {grid - 1}, got {columns}")
    if image_starts_B.shape != (rows,) or image_starts_B.dtype != torch.int64 or image_starts_B.device != device:
        raise ValueError(
            f"image_starts_B must be int64 ({rows},) on {device}, got {image_starts_B.dtype} "
            f"{tuple(image_starts_B.shape)} on {image_starts_B.device}"
        )
    if device.type == "cpu" and not 0 <= int(image_starts_B.min()) <= int(image_starts_B.max()) <= length:
        raise ValueError(f"image_starts_B must be from 0 to {length}, got {image_starts_B.tolist()}")


# --- masks ---------------------------------------------------------------------------------------------------------


def neighbour_bias(
    query_M: Tensor, key_S: Tensor, window: int, grid: int | None, columns: int | None, image_starts_B: Tensor | None
) -> Tensor:
    """Return the bias of the window: 0 where a query attends to a key, else -inf.

    Args:
        query_M: Positions of the queries, int64.
        key_S: Positions of the keys, int64.
        window: As in ``window_attention``.
        grid: As in ``window_attention``.
        columns: As in ``window_attention``.
        image_starts_B: As in ``window_attention``.

    Returns:
        Bias (B or 1, M, S), float32.
    """
    lag_MS = query_M.unsqueeze(1) - key_S
    seen_BMS = ((lag_MS >= 0) & (lag_MS < window)).unsqueeze(0)
    if grid is not None and columns is not None and image_starts_B is not None:
        key_column_BS = (key_S - image_starts_B.unsqueeze(1)) % grid
        query_column_BM = (query_M - image_starts_B.unsqueeze(1)) % grid
        distance_BMS = (query_column_BM.unsqueeze(2) - key_column_BS.unsqueeze(1)).abs()
        before_image_BS = key_S < image_starts_B.unsqueeze(1)
        seen_BMS = seen_BMS & ((distance_BMS <= columns) | before_image_BS.unsqueeze(1))
    return torch.zeros(seen_BMS.shape, device=seen_BMS.device).masked_fill(~seen_BMS, -torch.inf)


def pivots_bias(query_M: Tensor, window: int, pivots_BN: Tensor, pivot_bias_BN: Tensor) -> Tensor:
    """Return float32 (B, M, N): the bias of a pivot before the window of the query at ``query_M``, else -inf.

    Args:
        query_M: Positions of the queries, (M,) int64.
        window: Keys before a query that it attends to.
        pivots_BN: Positions of the pivots, (B, N) int64.
        pivot_bias_BN: Bias of the pivots, (B, N).
    """
    before_BMN = query_M.unsqueeze(1) - pivots_BN.unsqueeze(1) >= window
    seen_BMN = before_BMN & (pivots_BN >= 0).unsqueeze(1)
    return pivot_bias_BN.unsqueeze(1).masked_fill(~seen_BMN, -torch.inf)


def window_bias(
    length: int,
    *,
    window: int,
    pivots_BN: Tensor,
    pivot_bias_BN: Tensor | None = None,
    grid: int | None = None,
    columns: int | None = None,
    image_starts_B: Tensor | None = None,
) -> Tensor:
    """Return the bias of all pairs of positions that is equivalent to ``window_attention``.

    Args:
        length: Number of positions T.
        window: As in ``window_attention``.
        pivots_BN: As in ``window_attention``.
        pivot_bias_BN: As in ``window_attention``.
        grid: As in ``window_attention``.
        columns: As in ``window_attention``.
        image_starts_B: As in ``window_attention``.

    Returns:
        Bias (B, 1, T, T), float32; -inf where a query does not attend to a key.
    """
    positions_T = torch.arange(length, device=pivots_BN.device)
    pivot_bias_BN = torch.zeros(pivots_BN.shape, device=pivots_BN.device) if pivot_bias_BN is None else pivot_bias_BN
    window_bias_BTT = neighbour_bias(positions_T, positions_T, window, grid, columns, image_starts_B)
    pivot_bias_BTN = pivots_bias(positions_T, window, pivots_BN, pivot_bias_BN)
    bias_BTT = window_bias_BTT.expand(len(pivots_BN), -1, -1).contiguous()
    # The bias of a missing pivot is -inf, which never wins.
    indices_BTN = pivots_BN.clamp(min=0).unsqueeze(1).expand_as(pivot_bias_BTN)
    return bias_BTT.scatter_reduce(2, indices_BTN, pivot_bias_BTN, "amax").unsqueeze(1)


# --- implementations -----------------------------------------------------------------------------------------------


def window_attention_reference(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    *,
    window: int,
    pivots_BN: Tensor,
    pivot_bias_BN: Tensor | None = None,
    grid: int | None = None,
    columns: int | None = None,
    image_starts_B: Tensor | None = None,
) -> Tensor:
    """Compute ``window_attention`` by dense attention with the mask of ``window_bias``: memory grows with T squared.

    Args:
        q_BHTK: As in ``window_attention``, and so are the others.
        k_BHTK: Keys.
        v_BHTK: Values.
        window: Keys before a query that it attends to.
        pivots_BN: Sampled pivots.
        pivot_bias_BN: Bias of the pivots.
        grid: Side of the image in codes.
        columns: Columns of the two-dimensional neighbourhood.
        image_starts_B: First position of the image.

    Returns:
        The outputs (B, H, T, K).
    """
    bias_B1TT = window_bias(
        q_BHTK.shape[2],
        window=window,
        pivots_BN=pivots_BN,
        pivot_bias_BN=pivot_bias_BN,
        grid=grid,
        columns=columns,
        image_starts_B=image_starts_B,
    )
    return attention_reference(q_BHTK, k_BHTK, v_BHTK, bias_B1TT)


def window_attention_torch(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    *,
    window: int,
    pivots_BN: Tensor,
    pivot_bias_BN: Tensor | None = None,
    grid: int | None = None,
    columns: int | None = None,
    image_starts_B: Tensor | None = None,
) -> Tensor:
    """Compute ``window_attention`` block by block with PyTorch's fused attention.

    A block of queries attends to the keys that any of them attends to. Time and memory grow linearly with T: a block
    saves nothing for the backward pass, which recomputes it.

    Args:
        q_BHTK: As in ``window_attention``, and so are the others.
        k_BHTK: Keys.
        v_BHTK: Values.
        window: Keys before a query that it attends to.
        pivots_BN: Sampled pivots.
        pivot_bias_BN: Bias of the pivots.
        grid: Side of the image in codes.
        columns: Columns of the two-dimensional neighbourhood.
        image_starts_B: First position of the image.

    Returns:
        The outputs (B, H, T, K).
    """
    num_pivots = pivots_BN.shape[1]
    pivot_bias_BN = torch.zeros(pivots_BN.shape, device=q_BHTK.device) if pivot_bias_BN is None else pivot_bias_BN
    k_BHNK, v_BHNK = (_rows(x_BHTK, pivots_BN) for x_BHTK in (k_BHTK, v_BHTK))
    # The gradient of a slice is as large as the whole tensor; those of a split are concatenated once.
    q_blocks, k_blocks, v_blocks = (x_BHTK.split(BLOCK, dim=2) for x_BHTK in (q_BHTK, k_BHTK, v_BHTK))
    # Number of earlier blocks that the window of some query reaches.
    reach = min(-(-(window - 1) // BLOCK), len(q_blocks) - 1)

    inside_M = torch.arange(reach * BLOCK, (reach + 1) * BLOCK, device=q_BHTK.device)
    inside_S = torch.arange((reach + 1) * BLOCK, device=q_BHTK.device)
    window_bias_everywhere = neighbour_bias(
        inside_M, inside_S, window, None, None, None
    )  # without an image all blocks are equal

    def attend(block: int, q_BHMK: Tensor, k_BHSK: Sequence[Tensor], v_BHSK: Sequence[Tensor]) -> Tensor:
        first, count = block * BLOCK, q_BHMK.shape[2]
        begin, end = max(0, block - reach) * BLOCK, first + count
        seen = min(num_pivots, max(0, end - window))  # at most, since positions are unique
        queries_M = torch.arange(first, end, device=q_BHMK.device)
        if grid is None:
            behind = reach * BLOCK - first + begin
            window_bias_BMS = window_bias_everywhere[:, :count, behind : behind + end - begin]
        else:
            keys_S = torch.arange(begin, end, device=q_BHMK.device)
            window_bias_BMS = neighbour_bias(queries_M, keys_S, window, grid, columns, image_starts_B)
        pivot_bias_BMN = pivots_bias(queries_M, window, pivots_BN[:, :seen], pivot_bias_BN[:, :seen])
        bias_B1MS = torch.cat([window_bias_BMS.expand(len(pivot_bias_BMN), -1, -1), pivot_bias_BMN], dim=2).unsqueeze(1)
        keys = torch.cat([*k_BHSK, k_BHNK[:, :, :seen]], dim=2)
        values = torch.cat([*v_BHSK, v_BHNK[:, :, :seen]], dim=2)
        return F.scaled_dot_product_attention(q_BHMK, keys, values, attn_mask=bias_B1MS.to(q_BHMK.dtype))

    outs = []
    for block, q_BHMK in enumerate(q_blocks):
        slices = slice(max(0, block - reach), block + 1)
        arguments = (block, q_BHMK, k_blocks[slices], v_blocks[slices])
        outs.append(checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outs, dim=2)


def _rows(x_BHTK: Tensor, pivots_BN: Tensor) -> Tensor:
    """Return the rows (B, H, N, K) at ``pivots_BN``, an arbitrary row for a missing pivot."""
    _, heads, _, size = x_BHTK.shape
    return x_BHTK.gather(2, pivots_BN.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, size))
