"""The transformer: parameters, initialization, and equal logits whichever way it runs."""

# B batch, T positions, D width, V vocabulary

import copy
import math
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from cogview.errors import InputError
from cogview.kernels.attention import attention_bias
from cogview.kernels.dispatch import select_backend
from cogview.kernels.native import expects_native_kernels
from cogview.modeling.config import PRESETS, TransformerConfig, preset
from cogview.modeling.kv_cache import KVCache
from cogview.modeling.native_layers import NativeLayers
from cogview.modeling.packed_layers import PackedLayers
from cogview.modeling.transformer import Transformer

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
TINY = TransformerConfig(num_layers=2, width=32, num_heads=4, vocabulary_size=128, max_positions=48)


def random_transformer(config: TransformerConfig) -> Transformer:
    """Return a model with weights well above fresh ones, so that every position affects every later one."""
    generator = torch.Generator().manual_seed(0)
    transformer = Transformer(config).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() == 2 else parameter + 0.1 * noise)
    return transformer


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return random_transformer(TINY)


def random_ids(*shape, seed=0):
    return torch.randint(0, TINY.vocabulary_size, shape, generator=torch.Generator().manual_seed(seed))


def padding(starts, columns):
    """Return the bias of queries at ``columns`` (B, T) of rows that begin at ``starts``."""
    num_keys = int(columns.max()) + 1
    key_bias = torch.zeros(len(starts), num_keys).masked_fill(torch.arange(num_keys) < starts[:, None], -torch.inf)
    return attention_bias(key_bias, columns)


def close(got, expected, atol=2e-5):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


# --- initialization -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_transformer_has_as_many_parameters_as_its_config(name):
    config = preset(name, vocabulary_size=58_240)
    with torch.device("meta"):
        transformer = Transformer(config)
    assert sum(p.numel() for p in transformer.parameters()) == config.num_parameters
    if name == "4b":
        assert config.num_parameters == 3_928_849_920  # the released model


def test_transformer_initializes_weights_with_the_published_deviations():
    torch.manual_seed(0)
    transformer = Transformer(
        TransformerConfig(num_layers=3, width=256, num_heads=4, vocabulary_size=512, max_positions=256)
    )
    output_std = 0.02 / math.sqrt(2 * 3)
    for name, parameter in transformer.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = output_std if name.endswith("output.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    names = [name for name, _ in transformer.named_parameters() if name.endswith("output.weight")]
    assert len(names) == 6  # the attention's and the MLP's of each layer


def test_sinusoidal_positions_are_more_similar_when_nearer():
    """Their similarity depends on the distance alone; random positions are all equally dissimilar."""
    torch.manual_seed(0)
    shape = {"num_layers": 1, "width": 64, "num_heads": 2, "vocabulary_size": 50, "max_positions": 90}
    similarities = []
    for sinusoidal in (True, False):
        rows = Transformer(TransformerConfig(**shape, sinusoidal_positions=sinusoidal)).positions.weight.detach()
        cosines = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
        similarities.append([cosines.diagonal(offset=distance) for distance in (1, 2, 4, 12)])
    sinusoids, noise = similarities
    means = [cosines.mean().item() for cosines in sinusoids]
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.8
    assert all(cosines.std() < 1e-4 for cosines in sinusoids)
    assert all(cosines.mean().abs() < 0.1 for cosines in noise)


def test_branch_norm_init_keeps_tokens_visible_when_small():
    """At the released gain of 1 a fresh residual stream is nearly all branch output; at 0.05 tokens remain visible."""

    def token_fraction(branch_norm_init: float) -> float:
        torch.manual_seed(0)
        shape = {"num_layers": 4, "width": 64, "num_heads": 4, "vocabulary_size": 128, "max_positions": 32}
        model = Transformer(TransformerConfig(**shape, dropout=0.0, branch_norm_init=branch_norm_init))
        stream: list[torch.Tensor] = []
        model.final_norm.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0]))
        ids = random_ids(2, 32) % 128
        model(ids)
        tokens = model.embedding(ids) + model.positions(torch.arange(32))
        return float(tokens.detach().norm() / stream[0].detach().norm())

    assert token_fraction(1.0) < 0.02
    assert token_fraction(0.05) > 0.15
    norms = [
        module.weight
        for name, module in Transformer(
            TransformerConfig(num_layers=1, width=8, num_heads=2, vocabulary_size=8, branch_norm_init=0.05)
        ).named_modules()
        if "norm" in name
    ]
    assert [weight[0].item() for weight in norms] == pytest.approx([1, 0.05, 1, 0.05, 1])


