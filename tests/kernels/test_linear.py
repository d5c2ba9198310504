"""Quantized linear layers: bounds of the rounding error, and equality of all implementations."""

# M rows of the input, K inputs, N outputs, G groups of inputs that share a scale

import pytest
import torch
from torch.nn import functional as F

from cogview.kernels import linear as module
from cogview.kernels.linear import (
    BLOCK,
    DENSE_BLOCK,
    MANY_ROWS_HALF,
    MANY_ROWS_INT8,
    can_prepack,
    dequantize_int4,
    dequantize_int8,
    group_of,
    linear,
    linear_int4_packed,
    linear_int4_reference,
    linear_int8,
    linear_int8_reference,
    linear_prepacked,
    pack_int4,
    pack_int4_for_cpu,
    prepack,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)

# Largest relative error of rounding.
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUM = 1e-6  # of float32 products, relative to the sum of their absolute values
ROWS = [1, MANY_ROWS_INT8 - 1, MANY_ROWS_INT8, 200]
INPUTS = [32, 64, 96, 256]  # 32 and 96 have groups of 32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_OUTPUTS = 80  # no multiple of the 64 that PyTorch's kernel processes at a time


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Make the choices of dispatch equal on every machine."""
    monkeypatch.delenv("COGVIEW_KERNELS", raising=False)
    monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda: False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def odd_weights(num_inputs):
    """Return weights whose scales and means differ from row to row, with constant rows and groups."""
    weight_NK = 0.02 * random(NUM_OUTPUTS, num_inputs, seed=1) * torch.logspace(-3, 2, NUM_OUTPUTS)[:, None]
    weight_NK[::3] += 0.7
    weight_NK[5] = 0
    weight_NK[6] = -0.3
    weight_NK[7, :32] = 0
    weight_NK[8, :32] = 1.7
    weight_NK[9] = 0
    weight_NK[9, 3] = 5  # a single outlier
    return weight_NK


def exact_int8(num_inputs):
    """Return int8 weights with scales of powers of two, and their float64 values: exact in every dtype."""
    quantized_NK = integers(-127, 128, NUM_OUTPUTS, num_inputs, seed=1).to(torch.int8)
    scale_N = 2.0 ** integers(-10, -4, NUM_OUTPUTS, seed=2)
    return quantized_NK, scale_N.bfloat16(), quantized_NK.double() * scale_N.double()[:, None]


def exact_int4(num_inputs):
    """Return packed int4 weights whose scales are powers of two and zero points multiples, and their float64 values."""
    group = group_of(num_inputs)
    steps_NK = integers(0, 16, NUM_OUTPUTS, num_inputs, seed=1).to(torch.uint8)
    steps_NK[:, ::group], steps_NK[:, 1::group] = 0, 15  # as after quantization: every group has both ends
    scale_GN = 2.0 ** integers(-8, -2, num_inputs // group, NUM_OUTPUTS, seed=2)
    zero_GN = scale_GN * integers(-12, 13, num_inputs // group, NUM_OUTPUTS, seed=3)
    scale_NK, zero_NK = (part.double().T.repeat_interleave(group, dim=1) for part in (scale_GN, zero_GN))
    scales_and_zeros_GN2 = torch.stack([scale_GN, zero_GN], dim=2).bfloat16()
    return pack_int4(steps_NK), scales_and_zeros_GN2, (steps_NK.double() - 8) * scale_NK + zero_NK


def exact_input(*shape):
    """Return inputs that are exact in float32, bfloat16 and float16."""
    return integers(-64, 65, *shape, seed=4) / 16


def assert_within(result, x, weight_NK, bias_N, *, roundings=2):
    """Check ``result`` against x W^T + b in float64, up to the sum of products and ``roundings`` to 16 bits."""
    product = x.double() @ weight_NK.T
    expected = product + bias_N.double()
    unit = max(UNIT[torch.bfloat16], UNIT[result.dtype])
    allowed = roundings * unit * torch.maximum(product.abs(), expected.abs())
    allowed += SUM * (x.double().abs() @ weight_NK.abs().T) + 1e-6
    assert result.shape == expected.shape
    assert ((result.double() - expected).abs() <= allowed).all()


# --- quantization -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_inputs", INPUTS)
def test_quantize_int8_is_off_by_half_a_step_at_most(num_inputs):
    weight_NK = odd_weights(num_inputs)
    quantized_NK, scale_N = quantize_int8(weight_NK)
    assert (quantized_NK.dtype, scale_N.dtype) == (torch.int8, torch.bfloat16)
    assert (quantized_NK.shape, scale_N.shape) == (weight_NK.shape, (NUM_OUTPUTS,))
    step_N1 = weight_NK.abs().amax(dim=1, keepdim=True) / 127 * (1 + UNIT[torch.bfloat16])
    assert ((dequantize_int8(quantized_NK, scale_N) - weight_NK).abs() <= 0.5001 * step_N1).all()
    assert (quantized_NK.abs().amax(dim=1)[weight_NK.any(dim=1)] >= 126).all()  # the full range is used


def test_quantize_int8_accepts_constant_rows():
    weight_NK = torch.tensor([0.0, 1.0, -3.0, 1e-30, 1e30])[:, None].expand(5, 32)
    restored_NK = dequantize_int8(*quantize_int8(weight_NK))
    assert torch.equal(restored_NK[0], torch.zeros(32))
    torch.testing.assert_close(restored_NK, weight_NK, rtol=UNIT[torch.bfloat16], atol=0)


@pytest.mark.parametrize("num_inputs", INPUTS)
def test_quantize_int4_is_off_by_half_a_step_and_the_rounding_of_its_scales(num_inputs):
    """A rounded zero moves the ends of the range by u |zero|, a rounded scale by u (high - low), u = 2**-8.

    What lies beyond an end is off by as much, and half a step more where it is rounded towards it.
    """
    weight_NK, group = odd_weights(num_inputs), group_of(num_inputs)
    packed, scales_and_zeros_GN2 = quantize_int4(weight_NK)
    assert (packed.dtype, scales_and_zeros_GN2.dtype) == (torch.uint8, torch.bfloat16)
    assert packed.shape == (NUM_OUTPUTS, num_inputs // 2)
    assert scales_and_zeros_GN2.shape == (num_inputs // group, NUM_OUTPUTS, 2)
    groups = weight_NK.unflatten(1, (-1, group))
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    unit = UNIT[torch.bfloat16]
    step, zero = (high - low) / 15 * (1 + unit), (low.abs() + 8 / 15 * (high - low)) * (1 + unit)
    errors = (dequantize_int4(packed, scales_and_zeros_GN2) - weight_NK).abs().unflatten(1, (-1, group))
    assert (errors <= 0.5001 * step + unit * (zero + high - low) + 1e-30).all()


def test_quantize_int4_accepts_constant_groups():
    weight_NK = torch.tensor([0.0, 1.0, -3.0, 1e-30, 1e30, 300.7])[:, None].repeat(1, 128)
    weight_NK[1, 64:] = 0
    restored_NK = dequantize_int4(*quantize_int4(weight_NK))
    assert torch.equal(restored_NK[:2], weight_NK[:2])
    torch.testing.assert_close(restored_NK, weight_NK, rtol=UNIT[torch.bfloat16], atol=0)


def test_quantization_is_exact_when_weights_were_quantized():
    quantized_NK, scale_N, weight_NK = exact_int8(64)
    quantized_NK[:, 0] = 127
    weight_NK[:, 0] = 127 * scale_N.double()
    again_NK, again_N = quantize_int8(weight_NK.float())
    assert torch.equal(again_NK, quantized_NK)
    assert torch.equal(again_N, scale_N)

    packed, scales_and_zeros_GN2, weight_NK = exact_int4(256)
    assert torch.equal(dequantize_int4(packed, scales_and_zeros_GN2), weight_NK.float())
    assert torch.equal(dequantize_int4(*quantize_int4(weight_NK.float())), weight_NK.float())


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_quantization_treats_rows_separately(quantize):
    """The number of rows does not matter, in 16 bits either."""
    weight_NK = random(BLOCK + 3, 64).bfloat16()
    whole = quantize(weight_NK)
    alone = quantize(weight_NK[BLOCK + 1 : BLOCK + 2].float())
    assert torch.equal(whole[0][BLOCK + 1 : BLOCK + 2], alone[0])
    outputs = 0 if quantize is quantize_int8 else 1
    assert torch.equal(whole[1].narrow(outputs, BLOCK + 1, 1), alone[1])


def test_unpack_int4_inverts_pack_int4():
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)  # every possible byte
    packed = pack_int4(pairs)
    assert torch.equal(packed, (pairs[:, :1] + 16 * pairs[:, 1:]))  # the first in the low half
    assert torch.equal(unpack_int4(packed), pairs)
    steps_NK = integers(0, 16, 5, 96).to(torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(steps_NK)), steps_NK)


@pytest.mark.parametrize(("num_inputs", "group"), [(32, 32), (64, 64), (96, 32), (2560, 64)])
def test_group_of_divides_the_inputs(num_inputs, group):
    assert group_of(num_inputs) == group


@pytest.mark.parametrize("num_inputs", [16, 40, 100])
def test_group_of_raises_value_error_when_inputs_are_no_multiple_of_32(num_inputs):
    with pytest.raises(ValueError, match=f"^int4 needs layers whose inputs are a multiple of 32, got {num_inputs}$"):
        quantize_int4(torch.zeros(4, num_inputs))


# --- the layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("num_inputs", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_int8_equals_its_dequantized_weights(num_rows, num_inputs, dtype):
    quantized_NK, scale_N, weight_NK = exact_int8(num_inputs)
    x, bias_N = exact_input(num_rows, num_inputs).to(dtype), exact_input(NUM_OUTPUTS)
    result = linear_int8(x, quantized_NK, scale_N, bias_N.to(dtype))
    assert result.dtype == dtype
    assert_within(result, x, weight_NK, bias_N)
    assert_within(linear_int8_reference(x, quantized_NK, scale_N, bias_N.to(dtype)), x, weight_NK, bias_N)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("num_inputs", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_int4_equals_its_dequantized_weights(num_rows, num_inputs, dtype):
    packed, scales_and_zeros_GN2, weight_NK = exact_int4(num_inputs)
    x, bias_N = exact_input(num_rows, num_inputs).to(dtype), exact_input(NUM_OUTPUTS)
    result = linear_int4_packed(x, pack_int4_for_cpu(packed), scales_and_zeros_GN2, bias_N.to(dtype))
    assert result.dtype == dtype
    assert_within(result, x, weight_NK, bias_N)
    assert_within(linear_int4_reference(x, packed, scales_and_zeros_GN2, bias_N.to(dtype)), x, weight_NK, bias_N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_kernels_equal_their_references_up_to_bfloat16(dtype):
    """For arbitrary numbers, inputs and int4 weights may be rounded to bfloat16."""
    x, bias_N, weight_NK = random(7, 256).to(dtype), random(NUM_OUTPUTS, seed=2).to(dtype), odd_weights(256)
    packed, scales_and_zeros_GN2 = quantize_int4(weight_NK)
    int8 = quantize_int8(weight_NK)
    for result, reference, restored_NK in [
        (linear_int8(x, *int8, bias_N), linear_int8_reference(x, *int8, bias_N), dequantize_int8(*int8)),
        (
            linear_int4_packed(x, pack_int4_for_cpu(packed), scales_and_zeros_GN2, bias_N),
            linear_int4_reference(x, packed, scales_and_zeros_GN2, bias_N),
            dequantize_int4(packed, scales_and_zeros_GN2),
        ),
    ]:
        allowed = 2 * (x.double().abs() @ restored_NK.double().abs().T) + 3 * (reference.abs() + bias_N.abs())
        assert ((result.double() - reference.double()).abs() <= UNIT[torch.bfloat16] * allowed).all()


def test_quantized_references_multiply_in_bfloat16_when_the_cpu_does(monkeypatch):
    """They dequantize into bfloat16, which is exact for these weights."""
    monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda: True)
    x, bias_N = exact_input(50, 96).bfloat16(), exact_input(NUM_OUTPUTS).bfloat16()
    for reference, (*weights, weight_NK) in [
        (linear_int8_reference, exact_int8(96)),
        (linear_int4_reference, exact_int4(96)),
    ]:
        assert_within(reference(x, *weights, bias_N), x, weight_NK, bias_N)


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (3, 13, 64), (2, 1, 5, 7, 64)])
def test_quantized_linears_accept_any_shape(shape):
    x, bias_N = random(*shape), random(NUM_OUTPUTS, seed=2)
    int8, (packed, scales_and_zeros_GN2) = quantize_int8(odd_weights(64)), quantize_int4(odd_weights(64))
    ordered = pack_int4_for_cpu(packed)
    for compute in (
        lambda rows: linear_int8(rows, *int8, bias_N),
        lambda rows: linear_int8_reference(rows, *int8, bias_N),
        lambda rows: linear_int4_packed(rows, ordered, scales_and_zeros_GN2, bias_N),
        lambda rows: linear_int4_reference(rows, packed, scales_and_zeros_GN2, bias_N),
        lambda rows: linear(rows.bfloat16(), odd_weights(64).bfloat16(), bias_N.bfloat16()),
    ):
        assert torch.equal(compute(x), compute(x.reshape(-1, 64)).view(*shape[:-1], NUM_OUTPUTS))


def test_quantized_linears_accept_strided_inputs():
    int8, bias_N = quantize_int8(odd_weights(64)), random(NUM_OUTPUTS, seed=2)
    packed, scales_and_zeros_GN2 = quantize_int4(odd_weights(64))
    ordered = pack_int4_for_cpu(packed)
    for x in (random(64, 6).bfloat16().T, random(12, 64).bfloat16()[::2]):
        whole = x.contiguous()
        assert torch.equal(linear_int8(x, *int8, bias_N), linear_int8(whole, *int8, bias_N))
        assert torch.equal(
            linear_int4_packed(x, ordered, scales_and_zeros_GN2, bias_N),
            linear_int4_packed(whole, ordered, scales_and_zeros_GN2, bias_N),
        )


def test_quantized_references_work_with_more_outputs_than_a_block():
    num_outputs = 2 * DENSE_BLOCK + 16
    x, weight_NK, bias_N = random(5, 32), random(num_outputs, 32, seed=1), random(num_outputs, seed=2)
    for reference, weights, restored_NK in [
        (linear_int8_reference, quantize_int8(weight_NK), dequantize_int8(*quantize_int8(weight_NK))),
        (linear_int4_reference, quantize_int4(weight_NK), dequantize_int4(*quantize_int4(weight_NK))),
    ]:
        torch.testing.assert_close(reference(x, *weights, bias_N), F.linear(x, restored_NK, bias_N))


# --- dispatch -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_int8_kernel(monkeypatch):
    """Make PyTorch's int8 kernel fail the test."""

    def refuse(*_):
        raise AssertionError("PyTorch's kernel was called")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", refuse)


