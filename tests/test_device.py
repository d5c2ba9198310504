"""Where the model runs, and in which numbers, on machines with and without GPUs."""

import pytest
import torch

from cogview.device import choose_placement, training_dtype
from cogview.errors import InputError


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def cards(monkeypatch):
    """A function that puts two CUDA cards of a compute capability into this machine."""

    def insert(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        # PyTorch's own question says yes to cards that emulate bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)

    return insert


@pytest.fixture
def apple(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.usefixtures("no_gpu")
def test_machine_without_gpu():
    for asked in ("auto", "cpu"):
        placement = choose_placement(asked)
        assert (placement.device, placement.dtype) == (torch.device("cpu"), torch.float32)
    assert str(placement) == "cpu, float32 (no GPU is used)"


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_dtype_follows_the_card(cards, capability, dtype):
    cards(*capability)
    placement = choose_placement()
    assert (placement.device.type, placement.dtype) == ("cuda", getattr(torch, dtype))
    assert "bfloat16" in placement.reason


@pytest.mark.parametrize(("asked", "device"), [("cuda", "cuda"), ("cuda:1", "cuda:1"), ("1", "cuda:1"), ("cpu", "cpu")])
def test_device_may_be_asked_for(cards, asked, device):
    cards(8, 0)
    assert choose_placement(asked).device == torch.device(device)


@pytest.mark.usefixtures("apple")
def test_apple_gpu():
    for asked in ("auto", "mps"):
        placement = choose_placement(asked)
        assert (placement.device, placement.dtype) == (torch.device("mps"), torch.float16)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_may_be_asked_for(dtype):
    placement = choose_placement("cpu", dtype)
    assert str(placement) == f"cpu, {dtype} (as asked)"
    assert placement.dtype == getattr(torch, dtype)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device 'gpu' is unknown; expected auto, cpu, cuda, cuda:N or mps"),
        ("", "device '' is unknown"),
        ("meta", "device 'meta' is unknown"),  # PyTorch knows it, but nothing can be computed there
        ("cuda:x", "device 'cuda:x' is unknown"),
        ("cuda", "device cuda was asked for, but no CUDA device is to be seen; use --device cpu"),
        ("0", "device cuda:0 was asked for, but no CUDA device is to be seen"),
        ("mps", "device mps was asked for, but this machine has none; use --device cpu"),
    ],
)
def test_devices_that_cannot_be_had(device, message):
    with pytest.raises(InputError, match=message):
        choose_placement(device)


def test_card_that_is_not_there(cards):
    cards(8, 0)
    with pytest.raises(InputError, match="device cuda:2 was asked for, but there are only 2 CUDA devices"):
        choose_placement("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_unknown_dtype():
    with pytest.raises(InputError, match="dtype 'fp16' is unknown; known: auto, float32, bfloat16, float16"):
        choose_placement("cpu", "fp16")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), None), ((8, 0), torch.bfloat16)])
def test_training_follows_the_card(cards, capability, expected):
    cards(*capability)
    assert training_dtype(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("has_onednn", "has_avx512_bf16", "has_amx", "expected"),
    [
        (False, True, True, None),  # a Mac, say, where nothing computes in it
        (True, False, False, None),  # oneDNN would emulate it, several times slower than float32
        (True, True, False, torch.bfloat16),
        (True, False, True, torch.bfloat16),
    ],
)
def test_training_follows_the_cpu(monkeypatch, has_onednn, has_avx512_bf16, has_amx, expected):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert training_dtype(torch.device("cpu")) == expected


def test_training_precision_may_be_asked_for():
    cpu = torch.device("cpu")
    assert training_dtype(cpu, "float32") is None
    assert training_dtype(cpu, "bfloat16") == torch.bfloat16
    assert training_dtype(torch.device("mps")) is None
    with pytest.raises(InputError, match="precision 'fp8' is unknown; known: auto, bfloat16, float32"):
        training_dtype(cpu, "fp8")