def test_transformer_loss_is_that_of_guessing_when_fresh():
    """Its loss is the logarithm of the vocabulary size."""
    torch.manual_seed(0)
    transformer = Transformer(TINY).eval()
    ids = random_ids(4, 33)
    loss = F.cross_entropy(transformer(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(128), abs=0.05)


# --- structure ----------------------------------------------------------------------------------------------------


def test_layer_computes_sandwich_layer_norm(transformer):
    """x + LN3(attention(LN1(x))), then x + LN4(mlp(LN2(x)))."""
    layer, x = transformer.layers[0], torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        after_attention = x + layer.attention_output_norm(layer.attention(layer.attention_norm(x), None, None, 0))
        expected = after_attention + layer.mlp_output_norm(layer.mlp(layer.mlp_norm(after_attention)))
        close(layer(x, None, None, 0), expected, atol=0)
        assert (after_attention - x).abs().mean() > 0.1
        assert (expected - after_attention).abs().mean() > 0.1


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_layer_ignores_a_branch_when_its_output_norm_is_zero(branch):
    """A branch adds to the residual stream only through the norm on its output."""
    transformer, ids = random_transformer(TINY), random_ids(1, 9)
    with torch.inference_mode():
        for layer in transformer.layers:
            norm = getattr(layer, f"{branch}_output_norm")
            norm.weight.zero_()
            norm.bias.zero_()
        before = transformer(ids)
        for layer in transformer.layers:
            for parameter in getattr(layer, branch).parameters():
                parameter.mul_(-3)
        close(transformer(ids), before, atol=0)


def test_transformer_is_embeddings_and_final_norm_when_branches_are_zero():
    transformer, ids, positions = (
        random_transformer(TINY),
        random_ids(2, 5),
        torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 10, 47]]),
    )
    with torch.inference_mode():
        for layer in transformer.layers:
            for norm in (layer.attention_output_norm, layer.mlp_output_norm):
                norm.weight.zero_()
                norm.bias.zero_()
        x = transformer.embedding.weight[ids] + transformer.positions.weight[positions]
        norm = transformer.final_norm
        expected = F.layer_norm(x, (32,), norm.weight, norm.bias) @ transformer.embedding.weight.T
        close(transformer(ids, positions), expected, atol=2e-3)  # epsilon differs in the relaxed norm


def test_head_of_a_range_is_a_slice_of_all_logits(transformer):
    with torch.inference_mode():
        hidden = transformer.hidden(random_ids(2, 5))
        logits = transformer.head(hidden)
        assert logits.shape == (2, 5, 128)
        close(transformer.head(hidden, range(20, 90)), logits[..., 20:90], atol=1e-6)
        close(transformer(random_ids(2, 5)), logits, atol=0)


def test_head_returns_float32_when_the_model_is_bfloat16():
    transformer = random_transformer(TINY).to(torch.bfloat16)
    with torch.inference_mode():
        assert transformer(random_ids(1, 4)).dtype == torch.float32
        assert transformer.hidden(random_ids(1, 4)).dtype == torch.bfloat16


def test_transformer_is_near_float32_when_the_model_is_float16(transformer):
    with torch.inference_mode():
        close(random_transformer(TINY).half()(random_ids(2, 20)), transformer(random_ids(2, 20)), atol=0.1)


