"""Configs that lie about sizes: each is refused by the headers of the weights, before anything is built."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview.checkpoints.checkpoint import check_sizes, load_model, load_transformer
from cogview.checkpoints.image_tokenizer import load_image_tokenizer
from cogview.checkpoints.precision import Precision
from cogview.checkpoints.v1_convert import convert_folder
from cogview.cli.main import main
from tests.factories import input_error

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def change(path, **values):
    """Change values of a JSON file; ``a__b`` is the key ``b`` of the value ``a``."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in values.items():
        *outer, last = name.split("__")
        inner = content
        for part in outer:
            inner = inner[part]
        inner[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def store(path, tensors):
    """Replace a file of weights, which may be mapped."""
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        ({"num_layers": 1000}, "num_layers is 1000, the file holds 2 layers"),
        ({"num_layers": 1}, "num_layers is 1, the file holds 2 layers"),
        ({"width": 1 << 17}, "width is 131072, embedding.weight has the shape [{rows}, 32]"),
        ({"max_positions": 1 << 20}, "max_positions is 1048576, positions.weight has the shape [96, 32]"),
    ],
)
def test_check_sizes_names_the_size_that_the_transformer_contradicts(folder, lie, problem):
    """Such a config took memory without bound, or ended in a traceback of the allocator."""
    rows = load_file(folder / "model.safetensors")["embedding.weight"].shape[0]
    change(folder / "config.json", **{f"transformer__{name}": value for name, value in lie.items()})
    message = f"{folder}/model.safetensors does not hold the weights that config.json describes: "
    message += problem.format(rows=rows)
    assert input_error(lambda: check_sizes(folder)) == message
    assert input_error(lambda: load_model(folder, CPU, torch.float32, meta_only=True)) == message
    assert input_error(lambda: load_transformer(folder, CPU, torch.bfloat16, "int8")) == message


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        ({"num_codes": 1 << 20}, "num_codes is 1048576, quantizer.codebook has the shape [{codes}, {width}]"),
        ({"code_width": 8192}, "code_width is 8192, quantizer.codebook has the shape [{codes}, {width}]"),
        ({"channels": [8192] * 3}, "encoder.1.weight has the shape [8, 12, 3, 3], expected [8192, 12, 3, 3]"),
        ({"encoder_blocks": [64] * 3}, "encoder.2.norm.weight is missing"),
        ({"decoder_blocks": [0, 0, 0]}, "decoder.1.weight is missing"),
    ],
)
def test_load_image_tokenizer_names_the_size_that_the_weights_contradict(folder, lie, problem):
    """The largest sizes that a config may have are 100 GB of random numbers, drawn before the file was opened."""
    codes, width = load_file(folder / "image" / "model.safetensors")["quantizer.codebook"].shape
    change(folder / "image" / "config.json", **lie)
    message = f"{folder}/image/model.safetensors does not hold the weights that config.json describes: "
    message += problem.format(codes=codes, width=width)
    assert input_error(lambda: load_image_tokenizer(folder / "image")) == message
    assert input_error(lambda: check_sizes(folder)) == message


def test_check_sizes_refuses_a_vocabulary_with_other_image_codes(folder):
    """The rows of the embedding are padded, so that its shape alone does not show a code that is missing."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocabulary"]["num_image_codes"]
    change(folder / "config.json", vocabulary__num_image_codes=config - 1)
    assert input_error(lambda: check_sizes(folder)) == (
        f"{folder}/config.json: num_image_codes is {config - 1}, the image tokenizer in {folder}/image has {config} "
        "codes; restore the folder's own"
    )


@pytest.mark.parametrize(("part", "name"), [("", "final_norm.bias"), ("image", "quantizer.codebook")])
def test_check_sizes_refuses_whole_numbers_where_floats_are_expected(folder, part, name):
    path = folder / part / "model.safetensors"
    tensors = load_file(path)
    store(path, {**tensors, name: tensors[name].to(torch.int64)})
    message = f"{path}: {name} is stored as int64, expected floating-point numbers; restore the file"
    assert input_error(lambda: check_sizes(folder)) == message


@pytest.mark.parametrize(("quantization", "scale"), [("int8", "scale"), ("int4", "scales_and_zeros")])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_load_transformer_refuses_scales_of_another_shape(folder, tmp_path, quantization, scale, dtype):
    """Restored to floats, such weights ended in a traceback about shapes."""
    convert_folder(folder, tmp_path / "small", precision=Precision(None, quantization))
    path, name = tmp_path / "small" / "model.safetensors", f"layers.1.mlp.input.{scale}"
    tensors = load_file(path)
    found = tensors[name][:-1]
    store(path, {**tensors, name: found.contiguous()})
    expected = f"{path}: {name} has the shape {list(found.shape)}, expected {list(tensors[name].shape)}"
    asked = quantization if dtype is None else None
    assert input_error(lambda: load_transformer(path.parent, CPU, torch.float32, asked)) == expected


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_load_transformer_refuses_a_projection_that_is_stored_otherwise(folder, tmp_path, quantization):
    convert_folder(folder, tmp_path / "small", precision=Precision(None, quantization))
    path, name = tmp_path / "small" / "model.safetensors", "layers.1.mlp.input.weight"
    store(path, {**load_file(path), name: load_file(folder / "model.safetensors")[name]})
    expected = f"{path}: {name} is not stored as {quantization}, as other weights are"
    assert input_error(lambda: load_transformer(path.parent, CPU, torch.float32)) == expected


@pytest.mark.parametrize("command", ["info", "estimate"])
def test_commands_report_a_config_that_lies_in_one_line(folder, command, capsys):
    """Both describe a model by its config alone, and believed it."""
    change(folder / "config.json", transformer__num_layers=1000)
    option = ["--model"] if command == "estimate" else []
    assert main([command, *option, str(folder)]) == 2
    assert "num_layers is 1000, the file holds 2 layers" in capsys.readouterr().err.strip()
