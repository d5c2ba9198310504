"""Attention of new positions against a cache: reference and kernels against float64."""

# B batch, H heads, T new positions (queries), S positions of a row, C of a prefix, K size of a head

import math
from dataclasses import fields, replace
from importlib.util import find_spec

import pytest
import torch

from cogview.kernels.attention import attention_bias, attention_reference
from cogview.kernels.decode_attention import (
    SharedPrefix,
    decode_attention,
    decode_attention_reference,
    quantize_per_position,
)
from cogview.kernels.dispatch import select_backend


def on_device(x):
    """Return ``x`` on the GPU if there is one."""
    if not torch.cuda.is_available():
        return x
    if isinstance(x, SharedPrefix):
        return replace(x, **{field.name: on_device(getattr(x, field.name)) for field in fields(x)})
    if isinstance(x, tuple):
        return tuple(map(on_device, x))
    return x.cuda() if isinstance(x, torch.Tensor) else x


def decode_attention_triton(*inputs, **settings):
    """Run the kernels, in Triton's interpreter without a GPU."""
    from cogview.kernels import decode_attention_triton as kernels

    settings = {name: on_device(x) for name, x in settings.items()}
    return kernels.decode_attention_triton(*map(on_device, inputs), **settings).cpu()


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
triton = pytest.param(decode_attention_triton, marks=needs_triton)
both = pytest.mark.parametrize("implementation", [decode_attention_reference, triton])

PREFIXES = [1, 0, 1]  # of three rows, two have the second


def stored(rows, length, dtype, size, generator, int8, room):
    """Return keys and values in a longer cache, and their scales; unfilled positions are nan, or the largest int8."""
    whole = torch.randn(2, rows, 2, length + room, size, generator=generator).to(dtype)
    if not int8:
        whole[..., length:, :] = torch.nan
        keys, values = whole[..., :length, :]
        return (keys, values), None
    rounded, scale = quantize_per_position(whole)
    scale[..., length:, :] = torch.nan
    return tuple(rounded[..., :length, :]), tuple(scale[..., :length, :])


def given(num_queries, own_keys, dtype=torch.float32, *, shared=0, int8=False, size=16, rows=None, room=3):
    """Return inputs and settings; all tensors are views of larger ones."""
    generator = torch.Generator().manual_seed(own_keys)
    rows = rows or (3 if shared else 2)
    qkv = torch.randn(rows, num_queries, 3, 2, size, generator=generator).to(dtype)
    (keys, values), scales = stored(rows, own_keys, dtype, size, generator, int8, room)
    settings = {"scales": scales} if int8 else {}
    if shared:
        (shared_keys, shared_values), shared_scales = stored(2, shared, dtype, size, generator, int8, room)
        members, slots = torch.tensor([[1, 0], [0, 2]]), torch.tensor([2, 0, 3])
        settings["prefix"] = SharedPrefix(shared_keys, shared_values, members, slots, shared_scales)
    return (qkv.permute(2, 0, 3, 1, 4)[0], keys, values), settings


def whole(inputs, scales=None, prefix=None):
    """Return keys and values of all C + S positions of each row in float64."""
    found = []
    for index in range(2):
        row_keys = inputs[1 + index].double()
        if scales is not None:
            row_keys = row_keys * scales[index].double()
        if prefix is not None:
            start = (prefix.keys_PHCK, prefix.values_PHCK)[index].double()
            if prefix.scales is not None:
                start = start * prefix.scales[index].double()
            row_keys = torch.cat([start[PREFIXES], row_keys], dim=2)
        found.append(row_keys)
    return found


def expected_by_loops(inputs, bias=None, *, scales=None, lengths_B=None, prefix=None):
    """Return softmax attention in float64, query by query over its visible keys."""
    q, (k, v) = inputs[0].double(), whole(inputs, scales, prefix)
    out = torch.zeros_like(q)
    for row in range(len(q)):
        end = k.shape[2] if lengths_B is None else k.shape[2] - inputs[1].shape[2] + int(lengths_B[row])
        for query in range(q.shape[2]):
            seen = slice(0, end if bias is not None else max(0, end - q.shape[2] + query + 1))
            scores = torch.einsum("hk,hsk->hs", q[row, :, query], k[row, :, seen]) / math.sqrt(q.shape[-1])
            if bias is not None:
                scores = scores + bias.expand(len(q), 1, q.shape[2], -1)[row, :, query, seen].double()
            out[row, :, query] = torch.einsum("hs,hsk->hk", scores.softmax(dim=-1), v[row, :, seen])
    return out


