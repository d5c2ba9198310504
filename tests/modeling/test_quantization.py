"""A quantized model computes what its dequantized weights compute, stored or quantized at loading."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.checkpoints.checkpoint import Model, load_model, load_transformer, save_model
from cogview.checkpoints.precision import Precision, convert, converted_specs
from cogview.checkpoints.safetensors_io import WeightsFile, WeightsWriter
from cogview.device import QUANTIZATIONS, DevicePlacement
from cogview.errors import InputError
from cogview.kernels.linear import pack_int4_for_cpu
from cogview.modeling.quantization import (
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
    """A random model of width 96 and inner width 384: its int4 groups have 32 and 64 inputs."""
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
def quantization(request):
    return request.param


@pytest.fixture(scope="module")
def stored(folder, quantization, tmp_path_factory):
    """``folder`` with its projections stored quantized."""
    return store(folder, tmp_path_factory.mktemp("stored") / quantization, Precision(None, quantization))


def store(folder, target, precision):
    shutil.copytree(folder, target)
    weights = WeightsFile(folder / "model.safetensors")
    with WeightsWriter(target / "new", converted_specs(weights, precision)) as writer:
        for name, tensor in convert(weights, precision):
            writer.write(name, tensor)
    Path(target / "new").replace(target / "model.safetensors")
    return target


def state_of(folder, dtype=torch.float32, quantization=None):
    return load_transformer(folder, CPU, dtype, quantization).state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def dequantized_transformer(folder, quantization):
    """Return a float32 transformer with the dequantized weights."""
    transformer = load_transformer(folder, CPU, torch.float32)
    weights = {}
    for name, tensor in transformer.state_dict().items():
        parts = quantize_weight(name, tensor, quantization) if is_quantized(name) else {}
        weights[name] = dequantize_weight(*parts.values(), quantization) if parts else tensor
    transformer.load_state_dict(weights, assign=True)
    return transformer


def logits_of(transformer, num_ids):
    ids = torch.randint(0, 8000, (2, num_ids), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return transformer(ids)


# --- tensors of a quantized model ---------------------------------------------------------------------------------


def test_load_transformer_quantizes_only_the_projections(folder, quantization):
    transformer, plain = load_transformer(folder, CPU, torch.bfloat16, quantization), state_of(folder)
    projections = [name for name, module in transformer.named_modules() if isinstance(module, LAYERS[quantization])]
    assert projections == [
        f"layers.{number}.{part}"
        for number in (0, 1)
        for part in ("attention.query_key_value", "attention.output", "mlp.input", "mlp.output")
    ]
    assert {f"{name}.weight" for name in projections} == {name for name in plain if is_quantized(name)}
    parts = {part for name in plain if is_quantized(name) for part in quantized_names(name, quantization)}
    state = transformer.state_dict()
    assert state.keys() == plain.keys() | parts
    for name in state.keys() - parts:
        assert torch.equal(state[name], plain[name].bfloat16()), name
    assert not any(isinstance(module, torch.nn.Linear) for module in transformer.modules())


def test_load_transformer_quantizes_as_quantize_weight_does(folder, quantization, monkeypatch):
    monkeypatch.setenv("COGVIEW_KERNELS", "torch")  # native kernels read int4 in the order of files
    plain, state = state_of(folder), state_of(folder, quantization=quantization)
    for name in filter(is_quantized, plain):
        weight, scale = quantize_weight(name, plain[name], quantization).values()
        first, second = quantized_names(name, quantization)
        assert torch.equal(state[first], pack_int4_for_cpu(weight) if quantization == "int4" else weight)
        assert torch.equal(state[second], scale)


def test_swap_quantized_linears_takes_no_memory_on_the_meta_device(folder, quantization):
    config = load_transformer(folder, CPU, torch.float32).config
    with torch.device("meta"):
        transformer = Transformer(config)
        swap_quantized_linears(transformer, quantization)
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in transformer.state_dict().items()}
    loaded = state_of(folder, quantization=quantization)
    assert all(tensor.is_meta for tensor in transformer.state_dict().values())
    assert shapes == {name: (tensor.dtype, tensor.shape) for name, tensor in loaded.items()}


# --- logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ids", [5, 60])  # of two rows: PyTorch's kernels, and weights that are dequantized first
def test_quantized_transformer_equals_dequantized_weights_with_references(folder, quantization, num_ids, monkeypatch):
    monkeypatch.setenv("COGVIEW_KERNELS", "reference")
    transformer = load_transformer(folder, CPU, torch.float32, quantization)
    expected = logits_of(dequantized_transformer(folder, quantization), num_ids)
    torch.testing.assert_close(logits_of(transformer, num_ids), expected, atol=1e-3, rtol=0)
    assert (expected - logits_of(load_transformer(folder, CPU, torch.float32), num_ids)).abs().max() > 1e-2


@pytest.mark.parametrize("num_ids", [5, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_transformer_is_near_dequantized_weights_with_kernels(folder, quantization, num_ids, dtype):
    """They differ by the rounding of bfloat16."""
    transformer = load_transformer(folder, CPU, dtype, quantization)
    expected = logits_of(dequantized_transformer(folder, quantization), num_ids)
    error = (logits_of(transformer, num_ids) - expected).square().mean().sqrt()
    assert error < 0.02 * expected.std()


# --- stored weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_transformer_gives_the_same_weights_when_stored_quantized(
    folder, stored, quantization, kernels, dtype, monkeypatch
):
    monkeypatch.setenv("COGVIEW_KERNELS", kernels)
    assert_same(state_of(stored, dtype, quantization), state_of(folder, dtype, quantization))


def test_stored_quantized_weights_have_the_expected_size(folder, stored, quantization):
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, stored)]
    weights = sum(tensor.nbytes for name, tensor in state_of(folder).items() if is_quantized(name))
    fraction = {"int8": 1 / 4, "int4": 1 / 8}[quantization]
    assert sizes[0] - sizes[1] == pytest.approx((1 - fraction) * weights, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_transformer_dequantizes_stored_weights_when_no_quantization_is_asked(folder, stored, quantization, dtype):
    expected = {
        name: tensor.to(dtype) for name, tensor in dequantized_transformer(folder, quantization).state_dict().items()
    }
    assert_same(state_of(stored, dtype), expected)


def test_from_pretrained_names_both_quantizations_when_they_differ(stored, quantization):
    other = next(name for name in QUANTIZATIONS if name != quantization)
    with pytest.raises(InputError) as caught:
        CogView.from_pretrained(stored, device="cpu", dtype=other)
    assert str(caught.value) == (
        f"{stored}/model.safetensors: the weights are stored as {quantization}, which cannot be turned into {other}"
    )


def test_load_transformer_names_a_missing_scale(stored, quantization, tmp_path):
    folder = shutil.copytree(stored, tmp_path / "model")
    weights = WeightsFile(folder / "model.safetensors")
    name = quantized_names("layers.1.mlp.output.weight", quantization)[1]
    with WeightsWriter(tmp_path / "new", {key: spec for key, spec in weights.specs.items() if key != name}) as writer:
        for key in weights.specs.keys() - {name}:
            writer.write(key, weights.read(key))
    Path(tmp_path / "new").replace(folder / "model.safetensors")
    for chosen in (quantization, None):
        with pytest.raises(InputError) as caught:
            load_transformer(folder, CPU, torch.float32, chosen)
        assert str(caught.value) == f"{folder}/model.safetensors: {name} is missing"


def test_load_transformer_names_the_weight_that_int4_cannot_group(tiny_checkpoint, tmp_path):
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


def test_save_model_raises_input_error_when_weights_are_quantized(folder, quantization, tmp_path):
    model = load_model(folder, CPU, torch.float32, quantization)
    with pytest.raises(InputError) as caught:
        save_model(tmp_path / "new", model)
    assert str(caught.value) == ("quantized weights cannot be saved: copy or convert the folder they came from")
    assert not any(tmp_path.iterdir())


# --- generation ---------------------------------------------------------------------------------------------------


def codes_of(images):
    return np.stack([image.codes for image in images])


def test_quantized_model_runs_every_task(tiny_checkpoint, quantization):
    model = CogView.from_pretrained(tiny_checkpoint, device="cpu", dtype=quantization)
    assert str(model.placement) == f"cpu, bfloat16 with weights in {quantization} (as requested)"
    images = model.generate(PROMPTS[:2], seed=7)
    assert all(np.asarray(image).std() > 0 for image in images)
    np.testing.assert_array_equal(codes_of(model.generate(PROMPTS[:2], seed=7)), codes_of(images))
    assert (codes_of(model.generate(PROMPTS[:2], seed=8)) != codes_of(images)).any(axis=(1, 2)).all()
    assert model.score(images, PROMPTS[:2])[0].log_probability < 0
    model.caption(images[:1], method="beam")
    assert model.upscale(images[:1], PROMPTS[0])[0].size == (128, 128)


def test_generate_gives_the_same_codes_when_stored_quantized(tiny_checkpoint, quantization, tmp_path):
    path = store(tiny_checkpoint, tmp_path / "stored", Precision(None, quantization))
    model = CogView.from_pretrained(path, device="cpu")
    assert str(model.placement) == f"cpu, bfloat16 with weights in {quantization} (as stored)"
    quantized = CogView.from_pretrained(tiny_checkpoint, device="cpu", dtype=quantization)
    np.testing.assert_array_equal(
        codes_of(model.generate(PROMPTS, seed=7)), codes_of(quantized.generate(PROMPTS, seed=7))
    )


def test_generate_does_not_depend_on_the_batch_when_quantized(tiny_checkpoint, quantization, monkeypatch):
    """Activations are float32: in half precision two codes of nearly equal probability could be exchanged."""
    monkeypatch.setenv("COGVIEW_KERNELS", "reference")
    placement = DevicePlacement(CPU, torch.float32, "as asked", quantization)
    model = CogView(load_model(tiny_checkpoint, CPU, torch.float32, quantization), placement, "tiny")
    batched = codes_of(model.generate(PROMPTS, seed=7))
    for batch_size in (1, 2):
        np.testing.assert_array_equal(codes_of(model.generate(PROMPTS, seed=7, batch_size=batch_size)), batched)


# --- mapped weights -----------------------------------------------------------------------------------------------


def mappings_of(tensors, path):
    """Return the address ranges into which ``path`` is mapped; None if a tensor is outside them."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]
    all_mapped = all(any(tensor.data_ptr() in part for part in ranges) for tensor in tensors)
    return ranges if all_mapped else None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc/self/maps")
def test_load_transformer_maps_weights_that_need_no_conversion(folder, tmp_path):
    """All tensors share one mapping, or two with older versions of safetensors."""
    path = folder / "model.safetensors"
    state = state_of(folder)
    assert len(mappings_of(state.values(), path)) <= 2
    del state
    for name, tensor in state_of(folder, torch.bfloat16).items():
        assert mappings_of([tensor], path) is None, name
    stored = store(folder, tmp_path / "int8", Precision(torch.bfloat16, "int8"))
    state = state_of(stored, torch.bfloat16, "int8")
    assert len(mappings_of(state.values(), stored / "model.safetensors")) <= 2


def test_load_transformer_copies_pages_on_write(folder):
    before = (folder / "model.safetensors").read_bytes()
    transformer = load_transformer(folder, CPU, torch.float32)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
