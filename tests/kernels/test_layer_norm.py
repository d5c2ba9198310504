"""PB-relax LayerNorm, alone and between branches: equal to LayerNorm for ordinary input, finite for any other.

The reference and the Triton kernels pass the same tests; the kernels are measured against float64, too, beside the
reference.
"""

# B batch, T positions, D width

import logging

import pytest
import torch
from torch.nn import functional as F

from cogview.kernels.attention import attention_reference
from cogview.kernels.dispatch import select_backend
from cogview.kernels.layer_norm import (
    SMALLEST,
    pb_relax_layer_norm,
    pb_relax_layer_norm_reference,
    sandwich_layer_norm,
    sandwich_layer_norm_reference,
)
from cogview.modeling import kv_cache
from cogview.modeling.config import TransformerConfig
from cogview.modeling.transformer import Transformer

WIDTH = 64
HALF, SINGLE = torch.float16, torch.float32
CPU = torch.device("cpu")


def random(*shape, seed=0, device=CPU):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def kernels():
    pytest.importorskip("triton")
    from cogview.kernels import layer_norm_triton

    return layer_norm_triton


@pytest.fixture(params=["reference", "triton"])
def implementation(request):
    return request.param


@pytest.fixture
def layer_norm(implementation):
    """Each implementation of ``pb_relax_layer_norm``."""
    return pb_relax_layer_norm_reference if implementation == "reference" else kernels().pb_relax_layer_norm_triton


@pytest.fixture
def sandwich(implementation):
    """Each implementation of ``sandwich_layer_norm``."""
    return sandwich_layer_norm_reference if implementation == "reference" else kernels().sandwich_layer_norm_triton


@pytest.fixture
def forget_choices(monkeypatch):
    """Clear the cached choice of implementation before and after."""
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    select_backend.cache_clear()
    yield monkeypatch
    select_backend.cache_clear()


@pytest.fixture
def weight(device):
    return 1 + 0.1 * random(WIDTH, seed=1, device=device)


@pytest.fixture
def bias(device):
    return 0.1 * random(WIDTH, seed=2, device=device)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [1.0, 8.0, 500.0])
def test_pb_relax_layer_norm_equals_layer_norm_up_to_epsilon(layer_norm, device, weight, bias, dtype, atol, scale):
    if layer_norm is not pb_relax_layer_norm_reference and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16")
    x = (random(3, 7, WIDTH, device=device) * scale).to(dtype)
    expected = F.layer_norm(x.double(), (WIDTH,), weight.double(), bias.double(), 1e-5)
    result = layer_norm(x, weight.to(dtype), bias.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=atol, rtol=0)


def test_pb_relax_layer_norm_equals_layer_norm_of_the_scaled_token(layer_norm, device, weight, bias):
    """Epsilon belongs to the input after division by max|x| / 8, as in CogView v1."""
    x = random(5, WIDTH, device=device)
    scaled = x * 8 / x.abs().amax(dim=-1, keepdim=True)
    expected = F.layer_norm(scaled.double(), (WIDTH,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(layer_norm(x, weight, bias).double(), expected, atol=2e-6, rtol=0)


def test_pb_relax_layer_norm_is_invariant_to_scale(layer_norm, device, weight, bias):
    """In a plain LayerNorm small activations vanish beside epsilon."""
    x = random(4, WIDTH, device=device)
    result = layer_norm(x * 2.0**-40, weight, bias)
    assert torch.equal(result, layer_norm(x, weight, bias))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30])
def test_pb_relax_layer_norm_returns_the_bias_when_a_token_is_constant(layer_norm, device, weight, bias, value):
    """8 / max|x| would be infinite for the first three."""
    x = random(2, 3, WIDTH, device=device)
    x[1, 1] = 0
    x[1, 1, 5] = value
    result = layer_norm(x, weight, bias)
    assert result.isfinite().all()
    if value < 1e-37:
        assert torch.equal(result[1, 1], bias)


def test_pb_relax_layer_norm_has_finite_gradients_when_a_token_is_zero(layer_norm, device, weight, bias):
    x = random(2, WIDTH, device=device)
    x[0] = 0
    x.requires_grad_()
    layer_norm(x, weight, bias).square().sum().backward()
    assert x.grad.isfinite().all()


def test_pb_relax_layer_norm_confines_an_outlier_to_its_token(layer_norm, device, weight, bias):
    """CogView v1 divides by the largest value of the whole tensor, which would change all tokens."""
    x = random(2, 5, WIDTH, device=device)
    before = layer_norm(x, weight, bias)
    x[0, 2, 7] = 1e4
    after = layer_norm(x, weight, bias)
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, 2] = False
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[0, 2], before[0, 2])