def assert_close(implementation, inputs, bias=None, **settings):
    """Check that the error is within the dtype, and that of the kernels at most twice that of PyTorch."""
    limits = {name: x for name, x in settings.items() if name != "num_processors"}
    expected = expected_by_loops(inputs, bias, **limits)
    result = implementation(*inputs, bias, **settings)
    assert result.dtype == inputs[0].dtype
    allowed = {torch.float32: 2e-6, torch.float16: 4e-3}[result.dtype]
    if implementation is decode_attention_triton:
        error = (decode_attention_reference(*inputs, bias, **limits).double() - expected).abs().max().item()
        allowed = 2 * error + {torch.float32: 2e-7, torch.float16: 1e-4}[result.dtype]
    torch.testing.assert_close(result.double(), expected, atol=allowed, rtol=0)


@both
@pytest.mark.parametrize(("num_queries", "own_keys"), [(1, 1), (1, 7), (3, 7), (1, 65), (9, 65), (1, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
def test_decode_attention_matches_float64(implementation, num_queries, own_keys, dtype, int8):
    inputs, settings = given(num_queries, own_keys, dtype, int8=int8)
    assert_close(implementation, inputs, **settings)


@both
@pytest.mark.parametrize(("num_queries", "own_keys", "shared"), [(1, 1, 6), (1, 7, 65), (3, 7, 5)])
@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.float32, True), (torch.float16, True)])
def test_decode_attention_matches_float64_when_rows_share_a_prefix(
    implementation, num_queries, own_keys, shared, dtype, int8
):
    inputs, settings = given(num_queries, own_keys, dtype, shared=shared, int8=int8)
    assert_close(implementation, inputs, **settings)


@both
def test_decode_attention_matches_float64_when_queries_exceed_a_block(implementation):
    inputs, settings = given(33, 40, rows=1)
    assert_close(implementation, inputs, **settings)


@both
@pytest.mark.parametrize("size", [1, 24, 128])
@pytest.mark.parametrize("num_queries", [1, 2])
def test_decode_attention_accepts_all_head_sizes(implementation, size, num_queries):
    inputs, settings = given(num_queries, 33, size=size)
    assert_close(implementation, inputs, **settings)


@both
@pytest.mark.parametrize(
    ("int8", "shared", "biased"), [(False, 0, False), (True, 9, False), (False, 9, True), (True, 0, True)]
)
@pytest.mark.parametrize("num_queries", [1, 2])
def test_decode_attention_ignores_unfilled_positions(implementation, int8, shared, biased, num_queries):
    """They are nan: a read with a weight of zero would show."""
    inputs, settings = given(num_queries, 6, shared=shared, int8=int8)
    q, keys, values = inputs
    buffers = [torch.as_strided(x, (*x.shape[:2], 9, x.shape[3]), x.stride()) for x in (keys, values)]
    if int8:
        scale_strides = settings["scales"][0].stride()
        settings["scales"] = tuple(torch.as_strided(x, (len(q), 2, 9, 1), scale_strides) for x in settings["scales"])
        assert settings["scales"][0][:, :, 6:].isnan().all()
    else:
        assert buffers[0][:, :, 6:].isnan().all()
    bias = torch.randn(len(q), 1, num_queries, shared + 9, generator=torch.manual_seed(0)) if biased else None
    lengths = torch.tensor([6, 3, 4][: len(q)])
    filled = {"lengths_B": lengths, **settings}
    assert_close(implementation, (q, *buffers), bias, **filled)


@both
@pytest.mark.parametrize("num_queries", [1, 3])
def test_decode_attention_returns_zeros_when_no_key_is_visible(implementation, num_queries):
    inputs, _ = given(num_queries, 4)
    result = implementation(*inputs, lengths_B=torch.tensor([0, 4]))
    assert not result[0].any()
    assert result[1].all()


@both
@pytest.mark.parametrize(("rows_of_bias", "int8"), [(1, False), (3, True)])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_decode_attention_follows_the_bias(implementation, rows_of_bias, int8, num_queries):
    """The bias has padding on the left, keys that count several times, and positions after a query."""
    inputs, settings = given(num_queries, 9, shared=6, int8=int8)
    key_bias = torch.tensor([[1, 3, 2, 1, 1, 1, 1, 1, 1, 5, 1, 1, 1, 1, 2]] * rows_of_bias).log()
    for row in range(rows_of_bias):
        key_bias[row, :row] = -torch.inf
    positions = torch.arange(10 - num_queries, 10).expand(rows_of_bias, -1)
    bias = attention_bias(key_bias, positions)
    assert bias.isneginf().any()
    assert_close(implementation, inputs, bias, **settings)
    assert_close(implementation, inputs, bias[:, :, :1], **settings)