def test_dropout_acts_only_in_training(transformer):
    ids = random_ids(1, 6)
    assert torch.equal(transformer(ids), transformer(ids))
    training = random_transformer(TINY).train()
    assert not torch.equal(training(ids), training(ids))


def test_dropout_acts_on_embeddings_and_both_branches():
    transformer = random_transformer(TINY).train()
    dropped = []
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda _, inputs, out, name=name: dropped.append((name, inputs[0], out)))
    torch.manual_seed(0)
    transformer(random_ids(1, 30))
    branches = [f"layers.{number}.{branch}.dropout" for number in (0, 1) for branch in ("attention", "mlp")]
    assert [name for name, _, _ in dropped] == ["dropout", *branches]
    for name, before, after in dropped:
        assert (after == 0).float().mean().item() == pytest.approx(0.1, abs=0.05), name
        assert before.shape == (1, 30, 32), name


# --- equalities ---------------------------------------------------------------------------------------------------


def test_transformer_is_causal(transformer):
    ids = random_ids(2, 12)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 128
    with torch.inference_mode():
        before, after = transformer(ids), transformer(changed)
    close(after[:, :7], before[:, :7], atol=0)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(dim=-1).min() > 1e-2  # every later logit changes


@pytest.mark.parametrize("chunks", [(20,), (1,) * 20, (7, 1, 1, 4, 7), (19, 1), (1, 19)])
def test_hidden_equals_the_full_forward_when_cached(transformer, chunks):
    ids = random_ids(3, 20)
    cache = KVCache(TINY, 3, 20, CPU, torch.float32)
    with torch.inference_mode():
        parts = [transformer.hidden(part, cache=cache) for part in ids.split(chunks, dim=1)]
        close(torch.cat(parts, dim=1), transformer.hidden(ids))
    assert cache.length == 20


@pytest.mark.parametrize("chunks", [(20,), (1,) * 20, (5, 1, 8, 6)])
def test_hidden_does_not_depend_on_left_padding(transformer, chunks):
    """With a cache or without; the padding of the last row reaches past the first chunk."""
    lengths = (20, 13, 4)
    rows = [random_ids(1, length, seed=length) for length in lengths]
    starts = torch.tensor([20 - length for length in lengths])
    ids, positions = torch.full((3, 20), 127), torch.zeros(3, 20, dtype=torch.long)
    for row, start in enumerate(starts.tolist()):
        ids[row, start:] = rows[row]
        positions[row, start:] = torch.arange(20 - start)
    cache = KVCache(TINY, 3, 20, CPU, torch.float32) if len(chunks) > 1 else None
    with torch.inference_mode():
        parts = [
            transformer.hidden(part, part_positions, bias_B1TS=padding(starts, columns), cache=cache)
            for part, part_positions, columns in zip(
                *(x.split(chunks, dim=1) for x in (ids, positions, torch.arange(20).expand(3, -1))), strict=True
            )
        ]
        batch = torch.cat(parts, dim=1)
        assert batch.isfinite().all()  # padding has no meaning, but must not spread nan
        for row, start in enumerate(starts.tolist()):
            close(batch[row, start:], transformer.hidden(rows[row])[0])


