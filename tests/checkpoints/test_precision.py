"""Conversion of weights between a file and a model: dtypes, quantization and memory."""

import pickle
import re
import weakref
from pathlib import Path

import pytest
import torch

from cogview.checkpoints.precision import Precision, TensorArena, cast, convert, converted_specs, stored_quantization
from cogview.checkpoints.safetensors_io import TensorSpec
from cogview.errors import InputError
from cogview.modeling.quantization import dequantize_weight, quantize_weight

PROJECTION = "layers.0.mlp.input.weight"
FEW = ("int8", "int4")


class FakeWeights:
    """Weights in memory that count how many of the tensors read are still alive."""

    path = Path("model.safetensors")

    def __init__(self, tensors):
        self.tensors = tensors
        self.specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self.kept = []
        self.most = 0
        self._read = weakref.WeakSet()

    def read(self, name, *, keep=False):
        tensor = self.tensors[name].clone()
        self._read.add(tensor)
        self.most = max(self.most, len(self._read))
        if keep:
            self.kept.append(name)
        return tensor


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(dtype=torch.float32):
    """Return a projection and tensors that are not quantized: its bias, a norm and an embedding."""
    return {
        "embedding.weight": random(40, 64).to(dtype),
        PROJECTION: random(48, 64, seed=1).to(dtype),
        "layers.0.mlp.input.bias": random(48, seed=2).to(dtype),
        "layers.0.mlp_norm.weight": random(64, seed=3).to(dtype),
        "layers.0.mlp.input.other.weight": random(3, 64, seed=4).to(dtype),
    }


def stored(quantization):
    tensors = plain(torch.float16)
    return tensors | quantize_weight(PROJECTION, tensors[PROJECTION], quantization)


def converted(tensors, precision, **settings):
    """Convert tensors and compare the result with the announced specs."""
    weights = FakeWeights(tensors)
    specs = converted_specs(weights, precision)
    result = dict(convert(weights, precision, **settings))
    assert {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in result.items()} == specs
    return result


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(params=[False, True], ids=["anywhere", "memory"])
def memory(request):
    """None, or memory for what is converted."""
    return TensorArena() if request.param else None


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_convert_rounds_once(source, dtype, memory):
    tensors = plain(source)
    found = converted(tensors, Precision(dtype), memory=memory)
    assert_same(found, {name: tensor.to(dtype or source) for name, tensor in tensors.items()})


@pytest.mark.parametrize("quantization", FEW)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_convert_quantizes_projections_only(quantization, dtype, memory):
    tensors = plain()
    others = {name: tensor.to(dtype or torch.float32) for name, tensor in tensors.items() if name != PROJECTION}
    found = converted(tensors, Precision(dtype, quantization), memory=memory)
    assert_same(found, others | quantize_weight(PROJECTION, tensors[PROJECTION], quantization))


@pytest.mark.parametrize("quantization", FEW)
def test_convert_keeps_quantized_weights(quantization, memory):
    tensors = stored(quantization)
    assert stored_quantization(FakeWeights(tensors).specs) == quantization
    assert_same(converted(tensors, Precision(None, quantization), memory=memory), tensors)
    floats = ("embedding.weight", "layers.0.mlp.input.bias", "layers.0.mlp_norm.weight")
    wide = {name: tensor.float() if name in floats else tensor for name, tensor in tensors.items()}
    wide["layers.0.mlp.input.other.weight"] = tensors["layers.0.mlp.input.other.weight"].float()
    assert_same(converted(tensors, Precision(torch.float32, quantization), memory=memory), wide)


@pytest.mark.parametrize("quantization", FEW)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_convert_dequantizes_quantized_weights(quantization, dtype, memory):
    tensors = stored(quantization)
    scale = tensors[next(name for name in tensors if "scale" in name)]
    restored = dequantize_weight(tensors[PROJECTION], scale, quantization)
    expected = {name: tensor.to(dtype or torch.float16) for name, tensor in plain(torch.float16).items()}
    expected[PROJECTION] = restored.to(dtype or torch.float32)
    assert_same(converted(tensors, Precision(dtype), memory=memory), expected)
    error = (expected[PROJECTION].float() - plain()[PROJECTION]).abs().max()
    assert 0 < error < (0.03 if quantization == "int8" else 0.3)


@pytest.mark.parametrize(("held", "asked"), [FEW, FEW[::-1]])
def test_converted_specs_refuses_to_change_the_quantization(held, asked):
    with pytest.raises(InputError) as caught:
        converted_specs(FakeWeights(stored(held)), Precision(torch.bfloat16, asked))
    assert (
        str(caught.value) == f"model.safetensors: the weights are stored as {held}, which cannot be turned into {asked}"
    )


@pytest.mark.parametrize(("quantization", "name"), [("int8", "scale"), ("int4", "scales_and_zeros")])
def test_converted_specs_reports_a_missing_scale(quantization, name):
    tensors = stored(quantization)
    del tensors[PROJECTION.replace("weight", name)]
    for precision in (Precision(torch.float32), Precision(torch.bfloat16, quantization)):
        with pytest.raises(InputError, match=rf"^model\.safetensors: layers\.0\.mlp\.input\.{name} is missing$"):
            converted_specs(FakeWeights(tensors), precision)


def test_converted_specs_reports_a_width_that_int4_cannot_group():
    with pytest.raises(InputError) as caught:
        converted_specs(FakeWeights({PROJECTION: random(8, 40)}), Precision(None, "int4"))
    assert str(caught.value) == (
        f"model.safetensors: {PROJECTION} cannot be held in int4: int4 needs layers whose inputs are a multiple of 32, "
        "got 40"
    )


