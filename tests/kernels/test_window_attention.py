"""Window attention with pivots: all implementations against float64, key by key."""

# B batch, H heads, T positions, K size of a head, N pivots

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from cogview.kernels.dispatch import select_backend
from cogview.kernels.window_attention import (
    BLOCK,
    window_attention,
    window_attention_reference,
    window_attention_torch,
    window_bias,
)

triton = pytest.importorskip("triton", reason="the Triton kernel is one of the implementations")

from cogview.kernels.window_attention_triton import window_attention_triton  # noqa: E402

IMPLEMENTATIONS = [window_attention_reference, window_attention_torch, window_attention_triton]
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@dataclass
class Case:
    """An attention pattern: pivots of each row, their bias, and optionally a neighbourhood."""

    length: int
    window: int
    pivots: list[list[int]]
    local: tuple[int, int, list[int]] | None = None

    def keywords(self, device):
        pivots = torch.tensor(self.pivots, dtype=torch.int64).reshape(2, -1)
        bias = 0.5 * torch.arange(pivots.numel()).view(pivots.shape).sin() + 0.4
        keywords = {"window": self.window, "pivots_BN": pivots.to(device), "pivot_bias_BN": bias.to(device)}
        if self.local:
            grid, columns, starts = self.local
            keywords |= {"grid": grid, "columns": columns, "image_starts_B": torch.tensor(starts).to(device)}
        return keywords


CASES = {
    "one position": Case(1, 1, [[0], [-1]]),
    "seven, no pivots": Case(7, 3, [[], []]),
    "seven, each sees itself and pivots": Case(7, 1, [[0, 2, 3], [1, 6, -1]]),
    "a window longer than all": Case(65, 1000, [[0, 5, 64], [3, 4, 5]]),
    "blocks that need no mask": Case(257, 150, [[*range(0, 80, 2)], [*range(20, 55), *[-1] * 5]]),
    "pivots in several blocks": Case(257, 40, [[*range(0, 257, 3)], [*range(70), *[-1] * 16]]),
    "neighbourhood": Case(65, 17, [[0, 1, 2, 9, 30], [1, 3, 40, -1, -1]], (8, 0, [5, 30])),
    "neighbourhood over blocks": Case(257, 69, [[0, 1, 90], [2, 7, -1]], (32, 4, [3, 257])),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def random_inputs(case, device, dtype=torch.float32, heads=1, size=16):
    """Return q, k, v and the gradient of the output; all are non-contiguous views, as of a projection."""
    generator = torch.Generator().manual_seed(case.length)
    tensors = torch.randn(2, case.length, 4, heads, size, generator=generator).to(device, dtype)
    return [tensor.transpose(1, 2) for tensor in tensors.unbind(2)]


def seen_by(case, row, query):
    """Return {key: bias} of all keys that a query attends to, key by key."""
    bias = case.keywords("cpu")["pivot_bias_BN"][row].tolist()
    seen = {}
    for key in range(query + 1):
        if query - key < case.window:
            hidden = False
            if case.local:
                grid, columns, starts = case.local
                start = starts[row]
                hidden = key >= start and abs((query - start) % grid - (key - start) % grid) > columns
            if not hidden:
                seen[key] = 0.0
        elif key in case.pivots[row]:
            seen[key] = bias[case.pivots[row].index(key)]
    return seen


def expected_in_float64(case, q, k, v, d_out):
    """Return output and gradients of softmax attention of each query over a list of keys, without a mask."""
    q, k, v = (x.detach().double().cpu().requires_grad_() for x in (q, k, v))
    rows = []
    for row in range(2):
        outs = []
        for query in range(case.length):
            seen = seen_by(case, row, query)
            keys = list(seen)
            scores = torch.einsum("hk,hsk->hs", q[row, :, query], k[row, :, keys]) / math.sqrt(q.shape[-1])
            weights = (scores + torch.tensor(list(seen.values()))).softmax(dim=-1)
            outs.append(torch.einsum("hs,hsk->hk", weights, v[row, :, keys]))
        rows.append(torch.stack(outs, dim=1))
    out = torch.stack(rows)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out.double().cpu())]