def test_pb_relax_layer_norm_does_not_depend_on_the_batch(layer_norm, device, weight, bias):
    x = random(4, 6, WIDTH, device=device)
    rows = [layer_norm(row.unsqueeze(0), weight, bias) for row in x]
    assert torch.equal(torch.cat(rows), layer_norm(x, weight, bias))


@pytest.mark.parametrize("pattern", ["alternating", "one"])
def test_pb_relax_layer_norm_does_not_overflow_when_inputs_are_the_largest_float16(
    layer_norm, device, weight, bias, pattern
):
    """Their squares, even their sum, are far beyond 65504."""
    x = torch.zeros(1, WIDTH, device=device)
    if pattern == "alternating":
        x[0, ::2], x[0, 1::2] = 6e4, -6e4
    else:
        x[0, 3] = 6e4
    expected = F.layer_norm(x.double(), (WIDTH,), weight.double(), bias.double(), 1e-5)
    result = layer_norm(x.half(), weight.half(), bias.half())
    torch.testing.assert_close(result.double(), expected, atol=1e-2, rtol=0)


def test_pb_relax_layer_norm_gradients_equal_those_of_layer_norm(layer_norm, device, weight, bias):
    inputs = [tensor.requires_grad_() for tensor in (random(3, WIDTH, device=device), weight, bias)]
    target = random(3, WIDTH, seed=3, device=device)
    for function in (layer_norm, lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, 1e-5)):
        gradients = torch.autograd.grad((function(*inputs) * target).sum(), inputs)
        if function is layer_norm:
            relaxed = gradients
    for got, expected in zip(relaxed, gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


# --- a branch, the residual stream and the norm of the next branch ------------------------------------------------


def spelt_out(x, branch, weight, bias, next_weight=None, next_bias=None):
    """Return the sandwich in float64."""

    def norm(token, weight, bias):
        largest = token.detach().abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST)
        relaxed = token * 8 / largest
        centred = relaxed - relaxed.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    total = norm(branch, weight, bias) if x is None else x + norm(branch, weight, bias)
    return total, None if next_weight is None else norm(total, next_weight, next_bias)


def parameters_of(size, count, dtype, device):
    """Return weights and biases alternately."""
    return [(seed % 2 + 0.3 * random(size, seed=seed, device=device)).to(dtype) for seed in range(11, 11 + count)]


def results_and_gradients(function, inputs):
    """Return the results, and the gradients of all inputs for arbitrary gradients of the results."""
    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    results = [result for result in function(*inputs) if result is not None]
    weights = [random(*result.shape, seed=21 + i, device=result.device) for i, result in enumerate(results)]
    weighed = [weight.half().to(result.dtype) for weight, result in zip(weights, results, strict=True)]
    leaves = [tensor for tensor in inputs if tensor is not None]
    gradients = torch.autograd.grad(results, leaves, weighed)
    return [*(result.detach() for result in results), *gradients], leaves


def assert_as_exact_as_the_reference(kernel, reference, inputs, exact=spelt_out):
    """Check that the error of the kernel against float64 is at most twice that of the reference."""
    doubles = [None if tensor is None else tensor.double() for tensor in inputs]
    expected, _ = results_and_gradients(exact, doubles)
    got, leaves = results_and_gradients(kernel, inputs)
    plain, _ = results_and_gradients(reference, inputs)
    assert [result.dtype for result in got] == [result.dtype for result in plain]
    assert [gradient.dtype for gradient in got[-len(leaves) :]] == [leaf.dtype for leaf in leaves]
    for result, other, truth in zip(got, plain, expected, strict=True):
        assert result.shape == truth.shape
        floor = torch.finfo(result.dtype).eps * max(1.0, float(truth.abs().max()))
        allowed = 2 * (other.double() - truth).abs().max() + floor
        assert (result.double() - truth).abs().max() <= allowed, (result.shape, result.dtype)


@pytest.mark.parametrize("shape", [(1, 1), (65, 7), (7, 65), (65, 257), (1, 257), (3, 2560)])
@pytest.mark.parametrize(("stream", "dtype", "of_weights"), [(SINGLE,) * 3, (HALF,) * 3, (SINGLE, HALF, SINGLE)])
def test_sandwich_layer_norm_and_its_gradients_match_float64(device, shape, stream, dtype, of_weights):
    inputs = [
        random(*shape, seed=1, device=device).to(stream),
        (3 * random(*shape, seed=2, device=device) + 0.5).to(dtype),
        *parameters_of(shape[-1], 4, of_weights, device),
    ]
    assert_as_exact_as_the_reference(kernels().sandwich_layer_norm_triton, sandwich_layer_norm_reference, inputs)