@pytest.mark.usefixtures("no_int8_kernel")
def test_quantized_references_can_be_forced(monkeypatch):
    x, bias_N, int8 = random(3, 64), random(NUM_OUTPUTS, seed=2), quantize_int8(odd_weights(64))
    with pytest.raises(AssertionError, match="PyTorch's kernel was called"):
        linear_int8(x, *int8, bias_N)
    monkeypatch.setenv("COGVIEW_KERNELS", "reference")
    assert torch.equal(linear_int8(x, *int8, bias_N), linear_int8_reference(x, *int8, bias_N))
    assert not module.has_quantized_kernels(torch.device("cpu"))


@pytest.mark.usefixtures("no_int8_kernel")
def test_linear_int8_dequantizes_first_when_rows_are_many():
    x, bias_N, int8 = random(MANY_ROWS_INT8, 64), random(NUM_OUTPUTS, seed=2), quantize_int8(odd_weights(64))
    assert torch.equal(linear_int8(x, *int8, bias_N), linear_int8_reference(x, *int8, bias_N))
    with pytest.raises(AssertionError, match="PyTorch's kernel was called"):
        linear_int8(x[1:], *int8, bias_N)


def test_native_kernels_exist_only_on_cpus():
    assert module.has_quantized_kernels(torch.device("cpu"))
    assert not module.has_quantized_kernels(torch.device("cuda"))
    assert not module.has_quantized_kernels(torch.device("meta"))


