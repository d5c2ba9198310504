"""GELU of a product and its bias: the reference and the Triton kernel against float64, and the MLP that uses them."""

# B batch, T positions, D width

import math

import pytest
import torch
from torch.nn import functional as F

from cogview.kernels.dispatch import select_backend
from cogview.kernels.gelu import bias_gelu, bias_gelu_reference
from cogview.kernels.native import expects_native_kernels
from cogview.modeling.config import TransformerConfig
from cogview.modeling.quantization import quantize_weight, swap_quantized_linears
from cogview.modeling.transformer import MLP

HALF, SINGLE = torch.float16, torch.float32


def random(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def kernel():
    pytest.importorskip("triton")
    from cogview.kernels.gelu_triton import bias_gelu_triton

    return bias_gelu_triton


@pytest.fixture(params=["reference", "triton"])
def gelu(request):
    """Each implementation of ``bias_gelu``."""
    return bias_gelu_reference if request.param == "reference" else kernel()


@pytest.fixture
def forget_choices(monkeypatch):
    """Clear the cached choice of implementation before and after."""
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    select_backend.cache_clear()
    yield monkeypatch
    select_backend.cache_clear()


def spelt_out(x, bias):
    """Return the result and gradients in float64."""
    z = x + bias
    return z / 2 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())


def result_and_gradients(function, *inputs):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    weights = random(*out.shape, seed=9, device=out.device).half().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (65, 65), (1, 257), (2, 7, 257), (3, 2560)])
@pytest.mark.parametrize(("dtype", "of_bias"), [(SINGLE, SINGLE), (HALF, HALF), (HALF, SINGLE)])
def test_bias_gelu_and_its_gradients_match_float64(device, shape, dtype, of_bias):
    """The error of the kernel is at most twice that of the reference in the same dtype."""
    x = (3 * random(*shape, device=device)).to(dtype)
    bias = random(shape[-1], seed=1, device=device).to(of_bias)
    expected = result_and_gradients(spelt_out, x.double(), bias.double())
    plain = result_and_gradients(bias_gelu_reference, x, bias)
    got = result_and_gradients(kernel(), x, bias)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, of_bias]
    for result, other, truth in zip(got, plain, expected, strict=True):
        floor = torch.finfo(result.dtype).eps * max(1.0, float(truth.abs().max()))
        assert (result.double() - truth).abs().max() <= 2 * (other.double() - truth).abs().max() + floor


def test_bias_gelu_sums_the_gradient_of_the_bias_over_programs(device):
    x, bias = random(140, 7, device=device), random(7, seed=1, device=device)
    got, expected = (result_and_gradients(f, x, bias)[2] for f in (kernel(), bias_gelu_reference))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_bias_gelu_accepts_any_strides(device):
    wide, bias = random(5, 9, 70, device=device), random(130, seed=1, device=device)[::2]
    for x in (wide[:, :, 3:68], random(65, 9, 5, device=device).permute(2, 1, 0)):
        gradients = []
        for function in (kernel(), bias_gelu_reference):
            leaves = [tensor.detach().requires_grad_() for tensor in (x, bias)]
            assert not any(leaf.is_contiguous() for leaf in leaves)
            gradients.append(
                torch.autograd.grad(function(*leaves).sum(), leaves)
            )  # the gradient of a sum is one expanded number
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_bias_gelu_is_identity_or_zero_far_from_zero(gelu, device, dtype):
    x = torch.tensor([6e4, 100.0, -100.0, -6e4], dtype=dtype, device=device)
    out, d_x, d_bias = result_and_gradients(gelu, x.expand(3, 4), torch.zeros(4, dtype=dtype, device=device))
    assert torch.equal(out, torch.where(x > 0, x, 0).expand(3, 4))
    assert not d_x[:, 2:].any()
    weights = random(3, 4, seed=9, device=device).half().to(dtype)
    assert torch.equal(d_x[:, :2], weights[:, :2])
    torch.testing.assert_close(d_bias[:2], weights.sum(dim=0)[:2], atol=1e-2 if dtype == HALF else 1e-6, rtol=0)


def test_bias_gelu_accepts_no_rows(gelu, device):
    out, d_x, d_bias = result_and_gradients(gelu, torch.zeros(0, 3, 7, device=device), random(7, device=device))
    assert out.shape == d_x.shape == (0, 3, 7)
    assert not d_bias.any()


def test_bias_gelu_passes_the_checks_of_custom_operators(device):
    kernel()
    inputs = [tensor.requires_grad_() for tensor in (random(3, 7, device=device).half(), random(7, device=device))]
    torch.library.opcheck(torch.ops.cogview.bias_gelu, tuple(inputs))


@pytest.mark.parametrize("used", ["native", "reference", "triton"])
def test_mlp_leaves_its_bias_to_the_kernel_when_it_is_fused(forget_choices, used):
    if used == "native" and not expects_native_kernels(torch.device("cpu"), torch.float32):
        pytest.skip("there is no C compiler")
    forget_choices.setenv("COGVIEW_KERNELS", used)
    mlp = MLP(TransformerConfig(num_layers=1, width=16, num_heads=2, vocabulary_size=8, dropout=0.0))
    torch.nn.init.normal_(mlp.input.bias)
    x = random(2, 5, 16)
    called = []
    forget_choices.setattr(
        "cogview.modeling.transformer.bias_gelu", lambda *inputs: called.append(inputs) or bias_gelu(*inputs)
    )
    if used == "triton":
        kernel()
    result = mlp(x)
    assert len(called) == (used != "reference")
    expected = mlp.output(F.gelu(mlp.input(x), approximate="tanh"))
    torch.testing.assert_close(result, expected, atol=0 if used == "reference" else 1e-6, rtol=0)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_mlp_adds_its_bias_when_weights_are_quantized(forget_choices, quantization):
    """The product of quantized layers includes the bias."""
    layer = torch.nn.ModuleDict(
        {"mlp": MLP(TransformerConfig(num_layers=1, width=64, num_heads=2, vocabulary_size=8, dropout=0.0))}
    )
    weights = {name: 0.1 * random(*tensor.shape, seed=3) for name, tensor in layer.state_dict().items()}
    for name in ("mlp.input.weight", "mlp.output.weight"):
        weights |= quantize_weight(name, weights[name], quantization)
    swap_quantized_linears(layer, quantization)
    layer.load_state_dict(weights)
    x = random(2, 5, 64)
    expected = layer["mlp"](x)
    kernel()
    forget_choices.setenv("COGVIEW_KERNELS", "triton")
    select_backend.cache_clear()
    torch.testing.assert_close(layer["mlp"](x), expected, atol=1e-5, rtol=1e-5)


def test_bias_gelu_triton_raises_value_error_when_inputs_are_unsupported():
    gelu, x, bias = kernel(), random(3, 7), random(7)
    for call, message in (
        (lambda: gelu(x.double(), bias), "x must be float32, float16 or bfloat16, got torch.float64"),
        (lambda: gelu(x, bias.long()), "bias must be float32, float16 or bfloat16, got torch.int64"),
        (lambda: gelu(x[:, :0], bias), r"x must be \(..., D\) with D from 1 on, got \(3, 0\)"),
        (lambda: gelu(x, bias[:6]), r"bias must be \(7,\) on cpu, got \(6,\) on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
