"""Causal attention: all implementations against float64, and scores that overflow half precision."""

# B batch, H heads, T new positions (queries), S positions in all (keys), K size of a head

import math
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cogview.kernels.attention import (
    attention,
    attention_bias,
    attention_reference,
    attention_torch,
    dropout_mask,
)
from cogview.kernels.dispatch import select_backend

CPU = torch.device("cpu")
BFLOAT16 = pytest.param(torch.bfloat16, 3e-2, id="bfloat16")


def attention_triton(*inputs, **settings):
    """Run the kernels, in Triton's interpreter without a GPU."""
    from cogview.kernels import attention_triton as kernels

    if torch.cuda.is_available():
        inputs = [None if tensor is None else tensor.cuda() for tensor in inputs]
        settings = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in settings.items()}
    return kernels.attention_triton(*inputs, **settings).cpu()


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
triton = pytest.param(attention_triton, marks=needs_triton)
every = pytest.mark.parametrize("implementation", [attention_reference, attention_torch, triton])


def random_qkv(num_queries, num_keys, dtype=torch.float32, batch=2, heads=2, size=16):
    generator = torch.Generator().manual_seed(num_keys)
    lengths = (num_queries, num_keys, num_keys)
    return tuple(torch.randn(batch, heads, n, size, generator=generator).to(dtype) for n in lengths)


def skip_what_is_not_interpreted(implementation, dtype):
    if implementation is attention_triton and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter knows no bfloat16")


def bias_of(starts, num_queries, num_keys, dtype=torch.float32, weights=None):
    """Return the bias of the last queries of rows padded up to ``starts``, whose keys count ``weights`` times."""
    if starts is None and weights is None:
        return None
    key_bias = torch.zeros(len(starts), num_keys) if weights is None else weights.log()
    if starts is not None:
        key_bias = key_bias.masked_fill(torch.arange(num_keys) < starts[:, None], -torch.inf)
    queries = torch.arange(num_keys - num_queries, num_keys).expand(len(key_bias), -1)
    return attention_bias(key_bias.to(dtype), queries)


def expected_by_loops(q, k, v, starts=None, prefixes=None, lengths=None):
    """Return softmax attention in float64, query by query over a list of visible keys, without a mask."""
    q, k, v = q.double(), k.double(), v.double()
    offset, out = k.shape[2] - q.shape[2], torch.zeros_like(q)
    for row in range(len(q)):
        start, prefix = (0 if limit is None else int(limit[row]) for limit in (starts, prefixes))
        length = k.shape[2] if lengths is None else int(lengths[row])
        for query in range(q.shape[2]):
            position = offset + query
            seen = [key for key in range(start, length) if key <= position or key < prefix]
            seen = sorted({*seen, position})  # a padded query attends to itself alone
            scores = torch.einsum("hk,hsk->hs", q[row, :, query], k[row, :, seen]) / math.sqrt(q.shape[-1])
            out[row, :, query] = torch.einsum("hs,hsk->hk", scores.softmax(dim=-1), v[row, :, seen])
    return out


@cache
def random_case(num_queries, num_keys, dtype=torch.float32, batch=2, heads=2, limits=(None, None, None)):
    """Return q, k, v and what attention within ``limits`` must be, computed once for all implementations."""
    inputs = random_qkv(num_queries, num_keys, dtype, batch, heads)
    return *inputs, expected_by_loops(*inputs, *limits)


@pytest.fixture
def fresh_choice(monkeypatch):
    """Clear the cached choice of implementation before and after."""
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    select_backend.cache_clear()
    yield monkeypatch
    select_backend.cache_clear()


@every
@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [(1, 1), (1, 7), (7, 7), (3, 7), (65, 65), (9, 65), (1, 257), (257, 257)],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float16, 4e-3), BFLOAT16])
def test_attention_matches_float64(implementation, num_queries, num_keys, padded, dtype, atol):
    skip_what_is_not_interpreted(implementation, dtype)
    starts = (0, num_keys // 3) if padded else None
    heads = 1 if num_keys > 65 else 2
    q, k, v, expected = random_case(num_queries, num_keys, dtype, heads=heads, limits=(starts, None, None))
    bias = bias_of(torch.tensor(starts) if padded else None, num_queries, num_keys, dtype)
    result = implementation(q, k, v, bias)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=atol, rtol=0)