@pytest.mark.parametrize("num_outputs", [16, 64, 4 * BLOCK, 4 * BLOCK + 16, 8 * BLOCK + 80])
def test_pack_int4_for_cpu_does_not_depend_on_blocks(num_outputs):
    packed = integers(0, 256, num_outputs, 48).to(torch.uint8)
    whole = torch._convert_weight_to_int4pack_for_cpu(unpack_int4(packed).int(), 1)
    assert torch.equal(pack_int4_for_cpu(packed), whole)


# --- unquantized weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("num_rows", [1, MANY_ROWS_HALF - 1, MANY_ROWS_HALF, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_matches_float64(monkeypatch, fast, num_rows, dtype):
    """CPUs either multiply in bfloat16, or in float32 for many rows."""
    monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda: fast)
    num_outputs = DENSE_BLOCK + 76
    x, weight_NK, bias_N = random(num_rows, 96), 0.1 * random(num_outputs, 96, seed=1), random(num_outputs, seed=2)
    x, weight_NK, bias_N = (tensor.to(dtype) for tensor in (x, weight_NK, bias_N))
    result = linear(x, weight_NK, bias_N)
    expected = F.linear(x.double(), weight_NK.double(), bias_N.double())
    assert result.dtype == dtype
    # A product rounded before the bias is added may be as large as both.
    allowed = UNIT[dtype] * (2 * expected.abs() + bias_N.double().abs())
    allowed += SUM * (x.double().abs() @ weight_NK.double().abs().T)
    assert ((result.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("num_rows", [2, MANY_ROWS_HALF, 30])
def test_quantized_linears_do_not_depend_on_neighbouring_rows(num_rows):
    weight_NK, bias_N = 0.1 * random(NUM_OUTPUTS, 96, seed=1), random(NUM_OUTPUTS, seed=2)
    x = random(num_rows, 96)
    other = torch.cat([x[:1], 100 * random(num_rows - 1, 96, seed=3)])
    assert torch.equal(linear(x, weight_NK, bias_N)[0], linear(other, weight_NK, bias_N)[0])
    torch.testing.assert_close(linear(x, weight_NK, bias_N)[:1], linear(x[:1], weight_NK, bias_N), atol=1e-5, rtol=0)


@pytest.mark.parametrize("given", ["x and weights", "weights"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_linear_gradients_match_those_of_pytorch(given, dtype, rtol):
    inputs = [tensor.to(dtype) for tensor in (random(9, 32), random(24, 32, seed=1), random(24, seed=2))]
    wanted = [tensor.requires_grad_() for tensor in (inputs if given == "x and weights" else inputs[1:])]
    target = random(9, 24, seed=3).to(dtype)
    got, expected = (torch.autograd.grad((function(*inputs) * target).sum(), wanted) for function in (linear, F.linear))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=rtol, atol=10 * rtol)


# --- MKL's packed order -------------------------------------------------------------------------------------------

with_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch comes without MKL")


@with_mkl
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 64, 100])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(96, 32), (1, 7), (130, 257)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_prepacked_equals_linear(num_rows, num_outputs, num_inputs, biased):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(num_rows, num_inputs, generator=generator),
        torch.randn(num_outputs, num_inputs, generator=generator),
    )
    bias = torch.randn(num_outputs, generator=generator) if biased else None
    with torch.inference_mode():
        result = linear_prepacked(x, prepack(weight), weight, bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0)