@pytest.mark.parametrize("shape", [(2, 7, 65), (7, 257), (2, 8192)])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("adds", [True, False])
def test_sandwich_layer_norm_works_without_next_norm_or_stream(device, shape, dtype, adds):
    x = random(*shape, seed=1, device=device).to(dtype) if adds else None
    branch = (3 * random(*shape, seed=2, device=device)).to(dtype)
    inputs = [x, branch, *parameters_of(shape[-1], 2, dtype, device)]
    if adds:
        kernel, reference = kernels().sandwich_layer_norm_triton, sandwich_layer_norm_reference
    else:
        kernel, reference = (
            lambda _, *others, norm=norm: (norm(*others), None)
            for norm in (kernels().pb_relax_layer_norm_triton, pb_relax_layer_norm_reference)
        )
    assert_as_exact_as_the_reference(kernel, reference, inputs)


def test_sandwich_layer_norm_accepts_any_strides(device):
    """Inputs are a slice and a transpose, weights are strided, and a sum as the loss gives expanded gradients."""
    wide, tall = random(5, 9, 70, device=device), random(65, 9, 5, seed=2, device=device)
    inputs = [wide[:, :, 3:68], tall.permute(2, 1, 0), *(random(130, seed=s, device=device)[::2] for s in range(4))]
    assert not any(tensor.is_contiguous() for tensor in inputs)
    gradients = []
    for function in (kernels().sandwich_layer_norm_triton, sandwich_layer_norm_reference):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        total, normed = function(*leaves)
        gradients.append([total, normed, *torch.autograd.grad(total.sum() + 3 * normed.square().sum(), leaves)])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("used", ["total", "normed"])