def computed(implementation, q, k, v, d_out, **keywords):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = implementation(q, k, v, **keywords)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)]


def errors(results, expected):
    """Return the largest error of the output and of each gradient."""
    return [(x.double().cpu() - y).abs().max().item() for x, y in zip(results, expected, strict=True)]


@every_case
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
def test_window_attention_matches_float64(implementation, case):
    inputs = random_inputs(case, "cpu")
    keywords = case.keywords("cpu")
    expected = expected_in_float64(case, *inputs)
    assert max(errors(computed(implementation, *inputs, **keywords), expected)) < 1e-5


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_window_attention_triton_is_as_near_to_float64_as_pytorch(case, dtype, device):
    inputs = random_inputs(case, device, dtype)
    expected = expected_in_float64(case, *inputs)
    floor = 2e-6 if dtype == torch.float32 else 1e-3  # the difference d_out v - d_out out is of numbers near 10
    ours, theirs = (
        errors(computed(implementation, *inputs, **case.keywords(device)), expected)
        for implementation in (window_attention_triton, window_attention_reference)
    )
    for name, error, other in zip(("out", "d_q", "d_k", "d_v"), ours, theirs, strict=True):
        assert error <= 2 * other + floor, f"{name}: {error} instead of {other}"


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize(("heads", "size"), [(3, 32), (1, 40), (1, 128)])
def test_window_attention_accepts_any_number_and_size_of_heads(implementation, heads, size, device):
    case = Case(65, 9, [[0, 3, 20], [5, 6, -1]], (8, 2, [5, 30]))
    inputs = random_inputs(case, device, heads=heads, size=size)
    expected = expected_in_float64(case, *inputs)
    assert max(errors(computed(implementation, *inputs, **case.keywords(device)), expected)) < 1e-5