def test_convert_keeps_tensors_mapped_when_nothing_changes():
    weights = FakeWeights(plain() | {"layers.0.mlp_norm.weight": random(64).half()})
    dict(convert(weights, Precision(torch.float32), keep=True))
    assert set(weights.kept) == {*weights.specs} - {"layers.0.mlp_norm.weight"}
    weights = FakeWeights(stored("int8"))
    dict(convert(weights, Precision(torch.float16, "int8"), keep=True))
    assert set(weights.kept) == {*weights.specs}


def test_precision_str_is_its_dtype_or_quantization():
    assert [str(precision) for precision in (Precision(torch.float16), Precision(torch.bfloat16, "int8"))] == [
        "float16",
        "int8",
    ]


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(TensorArena, "BLOCK", 1 << 12)


@pytest.mark.usefixtures("small_blocks")
def test_tensor_arena_tensors_do_not_overlap():
    generator, memory, placed = torch.Generator().manual_seed(0), TensorArena(), []
    shapes = [(), (0,), (1,), (7, 3), (64,), (65,), (300, 1), (2, 0, 3), (2000,), (1,)]
    for dtype in (torch.int8, torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        for shape in shapes:
            original = torch.randint(0, 100, shape, generator=generator).to(dtype)
            placed.append((memory.copy_in(original), original))
    for tensor, original in placed:
        assert tensor.dtype == original.dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, original)
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0


def test_tensor_arena_puts_small_tensors_in_one_block(small_blocks):
    memory = TensorArena()
    first, *others = [memory.allocate(TensorSpec(torch.bfloat16, (33,))) for _ in range(4096 // 128)]
    assert [tensor.data_ptr() - first.data_ptr() for tensor in others] == list(range(128, 4096, 128))
    block = memory._block
    memory.allocate(TensorSpec(torch.bfloat16, (1,)))
    assert memory._block is not block


def test_tensor_arena_allocates_large_tensors_alone(small_blocks):
    memory = TensorArena()
    small = [memory.allocate(TensorSpec(torch.int8, (64,)))]
    large = memory.allocate(TensorSpec(torch.int8, (1025,)))
    small.append(memory.allocate(TensorSpec(torch.int8, (64,))))
    assert large.untyped_storage().nbytes() == 1025
    assert small[1].data_ptr() == small[0].data_ptr() + 64


@pytest.mark.parametrize(
    ("tensors", "precision"),
    [
        (plain(), Precision(torch.bfloat16)),
        (plain(torch.float16), Precision(torch.bfloat16)),
        (plain(), Precision(torch.bfloat16, "int8")),
        (plain(), Precision(torch.bfloat16, "int4")),
        (stored("int8"), Precision(torch.bfloat16)),
    ],
)
def test_convert_writes_into_one_block(tensors, precision):
    result = converted(tensors, precision, memory=TensorArena())
    extents = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in result.values())
    assert extents[-1][0] + extents[-1][1] - extents[0][0] <= sum(-(-size // 64) * 64 for _, size in extents)


@pytest.mark.parametrize(
    ("make", "precision"),
    [
        (plain, Precision(torch.bfloat16)),
        (plain, Precision(torch.bfloat16, "int8")),
        (plain, Precision(torch.bfloat16, "int4")),
        (plain, Precision(torch.float32)),
        (lambda: stored("int8"), Precision(torch.float32)),
        (lambda: stored("int4"), Precision(torch.bfloat16)),
        (lambda: stored("int8"), Precision(torch.bfloat16, "int8")),
    ],
)
def test_convert_holds_few_source_tensors_at_a_time(make, precision):
    """At most a weight, its scale and the ones before are in memory: a second copy of a large model would not fit."""
    tensors = make()
    names = [name.replace("layers.0", f"layers.{number}") for number in range(20) for name in tensors]
    weights = FakeWeights({name: tensors[re.sub(r"\d+", "0", name)] for name in names})
    for _ in convert(weights, precision, memory=TensorArena()):
        pass
    assert 0 < weights.most <= 4


@pytest.mark.parametrize("size", [0, 3, (1 << 18) + 5])
@pytest.mark.parametrize(("source", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_cast_between_half_precisions_equals_to(size, source, dtype):
    numbers = (random(size) * torch.logspace(-6, 4, size)).to(getattr(torch, source))
    expected = numbers.to(getattr(torch, dtype))
    assert torch.equal(cast(numbers, getattr(torch, dtype)), expected)
    room = torch.empty_like(expected)
    assert cast(numbers, getattr(torch, dtype), room) is room
    assert torch.equal(room, expected)
    if size > 2:  # not contiguous
        assert torch.equal(cast(numbers[::2], getattr(torch, dtype)), expected[::2])


def test_tensors_of_an_arena_are_stored_without_their_block():
    """Pickle and ``torch.save`` write storages whole: each tensor once brought 256 MB."""
    memory = TensorArena()
    tensors = [memory.copy_in(torch.full((3, number), number, dtype=torch.bfloat16)) for number in range(1, 40)]
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [tensor.nbytes for tensor in tensors]
    assert len(pickle.dumps(tensors)) < 100_000
    for number, tensor in enumerate(pickle.loads(pickle.dumps(tensors)), start=1):
        assert torch.equal(tensor, torch.full((3, number), number, dtype=torch.bfloat16))
    assert memory.allocate(TensorSpec(torch.float32, (0, 4))).shape == (0, 4)