@with_mkl
def test_linear_prepacked_gives_a_row_the_same_bits_in_any_batch():
    """An image therefore depends neither on its batch nor on the window of speculative decoding."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 96, generator=generator), torch.randn(288, 96, generator=generator)
    packed = prepack(weight)
    with torch.inference_mode():
        together = linear_prepacked(x, packed, weight, None)
        for count in (1, 2, 3, 16, 33):
            assert torch.equal(linear_prepacked(x[:count], packed, weight, None), together[:count])
        assert torch.equal(linear_prepacked(x.view(4, 16, 96), packed, weight, None), together.view(4, 16, 288))


@with_mkl
def test_linear_prepacked_multiplies_many_rows_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 20, 96, generator=generator), torch.randn(32, 96, generator=generator)
    with torch.inference_mode():
        whole = linear_prepacked(x, prepack(weight), weight, weight[:, 0].contiguous())
        monkeypatch.setattr(module, "PACKED_AT_ONCE", 7)
        assert torch.equal(linear_prepacked(x, prepack(weight), weight, weight[:, 0].contiguous()), whole)


@with_mkl
def test_can_prepack_only_float32_on_a_cpu_with_mkl(monkeypatch):
    cpu = torch.device("cpu")
    assert can_prepack(cpu, torch.float32)
    assert not can_prepack(cpu, torch.bfloat16)
    assert not can_prepack(torch.device("meta"), torch.float32)
    monkeypatch.setenv("COGVIEW_KERNELS", "reference")
    assert not can_prepack(cpu, torch.float32)