def test_sandwich_layer_norm_accepts_an_unused_result(sandwich, device, used):
    inputs = [random(3, 7, seed=1, device=device), random(3, 7, seed=2, device=device)]
    inputs += parameters_of(7, 4, SINGLE, device)

    def gradients(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        loss = function(*leaves)[used == "normed"].square().sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for got, expected in zip(gradients(sandwich, SINGLE), gradients(spelt_out, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


def test_sandwich_layer_norm_accepts_no_rows(sandwich, device):
    inputs = [torch.zeros(0, 3, 7, device=device, requires_grad=True) for _ in range(2)]
    parameters = [parameter.requires_grad_() for parameter in parameters_of(7, 4, SINGLE, device)]
    total, normed = sandwich(*inputs, *parameters)
    assert total.shape == normed.shape == (0, 3, 7)
    gradients = torch.autograd.grad(total.sum() + normed.sum(), [*inputs, *parameters])
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_sandwich_layer_norm_adds_the_bias_when_a_branch_is_zero(sandwich, device, dtype):
    x, branch = random(3, 65, device=device).to(dtype), random(3, 65, seed=1, device=device).to(dtype)
    branch[1] = 0
    parameters = parameters_of(65, 4, dtype, device)
    total, normed = sandwich(x, branch, *parameters)
    assert torch.equal(total[1], x[1] + parameters[1])
    assert normed.isfinite().all()
    total, normed = sandwich(torch.zeros_like(x), branch, parameters[0], parameters[1] * 0, *parameters[2:])
    assert not total[1].any()
    assert torch.equal(normed[1], parameters[3])


def test_sandwich_layer_norm_has_finite_gradients_when_a_branch_is_zero(sandwich, device):
    inputs = [random(2, 7, device=device), torch.zeros(2, 7, device=device), *parameters_of(7, 4, SINGLE, device)]
    for gradient in results_and_gradients(sandwich, inputs)[0]:
        assert gradient.isfinite().all()


def test_sandwich_layer_norm_confines_outliers_to_their_token_when_float16(sandwich, device):
    x, branch = random(2, 5, 257, device=device).half(), random(2, 5, 257, seed=1, device=device).half()
    parameters = parameters_of(257, 4, HALF, device)
    before = results_and_gradients(sandwich, [x, branch, *parameters])[0]
    x[0, 2, 7], branch[0, 2, [5, 9]] = 1e4, torch.tensor([1e4, -1e4], dtype=HALF, device=device)
    after = results_and_gradients(sandwich, [x, branch, *parameters])[0]
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, 2] = False
    for got, old in zip(after[:4], before[:4], strict=True):  # both results, gradients of stream and branch
        assert got.isfinite().all()
        assert torch.equal(got[others], old[others])
        assert not torch.equal(got[0, 2], old[0, 2])
    assert all(gradient.isfinite().all() for gradient in after[4:])


def test_sandwich_layer_norm_does_not_overflow_when_squares_would(sandwich, device):
    """Activations of 300 at the width of 2560: in float16 the sum of their squares is infinite."""
    x, branch = random(3, 2560, device=device), (300 * random(3, 2560, seed=1, device=device)).half()
    assert branch.square().sum(dim=-1).isinf().all()
    inputs = [x.half() * 300, branch, *parameters_of(2560, 4, HALF, device)]
    expected = results_and_gradients(spelt_out, [tensor.double() for tensor in inputs])[0]
    got = results_and_gradients(sandwich, inputs)[0]
    for result, truth, atol in zip(got, expected, [0.6, 0.02, 2e-2, 1e-2, 5e-2, 5e-2, 5e-2, 5e-2], strict=True):
        assert result.isfinite().all()
        torch.testing.assert_close(result.double(), truth, atol=atol, rtol=2e-3)


# --- operator and model ------------------------------------------------------------------------------------------


def test_sandwich_layer_norm_passes_the_checks_of_custom_operators(device):
    kernels()
    inputs = [random(3, 7, seed=1, device=device), random(3, 7, seed=2, device=device).half()]
    inputs = [tensor.requires_grad_() for tensor in (*inputs, *parameters_of(7, 4, SINGLE, device))]
    torch.library.opcheck(torch.ops.cogview.sandwich_layer_norm, (*inputs, 1e-5))
    alone = (None, *inputs[1:4], None, None, 1e-5)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.cogview.sandwich_layer_norm, alone, test_utils=quick)


def test_layer_norms_run_the_reference_unless_forced(forget_choices, caplog):
    x, branch, parameters = random(3, 7), random(3, 7, seed=1), parameters_of(7, 4, SINGLE, CPU)
    with caplog.at_level(logging.INFO):
        got = sandwich_layer_norm(x, branch, *parameters)
        assert torch.equal(pb_relax_layer_norm(x, *parameters[:2]), pb_relax_layer_norm_reference(x, *parameters[:2]))
    total = x + pb_relax_layer_norm_reference(branch, *parameters[:2])
    assert torch.equal(got[0], total)
    assert torch.equal(got[1], pb_relax_layer_norm_reference(total, *parameters[2:]))
    assert [record.getMessage() for record in caplog.records] == [
        "sandwich_layer_norm on cpu: reference",
        "pb_relax_layer_norm on cpu: reference",
    ]


def test_transformer_is_near_that_of_references_when_kernels_are_forced(forget_choices, caplog, device):
    """All norms and GELUs run as kernels, forward and backward."""
    kernels()
    forget_choices.setattr(kv_cache, "attention", attention_reference)  # its kernels have their tests
    shape = {"num_layers": 2, "width": 32, "num_heads": 4, "vocabulary_size": 64, "max_positions": 16}
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**shape, dropout=0.0)).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(0, 64, (2, 9), device=device)

    def run():
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return [logits, *torch.autograd.grad(loss, list(model.parameters()))]

    expected = run()
    forget_choices.setenv("COGVIEW_KERNELS", "triton")
    select_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        got = run()
    for name in ("pb_relax_layer_norm", "sandwich_layer_norm", "bias_gelu"):
        assert f"{name} on {device.type}: triton (forced)" in caplog.messages
    for result, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(result, truth, atol=2e-5, rtol=1e-4)


def test_layer_norms_raise_value_error_when_inputs_are_unsupported():
    module = kernels()
    x, branch, weight, bias = random(3, 7), random(3, 7), random(7), random(7)
    norm, sandwich = module.pb_relax_layer_norm_triton, module.sandwich_layer_norm_triton
    for call, message in (
        (lambda: sandwich(x[:2], branch, weight, bias), r"x must be \(3, 7\) on cpu as branch is, got \(2, 7\) on cpu"),
        (
            lambda: sandwich(x.double(), branch, weight, bias),
            "x must be float32, float16 or bfloat16, got torch.float64",
        ),
        (lambda: norm(torch.zeros(2, 8193), weight, bias), r"x must be .* D from 1 to 8192, got \(2, 8193\)"),
        (lambda: norm(x, weight[:6], bias), r"weight must be \(7,\) on cpu, got \(6,\) on cpu"),
        (
            lambda: sandwich(x, branch, weight, bias, weight, bias.long()),
            "next_bias must be float32, .* got torch.int64",
        ),
        (lambda: sandwich_layer_norm(x, branch, weight, bias, weight), "next_bias is None; next_weight and next_bias"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