@every
def test_attention_matches_float64_when_sequences_are_long(implementation):
    q, k, v, expected = random_case(1089, 1089, batch=1, heads=1)
    torch.testing.assert_close(implementation(q, k, v).double(), expected, atol=2e-6, rtol=0)


@every
def test_attention_stays_finite_when_padding_reaches_new_positions(implementation):
    """The padding of a short row reaches into the queries, whose softmax must not be empty."""
    q, k, v = random_qkv(5, 7)
    starts = torch.tensor([0, 4])  # queries 2, 3 of the second row are padding
    result = implementation(q, k, v, bias_of(starts, 5, 7))
    torch.testing.assert_close(result.double(), expected_by_loops(q, k, v, starts), atol=2e-6, rtol=0)
    torch.testing.assert_close(result[1, :, :2], v[1, :, 2:4], atol=2e-6, rtol=0)  # each padded query attends to itself


@every
def test_attention_ignores_the_contents_of_padding(implementation):
    q, k, v = random_qkv(7, 7)
    bias = bias_of(torch.tensor([3, 0]), 7, 7)
    before = implementation(q, k, v, bias)
    k[0, :, :3], v[0, :, :3] = 100.0, -100.0
    torch.testing.assert_close(implementation(q, k, v, bias)[0, :, 3:], before[0, :, 3:], atol=0, rtol=0)


LIMITS = {
    "starts": {"left_padding_B": [0, 130]},
    "prefixes": {"prefix_lengths_B": [100, 0]},
    "no_prefix_and_all": {"prefix_lengths_B": [0, 131]},
    "lengths": {"lengths_B": [70, 131]},
    "all": {"left_padding_B": [3, 66], "prefix_lengths_B": [70, 68], "lengths_B": [100, 129]},
    "one_key": {"left_padding_B": [5, 7], "lengths_B": [6, 8]},
}


