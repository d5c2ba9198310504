"""PyTorch files: tensors of both layouts are read, and no file runs code."""

import argparse
import dataclasses
import io
import pickle
import random
import re
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from cogview.checkpoints.pickles import StoredTensor, read_pickle, tensors_of
from cogview.errors import InputError

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of the layout before the zip archive


@pytest.fixture(params=["zip", "legacy"])
def layout(request):
    return request.param


def saved(content, layout):
    """Return the bytes that ``torch.save`` writes for ``content``."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=layout == "zip")
    return buffer.getvalue()


def read(data):
    return read_pickle(io.BytesIO(data), "weights.pt")


def error_of(data):
    """Return the one-line message of reading ``data``, which must fail."""
    with pytest.raises(InputError) as caught:
        read(data)
    message = str(caught.value)
    assert message.startswith("weights.pt")
    assert "\n" not in message
    return message


def assert_read_as(stored, tensor):
    assert isinstance(stored, StoredTensor)
    assert (stored.dtype, stored.shape, stored.num_bytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
    result = stored.read()
    assert result.dtype == tensor.dtype
    assert result.is_contiguous()
    assert torch.equal(result, tensor)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_pickle_reads_every_dtype(layout, dtype):
    tensor = torch.randint(0, 100, (3, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    content = read(saved({"before": torch.zeros(5), "weight": tensor, "one": tensor[1, 2]}, layout))
    assert_read_as(content["weight"], tensor)
    assert_read_as(content["one"], tensor[1, 2])


def test_read_pickle_reads_views_of_one_storage(layout):
    base = torch.arange(60.0).view(5, 12)
    views = {
        "base": base,
        "row": base[3],
        "column": base[:, 4],
        "transposed": base.T,
        "every second": base[1::2, ::3],
        "one number": base[2, 7],
        "repeated": base[0, :1].expand(4),
        "empty": base[:0],
        "empty of three axes": torch.zeros(2, 0, 3),
        "last": base.view(-1)[-2:],
    }
    content = read(saved(views, layout))
    assert content.keys() == views.keys()
    for name, tensor in views.items():
        assert_read_as(content[name], tensor)
    assert content["row"].storage is content["base"].storage


def test_stored_tensor_read_returns_a_copy(layout):
    content = read(saved({"whole": torch.ones(4), "again": torch.ones(4)}, layout))
    first = content["whole"].read()
    first.zero_()
    assert torch.equal(content["whole"].read(), torch.ones(4))


def test_read_pickle_reads_a_state_dict_with_settings(layout):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    with torch.no_grad():
        model[1].running_mean.fill_(3)
    content = {
        "module": model.state_dict(),  # an OrderedDict with _metadata
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "args": argparse.Namespace(num_layers=48, name="红苹果", fp16=True),
        "names": {"a", "b"},
        "shape": torch.Size([2, 3]),
        "iteration": 125_000,
        "losses": [1.5, None, (2, "三")],
        "device": torch.device("cuda:0"),
        "dtype": torch.float16,
        "counts": Counter("aab"),
        "state": defaultdict(dict, a={"step": 1}),  # of an optimizer
    }
    found = read(saved(content, layout))
    assert isinstance(found["module"], OrderedDict)
    assert list(found["module"]) == list(content["module"])
    for name, tensor in content["module"].items():
        assert_read_as(found["module"][name], tensor)
    assert_read_as(found["parameter"], content["parameter"].detach())
    assert vars(found["args"]) == vars(content["args"])
    for name in ("names", "iteration", "losses", "dtype"):
        assert found[name] == content[name]
    assert found["shape"] == (2, 3)


def test_read_pickle_skips_random_states(layout):
    states = {
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.Generator().manual_seed(0).get_state(),
        "scale": np.float64(65536.0),
        "array": np.arange(3),
    }
    found = read(saved({**states, "weight": torch.ones(2)}, layout))
    assert found.keys() == {*states, "weight"}
    assert found["random_rng_state"] == states["random_rng_state"]
    assert_read_as(found["torch_rng_state"], states["torch_rng_state"])
    assert_read_as(found["weight"], torch.ones(2))
    assert not isinstance(found["array"], np.ndarray)


def test_read_pickle_accepts_module_names_of_numpy_1_and_2(layout):
    """The modules have moved in numpy 2; files keep the old names."""
    data = saved({"state": np.arange(3), "weight": torch.ones(2)}, layout)
    module = next(name for name in (b"numpy._core.multiarray", b"numpy.core.multiarray") if name in data)
    for other in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        if layout == "zip":
            content = pickle_of(data).replace(module, other)
            named = archive({"data.pkl": content, "data/0": zipfile.ZipFile(io.BytesIO(data)).read("archive/data/0")})
        else:
            named = data.replace(module, other)
        assert_read_as(read(named)["weight"], torch.ones(2))


def test_read_pickle_reads_an_open_file(layout, tmp_path):
    tensor = torch.arange(6.0).view(2, 3)
    path = tmp_path / "权重.pt"
    path.write_bytes(saved({"weight": tensor}, layout))
    with path.open("rb") as file:
        assert_read_as(read_pickle(file, str(path))["weight"], tensor)


class CountingFile(io.BytesIO):
    """A file that counts the bytes read from it."""

    count = 0

    def read(self, *size):
        data = super().read(*size)
        self.count += len(data)
        return data

    def readline(self, *size):
        data = super().readline(*size)
        self.count += len(data)
        return data

    def readinto(self, buffer):
        length = super().readinto(buffer)
        self.count += length
        return length


def test_read_pickle_reads_tensors_lazily(layout):
    tensors = {name: torch.full((500_000,), float(number)) for number, name in enumerate(("a", "b"))}
    file = CountingFile(saved(tensors, layout))
    content = read_pickle(file, "weights.pt")
    assert 0 < file.count < 200_000  # a zip archive is searched for its end
    file.count = 0
    assert torch.equal(content["b"].read(), tensors["b"])
    assert file.count == tensors["b"].nbytes


def test_tensors_of_removes_the_common_prefix():
    one, two = (torch.full((2,), value) for value in (1.0, 2.0))
    for content, names in [
        ({"a": one, "b.c": two, "step": 3}, ["a", "b.c"]),
        ({"module.a": one, "module.b": two}, ["a", "b"]),
        ({"module.module.a": one}, ["a"]),
        ({"module.a": one, "b": two}, ["module.a", "b"]),
        ({"step": 3}, []),
        ([one], []),
    ]:
        assert list(tensors_of(read(saved(content, "zip")))) == names


# --- files that run code --------------------------------------------------------------------------------------------


def call(module, name, *arguments):
    """Return a pickle, without its ends, that calls a function."""
    return f"c{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R"


def whole(code):
    return b"\x80\x02" + code + b"."


def below_module(code):
    """``{"module": {"weight": code}}``."""
    return b"}X\x06\x00\x00\x00module}X\x06\x00\x00\x00weight" + code + b"ss"


def archive(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def pickle_of(data):
    return zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")


def legacy(*pickles):
    """Return pickles of the older layout, the last ones replaced by ``pickles``."""
    parts = [pickle.dumps(part, 2) for part in (MAGIC, VERSION, {"little_endian": True}, {}, [])]
    return b"".join([*parts[: 5 - len(pickles)], *pickles])


POSITIONS = {
    "zip": lambda code: archive({"data.pkl": whole(code)}),
    "zip, below module": lambda code: archive({"data.pkl": whole(below_module(code))}),
    "legacy, magic": whole,
    "legacy, version": lambda code: pickle.dumps(MAGIC, 2) + whole(code),
    "legacy, system": lambda code: pickle.dumps(MAGIC, 2) + pickle.dumps(VERSION, 2) + whole(code),
    "legacy": lambda code: legacy(whole(below_module(code)), pickle.dumps([], 2)),
    "legacy, keys": lambda code: legacy(whole(code)),
}


@pytest.mark.parametrize("place", POSITIONS)
def test_read_pickle_refuses_code_at_any_position(place, tmp_path):
    target = tmp_path / "made"
    code = call("os", "mkdir", str(target))
    assert error_of(POSITIONS[place](code)) == (
        "weights.pt asks for os.mkdir, which no checkpoint needs and which could run code: the file is refused"
    )
    assert not target.exists()
    pickle.loads(whole(below_module(code)))  # it would have run
    assert target.exists()


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("posix", "system", ["touch {made}"]),
        ("os", "system", ["touch {made}"]),
        ("subprocess", "Popen", [["touch", "{made}"]]),
        ("builtins", "eval", ["open('{made}', 'w')"]),
        ("__builtin__", "eval", ["open('{made}', 'w')"]),
        ("builtins", "exec", ["open('{made}', 'w')"]),
        ("builtins", "getattr", [{}, "clear"]),
        ("builtins", "__import__", ["os"]),
        ("operator", "attrgetter", ["system"]),
        ("functools", "partial", [print]),
        ("copyreg", "_reconstructor", [object, object, None]),
        ("copyreg", "__newobj_ex__", [object, (), {}]),
        ("torch.hub", "load", ["{made}", "model"]),
        ("torch", "load", ["{made}"]),
        ("torch.storage", "_load_from_bytes", [b""]),
        ("torch.serialization", "load", ["{made}"]),
        ("torch", "hub", []),
        ("torch.nn.modules.linear", "Linear", [2, 2]),
        ("numpy", "load", ["{made}"]),
        ("numpy.testing._private.utils", "runstring", ["open('{made}', 'w')", {}]),
        ("collections", "namedtuple", ["name", "fields"]),
        ("weights", "make", ["{made}"]),
    ],
)
def test_read_pickle_refuses_every_other_global(layout, module, name, arguments, tmp_path):
    made = str(tmp_path / "made")
    filled = [one.format(made=made) if isinstance(one, str) else one for one in arguments]
    code = call(module, name, *filled)
    message = error_of(POSITIONS["legacy" if layout == "legacy" else "zip, below module"](code))
    assert message.startswith(f"weights.pt asks for {module}.{name}, ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "asked"),
    [
        (b"(X\x01\x00\x00\x00/ios\nmkdir\n", "os.mkdir"),  # INST
        (b"(cos\nmkdir\nX\x01\x00\x00\x00/o", "os.mkdir"),  # OBJ
        (b"cos\nmkdir\n)\x81", "os.mkdir"),  # NEWOBJ
        (b"\x8c\x05torch\x8c\x08hub.load\x93)R", "torch.hub.load"),  # STACK_GLOBAL, with a dot to go deeper
        (b"ctorch\n_utils.os.system\n)R", "torch._utils.os.system"),
        (b"ccollections\nOrderedDict.fromkeys\n)R", "collections.OrderedDict.fromkeys"),
        (b"c__main__\nmain\n", "__main__.main"),  # named, not even called
    ],
)
def test_read_pickle_refuses_every_opcode_that_names_a_function(layout, code, asked):
    assert error_of(POSITIONS[layout](code)).startswith(f"weights.pt asks for {asked}, ")


def test_read_pickle_refuses_objects_with_reduce(layout):
    class Trap:
        def __reduce__(self):
            return torch.hub.load, ("folder", "model")

    error = error_of(saved({"module": {"weight": torch.ones(2), "trap": Trap()}}, layout))
    assert error.startswith("weights.pt asks for torch.hub.load, ")


# --- damaged files --------------------------------------------------------------------------------------------------


def test_read_pickle_reports_truncated_files(layout):
    data = saved({"module": OrderedDict(a=torch.arange(50.0), b=torch.ones(3, 3)), "step": 7}, layout)
    read(data)
    for length in {*range(0, len(data), 29), *range(len(data) - 60, len(data)), *range(60)}:
        error_of(data[:length])


def test_stored_tensor_read_reports_a_file_truncated_meanwhile(layout):
    file = io.BytesIO(saved({"weight": torch.zeros(2000)}, layout))
    stored = read_pickle(file, "weights.pt")["weight"]
    file.truncate(3000)
    with pytest.raises(InputError, match=r"^the file is cut short: it ends inside a tensor$"):
        stored.read()


def test_stored_tensor_read_reports_a_tensor_beyond_its_storage(layout):
    stored = read(saved({"weight": torch.zeros(20)}, layout))["weight"]
    for changes in ({"shape": (21,)}, {"start": 1}, {"stride": (2,)}, {"shape": (1 << 50,)}):
        with pytest.raises(InputError, match=r"^the file is damaged: a tensor reaches beyond its numbers$"):
            dataclasses.replace(stored, **changes).read()


def test_read_pickle_reports_impossible_strides():
    """A pickle may claim any offset; values before the first belong to another tensor."""
    for arguments in ((-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2,), (-1,)), (0, (2,), (1, 1))):
        code = b"ctorch._utils\n_rebuild_tensor_v2\n("
        code += b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
        code += b"".join(pickle.dumps(part, 2)[2:-1] for part in (*arguments, False, {})) + b"tR"
        error = error_of(archive({"data.pkl": whole(code), "data/0": bytes(8)}))
        assert "no tensor has" in error or "is no number from 0 on" in error


def test_read_pickle_reports_missing_or_compressed_storage():
    data = saved({"weight": torch.zeros(2000)}, "zip")
    content, numbers = pickle_of(data), bytes(8000)
    assert read(archive({"data.pkl": content, "data/0": numbers}))["weight"].read().sum() == 0
    for damaged in (
        archive({"data.pkl": content}),
        archive({"data.pkl": content, "data/0": numbers}, compression=zipfile.ZIP_DEFLATED),
    ):
        assert re.fullmatch("weights.pt: the file is damaged: .*(is|are missing or) packed.*", error_of(damaged))


def test_read_pickle_reports_storage_beyond_the_end():
    """The archive's directory claims more bytes than the file has."""
    data = bytearray(saved({"weight": torch.zeros(2000)}, "zip"))
    entry = data.rindex(b"archive/data/0") - 46  # in the directory
    assert data[entry : entry + 4] == b"PK\x01\x02"
    data[entry + 20 : entry + 28] = 2 * (1 << 30).to_bytes(4, "little")  # both sizes
    assert error_of(bytes(data)) == "weights.pt: the file is damaged: the numbers of 0 reach beyond its end"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "weights.pt is no PyTorch file, or is cut short or damaged"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "weights.pt is no PyTorch file, or is cut short or "),
        ("这里没有权重\n".encode(), "weights.pt is no PyTorch file, or is cut short or damaged"),
        (b"PK\x03\x04 and no more", "weights.pt: the file is cut short: a zip archive without its end"),
        (pickle.dumps({"weight": [1.0, 2.0]}, 2), "weights.pt is no PyTorch file, or is cut short or damaged"),
        (
            b"".join(pickle.dumps(part, 2) for part in (1, 2, 3, 4, 5)),
            "weights.pt is no PyTorch file, or is cut short or damaged (it has none of PyTorch's marks)",
        ),
        (pickle.dumps(np.arange(3), 2), "weights.pt is no PyTorch file, or is cut short or damaged"),
        (archive({"readme.txt": b"hello"}), "weights.pt: it is a zip archive, but none that PyTorch wrote"),
        (archive({"data.pkl": whole(b"U\x01aQ")}), "weights.pt is no PyTorch file, or is cut short or damaged"),
    ],
    ids=["empty", "page", "text", "zip without end", "dict", "numbers", "array", "zip", "unknown reference"],
)
def test_read_pickle_reports_other_kinds_of_file(data, message):
    assert error_of(data).startswith(message)


