"""Native kernels of training: equal to the references in float64 forward and backward, repeatable, never hiding NaN."""

# N positions, D width, H heads, M rows of logits, I candidate ids
from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cogview.kernels.attention import attention_reference
from cogview.kernels.fused_linear_cross_entropy import losses_in_place_torch
from cogview.kernels.gelu import bias_gelu_reference
from cogview.kernels.native import expects_native_kernels
from cogview.kernels.native_training import (
    attends_natively,
    bias_gelu_native,
    layer_norm_native,
    losses_in_place_native,
    packed_attention_native,
    runs_native_training,
    sandwich_native,
)

pytestmark = pytest.mark.skipif(
    not expects_native_kernels(torch.device("cpu"), torch.float32), reason="there is no C compiler"
)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of a value near 1


@pytest.fixture(autouse=True)
def forced_native_kernels(monkeypatch):
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)


def random(*shape, seed=0, scale=1.0):
    """Return random float32 numbers that bfloat16 has as well."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16().float()


def gradients(function, inputs, chosen_outputs=None):
    """Return outputs and, by fixed random gradients of the outputs, the gradients of the inputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [each for each in outputs if each is not None]
    pairs = [
        (output, random(*output.shape, seed=50 + number).to(output.dtype))
        for number, output in enumerate(outputs)
        if chosen_outputs is None or number in chosen_outputs
    ]
    found = torch.autograd.grad([pair[0] for pair in pairs], inputs, [pair[1] for pair in pairs], allow_unused=True)
    return [output.detach() for output in outputs], [each for each in found if each is not None]


def check(native, reference, inputs, bound, chosen_outputs=None):
    """Check outputs and gradients against the reference in float64, relative to the largest value."""
    outputs = [
        *gradients(native, inputs, chosen_outputs)[0],
        *gradients(native, inputs, chosen_outputs)[1],
    ]
    doubles = [tensor.double() for tensor in inputs]
    expected = [part for parts in gradients(reference, doubles, chosen_outputs) for part in parts]
    assert len(outputs) == len(expected)
    for output, wanted in zip(outputs, expected, strict=True):
        assert (output.double() - wanted).abs().max() <= bound * wanted.abs().max().clamp(min=1)