def test_hidden_accepts_positions_that_restart(transformer):
    ids = random_ids(1, 10)
    restarting = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    cache = KVCache(TINY, 1, 10, CPU, torch.float32)
    with torch.inference_mode():
        counted, restarted = transformer(ids), transformer(ids, restarting)
        close(restarted[:, :6], counted[:, :6], atol=0)
        assert (restarted[:, 6:] - counted[:, 6:]).abs().amax(dim=-1).min() > 1e-2
        parts = [
            transformer.hidden(ids[:, part], restarting[:, part], cache=cache)
            for part in (slice(0, 6), slice(6, 7), slice(7, 10))
        ]
        close(transformer.head(torch.cat(parts, dim=1)), restarted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_gives_the_same_logits_and_gradients_with_all_kernels(monkeypatch, name, padded):
    transformer = random_transformer(replace(TINY, width=64))
    ids = random_ids(2, 20)
    bias = padding(torch.tensor([0, 6]), torch.arange(20).expand(2, -1)) if padded else None
    first, parameters = 6 if padded else 0, list(transformer.parameters())
    found = []
    for forced in ("torch", name):
        monkeypatch.setenv("COGVIEW_KERNELS", forced)
        select_backend.cache_clear()
        logits = transformer.head(transformer.hidden(ids, bias_B1TS=bias))[:, first:]
        found.append((logits, torch.autograd.grad(logits.softmax(dim=-1)[..., ::7].sum(), parameters)))
    select_backend.cache_clear()
    close(found[1][0], found[0][0], atol=1e-4)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        close(one, other, atol=1e-4)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_hidden_confines_an_outlier_to_later_tokens_when_float16(monkeypatch, name):
    """10,000 in a channel of one token: nothing overflows, and no earlier token and no other row changes in any bit.

    Triton's kernels accumulate in float16 here. The released PB-relax takes one maximum over all tokens.
    """
    monkeypatch.setenv("COGVIEW_KERNELS", name)
    select_backend.cache_clear()
    if name == "triton":
        from cogview.kernels.attention_triton import attention_triton

        monkeypatch.setattr(
            "cogview.modeling.kv_cache.attention", partial(attention_triton, accumulate_dtype="float16")
        )
    transformer = random_transformer(replace(TINY, num_layers=4, width=64)).half()
    ids = random_ids(2, 12)
    ids[ids == 5] = 6
    ids[0, 7] = 5  # occurs nowhere else
    with torch.no_grad():
        before = transformer.hidden(ids)
        transformer.embedding.weight[5, 3] = 1e4
        after = transformer.hidden(ids)
    select_backend.cache_clear()
    assert after.isfinite().all()
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :7], before[0, :7])
    assert (after[0, 7] - before[0, 7]).abs().max() > 0.1


# --- the cache ----------------------------------------------------------------------------------------------------


def test_kv_cache_stores_in_place(transformer):
    cache = KVCache(TINY, 2, 10, CPU, torch.float32)
    where = cache.keys_values.data_ptr()
    assert cache.keys_values.shape == (2, 2, 2, 4, 10, 8)
    ids = random_ids(2, 10)
    with torch.inference_mode():
        transformer.hidden(ids[:, :4], cache=cache)
        first = cache.keys_values[..., :4, :].clone()
        assert first.abs().amin() > 0
        assert not cache.keys_values[..., 4:, :].any()
        transformer.hidden(ids[:, 4:], cache=cache)
    assert torch.equal(cache.keys_values[..., :4, :], first)
    assert cache.keys_values.data_ptr() == where


def test_kv_cache_raises_value_error_when_full(transformer):
    cache = KVCache(TINY, 1, 5, CPU, torch.float32)
    with torch.inference_mode():
        transformer.hidden(random_ids(1, 4), cache=cache)
        with pytest.raises(ValueError, match="the cache holds 5 positions, 6 are needed"):
            transformer.hidden(random_ids(1, 2), cache=cache)


# --- layers of a CPU -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["torch", "native"])
def prepared(request, monkeypatch):
    """Transformer with the layers of a CPU: prepacked weights, or native kernels."""
    if request.param == "torch" and not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch comes without MKL")
    if request.param == "native" and not expects_native_kernels(CPU, torch.float32):
        pytest.skip("there is no C compiler")
    monkeypatch.setenv("COGVIEW_KERNELS", request.param)
    transformer = random_transformer(TINY)
    transformer.prepare_cpu()
    assert isinstance(transformer.cpu_layers, PackedLayers if request.param == "torch" else NativeLayers)
    return transformer


