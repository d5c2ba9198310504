"""Window attention in the layers: every form equals the bias of all pairs, and no other keys are read."""

from __future__ import annotations

import pytest
import torch

from cogview.errors import InputError
from cogview.kernels.dispatch import select_backend
from cogview.kernels.native import expects_native_kernels
from cogview.kernels.window_attention import window_bias
from cogview.kernels.window_mask import Pivots, WindowMask
from cogview.modeling.config import AttentionConfig, TransformerConfig
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.transformer import Transformer

CPU = torch.device("cpu")
WINDOW, LENGTH = 7, 60
SHAPE = {"num_layers": 2, "width": 80, "num_heads": 4, "vocabulary_size": 64, "max_positions": 96, "dropout": 0.0}
SPARSE = AttentionConfig(pattern="window", window=WINDOW, pivots=20)
STEPS = ([LENGTH], [20, 1, 1, 3, 5, 6, 24], [40, *[1] * 20], [31, 2, 3, 4, 20])

needs_compiler = pytest.mark.skipif(not expects_native_kernels(CPU, torch.float32), reason="there is no C compiler")


def random_transformer(dtype=torch.float32, attention=SPARSE):
    """Return a transformer with random weights, biases and norms."""
    torch.manual_seed(3)
    transformer = Transformer(TransformerConfig(attention=attention, **SHAPE)).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return transformer.to(dtype)


def native_transformer(monkeypatch, dtype=torch.float32):
    """Return the same transformer, prepared for native kernels."""
    monkeypatch.setenv("COGVIEW_KERNELS", "native")
    transformer = random_transformer(dtype)
    transformer.prepare_cpu()
    return transformer


def random_pivots(rows=3, starts=(0, 0, 0)):
    """Return pivots with a bias, a different number in each row, from the start of the row on."""
    generator, bias_BS = torch.Generator().manual_seed(1), torch.full((rows, LENGTH), -torch.inf)
    for row in range(rows):
        start = starts[row]
        bias_BS[row, start : start + 4] = 0.0
        bias_BS[row, start + torch.randperm(LENGTH - start, generator=generator)[: 12 + row]] = 1.3
    return Pivots.from_bias(bias_BS)


def random_ids(rows=3):
    return torch.randint(0, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(2))


def mask_of(pivots, first, count, key_bias_BS=None):
    """Return the mask of ``count`` queries from column ``first`` on."""
    queries_1T = torch.arange(first, first + count).unsqueeze(0)
    bias_BS = None if key_bias_BS is None else key_bias_BS[:, : first + count]
    return WindowMask(window=WINDOW, pivots=pivots, queries_BT=queries_1T, key_bias_BS=bias_BS)


def in_steps(transformer, ids, pivots, steps, key_bias_BS=None, **cache_settings):
    """Return the hidden states of ``ids``, processed in steps with a cache."""
    dtype = transformer.embedding.weight.dtype
    cache = KVCache(transformer.config, len(ids), LENGTH, CPU, dtype, **cache_settings)
    parts, first = [], 0
    for part in ids.split(steps, dim=1):
        mask = mask_of(pivots, first, part.shape[1], key_bias_BS)
        parts.append(transformer.hidden(part, cache=cache, window=mask))
        first += part.shape[1]
    return torch.cat(parts, dim=1)


def whole(transformer, ids, pivots):
    """Return the hidden states of whole sequences."""
    return transformer.hidden(ids, window=WindowMask.of_sequences(WINDOW, pivots, ids.shape[1]))


# --- masks --------------------------------------------------------------------------------------------------------


def test_pivots_from_bias_invert_to_bias():
    no, pivots = -torch.inf, Pivots(torch.tensor([[0, 2, 4], [1, -1, -1]]), torch.tensor([[0.0, 0.5, 2.0], [1, 0, 0]]))
    assert pivots.to_bias(5).tolist() == [[0.0, no, 0.5, no, 2.0], [no, 1.0, no, no, no]]
    assert pivots.to_bias(3).tolist() == [[0.0, no, 0.5], [no, 1.0, no]]
    again = Pivots.from_bias(pivots.to_bias(5))
    assert torch.equal(again.positions_BN, pivots.positions_BN)
    assert torch.equal(again.bias_BN, pivots.bias_BN)