@every
@pytest.mark.parametrize("num_queries", [131, 3])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 3e-6), (torch.float16, 4e-3)])
def test_attention_sees_its_prefix_and_no_padding(implementation, limits, num_queries, dtype, atol):
    names = ("left_padding_B", "prefix_lengths_B", "lengths_B")
    numbers = tuple(tuple(limits[name]) if name in limits else None for name in names)
    q, k, v, expected = random_case(num_queries, 131, dtype, heads=1, limits=numbers)
    limits = {name: torch.tensor(numbers) for name, numbers in limits.items()}
    torch.testing.assert_close(implementation(q, k, v, **limits).double(), expected, atol=atol, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [attention_torch, triton])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (7, 7), (2, 7), (65, 65), (5, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_gradients_match_float64(implementation, num_queries, num_keys, padded, dtype):
    """The error is at most twice that of the reference in the same dtype."""
    given = random_qkv(num_queries, num_keys, dtype, heads=1 if num_keys > 7 else 2)
    bias = bias_of(torch.tensor([0, num_keys // 3]) if padded else None, num_queries, num_keys, torch.float64)
    exact = gradients_of(attention_reference, given, torch.float64, bias)
    same = gradients_of(attention_reference, given, dtype, None if bias is None else bias.to(dtype))
    found = gradients_of(implementation, given, dtype, None if bias is None else bias.to(dtype))
    assert_as_exact(found, same, exact, dtype)


@pytest.mark.parametrize("implementation", [attention_torch, triton])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_attention_gradients_match_float64_when_rows_are_limited(implementation, limits):
    given = random_qkv(130, 131, heads=1)
    limits = {name: torch.tensor(numbers) for name, numbers in limits.items()}
    exact = gradients_of(attention_reference, given, torch.float64, **limits)
    same = gradients_of(attention_reference, given, torch.float32, **limits)
    assert_as_exact(gradients_of(implementation, given, torch.float32, **limits), same, exact, torch.float32)


def gradients_of(implementation, given, dtype, *bias, **settings):
    inputs = [tensor.to(dtype).requires_grad_() for tensor in given]
    out = implementation(*inputs, *bias, **settings)
    weights = torch.arange(out.numel(), dtype=torch.float64).view_as(out).sin().to(dtype)  # all different
    return torch.autograd.grad((out * weights).sum(), inputs)


def assert_as_exact(found, same, exact, dtype):
    for got, other, wanted in zip(found, same, exact, strict=True):
        allowed = 2 * (other.double() - wanted).abs().max() + 8 * torch.finfo(dtype).eps
        assert got.dtype == dtype
        assert (got.double() - wanted).abs().max() <= allowed


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("starts", [None, torch.tensor([2])])
def test_attention_does_not_overflow_when_scores_are_a_million(implementation, dtype, starts):
    """Keys 3 and 9 share the largest product, 2**20; the product itself would be infinite in float16."""
    skip_what_is_not_interpreted(implementation, dtype)
    q = torch.full((1, 1, 65, 64), 128.0, dtype=dtype)
    k = torch.full((1, 1, 65, 64), 127.0, dtype=dtype)
    k[:, :, [3, 9]] = 128.0
    v = torch.randn(1, 1, 65, 64, generator=torch.Generator().manual_seed(0)).to(dtype)

    plain = (q @ k.transpose(-1, -2)) / 8.0
    if dtype == torch.float16:
        assert plain.isinf().all()
        assert plain.softmax(dim=-1).isnan().all()  # the case that PB-relax prevents

    result = implementation(q, k, v, bias_of(starts, 65, 65, dtype))
    assert result.isfinite().all()
    assert torch.equal(result[0, 0, 3:9], v[0, 0, 3].expand(6, 64))  # until key 9 is visible, key 3 has all the weight
    halves = (v[0, 0, 3].double() + v[0, 0, 9].double()) / 2
    torch.testing.assert_close(result[0, 0, 9:].double(), halves.expand(56, 64), atol=8e-3, rtol=0)


@every
def test_attention_does_not_overflow_when_scores_are_minus_a_million(implementation):
    q = torch.full((1, 1, 3, 64), -128.0, dtype=torch.float16)
    k = torch.full((1, 1, 3, 64), 128.0, dtype=torch.float16)
    k[:, :, 1] = 127.0  # least negative
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16).view(1, 1, 3, 1).expand(1, 1, 3, 64)
    assert implementation(q, k, v)[0, 0, :, 0].tolist() == [1.0, 2.0, 2.0]


def test_attention_bias_masks_later_keys_and_padding():
    no = -torch.inf
    key_bias = torch.tensor([[0.0, 0.5, 0, 0], [no, 0, 0, 0], [no, no, no, 0]])
    assert attention_bias(key_bias, torch.tensor([[2, 3], [2, 3], [2, 3]])).squeeze(1).tolist() == [
        [[0, 0.5, 0, no], [0, 0.5, 0, 0]],
        [[no, 0, 0, no], [no, 0, 0, 0]],
        [[no, no, 0, no], [no, no, no, 0]],  # the first query is padding, and attends to itself alone
    ]
    assert attention_bias(torch.zeros(2, 3), torch.tensor([[0], [1]])).squeeze(1).tolist() == [
        [[0, no, no]],
        [[0, 0, no]],
    ]


def test_attention_raises_value_error_when_queries_outnumber_keys():
    q, _, _ = random_qkv(4, 4)
    _, k, v = random_qkv(3, 3)
    with pytest.raises(ValueError, match="4 queries cannot be the last of 3 keys"):
        attention(q, k, v)


@every
@pytest.mark.parametrize("num_queries", [1, 4, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_counts_a_key_w_times_when_its_bias_is_log_w(implementation, num_queries, padded):
    """The expected value is softmax attention over repeated keys and values."""
    q, k, v = random_qkv(num_queries, 9)
    starts = torch.tensor([0, 2]) if padded else None
    weights = torch.tensor([[1, 3, 2, 1, 1, 1, 1, 1, 1], [1, 1, 1, 5, 1, 1, 2, 1, 1]])
    result = implementation(q, k, v, bias_of(starts, num_queries, 9, weights=weights))
    for row in range(2):
        for query in range(num_queries):
            position = 9 - num_queries + query
            first = 0 if starts is None else min(int(starts[row]), position)
            counts = weights[row, first : position + 1]
            keys, values = (x[row : row + 1, :, first : position + 1].repeat_interleave(counts, dim=2) for x in (k, v))
            expected = expected_by_loops(q[row : row + 1, :, query : query + 1], keys, values)
            torch.testing.assert_close(result[row, :, query].double(), expected[0, :, 0], atol=2e-6, rtol=0)


@every
@pytest.mark.parametrize("size", [32, 40, 64, 128])
def test_attention_accepts_any_head_size_and_strides(implementation, size):
    """The model passes slices of one projection, and of a longer cache."""
    generator = torch.Generator().manual_seed(size)
    qkv = torch.randn(1, 65, 3, 2, size, generator=generator).permute(2, 0, 3, 1, 4)
    longer = torch.randn(2, 1, 2, 80, size, generator=generator)
    for q, k, v in (qkv, (qkv[0][:, :, :3], longer[0, :, :, :65], longer[1, :, :, 10:75])):
        assert not k.is_contiguous()
        torch.testing.assert_close(implementation(q, k, v).double(), expected_by_loops(q, k, v), atol=4e-6, rtol=0)
    exact = gradients_of(attention_reference, qkv, torch.float64)
    same = gradients_of(attention_reference, qkv, torch.float32)
    assert_as_exact(gradients_of(implementation, qkv, torch.float32), same, exact, torch.float32)


@every
def test_attention_dropout_is_a_function_of_seed_and_position(implementation):
    """With queries of zeros all weights of a query are equal, and one-hot values show which are kept."""
    q, k, v = torch.zeros(2, 2, 64, 64), torch.zeros(2, 2, 64, 64), torch.eye(64).expand(2, 2, 64, 64)
    left = implementation(q, k, v, dropout=0.25, seed=7)
    seen = torch.ones(64, 64).tril()
    kept = (left > 0) * seen
    assert torch.equal(left > 0, dropout_mask(left.shape, 0.25, 7, CPU) * seen > 0)
    assert kept.sum() / (4 * seen.sum()) == pytest.approx(0.75, abs=0.02)
    expected = kept / 0.75 / torch.arange(1, 65).view(64, 1)
    torch.testing.assert_close(left, expected, atol=1e-6, rtol=0)
    assert len({tuple(head.flatten().tolist()) for head in left.flatten(0, 1)}) == 4  # every head drops others
    assert torch.equal(left, implementation(q, k, v, dropout=0.25, seed=7))
    assert not torch.equal(left, implementation(q, k, v, dropout=0.25, seed=8))


@pytest.mark.parametrize("implementation", [triton])
def test_attention_gradients_match_the_reference_when_weights_are_dropped(implementation):
    given = random_qkv(65, 65, heads=1)
    exact = gradients_of(attention_reference, given, torch.float64, dropout=0.3, seed=-5)
    same = gradients_of(attention_reference, given, torch.float32, dropout=0.3, seed=-5)
    found = gradients_of(implementation, given, torch.float32, dropout=0.3, seed=-5)
    assert_as_exact(found, same, exact, torch.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of the overflow
@needs_triton
@pytest.mark.parametrize("sign", [1, -1])
def test_attention_triton_does_not_overflow_when_accumulating_in_float16(sign):
    """Without PB-relax everything is NaN; with it the result is near float64, and gradients are finite."""
    generator = torch.Generator().manual_seed(0)
    q = torch.full((1, 1, 70, 64), 352.0, dtype=torch.float16)
    k = sign * torch.full((1, 1, 70, 64), 352.0, dtype=torch.float16)  # 64 * 352**2 / 8 is 991,232
    k[:, :, 1::2] *= 0.5
    v = torch.randn(1, 1, 70, 64, generator=generator).half()
    assert attention_triton(q, k, v, accumulate_dtype="float16", relaxed=False).isnan().any()
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    result = attention_triton(*inputs, accumulate_dtype="float16")
    torch.testing.assert_close(result.double(), expected_by_loops(q, k, v), atol=4e-3, rtol=0)
    for gradient in torch.autograd.grad(result.sum(), inputs):
        assert gradient.isfinite().all()


@needs_triton
def test_attention_triton_is_near_float64_when_accumulating_in_float16():
    q, k, v = random_qkv(131, 131, torch.float16, size=64)
    result = attention_triton(q, k, v, accumulate_dtype="float16")
    torch.testing.assert_close(result.double(), expected_by_loops(q, k, v), atol=1e-2, rtol=0)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")
def test_attention_triton_rejects_bfloat16_when_interpreted():
    with pytest.raises(ValueError, match="q_BHTK is bfloat16, which Triton's interpreter silently computes wrongly"):
        attention_triton(*random_qkv(7, 7, torch.bfloat16))


@pytest.mark.slow
@needs_triton
def test_attention_triton_passes_the_checks_of_custom_operators(device):
    from cogview.kernels.attention_triton import _attend
    from cogview.kernels.attention_triton import attention_triton as kernels

    q, k, v = (tensor.to(device).requires_grad_() for tensor in random_qkv(5, 5, heads=1))
    limits = torch.tensor([[0, 3], [2, 0], [5, 4]], device=device)
    torch.library.opcheck(_attend, (q, k, v, limits, None, 0.25, 3, False, True), rtol=1e-4, atol=1e-5)

    plain = torch.autograd.grad(kernels(q, k, v).square().sum(), (q, k, v))
    compiled = torch.compile(kernels, backend="aot_eager", fullgraph=True)
    again = torch.autograd.grad(checkpoint(kernels, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    for one, two, three in zip(
        plain, torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v)), again, strict=True
    ):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("implementation", [attention, triton])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q_BHTK": torch.zeros(2, 7, 16)}, r"q_BHTK must be \(B, H, T, K\), got \(2, 7, 16\)"),
        ({"k_BHSK": torch.zeros(2, 2, 9, 8)}, r"k_BHSK must have the shape \(2, 2, 9, 16\), got \(2, 2, 9, 8\)"),
        ({"v_BHSK": torch.zeros(2, 2, 8, 16)}, r"v_BHSK must have the shape \(2, 2, 9, 16\), got \(2, 2, 8, 16\)"),
        (
            {"v_BHSK": torch.zeros(2, 2, 9, 16).half()},
            r"v_BHSK must be torch.float32 on cpu as q is, got torch.float16",
        ),
        (
            {"v_BHSK": torch.zeros(2, 2, 9, 16, device="meta")},
            r"v_BHSK must be torch.float32 on cpu as q is, got .* meta",
        ),
        ({"q_BHTK": torch.zeros(2, 2, 10, 16)}, "10 queries cannot be the last of 9 keys"),
        ({"left_padding_B": torch.tensor([0, 9])}, r"left_padding_B must be from 0 to 8, got \[0, 9\]"),
        ({"prefix_lengths_B": torch.tensor([-1, 9])}, r"prefix_lengths_B must be from 0 to 9, got \[-1, 9\]"),
        ({"lengths_B": torch.tensor([10, 9])}, r"lengths_B must be from 0 to 9, got \[10, 9\]"),
        ({"left_padding_B": torch.tensor([0])}, r"left_padding_B must be int64 \(2,\) on cpu, got torch.int64 \(1,\)"),
        (
            {"left_padding_B": torch.tensor([0.0, 1.0])},
            r"left_padding_B must be int64 \(2,\) on cpu, got torch.float32",
        ),
        ({"bias_B1TS": torch.zeros(2, 1, 7, 8), "dropout": 0.5}, r"bias_B1TS must be \(2 or 1, 1, 7 or 1, 9\) on cpu"),
        (
            {"bias_B1TS": torch.zeros(2, 1, 7, 9), "left_padding_B": torch.tensor([0, 0])},
            "left_padding_B and bias_B1TS were both given",
        ),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        (
            {"dropout": 0.1, "accumulate_dtype": "bfloat16"},
            "accumulate_dtype must be float32 or float16, got 'bfloat16'",
        ),
        (
            {"dropout": 0.1, "accumulate_dtype": "float16"},
            "accumulate_dtype=float16 is for float16, got q_BHTK in torch.float32",
        ),
    ],
)
def test_attention_raises_value_error_when_inputs_do_not_fit(implementation, changed, message):
    if implementation is attention and not {"left_padding_B", "prefix_lengths_B", "lengths_B", "dropout"} & set(
        changed
    ):
        changed = changed | {"dropout": 0.1}  # otherwise PyTorch checks
    q, k, v = random_qkv(7, 9)
    with pytest.raises(ValueError, match=message):
        implementation(**{"q_BHTK": q, "k_BHSK": k, "v_BHSK": v} | changed)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        (torch.float32, 8, "q_BHTK must have heads of 16 to 128, got 8"),
        (torch.float32, 256, "q_BHTK must have heads of 16 to 128, got 256"),
        (torch.float64, 16, "q_BHTK must be float32, float16 or bfloat16, got torch.float64"),
    ],
)
def test_attention_triton_raises_value_error_for_unsupported_heads_and_dtypes(dtype, size, message):
    with pytest.raises(ValueError, match=message):
        attention_triton(*random_qkv(7, 9, dtype, size=size))