@pytest.mark.parametrize("chunks", [None, (20,), (1,) * 20, (5, 1, 8, 6)])
def test_cpu_layers_give_the_same_logits(prepared, chunks):
    """They bypass the modules, with a cache or without."""
    ids = random_ids(3, 20)
    bias = padding(torch.tensor([0, 4, 9]), torch.arange(20).expand(3, -1)) if chunks is None else None
    with torch.inference_mode():
        cache = KVCache(TINY, 3, 20, CPU, torch.float32)
        parts = [prepared.hidden(part, cache=cache) for part in ids.split(chunks, dim=1)] if chunks else []
        hidden = torch.cat(parts, dim=1) if chunks else prepared.hidden(ids, bias_B1TS=bias)
        close(hidden, random_transformer(TINY).hidden(ids, bias_B1TS=bias))
        close(prepared.head(hidden, range(5, 77)), random_transformer(TINY).head(hidden, range(5, 77)), atol=1e-4)


def test_cpu_layers_follow_changes_of_weights(prepared):
    """Sample images during training use the weights of that step."""
    plain, ids = random_transformer(TINY), random_ids(1, 9)
    with torch.no_grad():
        before = prepared.head(prepared.hidden(ids), range(64))
    for model in (prepared, plain):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
    with torch.no_grad():
        after = prepared.head(prepared.hidden(ids), range(64))
        close(after, plain.head(plain.hidden(ids), range(64)), atol=1e-4)
    assert (after - before).abs().max() > 1e-2


def test_cpu_layers_survive_copies_and_conversions(prepared):
    ids = random_ids(1, 9)
    with torch.no_grad():
        expected = prepared.hidden(ids)
        copied = copy.deepcopy(prepared)
        for parameter in prepared.parameters():
            parameter.zero_()
        assert torch.equal(copied.hidden(ids), expected)
        close(copied.to(torch.bfloat16).hidden(ids).float(), expected, atol=0.1)
        assert copied.head(copied.hidden(ids), range(64)).isfinite().all()


def test_cpu_layers_leave_gradients_and_state_unchanged(prepared):
    plain, ids = random_transformer(TINY), random_ids(2, 9)
    for model in (prepared, plain):
        model(ids).square().mean().backward()
    for one, other in zip(prepared.parameters(), plain.parameters(), strict=True):
        close(one.grad, other.grad, atol=1e-4)
    assert prepared.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        ([1, 2], None, r"ids must be an int64 tensor \(B, T\), got list"),
        (torch.tensor([1, 2]), None, r"ids must be an int64 tensor \(B, T\), got torch.int64 \(2,\)"),
        (torch.zeros(1, 2), None, r"ids must be an int64 tensor \(B, T\), got torch.float32 \(1, 2\)"),
        (torch.tensor([[5, 128]]), None, "ids must be from 0 to 127, got 128"),
        (torch.tensor([[5, -1]]), None, "ids must be from 0 to 127, got -1"),
        (torch.zeros(1, 49, dtype=torch.int64), None, "49 ids are too many: the transformer has 48 positions"),
        (torch.tensor([[5, 6]]), torch.tensor([[0, 48]]), "positions must be from 0 to 47, got 48"),
        (torch.tensor([[5, 6]]), [0, 1], r"positions must be an int64 tensor \(B, T\), got list"),
    ],
)
def test_forward_refuses_indices(transformer, ids, positions, message):
    """Torch says "index out of range in self", and neither which nor how many there are."""
    with pytest.raises(InputError, match=message):
        transformer(ids, positions)


def test_forward_takes_int32_and_views(transformer):
    ids = random_ids(4, 6)
    close(transformer(ids.int()), transformer(ids), atol=0)
    close(transformer(ids.T.contiguous().T), transformer(ids), atol=0)
    assert transformer(ids[:0]).shape == (0, 6, TINY.vocabulary_size)
