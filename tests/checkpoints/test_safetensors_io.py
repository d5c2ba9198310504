"""Files of weights: the safetensors library reads them, and no tensor is in memory twice."""

import hashlib
import json
import os
import random
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview.checkpoints import safetensors_io
from cogview.checkpoints.safetensors_io import (
    TensorSpec,
    WeightsFile,
    WeightsWriter,
    describe_mismatch,
    open_safetensors,
)
from cogview.errors import InputError
from tests.factories import input_error

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def some_tensors():
    """Return tensors of every dtype and of odd sizes, one of them empty and one a scalar."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{number}.weight": torch.randint(0, 100, (number + 1, 3), generator=generator).to(dtype)
        for number, dtype in enumerate(DTYPES)
    }
    return tensors | {
        "empty": torch.zeros(0, 5),
        "empty of few bits": torch.zeros(3, 0, dtype=torch.int8),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "name with “quotes”, 汉字 and\n": torch.ones(2, dtype=torch.uint8),
    }


def specs_of(tensors):
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path, tensors):
    with WeightsWriter(path, specs_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# --- written equals read --------------------------------------------------------------------------------------------


def test_weights_writer_writes_a_file_that_safetensors_reads(tmp_path):
    tensors = some_tensors()
    path = write(tmp_path / "weights", tensors)
    assert_same(load_file(path), tensors)
    file = WeightsFile(path)
    assert file.specs == specs_of(tensors)
    assert file.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert_same({name: file.read(name) for name in file.specs}, tensors)
    assert_same({name: file.read(name, keep=True) for name in file.specs}, tensors)


def test_weights_file_reads_a_file_of_safetensors(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "weights", metadata={"format": "pt"})
    file = WeightsFile(tmp_path / "weights")
    assert_same({name: file.read(name) for name in file.specs}, tensors)


@pytest.mark.parametrize("keep", [False, True])
def test_weights_file_reads_former_tensor_names_under_the_present_ones(tmp_path, keep):
    """int4 checkpoints of earlier versions call scales and zero points ``scale_zero``."""
    scales_and_zeros = torch.randn(1, 8, 2).bfloat16()
    save_file({"layers.0.mlp.input.scale_zero": scales_and_zeros}, tmp_path / "old.safetensors")
    file = WeightsFile(tmp_path / "old.safetensors")
    assert list(file.specs) == ["layers.0.mlp.input.scales_and_zeros"]
    assert torch.equal(file.read("layers.0.mlp.input.scales_and_zeros", keep=keep), scales_and_zeros)


def test_weights_writer_accepts_tensors_in_any_order(tmp_path):
    tensors = some_tensors()
    expected = write(tmp_path / "weights", tensors).read_bytes()
    for seed in range(3):
        names = list(tensors)
        random.Random(seed).shuffle(names)
        with WeightsWriter(tmp_path / "shuffled", specs_of(tensors)) as writer:
            for name in names:
                writer.write(name, tensors[name])
        assert (tmp_path / "shuffled").read_bytes() == expected


def test_weights_writer_writes_non_contiguous_tensors(tmp_path):
    tensors = {
        "transposed": torch.arange(12.0).view(3, 4).T,
        "every second": torch.arange(10)[::2],
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    assert_same(load_file(write(tmp_path / "weights", tensors)), tensors)


def test_weights_writer_aligns_every_tensor(tmp_path):
    tensors = some_tensors()
    content = write(tmp_path / "weights", tensors).read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:first]).items():
        assert (first + entry["data_offsets"][0]) % tensors[name].itemsize == 0


def test_weights_writer_allocates_the_file_in_advance(tmp_path):
    tensors = {"a": torch.zeros(1000), "b": torch.zeros(3, dtype=torch.int8)}
    with WeightsWriter(tmp_path / "weights", specs_of(tensors)) as writer:
        size = (tmp_path / "weights").stat().st_size
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert size in (0, (tmp_path / "weights").stat().st_size)  # 0 where the system cannot claim it


def test_weights_writer_writes_a_file_without_tensors(tmp_path):
    assert load_file(write(tmp_path / "weights", {})) == {}
    assert WeightsFile(tmp_path / "weights").specs == {}


# --- mismatches -----------------------------------------------------------------------------------------------------


def test_weights_writer_reports_tensors_that_were_not_written(tmp_path):
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)}
    with (
        pytest.raises(ValueError, match=r"^2 tensors were announced and not written: b$"),
        WeightsWriter(tmp_path / "weights", specs_of(tensors)) as writer,
    ):
        writer.write("a", tensors["a"])


def test_weights_writer_does_not_hide_another_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), WeightsWriter(tmp_path / "weights", {"a": TensorSpec(torch.int8, (2,))}):
        raise KeyboardInterrupt


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(6)])
def test_weights_writer_rejects_another_dtype_or_shape(tmp_path, tensor):
    writer = WeightsWriter(tmp_path / "weights", {"a": TensorSpec(torch.float32, (3, 2))})
    with pytest.raises(ValueError, match=r"^a is torch\.\w+ \(.*\), announced was TensorSpec\(dtype=torch.float32"):
        writer.write("a", tensor)
    writer.write("a", torch.zeros(3, 2))
    with writer:
        pass


def test_describe_mismatch_compares_names_and_shapes():
    wanted = {"a": (2, 3), "b": (4,)}
    assert describe_mismatch(wanted, dict(reversed(wanted.items()))) is None
    assert describe_mismatch(wanted, {"a": (2, 3)}) == "b is missing"
    assert describe_mismatch(wanted, {"a": (3, 2), "b": (4,)}) == "a has the shape [3, 2], expected [2, 3]"
    assert describe_mismatch(wanted, {**wanted, "c": (1,)}) == "c is unknown"


# --- damaged files --------------------------------------------------------------------------------------------------


def error_of(path):
    """Return the one-line message of opening a file, which must fail."""
    return input_error(WeightsFile, path)


def test_weights_file_reports_a_missing_file(tmp_path):
    assert error_of(tmp_path / "none") == f"{tmp_path / 'none'} is missing"
    assert error_of(tmp_path) == f"{tmp_path} is missing"


def test_weights_file_reports_truncated_files(tmp_path):
    path = write(tmp_path / "weights", some_tensors())
    for size in [*range(path.stat().st_size - 1, 8, -23), *range(8, -1, -1)]:
        os.truncate(path, size)
        assert error_of(path).startswith(f"{path} is damaged: ")


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n",
        bytes(100),
        b"\x10" + bytes(7) + b'{"a": {"dtype": ',
        b"\xff" * 64,
    ],
)
def test_weights_file_reports_other_kinds_of_file(tmp_path, content):
    (tmp_path / "weights").write_bytes(content)
    assert error_of(tmp_path / "weights").startswith(f"{tmp_path / 'weights'} is damaged: ")


def test_weights_file_reports_unknown_dtypes(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float8_e5m2)}, tmp_path / "weights")
    assert error_of(tmp_path / "weights") == (
        f"{tmp_path / 'weights'} holds b as F8_E5M2; known: F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL"
    )


# --- mapped into memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_weights_file_is_unchanged_when_a_tensor_is_modified(tmp_path, keep):
    path = write(tmp_path / "weights", {"a": torch.ones(5000)})
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    WeightsFile(path).read("a", keep=keep).zero_()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert torch.equal(WeightsFile(path).read("a"), torch.ones(5000))


def test_weights_file_read_outlives_the_deleted_file(tmp_path):
    path = write(tmp_path / "weights", {"a": torch.ones(5000)})
    tensor = WeightsFile(path).read("a", keep=True)
    path.unlink()
    assert torch.equal(tensor, torch.ones(5000))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_weights_file_is_mapped_only_while_a_tensor_is_alive(tmp_path, monkeypatch):
    path = write(tmp_path / "weights", {"a": torch.ones(5000), "b": torch.ones(5000)})

    def mappings():
        return sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())

    may_end = threading.Event()
    monkeypatch.setattr(safetensors_io, "_read_through", lambda path: may_end.wait())
    file = WeightsFile(path)
    file.prefetch()  # a slow disk keeps its thread busy until the end
    assert mappings() == 0
    for name in ("a", "b"):
        tensor = file.read(name)
        assert mappings() == 1
        del tensor
    assert mappings() == 0
    kept = [file.read(name, keep=True) for name in ("a", "b")]
    assert mappings() == 1
    del kept, file
    assert mappings() == 0
    may_end.set()


def test_weights_file_refuses_sizes_that_no_tensor_has(tmp_path):
    """A tensor without elements may have any other size; its strides overflowed when it was read."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match=r"a\.safetensors is damaged: a has the shape \[0, 4611686018427387904, "):
        WeightsFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_open_safetensors_refuses_other_files(tmp_path, kind):
    """A pipe made the command wait for ever; a folder was an OSError."""
    path = tmp_path / "a.safetensors"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(InputError, match="is no regular file" if kind == "pipe" else "it is a folder"):
        open_safetensors(path)
