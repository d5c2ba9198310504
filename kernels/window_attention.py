"""CogView's sparse attention: a window of recent positions, and pivots that stand for what lies before it.

Super-resolution makes sequences long, and dense attention grows with the square of their length. Here each query sees
the ``window`` most recent positions, itself included, and of the positions before them only the pivots: the text, and
a random sample of the image whose scores are raised by log(s / n), so that n sampled positions weigh as much as the s
they were drawn from (as in the released CogView, arXiv:2105.13290). Cost grows with length times (window + pivots).

Of the window's keys in the query's own image one may keep a neighbourhood in the plane: columns near the query's, in
as many lines above as the window reaches back.

``window_attention`` is what a model calls. The reference with its mask over all pairs is the specification.
"""

# B batch, H heads, T positions (queries and keys), K size of a head, N pivots; M queries and S keys of a block
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cogview.kernels.attention import attention_reference
from cogview.kernels.dispatch import select_backend

BLOCK = 256  # queries that share a slice of keys in PyTorch's form


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
    """Causal attention to a window and to the pivots before it, (B, H, T, K); scores are scaled by 1 / sqrt(K).

    A query at t sees keys from t - ``window`` + 1 to t, and those ``pivots_BN`` (int64: positions, ascending and unique
    in a row, then -1 where a row has fewer) up to t - ``window``; ``pivot_bias_BN`` (float32, a constant, by default 0)
    is added to the scores of these (``sampled_pivots`` makes both).

    ``grid``, ``columns`` and ``image_starts_B`` (int64) go together. Positions from ``image_starts_B`` on are then an
    image in lines of ``grid``, and of these a query in the image sees only those in its window whose column differs
    from its own by at most ``columns``; a window of n ``grid`` + ``columns`` + 1 reaches n lines up. Earlier positions
    are seen as before, and so are pivots.

    ValueError for input that does not fit together; pivots and starts are looked at on a CPU only.
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


def sampled_pivots(
    text_lengths_B: Tensor, image_starts_B: Tensor, image_length: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Pivots (B, N) int64 and their bias (B, N) float32, made on the CPU beside the batch.

    They are all of a row's first ``text_lengths_B`` positions, with a bias of 0, and ``count`` of the ``image_length``
    from ``image_starts_B`` on, drawn without repetition, with log(image_length / count); N is ``count`` more than the
    longest text has.
    """
    if not 1 <= count <= image_length:
        raise ValueError(f"count must be from 1 to image_length = {image_length}, got {count}")
    if text_lengths_B.shape != image_starts_B.shape or bool((text_lengths_B > image_starts_B).any()):
        raise ValueError(
            f"image_starts_B must be at least text_lengths_B, row by row, got {image_starts_B.tolist()} and "
            f"{text_lengths_B.tolist()}"
        )
    noise = torch.rand(len(text_lengths_B), image_length, generator=generator)
    drawn_BN = noise.topk(count, dim=1).indices.sort(dim=1).values + image_starts_B.unsqueeze(1)
    longest = int(text_lengths_B.max())
    behind = int(image_starts_B.max()) + image_length
    text_BN = torch.arange(longest).expand(len(drawn_BN), longest)
    text_BN = text_BN.masked_fill(text_BN >= text_lengths_B.unsqueeze(1), behind)
    pivots_BN = torch.cat([text_BN, drawn_BN], dim=1).sort(dim=1).values
    bias_BN = torch.where(pivots_BN < image_starts_B.unsqueeze(1), 0.0, math.log(image_length / count))
    missing_BN = pivots_BN == behind
    return pivots_BN.masked_fill(missing_BN, -1), bias_BN.masked_fill(missing_BN, 0.0)


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
    """ValueError for what no implementation can compute."""
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
    if device.type == "cpu":  # on a GPU that would wait for the device: there the caller answers for the numbers
        missing_last_BN = torch.where(pivots_BN == -1, length + torch.arange(pivots_BN.shape[1]), pivots_BN)
        outside_B = ((pivots_BN < -1) | (pivots_BN >= length)).any(dim=1)
        wrong_B = outside_B | (missing_last_BN.diff(dim=1) <= 0).any(dim=1)
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


# --- what is seen --------------------------------------------------------------------------------------------------


def near_bias(
    query_M: Tensor, key_S: Tensor, window: int, grid: int | None, columns: int | None, image_starts_B: Tensor | None
) -> Tensor:
    """(B or 1, M, S) float32: 0 where the query at ``query_M`` sees ``key_S`` in its window, else -inf."""
    behind_MS = query_M.unsqueeze(1) - key_S
    seen_BMS = ((behind_MS >= 0) & (behind_MS < window)).unsqueeze(0)
    if grid is not None and columns is not None and image_starts_B is not None:
        key_column_BS = (key_S - image_starts_B.unsqueeze(1)) % grid
        query_column_BM = (query_M - image_starts_B.unsqueeze(1)) % grid
        apart_BMS = (query_column_BM.unsqueeze(2) - key_column_BS.unsqueeze(1)).abs()
        before_BS = key_S < image_starts_B.unsqueeze(1)
        seen_BMS = seen_BMS & ((apart_BMS <= columns) | before_BS.unsqueeze(1))
    return torch.zeros(seen_BMS.shape, device=seen_BMS.device).masked_fill(~seen_BMS, -torch.inf)