@needs_triton
@pytest.mark.parametrize("num_queries", [1, 2])
def test_decode_attention_triton_does_not_depend_on_the_number_of_splits(num_queries):
    """Three and two programs share the work; some have nothing to read if few positions are filled."""
    inputs, settings = given(num_queries, 150, shared=70)
    assert_close(decode_attention_triton, inputs, **settings, num_processors=40)
    settings["lengths_B"] = torch.tensor([150, 5, 70])
    assert_close(decode_attention_triton, inputs, **settings, num_processors=40)


@needs_triton
def test_splits_of_occupies_every_processor_with_long_splits():
    from cogview.kernels.decode_attention_triton import MAX_SPLITS, MIN_KEYS, splits_of

    assert splits_of(1089, 40 * 128, 132) == 1  # enough programs
    assert splits_of(1089, 40, 132) == math.ceil(1089 / MIN_KEYS)
    assert splits_of(100_000, 40, 132) == MAX_SPLITS
    assert splits_of(1089, 1280, 132) == 4
    assert splits_of(0, 0, 132) == 1


@both
def test_decode_attention_accepts_strided_keys(implementation):
    """Keys are stored with their positions adjacent in memory."""
    (q, keys, values), _ = given(2, 20)
    sideways = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, keys, values)]
    assert sideways[1].stride(-1) == 20
    assert_close(implementation, sideways)