def test_window_mask_has_the_bias_of_window_attention():
    pivots = random_pivots()
    expected = window_bias(LENGTH, window=WINDOW, pivots_BN=pivots.positions_BN, pivot_bias_BN=pivots.bias_BN)
    assert torch.equal(WindowMask.of_sequences(WINDOW, pivots, LENGTH).to_bias(LENGTH, torch.float32), expected)
    later = mask_of(pivots, 50, 6).to_bias(56, torch.float32)
    assert torch.equal(later, expected[:, :, 50:56, :56])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_window_mask_selects_each_key_that_a_query_attends_to_once(count):
    starts = (0, 8, 3)
    key_bias_BS = torch.where(torch.arange(LENGTH) < torch.tensor(starts).unsqueeze(1), -torch.inf, 0.25)
    mask = mask_of(random_pivots(starts=starts), 50, count, key_bias_BS)
    expected, selected = mask.to_bias(50 + count, torch.float32), mask.select_keys(50 + count, torch.float32)
    assert selected.indices_BA.shape[1] < 50
    for row in range(3):
        for query in range(count):
            found = {}
            for key, bias in zip(selected.indices_BA[row].tolist(), selected.bias_B1TA[row, 0, query], strict=True):
                if bias > -torch.inf:
                    assert key not in found
                    found[key] = float(bias)
            seen = expected[row, 0, query] > -torch.inf
            assert found == {key: float(expected[row, 0, query, key]) for key in seen.nonzero().flatten().tolist()}


def test_window_mask_selects_nothing_where_that_saves_no_key():
    assert mask_of(random_pivots(), 15, 1).select_keys(16, torch.float32) is None


def test_window_mask_lets_a_query_in_padding_attend_to_itself():
    key_bias_BS = torch.tensor([[-torch.inf] * 3 + [0.0] * 2])
    pivots = Pivots(torch.tensor([[3]]), torch.tensor([[0.0]]))
    bias = mask_of(pivots, 0, 5, key_bias_BS).to_bias(5, torch.float32)[0, 0]
    seen = (bias > -torch.inf).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