def test_read_pickle_compares_the_crc_of_a_zip_archive():
    """A changed number in an archive was read as a weight, though the archive has a checksum of it."""
    tensors = {"whole": torch.full((500,), 3.0), "part": torch.full((2, 300), 5.0)[1]}
    data = saved(tensors, "zip")
    for name in tensors:
        damaged = bytearray(data)
        damaged[data.index(bytes(tensors[name][:50].numpy().data)) + 7] ^= 1  # of "part", in its other row
        stored = read(bytes(damaged))[name]
        with pytest.raises(InputError, match=r"the file is damaged: the numbers of \d differ from their CRC"):
            stored.read()
    assert read(data)["part"].read().sum() == 1500


def test_read_pickle_compares_the_crc_of_the_pickle():
    data = bytearray(saved({"weight": torch.ones(2, 3)}, "zip"))
    data[data.index(b"weight")] ^= 2
    assert "Bad CRC-32" in error_of(bytes(data))


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02}K\x01K\x01\x86q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"Ns.",  # a key of 2 ** 40 values
        b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.",  # the hash of 200,000 levels ends the process
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo of 16 GB
        b"Np2000000000\n.",
        b"\x80\x02B\xff\xff\xff\x7f.",  # bytes beyond the end of the file
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.",
        b"\x80\x02" + b"(" * 100 + b"\x81.",
    ],
)
@pytest.mark.parametrize("layout_of_code", ["zip", "legacy"])
def test_read_pickle_refuses_pickles_without_bounds(code, layout_of_code):
    """Ten bytes took gigabytes; 300 bytes took years."""
    begun = time.monotonic()
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, VERSION, {}))
    assert error_of(archive({"data.pkl": code}) if layout_of_code == "zip" else head + code)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_read_pickle_refuses_a_tensor_larger_than_its_storage(form):
    """Strides of 0 make a terabyte of four bytes."""
    assert "reaches beyond its numbers" in error_of(saved({"weight": torch.ones(1).expand(10**6, 10**6)}, form))


def test_read_pickle_refuses_a_place_before_the_file(tmp_path):
    """A directory of a zip archive whose offset is wrong made the seek fail with a bare errno."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
    content = bytearray((tmp_path / "a.pt").read_bytes())
    at = content.rindex(b"PK\x05\x06")  # the end of the directory; its offset stands at 16
    content[at + 16 : at + 20] = b"\xff\xff\xff\x7f"
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match="is cut short or damaged"), (tmp_path / "a.pt").open("rb") as file:
        read_pickle(file, "a.pt")
