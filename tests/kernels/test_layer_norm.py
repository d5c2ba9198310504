"""PB-relax LayerNorm: LayerNorm itself for ordinary input, and no accident for any other."""

# B batch, T positions, D width

import pytest
import torch
from torch.nn import functional as F

from cogview.kernels.layer_norm import pb_relax_layer_norm

WIDTH = 64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weight():
    return 1 + 0.1 * random(WIDTH, seed=1)


@pytest.fixture
def bias():
    return 0.1 * random(WIDTH, seed=2)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [1.0, 8.0, 500.0])
def test_is_layer_norm_up_to_epsilon(weight, bias, dtype, atol, scale):
    x = (random(3, 7, WIDTH) * scale).to(dtype)
    expected = F.layer_norm(x.double(), (WIDTH,), weight.double(), bias.double(), 1e-5)
    result = pb_relax_layer_norm(x, weight.to(dtype), bias.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=atol, rtol=0)


def test_is_exactly_layer_norm_of_the_scaled_token(weight, bias):
    """Epsilon belongs to the input after division by max|x| / 8, as in the release."""
    x = random(5, WIDTH)
    scaled = x * 8 / x.abs().amax(dim=-1, keepdim=True)
    expected = F.layer_norm(scaled.double(), (WIDTH,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(pb_relax_layer_norm(x, weight, bias).double(), expected, atol=2e-6, rtol=0)


def test_scale_of_the_input_does_not_matter(weight, bias):
    """A plain LayerNorm drowns small activations in epsilon."""
    x = random(4, WIDTH)
    result = pb_relax_layer_norm(x * 2.0**-40, weight, bias)
    assert torch.equal(result, pb_relax_layer_norm(x, weight, bias))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30])
def test_token_of_nothing_survives(weight, bias, value):
    """8 / max|x| would be infinite for the first three."""
    x = random(2, 3, WIDTH)
    x[1, 1] = 0
    x[1, 1, 5] = value
    result = pb_relax_layer_norm(x, weight, bias)
    assert result.isfinite().all()
    if value < 1e-37:
        assert torch.equal(result[1, 1], bias)


def test_gradient_at_a_zero_token_is_finite(weight, bias):
    x = random(2, WIDTH)
    x[0] = 0
    x.requires_grad_()
    pb_relax_layer_norm(x, weight, bias).square().sum().backward()
    assert x.grad.isfinite().all()


def test_outlier_of_one_token_moves_no_other(weight, bias):
    """The released form divides by the largest value of the whole tensor, and would move them all."""
    x = random(2, 5, WIDTH)
    before = pb_relax_layer_norm(x, weight, bias)
    x[0, 2, 7] = 1e4
    after = pb_relax_layer_norm(x, weight, bias)
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, 2] = False
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[0, 2], before[0, 2])


def test_batch_is_its_rows(weight, bias):
    x = random(4, 6, WIDTH)
    rows = [pb_relax_layer_norm(row.unsqueeze(0), weight, bias) for row in x]
    assert torch.equal(torch.cat(rows), pb_relax_layer_norm(x, weight, bias))


@pytest.mark.parametrize("pattern", ["alternating", "one"])
def test_largest_half_precision_inputs_do_not_overflow(weight, bias, pattern):
    """Their squares, even their sum, are far beyond 65504."""
    x = torch.zeros(1, WIDTH)
    if pattern == "alternating":
        x[0, ::2], x[0, 1::2] = 6e4, -6e4
    else:
        x[0, 3] = 6e4
    expected = F.layer_norm(x.double(), (WIDTH,), weight.double(), bias.double(), 1e-5)
    result = pb_relax_layer_norm(x.half(), weight.half(), bias.half())
    torch.testing.assert_close(result.double(), expected, atol=1e-2, rtol=0)


def test_gradients_are_those_of_layer_norm(weight, bias):
    inputs = [tensor.requires_grad_() for tensor in (random(3, WIDTH), weight, bias)]
    target = random(3, WIDTH, seed=3)
    for function in (pb_relax_layer_norm, lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, 1e-5)):
        gradients = torch.autograd.grad((function(*inputs) * target).sum(), inputs)
        if function is pb_relax_layer_norm:
            relaxed = gradients
    for got, expected in zip(relaxed, gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