def test_hidden_with_a_window_and_a_cache_equals_a_whole_pass(steps):
    transformer, ids, pivots = random_transformer(), random_ids(), random_pivots()
    with torch.inference_mode():
        expected = whole(transformer, ids, pivots)
        found = in_steps(transformer, ids, pivots, steps)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_hidden_with_a_window_equals_dense_layers_with_its_bias():
    ids, pivots, sparse = random_ids(), random_pivots(), random_transformer()
    dense = random_transformer(attention=AttentionConfig())
    bias = WindowMask.of_sequences(WINDOW, pivots, LENGTH).to_bias(LENGTH, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(whole(sparse, ids, pivots), dense.hidden(ids, bias_B1TS=bias))
        assert (whole(sparse, ids, pivots) - dense.hidden(ids)).abs().max() > 0.01


def test_hidden_needs_no_pivots_within_the_window():
    ids, dense, sparse = random_ids()[:, :WINDOW], random_transformer(attention=AttentionConfig()), random_transformer()
    with torch.inference_mode():
        assert torch.equal(sparse.hidden(ids), dense.hidden(ids))


def test_hidden_names_the_pivots_that_are_missing():
    sparse, dense = random_transformer(), random_transformer(attention=AttentionConfig())
    with pytest.raises(InputError, match="60 positions exceed the window of 7: give the pivots"):
        sparse.hidden(random_ids())
    with pytest.raises(InputError, match="the mask has a window of 7 positions, the model one of 0"):
        whole(dense, random_ids(), random_pivots())


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_hidden_with_a_window_has_the_gradients_of_all_activations(checkpointing):
    gradients = []
    for mode in ("none", checkpointing):
        transformer = random_transformer()
        transformer.checkpointing = mode
        whole(transformer, random_ids(), random_pivots()).square().sum().backward()
        gradients.append([parameter.grad for parameter in transformer.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# --- native kernels -----------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_native_window_layers_equal_modules(dtype, int8, monkeypatch):
    ids, starts = random_ids(), (0, 8, 3)
    pivots = random_pivots(starts=starts)
    key_bias_BS = torch.where(torch.arange(LENGTH) < torch.tensor(starts).unsqueeze(1), -torch.inf, 0.25)
    plain, fast = random_transformer(dtype), native_transformer(monkeypatch, dtype)
    with torch.inference_mode():
        for steps in STEPS[1:]:
            expected, found = (in_steps(one, ids, pivots, steps, key_bias_BS, int8=int8) for one in (plain, fast))
            tolerance = 1e-4 if dtype == torch.float32 else 0.1
            for row, start in enumerate(starts):
                torch.testing.assert_close(
                    found[row, start:].float(), expected[row, start:].float(), atol=tolerance, rtol=1e-3
                )


@needs_compiler
def test_native_window_layers_give_the_same_bits_in_any_steps_and_batch(monkeypatch):
    fast, ids, pivots = native_transformer(monkeypatch), random_ids(), random_pivots()
    with torch.inference_mode():
        expected = whole(fast, ids, pivots)
        for steps in STEPS:
            assert torch.equal(in_steps(fast, ids, pivots, steps), expected)
        assert torch.equal(whole(fast, ids[1:2], pivots.rows(slice(1, 2))), expected[1:2])


@needs_compiler
def test_native_window_layers_give_a_padded_row_the_bits_of_the_row_alone(monkeypatch):
    fast, ids, start = native_transformer(monkeypatch), random_ids(2), 6
    pivots, alone = random_pivots(2, (0, start)), random_pivots(2, (0, start)).rows(slice(1, 2))
    alone = Pivots(torch.where(alone.positions_BN < 0, -1, alone.positions_BN - start), alone.bias_BN)
    positions = torch.stack([torch.arange(LENGTH), (torch.arange(LENGTH) - start).clamp(min=0)])
    key_bias_BS = torch.zeros(2, LENGTH)
    key_bias_BS[1, :start] = -torch.inf
    with torch.inference_mode():
        padded = fast.hidden(ids, positions, window=mask_of(pivots, 0, LENGTH, key_bias_BS))
        assert torch.equal(padded[1:, start:], whole(fast, ids[1:, start:], alone))
        assert torch.equal(padded[:1], whole(fast, ids[:1], pivots.rows(slice(0, 1))))


@needs_compiler
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("length", [5, 30])
def test_native_window_layers_read_shared_prefixes_as_copies(int8, length, monkeypatch):
    """The window reaches into the prefix, or both the window and some pivots do not."""
    fast, prefixes, bias_BS = native_transformer(monkeypatch), torch.tensor([1, 0, 1, 1]), random_pivots(2)
    pivots = Pivots.from_bias(bias_BS.to_bias(LENGTH)[prefixes])
    first, ids = random_ids(2)[:, :length], random_ids(4)[:, length:]
    settings = {"int8": int8, "prefixes": prefixes, "prefix_length": length}
    with torch.inference_mode():
        shared, copied = (
            KVCache(fast.config, 4, LENGTH, CPU, torch.float32, **kind) for kind in (settings, {"int8": int8})
        )
        fast.hidden(first, cache=shared, window=mask_of(bias_BS, 0, length))
        fast.hidden(first[prefixes], cache=copied, window=mask_of(pivots, 0, length))
        for part in ids.split([1, 1, 6, ids.shape[1] - 8], dim=1):
            mask = mask_of(pivots, shared.length, part.shape[1])
            assert torch.equal(
                fast.hidden(part, cache=shared, window=mask), fast.hidden(part, cache=copied, window=mask)
            )


@needs_compiler
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_window_layers_read_no_other_keys(int8, is_native, count, monkeypatch):
    """Keys and values that no query attends to may hold anything."""
    transformer = native_transformer(monkeypatch) if is_native else random_transformer()
    ids, pivots, results = random_ids(), random_pivots(), []
    for poisoned in (False, True):
        cache = KVCache(transformer.config, 3, LENGTH, CPU, torch.float32, int8=int8)
        with torch.inference_mode():
            transformer.hidden(ids[:, :50], cache=cache, window=mask_of(pivots, 0, 50))
            if poisoned:
                unread_BS = mask_of(pivots, 50, count).to_bias(50 + count, torch.float32).isneginf().all(dim=2)[:, 0]
                for row, unread_S in enumerate(unread_BS[:, :50]):
                    for tensor in (cache.keys_values, cache.scales):
                        if tensor is not None and tensor.is_floating_point():
                            tensor[:, :, row, :, :50][..., unread_S, :] = torch.nan
            mask = mask_of(pivots, 50, count)
            results.append(transformer.hidden(ids[:, 50 : 50 + count], cache=cache, window=mask))
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("int8", [False, True])
def test_cache_attends_to_selected_keys_with_triton(int8, monkeypatch):
    """The kernels of decoding read the copies of the selected keys."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TransformerConfig(attention=SPARSE, **{**SHAPE, "width": 32, "num_heads": 1})
    q, kv = torch.randn(2, 1, 1, 32, device=device), torch.randn(2, 2, 1, 51, 32, device=device)
    pivots, queries_1T = random_pivots(2, (0, 0)).to(device), torch.tensor([[50]], device=device)
    selected = WindowMask(window=WINDOW, pivots=pivots, queries_BT=queries_1T).select_keys(51, torch.float32)
    results = []
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("COGVIEW_KERNELS", kernels)
        select_backend.cache_clear()
        cache = KVCache(config, 2, LENGTH, device, torch.float32, int8=int8)
        cache._store(0, kv[:, :, :, :50], 0)
        cache.length = 50
        results.append(cache.attend(0, q, kv[:, :, :, 50:], selected))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
