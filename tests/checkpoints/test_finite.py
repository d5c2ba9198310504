"""Weights that are NaN or infinite are named while they are read, and nothing is drawn or written from them."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview.checkpoints.adapter import Adapter, BaseModelInfo, save_adapter
from cogview.checkpoints.adapter_merge import merge_folder
from cogview.checkpoints.checkpoint import load_model, load_transformer, save_model
from cogview.checkpoints.finite import is_finite, require_finite
from cogview.checkpoints.hub import push_folder
from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.checkpoints.precision import Precision
from cogview.checkpoints.v1_convert import convert_folder
from cogview.cli.main import main
from cogview.modeling.lora import LoraSettings, add_lora, lora_parameters
from tests.factories import input_error

CPU = torch.device("cpu")
PROJECTION = "layers.1.mlp.input.weight"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def change(path, name, value, dtype=None):
    """Replace one number of a tensor in a file of weights, and perhaps the dtype of all tensors."""
    tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in load_file(path).items()}
    tensors[name].view(-1)[5] = value
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    return f"{path}: {name} has 1 of {tensors[name].numel():,} numbers that are NaN or infinite: "


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 7, 33, 5000])
def test_is_finite_finds_every_value_in_every_place(dtype, size):
    """Vectorized and scalar parts of the reduction pass a NaN on."""
    tensor = torch.linspace(-60000, 60000, size).to(dtype)
    assert is_finite(tensor)
    for place in {0, size // 2, size - 1}:
        for value in (math.nan, math.inf, -math.inf):
            damaged = tensor.clone()
            damaged[place] = value
            assert not is_finite(damaged)
            assert not is_finite(damaged.repeat(3, 1).T[:, 1:])
    assert is_finite(torch.full((size,), torch.finfo(dtype).max, dtype=dtype))


def test_require_finite_accepts_whole_numbers_and_nothing():
    for tensor in (torch.empty(0), torch.tensor([1, 2]), torch.tensor([True])):
        require_finite("here", tensor)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        (torch.float32, None),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float32, "int8"),
        (torch.float32, "int4"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_load_transformer_names_the_tensor_that_is_not_finite(folder, stored, dtype, quantization, value):
    """Such a model was opened, and every image that it drew was noise."""
    path = folder / "model.safetensors"
    message = change(path, PROJECTION, value, stored)
    assert input_error(lambda: load_transformer(folder, CPU, dtype, quantization)).startswith(message)
    opened = load_transformer(folder, CPU, torch.float32, allow_nonfinite=True)
    assert not opened.get_parameter(PROJECTION).isfinite().all()


@pytest.mark.parametrize(("quantization", "name"), [("int8", "scale"), ("int4", "scales_and_zeros")])
@pytest.mark.parametrize("keep", [True, False])
def test_load_transformer_names_the_scales_that_are_not_finite(folder, tmp_path, quantization, name, keep):
    convert_folder(folder, tmp_path / "small", precision=Precision(None, quantization))
    message = change(tmp_path / "small" / "model.safetensors", f"layers.1.mlp.input.{name}", math.nan)
    asked = quantization if keep else None
    assert input_error(lambda: load_transformer(tmp_path / "small", CPU, torch.float32, asked)).startswith(message)


def test_load_transformer_refuses_numbers_beyond_the_dtype(folder):
    """A float32 model in float16 had infinite weights."""
    path = folder / "model.safetensors"
    change(path, PROJECTION, 1e6)
    load_transformer(folder, CPU, torch.bfloat16)
    assert input_error(lambda: load_transformer(folder, CPU, torch.float16)) == (
        f"{path}: {PROJECTION} has numbers beyond the range of float16: choose bfloat16 or float32"
    )


@pytest.mark.parametrize("name", ["quantizer.codebook", "encoder.1.weight"])
def test_load_image_tokenizer_names_the_tensor_that_is_not_finite(folder, name):
    message = change(folder / "image" / "model.safetensors", name, math.inf)
    assert input_error(lambda: load_image_tokenizer(folder / "image")).startswith(message)
    assert input_error(lambda: load_model(folder, CPU, torch.float32, meta_only=True)).startswith(message)


def test_save_model_refuses_numbers_beyond_the_dtype(folder, tmp_path):
    """`cogview package` rounds to float16."""
    model = load_model(folder, CPU, torch.float32)
    with torch.no_grad():
        model.transformer.get_parameter(PROJECTION)[0, 0] = 1e6
    message = f"{PROJECTION} has numbers beyond the range of float16: choose bfloat16 or float32"
    assert input_error(lambda: save_model(tmp_path / "half", model, torch.float16)) == message
    save_model(tmp_path / "whole", model)


def adapter_of(folder, target, scale=1.0):
    """Write an adapter of a model whose product is about ``scale``."""
    model = load_model(folder, CPU, torch.float32)
    settings = LoraSettings(rank=4, alpha=4.0)
    add_lora(model.transformer, settings)
    with torch.no_grad():
        for parameter in lora_parameters(model.transformer).values():
            parameter.fill_(math.sqrt(scale) / 2)
    save_adapter(target, model.transformer, settings, BaseModelInfo.of("", model.config))
    return target


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, output: convert_folder(folder, output, precision=Precision(torch.bfloat16)),
        lambda folder, output: merge_folder(folder, [Adapter(folder / "adapter")], output, name=""),
        lambda folder, output: push_folder(folder, "owner/name"),
    ],
    ids=["convert", "merge", "push"],
)
def test_commands_write_nothing_from_weights_that_are_not_finite(folder, tmp_path, write):
    adapter_of(folder, folder / "adapter")
    message = change(folder / "model.safetensors", PROJECTION, math.nan)
    assert input_error(lambda: write(folder, tmp_path / "output")).startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_push_refuses_an_adapter_that_is_not_finite(folder, tmp_path):
    adapter = adapter_of(folder, tmp_path / "adapter")
    name = "base_model.model.layers.0.attention.output.lora_B.weight"
    change(adapter / "adapter_model.safetensors", name, math.nan)
    message = input_error(lambda: push_folder(adapter, "owner/name"))
    assert "layers.0.attention.output.lora_B.weight has 1 of 128 numbers that are NaN or infinite" in message


def test_sums_with_an_adapter_beyond_float16_are_refused(folder, tmp_path):
    adapter = Adapter(adapter_of(folder, tmp_path / "adapter", scale=1e5))
    message = input_error(lambda: load_transformer(folder, CPU, torch.float16, adapters=[adapter]))
    assert message.endswith(" has numbers beyond the range of float16: choose bfloat16 or float32")
    load_transformer(folder, CPU, torch.bfloat16, adapters=[adapter])
    convert_folder(folder, tmp_path / "half", precision=Precision(torch.float16))
    message = input_error(lambda: merge_folder(tmp_path / "half", [adapter], tmp_path / "merged", name=""))
    assert message.endswith(" with the adapter has numbers beyond the range of float16: choose bfloat16 or float32")
    assert not (tmp_path / "merged").exists()


def test_generate_ends_in_one_line_when_weights_are_not_finite(folder, tmp_path, capsys):
    message = change(folder / "model.safetensors", "embedding.weight", math.nan)
    output = tmp_path / "images"
    assert main(["generate", "一只狐狸", "--model", str(folder), "-o", str(output)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"cogview generate: {message}")
    assert not list(output.glob("*"))