def test_window_attention_torch_does_not_depend_on_the_block_size():
    """The implementation of PyTorch has several blocks, and a window that reaches over more than two."""
    length = 3 * BLOCK + 19
    case = Case(length, BLOCK + 9, [[*range(0, length, 7)], [*range(0, length // 2, 7)] + [-1] * 56])
    case.pivots[1] = case.pivots[1][: len(case.pivots[0])]
    keywords = case.keywords("cpu")
    for local in ({}, {"grid": 16, "columns": 3, "image_starts_B": torch.tensor([50, 300])}):
        inputs = [x.double() for x in random_inputs(case, "cpu")]
        bias = window_bias(length, **keywords, **local).double()
        expected = computed(partial(F.scaled_dot_product_attention, attn_mask=bias), *inputs)
        assert max(errors(computed(window_attention_torch, *inputs, **keywords, **local), expected)) < 1e-6


def test_window_bias_masks_keys_outside_window_and_pivots():
    no, pivots = -torch.inf, torch.tensor([[0, 1, 4], [2, -1, -1]])
    bias = window_bias(5, window=2, pivots_BN=pivots, pivot_bias_BN=torch.tensor([[0.5, 0.25, 9.0], [2.0, 9.0, 9.0]]))
    assert bias.squeeze(1).tolist() == [
        [[0, no, no, no, no], [0, 0, no, no, no], [0.5, 0, 0, no, no], [0.5, 0.25, 0, 0, no], [0.5, 0.25, no, 0, 0]],
        [[0, no, no, no, no], [0, 0, no, no, no], [no, 0, 0, no, no], [no, no, 0, 0, no], [no, no, 2, 0, 0]],
    ]


def test_window_bias_masks_distant_columns_of_the_image():
    """Two text tokens, then rows of 3 codes; columns at most 1 apart, and 4 positions back: the row above."""
    no, none = -torch.inf, torch.empty(1, 0, dtype=torch.int64)
    bias = window_bias(8, window=5, pivots_BN=none, grid=3, columns=1, image_starts_B=torch.tensor([2]))
    assert bias[0, 0].tolist() == [
        [0, no, no, no, no, no, no, no],
        [0, 0, no, no, no, no, no, no],
        [0, 0, 0, no, no, no, no, no],
        [0, 0, 0, 0, no, no, no, no],
        [0, 0, no, 0, 0, no, no, no],
        [no, 0, 0, 0, no, 0, no, no],  # first code of a row: the end of the row above is distant, its start is not
        [no, no, 0, 0, 0, 0, 0, no],
        [no, no, no, 0, 0, no, 0, 0],
    ]


@every
def test_window_attention_is_causal_attention_when_every_key_is_a_pivot(implementation, device):
    case = Case(40, 5, [[*range(40)]] * 2)
    inputs = random_inputs(case, device)
    result = computed(implementation, *inputs, window=5, pivots_BN=case.keywords(device)["pivots_BN"])
    expected = computed(partial(F.scaled_dot_product_attention, is_causal=True), *inputs)
    assert max(errors(result, [x.double().cpu() for x in expected])) < 1e-5


@every
def test_window_attention_weighs_sampled_pivots_as_the_whole_image(implementation, device):
    """If the 4 positions of a group are equal, one of them with a bias of log 4 gives the same result."""
    q, k, v, _ = random_inputs(Case(70, 1, []), device)
    group = torch.arange(70, device=device).clamp(max=64) // 4 * 4
    k, v = k[:, :, group], v[:, :, group]
    all_BN = torch.arange(64, device=device).expand(2, -1)
    one_BN = torch.arange(2, 64, 4, device=device).expand(2, -1)
    bias_BN = torch.full(one_BN.shape, math.log(4), device=device)
    ours = implementation(q, k, v, window=3, pivots_BN=one_BN, pivot_bias_BN=bias_BN)[:, :, 67:]
    torch.testing.assert_close(ours, window_attention_reference(q, k, v, window=3, pivots_BN=all_BN)[:, :, 67:])


@every
def test_window_attention_does_not_overflow_when_scores_are_large(implementation, device):
    """Products of 2**20 in float16, in the window and among the pivots: the largest has all the weight."""
    q, k = (torch.full((1, 1, 70, 64), 128.0, dtype=torch.float16, device=device) for _ in range(2))
    k *= 127 / 128
    k[:, :, [3, 60]] = 128.0
    v = torch.randn(1, 1, 70, 64, generator=torch.Generator().manual_seed(0)).to(k)
    result = implementation(q, k, v, window=20, pivots_BN=torch.tensor([[1, 3]], device=device))
    assert torch.equal(result[0, 0, 30:60], v[0, 0, 3].expand(30, 64))
    halves = (v[0, 0, 3].float() + v[0, 0, 60].float()) / 2
    torch.testing.assert_close(result[0, 0, 60:].float(), halves.expand(10, 64), atol=2e-3, rtol=0)


def test_window_attention_triton_is_the_same_without_pb_relax(device):
    case = CASES["neighbourhood"]
    inputs = random_inputs(case, device)
    plain = computed(window_attention_triton, *inputs, **case.keywords(device), relaxed=False)
    relaxed = computed(window_attention_triton, *inputs, **case.keywords(device))
    assert max(errors(plain, [x.double().cpu() for x in relaxed])) < 2e-6


def test_window_attention_triton_has_deterministic_gradients(device):
    case = CASES["seven, each sees itself and pivots"]
    inputs = random_inputs(case, device)
    first, second = (computed(window_attention_triton, *inputs, **case.keywords(device)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_window_attention_triton_passes_the_checks_of_custom_operators(device):
    q, k, v, _ = (x.detach().requires_grad_() for x in random_inputs(CASES["one position"], device))
    keywords = Case(1, 1, [[0], [-1]], (3, 1, [0, 1])).keywords(device)
    pattern = (keywords["pivots_BN"], keywords["pivot_bias_BN"], keywords["image_starts_B"], 1, 3, 1, True)
    torch.library.opcheck(torch.ops.cogview.window_attention.default, (q, k, v, *pattern))


@pytest.mark.parametrize("forced", [None, "reference", "torch", "triton"])
def test_window_attention_follows_the_environment(forced, monkeypatch, device):
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    if forced:
        monkeypatch.setenv("COGVIEW_KERNELS", forced)
    used = dict(zip(("reference", "torch", "triton"), IMPLEMENTATIONS, strict=True))[forced or "torch"]
    case = CASES["neighbourhood"]
    q, k, v, _ = random_inputs(case, device)
    select_backend.cache_clear()
    try:
        result = window_attention(q, k, v, **case.keywords(device))
    finally:
        select_backend.cache_clear()
    assert torch.equal(result, used(q, k, v, **case.keywords(device)))


GOOD = CASES["neighbourhood"].keywords("cpu")
BAD = {
    "(1, 65, 16)": (
        {"q_BHTK": torch.zeros(1, 65, 16)},
        r"q_BHTK must be \(B, H, T, K\) and not empty, got \(1, 65, 16\)",
    ),
    "k": ({"k_BHTK": torch.zeros(2, 1, 64, 16)}, r"k_BHTK must be torch.float32 \(2, 1, 65, 16\) on cpu as q_BHTK is"),
    "v": ({"v_BHTK": torch.zeros(2, 1, 65, 16).half()}, "v_BHTK must be torch.float32 .* got torch.float16"),
    "window": ({"window": 0}, "window must be at least 1, got 0"),
    "int32": (
        {"pivots_BN": torch.zeros(2, 5).int()},
        r"pivots_BN must be int64 \(2, N\) on cpu, got torch.int32 \(2, 5\)",
    ),
    "not ascending": (
        {"pivots_BN": torch.tensor([[0, 1, 2, 3, 4], [0, 2, 2, 3, 4]])},
        r"pivots_BN must ascend from 0 to 64 without repetition and end in -1, got \[0, 2, 2, 3, 4\] in row 1",
    ),
    "missing first": (
        {"pivots_BN": torch.tensor([[-1, 0, 1, 2, 3]] * 2)},
        r"end in -1, got \[-1, 0, 1, 2, 3\] in row 0",
    ),
    "too far": (
        {"pivots_BN": torch.tensor([[0, 1, 2, 3, 65]] * 2)},
        r"from 0 to 64 .* got \[0, 1, 2, 3, 65\] in row 0",
    ),
    "negative": ({"pivots_BN": torch.tensor([[-2, 1, 2, 3, 5]] * 2)}, r"from 0 to 64 .* got \[-2, 1, 2, 3, 5\]"),
    "bias": (
        {"pivot_bias_BN": torch.zeros(2, 5, requires_grad=True)},
        r"pivot_bias_BN must be float32 \(2, 5\) on cpu and a constant, got torch.float32 .* requires_grad=True",
    ),
    "grid": ({"grid": None}, "grid, columns and image_starts_B go together, got None, 0 and a tensor"),
    "columns": ({"columns": 8}, "columns must be from 0 to grid - 1 = 7, got 8"),
    "starts": (
        {"image_starts_B": torch.zeros(3).long()},
        r"image_starts_B must be int64 \(2,\) on cpu, got torch.int64 \(3,\)",
    ),
    "starts too far": (
        {"image_starts_B": torch.tensor([0, 66])},
        r"image_starts_B must be from 0 to 65, got \[0, 66\]",
    ),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_window_attention_raises_value_error_when_inputs_do_not_fit(changed, message):
    q = torch.zeros(2, 1, 65, 16)
    with pytest.raises(ValueError, match=message):
        window_attention(**{"q_BHTK": q, "k_BHTK": q, "v_BHTK": q} | GOOD | changed)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 1, 65, 16).double(), "q_BHTK must be float32, float16 or bfloat16, got torch.float64"),
        (torch.zeros(2, 1, 65, 8), "q_BHTK must have heads of 16 to 128, got 8"),
    ],
)
def test_window_attention_triton_raises_value_error_when_inputs_are_unsupported(tensor, message):
    if torch.cuda.is_available():
        pytest.skip("of tensors on a CPU")
    with pytest.raises(ValueError, match=message):
        window_attention_triton(tensor, tensor, tensor, **GOOD)
