"""A model in few bits computes what its rounded weights say, however they came there."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.checkpoints.checkpoint import Model, load_model, load_transformer, save_model
from cogview.checkpoints.precision import Precision, convert, converted_specs
from cogview.checkpoints.safetensors_io import WeightsFile, WeightsWriter
from cogview.device import DevicePlacement
from cogview.errors import InputError
from cogview.kernels.linear import pack_int4_for_cpu
from cogview.modeling.quantization import (
    QUANTIZATIONS,
    Int4Linear,
    Int8Linear,
    dequantize_weight,
    is_quantized,
    quantize_weight,
    quantized_names,
    swap_quantized_linears,
)
from cogview.modeling.transformer import Transformer
from cogview.pipeline.cogview import CogView

CPU = torch.device("cpu")
PROMPTS = ["狐狸", "蓝色背景上的三只狗在汽车的左边", "一个红苹果"]
LAYERS = {"int8": Int8Linear, "int4": Int4Linear}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """A model of width 96 and 384 within, whose groups in int4 are of 32 and of 64 inputs, with lively weights."""
    tiny = load_model(tiny_checkpoint, CPU, torch.float32)
    shape = dataclasses.replace(tiny.config.transformer, width=96, num_heads=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = Transformer(shape)
        with torch.no_grad():
            for parameter in transformer.parameters():
                noise = torch.randn(parameter.shape)
                parameter.copy_(0.1 * noise if parameter.dim() == 2 else parameter + 0.1 * noise)
    folder = tmp_path_factory.mktemp("quantized") / "model"
    parts = {field.name: getattr(tiny, field.name) for field in dataclasses.fields(Model)}
    config = dataclasses.replace(tiny.config, transformer=shape)
    save_model(folder, Model(**parts | {"config": config, "transformer": transformer}))
    return folder


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def few_bits(request):
    return request.param


@pytest.fixture(scope="module")
def stored(folder, few_bits, tmp_path_factory):
    """``folder`` with its projections stored in few bits."""
    return store(folder, tmp_path_factory.mktemp("stored") / few_bits, Precision(None, few_bits))


def store(folder, target, precision):
    shutil.copytree(folder, target)
    weights = WeightsFile(folder / "model.safetensors")
    with WeightsWriter(target / "new", converted_specs(weights, precision)) as writer:
        for name, tensor in convert(weights, precision):
            writer.write(name, tensor)
    os.replace(target / "new", target / "model.safetensors")
    return target


def state_of(folder, dtype=torch.float32, few_bits=None):
    return load_transformer(folder, CPU, dtype, few_bits).state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def restored(folder, few_bits):
    """A float32 transformer with the weights that those in few bits stand for."""
    transformer = load_transformer(folder, CPU, torch.float32)
    weights = {}
    for name, tensor in transformer.state_dict().items():
        parts = quantize_weight(name, tensor, few_bits) if is_quantized(name) else {}
        weights[name] = dequantize_weight(*parts.values(), few_bits) if parts else tensor
    transformer.load_state_dict(weights, assign=True)
    return transformer


def logits_of(transformer, num_ids):
    ids = torch.randint(0, 8000, (2, num_ids), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return transformer(ids)


# --- what a model in few bits is ----------------------------------------------------------------------------------


def test_projections_alone_are_in_few_bits(folder, few_bits):
    transformer, plain = load_transformer(folder, CPU, torch.bfloat16, few_bits), state_of(folder)
    projections = [name for name, module in transformer.named_modules() if isinstance(module, LAYERS[few_bits])]
    assert projections == [
        f"layers.{number}.{part}"
        for number in (0, 1)
        for part in ("attention.query_key_value", "attention.output", "mlp.input", "mlp.output")
    ]
    assert {f"{name}.weight" for name in projections} == {name for name in plain if is_quantized(name)}
    parts = {part for name in plain if is_quantized(name) for part in quantized_names(name, few_bits)}
    state = transformer.state_dict()
    assert state.keys() == plain.keys() | parts
    for name in state.keys() - parts:
        assert torch.equal(state[name], plain[name].bfloat16()), name
    assert not any(isinstance(module, torch.nn.Linear) for module in transformer.modules())


def test_rounded_weights_are_those_of_the_kernels(folder, few_bits):
    plain, state = state_of(folder), state_of(folder, few_bits=few_bits)
    for name in filter(is_quantized, plain):
        weight, scale = quantize_weight(name, plain[name], few_bits).values()
        first, second = quantized_names(name, few_bits)
        assert torch.equal(state[first], pack_int4_for_cpu(weight) if few_bits == "int4" else weight)
        assert torch.equal(state[second], scale)


def test_layers_without_weights_take_no_memory(folder, few_bits):
    config = load_transformer(folder, CPU, torch.float32).config
    with torch.device("meta"):
        transformer = Transformer(config)
        swap_quantized_linears(transformer, few_bits)
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in transformer.state_dict().items()}
    loaded = state_of(folder, few_bits=few_bits)
    assert all(tensor.is_meta for tensor in transformer.state_dict().values())
    assert shapes == {name: (tensor.dtype, tensor.shape) for name, tensor in loaded.items()}


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ids", [5, 60])  # of two rows: with PyTorch's kernels, and unpacked first
def test_references_compute_what_restored_weights_do(folder, few_bits, num_ids, monkeypatch):
    monkeypatch.setenv("COGVIEW_KERNELS", "reference")
    transformer = load_transformer(folder, CPU, torch.float32, few_bits)
    expected = logits_of(restored(folder, few_bits), num_ids)
    torch.testing.assert_close(logits_of(transformer, num_ids), expected, atol=1e-3, rtol=0)
    assert (expected - logits_of(load_transformer(folder, CPU, torch.float32), num_ids)).abs().max() > 1e-2


@pytest.mark.parametrize("num_ids", [5, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_compute_what_restored_weights_do(folder, few_bits, num_ids, dtype):
    """Up to the rounding of bfloat16."""
    transformer = load_transformer(folder, CPU, dtype, few_bits)
    expected = logits_of(restored(folder, few_bits), num_ids)
    error = (logits_of(transformer, num_ids) - expected).square().mean().sqrt()
    assert error < 0.02 * expected.std()


# --- how it came there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_is_what_is_rounded_while_loading(folder, stored, few_bits, kernels, dtype, monkeypatch):
    monkeypatch.setenv("COGVIEW_KERNELS", kernels)
    assert_same(state_of(stored, dtype, few_bits), state_of(folder, dtype, few_bits))


def test_stored_takes_the_room_that_it_says(folder, stored, few_bits):
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, stored)]
    weights = sum(tensor.nbytes for name, tensor in state_of(folder).items() if is_quantized(name))
    kept = {"int8": 1 / 4, "int4": 1 / 8}[few_bits]
    assert sizes[0] - sizes[1] == pytest.approx((1 - kept) * weights, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_can_be_opened_as_ordinary_numbers(folder, stored, few_bits, dtype):
    expected = {name: tensor.to(dtype) for name, tensor in restored(folder, few_bits).state_dict().items()}
    assert_same(state_of(stored, dtype), expected)


def test_stored_in_one_and_asked_for_in_the_other(stored, few_bits):
    other = next(name for name in QUANTIZATIONS if name != few_bits)
    with pytest.raises(InputError) as caught:
        CogView.from_pretrained(stored, device="cpu", dtype=other)
    assert str(caught.value) == (
        f"{stored}/model.safetensors: the weights are stored as {few_bits}, which cannot be turned into {other}"
    )


def test_a_scale_that_is_missing_is_named(stored, few_bits, tmp_path):
    folder = shutil.copytree(stored, tmp_path / "model")
    weights = WeightsFile(folder / "model.safetensors")
    name = quantized_names("layers.1.mlp.output.weight", few_bits)[1]
    with WeightsWriter(tmp_path / "new", {key: spec for key, spec in weights.specs.items() if key != name}) as writer:
        for key in weights.specs.keys() - {name}:
            writer.write(key, weights.read(key))
    os.replace(tmp_path / "new", folder / "model.safetensors")
    for chosen in (few_bits, None):
        with pytest.raises(InputError) as caught:
            load_transformer(folder, CPU, torch.float32, chosen)
        assert str(caught.value) == f"{folder}/model.safetensors: {name} is missing"


def test_a_width_that_int4_cannot_group(tiny_checkpoint, tmp_path):
    tiny = load_model(tiny_checkpoint, CPU, torch.float32)
    shape = dataclasses.replace(tiny.config.transformer, width=48)
    config = dataclasses.replace(tiny.config, transformer=shape)
    save_model(tmp_path, dataclasses.replace(tiny, config=config, transformer=Transformer(shape)))
    with pytest.raises(InputError) as caught:
        load_transformer(tmp_path, CPU, torch.float32, "int4")
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors: layers.0.attention.output.weight cannot be held in int4: int4 needs layers "
        "whose inputs are a multiple of 32, got 48"
    )
    load_transformer(tmp_path, CPU, torch.float32, "int8")


def test_rounded_weights_cannot_be_saved(folder, few_bits, tmp_path):
    model = load_model(folder, CPU, torch.float32, few_bits)
    with pytest.raises(InputError) as caught:
        save_model(tmp_path / "new", model)
    assert str(caught.value) == ("quantized weights cannot be saved: copy or convert the folder they came from")
    assert not any(tmp_path.iterdir())


# --- what is drawn ------------------------------------------------------------------------------------------------


def codes_of(pictures):
    return np.stack([picture.codes for picture in pictures])


def test_a_model_in_few_bits_draws(tiny_checkpoint, few_bits):
    model = CogView.from_pretrained(tiny_checkpoint, device="cpu", dtype=few_bits)
    assert str(model.placement) == f"cpu, {few_bits} with bfloat16 (as asked)"
    pictures = model.generate(PROMPTS[:2], seed=7)
    assert all(np.asarray(picture).std() > 0 for picture in pictures)
    np.testing.assert_array_equal(codes_of(model.generate(PROMPTS[:2], seed=7)), codes_of(pictures))
    assert (codes_of(model.generate(PROMPTS[:2], seed=8)) != codes_of(pictures)).any(axis=(1, 2)).all()
    assert model.score(pictures, PROMPTS[:2])[0].log_probability < 0
    model.caption(pictures[:1], method="beam")
    assert model.upscale(pictures[:1], PROMPTS[0])[0].size == (128, 128)


def test_stored_in_few_bits_it_draws_the_same(tiny_checkpoint, few_bits, tmp_path):
    path = store(tiny_checkpoint, tmp_path / "stored", Precision(None, few_bits))
    model = CogView.from_pretrained(path, device="cpu")
    assert str(model.placement) == f"cpu, {few_bits} with bfloat16 (as stored)"
    rounded = CogView.from_pretrained(tiny_checkpoint, device="cpu", dtype=few_bits)
    np.testing.assert_array_equal(
        codes_of(model.generate(PROMPTS, seed=7)), codes_of(rounded.generate(PROMPTS, seed=7))
    )


def test_a_picture_does_not_depend_on_its_batch(tiny_checkpoint, few_bits, monkeypatch):
    """With activations in float32: at half precision two codes of nearly one probability may change places."""
    monkeypatch.setenv("COGVIEW_KERNELS", "reference")
    placement = DevicePlacement(CPU, torch.float32, "as asked", few_bits)
    model = CogView(load_model(tiny_checkpoint, CPU, torch.float32, few_bits), placement, "tiny")
    together = codes_of(model.generate(PROMPTS, seed=7))
    for batch_size in (1, 2):
        np.testing.assert_array_equal(codes_of(model.generate(PROMPTS, seed=7, batch_size=batch_size)), together)


# --- weights that stay in their file ------------------------------------------------------------------------------


def mappings_of(tensors, path):
    """The parts of memory that ``path`` is mapped into; None where a tensor lies elsewhere."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]
    lie_there = all(any(tensor.data_ptr() in part for part in ranges) for tensor in tensors)
    return ranges if lie_there else None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not tell what is mapped")
def test_weights_that_are_wanted_as_they_are_stay_in_the_file(folder, tmp_path):
    """In one mapping, or two with older versions of the library, and not in one for each of them."""
    path = folder / "model.safetensors"
    state = state_of(folder)
    assert len(mappings_of(state.values(), path)) <= 2
    del state
    for name, tensor in state_of(folder, torch.bfloat16).items():
        assert mappings_of([tensor], path) is None, name
    stored = store(folder, tmp_path / "int8", Precision(torch.bfloat16, "int8"))
    state = state_of(stored, torch.bfloat16, "int8")
    assert len(mappings_of(state.values(), stored / "model.safetensors")) <= 2


def test_training_on_does_not_change_the_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    transformer = load_transformer(folder, CPU, torch.float32)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