def pivots_bias(query_M: Tensor, window: int, pivots_BN: Tensor, pivot_bias_BN: Tensor) -> Tensor:
    """(B, M, N) float32: the bias of a pivot where it stands before the query's window, else -inf."""
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
    """(B, 1, T, T) float32: what ``window_attention`` adds to the scores of all pairs, -inf where a key is not seen."""
    positions_T = torch.arange(length, device=pivots_BN.device)
    pivot_bias_BN = torch.zeros(pivots_BN.shape, device=pivots_BN.device) if pivot_bias_BN is None else pivot_bias_BN
    near_BTT = near_bias(positions_T, positions_T, window, grid, columns, image_starts_B)
    far_BTN = pivots_bias(positions_T, window, pivots_BN, pivot_bias_BN)
    bias_BTT = near_BTT.expand(len(pivots_BN), -1, -1).contiguous()
    places_BTN = pivots_BN.clamp(min=0).unsqueeze(1).expand_as(far_BTN)  # a missing pivot is -inf: least of all
    return bias_BTT.scatter_reduce(2, places_BTN, far_BTN, "amax").unsqueeze(1)


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
    """Attention with PB-relax to all keys, under the mask of ``window_bias``: memory grows with the square of T."""
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
    """The same, a block of queries at a time against the keys that some of them see; equal in meaning.

    Time and memory grow with T: a block keeps nothing for its backward, which computes it again.
    """
    num_pivots = pivots_BN.shape[1]
    pivot_bias_BN = torch.zeros(pivots_BN.shape, device=q_BHTK.device) if pivot_bias_BN is None else pivot_bias_BN
    k_BHNK, v_BHNK = (_rows(x_BHTK, pivots_BN) for x_BHTK in (k_BHTK, v_BHTK))
    # The gradient of a slice is as large as what it was cut from; those of a split are put together once.
    q_blocks, k_blocks, v_blocks = (x_BHTK.split(BLOCK, dim=2) for x_BHTK in (q_BHTK, k_BHTK, v_BHTK))
    # Blocks before its own into which the window of some query reaches.
    reach = min(-(-(window - 1) // BLOCK), len(q_blocks) - 1)

    inside_M = torch.arange(reach * BLOCK, (reach + 1) * BLOCK, device=q_BHTK.device)
    inside_S = torch.arange((reach + 1) * BLOCK, device=q_BHTK.device)
    near_everywhere = near_bias(inside_M, inside_S, window, None, None, None)  # without an image blocks are all alike

    def attend(block: int, q_BHMK: Tensor, k_BHSK: Sequence[Tensor], v_BHSK: Sequence[Tensor]) -> Tensor:
        first, count = block * BLOCK, q_BHMK.shape[2]
        begin, end = max(0, block - reach) * BLOCK, first + count
        seen = min(num_pivots, max(0, end - window))  # at most: no two stand at one place
        queries_M = torch.arange(first, end, device=q_BHMK.device)
        if grid is None:
            behind = reach * BLOCK - first + begin
            near_BMS = near_everywhere[:, :count, behind : behind + end - begin]
        else:
            keys_S = torch.arange(begin, end, device=q_BHMK.device)
            near_BMS = near_bias(queries_M, keys_S, window, grid, columns, image_starts_B)
        far_BMN = pivots_bias(queries_M, window, pivots_BN[:, :seen], pivot_bias_BN[:, :seen])
        bias_B1MS = torch.cat([near_BMS.expand(len(far_BMN), -1, -1), far_BMN], dim=2).unsqueeze(1)
        keys = torch.cat([*k_BHSK, k_BHNK[:, :, :seen]], dim=2)
        values = torch.cat([*v_BHSK, v_BHNK[:, :, :seen]], dim=2)
        return F.scaled_dot_product_attention(q_BHMK, keys, values, attn_mask=bias_B1MS.to(q_BHMK.dtype))

    outs = []
    for block, q_BHMK in enumerate(q_blocks):
        slices = slice(max(0, block - reach), block + 1)
        given = (block, q_BHMK, k_blocks[slices], v_blocks[slices])
        outs.append(checkpoint(attend, *given, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outs, dim=2)


def _rows(x_BHTK: Tensor, pivots_BN: Tensor) -> Tensor:
    """(B, H, N, K): the lines at ``pivots_BN``, any line where one is missing."""
    _, heads, _, size = x_BHTK.shape
    return x_BHTK.gather(2, pivots_BN.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, size))
