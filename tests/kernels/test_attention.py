"""Causal attention: both implementations against float64, and scores that overflow half precision."""

# B batch, H heads, T new positions (queries), S positions in all (keys), K size of a head

import logging
import math

import pytest
import torch

from cogview.kernels import attention as module
from cogview.kernels.attention import (
    attention,
    attention_bias,
    attention_int8,
    attention_reference,
    attention_shared,
    attention_torch,
    quantize_per_position,
)

both = pytest.mark.parametrize("implementation", [attention_reference, attention_torch])


def random_qkv(num_queries, num_keys, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(num_keys)
    return tuple(torch.randn(batch, 2, n, 16, generator=generator).to(dtype) for n in (num_queries, num_keys, num_keys))


def bias_of(starts, num_queries, num_keys, dtype=torch.float32, weights=None):
    """The bias of the last queries of rows padded up to ``starts``, whose keys count ``weights`` times."""
    if starts is None and weights is None:
        return None
    key_bias = torch.zeros(len(starts), num_keys) if weights is None else weights.log()
    if starts is not None:
        key_bias = key_bias.masked_fill(torch.arange(num_keys) < starts[:, None], -torch.inf)
    queries = torch.arange(num_keys - num_queries, num_keys).expand(len(key_bias), -1)
    return attention_bias(key_bias.to(dtype), queries)


def expected_by_loops(q, k, v, starts=None):
    """Plain softmax attention in float64, a query at a time, without a mask: each sees a slice of the keys."""
    q, k, v = q.double(), k.double(), v.double()
    offset, out = k.shape[2] - q.shape[2], torch.zeros_like(q)
    for row in range(len(q)):
        start = 0 if starts is None else int(starts[row])
        for query in range(q.shape[2]):
            place = offset + query
            seen = slice(min(start, place), place + 1)  # a padded query sees itself alone
            scores = torch.einsum("hk,hsk->hs", q[row, :, query], k[row, :, seen]) / math.sqrt(q.shape[-1])
            out[row, :, query] = torch.einsum("hs,hsk->hk", scores.softmax(dim=-1), v[row, :, seen])
    return out


@pytest.fixture
def fresh_choice(monkeypatch):
    """The choice of implementation is remembered for the life of a process: forget it before and after."""
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    module.chosen_implementation.cache_clear()
    yield monkeypatch
    module.chosen_implementation.cache_clear()


@both
@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [(1, 1), (1, 7), (7, 7), (3, 7), (65, 65), (9, 65), (1, 257), (257, 257)],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_matches_float64(implementation, num_queries, num_keys, padded, dtype, atol):
    q, k, v = random_qkv(num_queries, num_keys, dtype)
    starts = torch.tensor([0, num_keys // 3]) if padded else None
    result = implementation(q, k, v, bias_of(starts, num_queries, num_keys, dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected_by_loops(q, k, v, starts), atol=atol, rtol=0)


@both
def test_matches_float64_over_a_whole_training_sequence(implementation):
    q, k, v = random_qkv(1089, 1089, batch=1)
    torch.testing.assert_close(implementation(q, k, v).double(), expected_by_loops(q, k, v), atol=2e-6, rtol=0)


@both
def test_padding_into_the_new_positions_stays_finite(implementation):
    """A short row beside a long prompt: its padding reaches into the queries, whose softmax must not be empty."""
    q, k, v = random_qkv(5, 7)
    starts = torch.tensor([0, 4])  # queries 2, 3 of the second row are padding
    result = implementation(q, k, v, bias_of(starts, 5, 7))
    torch.testing.assert_close(result.double(), expected_by_loops(q, k, v, starts), atol=2e-6, rtol=0)
    torch.testing.assert_close(result[1, :, :2], v[1, :, 2:4], atol=2e-6, rtol=0)  # each padded query sees itself


@both
def test_what_is_padding_changes_nothing(implementation):
    q, k, v = random_qkv(7, 7)
    bias = bias_of(torch.tensor([3, 0]), 7, 7)
    before = implementation(q, k, v, bias)
    k[0, :, :3], v[0, :, :3] = 100.0, -100.0
    torch.testing.assert_close(implementation(q, k, v, bias)[0, :, 3:], before[0, :, 3:], atol=0, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(7, 7), (2, 7)])
def test_gradients_of_the_fast_path_are_the_reference_s(num_queries, num_keys, padded):
    bias = bias_of(torch.tensor([0, 2]) if padded else None, num_queries, num_keys, torch.float64)
    gradients = []
    for implementation in (attention_reference, attention_torch):
        inputs = [tensor.double().requires_grad_() for tensor in random_qkv(num_queries, num_keys)]
        out = implementation(*inputs, bias)
        weights = torch.arange(out.numel(), dtype=torch.float64).view_as(out).sin()  # no two outputs count the same
        gradients.append(torch.autograd.grad((out * weights).sum(), inputs))
    for reference, fast in zip(*gradients, strict=True):
        assert reference.abs().max() > 0.1
        torch.testing.assert_close(fast, reference, atol=1e-6, rtol=1e-5)  # the reference has its scores in float32


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("starts", [None, torch.tensor([2])])
def test_scores_of_a_million_do_not_overflow(implementation, dtype, starts):
    """Keys 3 and 9 share the largest product, 2**20; the product itself would be infinite in float16."""
    q = torch.full((1, 1, 65, 64), 128.0, dtype=dtype)
    k = torch.full((1, 1, 65, 64), 127.0, dtype=dtype)
    k[:, :, [3, 9]] = 128.0
    v = torch.randn(1, 1, 65, 64, generator=torch.Generator().manual_seed(0)).to(dtype)

    plain = (q @ k.transpose(-1, -2)) / 8.0
    if dtype == torch.float16:
        assert plain.isinf().all()
        assert plain.softmax(dim=-1).isnan().all()  # what PB-relax is for

    result = implementation(q, k, v, bias_of(starts, 65, 65, dtype))
    assert result.isfinite().all()
    assert torch.equal(result[0, 0, 3:9], v[0, 0, 3].expand(6, 64))  # until key 9 is seen, key 3 takes all
    halves = (v[0, 0, 3].double() + v[0, 0, 9].double()) / 2
    torch.testing.assert_close(result[0, 0, 9:].double(), halves.expand(56, 64), atol=8e-3, rtol=0)


@both
def test_negative_scores_of_a_million_do_not_overflow(implementation):
    q = torch.full((1, 1, 3, 64), -128.0, dtype=torch.float16)
    k = torch.full((1, 1, 3, 64), 128.0, dtype=torch.float16)
    k[:, :, 1] = 127.0  # least negative
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16).view(1, 1, 3, 1).expand(1, 1, 3, 64)
    assert implementation(q, k, v)[0, 0, :, 0].tolist() == [1.0, 2.0, 2.0]


def test_bias_spelt_out():
    no = -torch.inf
    key_bias = torch.tensor([[0.0, 0.5, 0, 0], [no, 0, 0, 0], [no, no, no, 0]])
    assert attention_bias(key_bias, torch.tensor([[2, 3], [2, 3], [2, 3]])).squeeze(1).tolist() == [
        [[0, 0.5, 0, no], [0, 0.5, 0, 0]],
        [[no, 0, 0, no], [no, 0, 0, 0]],
        [[no, no, 0, no], [no, no, no, 0]],  # the first query is padding, and sees itself alone
    ]
    assert attention_bias(torch.zeros(2, 3), torch.tensor([[0], [1]])).squeeze(1).tolist() == [
        [[0, no, no]],
        [[0, 0, no]],
    ]


@pytest.mark.parametrize(("forced", "used"), [(None, "torch"), ("torch", "torch"), ("reference", "reference")])
def test_choice_can_be_forced_and_is_logged_once(fresh_choice, caplog, forced, used):
    if forced is not None:
        fresh_choice.setenv("COGVIEW_KERNELS", forced)
    called = []
    fresh_choice.setitem(module.IMPLEMENTATIONS, used, lambda *inputs: called.append(inputs))
    q, k, v = random_qkv(1, 3)
    with caplog.at_level(logging.INFO):
        attention(q, k, v)
        attention(q, k, v, bias_of(torch.tensor([0, 1]), 1, 3))
    assert [inputs[3] is None for inputs in called] == [True, False]
    assert [record.getMessage() for record in caplog.records] == [f"attention: {used} (usual)"]


def test_unknown_choice_is_an_error(fresh_choice):
    fresh_choice.setenv("COGVIEW_KERNELS", "fastest")
    with pytest.raises(ValueError, match="COGVIEW_KERNELS='fastest' is unknown; known: reference, torch"):
        attention(*random_qkv(1, 3))


def test_more_queries_than_keys_is_an_error():
    q, _, _ = random_qkv(4, 4)
    _, k, v = random_qkv(3, 3)
    with pytest.raises(ValueError, match="4 queries cannot be the last of 3 keys"):
        attention(q, k, v)


@both
@pytest.mark.parametrize("num_queries", [1, 4, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_a_bias_of_log_w_has_a_key_count_w_times(implementation, num_queries, padded):
    """As if it stood there w times: softmax over repeated keys and values."""
    q, k, v = random_qkv(num_queries, 9)
    starts = torch.tensor([0, 2]) if padded else None
    weights = torch.tensor([[1, 3, 2, 1, 1, 1, 1, 1, 1], [1, 1, 1, 5, 1, 1, 2, 1, 1]])
    result = implementation(q, k, v, bias_of(starts, num_queries, 9, weights=weights))
    for row in range(2):
        for query in range(num_queries):
            place = 9 - num_queries + query
            first = 0 if starts is None else min(int(starts[row]), place)
            counts = weights[row, first : place + 1]
            keys, values = (x[row : row + 1, :, first : place + 1].repeat_interleave(counts, dim=2) for x in (k, v))
            expected = expected_by_loops(q[row : row + 1, :, query : query + 1], keys, values)
            torch.testing.assert_close(result[row, :, query].double(), expected[0, :, 0], atol=2e-6, rtol=0)


# --- for decoding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_share_a_beginning_are_rows_with_a_copy_of_it(num_queries, padded):
    beginnings = [1, 0, 1, 1, 2]  # of five rows: one, three and one have each
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2, 3, 2, 6, 16, generator=generator)
    q, own_k, own_v = (torch.randn(5, 2, n, 16, generator=generator) for n in (num_queries, 4, 4))
    k, v = (torch.cat([shared[i][beginnings], own], dim=2) for i, own in ((0, own_k), (1, own_v)))
    bias = bias_of(torch.tensor([0, 2, 0, 0, 5]) if padded else None, num_queries, 10)
    members = torch.tensor([[1, 0, 0], [0, 2, 3], [4, 0, 0]])
    slots = torch.tensor([3, 0, 4, 5, 6])
    result = attention_shared(q, shared, own_k, own_v, bias, members, slots)
    torch.testing.assert_close(result, attention_reference(q, k, v, bias), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_rounded_keys_and_values_are_those_that_they_stand_for(num_queries, dtype, atol):
    q, k, v = random_qkv(num_queries, 9, dtype)
    (k8, k_scale), (v8, v_scale) = quantize_per_position(k), quantize_per_position(v)
    assert k8.dtype == torch.int8
    assert k_scale.shape == (2, 2, 9, 1)
    restored = [k8.float() * k_scale.float(), v8.float() * v_scale.float()]
    assert (restored[0] - k.float()).abs().amax() < 0.51 * k_scale.float().amax() + atol
    result = attention_int8(q, k8, k_scale, v8, v_scale)
    torch.testing.assert_close(result.double(), expected_by_loops(q, *restored), atol=atol, rtol=0)


def test_a_position_of_zeros_can_be_rounded():
    rounded, scale = quantize_per_position(torch.zeros(1, 2, 3, 4))
    assert not rounded.any()
    assert scale.isfinite().all()