@both
@pytest.mark.parametrize("num_queries", [1, 2])
def test_decode_attention_does_not_overflow_when_scores_are_a_million(implementation, num_queries):
    """Keys 3 and 9 share the largest product, 2**20; the product itself would be infinite in float16."""
    q = torch.full((1, 1, num_queries, 64), 128.0, dtype=torch.float16)
    k = torch.full((1, 1, 65, 64), 127.0, dtype=torch.float16)
    k[:, :, [3, 9]] = 128.0
    v = torch.randn(1, 1, 65, 64, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    halves = (v[:, :, 3:4].double() + v[:, :, 9:10].double()) / 2
    torch.testing.assert_close(implementation(q, k, v).double(), halves.expand_as(q), atol=1e-3, rtol=0)


def test_decode_attention_reference_equals_attention_reference():
    inputs, _ = given(3, 9)
    assert torch.equal(decode_attention_reference(*inputs), attention_reference(*inputs))


@both
def test_decode_attention_equals_attention_with_copies_of_the_prefix(implementation):
    prefixes = [1, 0, 1, 1, 2]  # of five rows
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 6, 16, generator=generator)
    q, own_k, own_v = (torch.randn(5, 2, n, 16, generator=generator) for n in (2, 4, 4))
    k, v = (torch.cat([shared[prefixes], row_keys], dim=2) for shared, row_keys in ((keys, own_k), (values, own_v)))
    members = torch.tensor([[1, 0, 0], [0, 2, 3], [4, 0, 0]])
    prefix = SharedPrefix(keys, values, members, torch.tensor([3, 0, 4, 5, 6]))
    result = implementation(q, own_k, own_v, prefix=prefix)
    torch.testing.assert_close(result, attention_reference(q, k, v), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_per_position_is_near_the_input(dtype):
    x = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded, scale = quantize_per_position(x)
    assert rounded.dtype == torch.int8
    assert scale.shape == (2, 2, 9, 1)
    assert scale.dtype == dtype
    error = (rounded.double() * scale.double() - x.double()).abs()
    assert (error <= (0.5 + 127 * torch.finfo(dtype).eps) * scale.double()).all()


def test_quantize_per_position_accepts_zeros():
    rounded, scale = quantize_per_position(torch.zeros(1, 2, 3, 4))
    assert not rounded.any()
    assert scale.isfinite().all()


@needs_triton
def test_decode_attention_can_be_compiled():
    from cogview.kernels.decode_attention_triton import _attend

    inputs, settings = given(1, 4, shared=3, int8=True, room=0)
    prefix, bias = settings["prefix"], torch.zeros(3, 1, 1, 7)
    stored = (prefix.keys_PHCK, prefix.values_PHCK, *prefix.scales, prefix.rows_PN, prefix.slots_B)
    everything = (*inputs, bias, *settings["scales"], torch.tensor([4, 2, 3]), *stored)
    torch.library.opcheck(_attend, (*map(on_device, everything), 1))


@needs_triton
@pytest.mark.parametrize("forced", ["triton", "reference"])
def test_decode_attention_follows_the_environment(monkeypatch, forced):
    from cogview.kernels import decode_attention_triton as kernels

    monkeypatch.setenv("COGVIEW_KERNELS", forced)
    called = []
    monkeypatch.setattr(kernels, "_attend", lambda *inputs: called.append(inputs))
    select_backend.cache_clear()
    decode_attention(*map(on_device, given(1, 3)[0]))
    select_backend.cache_clear()
    assert len(called) == (forced == "triton")


INT8 = torch.zeros(2, 2, 3, 16, dtype=torch.int8)
SCALE = torch.ones(2, 2, 3, 1)


def begun(**changes):
    return replace(given(1, 3, shared=4)[1]["prefix"], **changes)


@both
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_BHTK": torch.zeros(2, 2, 16)}, r"q_BHTK must be \(B, H, T, K\), K at most 128, got \(2, 2, 16\)"),
        ({"q_BHTK": torch.zeros(2, 2, 1, 129)}, r"q_BHTK must be .*, got \(2, 2, 1, 129\)"),
        ({"q_BHTK": torch.zeros(2, 2, 4, 16)}, "q_BHTK: 4 queries cannot be the last of 3 positions"),
        ({"k_BHSK": torch.zeros(2, 3, 16)}, r"k_BHSK must have the shape \(2, 2, 0, 16\), got \(2, 3, 16\)"),
        ({"v_BHSK": torch.zeros(2, 2, 4, 16)}, r"v_BHSK must have the shape \(2, 2, 3, 16\), got \(2, 2, 4, 16\)"),
        ({"v_BHSK": INT8}, "v_BHSK must be torch.float32 on .* as q is, got torch.int8"),
        ({"scales": (SCALE, SCALE)}, "k_BHSK must be torch.int8 on .* as a tensor with scales is, got torch.float32"),
        ({"k_BHSK": INT8, "v_BHSK": INT8, "scales": (SCALE, SCALE[:, :, :2])}, r"scales must .*, got \(2, 2, 2, 1\)"),
        ({"bias_B1TS": torch.zeros(2, 1, 1, 4)}, r"bias_B1TS must be \(2 or 1, 1, 1 or 1, 3\), got \(2, 1, 1, 4\)"),
        ({"bias_B1TS": torch.zeros(1, 1, 1, 3).half()}, "bias_B1TS must be torch.float32 .*, got torch.float16"),
        ({"lengths_B": torch.tensor([1, 2], dtype=torch.int32)}, r"lengths_B must be int64 \(2,\)"),
    ],
)
def test_decode_attention_raises_value_error_when_inputs_do_not_fit(implementation, changes, message):
    inputs, _ = given(1, 3)
    named = dict(zip(("q_BHTK", "k_BHSK", "v_BHSK"), inputs, strict=True)) | changes
    settings = {name: named.pop(name) for name in ("scales", "lengths_B") if name in named}
    function = decode_attention if implementation is decode_attention_reference else implementation
    with pytest.raises(ValueError, match=message):
        function(*named.values(), **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values_PHCK": torch.zeros(2, 2, 5, 16)}, r"prefix.values_PHCK must have the shape \(2, 2, 4, 16\)"),
        ({"scales": (SCALE, SCALE)}, "prefix.keys_PHCK must be torch.int8"),
        ({"rows_PN": torch.tensor([[1, 0], [0, 3]])}, r"prefix.rows_PN must be from 0 to 2, got \[\[1, 0\]"),
        ({"slots_B": torch.tensor([2, 0, 4])}, r"prefix.slots_B must be from 0 to 3, got \[2, 0, 4\]"),
        ({"slots_B": torch.tensor([2, 0])}, r"prefix.slots_B must be int64 \(3,\)"),
    ],
)
def test_decode_attention_raises_value_error_when_the_prefix_does_not_fit(changes, message):
    inputs, _ = given(1, 3, shared=4)
    with pytest.raises(ValueError, match=message):
        decode_attention(*inputs, prefix=begun(**changes))


def test_decode_attention_raises_value_error_when_lengths_exceed_the_positions():
    inputs, _ = given(1, 3)
    with pytest.raises(ValueError, match=r"lengths_B must be from 0 to 3, got \[1, 4\]"):
        decode_attention(*inputs, lengths_B=torch.tensor([1, 4]))


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_decode_attention_triton_rejects_bfloat16_when_interpreted():
    inputs, _ = given(1, 3, torch.bfloat16)
    with pytest.raises(ValueError, match="q_BHTK is bfloat16, which Triton's interpreter silently computes wrongly"):
        decode_attention_triton(*inputs)