def plain_norm(x, weight, bias):
    """PB-relax in float64: the maximum is a constant."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    return F.layer_norm(x / largest, x.shape[-1:], weight, bias, 1e-5 / 64)


@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 48), (37, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_native_matches_float64(shape, dtype):
    inputs = [random(*shape, scale=3), 1 + random(shape[-1], seed=1), random(shape[-1], seed=2)]
    check(lambda *given: layer_norm_native(*given, dtype), plain_norm, inputs, 2 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [None, [0], [1]])
def test_sandwich_native_matches_float64(dtype, chosen):
    """Also where only the sum, or only its norm, has a gradient."""
    parameters = [1 + random(48, seed=3), random(48, seed=4), 1 + random(48, seed=5), random(48, seed=6)]
    inputs = [random(2, 9, 48), random(2, 9, 48, seed=1, scale=5), *parameters]

    def reference(x, branch, weight, bias, next_weight, next_bias):
        total = x + plain_norm(branch, weight, bias)
        return total, plain_norm(total, next_weight, next_bias)

    def native(x, branch, *rest):
        return sandwich_native(x, branch.to(dtype), *rest)

    check(native, reference, inputs, 3 * ROUNDING[dtype], chosen)


def test_sandwich_native_without_a_next_norm_matches_float64():
    inputs = [random(7, 32), random(7, 32, seed=1), 1 + random(32, seed=2), random(32, seed=3)]

    def native(*given):
        total, normed = sandwich_native(*given, None, None)
        assert normed is None
        return total

    check(native, lambda x, branch, *norm: x + plain_norm(branch, *norm), inputs, 5e-6)


def test_layer_norm_native_keeps_large_numbers_finite_and_shows_nan():
    """Sums of numbers near the end of the range do not overflow; one that is no number spoils its row alone."""
    x, weight, bias = random(3, 32), torch.ones(32), torch.zeros(32)
    x[0] = torch.where(x[0] > 0, 1e37, 9e36)
    x[1, 3] = torch.nan
    normed = layer_norm_native(x, weight, bias, torch.float32)
    expected = plain_norm(x[0].double(), weight.double(), bias.double())
    torch.testing.assert_close(normed[0].double(), expected, atol=1e-4, rtol=0)
    assert normed[1].isnan().all()
    assert normed[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_gelu_native_matches_float64(dtype):
    inputs = [random(3, 11, 64, scale=3), random(64, seed=1)]
    check(
        lambda x, bias: bias_gelu_native(x.to(dtype), bias),
        bias_gelu_reference,
        inputs,
        3 * ROUNDING[dtype],
    )


def test_bias_gelu_native_is_exact_far_from_zero_and_shows_nan():
    """Where the sigmoid under- or overflows, GELU and its gradient are those of max(x, 0)."""
    x = torch.tensor([-1e12, -1e3, -60.0, 60.0, 1e3, 1e12, torch.nan, 0.0] * 2).requires_grad_()
    result = bias_gelu_native(x, torch.zeros(16))
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert result[:6].tolist() == [0, 0, 0, *x[3:6].tolist()]
    assert gradient[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert result[6].isnan()
    assert gradient[6].isnan()
    assert (result[7], gradient[7]) == (0, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [((1, 1),), ((2, 5), (1, 16), (3, 17)), ((1, 70),)])
def test_packed_attention_native_matches_float64(dtype, blocks):
    num_heads, width = 2, 64

    def reference(qkv_NE):
        mixed = []
        for part, (rows, length) in zip(qkv_NE.split([rows * length for rows, length in blocks]), blocks, strict=True):
            q, k, v = part.view(rows, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
            scores = (q @ k.mT / (width // num_heads) ** 0.5).masked_fill(
                torch.ones(length, length).triu(1).bool(), -torch.inf
            )
            mixed.append((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows * length, width))
        return torch.cat(mixed)

    qkv_NE = random(sum(rows * length for rows, length in blocks), 3 * width)
    native = lambda qkv_NE: packed_attention_native(qkv_NE.to(dtype), num_heads, blocks)  # noqa: E731
    check(native, reference, [qkv_NE], 3 * ROUNDING[dtype])


def test_packed_attention_native_survives_scores_beyond_exp():
    """Scores of thousands: the maximum is subtracted first, as in the reference."""
    qkv_NE = random(6, 96, scale=40)
    q, k, v = qkv_NE.view(1, 6, 3, 1, 32).permute(2, 0, 3, 1, 4).double()
    expected = attention_reference(q, k, v).view(6, 32)
    torch.testing.assert_close(packed_attention_native(qkv_NE, 1, ((1, 6),)).double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 16, 61])
def test_losses_in_place_native_match_torch(dtype, count):
    """The rows of a chunk are padded, and what is behind them stays."""
    buffer_MI = random(5, 64, scale=4).to(dtype)
    targets_M = torch.arange(5) % count
    weights_M = torch.tensor([0.1, 1.0, 0.0, 2.0, 0.5])
    logits_MI, expected_MI = buffer_MI[:, :count], buffer_MI.double()[:, :count].clone()
    behind = buffer_MI[:, count:].clone()
    kept_MI = logits_MI.clone()
    losses_M = losses_in_place_native(logits_MI, targets_M, weights_M, False)
    assert torch.equal(logits_MI, kept_MI)
    assert torch.equal(losses_in_place_native(logits_MI, targets_M, weights_M, True), losses_M)
    expected_M = losses_in_place_torch(expected_MI, targets_M, weights_M.double(), True)
    torch.testing.assert_close(losses_M.double(), expected_M, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_MI.double(), expected_MI, atol=ROUNDING[dtype], rtol=0)
    assert torch.equal(buffer_MI[:, count:], behind)


def test_native_training_repeats_the_same_bits(monkeypatch):
    """With two threads, whose sums are added in a fixed order."""
    monkeypatch.setattr("cogview.kernels.native_training.num_threads", lambda: 2)
    qkv_NE = random(60, 96)

    def all_of(x, weight, bias):
        normed = layer_norm_native(x, weight, bias, torch.float32)
        return packed_attention_native(bias_gelu_native(normed, bias), 2, ((4, 15),))

    inputs = [qkv_NE, torch.ones(96), random(96, seed=1)]
    first, second = (gradients(all_of, inputs) for _ in range(2))
    assert all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_native_training_runs_only_where_gradients_are_recorded(monkeypatch):
    x = random(2, 96)
    assert runs_native_training(x)
    assert attends_natively(x, 2, 64)
    assert not attends_natively(x, 2, 100_000)  # PyTorch's is faster
    assert not runs_native_training(x, 40)  # no whole registers
    assert not runs_native_training(x.half())
    with torch.no_grad():
        assert not runs_native_training(x)
    monkeypatch.setenv("COGVIEW_KERNELS", "torch")
    assert not runs_native_training(x)
